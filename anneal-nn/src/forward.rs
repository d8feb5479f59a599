//! What a layer sees while it runs: parameters, the tape, the attention exchange.

use std::sync::Arc;

use anneal_tensor::{
    DType, Device, Leaf, Outputs, Phase, Result, Scope, Sink, Tape, Tensor, TensorError, checkpoint,
};

use crate::{AttentionExchange, LocalAttention, ParamId, ParamStore, ScopeId};

/// One run of a model over a store; cheap to clone.
#[derive(Clone)]
pub struct Forward {
    store: Arc<dyn ParamStore>,
    attention: Arc<dyn AttentionExchange>,
    tape: Option<Tape>,
    phase: Phase,
    checkpoint_blocks: bool,
}

impl Forward {
    /// A run without gradients.
    pub fn new(store: Arc<dyn ParamStore>) -> Self {
        let attention = Arc::new(LocalAttention);
        Self { store, attention, tape: None, phase: Phase::Forward, checkpoint_blocks: false }
    }

    /// A run that records on `tape`.
    pub fn recording(mut self, tape: &Tape) -> Self {
        self.tape = Some(tape.clone());
        self
    }

    /// Whether blocks keep only their inputs and run again in backward.
    pub fn checkpoint_blocks(mut self, yes: bool) -> Self {
        self.checkpoint_blocks = yes;
        self
    }

    /// How attention meets the tokens of other devices.
    pub fn with_attention(mut self, exchange: Arc<dyn AttentionExchange>) -> Self {
        self.attention = exchange;
        self
    }

    pub fn attention(&self) -> &dyn AttentionExchange {
        &*self.attention
    }

    pub fn device(&self) -> &Device {
        self.store.device()
    }

    /// The dtype of activations.
    pub fn dtype(&self) -> DType {
        self.store.compute_dtype()
    }

    /// A parameter: tracked if this run records and the parameter is trained.
    pub fn param(&self, id: ParamId) -> Result<Tensor> {
        match &self.tape {
            Some(tape) if self.store.parameters().spec(id).trainable => {
                tape.leaf(Arc::new(StoreLeaf { store: self.store.clone(), id }))
            }
            _ => self.store.value(id),
        }
    }

    /// Runs a part of the model inside its scope.
    pub fn scope<T>(&self, scope: ScopeId, run: impl FnOnce(&Self) -> Result<T>) -> Result<T> {
        let hooks = Arc::new(StoreScope { store: self.store.clone(), scope });
        hooks.enter(self.phase)?;
        if let Some(tape) = &self.tape {
            tape.scope_begin(hooks.clone());
        }
        let result = run(self);
        if let Some(tape) = &self.tape {
            tape.scope_end(hooks.clone());
        }
        hooks.exit(self.phase)?;
        result
    }

    /// Runs a repeated block inside its scope; with checkpointing, it runs again in backward.
    ///
    /// `run` must compute its outputs from the run and the inputs alone.
    pub fn block(
        &self,
        scope: ScopeId,
        inputs: &[&Tensor],
        run: impl Fn(&Self, &[Tensor]) -> Result<Vec<Tensor>> + Send + Sync + 'static,
    ) -> Result<Outputs> {
        if self.tape.is_none() || !self.checkpoint_blocks {
            let inputs: Vec<Tensor> = inputs.iter().map(|input| (*input).clone()).collect();
            return Ok(self.scope(scope, |forward| run(forward, &inputs))?.into_iter().collect());
        }
        let plain = Self { tape: None, ..self.clone() };
        checkpoint(inputs, move |tape, inputs| {
            let phase = if tape.is_some() { Phase::Recompute } else { plain.phase };
            let forward = Self { tape: tape.cloned(), phase, ..plain.clone() };
            forward.scope(scope, |forward| run(forward, inputs))
        })
    }
}

struct StoreLeaf {
    store: Arc<dyn ParamStore>,
    id: ParamId,
}

impl Leaf for StoreLeaf {
    fn fetch(&self) -> Result<Tensor, TensorError> {
        self.store.value(self.id)
    }

    fn sink(&self) -> Result<Sink, TensorError> {
        self.store.sink(self.id)
    }
}

struct StoreScope {
    store: Arc<dyn ParamStore>,
    scope: ScopeId,
}

impl Scope for StoreScope {
    fn enter(&self, phase: Phase) -> Result<()> {
        self.store.enter(self.scope, phase)
    }

    fn exit(&self, phase: Phase) -> Result<()> {
        self.store.exit(self.scope, phase)
    }
}

//! The tape: what was computed, what backward needs of it, and the walk back.
//!
//! Contract: [`apply`] runs an [`Op`]; if an input is tracked, the op is recorded with what
//! it saved. [`Tape::backward`] takes the records from the last to the first, hands each the
//! gradients of its outputs, and frees its saved tensors before going on.
//! Weights are never saved: a [`Leaf`] is fetched again when backward needs it, so a store
//! may free it in between; its gradient goes straight into the leaf's [`Sink`].
//! An output that its op can make again is not kept either, if [`Remaking`] says so: a consumer that
//! saves it saves its [`Remake`].
//! A [`Scope`] brackets a block in forward, recomputation and backward.

use std::cell::OnceCell;
use std::sync::{Arc, Mutex, MutexGuard};

use anneal_device::Device;

use smallvec::SmallVec;

use crate::ops::accumulate;
use crate::{DType, Result, Tensor, TensorError};

/// The outputs of an op.
pub type Outputs = SmallVec<[Tensor; 2]>;

/// An operation with its gradient. There is no default backward.
pub trait Op: Send + Sync + 'static {
    fn name(&self) -> &'static str;

    /// Computes the outputs from untracked data; saves what backward needs if `saver` records.
    fn forward(&self, inputs: &[&Tensor], saver: &mut Saver) -> Result<Outputs>;

    /// Gives each needed input its gradient.
    fn backward(&self, pass: &mut BackwardPass) -> Result<()>;
}

/// A value that outlives the tape: a parameter.
pub trait Leaf: Send + Sync {
    /// The value, untracked. May be called again in backward, inside the same scope.
    fn fetch(&self) -> Result<Tensor>;
    /// Where the gradient goes. Each call is followed by exactly one write of the whole gradient.
    fn sink(&self) -> Result<Sink>;
}

/// Memory for a leaf's gradient, in f32 and contiguous.
pub struct Sink {
    pub gradient: Tensor,
    /// Whether to add to what is there; otherwise contents are unspecified and overwritten.
    pub accumulate: bool,
}

/// Makes an output of an op again in backward, bit for bit, from what that op keeps anyway.
///
/// Holds no weights, for it may be asked outside its op's scope.
pub trait Remake: Send + Sync {
    fn remake(&self) -> Result<Tensor>;
}

/// Whether outputs that can be made again are made again in backward instead of being kept for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Remaking {
    /// On GPUs, whose memory limits the batch and whose bandwidth makes it cheap.
    #[default]
    OnGpu,
    Always,
    Never,
}

impl Remaking {
    fn applies(self, device: &Device) -> bool {
        match self {
            Self::OnGpu => matches!(device, Device::Cuda(_)),
            Self::Always => true,
            Self::Never => false,
        }
    }
}

/// Why a block is being run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    Forward,
    Recompute,
    Backward,
}

/// Told when a block begins and ends, so that a store can bring and release its weights.
pub trait Scope: Send + Sync {
    fn enter(&self, phase: Phase) -> Result<()>;
    fn exit(&self, phase: Phase) -> Result<()>;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct ValueId(usize);

#[derive(Clone)]
pub(crate) struct Track {
    tape: Tape,
    value: ValueId,
}

enum Saved {
    Tensor(Tensor),
    Leaf(Arc<dyn Leaf>),
    /// With the tensor once it has been made.
    Remake(Arc<dyn Remake>, OnceCell<Tensor>),
    Taken,
}

struct Node {
    op: Arc<dyn Op>,
    inputs: SmallVec<[Option<ValueId>; 6]>,
    outputs: SmallVec<[ValueId; 2]>,
    saved: SmallVec<[Saved; 6]>,
}

enum Record {
    Node(Box<Node>),
    ScopeBegin(Arc<dyn Scope>),
    ScopeEnd(Arc<dyn Scope>),
}

#[derive(Default)]
struct Value {
    gradient: Option<Tensor>,
    leaf: Option<Arc<dyn Leaf>>,
    /// Until backward has passed the op that made the value.
    remake: Option<Arc<dyn Remake>>,
}

#[derive(Default)]
struct State {
    remaking: Remaking,
    records: Vec<Record>,
    values: Vec<Value>,
}

/// A recording of one forward pass; clones are the same recording.
#[derive(Clone, Default)]
pub struct Tape(Arc<Mutex<State>>);

impl Tape {
    pub fn new() -> Self {
        Self::default()
    }

    /// The same recording under another policy; to be set before anything is recorded.
    pub fn with_remaking(self, remaking: Remaking) -> Self {
        self.state().remaking = remaking;
        self
    }

    /// A tracked handle of a parameter.
    pub fn leaf(&self, leaf: Arc<dyn Leaf>) -> Result<Tensor> {
        let mut tensor = leaf.fetch()?;
        tensor.track = Some(self.track(Value { leaf: Some(leaf), ..Value::default() }));
        Ok(tensor)
    }

    /// A tracked handle of an input whose gradient is wanted.
    pub fn variable(&self, tensor: &Tensor) -> Tensor {
        let track = Some(self.track(Value::default()));
        let mut variable = tensor.clone();
        variable.track = track;
        variable
    }

    /// The gradient of a [`Tape::variable`] after backward; `None` if nothing reached it.
    pub fn take_gradient(&self, variable: &Tensor) -> Option<Tensor> {
        let track = variable.track.as_ref()?;
        self.state().values[track.value.0].gradient.take()
    }

    /// Records that a block begins. The caller has entered the scope.
    pub fn scope_begin(&self, scope: Arc<dyn Scope>) {
        self.state().records.push(Record::ScopeBegin(scope));
    }

    /// Records that a block has ended.
    pub fn scope_end(&self, scope: Arc<dyn Scope>) {
        self.state().records.push(Record::ScopeEnd(scope));
    }

    /// Walks back from `loss`, a tensor of one element, with gradient 1.
    pub fn backward(&self, loss: &Tensor) -> Result<()> {
        self.backward_scaled(loss, 1.0)
    }

    /// Walks back from `loss`, a tensor of one element, with the given gradient.
    pub fn backward_scaled(&self, loss: &Tensor, scale: f32) -> Result<()> {
        if loss.elements() != 1 || loss.dtype() != DType::F32 {
            let message = format!("the loss must be one f32 number, found {loss:?}");
            return Err(TensorError::Backward { message });
        }
        let seed = Tensor::full(loss.device(), scale, loss.dims())?;
        self.backward_from(vec![(loss.clone(), seed)])
    }

    /// Walks back from several outputs with given gradients. The recording is used up.
    pub fn backward_from(&self, seeds: Vec<(Tensor, Tensor)>) -> Result<()> {
        for (output, gradient) in seeds {
            let track = output.track.as_ref().ok_or_else(|| TensorError::Backward {
                message: "the tensor to walk back from is not tracked".into(),
            })?;
            if output.dims() != gradient.dims() {
                let message = format!(
                    "a gradient of shape {:?} for an output of shape {:?}",
                    gradient.dims(),
                    output.dims()
                );
                return Err(TensorError::Backward { message });
            }
            self.deliver(track.value, gradient)?;
        }
        loop {
            let record = self.state().records.pop();
            match record {
                None => return Ok(()),
                Some(Record::ScopeEnd(scope)) => scope.enter(Phase::Backward)?,
                Some(Record::ScopeBegin(scope)) => scope.exit(Phase::Backward)?,
                Some(Record::Node(node)) => self.backward_node(*node)?,
            }
        }
    }

    fn backward_node(&self, node: Node) -> Result<()> {
        let mut pass = {
            let mut state = self.state();
            let remaking = state.remaking;
            let outputs = node.outputs.iter().map(|value| {
                let value = &mut state.values[value.0];
                value.remake = None;
                value.gradient.take()
            });
            let gradients: SmallVec<[Option<Tensor>; 2]> = outputs.collect();
            if gradients.iter().all(Option::is_none) {
                return Ok(());
            }
            let targets = node
                .inputs
                .iter()
                .map(|input| match input {
                    None => Target::Unneeded,
                    Some(value) => match &state.values[value.0].leaf {
                        Some(leaf) => Target::Leaf(leaf.clone()),
                        None => Target::Value,
                    },
                })
                .collect();
            let (op, given) = (node.op.name(), SmallVec::new());
            BackwardPass { op, remaking, gradients, saved: node.saved, targets, given }
        };
        node.op.backward(&mut pass)?;
        let given = std::mem::take(&mut pass.given);
        drop(pass);
        for (input, gradient) in given {
            let value = node.inputs[input].expect("a gradient is given only where one is needed");
            self.deliver(value, gradient)?;
        }
        Ok(())
    }

    fn deliver(&self, value: ValueId, gradient: Tensor) -> Result<()> {
        let present = self.state().values[value.0].gradient.take();
        let sum = match present {
            None => gradient,
            Some(present) => accumulate::add_owned(present, gradient)?,
        };
        self.state().values[value.0].gradient = Some(sum);
        Ok(())
    }

    fn track(&self, value: Value) -> Track {
        let mut state = self.state();
        state.values.push(value);
        Track { tape: self.clone(), value: ValueId(state.values.len() - 1) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// Where an input's value comes from when backward wants it.
enum Source {
    Memory,
    Leaf(Arc<dyn Leaf>),
    Remake(Arc<dyn Remake>),
}

/// Collects what an op's backward will need.
pub struct Saver {
    recording: bool,
    remakes: bool,
    needs: SmallVec<[bool; 6]>,
    sources: SmallVec<[Source; 6]>,
    saved: SmallVec<[Saved; 6]>,
    remade: SmallVec<[(usize, Arc<dyn Remake>); 1]>,
}

impl Saver {
    /// Whether backward may follow; if not, nothing needs to be saved or computed for it.
    pub fn recording(&self) -> bool {
        self.recording
    }

    /// Whether backward will be asked for the gradient of this input.
    pub fn needs(&self, input: usize) -> bool {
        self.needs[input]
    }

    /// Saves an input: by reference to its leaf if it is a parameter, to its [`Remake`] if it can be made
    /// again, else its memory.
    pub fn input(&mut self, index: usize, tensor: &Tensor) {
        if self.recording {
            self.saved.push(match &self.sources[index] {
                Source::Leaf(leaf) => Saved::Leaf(leaf.clone()),
                Source::Remake(remake) => Saved::Remake(remake.clone(), OnceCell::new()),
                Source::Memory => Saved::Tensor(tensor.detach()),
            });
        }
    }

    /// Whether outputs are to be made again instead of kept: the recording's policy says so, and none of the inputs
    /// that this takes is a parameter.
    pub fn remakes(&self, takes: impl IntoIterator<Item = usize>) -> bool {
        let is_parameter = |input: usize| matches!(self.sources[input], Source::Leaf(_));
        self.recording && self.remakes && !takes.into_iter().any(is_parameter)
    }

    /// Offers to make an output again; to be called if [`Self::remakes`].
    pub fn remake(&mut self, output: usize, remake: impl Remake + 'static) {
        self.remade.push((output, Arc::new(remake)));
    }

    /// Saves a tensor made in forward.
    pub fn tensor(&mut self, tensor: &Tensor) {
        if self.recording {
            self.saved.push(Saved::Tensor(tensor.detach()));
        }
    }
}

enum Target {
    Unneeded,
    Value,
    Leaf(Arc<dyn Leaf>),
}

/// What an op sees in backward.
pub struct BackwardPass {
    op: &'static str,
    remaking: Remaking,
    gradients: SmallVec<[Option<Tensor>; 2]>,
    saved: SmallVec<[Saved; 6]>,
    targets: SmallVec<[Target; 6]>,
    given: SmallVec<[(usize, Tensor); 6]>,
}

impl BackwardPass {
    /// Whether this input's gradient is wanted.
    pub fn needs(&self, input: usize) -> bool {
        !matches!(self.targets[input], Target::Unneeded)
    }

    /// The number of the op's inputs.
    pub fn inputs(&self) -> usize {
        self.targets.len()
    }

    /// The gradient of an output; `None` if nothing depended on it.
    pub fn gradient(&self, output: usize) -> Option<&Tensor> {
        self.gradients[output].as_ref()
    }

    /// The same, given away so that its memory can be reused.
    pub fn take_gradient(&mut self, output: usize) -> Option<Tensor> {
        self.gradients[output].take()
    }

    /// The gradient of an op's only output.
    ///
    /// # Panics
    /// If it was taken before.
    pub fn only_gradient(&mut self) -> Tensor {
        self.gradients[0].take().expect("a node runs only if a gradient reached it")
    }

    /// What forward saved, in order. What is made again is made once and lives until the op's backward
    /// ends or takes it.
    pub fn saved(&self, index: usize) -> Result<Tensor> {
        match &self.saved[index] {
            Saved::Tensor(tensor) => Ok(tensor.clone()),
            Saved::Leaf(leaf) => leaf.fetch(),
            Saved::Remake(remake, made) => match made.get() {
                Some(tensor) => Ok(tensor.clone()),
                None => {
                    let tensor = remake.remake()?;
                    Ok(made.get_or_init(|| tensor).clone())
                }
            },
            Saved::Taken => panic!("{} used a saved tensor after taking it", self.op),
        }
    }

    /// A saved tensor, given away so that its memory can be reused.
    pub fn take_saved(&mut self, index: usize) -> Result<Tensor> {
        let tensor = self.saved(index)?;
        self.saved[index] = Saved::Taken;
        Ok(tensor)
    }

    /// For a parameter: where to write its gradient. `None` for activations (use [`Self::give`]).
    pub fn sink(&self, input: usize) -> Result<Option<Sink>> {
        match &self.targets[input] {
            Target::Leaf(leaf) => leaf.sink().map(Some),
            _ => Ok(None),
        }
    }

    /// Hands over the gradient of an input; ignored if it is not wanted.
    pub fn give(&mut self, input: usize, gradient: Tensor) -> Result<()> {
        match &self.targets[input] {
            Target::Unneeded => Ok(()),
            Target::Value => {
                self.given.push((input, gradient));
                Ok(())
            }
            Target::Leaf(leaf) => accumulate::into_sink(self.op, leaf.sink()?, &gradient),
        }
    }
}

/// Runs an op, and records it if an input is tracked.
///
/// # Errors
/// Those of the op; inputs on different devices or different tapes.
pub fn apply(op: impl Op, inputs: &[&Tensor]) -> Result<Outputs> {
    let name = op.name();
    if inputs.windows(2).any(|pair| !pair[0].device().same(pair[1].device())) {
        return Err(TensorError::MixedDevices { op: name });
    }
    let mut tape: Option<&Tape> = None;
    for track in inputs.iter().filter_map(|input| input.track.as_ref()) {
        if tape.is_some_and(|tape| !Arc::ptr_eq(&tape.0, &track.tape.0)) {
            let message = format!("{name} mixes tensors of two recordings");
            return Err(TensorError::Backward { message });
        }
        tape = Some(&track.tape);
    }
    let mut saver = saver(tape, inputs);
    let mut outputs = op.forward(inputs, &mut saver)?;
    if let Some(tape) = tape {
        let mut values = SmallVec::new();
        for (index, output) in outputs.iter_mut().enumerate() {
            let remake = saver.remade.iter().find(|(output, _)| *output == index);
            let remake = remake.map(|(_, remake)| remake.clone());
            let track = tape.track(Value { remake, ..Value::default() });
            values.push(track.value);
            output.track = Some(track);
        }
        let inputs = inputs.iter().map(|input| input.track.as_ref().map(|track| track.value)).collect();
        let node = Node { op: Arc::new(op), inputs, outputs: values, saved: saver.saved };
        tape.state().records.push(Record::Node(Box::new(node)));
    }
    Ok(outputs)
}

fn saver(tape: Option<&Tape>, inputs: &[&Tensor]) -> Saver {
    let sources: SmallVec<[Source; 6]> = inputs.iter().map(|input| source_of(input)).collect();
    let remakes = match (tape, inputs.first()) {
        (Some(tape), Some(input)) => tape.state().remaking.applies(input.device()),
        _ => false,
    };
    Saver {
        recording: tape.is_some(),
        remakes,
        needs: inputs.iter().map(|input| input.is_tracked()).collect(),
        sources,
        saved: SmallVec::new(),
        remade: SmallVec::new(),
    }
}

fn source_of(tensor: &Tensor) -> Source {
    let Some(track) = &tensor.track else { return Source::Memory };
    let state = track.tape.state();
    match &state.values[track.value.0] {
        Value { leaf: Some(leaf), .. } => Source::Leaf(leaf.clone()),
        Value { remake: Some(remake), .. } => Source::Remake(remake.clone()),
        _ => Source::Memory,
    }
}

/// For operations without a gradient: an error if an input is tracked.
pub fn refuse_tracked(op: &'static str, inputs: &[&Tensor]) -> Result<()> {
    if inputs.iter().any(|input| input.is_tracked()) {
        return Err(TensorError::NotDifferentiable { op });
    }
    Ok(())
}

type BlockFunction = dyn Fn(Option<&Tape>, &[Tensor]) -> Result<Vec<Tensor>> + Send + Sync;

/// Activation checkpointing: runs `function` without recording and again in backward.
///
/// `function` receives `None` in the first run and the tape to record on in the second;
/// both runs must compute the same values. Only the inputs are kept in between.
pub fn checkpoint(
    inputs: &[&Tensor],
    function: impl Fn(Option<&Tape>, &[Tensor]) -> Result<Vec<Tensor>> + Send + Sync + 'static,
) -> Result<Outputs> {
    apply(Checkpoint { function: Box::new(function) }, inputs)
}

struct Checkpoint {
    function: Box<BlockFunction>,
}

impl Op for Checkpoint {
    fn name(&self) -> &'static str {
        "checkpoint"
    }

    fn forward(&self, inputs: &[&Tensor], saver: &mut Saver) -> Result<Outputs> {
        for (index, input) in inputs.iter().enumerate() {
            saver.input(index, input);
        }
        let plain: Vec<Tensor> = inputs.iter().map(|input| input.detach()).collect();
        Ok((self.function)(None, &plain)?.into_iter().collect())
    }

    fn backward(&self, pass: &mut BackwardPass) -> Result<()> {
        let tape = Tape::new().with_remaking(pass.remaking);
        let count = pass.targets.len();
        let inputs = (0..count)
            .map(|index| {
                let input = pass.take_saved(index)?;
                Ok(if pass.needs(index) { tape.variable(&input) } else { input })
            })
            .collect::<Result<Vec<Tensor>>>()?;
        let outputs = (self.function)(Some(&tape), &inputs)?;
        let seeds = outputs
            .iter()
            .enumerate()
            .filter_map(|(index, output)| Some((output.clone(), pass.take_gradient(index)?)))
            .collect();
        drop(outputs);
        tape.backward_from(seeds)?;
        for (index, input) in inputs.iter().enumerate() {
            if let Some(gradient) = tape.take_gradient(input) {
                pass.give(index, gradient)?;
            }
        }
        Ok(())
    }
}

//! A store that keeps one scope's weights at a time trains DiT to the same bits as the resident one.
//!
//! [`FreeingStore`] holds the weights in chunks of a lower tier, where the optimizer updates them. A
//! scope's working copies are made when it is entered, and poisoned with NaN and dropped when it is
//! left, so whatever still reads them afterwards spoils the loss or a gradient. Chunk sizes, activation
//! checkpointing, the compute dtype and the device vary.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use anneal_diffusion::{BetaSchedule, Objective, Prediction, Process, Schedule};
use anneal_models::dit::{Dit, DitConfig};
use anneal_models::{Conditioning, Denoiser};
use anneal_nn::{
    Chunk, ChunkLayout, Forward, ParamId, ParamStore, Parameters, ResidentStore, ScopeId, StoreOptions,
};
use anneal_optim::{AdamW, AdamWOptions, Decay, State};
use anneal_tensor::{DType, Device, Phase, Result, Sink, Tape, Tensor, ops};
use anneal_testkit::{Golden, on_every_device, poisoned_cpu};

/// How often each scope was entered and left, by its name and the phase.
type Visits = BTreeMap<(String, &'static str), [usize; 2]>;

/// What is on the device at present.
#[derive(Default)]
struct Working {
    /// Scopes by their depth of entering, with their parameters' copies.
    scopes: BTreeMap<ScopeId, (usize, BTreeMap<ParamId, Tensor>)>,
    visits: Visits,
    /// The most scopes that were on the device together.
    most_scopes: usize,
}

/// Frees a scope's weights when it is left and fetches them when it is entered.
struct FreeingStore {
    host: ResidentStore,
    working: Mutex<Working>,
}

impl FreeingStore {
    fn new(host: ResidentStore) -> Self {
        Self { host, working: Mutex::default() }
    }

    fn working(&self) -> MutexGuard<'_, Working> {
        self.working.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn count(&self, scope: ScopeId, phase: Phase, place: usize) {
        let phase = match phase {
            Phase::Forward => "forward",
            Phase::Recompute => "recompute",
            Phase::Backward => "backward",
        };
        let name = self.parameters().scopes()[scope.0].clone();
        self.working().visits.entry((name, phase)).or_default()[place] += 1;
    }

    /// Copies of a scope's parameters, as far apart as in chunks: for what lies alike, a device picks the same algorithms.
    fn fetch(&self, scope: ScopeId) -> Result<BTreeMap<ParamId, Tensor>> {
        let own: Vec<ParamId> =
            self.parameters().iter().filter(|(_, spec)| spec.scope == scope).map(|(id, _)| id).collect();
        let elements = |id: &ParamId| self.layout().slot(*id).elements.next_multiple_of(16);
        let flat = Tensor::zeros(self.device(), &[own.iter().map(elements).sum()], self.compute_dtype())?;
        let mut start = 0;
        let fetch = |id: &ParamId| {
            let (slot, spec) = (self.layout().slot(*id), self.parameters().spec(*id));
            let copy = flat.piece(start, &spec.shape)?;
            start += elements(id);
            ops::overwrite(&copy, &self.host.chunk(slot.chunk)?.weights.piece(slot.offset, &spec.shape)?)?;
            Ok((*id, copy))
        };
        own.iter().map(fetch).collect()
    }

    fn poison(&self, copy: &Tensor) -> Result<()> {
        let values = Tensor::from_slice(self.device(), &vec![f32::NAN; copy.elements()], copy.dims())?;
        ops::overwrite(copy, &ops::cast(&values, copy.dtype())?)
    }
}

impl ParamStore for FreeingStore {
    fn parameters(&self) -> &Arc<Parameters> {
        self.host.parameters()
    }

    fn layout(&self) -> &ChunkLayout {
        self.host.layout()
    }

    fn device(&self) -> &Device {
        self.host.device()
    }

    fn compute_dtype(&self) -> DType {
        self.host.compute_dtype()
    }

    fn enter(&self, scope: ScopeId, phase: Phase) -> Result<()> {
        self.host.enter(scope, phase)?;
        self.count(scope, phase, 0);
        let fetched = match self.working().scopes.contains_key(&scope) {
            true => BTreeMap::new(),
            false => self.fetch(scope)?,
        };
        let mut working = self.working();
        working.scopes.entry(scope).or_insert((0, fetched)).0 += 1;
        working.most_scopes = working.most_scopes.max(working.scopes.len());
        Ok(())
    }

    fn exit(&self, scope: ScopeId, phase: Phase) -> Result<()> {
        self.host.exit(scope, phase)?;
        self.count(scope, phase, 1);
        let mut working = self.working();
        let (depth, _) = working.scopes.get_mut(&scope).expect("the host checked that the scope was entered");
        *depth -= 1;
        if *depth == 0 {
            let (_, copies) = working.scopes.remove(&scope).expect("it was just found");
            drop(working);
            copies.values().try_for_each(|copy| self.poison(copy))?;
        }
        Ok(())
    }

    fn value(&self, id: ParamId) -> Result<Tensor> {
        let spec = self.parameters().spec(id);
        let working = self.working();
        let copies = working.scopes.get(&spec.scope).map(|(_, copies)| copies);
        Ok(copies.unwrap_or_else(|| panic!("{} was used outside its scope", spec.name))[&id].clone())
    }

    fn sink(&self, id: ParamId) -> Result<Sink> {
        let spec = self.parameters().spec(id);
        assert!(
            self.working().scopes.contains_key(&spec.scope),
            "{} has no sink outside its scope",
            spec.name
        );
        self.host.sink(id)
    }

    fn clear_gradients(&self) {
        self.host.clear_gradients();
    }

    fn finish_gradients(&self) -> Result<()> {
        self.host.finish_gradients()
    }

    fn chunk(&self, index: usize) -> Result<Chunk> {
        assert!(
            self.working().scopes.is_empty(),
            "chunk {index} was asked for while a scope was on the device"
        );
        self.host.chunk(index)
    }
}

/// The golden model and batch that everything here is run on.
struct Case {
    golden: Golden,
    config: DitConfig,
    device: Device,
    objective: Objective,
}

impl Case {
    fn new(device: &Device) -> Self {
        let golden = Golden::matching("dit_").into_iter().next_back().expect("matching is never empty");
        let number = |key: &str| {
            golden.config()[key].as_u64().unwrap_or_else(|| panic!("{key} in the metadata")) as usize
        };
        let config = DitConfig {
            image_size: [number("input_size"); 2],
            channels: number("in_channels"),
            patch_size: number("patch_size"),
            hidden_size: number("hidden_size"),
            depth: number("depth"),
            heads: number("num_heads"),
            mlp_ratio: golden.config()["mlp_ratio"].as_f64().unwrap_or(4.0),
            classes: number("num_classes"),
            learn_sigma: golden.config()["learn_sigma"].as_bool().unwrap_or(true),
            mlp_norm_epsilon: 1e-6,
            frequency_shift: 0,
            block_embedders: false,
        };
        let process = Process::Diffusion(Schedule::new(BetaSchedule::linear(1000), 1000).unwrap());
        let objective = Objective::new(process, Prediction::Epsilon, config.learn_sigma, None).unwrap();
        Self { golden, config, device: device.clone(), objective }
    }

    fn tensor(&self, name: &str) -> Tensor {
        let (values, shape) = self.golden.f32(name);
        Tensor::from_slice(&self.device, &values, &shape).unwrap()
    }

    /// The model, and a store that holds the golden weights.
    fn resident(&self, chunk_elements: usize, compute_dtype: DType) -> (Dit, ResidentStore) {
        let (model, parameters) = Dit::new(&self.config).unwrap();
        let options = StoreOptions { compute_dtype, chunk_elements, train: true };
        let store = ResidentStore::new(Arc::new(parameters), &self.device, options).unwrap();
        for (id, spec) in store.parameters().iter() {
            store.write(id, &self.golden.f32(&format!("param.{}", spec.name)).0).unwrap();
        }
        (model, store)
    }

    fn loss(&self, model: &Dit, store: &Arc<dyn ParamStore>, checkpoint: bool) -> f32 {
        let (clean, noise) = (self.tensor("in.x"), self.tensor("in.noise"));
        let timesteps: Vec<f64> = self.golden.i64("in.t").0.into_iter().map(|value| value as f64).collect();
        let noised = self.objective.noised(&clean, &noise, &timesteps).unwrap();
        let tape = Tape::new();
        let forward = Forward::new(store.clone()).recording(&tape).checkpoint_blocks(checkpoint);
        let labels = self.golden.i64("in.y").0;
        let asked: Vec<f32> = timesteps.iter().map(|value| *value as f32).collect();
        let output = model.forward(&forward, &noised, &asked, &Conditioning { labels: &labels }).unwrap();
        let losses = self.objective.loss(&output, &clean, &noise, &timesteps).unwrap();
        let mean = ops::mean(&losses.total, &[0], false).unwrap();
        tape.backward(&mean).unwrap();
        mean.to_vec::<f32>().unwrap()[0]
    }

    /// Some steps of AdamW with an average.
    fn train(&self, model: &Dit, store: Arc<dyn ParamStore>, checkpoint: bool, clip: Option<f64>) -> Trained {
        let options = AdamWOptions {
            betas: [0.9, 0.999],
            epsilon: 1e-8,
            weight_decay: 0.01,
            decay: Decay::All,
            clip,
            ema_rates: vec![0.9],
            ema_warmup: false,
            scale_loss: false,
        };
        let mut optimizer = AdamW::new(&*store, options).unwrap();
        let mut trained = Trained::default();
        for _ in 0..STEPS {
            trained.losses.push(self.loss(model, &store, checkpoint).to_bits());
            store.finish_gradients().unwrap();
            trained.gradients.push(gradients(&*store));
            assert!(!optimizer.step(&*store, 1e-2).unwrap().wait().unwrap().skipped);
        }
        for (id, spec) in store.parameters().iter() {
            trained.weights.insert(spec.name.clone(), bits(&store.read(id).unwrap()));
            for state in [State::Master, State::FirstMoment, State::SecondMoment, State::Average(0)] {
                let values = optimizer.read(&*store, state, id).unwrap();
                assert_eq!(values.is_some(), spec.trainable, "{}: optimizer state", spec.name);
                trained
                    .optimizer
                    .extend(values.map(|values| (format!("{state:?} {}", spec.name), bits(&values))));
            }
        }
        trained
    }
}

const STEPS: usize = 3;

/// The bits of values, by name.
type Bits = BTreeMap<String, Vec<u32>>;

/// Everything that training leaves behind, in bits.
#[derive(Default)]
struct Trained {
    losses: Vec<u32>,
    /// Of each step.
    gradients: Vec<Bits>,
    weights: Bits,
    optimizer: Bits,
}

impl Trained {
    #[track_caller]
    fn assert_same(&self, other: &Self, case: &str) {
        assert_eq!(self.losses, other.losses, "{case}: the losses' bits");
        for (step, (left, right)) in self.gradients.iter().zip(&other.gradients).enumerate() {
            assert_same_bits(left, right, &format!("{case}: gradients of step {step}"));
        }
        assert_same_bits(&self.weights, &other.weights, &format!("{case}: weights"));
        assert_same_bits(&self.optimizer, &other.optimizer, &format!("{case}: optimizer state"));
    }
}

#[track_caller]
fn assert_same_bits(left: &Bits, right: &Bits, case: &str) {
    assert!(left.keys().eq(right.keys()), "{case}: names");
    let different: Vec<&String> = left.keys().filter(|name| left[*name] != right[*name]).collect();
    assert!(different.is_empty(), "{case}: the bits differ in {different:?}");
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn gradients(store: &dyn ParamStore) -> Bits {
    let trained = store.parameters().iter().filter(|(_, spec)| spec.trainable);
    trained
        .map(|(id, spec)| {
            let slot = store.layout().slot(id);
            let gradients =
                store.chunk(slot.chunk).unwrap().gradients.expect("trainable chunks have gradients");
            let values = gradients.piece(slot.offset, &[slot.elements]).unwrap().to_vec::<f32>().unwrap();
            (spec.name.clone(), bits(&values))
        })
        .collect()
}

#[test]
fn freeing_weights_between_scopes_changes_no_bit() {
    on_every_device("freeing weights between scopes changes no bit", |device| {
        let case = Case::new(device);
        for dtype in [DType::F32, DType::BF16] {
            for checkpoint in [false, true] {
                let (model, resident) = case.resident(1 << 14, dtype);
                let start = bits(&resident.read(ParamId(0)).unwrap());
                let expected = case.train(&model, Arc::new(resident), checkpoint, Some(0.5));
                assert_ne!(expected.weights[&model_first_name(&case)], start, "training moved nothing");
                let (model, host) = case.resident(1 << 14, dtype);
                let freeing = Arc::new(FreeingStore::new(host));
                let trained = case.train(&model, freeing.clone(), checkpoint, Some(0.5));
                let name = format!("{} {dtype}, checkpointing {checkpoint}", case.golden.name());
                trained.assert_same(&expected, &name);
                assert!(freeing.working().scopes.is_empty(), "{name}: a scope was never left");
            }
        }
    });
}

fn model_first_name(case: &Case) -> String {
    Dit::new(&case.config).unwrap().1.spec(ParamId(0)).name.clone()
}

#[test]
fn each_scope_is_entered_and_left_once_in_each_phase() {
    on_every_device("each scope is entered and left once in each phase", |device| {
        let case = Case::new(device);
        for checkpoint in [false, true] {
            let (model, host) = case.resident(1 << 14, DType::F32);
            let store = Arc::new(FreeingStore::new(host));
            case.train(&model, store.clone(), checkpoint, None);
            let mut expected = Visits::new();
            for scope in store.parameters().scopes() {
                let again = checkpoint && scope.starts_with("blocks.");
                for phase in ["forward", "backward"].into_iter().chain(again.then_some("recompute")) {
                    expected.insert((scope.clone(), phase), [STEPS; 2]);
                }
            }
            let working = store.working();
            assert_eq!(working.visits, expected, "checkpointing {checkpoint}");
            assert_eq!(working.most_scopes, 1, "checkpointing {checkpoint}: scopes on the device together");
        }
    });
}

#[test]
fn sampling_enters_scopes_in_forward_alone() {
    on_every_device("sampling enters scopes in forward alone", |device| {
        let case = Case::new(device);
        let (model, host) = case.resident(1 << 14, DType::F32);
        let (_, resident) = case.resident(1 << 14, DType::F32);
        let store = Arc::new(FreeingStore::new(host));
        let labels = case.golden.i64("in.y").0;
        let timesteps: Vec<f32> = case.golden.i64("in.t").0.into_iter().map(|value| value as f32).collect();
        let run = |store: Arc<dyn ParamStore>| {
            let conditioning = Conditioning { labels: &labels };
            let output =
                model.forward(&Forward::new(store), &case.tensor("in.x"), &timesteps, &conditioning).unwrap();
            bits(&output.to_vec::<f32>().unwrap())
        };
        assert_eq!(run(store.clone()), run(Arc::new(resident)));
        let names = store.parameters().scopes().iter();
        let expected: Visits = names.map(|scope| ((scope.clone(), "forward"), [1, 1])).collect();
        assert_eq!(store.working().visits, expected);
    });
}

#[test]
fn chunk_layouts_of_any_size_give_the_same_bits() {
    on_every_device("chunk layouts of any size give the same bits", |device| {
        let case = Case::new(device);
        let (model, resident) = case.resident(1 << 14, DType::F32);
        let chunks = resident.layout().chunks().len();
        let expected = case.train(&model, Arc::new(resident), false, None);
        // One chunk a parameter, a size that divides nothing, and all in one.
        for chunk_elements in [1, 5000, usize::MAX] {
            let (model, resident) = case.resident(chunk_elements, DType::F32);
            assert_ne!(resident.layout().chunks().len(), chunks, "another layout than before");
            let name = format!("chunks of {chunk_elements}");
            case.train(&model, Arc::new(resident), false, None).assert_same(&expected, &name);
            let (model, host) = case.resident(chunk_elements, DType::F32);
            let store = Arc::new(FreeingStore::new(host));
            case.train(&model, store, true, None).assert_same(&expected, &format!("{name}, freeing"));
        }
    });
}

#[test]
fn frozen_parameters_are_untracked_and_have_no_sink() {
    on_every_device("frozen parameters are untracked and have no sink", |device| {
        let case = Case::new(device);
        let (_, resident) = case.resident(1 << 14, DType::F32);
        let (_, host) = case.resident(1 << 14, DType::F32);
        let stores: [Arc<dyn ParamStore>; 2] = [Arc::new(resident), Arc::new(FreeingStore::new(host))];
        for store in stores {
            let id = store.parameters().find("pos_embed").unwrap();
            let spec = store.parameters().spec(id).clone();
            assert!(!spec.trainable);
            assert!(store.chunk(store.layout().slot(id).chunk).unwrap().gradients.is_none());
            let tape = Tape::new();
            let forward = Forward::new(store.clone()).recording(&tape);
            forward
                .scope(spec.scope, |forward| {
                    assert!(!forward.param(id)?.is_tracked());
                    let message = store.sink(id).err().expect("a frozen parameter has no sink").to_string();
                    assert!(message.contains("pos_embed has no gradient"), "{message}");
                    let trained = store.parameters().find("x_embedder.proj.weight").unwrap();
                    assert!(forward.param(trained)?.is_tracked());
                    assert_eq!(store.sink(trained)?.gradient.dtype(), DType::F32);
                    Ok(())
                })
                .unwrap();
        }
    });
}

#[test]
fn a_kept_value_is_poisoned_when_its_scope_is_left() {
    on_every_device("a kept value is poisoned when its scope is left", |device| {
        let case = Case::new(device);
        let (_, host) = case.resident(1 << 14, DType::F32);
        let store: Arc<dyn ParamStore> = Arc::new(FreeingStore::new(host));
        let id = store.parameters().find("final_layer.linear.weight").unwrap();
        let scope = store.parameters().spec(id).scope;
        let forward = Forward::new(store.clone());
        let inside = |forward: &Forward| {
            let value = forward.param(id)?;
            Ok((value.to_vec::<f32>()?, value))
        };
        let (values, kept) = forward.scope(scope, inside).unwrap();
        assert!(values.iter().all(|value| value.is_finite()));
        assert!(kept.to_vec::<f32>().unwrap().iter().all(|value| value.is_nan()));
        let (again, _) = forward.scope(scope, inside).unwrap();
        assert_eq!(bits(&again), bits(&values), "what is fetched again");
    });
}

#[test]
fn the_resident_store_refuses_a_use_outside_the_scope() {
    on_every_device("the resident store refuses a use outside the scope", |device| {
        let case = Case::new(device);
        let (_, resident) = case.resident(1 << 14, DType::F32);
        let store: Arc<dyn ParamStore> = Arc::new(resident);
        let id = store.parameters().find("blocks.0.attn.qkv.weight").unwrap();
        let scope = store.parameters().spec(id).scope;
        let forward = Forward::new(store.clone());
        for result in [forward.param(id).map(drop), store.sink(id).map(drop)] {
            let message = result.unwrap_err().to_string();
            assert!(
                message.contains("blocks.0.attn.qkv.weight was used outside its scope blocks.0"),
                "{message}"
            );
        }
        let other =
            store.parameters().spec(store.parameters().find("final_layer.linear.bias").unwrap()).scope;
        forward.scope(other, |forward| forward.param(id)).expect_err("another scope is not its own");
        forward.scope(scope, |forward| forward.param(id)).unwrap();
        forward.param(id).expect_err("the scope was left");
        let message = store.exit(scope, Phase::Forward).unwrap_err().to_string();
        assert!(message.contains("blocks.0 was left before it was entered"), "{message}");
    });
}

#[test]
#[should_panic(expected = "blocks.0.attn.qkv.weight was used outside its scope")]
fn the_freeing_store_panics_on_a_use_outside_the_scope() {
    let case = Case::new(&poisoned_cpu(1));
    let (_, host) = case.resident(1 << 14, DType::F32);
    let store: Arc<dyn ParamStore> = Arc::new(FreeingStore::new(host));
    let id = store.parameters().find("blocks.0.attn.qkv.weight").unwrap();
    drop(Forward::new(store).param(id));
}

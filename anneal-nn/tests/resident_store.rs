//! The resident store's contract on a small list of parameters: scopes, sinks, values, chunks.

use std::sync::Arc;

use anneal_nn::{
    Builder, Forward, Init, ParamId, ParamStore, Parameters, ResidentStore, ScopeId, StoreOptions,
};
use anneal_tensor::{DType, Device, Phase, Tensor, TensorError, ops};

const WEIGHT: ParamId = ParamId(0);
const TABLE: ParamId = ParamId(1);
const OTHER: ParamId = ParamId(2);

/// Scope `first` with a trained and a frozen parameter, and scope `second` with a trained one.
fn parameters() -> Parameters {
    let mut builder = Builder::new();
    builder.scope("first", |builder| {
        builder.at("layer", |builder| builder.add("weight", &[2, 3], Init::Zeros));
        builder.add_frozen("table", &[4], Init::Zeros);
    });
    builder.scope("second", |builder| builder.add("other", &[5], Init::Zeros));
    builder.finish()
}

fn store(compute_dtype: DType, train: bool) -> Arc<ResidentStore> {
    let options = StoreOptions { compute_dtype, chunk_elements: 64, train };
    Arc::new(ResidentStore::new(Arc::new(parameters()), &Device::cpu(Some(1), None), options).unwrap())
}

fn gradient(store: &ResidentStore, id: ParamId) -> Vec<f32> {
    let slot = store.layout().slot(id);
    let chunk = store.chunk(slot.chunk).unwrap().gradients.unwrap();
    chunk.piece(slot.offset, &[slot.elements]).unwrap().to_vec().unwrap()
}

/// One write of a gradient, as an op's backward does it; whether it was to be added.
fn write_gradient(store: &ResidentStore, id: ParamId, value: f32) -> bool {
    let sink = store.sink(id).unwrap();
    let given =
        Tensor::from_slice(store.device(), &vec![value; sink.gradient.elements()], sink.gradient.dims());
    let given = given.unwrap();
    let sum = match sink.accumulate {
        true => ops::add(&sink.gradient, &given).unwrap(),
        false => given,
    };
    ops::overwrite(&sink.gradient, &sum).unwrap();
    sink.accumulate
}

fn message<T>(result: Result<T, TensorError>) -> String {
    result.err().expect("an error").to_string()
}

#[test]
fn a_parameter_exists_only_inside_its_scope() {
    let store = store(DType::F32, true);
    assert!(message(store.value(WEIGHT)).contains("layer.weight was used outside its scope first"));
    assert!(message(store.sink(OTHER)).contains("other was used outside its scope second"));
    store.enter(ScopeId(0), Phase::Forward).unwrap();
    assert_eq!(store.value(WEIGHT).unwrap().dims(), [2, 3]);
    assert!(store.value(OTHER).is_err(), "the other scope is closed still");
    store.exit(ScopeId(0), Phase::Forward).unwrap();
    assert!(store.value(WEIGHT).is_err());
    let left = message(store.exit(ScopeId(0), Phase::Backward));
    assert!(left.contains("first was left before it was entered"), "{left}");
    assert!(store.value(WEIGHT).is_err(), "a refused exit leaves the scope closed");
}

#[test]
fn scopes_entered_twice_close_with_the_last_exit() {
    let store = store(DType::F32, true);
    store.enter(ScopeId(0), Phase::Backward).unwrap();
    store.enter(ScopeId(0), Phase::Recompute).unwrap();
    store.exit(ScopeId(0), Phase::Recompute).unwrap();
    assert!(store.value(WEIGHT).is_ok());
    store.exit(ScopeId(0), Phase::Backward).unwrap();
    assert!(store.value(WEIGHT).is_err());
}

#[test]
fn a_scope_is_left_when_its_block_fails() {
    let store = store(DType::F32, true);
    let forward = Forward::new(store.clone());
    let failed = forward.scope(ScopeId(0), |forward| forward.param(OTHER));
    assert!(message(failed).contains("other was used outside its scope second"));
    assert!(store.value(WEIGHT).is_err(), "scope first is still open");
}

#[test]
fn the_first_gradient_replaces_and_the_next_ones_add() {
    let store = store(DType::F32, true);
    store.enter(ScopeId(0), Phase::Backward).unwrap();
    assert!(!write_gradient(&store, WEIGHT, 2.0));
    assert!(write_gradient(&store, WEIGHT, 0.5));
    assert_eq!(gradient(&store, WEIGHT), [2.5; 6]);
    store.clear_gradients();
    assert!(!write_gradient(&store, WEIGHT, 1.0));
    assert_eq!(gradient(&store, WEIGHT), [1.0; 6]);
    store.exit(ScopeId(0), Phase::Backward).unwrap();
}

#[test]
fn what_backward_did_not_reach_is_zero_in_the_end() {
    let store = store(DType::F32, true);
    store.enter(ScopeId(0), Phase::Backward).unwrap();
    store.enter(ScopeId(1), Phase::Backward).unwrap();
    write_gradient(&store, WEIGHT, 3.0);
    write_gradient(&store, OTHER, 3.0);
    store.clear_gradients();
    write_gradient(&store, WEIGHT, 4.0);
    store.finish_gradients().unwrap();
    assert_eq!(gradient(&store, WEIGHT), [4.0; 6]);
    assert_eq!(gradient(&store, OTHER), [0.0; 5], "of the step before");
    assert!(write_gradient(&store, OTHER, 1.0), "a zeroed gradient is added to");
}

#[test]
fn layers_of_one_size_lie_at_equal_distances_in_chunks_of_any_size() {
    for chunk_elements in [1, 64, 100, 1 << 20] {
        let mut builder = Builder::new();
        builder.scope("all", |builder| {
            builder.add("first", &[7], Init::Zeros);
            builder.add_frozen("table", &[40], Init::Zeros);
            for layer in 0..5 {
                builder.add(&format!("{layer}.weight"), &[5, 6], Init::Zeros);
                builder.add(&format!("{layer}.bias"), &[5], Init::Zeros);
            }
        });
        let options = StoreOptions { compute_dtype: DType::BF16, chunk_elements, train: true };
        let parameters = Arc::new(builder.finish());
        let store = ResidentStore::new(parameters, &Device::cpu(Some(1), None), options).unwrap();
        store.enter(ScopeId(0), Phase::Backward).unwrap();
        let address = |id: usize| store.value(ParamId(id)).unwrap().address() as usize;
        let sink = |id: usize| store.sink(ParamId(id)).unwrap().gradient.address() as usize;
        let [weight, bias] = [2, 3];
        for layer in 1..5 {
            for parameter in [weight, bias] {
                let id = parameter + 2 * layer;
                assert_eq!(
                    address(id) - address(id - 2),
                    48 * 2,
                    "layer {layer}, chunks of {chunk_elements}"
                );
                assert_eq!(sink(id) - sink(id - 2), 48 * 4, "layer {layer}, chunks of {chunk_elements}");
            }
        }
    }
}

#[test]
fn frozen_parameters_and_stores_without_training_have_no_gradient() {
    let trained = store(DType::F32, true);
    trained.enter(ScopeId(0), Phase::Backward).unwrap();
    assert!(message(trained.sink(TABLE)).contains("table has no gradient in this store"));
    let chunks = trained.layout().chunks().iter().enumerate();
    let with_gradients: Vec<bool> =
        chunks.map(|(index, _)| trained.chunk(index).unwrap().gradients.is_some()).collect();
    assert_eq!(
        with_gradients,
        [true, false],
        "trained parameters lie in the first chunk, frozen ones in the second"
    );
    let sampling = store(DType::F32, false);
    sampling.enter(ScopeId(0), Phase::Forward).unwrap();
    assert!(message(sampling.sink(WEIGHT)).contains("layer.weight has no gradient in this store"));
    sampling.finish_gradients().unwrap();
}

#[test]
fn values_are_written_read_and_rounded() {
    // 1 + 2^-7 is the number after 1 in bf16; a quarter of that step is rounded away.
    let values = [1.0, 1.0078125, 1.0 + 1.0 / 512.0, -3.0, 0.0, 65536.0];
    let rounded = [1.0, 1.0078125, 1.0, -3.0, 0.0, 65536.0];
    for (dtype, expected) in [(DType::F32, values), (DType::BF16, rounded)] {
        let store = store(dtype, true);
        store.write(WEIGHT, &values).unwrap();
        assert_eq!(store.read(WEIGHT).unwrap(), expected);
        assert_eq!(store.read(OTHER).unwrap(), [0.0; 5], "its neighbour in the chunk");
        store.enter(ScopeId(0), Phase::Backward).unwrap();
        assert_eq!(store.value(WEIGHT).unwrap().dtype(), dtype);
        assert_eq!(store.sink(WEIGHT).unwrap().gradient.dtype(), DType::F32, "whatever the weights are");
    }
    let short = message(store(DType::F32, true).write(WEIGHT, &[0.0; 5]));
    assert!(short.contains("5 values for layer.weight, which has 6"), "{short}");
}

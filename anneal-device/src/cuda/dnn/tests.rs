use super::graph::{Operation, Place, row_major};
use super::*;

/// Properties of an H200 in cuDNN's words, so that plans can be made where no GPU is.
const H200: &str = r#"{"maxGridSize":[2147483647,65535,65535],"maxBlockSize":[1024,1024,64],
"deviceName":"NVIDIA H200","regsPerBlock":65536,"multiProcessorCount":132,"warpSize":32,
"maxSharedMemoryPerBlock":49152,"maxSharedMemoryPerBlockOptin":232448,"reservedSharedMemoryPerBlock":1024,
"maxRegistersPerSM":65536,"maxCtasPerSM":32,"maxThreadsPerBlock":1024,"maxThreadsPerSM":2048,"pciDeviceId":0,
"isTccDriver":0,"supportCoopLaunch":1,"totalGlobalMem":150754820096,"smClockRateKHz":1980000,
"memClockRateKHz":3201000,"l2CacheSize":62914560,"cudaDeviceId":0,"deviceVer":900,"driverVer":13000}"#;

const PASSES: [AttentionPass; 3] =
    [AttentionPass::Forward, AttentionPass::Backward, AttentionPass::BackwardDeterministic];

/// Packed queries, keys and values `[B, N, 3, H, D]` with packed gradients.
fn packed(pass: AttentionPass, [batch, heads, tokens, dim]: [usize; 4]) -> AttentionKey {
    let row = heads * dim;
    let part = AttentionStrides { batch: tokens * 3 * row, token: 3 * row, head: dim };
    let alone = AttentionStrides { batch: tokens * row, token: row, head: dim };
    let strides = AttentionTensors {
        query: part,
        key: part,
        value: part,
        output: alone,
        output_gradient: alone,
        query_gradient: part,
        key_gradient: part,
        value_gradient: part,
    };
    let element = AttentionElement::Bf16;
    AttentionKey { pass, element, batch, heads, queries: tokens, keys: tokens, dim, strides }
}

/// Separate tensors, and as many keys as asked for.
fn separate(pass: AttentionPass, [batch, heads, queries, keys, dim]: [usize; 5]) -> AttentionKey {
    let rows = |tokens| AttentionStrides { batch: tokens * heads * dim, token: heads * dim, head: dim };
    let (of_queries, of_keys) = (rows(queries), rows(keys));
    let strides = AttentionTensors {
        query: of_queries,
        key: of_keys,
        value: of_keys,
        output: of_queries,
        output_gradient: of_queries,
        query_gradient: of_queries,
        key_gradient: of_keys,
        value_gradient: of_keys,
    };
    AttentionKey { pass, element: AttentionElement::F16, batch, heads, queries, keys, dim, strides }
}

#[test]
fn graphs_have_the_operations_that_are_recognised() {
    let shape = [2, 3, 40, 8];
    let count = |pass, single| packed(pass, shape).graph(single).spec.operations.len();
    assert_eq!(count(AttentionPass::Forward, true), 1);
    assert_eq!(count(AttentionPass::Forward, false), 10);
    assert_eq!(count(AttentionPass::Backward, false), 18);
    assert_eq!(count(AttentionPass::BackwardDeterministic, false), 17);
    // Sums of rows; and of gradients of queries where their order is left open.
    let elements = |pass| -> Vec<usize> {
        packed(pass, shape).graph(false).scratch.iter().map(|(_, elements)| *elements).collect()
    };
    assert_eq!(elements(AttentionPass::Backward), [2 * 3 * 40, 2 * 3 * 40 * 8]);
    assert_eq!(elements(AttentionPass::BackwardDeterministic), [2 * 3 * 40]);
}

/// Every result is written once and before it is read, and products fit together.
#[test]
fn graphs_are_consistent() {
    for pass in PASSES {
        for key in [packed(pass, [2, 3, 40, 8]), separate(pass, [2, 3, 40, 24, 16])] {
            let spec = key.graph(false).spec;
            let mut written = vec![false; spec.tensors.len()];
            for operation in &spec.operations {
                let (inputs, output) = match *operation {
                    Operation::Matmul { left, right, output } => {
                        let [l, r, o] = [left, right, output].map(|id| spec.tensors[id.0].dims);
                        assert_eq!([l[2], r[3], l[3]], [o[2], o[3], r[2]], "{pass:?} {operation:?}");
                        (vec![left, right], output)
                    }
                    Operation::Pointwise { input, second, output, .. } => {
                        assert_eq!(spec.tensors[input.0].dims, spec.tensors[output.0].dims, "{operation:?}");
                        ([Some(input), second].into_iter().flatten().collect(), output)
                    }
                    Operation::Reduction { input, output, .. } | Operation::Reshape { input, output } => {
                        (vec![input], output)
                    }
                    Operation::Attention { .. } => unreachable!("only asked for by its own form"),
                };
                for id in inputs {
                    assert!(written[id.0] || spec.tensors[id.0].place != Place::Virtual, "{operation:?}");
                }
                assert!(!std::mem::replace(&mut written[output.0], true), "{operation:?}");
            }
            let virtuals = spec.tensors.iter().zip(&written).filter(|(spec, _)| spec.place == Place::Virtual);
            assert!(virtuals.into_iter().all(|(_, written)| *written));
        }
    }
}

#[test]
fn tensors_lie_as_the_key_says() {
    let graph = packed(AttentionPass::Backward, [2, 3, 40, 8]).graph(false);
    let spec = |id: Option<Id>| &graph.spec.tensors[id.unwrap().0];
    assert_eq!(spec(graph.tensors.query).dims, [2, 3, 40, 8]);
    assert_eq!(spec(graph.tensors.query).strides, [2880, 8, 72, 1]);
    assert_eq!(spec(graph.tensors.key).dims, [2, 3, 8, 40]);
    assert_eq!(spec(graph.tensors.key).strides, [2880, 8, 1, 72]);
    assert_eq!(spec(graph.tensors.key_gradient).strides, [2880, 8, 72, 1]);
    assert_eq!(spec(graph.tensors.output_gradient).strides, [960, 8, 24, 1]);
    assert_eq!(spec(Some(graph.log_sums)).strides, row_major([2, 3, 40, 1]));
}

#[test]
fn what_cudnn_cannot_serve_is_known_without_asking() {
    let key = separate(AttentionPass::Forward, [1, 2, 64, 77, 64]);
    assert_eq!(key.unsupported(91_900), None);
    assert!(key.unsupported(91_500).unwrap().contains("multiple of 128"));
    assert!(key.unsupported(91_001).unwrap().contains("known faults"));
    assert!(AttentionKey { dim: 60, ..key }.unsupported(91_900).unwrap().contains("head dim"));
    let mut shifted = key;
    shifted.strides.value.token += 1;
    assert!(shifted.unsupported(91_900).unwrap().contains("aligned"));
}

/// Needs cuDNN, but no GPU. Without a driver the library refuses to compile, and the graphs alone
/// are looked at.
#[test]
fn cudnn_takes_every_graph_and_a_plan_can_be_kept() {
    let Some(version) = dnn_version().filter(|version| *version >= SINGLE_FORWARD) else { return };
    let target = Target::described(H200).unwrap();
    for pass in PASSES {
        let keys = [
            packed(pass, [64, 16, 256, 72]),
            packed(pass, [32, 16, 1024, 72]),
            packed(pass, [4, 16, 4096, 72]),
            packed(pass, [64, 6, 256, 64]),
            separate(pass, [2, 16, 250, 77, 72]),
            separate(pass, [2, 16, 250, 120, 128]),
            separate(pass, [2, 8, 1024, 77, 160]),
        ];
        for key in keys {
            assert_eq!(key.unsupported(version), None);
            let single = pass == AttentionPass::Forward;
            let graph = backend::Graph::new(&target, &key.graph(single).spec).unwrap();
            if Libraries::load().get(Library::Driver).is_none() {
                continue;
            }
            assert!(!graph.configurations(&target).unwrap().is_empty(), "{key:?}");
        }
        if Libraries::load().get(Library::Driver).is_some() {
            check_plan(&target, &keys[0], version);
        }
    }
}

fn check_plan(target: &Target, key: &AttentionKey, version: usize) {
    let folder = std::env::temp_dir().join(format!("anneal-dnn-{}", std::process::id()));
    let cached = folder.join(format!("{:?}", key.pass));
    let plan = make(target, key, version, 9, Some(&cached)).unwrap();
    let scores = key.batch * key.heads * key.queries * key.keys * 2;
    let deterministic = key.pass == AttentionPass::BackwardDeterministic;
    assert_eq!(plan.workspace >= scores, deterministic, "workspace of {} bytes", plan.workspace);
    let text = std::fs::read_dir(&folder).unwrap().count();
    assert_eq!(text, 1, "the plan was not kept");
    let again = make(target, key, version, 9, Some(&cached)).unwrap();
    assert_eq!(again.workspace, plan.workspace);
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn kernels_of_an_older_generation_are_refused_on_hopper() {
    let plan = b"..\"generated_sdpa_sm80_flash_fprop\"..";
    assert!(!made_for(plan, 9));
    assert!(made_for(plan, 8));
    assert!(made_for(b"generated_sdpa_sm90_flash_fprop", 9));
}

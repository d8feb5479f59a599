//! The ops of a block, one by one, at a model's shapes.

use anneal_models::dit::DitConfig;
use anneal_tensor::ops::{self, Activation, AttentionInput};
use anneal_tensor::{DType, Device, Outputs, Result, Tape, Tensor};
use anneal_train::report::summary::{Align, Table};
use serde_json::json;

use super::model::{config, name, normals};
use super::{median, time};
use crate::cli::{BenchModel, Precision};

const EPSILON: f32 = 1e-6;

type Run = Box<dyn Fn(&[Tensor]) -> Result<Outputs>>;

/// An op with the shapes of its inputs and the multiply-adds of its forward.
struct Case {
    name: &'static str,
    inputs: Vec<Vec<usize>>,
    products: f64,
    run: Run,
}

pub fn ops(arguments: &BenchModel) -> anyhow::Result<()> {
    let config = config(arguments)?;
    let device = Device::parse(&arguments.device, None)?;
    let dtype = if arguments.precision == Precision::Bf16 { DType::BF16 } else { DType::F32 };
    let mut table = Table::new([
        ("op", Align::Left),
        ("forward ms", Align::Right),
        ("backward ms", Align::Right),
        ("forward GFLOP/s", Align::Right),
        ("backward GFLOP/s", Align::Right),
    ]);
    let mut rows = Vec::new();
    for case in cases(&config, arguments.batch) {
        let [forward, backward] = measure(&case, arguments, &device, dtype)?;
        let rate = |times: f64, ms: f64| times * 2.0 * case.products / ms / 1e6;
        let rates = [rate(1.0, forward), rate(2.0, backward)];
        let shown = |rate: f64| if case.products == 0.0 { "-".to_owned() } else { format!("{rate:.0}") };
        let times = [format!("{forward:.3}"), format!("{backward:.3}")];
        table.row([
            case.name.to_owned(),
            times[0].clone(),
            times[1].clone(),
            shown(rates[0]),
            shown(rates[1]),
        ]);
        rows.push(json!({"op": case.name, "forward_ms": forward, "backward_ms": backward}));
    }
    if arguments.json {
        println!("{}", json!({"what": name(&config, arguments.batch), "ops": rows}));
    } else {
        println!("{}", name(&config, arguments.batch));
        print!("{table}");
    }
    Ok(())
}

fn measure(case: &Case, arguments: &BenchModel, device: &Device, dtype: DType) -> anyhow::Result<[f64; 2]> {
    let inputs = case
        .inputs
        .iter()
        .enumerate()
        .map(|(index, sizes)| {
            let values = normals(index as u64, sizes.iter().product());
            ops::cast(&Tensor::from_slice(device, &values, sizes)?, dtype)
        })
        .collect::<Result<Vec<Tensor>>>()?;
    let forward = time(arguments.warmup, arguments.steps, || {
        (case.run)(&inputs)?;
        Ok(())
    })?;
    let whole = time(arguments.warmup, arguments.steps, || {
        let tape = Tape::new();
        let variables: Vec<Tensor> = inputs.iter().map(|input| tape.variable(input)).collect();
        let outputs = (case.run)(&variables)?;
        let seeds = outputs.iter().map(|output| (output.clone(), output.detach())).collect();
        drop(outputs);
        tape.backward_from(seeds)?;
        Ok(())
    })?;
    let forward = median(&forward);
    Ok([forward, (median(&whole) - forward).max(0.0)])
}

fn cases(config: &DitConfig, batch: usize) -> Vec<Case> {
    let [rows, columns] = config.grid();
    let (tokens, size, heads) = (rows * columns, config.hidden_size, config.heads);
    let (hidden, head) = (config.mlp_hidden_size(), size / heads);
    let x = vec![batch, tokens, size];
    let vector = vec![batch, size];
    let products = |outputs: usize, inner: usize| (batch * tokens * outputs) as f64 * inner as f64;
    let linear = |name, outputs: usize| Case {
        name,
        inputs: vec![x.clone(), vec![outputs, size], vec![outputs]],
        products: products(outputs, size),
        run: Box::new(|t| {
            Ok([ops::linear(&t[0], &t[1], Some(&t[2]), Activation::None)?].into_iter().collect())
        }),
    };
    vec![
        Case {
            name: "layer_norm_modulate",
            inputs: vec![x.clone(), vector.clone(), vector.clone()],
            products: 0.0,
            run: Box::new(|t| {
                Ok([ops::layer_norm_modulate(&t[0], &t[1], &t[2], EPSILON)?].into_iter().collect())
            }),
        },
        linear("linear qkv", 3 * size),
        Case {
            name: "attention",
            inputs: vec![vec![batch, tokens, 3, heads, head]],
            products: 2.0 * products(tokens, size),
            run: Box::new(move |t| {
                let scale = 1.0 / (head as f32).sqrt();
                Ok([ops::attention(AttentionInput::Packed(&t[0]), None, None, scale)?].into_iter().collect())
            }),
        },
        linear("linear proj", size),
        Case {
            name: "gate_residual_layer_norm_modulate",
            inputs: vec![x.clone(), x.clone(), vector.clone(), vector.clone(), vector],
            products: 0.0,
            run: Box::new(|t| {
                let (x, h) =
                    ops::gate_residual_layer_norm_modulate(&t[0], &t[1], &t[2], &t[3], &t[4], EPSILON)?;
                Ok([x, h].into_iter().collect())
            }),
        },
        Case {
            name: "feed_forward",
            inputs: vec![x, vec![hidden, size], vec![hidden], vec![size, hidden], vec![size]],
            products: 2.0 * products(hidden, size),
            run: Box::new(|t| {
                let y = ops::feed_forward(&t[0], &t[1], &t[2], &t[3], &t[4], Activation::GeluTanh)?;
                Ok([y].into_iter().collect())
            }),
        },
    ]
}

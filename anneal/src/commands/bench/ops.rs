//! The ops of a training step, one by one, with their rates of arithmetic and of memory.

use std::path::Path;

use anneal_tensor::{DType, Device, Tape, Tensor, ops};
use anneal_train::report::summary::{self, Align, Table};
use anneal_train::settings;
use anyhow::{Result, bail};
use serde_json::{Value, json};

use super::cases::{self, Case};
use super::clock::time_op;
use super::device_name;
use super::model::{config, name, normals, recipe, refuse_training_flags};
use crate::cli::{BenchModel, BenchOp};
use crate::machine;

/// What was measured of one op. Bytes are the least that must move: inputs and outputs once, and in
/// backward the gradients of both.
struct Figures {
    forward_ms: f64,
    backward_ms: Option<f64>,
    forward_bytes: f64,
    backward_bytes: f64,
}

pub fn ops(arguments: &BenchOp) -> Result<()> {
    let BenchOp { model, attention } = arguments;
    refuse_training_flags(model)?;
    let config = config(model)?;
    let recipe = recipe(model, &config, Path::new("none"))?;
    let (device, dtype) = (settings::device(&recipe)?, settings::compute_dtype(&recipe));
    let cases = match attention.is_empty() {
        true => cases::of_step(&config, &settings::objective(&recipe)?, model.batch),
        false => attention.iter().map(|shape| Case::attention(&attention_name(shape), 1, *shape)).collect(),
    };
    let mut table = Table::new([
        ("op", Align::Left),
        ("in a step", Align::Right),
        ("forward ms", Align::Right),
        ("backward ms", Align::Right),
        ("TFLOP/s", Align::Right),
        ("backward", Align::Right),
        ("GB/s", Align::Right),
        ("backward", Align::Right),
    ]);
    let (mut rows, mut failures) = (Vec::new(), 0);
    for case in cases {
        match measure(&case, model, &device, dtype) {
            Ok(figures) => {
                table.row(cells(&case, &figures));
                rows.push(figures_json(&case, &figures));
            }
            // The others are still worth knowing.
            Err(error) => {
                eprintln!("{}: {error:#}", case.name);
                rows.push(json!({"op": case.name, "error": format!("{error:#}")}));
                failures += 1;
            }
        }
    }
    if model.json {
        let what = if attention.is_empty() { name(&config, model) } else { "attention".into() };
        println!("{}", json!({"what": what, "device_name": device_name(&device), "ops": rows}));
    } else {
        if attention.is_empty() {
            println!("{}, on {}", name(&config, model), device_name(&device));
        }
        print!("{table}");
    }
    if failures > 0 {
        bail!("{} could not be measured", summary::plural(failures, "op"));
    }
    Ok(())
}

fn attention_name([batch, heads, tokens, width]: &[usize; 4]) -> String {
    format!("attention {batch},{heads},{tokens},{width}")
}

fn measure(case: &Case, arguments: &BenchModel, device: &Device, dtype: DType) -> Result<Figures> {
    let dtype = if case.single { DType::F32 } else { dtype };
    machine::check_fits("it", case.inputs.iter().map(|sizes| &sizes[..]))?;
    let inputs = case
        .inputs
        .iter()
        .enumerate()
        .map(|(index, sizes)| {
            let values = normals(index as u64, sizes.iter().product());
            Ok(ops::cast(&Tensor::from_slice(device, &values, sizes)?, dtype)?)
        })
        .collect::<Result<Vec<Tensor>>>()?;
    let (warmup, steps) = (arguments.warmup, arguments.steps);
    let bytes = |tensors: &[Tensor]| -> f64 {
        tensors.iter().map(|tensor| (tensor.elements() * tensor.dtype().size()) as f64).sum()
    };
    let (input_bytes, output_bytes) = (bytes(&inputs), bytes(&(case.run)(&inputs)?));
    let forward_ms = time_op(device, warmup, steps, || {
        (case.run)(&inputs)?;
        Ok(())
    })?;
    let both = || {
        time_op(device, warmup, steps, || {
            let tape = Tape::new();
            let variables: Vec<Tensor> = inputs.iter().map(|input| tape.variable(input)).collect();
            let outputs = (case.run)(&variables)?;
            let seeds = outputs.iter().map(|output| (output.clone(), output.detach())).collect();
            drop(outputs);
            tape.backward_from(seeds)?;
            Ok(())
        })
    };
    let backward_ms = match case.differentiated {
        true => Some((both()? - forward_ms).max(0.0)),
        false => None,
    };
    Ok(Figures {
        forward_ms,
        backward_ms,
        forward_bytes: input_bytes + output_bytes,
        backward_bytes: 2.0 * input_bytes + output_bytes,
    })
}

impl Figures {
    /// Operations and bytes a second: forward, then backward.
    fn rates(&self, case: &Case) -> [Option<[f64; 2]>; 2] {
        let rates = |operations: f64, bytes: f64, milliseconds: f64| {
            [operations / milliseconds * 1e3, bytes / milliseconds * 1e3]
        };
        let operations = 2.0 * case.products;
        [
            Some(rates(operations, self.forward_bytes, self.forward_ms)),
            self.backward_ms.filter(|milliseconds| *milliseconds > 0.0).map(|milliseconds| {
                rates(operations * case.backward_products, self.backward_bytes, milliseconds)
            }),
        ]
    }
}

fn cells(case: &Case, figures: &Figures) -> [String; 8] {
    let [forward, backward] = figures.rates(case);
    let none = || "-".to_owned();
    let arithmetic = |rates: Option<[f64; 2]>| match rates {
        Some([operations, _]) if operations > 0.0 => summary::number(operations / 1e12),
        _ => none(),
    };
    let memory =
        |rates: Option<[f64; 2]>| rates.map_or_else(none, |[_, bytes]| format!("{:.1}", bytes / 1e9));
    [
        case.name.clone(),
        case.times.to_string(),
        format!("{:.4}", figures.forward_ms),
        figures.backward_ms.map_or_else(none, |milliseconds| format!("{milliseconds:.4}")),
        arithmetic(forward),
        arithmetic(backward),
        memory(forward),
        memory(backward),
    ]
}

fn figures_json(case: &Case, figures: &Figures) -> Value {
    let [forward, backward] = figures.rates(case);
    json!({
        "op": case.name,
        "times": case.times,
        "forward_ms": figures.forward_ms,
        "backward_ms": figures.backward_ms,
        "forward_flop_per_second": forward.map(|rates| rates[0]),
        "backward_flop_per_second": backward.map(|rates| rates[0]),
        "forward_bytes_per_second": forward.map(|rates| rates[1]),
        "backward_bytes_per_second": backward.map(|rates| rates[1]),
    })
}

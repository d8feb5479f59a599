//! Times attention, forward and backward apart, at the shapes of the models trained here.
//!
//! `cargo run --release -p anneal-tensor --example attention [threads] [seconds per case]`
//! prints a line per case: name, then best and median microseconds of forward and of backward.

use std::time::Instant;

use anneal_tensor::ops::{AttentionInput, attention, cast};
use anneal_tensor::rng::{Purpose, Stream};
use anneal_tensor::{DType, Device, Result, Tape, Tensor};

/// Name, batch, tokens, heads, head dimension, dtype.
const CASES: [(&str, usize, usize, usize, usize, DType); 6] = [
    ("dit-s2", 8, 256, 6, 64, DType::F32),
    ("digits", 128, 16, 4, 32, DType::F32),
    ("dit-xl2", 2, 256, 16, 72, DType::F32),
    ("dit-l2", 2, 256, 16, 64, DType::F32),
    ("long", 1, 2048, 4, 64, DType::F32),
    ("dit-s2-bf16", 8, 256, 6, 64, DType::BF16),
];

fn normal(device: &Device, seed: u64, sizes: &[usize], dtype: DType) -> Result<Tensor> {
    let mut stream = Stream::new(seed, Purpose::Test, 0, 0);
    let values: Vec<f32> = (0..sizes.iter().product()).map(|_| stream.normal() as f32).collect();
    cast(&Tensor::from_slice(device, &values, sizes)?, dtype)
}

fn best_and_median(mut times: Vec<f64>) -> String {
    times.sort_by(f64::total_cmp);
    format!("{:.1} {:.1}", times[0] * 1e6, times[times.len() / 2] * 1e6)
}

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1).map(|argument| argument.parse::<f64>().expect("a number"));
    let threads = arguments.next().map(|threads| threads as usize);
    let seconds = arguments.next().unwrap_or(1.0);
    let device = Device::cpu(threads, None);
    for (name, batch, tokens, heads, dim, dtype) in CASES {
        let qkv = normal(&device, 1, &[batch, tokens, 3, heads, dim], dtype)?;
        let upstream = normal(&device, 2, &[batch, tokens, heads, dim], dtype)?;
        let scale = 1.0 / (dim as f32).sqrt();
        let (mut forward, mut backward) = (Vec::new(), Vec::new());
        let start = Instant::now();
        while start.elapsed().as_secs_f64() < seconds {
            let tape = Tape::new();
            let qkv = tape.variable(&qkv);
            let begin = Instant::now();
            let output = attention(AttentionInput::Packed(&qkv), None, None, scale)?;
            forward.push(begin.elapsed().as_secs_f64());
            let begin = Instant::now();
            tape.backward_from(vec![(output, upstream.clone())])?;
            backward.push(begin.elapsed().as_secs_f64());
        }
        println!("{name} {} {}", best_and_median(forward), best_and_median(backward));
    }
    Ok(())
}

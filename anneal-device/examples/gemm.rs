//! GFLOP/s of the CPU matrix multiply at the shapes of the models: best and median of many calls.
//!
//! `cargo run --release -p anneal-device --example gemm [-- THREADS]`
//! Columns: forward `X W^T`, input gradient `dY W`, weight gradient `dY^T X` written and accumulated,
//! and the fused ones: forward + bias + GELU keeping the pre-activation, input gradient * GELU'.

use std::time::{Duration, Instant};

use anneal_device::ThreadPool;
use anneal_device::cpu::gemm::{Activation, Epilogue, Gemm, Matrix, MatrixMut, gemm, kernel_name};

const SECONDS_PER_CASE: f64 = 0.25;

/// `(tokens, inputs, outputs)` of the linear layers of DiT-S/2 at batch 8, of the digits model, and
/// of modulations, which have as many rows as there are images.
const SHAPES: [(usize, usize, usize); 15] = [
    (2048, 384, 1152),
    (2048, 384, 384),
    (2048, 384, 1536),
    (2048, 1536, 384),
    (2048, 128, 384),
    (2048, 128, 128),
    (2048, 128, 512),
    (2048, 512, 128),
    (8, 384, 2304),
    (8, 384, 384),
    (128, 128, 768),
    (16, 384, 2304),
    (32, 384, 2304),
    (64, 384, 2304),
    (1, 1152, 6912),
];

fn main() {
    let threads: Vec<usize> = match std::env::args().nth(1) {
        Some(count) => vec![count.parse().expect("usage: gemm [THREADS]")],
        None => vec![1, 2],
    };
    println!("kernel {}; GFLOP/s as best/median", kernel_name());
    for threads in threads {
        let pool = ThreadPool::new(threads);
        for (tokens, inputs, outputs) in SHAPES {
            print!("T={threads} M={tokens} K={inputs} N={outputs}");
            layer(&pool, tokens, inputs, outputs);
            println!();
        }
    }
}

fn values(count: usize) -> Vec<f32> {
    (0..count as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 23) as f32 - 1.0).collect()
}

fn layer(pool: &ThreadPool, tokens: usize, inputs: usize, outputs: usize) {
    let (x, w, dy) = (values(tokens * inputs), values(outputs * inputs), values(tokens * outputs));
    let (mut y, mut dx, mut dw) =
        (values(tokens * outputs), values(tokens * inputs), values(outputs * inputs));
    let (bias, before) = (values(outputs), values(tokens * inputs));
    let mut kept = values(tokens * outputs);
    let x = Matrix::from_slice(&x, inputs);
    let w = Matrix::from_slice(&w, inputs);
    let dy = Matrix::from_slice(&dy, outputs);
    let forward =
        Gemm::new((tokens, outputs, inputs), x, w.transposed(), MatrixMut::from_slice(&mut y, outputs));
    let backward = Gemm::new((tokens, inputs, outputs), dy, w, MatrixMut::from_slice(&mut dx, inputs));
    let mut weight =
        Gemm::new((outputs, inputs, tokens), dy.transposed(), x, MatrixMut::from_slice(&mut dw, inputs));
    time("fwd", pool, &forward);
    time("dgrad", pool, &backward);
    time("wgrad", pool, &weight);
    weight.accumulate = true;
    time("wgrad+", pool, &weight);
    let function = Activation::GeluTanh;
    let preactivation = Some(MatrixMut::from_slice(&mut kept, outputs));
    let bias = Some(Matrix::from_slice(&bias, outputs));
    time(
        "fwd-gelu",
        pool,
        &Gemm { bias, epilogue: Epilogue::Activation { function, preactivation }, ..forward },
    );
    let preactivation = Matrix::from_slice(&before, inputs);
    let epilogue = Epilogue::ActivationBackward { function, preactivation };
    time("dgrad-gelu", pool, &Gemm { epilogue, ..backward });
}

fn time(name: &str, pool: &ThreadPool, problem: &Gemm) {
    let mut times = Vec::new();
    let end = Instant::now() + Duration::from_secs_f64(SECONDS_PER_CASE);
    while Instant::now() < end || times.len() < 4 {
        let start = Instant::now();
        // SAFETY: the operands cover the shape; C is not used meanwhile.
        unsafe { gemm(pool, problem) };
        times.push(start.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    let work = 2e-9 * (problem.rows * problem.columns * problem.depth) as f64;
    print!(" {name} {:.0}/{:.0}", work / times[0], work / times[times.len() / 2]);
}

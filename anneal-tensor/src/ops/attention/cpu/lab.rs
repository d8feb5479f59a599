use super::memory::with_scratch;
use super::product::*;
use super::simd::*;
#[repr(C)]
struct Ts {
    s: i64,
    n: i64,
}
unsafe extern "C" {
    fn clock_gettime(id: i32, t: *mut Ts) -> i32;
}
fn now() -> f64 {
    let mut t = Ts { s: 0, n: 0 };
    unsafe { clock_gettime(3, &mut t) };
    t.s as f64 + t.n as f64 * 1e-9
}
#[target_feature(enable = "avx512f")]
unsafe fn peak() -> f64 {
    use std::arch::x86_64::*;
    let x = std::hint::black_box(_mm512_set1_ps(0.999));
    let y = std::hint::black_box(_mm512_set1_ps(0.5));
    let mut a = [_mm512_set1_ps(0.1); 24];
    let t = now();
    for _ in 0..4000 {
        for j in 0..24 {
            a[j] = _mm512_fmadd_ps(a[j], x, y);
        }
    }
    std::hint::black_box(a);
    (now() - t) / (4000.0 * 24.0 * 32.0)
}
fn measure(name: &str, flops: f64, mut f: impl FnMut()) {
    let mut r = Vec::new();
    let mut best = 1e9f64;
    let mut pb = 1e9f64;
    for _ in 0..200 {
        let p = unsafe { peak() };
        f();
        let t = now();
        for _ in 0..4 {
            f();
        }
        let t = (now() - t) / 4.0;
        r.push(flops * p / t);
        best = best.min(t);
        pb = pb.min(p);
    }
    r.sort_by(f64::total_cmp);
    println!(
        "{name:40} eff median {:.3} q90 {:.3} min/min {:.3}  best {:.2} us",
        r[r.len() / 2],
        r[r.len() * 9 / 10],
        flops * pb / best,
        best * 1e6
    );
}
struct L;
impl Work for L {
    fn run<S: Simd>(self, simd: S) {
        with_scratch(
            [256 * 64, 256 * 64, 64 * 64, 256 * 64, 64 * 64, 256 * 64],
            |[k, v, q, st, o, big]| unsafe {
                for p in [k, v, st, big] {
                    for i in 0..256 * 64 {
                        *p.add(i) = (i % 13) as f32 * 0.1;
                    }
                }
                for p in [q, o] {
                    for i in 0..64 * 64 {
                        *p.add(i) = (i % 7) as f32 * 0.1;
                    }
                }
                let f = |r: usize, c: usize, d: usize| (r * c * d * 2 * S::LANES) as f64;
                let r = |p: *mut f32, s| Rows::new(p.cast_const(), s);
                let w = |p: *mut f32, s| Rows::new(p, s);
                for rows in [128, 256, 64] {
                    measure(&format!("S^T = K Q^T {rows}x32x64"), f(rows, 2, 64), || {
                        product(
                            simd,
                            Shape { rows, columns: 2, depth: 64 },
                            Left::rows(r(k, 64)),
                            r(q, 32),
                            w(st, 32),
                            false,
                            &super::ahead::Ahead::nothing(),
                        )
                    });
                }
                for rows in [14, 13, 12, 6, 8, 16] {
                    measure(&format!("S^T tile {rows}x2x64"), f(rows, 2, 64), || {
                        product(
                            simd,
                            Shape { rows, columns: 2, depth: 64 },
                            Left::rows(r(k, 64)),
                            r(q, 32),
                            w(st, 32),
                            false,
                            &super::ahead::Ahead::nothing(),
                        )
                    });
                }
                for rows in [128, 256, 64] {
                    measure(&format!("S^T = (K^T)^T Q^T {rows}x32x64"), f(rows, 2, 64), || {
                        product(
                            simd,
                            Shape { rows, columns: 2, depth: 64 },
                            Left::columns(r(k, 256)),
                            r(q, 32),
                            w(st, 32),
                            false,
                            &super::ahead::Ahead::nothing(),
                        )
                    });
                }
                for rows in [14, 13, 12, 6, 8, 16] {
                    measure(&format!("S^T transp. tile {rows}x2x64"), f(rows, 2, 64), || {
                        product(
                            simd,
                            Shape { rows, columns: 2, depth: 64 },
                            Left::columns(r(k, 256)),
                            r(q, 32),
                            w(st, 32),
                            false,
                            &super::ahead::Ahead::nothing(),
                        )
                    });
                }
                for rows in [128, 256, 64] {
                    measure(&format!("S^T = (K^T)^T Q^T {rows}x64x64"), f(rows, 4, 64), || {
                        product(
                            simd,
                            Shape { rows, columns: 4, depth: 64 },
                            Left::columns(r(k, 256)),
                            r(q, 64),
                            w(st, 64),
                            false,
                            &super::ahead::Ahead::nothing(),
                        )
                    });
                }
                for rows in [128, 256, 64] {
                    measure(&format!("S^T = K Q^T {rows}x64x64"), f(rows, 4, 64), || {
                        product(
                            simd,
                            Shape { rows, columns: 4, depth: 64 },
                            Left::rows(r(k, 64)),
                            r(q, 64),
                            w(st, 64),
                            false,
                            &super::ahead::Ahead::nothing(),
                        )
                    });
                }
                for depth in [64, 128, 256] {
                    measure(&format!("O = P V 32x64x{depth}"), f(32, 4, depth), || {
                        product(
                            simd,
                            Shape { rows: 32, columns: 4, depth },
                            Left::columns(r(st, 32)),
                            r(v, 64),
                            w(o, 64),
                            true,
                            &super::ahead::Ahead::nothing(),
                        )
                    });
                }
                for rows in [64, 256] {
                    measure(&format!("dV = P^T dO {rows}x64x32"), f(rows, 4, 32), || {
                        product(
                            simd,
                            Shape { rows, columns: 4, depth: 32 },
                            Left::rows(r(st, 32)),
                            r(o, 64),
                            w(big, 64),
                            true,
                            &super::ahead::Ahead::nothing(),
                        )
                    });
                }
                for rows in [64, 256] {
                    measure(&format!("dV = P^T dO {rows}x64x64"), f(rows, 4, 64), || {
                        product(
                            simd,
                            Shape { rows, columns: 4, depth: 64 },
                            Left::rows(r(st, 64)),
                            r(o, 64),
                            w(big, 64),
                            true,
                            &super::ahead::Ahead::nothing(),
                        )
                    });
                }
            },
        );
    }
}
#[test]
fn lab_tiles() {
    dispatch(L);
}
#[test]
fn lab_forward() {
    use super::*;
    use crate::{DType, Tensor};
    for (b, n, h, d) in [(1, 256, 1, 64), (1, 256, 6, 64), (4, 256, 6, 64), (1, 16, 4, 32), (8, 16, 4, 32)] {
        let device = anneal_device::Device::cpu(Some(1), None);
        let sizes = Sizes { batch: b, queries: n, keys: n, heads: h, dim: d };
        let t = |s: &[usize]| {
            let v: Vec<f32> =
                (0..s.iter().product::<usize>()).map(|i| ((i * 7919) % 1000) as f32 * 0.002 - 1.0).collect();
            Tensor::from_slice(&device, &v, s).unwrap()
        };
        let qkv = t(&[b, n, 3, h, d]);
        let up = t(&[b, n, h, d]);
        let part = |q: &Tensor, p| super::super::part_of_packed(q, p);
        let ops = Operands {
            query: part(&qkv, 0),
            key: part(&qkv, 1),
            value: part(&qkv, 2),
            bias: None,
            mask: None,
        };
        let out = Tensor::empty(&device, &[b, n, h, d], DType::F32).unwrap();
        let ls = Tensor::empty(&device, &[b, h, n], DType::F32).unwrap();
        let anneal_device::Device::Cpu(cpu) = &device;
        let fl = (4 * b * h * n * n * d) as f64;
        measure(&format!("forward {b} {n} {h} {d}"), fl, || {
            forward(&cpu.pool, &sizes, 0.125, &ops, &out, Some(&ls))
        });
        let g = t(&[b, n, 3, h, d]);
        let saved = Saved { upstream: up, output: out, log_sums: ls };
        let gr = Gradients {
            query: Some(part(&g, 0)),
            key: Some(part(&g, 1)),
            value: Some(part(&g, 2)),
            bias: None,
        };
        measure(&format!("backward {b} {n} {h} {d}"), 2.5 * fl, || {
            backward(&cpu.pool, &sizes, 0.125, &ops, &saved, &gr).unwrap()
        });
    }
}

//! Against a naive product in double precision, on every kernel that this machine has.

use half::{bf16, f16};

use super::kernel::{Kernel, available};
use super::*;
use crate::cpu::element::Element;

/// A small generator of our own; the values only need to be spread and repeatable.
struct Random(u64);

impl Random {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 40) as f32 / (1u64 << 24) as f32) * 2.0 - 1.0
    }

    fn values<T: Element>(&mut self, count: usize) -> Vec<T> {
        (0..count).map(|_| T::from_f32(self.next())).collect()
    }
}

/// A matrix in memory with any strides and guard values around it.
struct Operand<T> {
    values: Vec<T>,
    row_stride: usize,
    column_stride: usize,
}

impl<T: Element> Operand<T> {
    /// `layout`: 0 row-major, 1 column-major, 2 row-major with gaps, 3 column-major with gaps, 4 no unit stride.
    fn new(random: &mut Random, rows: usize, columns: usize, layout: usize) -> Self {
        let (row_stride, column_stride) = match layout {
            0 => (columns, 1),
            1 => (1, rows),
            2 => (columns + 5, 1),
            3 => (1, rows + 3),
            _ => (2 * columns + 1, 2),
        };
        let values = random.values((rows + 1) * row_stride + (columns + 1) * column_stride);
        Self { values, row_stride, column_stride }
    }

    fn matrix(&self) -> Matrix<'_> {
        // SAFETY: sized above to cover the matrix.
        unsafe { Matrix::new(self.values.as_ptr().cast(), T::TYPE, self.row_stride, self.column_stride) }
    }

    fn get(&self, row: usize, column: usize) -> f64 {
        self.values[row * self.row_stride + column * self.column_stride].to_f32() as f64
    }
}

const GUARD: f32 = -7.5;

/// C with a gap after each row and a guard row on either side; its inside starts as `inside`.
struct Output<T> {
    values: Vec<T>,
    columns: usize,
    stride: usize,
}

impl<T: Element> Output<T> {
    fn new(rows: usize, columns: usize, mut inside: impl FnMut() -> f32) -> Self {
        let stride = columns + 3;
        let mut values = vec![T::from_f32(GUARD); (rows + 2) * stride];
        for row in 0..rows {
            for column in 0..columns {
                values[(row + 1) * stride + column] = T::from_f32(inside());
            }
        }
        Self { values, columns, stride }
    }

    fn matrix(&mut self) -> MatrixMut<'_> {
        let pointer = self.values[self.stride..].as_mut_ptr();
        // SAFETY: sized above to cover the matrix.
        unsafe { MatrixMut::new(pointer.cast(), T::TYPE, self.stride) }
    }

    fn get(&self, row: usize, column: usize) -> f32 {
        self.values[(row + 1) * self.stride + column].to_f32()
    }

    fn assert_guards(&self, what: &str) {
        for (index, value) in self.values.iter().enumerate() {
            let (row, column) = (index / self.stride, index % self.stride);
            let inside = row > 0 && (row + 1) * self.stride < self.values.len() && column < self.columns;
            assert!(inside || value.to_f32() == GUARD, "{what}: wrote outside at {row}, {column}");
        }
    }
}

fn product(
    a: &impl Fn(usize, usize) -> f64,
    b: &impl Fn(usize, usize) -> f64,
    at: (usize, usize),
    depth: usize,
) -> f64 {
    (0..depth).map(|k| a(at.0, k) * b(k, at.1)).sum()
}

/// Relative to the size of the terms: a chain of `depth` roundings, and C's own.
fn tolerance<T: Element>(depth: usize, value: f64) -> f64 {
    let storing = match T::TYPE {
        ElementType::F32 => 1e-6,
        ElementType::Bf16 => 4.1e-3,
        ElementType::F16 => 5.1e-4,
    };
    2e-7 * (depth as f64).max(4.0) + storing * value.abs() + 1e-7
}

fn check_shape<A: Element, B: Element, C: Element>(
    kernel: &Kernel,
    (rows, columns, depth): (usize, usize, usize),
    (layout_a, layout_b): (usize, usize),
    accumulate: bool,
) {
    let random = &mut Random((rows * 31 + columns * 17 + depth) as u64);
    let a = Operand::<A>::new(random, rows, depth, layout_a);
    let b = Operand::<B>::new(random, depth, columns, layout_b);
    let mut before = Random(5);
    let mut c = Output::<C>::new(rows, columns, || if accumulate { before.next() } else { f32::NAN });
    let old = Output::<C> { values: c.values.clone(), ..c };
    let mut problem = Gemm::new((rows, columns, depth), a.matrix(), b.matrix(), c.matrix());
    problem.accumulate = accumulate;
    // SAFETY: the operands cover the shape.
    unsafe { driver::serial(kernel, &problem) };
    let what = format!(
        "{} {rows}x{columns}x{depth} layouts {layout_a}{layout_b} {:?} {:?} {:?} accumulate {accumulate}",
        kernel.name,
        A::TYPE,
        B::TYPE,
        C::TYPE
    );
    c.assert_guards(&what);
    for row in 0..rows {
        for column in 0..columns {
            let mut want = product(&|i, k| a.get(i, k), &|k, j| b.get(k, j), (row, column), depth);
            if accumulate {
                want += old.get(row, column) as f64;
            }
            let got = c.get(row, column) as f64;
            assert!(
                (got - want).abs() <= tolerance::<C>(depth, want),
                "{what}: at {row}, {column}: {got} instead of {want}"
            );
        }
    }
}

const SIZES: [usize; 8] = [1, 3, 12, 17, 31, 33, 65, 129];

#[test]
fn every_size_against_double_precision_with_poisoned_and_with_accumulated_c() {
    for kernel in available() {
        for rows in SIZES {
            for columns in SIZES {
                for depth in [1, 3, 17, 64, 129] {
                    check_shape::<f32, f32, f32>(kernel, (rows, columns, depth), (0, 1), false);
                }
                check_shape::<f32, f32, f32>(kernel, (rows, columns, 33), (1, 0), true);
            }
        }
        for depth in [0, 255, 256, 257, 520, 1031] {
            check_shape::<f32, f32, f32>(kernel, (25, 37, depth), (0, 0), false);
            check_shape::<f32, f32, f32>(kernel, (25, 37, depth), (1, 1), true);
            check_shape::<bf16, f32, bf16>(kernel, (25, 37, depth), (0, 1), true);
            check_shape::<f16, f16, f16>(kernel, (25, 37, depth), (1, 0), false);
        }
        check_shape::<f32, f32, f32>(kernel, (0, 5, 4), (0, 0), false);
        check_shape::<f32, f32, f32>(kernel, (5, 0, 4), (0, 0), false);
        check_shape::<f32, f32, f32>(kernel, (500, 300, 300), (0, 1), false);
    }
}

#[test]
fn every_layout_of_every_format() {
    fn formats<A: Element, B: Element>(kernel: &Kernel) {
        for layout_a in 0..5 {
            for layout_b in 0..5 {
                for accumulate in [false, true] {
                    let layouts = (layout_a, layout_b);
                    check_shape::<A, B, f32>(kernel, (29, 45, 37), layouts, accumulate);
                    check_shape::<A, B, bf16>(kernel, (14, 33, 300), layouts, accumulate);
                    check_shape::<A, B, f16>(kernel, (3, 70, 19), layouts, accumulate);
                }
            }
        }
    }
    for kernel in available() {
        formats::<f32, f32>(kernel);
        formats::<f32, bf16>(kernel);
        formats::<bf16, f32>(kernel);
        formats::<bf16, bf16>(kernel);
        formats::<f16, f16>(kernel);
        formats::<f16, bf16>(kernel);
    }
}

/// `f(value before the epilogue, pre-activation given)` in double precision.
fn reference(function: Activation, derivative: bool, x: f64) -> f64 {
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    let scale = (2.0 / std::f64::consts::PI).sqrt();
    let t = (scale * (x + 0.044715 * x.powi(3))).tanh();
    match (function, derivative) {
        (Activation::Silu, false) => x * sigmoid(x),
        (Activation::Silu, true) => sigmoid(x) * (1.0 + x * (1.0 - sigmoid(x))),
        (Activation::GeluTanh, false) => 0.5 * x * (1.0 + t),
        (Activation::GeluTanh, true) => {
            0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * scale * (1.0 + 0.134145 * x * x)
        }
    }
}

fn check_epilogues<C: Element, X: Element>(kernel: &Kernel, shape: (usize, usize, usize), accumulate: bool) {
    let (rows, columns, depth) = shape;
    let random = &mut Random(77);
    let a = Operand::<f32>::new(random, rows, depth, 2);
    let b = Operand::<f32>::new(random, depth, columns, 3);
    let bias: Vec<X> = random.values(columns);
    let given = Operand::<X>::new(random, rows, columns, 2);
    for function in [Activation::GeluTanh, Activation::Silu] {
        for case in 0..4 {
            let mut before = Random(5);
            let mut c = Output::<C>::new(rows, columns, || if accumulate { before.next() } else { f32::NAN });
            let old = Output::<C> { values: c.values.clone(), ..c };
            let mut saved = Output::<X>::new(rows, columns, || f32::NAN);
            let mut problem = Gemm::new(shape, a.matrix(), b.matrix(), c.matrix());
            problem.accumulate = accumulate;
            problem.bias = Some(Matrix::from_slice(&bias, columns));
            problem.epilogue = match case {
                0 => Epilogue::None,
                1 => Epilogue::Activation { function, preactivation: None },
                2 => Epilogue::Activation { function, preactivation: Some(saved.matrix()) },
                _ => Epilogue::ActivationBackward { function, preactivation: given.matrix() },
            };
            // SAFETY: the operands cover the shape.
            unsafe { driver::serial(kernel, &problem) };
            let what = format!("{} {shape:?} {function:?} case {case}", kernel.name);
            c.assert_guards(&what);
            saved.assert_guards(&what);
            for (row, column) in (0..rows).flat_map(|row| (0..columns).map(move |column| (row, column))) {
                let mut v = product(&|i, k| a.get(i, k), &|k, j| b.get(k, j), (row, column), depth);
                v += bias[column].to_f32() as f64;
                v += if accumulate { old.get(row, column) as f64 } else { 0.0 };
                let want = match case {
                    0 => v,
                    1 | 2 => reference(function, false, v),
                    _ => v * reference(function, true, given.get(row, column)),
                };
                let got = c.get(row, column) as f64;
                assert!((got - want).abs() <= 2.0 * tolerance::<C>(depth, want), "{what}: {got} for {want}");
                let kept = saved.get(row, column) as f64;
                assert!(
                    case != 2 || (kept - v).abs() <= tolerance::<X>(depth, v),
                    "{what}: kept {kept} for {v}"
                );
            }
        }
    }
}

#[test]
fn epilogues_against_double_precision() {
    for kernel in available() {
        for accumulate in [false, true] {
            check_epilogues::<f32, f32>(kernel, (27, 75, 40), accumulate);
            check_epilogues::<f32, f32>(kernel, (13, 33, 530), accumulate);
            check_epilogues::<bf16, bf16>(kernel, (27, 75, 300), accumulate);
            check_epilogues::<f16, f32>(kernel, (12, 32, 40), accumulate);
            check_epilogues::<f32, bf16>(kernel, (1, 1, 1), accumulate);
        }
    }
}

#[test]
fn row_sums_of_a_come_with_the_product() {
    for kernel in available() {
        for (layout, accumulate) in [(0, false), (1, true), (3, false), (4, true)] {
            let (rows, columns, depth) = (137, 90, 600);
            let random = &mut Random(3);
            let a = Operand::<f32>::new(random, rows, depth, layout);
            let b = Operand::<f32>::new(random, depth, columns, 0);
            let mut c = vec![0.0f32; rows * columns];
            let mut sums = vec![if accumulate { 2.0 } else { f32::NAN }; rows + 1];
            sums[rows] = GUARD;
            let mut problem = Gemm::new(
                (rows, columns, depth),
                a.matrix(),
                b.matrix(),
                MatrixMut::from_slice(&mut c, columns),
            );
            // SAFETY: `rows` sums and a guard.
            problem.row_sums = Some(unsafe { RowSums::new(sums.as_mut_ptr(), accumulate) });
            // SAFETY: the operands cover the shape.
            unsafe { driver::parallel(kernel, &ThreadPool::new(3), &problem) };
            assert_eq!(sums[rows], GUARD);
            for row in 0..rows {
                let start = if accumulate { 2.0 } else { 0.0 };
                let want: f64 = start + (0..depth).map(|k| a.get(row, k)).sum::<f64>();
                assert!((sums[row] as f64 - want).abs() < 2e-5, "layout {layout}: {} for {want}", sums[row]);
            }
        }
    }
}

#[test]
fn the_bits_are_the_same_on_any_number_of_threads_and_in_any_surroundings() {
    let shapes = [(300, 200, 520), (2048, 128, 128), (40, 1000, 384), (129, 700, 1100), (1500, 65, 31)];
    for kernel in available() {
        for (index, (rows, columns, depth)) in shapes.into_iter().enumerate() {
            let random = &mut Random(9);
            let a = Operand::<f32>::new(random, rows, depth, index % 2);
            let b = Operand::<f32>::new(random, depth, columns, 1 - index % 2);
            let run = |pool: Option<&ThreadPool>, rows: usize, columns: usize| {
                let mut c = vec![f32::NAN; rows * columns];
                let mut sums = vec![0.0f32; rows];
                let mut problem = Gemm::new(
                    (rows, columns, depth),
                    a.matrix(),
                    b.matrix(),
                    MatrixMut::from_slice(&mut c, columns),
                );
                // SAFETY: `rows` sums; the operands cover the shape.
                unsafe {
                    problem.row_sums = Some(RowSums::new(sums.as_mut_ptr(), false));
                    match pool {
                        Some(pool) => driver::parallel(kernel, pool, &problem),
                        None => driver::serial(kernel, &problem),
                    }
                }
                let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                (bits(&c), bits(&sums))
            };
            let alone = run(None, rows, columns);
            for threads in 1..=4 {
                let pool = ThreadPool::new(threads);
                assert!(run(Some(&pool), rows, columns) == alone, "{} on {threads} threads", kernel.name);
            }
            // A corner of the same product, whose elements fall into other tiles of other widths.
            let (few, narrow) = (rows / 2 + 1, columns / 3 + 1);
            let (corner, sums) = run(None, few, narrow);
            assert!(sums == alone.1[..few]);
            for (row, line) in corner.chunks(narrow).enumerate() {
                assert!(line == &alone.0[row * columns..][..narrow], "{} row {row}", kernel.name);
            }
        }
    }
}

#[test]
fn the_avx_kernels_agree_to_the_bit() {
    let fused: Vec<_> = available().iter().filter(|kernel| kernel.name != "portable").collect();
    let random = &mut Random(21);
    let a = Operand::<bf16>::new(random, 70, 700, 0);
    let b = Operand::<f16>::new(random, 700, 90, 1);
    let results: Vec<Vec<f32>> = fused
        .iter()
        .map(|kernel| {
            let mut c = vec![0.0f32; 70 * 90];
            let c_view = MatrixMut::from_slice(&mut c, 90);
            // SAFETY: the operands cover the shape.
            unsafe { driver::serial(kernel, &Gemm::new((70, 90, 700), a.matrix(), b.matrix(), c_view)) };
            c
        })
        .collect();
    assert!(results.windows(2).all(|pair| pair[0] == pair[1]));
}

#[test]
fn column_sums_against_double_precision_on_any_number_of_threads() {
    for (rows, columns) in [(1, 1), (3, 70), (128, 64), (700, 129), (1030, 384)] {
        let values = Operand::<bf16>::new(&mut Random(4), rows, columns, 2);
        let run = |threads: usize, accumulate: bool| {
            let mut sums = vec![if accumulate { 1.0 } else { f32::NAN }; columns];
            // SAFETY: the operand covers the shape.
            unsafe { column_sums(&ThreadPool::new(threads), values.matrix(), rows, &mut sums, accumulate) };
            sums
        };
        let (fresh, added) = (run(1, false), run(2, true));
        assert_eq!(fresh, run(4, false));
        for column in 0..columns {
            let want: f64 = (0..rows).map(|row| values.get(row, column)).sum();
            assert!((fresh[column] as f64 - want).abs() < 1e-4, "{} for {want}", fresh[column]);
            assert!((added[column] as f64 - want - 1.0).abs() < 1e-4);
        }
    }
}

#[test]
#[should_panic(expected = "C's rows overlap")]
fn overlapping_rows_of_c_are_refused() {
    let (a, mut c) = ([1.0f32; 4], [0.0f32; 4]);
    // SAFETY: refused before any access.
    unsafe {
        let out = MatrixMut::new(c.as_mut_ptr().cast(), ElementType::F32, 1);
        let (a, b) = (Matrix::from_slice(&a, 2), Matrix::from_slice(&a, 2));
        gemm_serial(&Gemm::new((2, 2, 2), a, b, out));
    }
}

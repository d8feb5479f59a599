//! Matrix products on a GPU against sums in f64: layouts, element types, epilogues, accumulation, batches, odd sizes
//! and views that start anywhere. Says so and passes where there is no GPU.

use std::sync::Arc;

use anneal_device::cpu::ElementType;
use anneal_device::cuda::{Batch, Epilogue, Operand, Output, Product};
use anneal_device::{Buffer, CudaDevice, Device, DeviceError, Purpose};
use half::{bf16, f16};

const SIZES: [[usize; 3]; 6] =
    [[1, 1, 1], [3, 5, 7], [33, 17, 65], [64, 128, 96], [130, 72, 200], [1, 96, 40]];

fn device(test: &str) -> Option<Arc<CudaDevice>> {
    match CudaDevice::new(0, None) {
        Ok(device) => Some(Arc::new(device)),
        Err(error) if std::env::var_os("ANNEAL_REQUIRE_CUDA").is_some() => panic!("{error}"),
        Err(_) => {
            println!("skipped: no CUDA device for {test}");
            None
        }
    }
}

fn bytes_of(element: ElementType, values: &[f64]) -> Vec<u8> {
    let bytes = |value: &f64| match element {
        ElementType::F32 => (*value as f32).to_le_bytes().to_vec(),
        ElementType::Bf16 => bf16::from_f64(*value).to_le_bytes().to_vec(),
        ElementType::F16 => f16::from_f64(*value).to_le_bytes().to_vec(),
    };
    values.iter().flat_map(bytes).collect()
}

fn values_of(element: ElementType, bytes: &[u8]) -> Vec<f64> {
    let value = |bytes: &[u8]| match element {
        ElementType::F32 => f64::from(f32::from_le_bytes(bytes.try_into().unwrap())),
        ElementType::Bf16 => bf16::from_le_bytes(bytes.try_into().unwrap()).to_f64(),
        ElementType::F16 => f16::from_le_bytes(bytes.try_into().unwrap()).to_f64(),
    };
    bytes.chunks(element.size()).map(value).collect()
}

/// Rows of a matrix on the device, between NaN: `skip` elements before, `padding` after each row.
struct Memory {
    buffer: Buffer,
    element: ElementType,
    rows: usize,
    columns: usize,
    leading: usize,
    skip: usize,
    /// What the device holds, rounded to the element.
    values: Vec<f64>,
}

impl Memory {
    fn new(
        device: &CudaDevice,
        element: ElementType,
        [rows, columns]: [usize; 2],
        [skip, padding]: [usize; 2],
        mut value: impl FnMut() -> f64,
    ) -> Self {
        let leading = columns + padding;
        let mut all = vec![f64::NAN; skip + rows * leading];
        for row in 0..rows {
            all[skip + row * leading..][..columns].fill_with(&mut value);
        }
        let bytes = bytes_of(element, &all);
        let buffer = device.upload(&bytes, Purpose::Activations).unwrap();
        let rounded = values_of(element, &bytes);
        let values = (0..rows).flat_map(|row| rounded[skip + row * leading..][..columns].to_vec()).collect();
        Self { buffer, element, rows, columns, leading, skip, values }
    }

    fn pointer(&self) -> *mut u8 {
        self.buffer.as_ptr().wrapping_add(self.skip * self.element.size())
    }

    fn operand(&self, transposed: bool) -> Operand {
        let operand = Operand::new(self.pointer(), self.element, self.leading);
        if transposed { operand.transposed() } else { operand }
    }

    /// Entry `(i, j)` of one of several operands, each of `rows` stored rows; or of the only one.
    fn at(&self, (member, rows): (usize, usize), transposed: bool, i: usize, j: usize) -> f64 {
        let (i, j) = if transposed { (j, i) } else { (i, j) };
        self.values[(member * rows % self.rows + i) * self.columns + j]
    }

    fn bits(&self, device: &Arc<CudaDevice>) -> Vec<u8> {
        let bytes = (self.skip + self.rows * self.leading) * self.element.size();
        unsafe { device.read(self.buffer.as_ptr(), bytes) }.unwrap()
    }

    /// The matrix as it is now; what lies around it must still be NaN.
    fn read(&self, device: &Arc<CudaDevice>) -> Vec<f64> {
        let all = values_of(self.element, &self.bits(device));
        assert!(all[..self.skip].iter().all(|value| value.is_nan()), "written before the matrix");
        let row = |row: usize| {
            let (inside, after) =
                all[self.skip + row * self.leading..][..self.leading].split_at(self.columns);
            assert!(after.iter().all(|value| value.is_nan()), "written between rows");
            inside.to_vec()
        };
        (0..self.rows).flat_map(row).collect()
    }
}

/// Uniform numbers in -1..1, the same in every run.
fn numbers(seed: u64) -> impl FnMut() -> f64 {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }
}

#[derive(Clone, Copy, Debug)]
struct Case {
    element: ElementType,
    output: ElementType,
    sizes: [usize; 3],
    /// Whether A and B are stored transposed.
    transposed: [bool; 2],
    /// Elements before each matrix and after each row.
    place: [usize; 2],
    accumulate: bool,
    bias: bool,
    extra: Extra,
    tf32: bool,
    /// Products of a batch, and whether all of them have the same A or B.
    count: usize,
    shared: [bool; 2],
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Extra {
    None,
    Gelu,
    GeluKept,
    RowSums,
}

fn gelu(x: f64) -> f64 {
    0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
}

impl Case {
    fn plain(element: ElementType, output: ElementType, sizes: [usize; 3]) -> Self {
        let (transposed, place, accumulate) = ([false; 2], [0; 2], false);
        let (bias, extra, tf32, count, shared) = (false, Extra::None, false, 1, [false; 2]);
        Self { element, output, sizes, transposed, place, accumulate, bias, extra, tf32, count, shared }
    }

    /// Sizes of A and B as they are stored.
    fn stored(&self) -> [[usize; 2]; 2] {
        let [rows, columns, depth] = self.sizes;
        let stored = |[rows, columns]: [usize; 2], transposed| {
            if transposed { [columns, rows] } else { [rows, columns] }
        };
        [stored([rows, depth], self.transposed[0]), stored([depth, columns], self.transposed[1])]
    }

    fn check(self, device: &Arc<CudaDevice>) {
        let [rows, columns, depth] = self.sizes;
        device.set_tf32(self.tf32);
        let [ta, tb] = self.transposed;
        let [stored_a, stored_b] = self.stored();
        let memory = |stored: [usize; 2], shared: bool, seed| {
            let sizes = [if shared { 1 } else { self.count } * stored[0], stored[1]];
            Memory::new(device, self.element, sizes, self.place, numbers(seed))
        };
        let (a, b) = (memory(stored_a, self.shared[0], 1), memory(stored_b, self.shared[1], 2));
        let bias = Memory::new(device, self.output, [self.count, columns], self.place, numbers(3));
        let run = || {
            let mut before = numbers(4);
            let contents = || if self.accumulate { before() } else { f64::NAN };
            let c = Memory::new(device, self.output, [self.count * rows, columns], self.place, contents);
            let extra_sizes = if self.extra == Extra::RowSums { [1, rows] } else { [rows, columns] };
            let extra_place = if self.extra == Extra::RowSums { [0; 2] } else { self.place };
            let extra = Memory::new(device, self.output, extra_sizes, extra_place, || f64::NAN);
            let output = Output::new(c.pointer(), c.element, c.leading);
            let distance = |memory: &Memory, rows, shared| if shared { 0 } else { rows * memory.leading };
            let batch = Batch {
                count: self.count,
                a: distance(&a, stored_a[0], self.shared[0]),
                b: distance(&b, stored_b[0], self.shared[1]),
                c: rows * c.leading,
                bias: if self.bias { bias.leading } else { 0 },
            };
            let (a, b) = (a.operand(ta), b.operand(tb));
            let product = Product {
                accumulate: self.accumulate,
                bias: self.bias.then(|| bias.pointer().cast_const()),
                epilogue: match self.extra {
                    Extra::None => Epilogue::None,
                    Extra::Gelu => Epilogue::Gelu { preactivation: None },
                    Extra::GeluKept => Epilogue::Gelu { preactivation: Some(extra.pointer()) },
                    Extra::RowSums => Epilogue::RowSums { sums: extra.pointer() },
                },
                batch,
                ..Product::new("test", (rows, columns, depth), a, b, output)
            };
            unsafe { device.matmul(&product) }.unwrap_or_else(|error| panic!("{self:?}: {error}"));
            (c, extra)
        };
        let (c, extra) = run();
        let sums: Vec<f64> = (0..self.count * rows * columns)
            .map(|index| {
                let (member, i, j) = (index / (rows * columns), index / columns % rows, index % columns);
                let (of_a, of_b) = ((member, stored_a[0]), (member, stored_b[0]));
                let term = |p| a.at(of_a, ta, i, p) * b.at(of_b, tb, p, j);
                let added = if self.accumulate { c.values[index] } else { 0.0 };
                let bias = if self.bias { bias.values[member * columns + j] } else { 0.0 };
                (0..depth).map(term).sum::<f64>() + added + bias
            })
            .collect();
        let activated = matches!(self.extra, Extra::Gelu | Extra::GeluKept);
        let expected: Vec<f64> = sums.iter().map(|sum| if activated { gelu(*sum) } else { *sum }).collect();
        self.compare("C", &c.read(device), &expected);
        match self.extra {
            Extra::GeluKept => self.compare("pre-activation", &extra.read(device), &sums),
            Extra::RowSums => {
                let rows: Vec<f64> =
                    (0..rows).map(|i| (0..depth).map(|p| a.at((0, 0), ta, i, p)).sum()).collect();
                self.compare("row sums", &extra.read(device), &rows);
            }
            _ => {}
        }
        let (again, extra_again) = run();
        assert_eq!(c.bits(device), again.bits(device), "{self:?}: two runs differ");
        assert_eq!(extra.bits(device), extra_again.bits(device), "{self:?}: two runs differ");
    }

    fn compare(&self, what: &str, got: &[f64], expected: &[f64]) {
        let limit = match self.output {
            ElementType::F32 if self.tf32 => 2e-3,
            ElementType::F32 => 2e-6,
            ElementType::Bf16 => 6e-3,
            ElementType::F16 => 1e-3,
        };
        let scale = expected.iter().fold(1.0f64, |scale, value| scale.max(value.abs()));
        for (index, (got, expected)) in got.iter().zip(expected).enumerate() {
            let error = (got - expected).abs() / scale;
            assert!(error <= limit, "{self:?}, {what}, element {index}: {got} for {expected} ({error:.1e})");
        }
    }
}

const TYPES: [(ElementType, ElementType); 5] = [
    (ElementType::F32, ElementType::F32),
    (ElementType::Bf16, ElementType::Bf16),
    (ElementType::Bf16, ElementType::F32),
    (ElementType::F16, ElementType::F16),
    (ElementType::F16, ElementType::F32),
];

#[test]
fn products_of_every_layout_type_and_place() {
    let Some(device) = device("products") else { return };
    // Small problems have too many kinds for measuring each.
    device.set_deterministic(true);
    for (element, output) in TYPES {
        for sizes in SIZES {
            for transposed in [[false, false], [false, true], [true, false], [true, true]] {
                for place in [[0, 0], [8, 8], [1, 3]] {
                    let plain = Case { transposed, place, ..Case::plain(element, output, sizes) };
                    plain.check(&device);
                    Case { accumulate: true, ..plain }.check(&device);
                    // A bias is of C's type, which the library has for operands of that type.
                    if element == output {
                        Case { bias: true, ..plain }.check(&device);
                    }
                }
            }
        }
    }
}

#[test]
fn epilogues() {
    let Some(device) = device("epilogues") else { return };
    device.set_deterministic(true);
    for element in [ElementType::Bf16, ElementType::F16] {
        for sizes in [[33, 24, 65], [64, 128, 96], [256, 72, 200]] {
            for bias in [false, true] {
                for extra in [Extra::Gelu, Extra::GeluKept] {
                    let plain = Case::plain(element, element, sizes);
                    Case { bias, extra, transposed: [false, true], ..plain }.check(&device);
                }
            }
        }
    }
}

#[test]
fn row_sums_beside_a_weight_gradient() {
    let Some(device) = device("row sums") else { return };
    device.set_deterministic(true);
    for sizes in [[64, 128, 96], [72, 48, 1000]] {
        let plain = Case::plain(ElementType::Bf16, ElementType::F32, sizes);
        Case { extra: Extra::RowSums, transposed: [true, false], ..plain }.check(&device);
    }
}

/// As of layers of one size with the same input: their outputs, the gradients of the input and of the weights.
#[test]
fn batches() {
    let Some(device) = device("batches of products") else { return };
    for measured in [false, true] {
        device.set_deterministic(!measured);
        for (element, output) in TYPES {
            for sizes in if measured { &SIZES[3..4] } else { &SIZES[..] } {
                for (transposed, shared) in
                    [([false, true], [true, false]), ([false; 2], [false; 2]), ([true, false], [false, true])]
                {
                    for place in [[0, 0], [8, 8], [1, 3]] {
                        let plain = Case::plain(element, output, *sizes);
                        let plain = Case { count: 3, transposed, shared, place, ..plain };
                        plain.check(&device);
                        Case { accumulate: true, ..plain }.check(&device);
                        if element == output {
                            Case { bias: true, ..plain }.check(&device);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn measured_choices_split_depths_and_tf32() {
    let Some(device) = device("measured choices") else { return };
    // A long depth and a small result: where splitting wins.
    for (element, output) in TYPES {
        for accumulate in [false, true] {
            let plain = Case::plain(element, output, [96, 64, 8192]);
            Case { accumulate, transposed: [true, false], ..plain }.check(&device);
        }
    }
    let plain = Case::plain(ElementType::F32, ElementType::F32, [64, 128, 96]);
    Case { tf32: true, ..plain }.check(&device);
}

#[test]
fn the_quickest_way_that_works_is_chosen_and_kept() {
    let Some(device) = device("choices") else { return };
    let buffer = Device::Cuda(device.clone()).allocate(64 << 20, Purpose::Workspace).unwrap();
    // A name that no run before has left on disk.
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let name = format!("test-{}", now.as_nanos());
    let mut calls = 0;
    let mut run = |way: usize| {
        calls += 1;
        let bytes = [64 << 20, 1 << 10, 0][way];
        match way {
            2 => Err(DeviceError::UnknownDevice { name: "a way that fails".into() }),
            // SAFETY: the buffer has these bytes.
            _ => unsafe { device.fill_bytes(buffer.as_ptr(), 0, bytes) },
        }
    };
    assert_eq!(device.choose(&name, 3, &mut run).unwrap(), 1);
    assert_eq!(device.choose(&name, 3, &mut run).unwrap(), 1);
    assert_eq!(calls, 2 * (1 + 5) + 1);
}

//! Matrix products through cuBLASLt: `C = f(A B + beta C + bias)`, in row-major terms.
//!
//! Contract. Operands are f32, bf16 or f16, both of one type; sums are in f32 (in TF32's products where the
//! operands are f32 and [`CudaDevice::set_tf32`] allows it). C is of the operands' type or f32. Views may start at
//! any element. Equal calls on one machine give equal bits: no algorithm adds in an order that
//! chance decides, and the choice of the algorithm is kept.
//!
//! The algorithm for a problem is the fastest of up to 32, measured where the problem is met for the
//! first time outside a captured step and remembered on disk (`plans.rs`, `choices.rs`).
//! [`CudaDevice::set_deterministic`] turns measuring off: then bits depend on the library and the
//! GPU, and not on a stopwatch. An operand that the library refuses is copied first (`repack.rs`).
//! Products of one shape whose matrices lie at equal distances are one call ([`Batch`]).
//!
//! Not done: FP8, pointers to factors on the device.

mod choices;
mod library;
mod noise;
mod plans;
mod problem;
mod repack;

use std::hash::Hash;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock};

use cudarc::cublaslt::sys;

pub use self::noise::variants;

use self::choices::Choices;
use self::library::Handle;
use self::plans::Plans;
use self::problem::{Kind, Problem, Side, alignment};
use super::driver::check;
use super::{CudaDevice, Libraries, Library};
use crate::cpu::ElementType;
use crate::{Buffer, DeviceError, Purpose};

/// Bytes for the parts of products whose depth is split; also more than the cache of most GPUs.
const WORKSPACE: usize = 64 << 20;

/// A read-only matrix: element `(i, j)` lies at `i * leading + j`, or at `j * leading + i` if the transpose is stored.
#[derive(Clone, Copy, Debug)]
pub struct Operand {
    pointer: *const u8,
    element: ElementType,
    leading: usize,
    transposed: bool,
}

impl Operand {
    /// A matrix whose rows are stored one after the other, `leading` elements from start to start.
    pub fn new(pointer: *const u8, element: ElementType, leading: usize) -> Self {
        Self { pointer, element, leading, transposed: false }
    }

    /// The same memory seen as the transposed matrix.
    pub fn transposed(self) -> Self {
        Self { transposed: !self.transposed, ..self }
    }

    /// `distance`: from one matrix of a batch to the next.
    fn side(&self, distance: usize) -> Side {
        let (leading, transposed) = (self.leading, self.transposed);
        Side { leading, transposed, alignment: alignment(self.pointer, distance * self.element.size()) }
    }
}

/// A matrix to write: rows `leading` elements apart.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    pointer: *mut u8,
    element: ElementType,
    leading: usize,
}

impl Output {
    pub fn new(pointer: *mut u8, element: ElementType, leading: usize) -> Self {
        Self { pointer, element, leading }
    }
}

/// Products of one shape whose matrices lie at equal distances, in elements from the start of one to the start
/// of the next. At distance 0 all read the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Batch {
    pub count: usize,
    pub a: usize,
    pub b: usize,
    /// At least as much as C covers.
    pub c: usize,
    /// Of no meaning without a bias.
    pub bias: usize,
}

impl Batch {
    /// A single product.
    pub const ONE: Self = Self { count: 1, a: 0, b: 0, c: 0, bias: 0 };
}

/// What happens beside or after the product.
#[derive(Clone, Copy, Debug)]
pub enum Epilogue {
    None,
    /// `C = gelu(v)` in its tanh form, and `v` itself into memory laid out as C. The rows of both must be a
    /// multiple of 8 elements apart.
    Gelu {
        preactivation: Option<*mut u8>,
    },
    /// Sums of A's rows over the depth, overwritten: with `A = dY^T` the gradient of a bias. `rows` elements of
    /// C's type.
    RowSums {
        sums: *mut u8,
    },
}

/// One product: A is `[rows, depth]`, B `[depth, columns]`, C `[rows, columns]`; or a batch of them.
#[derive(Clone, Copy, Debug)]
pub struct Product {
    /// What profiles call it.
    pub name: &'static str,
    pub rows: usize,
    pub columns: usize,
    pub depth: usize,
    pub a: Operand,
    pub b: Operand,
    pub c: Output,
    /// Adds C's present contents to the product.
    pub accumulate: bool,
    /// One value of C's type for each column, contiguous.
    pub bias: Option<*const u8>,
    pub epilogue: Epilogue,
    /// More than one product only without an epilogue. The addresses above are those of the first.
    pub batch: Batch,
}

impl Product {
    /// The plain product of `[rows, depth]` and `[depth, columns]`; sizes are (rows, columns, depth).
    pub fn new(
        name: &'static str,
        (rows, columns, depth): (usize, usize, usize),
        a: Operand,
        b: Operand,
        c: Output,
    ) -> Self {
        let (accumulate, bias, epilogue, batch) = (false, None, Epilogue::None, Batch::ONE);
        Self { name, rows, columns, depth, a, b, c, accumulate, bias, epilogue, batch }
    }

    /// One product of a batch.
    fn member(&self, index: usize) -> Self {
        let Batch { a, b, c, bias, .. } = self.batch;
        let bytes = |distance: usize, element: ElementType| index * distance * element.size();
        let operand = |operand: Operand, distance: usize| {
            let pointer = operand.pointer.wrapping_add(bytes(distance, operand.element));
            Operand { pointer, ..operand }
        };
        let element = self.c.element;
        Self {
            a: operand(self.a, a),
            b: operand(self.b, b),
            c: Output { pointer: self.c.pointer.wrapping_add(bytes(c, element)), ..self.c },
            bias: self.bias.map(|pointer| pointer.wrapping_add(bytes(bias, element))),
            batch: Batch::ONE,
            ..*self
        }
    }

    fn problem(&self, tf32: bool) -> Problem {
        let (kind, extra) = match self.epilogue {
            Epilogue::None => (Kind::Plain, None),
            Epilogue::Gelu { preactivation: None } => (Kind::Gelu, None),
            Epilogue::Gelu { preactivation: Some(kept) } => (Kind::GeluKept, Some(alignment(kept, 0))),
            Epilogue::RowSums { sums } => (Kind::RowSums, Some(alignment(sums, 0))),
        };
        assert!(self.a.element == self.b.element, "a product of two element types");
        assert!(self.bias.is_none() || kind != Kind::RowSums, "a product with a bias and its gradient");
        let batch = if self.batch.count == 1 { Batch::ONE } else { self.batch };
        assert!(batch == Batch::ONE || kind == Kind::Plain, "a batch of products with an epilogue");
        let output = |pointer, distance: usize| alignment(pointer, distance * self.c.element.size());
        Problem {
            rows: self.rows,
            columns: self.columns,
            depth: self.depth,
            element: self.a.element,
            output: self.c.element,
            a: self.a.side(batch.a),
            b: self.b.side(batch.b),
            c: Side {
                leading: self.c.leading,
                transposed: false,
                alignment: output(self.c.pointer, batch.c),
            },
            accumulate: self.accumulate,
            bias: self.bias.map(|bias| output(bias, batch.bias)),
            kind,
            extra,
            tf32: tf32 && self.a.element == ElementType::F32,
            batch,
        }
    }
}

/// The state behind a device's products.
#[derive(Default)]
pub(super) struct Products {
    tf32: AtomicBool,
    deterministic: AtomicBool,
    choices: Choices,
    engine: OnceLock<Engine>,
    /// Held while the engine is made.
    starting: Mutex<()>,
}

/// The library on one device.
struct Engine {
    handle: Handle,
    /// Shared by all products, which follow each other on the stream.
    workspace: Buffer,
    plans: Mutex<Plans>,
}

/// Version of cuBLASLt; 0 if it is missing.
fn version() -> usize {
    // SAFETY: the library is there.
    Libraries::load().get(Library::CublasLt).map_or(0, |_| unsafe { sys::cublasLtGetVersion() })
}

impl CudaDevice {
    /// Lets products of f32 round their factors to TF32's 10 bits of mantissa.
    pub fn set_tf32(&self, allowed: bool) {
        self.products.tf32.store(allowed, Ordering::Relaxed);
    }

    /// Whether algorithms are taken as the library proposes them, without measuring: a run that is continued
    /// without the cache on disk has the same bits then.
    pub fn set_deterministic(&self, deterministic: bool) {
        self.products.deterministic.store(deterministic, Ordering::Relaxed);
    }

    /// What [`Self::set_deterministic`] said last.
    pub fn is_deterministic(&self) -> bool {
        self.products.deterministic.load(Ordering::Relaxed)
    }

    /// Brings the library and its workspace up. That cannot happen inside a captured step: the request for
    /// memory would be missing when the step is replayed. Without the library the first product says so.
    pub(super) fn prepare_products(&self) {
        let _ = self.engine();
    }

    fn engine(&self) -> Result<&Engine, DeviceError> {
        let _starting = self.products.starting.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(engine) = self.products.engine.get() {
            return Ok(engine);
        }
        Libraries::load().require(&[Library::CublasLt])?;
        self.bind()?;
        let handle = Handle::new(self.ordinal())?;
        let workspace = self.allocate(WORKSPACE, Purpose::Workspace)?;
        Ok(self.products.engine.get_or_init(|| Engine { handle, workspace, plans: Mutex::default() }))
    }

    /// Overwrites the products' workspace, and with it the cache of the device.
    fn clear_cache(&self) -> Result<(), DeviceError> {
        let Some(engine) = self.products.engine.get() else { return Ok(()) };
        let workspace = engine.workspace.as_ptr() as u64;
        // SAFETY: the workspace holds nothing between products.
        let result = unsafe { cudarc::driver::sys::cuMemsetD8Async(workspace, 0, WORKSPACE, self.stream()) };
        check("cuMemsetD8Async", self.ordinal(), result)
    }

    /// Computes the product, or all of its batch.
    ///
    /// # Errors
    /// If cuBLASLt is missing, or has no algorithm for the product.
    ///
    /// # Safety
    /// The operands must cover the shape: A `[rows, depth]`, B `[depth, columns]`, C and the pre-activation
    /// `[rows, columns]`, the bias `[columns]`, row sums `[rows]`, and so all members of a batch; what is written must
    /// overlap nothing else of the product. Every address is a multiple of its element's size.
    pub unsafe fn matmul(&self, product: &Product) -> Result<(), DeviceError> {
        if product.rows == 0 || product.columns == 0 || product.batch.count == 0 {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        unsafe {
            if self.matmul_where_it_lies(product)? {
                return Ok(());
            }
            if product.batch.count > 1 {
                return (0..product.batch.count).try_for_each(|index| self.matmul(&product.member(index)));
            }
            let plain = matches!(product.epilogue, Epilogue::None);
            if plain && self.matmul_of_copies(product)? {
                return Ok(());
            }
        }
        let name = product.problem(self.products.tf32.load(Ordering::Relaxed)).name();
        let device = format!("cuda:{}", self.ordinal());
        Err(DeviceError::Cuda { call: "cublasLtMatmul", device, code: format!("no algorithm for {name}") })
    }

    /// Whether the library takes the product.
    ///
    /// # Safety
    /// As [`Self::matmul`].
    unsafe fn matmul_where_it_lies(&self, product: &Product) -> Result<bool, DeviceError> {
        let engine = self.engine()?;
        let problem = product.problem(self.products.tf32.load(Ordering::Relaxed));
        let mut plans = engine.plans.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        // SAFETY: the caller's promise.
        let Some(plan) = (unsafe { plans.get(self, engine, &problem, product)? }) else { return Ok(false) };
        let extra = match product.epilogue {
            Epilogue::None => None,
            Epilogue::Gelu { preactivation } => preactivation,
            Epilogue::RowSums { sums } => Some(sums),
        };
        let hash = |hasher: &mut std::hash::DefaultHasher| {
            (problem, product.a.pointer, product.b.pointer, product.c.pointer, product.bias, extra)
                .hash(hasher);
        };
        if self.admit(product.name, hash)? {
            // SAFETY: the caller's promise.
            unsafe { plan.run(self, engine, product)? };
        }
        Ok(true)
    }
}

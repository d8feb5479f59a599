//! cuBLASLt's objects: a product described to it, its algorithms, and a run.

use std::ffi::c_void;
use std::ptr::null_mut;

use cudarc::cublaslt::sys::{self, cublasStatus_t as Status};
use cudarc::driver::sys::CUstream;

use super::problem::{Kind, Layout, Problem};
use super::{Epilogue, Product};
use crate::DeviceError;
use crate::cpu::ElementType;

/// An error unless the call succeeded; `call` names it.
pub(super) fn check(call: &'static str, ordinal: usize, status: Status) -> Result<(), DeviceError> {
    if status == Status::CUBLAS_STATUS_SUCCESS {
        return Ok(());
    }
    Err(DeviceError::Cuda { call, device: format!("cuda:{ordinal}"), code: format!("{status:?}") })
}

/// The library at work on one device.
pub(super) struct Handle(pub sys::cublasLtHandle_t);
// SAFETY: the library's handle may be used by any thread.
unsafe impl Send for Handle {}

impl Handle {
    /// The context is current and the library is there.
    pub fn new(ordinal: usize) -> Result<Self, DeviceError> {
        let mut handle = null_mut();
        // SAFETY: as the contract says.
        check("cublasLtCreate", ordinal, unsafe { sys::cublasLtCreate(&mut handle) })?;
        Ok(Self(handle))
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: made by `new`.
        unsafe { sys::cublasLtDestroy(self.0) };
    }
}

/// How a product is to be run; 64 bytes that mean something to the library's version alone.
pub(super) type Algorithm = sys::cublasLtMatmulAlgo_t;

struct MatrixLayout(sys::cublasLtMatrixLayout_t);

impl MatrixLayout {
    /// `count` matrices, `distance` elements from start to start.
    fn new(
        ordinal: usize,
        element: ElementType,
        layout: Layout,
        (count, distance): (usize, usize),
    ) -> Result<Self, DeviceError> {
        use sys::cublasLtMatrixLayoutAttribute_t as Attribute;
        let mut handle = null_mut();
        let (rows, columns, leading) = (layout.rows as u64, layout.columns as u64, layout.leading as i64);
        // SAFETY: the library is there.
        let status = unsafe {
            sys::cublasLtMatrixLayoutCreate(&mut handle, data_type(element), rows, columns, leading)
        };
        check("cublasLtMatrixLayoutCreate", ordinal, status)?;
        let matrices = Self(handle);
        if count > 1 {
            matrices.set(ordinal, Attribute::CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, count as i32)?;
            let distance = distance as i64;
            matrices.set(ordinal, Attribute::CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, distance)?;
        }
        Ok(matrices)
    }

    fn set<T: Copy>(
        &self,
        ordinal: usize,
        attribute: sys::cublasLtMatrixLayoutAttribute_t,
        value: T,
    ) -> Result<(), DeviceError> {
        let pointer = (&raw const value).cast::<c_void>();
        // SAFETY: the value has the attribute's size, as each caller's type says.
        let status =
            unsafe { sys::cublasLtMatrixLayoutSetAttribute(self.0, attribute, pointer, size_of::<T>()) };
        check("cublasLtMatrixLayoutSetAttribute", ordinal, status)
    }
}

impl Drop for MatrixLayout {
    fn drop(&mut self) {
        // SAFETY: made by `new`.
        unsafe { sys::cublasLtMatrixLayoutDestroy(self.0) };
    }
}

/// A product described to the library. The layouts are named as ours, not as the library's.
pub(super) struct Description {
    ordinal: usize,
    operation: sys::cublasLtMatmulDesc_t,
    a: MatrixLayout,
    b: MatrixLayout,
    c: MatrixLayout,
}
// SAFETY: handles of plain structures in host memory.
unsafe impl Send for Description {}

impl Drop for Description {
    fn drop(&mut self) {
        // SAFETY: made by `new`.
        unsafe { sys::cublasLtMatmulDescDestroy(self.operation) };
    }
}

impl Description {
    pub fn new(ordinal: usize, problem: &Problem) -> Result<Self, DeviceError> {
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        let view = problem.column_major();
        let compute = match problem.tf32 {
            true => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32,
            false => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
        };
        let (first, second) = (view.first, view.second);
        let batch = problem.batch;
        let b = MatrixLayout::new(ordinal, problem.element, first.0, (batch.count, batch.b))?;
        let a = MatrixLayout::new(ordinal, problem.element, second.0, (batch.count, batch.a))?;
        let c = MatrixLayout::new(ordinal, problem.output, view.output, (batch.count, batch.c))?;
        let mut operation = null_mut();
        let scale = sys::cudaDataType::CUDA_R_32F;
        // SAFETY: the library is there.
        let status = unsafe { sys::cublasLtMatmulDescCreate(&mut operation, compute, scale) };
        check("cublasLtMatmulDescCreate", ordinal, status)?;
        let description = Self { ordinal, operation, a, b, c };
        description.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, i32::from(first.1))?;
        description.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSB, i32::from(second.1))?;
        description.set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue(problem) as u32)?;
        if problem.bias.is_some() || problem.kind == Kind::RowSums {
            let kind = data_type(problem.output) as i32;
            description.set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, kind)?;
        }
        if problem.bias.is_some() && batch.count > 1 {
            let distance = batch.bias as i64;
            description.set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_BATCH_STRIDE, distance)?;
        }
        if problem.kind == Kind::GeluKept {
            let leading = problem.c.leading as i64;
            description.set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, leading)?;
        }
        Ok(description)
    }

    fn set<T: Copy>(
        &self,
        attribute: sys::cublasLtMatmulDescAttributes_t,
        value: T,
    ) -> Result<(), DeviceError> {
        let pointer = (&raw const value).cast::<c_void>();
        // SAFETY: the value has the attribute's size, as each caller's type says.
        let status = unsafe {
            sys::cublasLtMatmulDescSetAttribute(self.operation, attribute, pointer, size_of::<T>())
        };
        check("cublasLtMatmulDescSetAttribute", self.ordinal, status)
    }

    /// The addresses beside the matrices. The heuristic looks at their alignment too.
    pub fn point_at(&self, product: &Product) -> Result<(), DeviceError> {
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        if let Some(bias) = product.bias {
            self.set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias)?;
        }
        match product.epilogue {
            Epilogue::None | Epilogue::Gelu { preactivation: None } => Ok(()),
            Epilogue::Gelu { preactivation: Some(kept) } => {
                self.set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, kept)
            }
            Epilogue::RowSums { sums } => self.set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, sums),
        }
    }

    /// Up to `count` algorithms, the most promising first; none if the library refuses the problem.
    pub fn algorithms(
        &self,
        handle: &Handle,
        problem: &Problem,
        workspace: usize,
        count: usize,
    ) -> Result<Vec<Algorithm>, DeviceError> {
        let preference = Preference::new(self.ordinal, problem, workspace)?;
        // SAFETY: all zeros is a value of this plain structure (its state is success).
        let none: sys::cublasLtMatmulHeuristicResult_t = unsafe { std::mem::zeroed() };
        let mut results = vec![none; count];
        let mut found = 0;
        // SAFETY: `count` results fit; the handles are alive.
        let status = unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                handle.0,
                self.operation,
                self.b.0,
                self.a.0,
                self.c.0,
                self.c.0,
                preference.0,
                count as i32,
                results.as_mut_ptr(),
                &mut found,
            )
        };
        match status {
            Status::CUBLAS_STATUS_SUCCESS => {}
            Status::CUBLAS_STATUS_NOT_SUPPORTED | Status::CUBLAS_STATUS_INVALID_VALUE => {
                return Ok(Vec::new());
            }
            other => check("cublasLtMatmulAlgoGetHeuristic", self.ordinal, other)?,
        }
        results.truncate(found.max(0) as usize);
        results.retain(|result| result.state == Status::CUBLAS_STATUS_SUCCESS);
        Ok(results.into_iter().map(|result| result.algo).collect())
    }

    /// Whether an algorithm from the disk runs this product within the workspace.
    pub fn accepts(&self, handle: &Handle, algorithm: &Algorithm, workspace: usize) -> bool {
        // SAFETY: as in `algorithms`.
        unsafe {
            let mut result: sys::cublasLtMatmulHeuristicResult_t = std::mem::zeroed();
            let status = sys::cublasLtMatmulAlgoCheck(
                handle.0,
                self.operation,
                self.b.0,
                self.a.0,
                self.c.0,
                self.c.0,
                algorithm,
                &mut result,
            );
            status == Status::CUBLAS_STATUS_SUCCESS && result.workspaceSize <= workspace
        }
    }

    /// Starts the product, with C at `c`.
    ///
    /// # Safety
    /// The addresses are those of [`Self::point_at`] and fit the problem; `c` may be written.
    pub unsafe fn run(
        &self,
        handle: &Handle,
        algorithm: &Algorithm,
        product: &Product,
        c: *mut u8,
        workspace: (*mut u8, usize),
        stream: CUstream,
    ) -> Result<(), DeviceError> {
        let (alpha, beta) = (1.0f32, f32::from(u8::from(product.accumulate)));
        // SAFETY: the caller's promise; the factors are read during the call.
        let status = unsafe {
            sys::cublasLtMatmul(
                handle.0,
                self.operation,
                (&raw const alpha).cast(),
                product.b.pointer.cast(),
                self.b.0,
                product.a.pointer.cast(),
                self.a.0,
                (&raw const beta).cast(),
                c.cast(),
                self.c.0,
                c.cast(),
                self.c.0,
                algorithm,
                workspace.0.cast(),
                workspace.1,
                stream.cast(),
            )
        };
        check("cublasLtMatmul", self.ordinal, status)
    }
}

/// What the heuristic may propose.
struct Preference(sys::cublasLtMatmulPreference_t);

impl Preference {
    fn new(ordinal: usize, problem: &Problem, workspace: usize) -> Result<Self, DeviceError> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        let mut handle = null_mut();
        // SAFETY: the library is there.
        check("cublasLtMatmulPreferenceCreate", ordinal, unsafe {
            sys::cublasLtMatmulPreferenceCreate(&mut handle)
        })?;
        let preference = Self(handle);
        preference.set(ordinal, Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, workspace as u64)?;
        // A product whose depth is split keeps its parts in f32 and adds them in a step of its own, in a
        // fixed order. Parts of the output's type would be rounded to bf16 before they are added, and the
        // scheme in place adds to the output as parts finish.
        let schemes = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
        preference.set(ordinal, Attribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, schemes)?;
        let [a, b, c] = [problem.b, problem.a, problem.c].map(|side| side.alignment as u32);
        preference.set(ordinal, Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, a)?;
        preference.set(ordinal, Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, b)?;
        preference.set(ordinal, Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, c)?;
        preference.set(ordinal, Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, c)?;
        Ok(preference)
    }

    fn set<T: Copy>(
        &self,
        ordinal: usize,
        attribute: sys::cublasLtMatmulPreferenceAttributes_t,
        value: T,
    ) -> Result<(), DeviceError> {
        let pointer = (&raw const value).cast::<c_void>();
        // SAFETY: the value has the attribute's size, as each caller's type says.
        let status =
            unsafe { sys::cublasLtMatmulPreferenceSetAttribute(self.0, attribute, pointer, size_of::<T>()) };
        check("cublasLtMatmulPreferenceSetAttribute", ordinal, status)
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: made by `new`.
        unsafe { sys::cublasLtMatmulPreferenceDestroy(self.0) };
    }
}

fn data_type(element: ElementType) -> sys::cudaDataType {
    match element {
        ElementType::F32 => sys::cudaDataType::CUDA_R_32F,
        ElementType::Bf16 => sys::cudaDataType::CUDA_R_16BF,
        ElementType::F16 => sys::cudaDataType::CUDA_R_16F,
    }
}

fn epilogue(problem: &Problem) -> sys::cublasLtEpilogue_t {
    use sys::cublasLtEpilogue_t as Name;
    match (problem.kind, problem.bias.is_some()) {
        (Kind::Plain, false) => Name::CUBLASLT_EPILOGUE_DEFAULT,
        (Kind::Plain, true) => Name::CUBLASLT_EPILOGUE_BIAS,
        (Kind::Gelu, false) => Name::CUBLASLT_EPILOGUE_GELU,
        (Kind::Gelu, true) => Name::CUBLASLT_EPILOGUE_GELU_BIAS,
        (Kind::GeluKept, false) => Name::CUBLASLT_EPILOGUE_GELU_AUX,
        (Kind::GeluKept, true) => Name::CUBLASLT_EPILOGUE_GELU_AUX_BIAS,
        // The library's second operand is our A.
        (Kind::RowSums, _) => Name::CUBLASLT_EPILOGUE_BGRADB,
    }
}

//! Element types of tensors.

use anneal_device::cpu::ElementType;
use half::{bf16, f16};

use crate::{Result, TensorError};

/// The element type of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    F32,
    BF16,
    F16,
    I64,
    U8,
}

impl DType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            DType::I64 => 8,
            DType::F32 => 4,
            DType::BF16 | DType::F16 => 2,
            DType::U8 => 1,
        }
    }

    pub fn is_float(self) -> bool {
        matches!(self, DType::F32 | DType::BF16 | DType::F16)
    }

    /// The element type of a float dtype, as the device's products and copies name it.
    ///
    /// # Errors
    /// In the op's name, if it is no float.
    pub(crate) fn element_type(self, op: &'static str) -> Result<ElementType> {
        match self {
            DType::F32 => Ok(ElementType::F32),
            DType::BF16 => Ok(ElementType::Bf16),
            DType::F16 => Ok(ElementType::F16),
            other => Err(TensorError::unsupported_dtype(op, other)),
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::BF16 => "bf16",
            DType::F16 => "f16",
            DType::I64 => "i64",
            DType::U8 => "u8",
        }
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(self.name())
    }
}

/// A Rust type that a tensor can hold.
pub trait Element: bytemuck::Pod + Send + Sync {
    const DTYPE: DType;
}

/// A floating-point element; kernels compute in f32 and convert at loads and stores.
pub trait Float: Element {
    fn to_f32(self) -> f32;
    fn from_f32(value: f32) -> Self;
}

macro_rules! element {
    ($($kind:ty => $dtype:ident),*) => { $(impl Element for $kind { const DTYPE: DType = DType::$dtype; })* };
}
element!(f32 => F32, bf16 => BF16, f16 => F16, i64 => I64, u8 => U8);

macro_rules! float {
    ($($kind:ty),*) => { $(impl Float for $kind {
        #[inline(always)]
        fn to_f32(self) -> f32 {
            anneal_device::cpu::Element::to_f32(self)
        }
        #[inline(always)]
        fn from_f32(value: f32) -> Self {
            anneal_device::cpu::Element::from_f32(value)
        }
    })* };
}
float!(f32, bf16, f16);

/// Runs `$body` with the type alias `$kind` bound to the Rust type of a float dtype.
#[macro_export]
macro_rules! for_float {
    ($op:expr, $dtype:expr, $kind:ident => $body:expr) => {
        match $dtype {
            $crate::DType::F32 => {
                type $kind = f32;
                $body
            }
            $crate::DType::BF16 => {
                type $kind = $crate::half::bf16;
                $body
            }
            $crate::DType::F16 => {
                type $kind = $crate::half::f16;
                $body
            }
            other => Err($crate::TensorError::unsupported_dtype($op, other)),
        }
    };
}

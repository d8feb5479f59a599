//! Element types of tensors.

use half::{bf16, f16};

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

impl Float for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        value
    }
}

impl Float for bf16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    /// Rounds to nearest even; a NaN stays a NaN. Branch-free, so that loops vectorise.
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        let bits = value.to_bits();
        let rounded = (bits.wrapping_add(0x7FFF + ((bits >> 16) & 1))) >> 16;
        let quiet = (bits >> 16) | 0x40;
        bf16::from_bits(if value.is_nan() { quiet } else { rounded } as u16)
    }
}

impl Float for f16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        f16::from_f32(value)
    }
}

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
                type $kind = ::half::bf16;
                $body
            }
            $crate::DType::F16 => {
                type $kind = ::half::f16;
                $body
            }
            other => Err($crate::TensorError::unsupported_dtype($op, other)),
        }
    };
}

#[cfg(test)]
mod tests {
    use super::Float;
    use half::bf16;

    #[test]
    fn bf16_rounding_equals_the_half_crate_on_every_upper_pattern() {
        for upper in 0..=u16::MAX {
            for lower in [0u32, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF] {
                let value = f32::from_bits(u32::from(upper) << 16 | lower);
                let ours = <bf16 as Float>::from_f32(value);
                let theirs = bf16::from_f32(value);
                assert!(ours.to_bits() == theirs.to_bits() || (value.is_nan() && ours.is_nan()), "{value:e}");
            }
        }
    }
}

//! The floating-point formats of CPU operands, and conversions that vectorise.
//!
//! Contract: every format converts to f32 exactly; f32 converts back rounding to nearest even,
//! overflow goes to infinity, NaN stays NaN. Written with integer operations and selects, so that
//! loops inside [`vectorize`](super::vectorize) become vector code (the `half` crate's own
//! conversions detect the processor at each call).

use half::{bf16, f16};

/// Format of an operand in memory; all arithmetic is in f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ElementType {
    F32,
    Bf16,
    F16,
}

impl ElementType {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            ElementType::F32 => 4,
            ElementType::Bf16 | ElementType::F16 => 2,
        }
    }
}

/// A Rust type of one of the [`ElementType`]s.
pub trait Element: Copy + Send + Sync + 'static {
    const TYPE: ElementType;
    fn to_f32(self) -> f32;
    fn from_f32(value: f32) -> Self;

    /// `to_f32` of an array (`array::map` is a call that is not always inlined).
    #[inline(always)]
    fn widen<const N: usize>(values: [Self; N]) -> [f32; N] {
        let mut wide = [0.0; N];
        for (wide, value) in wide.iter_mut().zip(values) {
            *wide = value.to_f32();
        }
        wide
    }

    /// `from_f32` of an array.
    #[inline(always)]
    fn narrow<const N: usize>(values: &[f32; N]) -> [Self; N] {
        let mut narrow = [Self::from_f32(0.0); N];
        for (narrow, value) in narrow.iter_mut().zip(values) {
            *narrow = Self::from_f32(*value);
        }
        narrow
    }
}

impl Element for f32 {
    const TYPE: ElementType = ElementType::F32;
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        value
    }
}

impl Element for bf16 {
    const TYPE: ElementType = ElementType::Bf16;
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits((self.to_bits() as u32) << 16)
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        let quiet = (bits >> 16) | 0x40;
        bf16::from_bits(if value.is_nan() { quiet } else { rounded } as u16)
    }
}

impl Element for f16 {
    const TYPE: ElementType = ElementType::F16;
    #[inline(always)]
    fn to_f32(self) -> f32 {
        let bits = self.to_bits() as u32;
        let magnitude = bits & 0x7fff;
        // Shifted into place the exponent is 112 too small; the product also mends denormals.
        let finite = f32::from_bits(magnitude << 13) * f32::from_bits((127 + 112) << 23);
        let special = f32::from_bits((magnitude << 13) | 0x7f80_0000);
        let value = if magnitude >= 0x7c00 { special } else { finite };
        f32::from_bits(value.to_bits() | ((bits & 0x8000) << 16))
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        let bits = value.to_bits();
        let magnitude = bits & 0x7fff_ffff;
        let rebiased = magnitude.wrapping_sub(112 << 23);
        let normal = rebiased.wrapping_add(0xfff + ((magnitude >> 13) & 1)) >> 13;
        // One unit of 0.5's last place is the smallest f16 denormal: the addition rounds for us.
        let denormal = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0.5f32.to_bits());
        let finite = if magnitude < (113 << 23) { denormal } else { normal };
        let limited = if magnitude >= 0x477f_f000 { 0x7c00 } else { finite };
        let result = if magnitude > 0x7f80_0000 { 0x7e00 } else { limited };
        f16::from_bits((result | ((bits >> 16) & 0x8000)) as u16)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_value_converts_as_in_the_half_crate() {
        for bits in 0..=u16::MAX {
            let (b, h) = (bf16::from_bits(bits), f16::from_bits(bits));
            let (b32, h32) = (Element::to_f32(b), Element::to_f32(h));
            assert!(b32.to_bits() == b.to_f32().to_bits() || b.is_nan() && b32.is_nan());
            assert!(h32.to_bits() == h.to_f32().to_bits() || h.is_nan() && h32.is_nan(), "{bits:#x}");
            if !b.is_nan() {
                assert_eq!(<bf16 as Element>::from_f32(b32).to_bits(), bits);
            }
            if !h.is_nan() {
                assert_eq!(<f16 as Element>::from_f32(h32).to_bits(), bits);
            }
        }
    }

    #[test]
    fn rounding_agrees_with_the_half_crate_over_all_of_f32() {
        // A stride coprime with 2^32 visits every exponent, ties and both signs.
        let ties = (0..=u16::MAX).flat_map(|high| {
            [0x0fff, 0x1000, 0x1001, 0x7fff, 0x8000, 0x8001].map(|low| ((high as u32) << 16) | low)
        });
        let spread = (0..2_000_000u32).map(|index| index.wrapping_mul(2_654_435_761));
        for bits in ties.chain(spread) {
            let value = f32::from_bits(bits);
            let (b, h) = (<bf16 as Element>::from_f32(value), <f16 as Element>::from_f32(value));
            if value.is_nan() {
                assert!(b.is_nan() && h.is_nan());
            } else {
                assert_eq!(b.to_bits(), bf16::from_f32(value).to_bits(), "{value:e}");
                assert_eq!(h.to_bits(), f16::from_f32(value).to_bits(), "{value:e} {bits:#x}");
            }
        }
    }
}

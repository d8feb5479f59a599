//! AVX-512 and AVX2 with FMA.

use std::arch::x86_64::*;

use super::{Rows, Simd};

/// Sixteen lanes, thirty-two registers.
#[derive(Clone, Copy)]
pub(in super::super) struct Avx512(());

/// Eight lanes, sixteen registers.
#[derive(Clone, Copy)]
pub(in super::super) struct Avx2(());

impl Avx512 {
    /// `None` if the processor lacks it.
    pub fn detect() -> Option<Self> {
        let present = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl");
        (present && Avx2::detect().is_some()).then_some(Self(()))
    }
}

impl Avx2 {
    /// `None` if the processor lacks it.
    pub fn detect() -> Option<Self> {
        let present = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        present.then_some(Self(()))
    }
}

/// The methods that are one intrinsic each.
macro_rules! intrinsics {
    ($vector:ty, $($name:ident: $intrinsic:ident($($operand:ident),*)),*) => { $(
        #[inline(always)]
        fn $name(self, $($operand: $vector),*) -> $vector {
            // SAFETY: `self` proves that the processor has the instruction.
            unsafe { $intrinsic($($operand),*) }
        }
    )* };
}

// SAFETY, for every block below: `self` proves that the processor has the instructions;
// pointers are the caller's promise.
impl Simd for Avx512 {
    type Vector = __m512;
    const LANES: usize = 16;
    const MOST_COLUMNS: usize = 5;

    #[inline(always)]
    fn most_rows(columns: usize) -> usize {
        [0, 16, 14, 8, 6, 5][columns]
    }

    #[inline(always)]
    fn call<R>(self, body: impl FnOnce() -> R) -> R {
        #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c")]
        #[inline(never)]
        fn compiled<R>(body: impl FnOnce() -> R) -> R {
            body()
        }
        unsafe { compiled(body) }
    }

    #[inline(always)]
    unsafe fn load(self, source: *const f32) -> __m512 {
        unsafe { _mm512_loadu_ps(source) }
    }

    #[inline(always)]
    unsafe fn store(self, target: *mut f32, value: __m512) {
        unsafe { _mm512_storeu_ps(target, value) }
    }

    #[inline(always)]
    fn splat(self, value: f32) -> __m512 {
        unsafe { _mm512_set1_ps(value) }
    }

    intrinsics!(
        __m512, add: _mm512_add_ps(a, b), sub: _mm512_sub_ps(a, b), mul: _mm512_mul_ps(a, b),
        mul_add: _mm512_fmadd_ps(a, b, c), max: _mm512_max_ps(a, b)
    );

    #[inline(always)]
    fn sum(self, value: __m512) -> f32 {
        unsafe { _mm512_reduce_add_ps(value) }
    }

    #[inline(always)]
    fn scale_exponent(self, value: __m512, power: __m512) -> __m512 {
        unsafe {
            let shift = _mm512_slli_epi32::<23>(_mm512_castps_si512(power));
            _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(value), shift))
        }
    }

    #[inline(always)]
    unsafe fn transpose(self, source: Rows<*const f32>, rows: usize, factor: f32, target: Rows<*mut f32>) {
        unsafe {
            let mut r = [_mm512_setzero_ps(); 16];
            for (row, value) in r.iter_mut().enumerate() {
                if row < rows {
                    *value = _mm512_loadu_ps(source.row(row));
                }
            }
            let factor = _mm512_set1_ps(factor);
            // In each 128-bit lane: pairs of rows, then quadruples.
            let mut q = [_mm512_setzero_ps(); 16];
            for i in (0..16).step_by(4) {
                let low = _mm512_castps_pd(_mm512_unpacklo_ps(r[i], r[i + 1]));
                let high = _mm512_castps_pd(_mm512_unpackhi_ps(r[i], r[i + 1]));
                let next_low = _mm512_castps_pd(_mm512_unpacklo_ps(r[i + 2], r[i + 3]));
                let next_high = _mm512_castps_pd(_mm512_unpackhi_ps(r[i + 2], r[i + 3]));
                q[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, next_low));
                q[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, next_low));
                q[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high, next_high));
                q[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high, next_high));
            }
            // Column 4 l + c of rows 4 i.. lies in lane l of q[4 i + c]: the lanes change places.
            for c in 0..4 {
                let even = _mm512_shuffle_f32x4::<0x88>(q[c], q[4 + c]);
                let odd = _mm512_shuffle_f32x4::<0xdd>(q[c], q[4 + c]);
                let next_even = _mm512_shuffle_f32x4::<0x88>(q[8 + c], q[12 + c]);
                let next_odd = _mm512_shuffle_f32x4::<0xdd>(q[8 + c], q[12 + c]);
                let columns = [
                    _mm512_shuffle_f32x4::<0x88>(even, next_even),
                    _mm512_shuffle_f32x4::<0x88>(odd, next_odd),
                    _mm512_shuffle_f32x4::<0xdd>(even, next_even),
                    _mm512_shuffle_f32x4::<0xdd>(odd, next_odd),
                ];
                for (lane, column) in columns.into_iter().enumerate() {
                    _mm512_storeu_ps(target.row(4 * lane + c), _mm512_mul_ps(column, factor));
                }
            }
        }
    }
}

impl Simd for Avx2 {
    type Vector = __m256;
    const LANES: usize = 8;
    const MOST_COLUMNS: usize = 2;

    #[inline(always)]
    fn most_rows(columns: usize) -> usize {
        [0, 12, 6][columns]
    }

    #[inline(always)]
    fn call<R>(self, body: impl FnOnce() -> R) -> R {
        #[target_feature(enable = "avx2,fma,f16c")]
        #[inline(never)]
        fn compiled<R>(body: impl FnOnce() -> R) -> R {
            body()
        }
        unsafe { compiled(body) }
    }

    #[inline(always)]
    unsafe fn load(self, source: *const f32) -> __m256 {
        unsafe { _mm256_loadu_ps(source) }
    }

    #[inline(always)]
    unsafe fn store(self, target: *mut f32, value: __m256) {
        unsafe { _mm256_storeu_ps(target, value) }
    }

    #[inline(always)]
    fn splat(self, value: f32) -> __m256 {
        unsafe { _mm256_set1_ps(value) }
    }

    intrinsics!(
        __m256, add: _mm256_add_ps(a, b), sub: _mm256_sub_ps(a, b), mul: _mm256_mul_ps(a, b),
        mul_add: _mm256_fmadd_ps(a, b, c), max: _mm256_max_ps(a, b)
    );

    #[inline(always)]
    fn sum(self, value: __m256) -> f32 {
        unsafe {
            let half = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps::<1>(value));
            let pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
            _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)))
        }
    }

    #[inline(always)]
    fn scale_exponent(self, value: __m256, power: __m256) -> __m256 {
        unsafe {
            let shift = _mm256_slli_epi32::<23>(_mm256_castps_si256(power));
            _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(value), shift))
        }
    }

    #[inline(always)]
    unsafe fn transpose(self, source: Rows<*const f32>, rows: usize, factor: f32, target: Rows<*mut f32>) {
        unsafe {
            let mut r = [_mm256_setzero_ps(); 8];
            for (row, value) in r.iter_mut().enumerate() {
                if row < rows {
                    *value = _mm256_loadu_ps(source.row(row));
                }
            }
            let factor = _mm256_set1_ps(factor);
            let mut q = [_mm256_setzero_ps(); 8];
            for i in [0, 4] {
                let low = _mm256_castps_pd(_mm256_unpacklo_ps(r[i], r[i + 1]));
                let high = _mm256_castps_pd(_mm256_unpackhi_ps(r[i], r[i + 1]));
                let next_low = _mm256_castps_pd(_mm256_unpacklo_ps(r[i + 2], r[i + 3]));
                let next_high = _mm256_castps_pd(_mm256_unpackhi_ps(r[i + 2], r[i + 3]));
                q[i] = _mm256_castpd_ps(_mm256_unpacklo_pd(low, next_low));
                q[i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low, next_low));
                q[i + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(high, next_high));
                q[i + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(high, next_high));
            }
            for c in 0..4 {
                let first = _mm256_permute2f128_ps::<0x20>(q[c], q[4 + c]);
                let second = _mm256_permute2f128_ps::<0x31>(q[c], q[4 + c]);
                _mm256_storeu_ps(target.row(c), _mm256_mul_ps(first, factor));
                _mm256_storeu_ps(target.row(4 + c), _mm256_mul_ps(second, factor));
            }
        }
    }
}

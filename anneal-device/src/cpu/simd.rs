//! Run-time SIMD dispatch: one source, compiled for the baseline, AVX2+FMA and AVX-512.

use std::sync::OnceLock;

/// Runs `body` compiled for the widest vector unit of this machine.
///
/// `body` must be an inlined closure over plain loops: they are then vectorised by the
/// compiler under the features found. Results may differ in the last bit between machines
/// of different vector units, never between runs or numbers of threads on one machine.
#[inline(always)]
pub fn vectorize<R>(body: impl FnOnce() -> R) -> R {
    static ARCH: OnceLock<pulp::Arch> = OnceLock::new();
    ARCH.get_or_init(pulp::Arch::new).dispatch(body)
}

/// What the kernels run on here, for people.
pub fn vector_unit() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vl") {
            return "AVX-512";
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            return "AVX2 with FMA";
        }
    }
    "portable (no AVX2 found: expect a fraction of the speed)"
}

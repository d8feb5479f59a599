//! The vector unit as attention needs it: one generic source for AVX-512, AVX2 and plain arrays.
//!
//! A value of a type that implements [`Simd`] is proof that the processor has its
//! instructions, so its methods are safe but where they take pointers.
//! Code must run inside [`Simd::call`] for the methods to become single instructions.

/// `2^x` on [-1/2, 1/2], highest power first: minimax in relative error with the constant held
/// at 1 (Lawson's iteration), so that the linear term is not the logarithm of 2.
#[allow(clippy::approx_constant)]
const EXP2: [f32; 6] = [0.001_326_472_7, 0.009_671_513, 0.055_507_336, 0.240_222_42, 0.693_147, 1.0];

/// A vector unit.
pub(super) trait Simd: Copy + Send + Sync + 'static {
    type Vector: Copy;
    const LANES: usize;
    /// Vectors across the widest tile of a product.
    const MOST_COLUMNS: usize;

    /// Rows of the tallest tile that keeps its sums in registers, by its width in vectors.
    fn most_rows(columns: usize) -> usize;

    /// Runs `body`, which must be an inlined closure, compiled for this unit.
    fn call<R>(self, body: impl FnOnce() -> R) -> R;

    /// # Safety
    /// `LANES` elements may be read.
    unsafe fn load(self, source: *const f32) -> Self::Vector;
    /// # Safety
    /// `LANES` elements may be written.
    unsafe fn store(self, target: *mut f32, value: Self::Vector);
    fn splat(self, value: f32) -> Self::Vector;
    fn add(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    fn sub(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    fn mul(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// `a * b + c`, rounded once where the processor can.
    fn mul_add(self, a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector;
    /// The larger; `b` if either is NaN.
    fn max(self, a: Self::Vector, b: Self::Vector) -> Self::Vector;
    fn sum(self, value: Self::Vector) -> f32;
    /// Adds the low bits of `power`, an integer, to the exponents of `value`.
    fn scale_exponent(self, value: Self::Vector, power: Self::Vector) -> Self::Vector;
    /// Transposes `rows` of `LANES` elements, times `factor`; missing rows count as zeros.
    ///
    /// # Safety
    /// `rows` rows may be read from the source and `LANES` rows written to the target.
    unsafe fn transpose(self, source: Rows<*const f32>, rows: usize, factor: f32, target: Rows<*mut f32>);

    /// `2^x` for `x <= 126`, to 2e-7 relative; exactly zero for `x <= -127`; NaN for NaN.
    #[inline(always)]
    fn exp2(self, x: Self::Vector) -> Self::Vector {
        // Adding 1.5 * 2^23 leaves round(x) in the low bits of the sum.
        let rounding = self.splat(12_582_912.0);
        // At the limit the polynomial is exactly 1, whose exponent is 127: zero remains.
        let x = self.max(self.splat(-127.0), x);
        let shifted = self.add(x, rounding);
        let r = self.sub(x, self.sub(shifted, rounding));
        let mut p = self.splat(EXP2[0]);
        for coefficient in &EXP2[1..] {
            p = self.mul_add(p, r, self.splat(*coefficient));
        }
        self.scale_exponent(p, shifted)
    }
}

/// Rows in memory, `stride` elements apart.
#[derive(Clone, Copy)]
pub(super) struct Rows<P> {
    pub pointer: P,
    pub stride: usize,
}

impl<P> Rows<P> {
    pub fn new(pointer: P, stride: usize) -> Self {
        Self { pointer, stride }
    }
}

impl Rows<*const f32> {
    /// # Safety
    /// The row lies within the memory.
    #[inline(always)]
    pub unsafe fn row(self, index: usize) -> *const f32 {
        unsafe { self.pointer.add(index * self.stride) }
    }

    /// # Safety
    /// The place lies within the memory.
    #[inline(always)]
    pub unsafe fn at(self, row: usize, column: usize) -> Self {
        unsafe { Self::new(self.pointer.add(row * self.stride + column), self.stride) }
    }
}

impl Rows<*mut f32> {
    /// # Safety
    /// The row lies within the memory.
    #[inline(always)]
    pub unsafe fn row(self, index: usize) -> *mut f32 {
        unsafe { self.pointer.add(index * self.stride) }
    }

    /// # Safety
    /// The place lies within the memory.
    #[inline(always)]
    pub unsafe fn at(self, row: usize, column: usize) -> Self {
        unsafe { Self::new(self.pointer.add(row * self.stride + column), self.stride) }
    }

    #[inline(always)]
    pub fn read(self) -> Rows<*const f32> {
        Rows::new(self.pointer.cast_const(), self.stride)
    }
}

/// A piece of work for any vector unit.
pub(super) trait Work {
    fn run<S: Simd>(self, simd: S);
}

/// A vector unit that this machine has.
#[derive(Clone, Copy)]
pub(super) enum Unit {
    #[cfg(target_arch = "x86_64")]
    Avx512(x86::Avx512),
    #[cfg(target_arch = "x86_64")]
    Avx2(x86::Avx2),
    Plain,
}

impl Unit {
    /// All of this machine, the widest first.
    pub fn present() -> impl Iterator<Item = Self> {
        #[cfg(target_arch = "x86_64")]
        let vectors = [x86::Avx512::detect().map(Self::Avx512), x86::Avx2::detect().map(Self::Avx2)];
        #[cfg(not(target_arch = "x86_64"))]
        let vectors: [Option<Self>; 0] = [];
        vectors.into_iter().flatten().chain([Self::Plain])
    }
}

/// Runs `work` on a vector unit.
pub(super) fn dispatch(unit: Unit, work: impl Work) {
    match unit {
        #[cfg(target_arch = "x86_64")]
        Unit::Avx512(simd) => work.run(simd),
        #[cfg(target_arch = "x86_64")]
        Unit::Avx2(simd) => work.run(simd),
        Unit::Plain => work.run(portable::Plain),
    }
}

pub(super) mod portable;
#[cfg(target_arch = "x86_64")]
pub(super) mod x86;

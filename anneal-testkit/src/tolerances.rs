//! The one table of tolerances, each with its reason.

/// How far a tensor may be from its reference; the figure is [`crate::relative_error`]'s.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tolerance {
    /// The same bits: orders of draws, copies, resumed runs.
    Exact,
    /// Double-precision tables from the same formula: a handful of roundings of 1.1e-16, and
    /// cumulative products of 1000 factors that may be associated differently.
    Table,
    /// A model's output or a loss in f32 against another implementation's f32: the project's
    /// promise. Both sides round at 6e-8 per operation, and sums of a few thousand terms in
    /// another order differ by some 1e-6.
    Forward,
    /// A parameter's or input's gradient in f32 against another implementation's: the project's
    /// promise. Ten times the forward, because a gradient sums over batch and tokens terms
    /// that cancel.
    Gradient,
    /// Tensors after several dependent f32 evaluations (a sampler's trajectory, a few optimizer
    /// steps): each step multiplies what the last one rounded.
    Trajectory,
    /// An analytic derivative against a central difference taken in f64: what remains is the
    /// truncation of the difference and the f32 rounding of the derivative itself.
    FiniteDifference,
    /// An f32 derivative against a central difference of an f32 value: with a step of 1e-2 the
    /// rounding of the two values alone is about 1e-5 of their size over the step.
    FiniteDifferenceSingle,
    /// An f32 op's value against its formula in f64: a few roundings of 6e-8, and sums of up to some
    /// hundred terms.
    OpValue,
    /// An f32 op's gradient against central differences of the formula in f64.
    OpGradient,
    /// A value computed in bf16 against the same in f32: 8 bits of mantissa, a few roundings.
    Bf16,
    /// A value computed in f16 against the same in f32: 11 bits of mantissa, a few roundings.
    F16,
}

impl Tolerance {
    /// The largest relative error that passes.
    pub fn limit(self) -> f64 {
        match self {
            Self::Exact => 0.0,
            Self::Table => 1e-12,
            Self::Forward => 1e-5,
            Self::Gradient => 1e-4,
            Self::Trajectory => 1e-5,
            Self::FiniteDifference => 1e-5,
            Self::FiniteDifferenceSingle => 5e-3,
            Self::OpValue => 3e-6,
            Self::OpGradient => 2e-5,
            Self::Bf16 => 2e-2,
            Self::F16 => 3e-3,
        }
    }
}

//! The functions of one variable and their derivatives, all in one table.

use anneal_device::cpu::math;

use super::gelu;

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Function {
    /// `factor * x + offset`
    Affine {
        factor: f32,
        offset: f32,
    },
    Clamp {
        low: f32,
        high: f32,
    },
    Exp,
    GeluExact,
    GeluTanh,
    Log,
    Sigmoid,
    Silu,
    Sqrt,
    Square,
    Tanh,
}

/// What a derivative is written in, and so what is saved for backward.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Of {
    Nothing,
    Input,
    Output,
}

/// Something to do with a function: `value` is `y` of `x`, `derivative` is `dy/dx` of what `of` says.
pub(super) trait Visitor {
    type Result;
    fn visit(
        self,
        value: impl Fn(f32) -> f32 + Sync + Copy,
        of: Of,
        derivative: impl Fn(f32) -> f32 + Sync + Copy,
    ) -> Self::Result;
}

impl Function {
    pub(super) fn visit<V: Visitor>(self, visitor: V) -> V::Result {
        match self {
            Self::Affine { factor, offset } => {
                visitor.visit(move |x| x * factor + offset, Of::Nothing, move |_| factor)
            }
            Self::Clamp { low, high } => visitor.visit(
                move |x| {
                    if x < low {
                        low
                    } else if x > high {
                        high
                    } else {
                        x
                    }
                },
                Of::Input,
                move |x| if x < low || x > high { 0.0 } else { 1.0 },
            ),
            Self::Exp => visitor.visit(math::exp, Of::Output, |y| y),
            Self::GeluExact => visitor.visit(gelu::exact, Of::Input, gelu::exact_derivative),
            Self::GeluTanh => visitor.visit(math::gelu_tanh, Of::Input, math::gelu_tanh_derivative),
            Self::Log => visitor.visit(f32::ln, Of::Input, |x| 1.0 / x),
            Self::Sigmoid => visitor.visit(math::sigmoid, Of::Output, |y| y * (1.0 - y)),
            Self::Silu => visitor.visit(math::silu, Of::Input, math::silu_derivative),
            Self::Sqrt => visitor.visit(f32::sqrt, Of::Output, |y| 0.5 / y),
            Self::Square => visitor.visit(|x| x * x, Of::Input, |x| 2.0 * x),
            Self::Tanh => visitor.visit(math::tanh, Of::Output, |y| 1.0 - y * y),
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Affine { .. } => "scale or add_scalar",
            Self::Clamp { .. } => "clamp",
            Self::Exp => "exp",
            Self::GeluExact | Self::GeluTanh => "gelu",
            Self::Log => "log",
            Self::Sigmoid => "sigmoid",
            Self::Silu => "silu",
            Self::Sqrt => "sqrt",
            Self::Square => "square",
            Self::Tanh => "tanh",
        }
    }

    /// What backward needs.
    pub(super) fn saves(self) -> Of {
        struct Saves;
        impl Visitor for Saves {
            type Result = Of;
            fn visit(
                self,
                _: impl Fn(f32) -> f32 + Sync + Copy,
                of: Of,
                _: impl Fn(f32) -> f32 + Sync + Copy,
            ) -> Of {
                of
            }
        }
        self.visit(Saves)
    }
}

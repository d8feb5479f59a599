//! The functions of two variables and their derivatives, all in one table.

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Function {
    Add,
    Div,
    Mul,
    Sub,
}

/// Something to do with a function: `y` of `(a, b)`, and its derivatives with respect to both.
pub(super) trait Visitor {
    type Result;
    fn visit(
        self,
        value: impl Fn(f32, f32) -> f32 + Sync + Copy,
        left: impl Fn(f32, f32) -> f32 + Sync + Copy,
        right: impl Fn(f32, f32) -> f32 + Sync + Copy,
    ) -> Self::Result;
}

impl Function {
    pub(super) fn visit<V: Visitor>(self, visitor: V) -> V::Result {
        match self {
            Self::Add => visitor.visit(|a, b| a + b, |_, _| 1.0, |_, _| 1.0),
            Self::Div => visitor.visit(|a, b| a / b, |_, b| 1.0 / b, |a, b| -a / (b * b)),
            Self::Mul => visitor.visit(|a, b| a * b, |_, b| b, |a, _| a),
            Self::Sub => visitor.visit(|a, b| a - b, |_, _| 1.0, |_, _| -1.0),
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Add => "add",
            Self::Div => "div",
            Self::Mul => "mul",
            Self::Sub => "sub",
        }
    }

    /// Whether the derivatives depend on the operands, which must then be saved.
    pub(super) fn saves(self) -> bool {
        matches!(self, Self::Div | Self::Mul)
    }

    /// Whether the derivative with respect to this operand is one everywhere.
    pub(super) fn passes_through(self, operand: usize) -> bool {
        self == Self::Add || (self == Self::Sub && operand == 0)
    }
}

use anneal_device::ThreadPool;

use super::table::{Function, Of, Visitor};
use crate::Tensor;
use crate::ops::elementwise::cpu::map;

pub(super) fn forward(pool: &ThreadPool, function: Function, x: &Tensor, y: &Tensor) {
    function.visit(Forward { pool, x, y });
}

/// `dx = g * derivative(saved)`; `dx` may be the memory of the gradient.
pub(super) fn backward(
    pool: &ThreadPool,
    function: Function,
    saved: Option<&Tensor>,
    gradient: &Tensor,
    dx: &Tensor,
) {
    function.visit(Backward { pool, saved, gradient, dx });
}

struct Forward<'a> {
    pool: &'a ThreadPool,
    x: &'a Tensor,
    y: &'a Tensor,
}

impl Visitor for Forward<'_> {
    type Result = ();
    fn visit(self, value: impl Fn(f32) -> f32 + Sync + Copy, _: Of, _: impl Fn(f32) -> f32 + Sync + Copy) {
        map(
            self.pool,
            [self.x],
            self.y,
            #[inline(always)]
            move |[x]| value(x),
        );
    }
}

struct Backward<'a> {
    pool: &'a ThreadPool,
    saved: Option<&'a Tensor>,
    gradient: &'a Tensor,
    dx: &'a Tensor,
}

impl Visitor for Backward<'_> {
    type Result = ();
    fn visit(
        self,
        _: impl Fn(f32) -> f32 + Sync + Copy,
        _: Of,
        derivative: impl Fn(f32) -> f32 + Sync + Copy,
    ) {
        match self.saved {
            Some(saved) => map(
                self.pool,
                [self.gradient, saved],
                self.dx,
                #[inline(always)]
                move |[g, v]| g * derivative(v),
            ),
            None => map(
                self.pool,
                [self.gradient],
                self.dx,
                #[inline(always)]
                move |[g]| g * derivative(0.0),
            ),
        }
    }
}

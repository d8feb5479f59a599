use anneal_device::ThreadPool;

use super::table::{Function, Visitor};
use crate::Tensor;
use crate::ops::elementwise::cpu::map;

pub(super) fn forward(pool: &ThreadPool, function: Function, operands: [&Tensor; 2], y: &Tensor) {
    function.visit(Forward { pool, operands, y });
}

/// `out = g * derivative` with respect to one operand, in the sizes of the gradient.
pub(super) fn backward(
    pool: &ThreadPool,
    function: Function,
    operand: usize,
    gradient: &Tensor,
    saved: Option<[&Tensor; 2]>,
    out: &Tensor,
) {
    function.visit(Backward { pool, operand, gradient, saved, out });
}

struct Forward<'a> {
    pool: &'a ThreadPool,
    operands: [&'a Tensor; 2],
    y: &'a Tensor,
}

impl Visitor for Forward<'_> {
    type Result = ();
    fn visit(
        self,
        value: impl Fn(f32, f32) -> f32 + Sync + Copy,
        _: impl Fn(f32, f32) -> f32 + Sync + Copy,
        _: impl Fn(f32, f32) -> f32 + Sync + Copy,
    ) {
        map(
            self.pool,
            self.operands,
            self.y,
            #[inline(always)]
            move |[a, b]| value(a, b),
        );
    }
}

struct Backward<'a> {
    pool: &'a ThreadPool,
    operand: usize,
    gradient: &'a Tensor,
    saved: Option<[&'a Tensor; 2]>,
    out: &'a Tensor,
}

impl Backward<'_> {
    fn run(self, derivative: impl Fn(f32, f32) -> f32 + Sync + Copy) {
        match self.saved {
            Some([a, b]) => {
                let inputs = [self.gradient, a, b];
                map(
                    self.pool,
                    inputs,
                    self.out,
                    #[inline(always)]
                    move |[g, a, b]| g * derivative(a, b),
                );
            }
            None => map(
                self.pool,
                [self.gradient],
                self.out,
                #[inline(always)]
                move |[g]| g * derivative(0.0, 0.0),
            ),
        }
    }
}

impl Visitor for Backward<'_> {
    type Result = ();
    fn visit(
        self,
        _: impl Fn(f32, f32) -> f32 + Sync + Copy,
        left: impl Fn(f32, f32) -> f32 + Sync + Copy,
        right: impl Fn(f32, f32) -> f32 + Sync + Copy,
    ) {
        if self.operand == 0 { self.run(left) } else { self.run(right) }
    }
}

//! The dynamic loss scale of fp16 training (Micikevicius et al., arXiv 1710.03740, section 3.2).
//!
//! The loss is multiplied by the scale before backward, so that small gradients do not vanish in
//! fp16, and the optimizer divides it out again. A gradient that is not finite halves the scale; after
//! [`GOOD_STEPS`] finite ones in a row it doubles. It is a power of two, so scaling rounds nothing.
//! `kernel.cu` has the same rule.

/// Finite steps in a row after which the scale doubles.
pub(super) const GOOD_STEPS: u32 = 2000;
/// Below the first number nothing is gained by halving; above the second even a gradient of 1e-9 is
/// far from vanishing.
pub(super) const RANGE: [f32; 2] = [1.0, 16_777_216.0];
const START: f32 = 65_536.0;

/// What the loss is multiplied by, and how long that has gone well.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LossScale {
    pub scale: f32,
    /// Finite steps since the scale last changed.
    pub good_steps: u32,
}

impl LossScale {
    /// Where training in fp16 begins.
    pub const START: Self = Self { scale: START, good_steps: 0 };
    /// No scaling, as in all other dtypes.
    pub const NONE: Self = Self { scale: 1.0, good_steps: 0 };

    /// The scale of the next step.
    pub fn after(self, finite: bool) -> Self {
        let [least, most] = RANGE;
        match (finite, self.good_steps + 1) {
            (false, _) => Self { scale: (self.scale / 2.0).max(least), good_steps: 0 },
            (true, GOOD_STEPS) => Self { scale: (self.scale * 2.0).min(most), good_steps: 0 },
            (true, good_steps) => Self { good_steps, ..self },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scale_halves_on_overflow_and_doubles_after_a_good_run() {
        let mut scale = LossScale::START;
        for _ in 0..GOOD_STEPS - 1 {
            scale = scale.after(true);
        }
        assert_eq!(scale, LossScale { scale: 65_536.0, good_steps: 1999 });
        assert_eq!(scale.after(false), LossScale { scale: 32_768.0, good_steps: 0 });
        assert_eq!(scale.after(true), LossScale { scale: 131_072.0, good_steps: 0 });
    }

    #[test]
    fn the_scale_stays_within_its_range() {
        let mut scale = LossScale::START;
        for _ in 0..40 {
            scale = scale.after(false);
        }
        assert_eq!(scale, LossScale::NONE);
        let high = LossScale { scale: RANGE[1], good_steps: GOOD_STEPS - 1 };
        assert_eq!(high.after(true), LossScale { scale: RANGE[1], good_steps: 0 });
    }
}

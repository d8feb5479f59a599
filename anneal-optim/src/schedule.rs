//! Learning rates as a function of the step.

use std::f64::consts::PI;

/// What follows the warm-up.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Shape {
    Constant,
    /// Half a cosine from the base rate to `minimum` at the last of `steps` (Loshchilov and Hutter,
    /// arXiv 1608.03983, eq. 5, one period).
    Cosine {
        steps: u64,
        minimum: f64,
    },
}

/// A learning-rate schedule.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LearningRate {
    pub base: f64,
    /// Steps over which the rate rises linearly; the first step has `base / warmup`.
    pub warmup: u64,
    pub shape: Shape,
}

impl LearningRate {
    /// The rate of a step, counted from 0.
    pub fn at(&self, step: u64) -> f64 {
        if step < self.warmup {
            return self.base * (step + 1) as f64 / self.warmup as f64;
        }
        match self.shape {
            Shape::Constant => self.base,
            Shape::Cosine { steps, minimum } => {
                let span = steps.saturating_sub(1).saturating_sub(self.warmup).max(1) as f64;
                let done = ((step - self.warmup) as f64 / span).min(1.0);
                minimum + (self.base - minimum) * 0.5 * (1.0 + (PI * done).cos())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_rises_stays_or_falls_to_its_minimum() {
        let constant = LearningRate { base: 2.0, warmup: 4, shape: Shape::Constant };
        let rates: Vec<f64> = [0, 3, 4, 1000].iter().map(|step| constant.at(*step)).collect();
        assert_eq!(rates, [0.5, 2.0, 2.0, 2.0]);
        let cosine = LearningRate { shape: Shape::Cosine { steps: 105, minimum: 0.2 }, ..constant };
        assert_eq!((cosine.at(4), cosine.at(104), cosine.at(500)), (2.0, 0.2, 0.2));
        assert!((cosine.at(54) - 1.1).abs() < 1e-12);
    }
}

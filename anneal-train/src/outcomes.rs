//! Steps whose figures are still on their way from the device.
//!
//! Contract: outcomes come in the order of their steps. Where the device computes at once (the CPU)
//! a step's outcome is there when the step returns; a GPU's come some steps later, so that it never waits for
//! the host.

use std::collections::VecDeque;
use std::time::Instant;

use anneal_optim::{DeviceReport, PendingReport, StepReport};
use anneal_tensor::{Pending, Tensor};

use crate::error::{Result, TrainError};

/// What a step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepOutcome {
    /// The step's number, from 1.
    pub step: u64,
    /// Mean loss of the batch before the step.
    pub loss: f64,
    pub gradient_norm: f64,
    pub learning_rate: f64,
    /// What the loss was multiplied by before backward.
    pub loss_scale: f64,
    /// The gradient was not finite and nothing changed.
    pub skipped: bool,
    /// Steps skipped up to this one.
    pub skipped_so_far: u64,
    /// Since the step before was done, or since this one was begun if that is later.
    pub seconds: f64,
}

/// What the host knows of a step when it is queued.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Started {
    pub step: u64,
    pub learning_rate: f64,
    pub begun: Instant,
}

/// The figures that a step leaves on the device.
pub(crate) struct DeviceFigures {
    /// Of each pass, the losses of its rows, f32 [rows].
    pub losses: Vec<Tensor>,
    pub report: DeviceReport,
}

/// Figures on their way.
pub(crate) trait Figures {
    /// Whether [`Self::wait`] does not wait.
    fn ready(&self) -> Result<bool>;
    /// The batch's mean loss, and the optimizer's report.
    fn wait(self) -> Result<(f64, StepReport)>;
}

pub(crate) struct PendingFigures {
    losses: Vec<Pending<f32>>,
    report: PendingReport,
}

impl DeviceFigures {
    pub fn read_later(&self) -> Result<PendingFigures> {
        let losses = self.losses.iter().map(Tensor::read_later).collect::<Result<_, _>>()?;
        Ok(PendingFigures { losses, report: self.report.read_later()? })
    }
}

impl Figures for PendingFigures {
    fn ready(&self) -> Result<bool> {
        // It is asked for last, so everything else is there before it.
        Ok(self.report.ready()?)
    }

    fn wait(self) -> Result<(f64, StepReport)> {
        // First what comes last, so that a host that must wait does it once.
        let report = self.report.wait()?;
        let passes = self.losses.into_iter().map(Pending::wait).collect::<Result<Vec<_>, _>>()?;
        let batch: usize = passes.iter().map(Vec::len).sum();
        let sum = |values: &Vec<f32>| values.iter().copied().map(f64::from).sum::<f64>();
        let loss = passes.iter().fold(0.0, |loss, values| loss + sum(values) / batch as f64);
        Ok((loss, report))
    }
}

/// Steps skipped because a gradient was not finite.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Skipped {
    pub in_all: u64,
    /// Since the last good one.
    pub in_a_row: u64,
}

/// The queue of steps under way.
pub(crate) struct Outcomes<F> {
    queue: VecDeque<(Started, F)>,
    /// When the last outcome came.
    last: Option<Instant>,
    pub skipped: Skipped,
    /// Skipped steps in a row that are an error.
    limit: usize,
}

impl<F: Figures> Outcomes<F> {
    pub fn new(limit: usize) -> Self {
        Self { queue: VecDeque::new(), last: None, skipped: Skipped::default(), limit }
    }

    pub fn push(&mut self, started: Started, figures: F) {
        self.queue.push_back((started, figures));
    }

    /// Whether no step is under way.
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Adds the outcomes that have come; waits for the oldest while more than `most` steps are under way.
    ///
    /// # Errors
    /// If the limit of skipped steps is reached; what went wrong on the device. The outcomes before the error,
    /// and that of the step that reached the limit, are added all the same.
    pub fn arrived(&mut self, most: usize, outcomes: &mut Vec<StepOutcome>) -> Result<()> {
        while let Some((_, figures)) = self.queue.front() {
            if self.queue.len() <= most && !figures.ready()? {
                break;
            }
            let (started, figures) = self.queue.pop_front().expect("there is a front");
            let (loss, report) = figures.wait()?;
            outcomes.push(self.outcome(started, loss, report));
            if self.skipped.in_a_row >= self.limit as u64 {
                return Err(TrainError::Diverged { in_a_row: self.skipped.in_a_row, step: started.step });
            }
        }
        Ok(())
    }

    fn outcome(&mut self, started: Started, loss: f64, report: StepReport) -> StepOutcome {
        let Started { step, learning_rate, begun } = started;
        let now = Instant::now();
        let since = self.last.replace(now).map_or(begun, |last| last.max(begun));
        self.skipped.in_a_row = if report.skipped { self.skipped.in_a_row + 1 } else { 0 };
        self.skipped.in_all += u64::from(report.skipped);
        StepOutcome {
            step,
            loss,
            gradient_norm: report.gradient_norm,
            learning_rate,
            loss_scale: report.loss_scale,
            skipped: report.skipped,
            skipped_so_far: self.skipped.in_all,
            seconds: (now - since).as_secs_f64(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::rc::Rc;

    use super::*;

    /// Figures that are there once the device has done `done` steps; waiting makes it do them.
    struct Simulated {
        step: u64,
        done: Rc<Cell<u64>>,
        finite: bool,
    }

    impl Figures for Simulated {
        fn ready(&self) -> Result<bool> {
            Ok(self.done.get() >= self.step)
        }

        fn wait(self) -> Result<(f64, StepReport)> {
            self.done.set(self.done.get().max(self.step));
            let norm = if self.finite { 1.0 } else { f64::NAN };
            Ok((self.step as f64, StepReport { gradient_norm: norm, skipped: !self.finite, loss_scale: 1.0 }))
        }
    }

    struct Simulation {
        done: Rc<Cell<u64>>,
        outcomes: Outcomes<Simulated>,
    }

    impl Simulation {
        fn new(limit: usize) -> Self {
            Self { done: Rc::default(), outcomes: Outcomes::new(limit) }
        }

        fn push(&mut self, step: u64, finite: bool) {
            let started = Started { step, learning_rate: 0.1, begun: Instant::now() };
            self.outcomes.push(started, Simulated { step, done: self.done.clone(), finite });
        }

        fn arrived(&mut self, most: usize) -> Vec<u64> {
            let mut outcomes = Vec::new();
            self.outcomes.arrived(most, &mut outcomes).unwrap();
            outcomes.iter().map(|outcome| outcome.step).collect()
        }
    }

    #[test]
    fn outcomes_come_in_order_and_only_a_few_steps_are_under_way() {
        let mut simulation = Simulation::new(5);
        for step in 1..=2 {
            simulation.push(step, true);
            assert!(simulation.arrived(2).is_empty());
        }
        simulation.push(3, true);
        assert_eq!(simulation.arrived(2), [1], "the third waits for the first");
        simulation.done.set(3);
        simulation.push(4, true);
        assert_eq!(simulation.arrived(2), [2, 3], "what is there comes at once");
        assert_eq!(simulation.arrived(0), [4]);
        assert!(simulation.outcomes.is_empty());
    }

    #[test]
    fn skipped_steps_are_counted_when_their_outcomes_come() {
        let mut simulation = Simulation::new(3);
        for (step, finite) in [(1, false), (2, false), (3, true), (4, false)] {
            simulation.push(step, finite);
        }
        let mut outcomes = Vec::new();
        simulation.outcomes.arrived(0, &mut outcomes).unwrap();
        let skipped: Vec<u64> = outcomes.iter().map(|outcome| outcome.skipped_so_far).collect();
        assert_eq!(skipped, [1, 2, 2, 3]);
        assert_eq!(simulation.outcomes.skipped, Skipped { in_all: 3, in_a_row: 1 });
    }

    /// A GPU's steps come several at a time: those before the one that ends the run must not get lost.
    #[test]
    fn what_came_before_an_error_is_reported() {
        let mut simulation = Simulation::new(2);
        for (step, finite) in [(1, true), (2, false), (3, false), (4, false)] {
            simulation.push(step, finite);
        }
        let mut outcomes = Vec::new();
        let error = simulation.outcomes.arrived(0, &mut outcomes).unwrap_err();
        assert!(matches!(error, TrainError::Diverged { in_a_row: 2, step: 3 }), "{error}");
        let reported: Vec<(u64, bool)> =
            outcomes.iter().map(|outcome| (outcome.step, outcome.skipped)).collect();
        assert_eq!(reported, [(1, false), (2, true), (3, true)]);
    }
}

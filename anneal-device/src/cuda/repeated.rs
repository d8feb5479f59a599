//! Work that is repeated with other inputs: a training step, a model call of a sampler.

use std::fmt::Display;
use std::sync::Arc;

use super::{CudaDevice, Graph};
use crate::DeviceError;

/// Runs work as it is the first time (whatever is measured or made once happens there), captured the
/// second, and replayed from then on.
///
/// Where capturing or a replay fails, nothing has run: the work then runs as it is, and is captured again
/// the next time. After [`MOST_FAILURES`] failures it is no longer tried.
#[derive(Default)]
pub struct RepeatedWork {
    ran: bool,
    graph: Option<Graph>,
    failures: usize,
    problem: Option<String>,
}

const MOST_FAILURES: usize = 3;

impl RepeatedWork {
    /// Runs `work`, which must be able to run again after an error; inside it hold the rules of captured
    /// steps. On replays its value lies where the captured one's lay, until the next.
    ///
    /// # Errors
    /// Those of the work.
    pub fn run<T, E: From<DeviceError> + Display>(
        &mut self,
        device: &Arc<CudaDevice>,
        mut work: impl FnMut() -> Result<T, E>,
    ) -> Result<T, E> {
        if !self.ran || self.failures >= MOST_FAILURES {
            let value = work()?;
            self.ran = true;
            return Ok(value);
        }
        let result = match &self.graph {
            Some(graph) => device.replay(graph, &mut work),
            None => device.capture(&mut work).map(|(value, graph)| {
                self.graph = Some(graph);
                value
            }),
        };
        result.or_else(|error| {
            self.graph = None;
            self.failures += 1;
            if self.failures == MOST_FAILURES {
                self.problem = Some(error.to_string());
            }
            // An error of the work itself comes again here.
            work()
        })
    }

    /// Gives the captured work's memory back; the next run captures anew.
    pub fn release(&mut self) {
        self.graph = None;
    }

    /// Why it is no longer captured; told once.
    pub fn take_problem(&mut self) -> Option<String> {
        self.problem.take()
    }
}

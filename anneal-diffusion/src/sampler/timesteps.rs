//! Which timesteps a sampler visits.
//!
//! Contract: lists run from noise to data. The three spacings are those of Table 2 in
//! "Common diffusion noise schedules and sample steps are flawed" (arXiv 2305.08891), with the
//! rounding of the diffusers library, so that its numbers are reproduced.

use std::str::FromStr;

use super::Method;
use crate::error::{DiffusionError, Result};
use crate::schedule::{linspace, respaced_steps};

/// How a number of steps is spread over the chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spacing {
    /// Whole strides from timestep 0 upwards; the noisiest steps may go unvisited.
    Leading,
    /// Whole strides from the last timestep downwards.
    Trailing,
    /// Evenly from the last timestep to 0.
    Linspace,
}

impl FromStr for Spacing {
    type Err = DiffusionError;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "leading" => Ok(Self::Leading),
            "trailing" => Ok(Self::Trailing),
            "linspace" => Ok(Self::Linspace),
            _ => Err(DiffusionError::UnknownName {
                name: "timestep spacing",
                given: text.into(),
                known: "leading, trailing, linspace".into(),
            }),
        }
    }
}

/// The steps that a user asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Steps {
    /// So many, in the way that is usual for the method.
    Count(usize),
    Spaced(usize, Spacing),
    /// [`respaced_steps`]' notation: `"250"`, `"10,15,20"`, `"ddim50"`.
    Respaced(String),
}

/// What the timesteps are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Grid {
    /// Whole timesteps, the last of which is followed by the data.
    Points,
    /// Points between whole timesteps are allowed.
    Fractional,
    /// Whole timesteps that cut the chain in as many intervals; its clean end is not visited.
    Intervals,
}

/// The timesteps, noisiest first.
pub(super) fn timesteps(method: &Method, chain: usize, steps: &Steps) -> Result<Vec<f64>> {
    let error = |reason: String| DiffusionError::Sampler { method: method.name(), reason };
    let (count, spacing) = match steps {
        Steps::Respaced(text) => return Ok(descending(respaced_steps(chain, text)?)),
        Steps::Count(count) => match method.usual_spacing() {
            None => return Ok(descending(respaced_steps(chain, &count.to_string())?)),
            Some(spacing) => (*count, spacing),
        },
        Steps::Spaced(count, spacing) => (*count, *spacing),
    };
    if count == 0 || count > chain {
        return Err(error(format!("{count} steps were asked of a chain of {chain}; ask for 1 to {chain}")));
    }
    let timesteps = spaced(chain, count, spacing, method.grid());
    if timesteps.windows(2).any(|pair| pair[0] <= pair[1]) {
        return Err(error(format!("{count} steps are too many for this spacing of a chain of {chain}")));
    }
    Ok(timesteps)
}

fn descending(steps: Vec<usize>) -> Vec<f64> {
    steps.into_iter().rev().map(|step| step as f64).collect()
}

fn spaced(chain: usize, count: usize, spacing: Spacing, grid: Grid) -> Vec<f64> {
    let extra = usize::from(grid == Grid::Intervals);
    let last = (chain - 1) as f64;
    match spacing {
        Spacing::Leading => {
            let stride = chain / (count + extra);
            (extra..count + extra).rev().map(|index| (index * stride) as f64).collect()
        }
        Spacing::Trailing => {
            let stride = chain as f64 / count as f64;
            (0..count).map(|index| (chain as f64 - index as f64 * stride).round_ties_even() - 1.0).collect()
        }
        // A single step starts at the noise; evenly from 0 it would be the data.
        Spacing::Linspace if count + extra == 1 => vec![last],
        Spacing::Linspace => {
            let points = linspace(0.0, last, count + extra).into_iter().skip(extra).rev();
            points
                .map(|point| if grid == Grid::Fractional { point } else { point.round_ties_even() })
                .collect()
        }
    }
}

//! Which algorithm runs a problem: remembered, read from disk, measured, or proposed by the library.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use super::choices::{fastest, keep, parse, path};
use super::library::{Algorithm, Description};
use super::problem::Problem;
use super::{CudaDevice, Engine, Operand, Product, WORKSPACE, version};
use crate::{Buffer, DeviceError, Purpose};

/// Algorithms that the library is asked for.
const CANDIDATES: usize = 32;
/// Milliseconds for the first look at the candidates of a problem.
const FIRST_LOOK: f32 = 100.0;
/// Candidates that are measured again after the first look.
const FINALISTS: usize = 4;

/// By problem, and whether it was met in the deterministic mode; `None` where the library refuses.
#[derive(Default)]
pub(super) struct Plans(HashMap<(Problem, bool), Option<Plan>>);

pub(super) struct Plan {
    description: Description,
    algorithm: Algorithm,
    /// Whether the choice is final; else it is measured when that becomes possible.
    settled: bool,
}

impl Plans {
    /// The plan of a product, which is measured here if it should be; `None` if the library refuses it.
    ///
    /// # Safety
    /// As [`CudaDevice::matmul`].
    pub unsafe fn get(
        &mut self,
        device: &CudaDevice,
        engine: &Engine,
        problem: &Problem,
        product: &Product,
    ) -> Result<Option<&Plan>, DeviceError> {
        let deterministic = device.is_deterministic();
        let plan = match self.0.entry((*problem, deterministic)) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                entry.insert(Plan::first(device, engine, problem, product, deterministic)?)
            }
        };
        let Some(plan) = plan else { return Ok(None) };
        plan.description.point_at(product)?;
        if !plan.settled && !device.in_captured_step() {
            // SAFETY: the caller's promise.
            unsafe { plan.measure(device, engine, problem, product)? };
        }
        Ok(Some(plan))
    }
}

impl Plan {
    /// What is known without measuring: the choice on disk, else the library's proposal.
    fn first(
        device: &CudaDevice,
        engine: &Engine,
        problem: &Problem,
        product: &Product,
        deterministic: bool,
    ) -> Result<Option<Self>, DeviceError> {
        let description = Description::new(device.ordinal(), problem)?;
        description.point_at(product)?;
        if !deterministic
            && let Some(algorithm) = read(device, problem)
            && description.accepts(&engine.handle, &algorithm, WORKSPACE)
        {
            return Ok(Some(Self { description, algorithm, settled: true }));
        }
        let proposed = description.algorithms(&engine.handle, problem, WORKSPACE, 1)?;
        let proposed = proposed.first().copied();
        Ok(proposed.map(|algorithm| Self { description, algorithm, settled: deterministic }))
    }

    /// Takes the fastest of the candidates, run on noise: the operands of a first step may be zeros, on which a GPU needs
    /// so little power that other candidates win. Where memory lacks for that, they are run on the operands. C, which
    /// the product is about to overwrite, is written on the way; where it is added to, other memory stands in for it.
    /// A batch is run on its operands: they may be a good part of a model's weights, and noise like them would be
    /// the highest use of memory.
    ///
    /// # Safety
    /// As [`CudaDevice::matmul`].
    unsafe fn measure(
        &mut self,
        device: &CudaDevice,
        engine: &Engine,
        problem: &Problem,
        product: &Product,
    ) -> Result<(), DeviceError> {
        self.settled = true;
        let batch = product.batch;
        let last = (batch.count - 1) * batch.c;
        let bytes = (last + product.rows * product.c.leading) * product.c.element.size();
        let scratch = match product.accumulate.then(|| device.allocate(bytes, Purpose::Workspace)) {
            // Too little memory to measure in: the proposal stays.
            Some(Err(_)) => return Ok(()),
            other => other.transpose()?,
        };
        let c = scratch.as_ref().map_or(product.c.pointer, |scratch| scratch.as_ptr());
        let noise = |operand, rows, columns| match batch.count {
            1 => device.noise_like(operand, rows, columns),
            _ => Ok(None),
        };
        let a = noise(&product.a, product.rows, product.depth)?;
        let b = noise(&product.b, product.depth, product.columns)?;
        let standing_in = |operand: Operand, memory: &Option<Buffer>| {
            let pointer = memory.as_ref().map_or(operand.pointer, |memory| memory.as_ptr().cast_const());
            Operand { pointer, ..operand }
        };
        let product = &Product { a: standing_in(product.a, &a), b: standing_in(product.b, &b), ..*product };
        let candidates = self.description.algorithms(&engine.handle, problem, WORKSPACE, CANDIDATES)?;
        let workspace = (engine.workspace.as_ptr(), WORKSPACE);
        let description = &self.description;
        let mut run = |index: usize| {
            let algorithm = &candidates[index];
            // SAFETY: the caller's promise; the scratch memory is as large as C.
            unsafe { description.run(&engine.handle, algorithm, product, c, workspace, device.stream()) }
                .is_ok()
        };
        let Some(best) = quickest(device, candidates.len(), &mut run)? else { return Ok(()) };
        self.algorithm = candidates[best];
        if let Some(path) = path(device.properties(), version(), &problem.name()) {
            let accepted = |text: &str| {
                let taken = |other: &Algorithm| description.accepts(&engine.handle, other, WORKSPACE);
                algorithm_of(text).filter(taken)
            };
            self.algorithm = keep(&path, self.algorithm, &text_of(&self.algorithm), accepted);
        }
        Ok(())
    }

    /// Starts the product.
    ///
    /// # Safety
    /// As [`CudaDevice::matmul`]; the product is the one that the plan was asked for.
    pub unsafe fn run(
        &self,
        device: &CudaDevice,
        engine: &Engine,
        product: &Product,
    ) -> Result<(), DeviceError> {
        let workspace = (engine.workspace.as_ptr(), WORKSPACE);
        let (c, stream) = (product.c.pointer, device.stream());
        // SAFETY: the caller's promise.
        unsafe { self.description.run(&engine.handle, &self.algorithm, product, c, workspace, stream) }
    }
}

/// The quickest of `count` candidates: one run of each as far as the time goes, then several of the best.
fn quickest(
    device: &CudaDevice,
    count: usize,
    run: &mut dyn FnMut(usize) -> bool,
) -> Result<Option<usize>, DeviceError> {
    if count == 0 {
        return Ok(None);
    }
    let first = device.time_each(&[0], 1, run)?[0];
    let looked_at: Vec<usize> = (0..affordable(first, count)).collect();
    let times = device.time_each(&looked_at, 1, run)?;
    let mut order: Vec<(f32, usize)> =
        times.iter().zip(looked_at).filter_map(|(time, index)| Some(((*time)?, index))).collect();
    order.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    let finalists: Vec<usize> = order.iter().take(FINALISTS).map(|(_, index)| *index).collect();
    let times = device.time_as_in_a_step(&finalists, run)?;
    Ok(fastest(&times).map(|(place, _)| finalists[place]))
}

/// How many candidates are looked at, if each takes as long as the first and runs twice.
fn affordable(first: Option<f32>, count: usize) -> usize {
    let fit = first.map_or(count, |time| (FIRST_LOOK / (2.0 * time.max(1e-3))) as usize);
    fit.clamp(FINALISTS.min(count), count)
}

fn read(device: &CudaDevice, problem: &Problem) -> Option<Algorithm> {
    let text = std::fs::read_to_string(path(device.properties(), version(), &problem.name())?).ok()?;
    algorithm_of(&text)
}

fn text_of(algorithm: &Algorithm) -> String {
    let words: Vec<String> = algorithm.data.iter().map(|word| format!("{word:016x}")).collect();
    format!("algorithm {}\n", words.join(" "))
}

fn algorithm_of(text: &str) -> Option<Algorithm> {
    let words = parse(text, "algorithm", |word| u64::from_str_radix(word, 16).ok())?;
    Some(Algorithm { data: words.try_into().ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_algorithm_is_read_as_it_was_written_and_a_damaged_one_is_not() {
        let algorithm = Algorithm { data: [0, 1, u64::MAX, 3, 4, 5, 6, 0x0123_4567_89ab_cdef] };
        let text = text_of(&algorithm);
        assert_eq!(algorithm_of(&text), Some(algorithm));
        assert_eq!(algorithm_of(&text[..text.len() - 1]), None);
        assert_eq!(algorithm_of(&text.replace(" 0000000000000001", "")), None);
        assert_eq!(algorithm_of(&text.replace('f', "g")), None);
    }

    #[test]
    fn slow_problems_look_at_fewer_candidates() {
        assert_eq!(affordable(Some(0.5), 32), 32);
        assert_eq!(affordable(Some(7.0), 32), 7);
        assert_eq!(affordable(Some(1e4), 32), 4);
        assert_eq!(affordable(Some(1e4), 2), 2);
        assert_eq!(affordable(None, 32), 32);
    }
}

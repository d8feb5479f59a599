//! Which algorithm runs a problem: remembered, read from disk, measured, or proposed by the library.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use super::choices::{fastest, keep, parse, path};
use super::library::{Algorithm, Description};
use super::problem::Problem;
use super::{Batch, CudaDevice, Engine, Operand, Product, WORKSPACE, version};
use crate::{Buffer, DeviceError, Purpose};

/// Algorithms that the library is asked for.
const CANDIDATES: usize = 32;
/// Milliseconds for the first look at the candidates of a problem.
const FIRST_LOOK: f32 = 100.0;
/// Candidates that are measured again after the first look.
const FINALISTS: usize = 4;
/// Bytes of memory that stands in for C, unless a single product has more: beyond the caches of GPUs, so that C comes from
/// memory as in a step.
const STAND_IN: usize = 128 << 20;
/// The distances in elements between members that stand in are multiples of this many: those of any alignment then.
const WIDEST: usize = 16;

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
    /// the product is about to overwrite, is written on the way; where it is added to, other memory stands in for it, and
    /// of a batch only the first members are then measured ([`stand_in`]).
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
        let member = product.rows * product.c.leading;
        let element = product.c.element.size();
        let standing_in = product.accumulate.then(|| stand_in(problem.batch, member, element));
        let bytes = standing_in.map(|batch| ((batch.count - 1) * batch.c + member) * element);
        let scratch = match bytes.map(|bytes| device.allocate(bytes, Purpose::Workspace)) {
            // Too little memory to measure in: the proposal stays.
            Some(Err(_)) => return Ok(()),
            other => other.transpose()?,
        };
        let own = match standing_in.filter(|batch| *batch != problem.batch) {
            Some(batch) => {
                let own = Description::new(device.ordinal(), &Problem { batch, ..*problem })?;
                own.point_at(product)?;
                Some(own)
            }
            None => None,
        };
        let c = scratch.as_ref().map_or(product.c.pointer, |scratch| scratch.as_ptr());
        let noise = |operand, rows, columns| match problem.batch.count {
            1 => device.noise_like(operand, rows, columns),
            _ => Ok(None),
        };
        let a = noise(&product.a, product.rows, product.depth)?;
        let b = noise(&product.b, product.depth, product.columns)?;
        let with_noise = |operand: Operand, memory: &Option<Buffer>| {
            let pointer = memory.as_ref().map_or(operand.pointer, |memory| memory.as_ptr().cast_const());
            Operand { pointer, ..operand }
        };
        let product = &Product { a: with_noise(product.a, &a), b: with_noise(product.b, &b), ..*product };
        let candidates = self.description.algorithms(&engine.handle, problem, WORKSPACE, CANDIDATES)?;
        let workspace = (engine.workspace.as_ptr(), WORKSPACE);
        let description = &self.description;
        let measured = own.as_ref().unwrap_or(description);
        let mut run = |index: usize| {
            let algorithm = &candidates[index];
            // SAFETY: the caller's promise; the scratch memory is as large as C of what is measured.
            unsafe { measured.run(&engine.handle, algorithm, product, c, workspace, device.stream()) }.is_ok()
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

/// What is measured of a batch that adds to C, whose members cover so many elements of so many bytes: its first members, as
/// far as they fit [`STAND_IN`], close to each other. All of them can be a good part of a model's gradients, with the
/// distances of its layers between them: memory that the step itself may have no room for. And so few tell as much: the
/// members are of one shape, and where some are left out, the others cover more than half of [`STAND_IN`], in f32
/// some 500 tiles of 128 by 256 and thus several waves of any GPU.
fn stand_in(batch: Batch, member: usize, element: usize) -> Batch {
    let distance = member.next_multiple_of(WIDEST);
    match (STAND_IN / (distance * element)).clamp(1, batch.count) {
        1 => Batch::ONE,
        count => Batch { count, c: distance, ..batch },
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
    fn a_large_batch_that_is_added_to_is_measured_by_its_first_members() {
        let batch = |count, c| Batch { count, a: 1000, b: 0, c, bias: 0 };
        // The modulations of DiT-XL/2: 28 weights of [6912, 1152] in f32, side by side or a block's parameters apart.
        for distance in [6912 * 1152, 30_000_000] {
            assert_eq!(stand_in(batch(28, distance), 6912 * 1152, 4), batch(4, 6912 * 1152));
        }
        // Of DiT-S/2: 12 of [2304, 384], 42 MB.
        assert_eq!(stand_in(batch(12, 2304 * 384), 2304 * 384, 4), batch(12, 2304 * 384));
        // Rows of odd length: the next member begins where an aligned one may.
        assert_eq!(stand_in(batch(3, 40), 33, 4), batch(3, 48));
        // One that is larger than all memory that stands in, and a single product.
        assert_eq!(stand_in(batch(5, STAND_IN), STAND_IN, 4), Batch::ONE);
        assert_eq!(stand_in(Batch::ONE, 6912 * 1152, 4), Batch::ONE);
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

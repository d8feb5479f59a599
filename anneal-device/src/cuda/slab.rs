//! Device memory: one growing slab of addresses, cut best fit, with neighbours joined again.
//!
//! Contract: blocks are aligned to 512 bytes. All work of a device is ordered on one stream, so a
//! block that is given back may be handed out at once. The same requests from the same state get
//! the same addresses. The slab is a range of virtual addresses as large as the device; memory is
//! put behind it piece by piece, so that nothing ever moves and no gap is lost between segments.
//! With the environment variable `ANNEAL_SEPARATE_BUFFERS` every buffer is an allocation of the driver of exactly its
//! bytes instead, so that compute-sanitizer sees where each one ends; slow, and steps cannot be captured then.
//! While a step is captured, every block that is handed out or given back is noted; afterwards that memory is kept
//! from others for as long as the captured step lives ([`Slab::end_capture`]).

use std::collections::{BTreeMap, BTreeSet};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard};

use cudarc::driver::sys;

use super::driver::check;
use crate::DeviceError;
use crate::memory::{Buffer, MemoryStatistics, Owner, Purpose, limit_reached};

const ALIGNMENT: usize = 512;
/// The slab grows by at least this much.
const GROWTH: usize = 64 << 20;

/// A block as it was handed out: offset and size.
pub(crate) type Block = (usize, usize);

#[derive(Default)]
struct State {
    /// Bytes from the start of the slab that have memory behind them.
    mapped: usize,
    pieces: Vec<(sys::CUmemGenericAllocationHandle, usize)>,
    /// Free ranges by offset; no two touch.
    free: BTreeMap<usize, usize>,
    statistics: MemoryStatistics,
    noted: Option<Noted>,
    reservations: BTreeMap<u64, Reservation>,
    next_reservation: u64,
}

/// What happened since a capture began.
#[derive(Default)]
struct Noted {
    /// Every block handed out, in order.
    blocks: Vec<Block>,
    /// Those blocks, and blocks of before that were given back: what the captured work may use of free memory.
    touched: BTreeMap<usize, usize>,
}

/// What a captured step keeps from others.
#[derive(Default)]
struct Reservation {
    ranges: BTreeMap<usize, usize>,
    /// Blocks that were in use when the capture ended; they join the ranges when given back.
    live: BTreeSet<usize>,
}

impl State {
    /// Takes a block out of the free range that it lies in.
    fn hand_out(&mut self, offset: usize, size: usize, purpose: Purpose) {
        take_range(&mut self.free, offset, size);
        self.statistics.take(purpose, size);
        if let Some(noted) = &mut self.noted {
            noted.blocks.push((offset, size));
            insert_union(&mut noted.touched, offset, size);
        }
    }

    fn take_back(&mut self, offset: usize, size: usize, purpose: Purpose) {
        self.statistics.give(purpose, size);
        if let Some(noted) = &mut self.noted {
            insert_union(&mut noted.touched, offset, size);
        }
        let reserved = self.reservations.values_mut().find(|reservation| reservation.live.contains(&offset));
        match reserved {
            Some(reservation) => {
                reservation.live.remove(&offset);
                insert_joined(&mut reservation.ranges, offset, size);
            }
            None => insert_joined(&mut self.free, offset, size),
        }
    }

    /// The best place that the capture under way has not used.
    fn best_untouched(&self, size: usize) -> Option<usize> {
        let Some(noted) = &self.noted else { return best_fit(&self.free, size) };
        let (mut inside, mut outside) = (BTreeMap::new(), BTreeMap::new());
        for (&offset, &len) in &self.free {
            split_by(&noted.touched, offset, len, &mut inside, &mut outside);
        }
        best_fit(&outside, size)
    }

    /// Ends the noting: the blocks handed out, and all touched memory, which is no longer free.
    fn reserve_noted(&mut self) -> (Vec<Block>, Reservation) {
        let Noted { blocks, touched } = self.noted.take().unwrap_or_default();
        let mut reservation = Reservation::default();
        let mut free = BTreeMap::new();
        for (&offset, &len) in &self.free {
            split_by(&touched, offset, len, &mut reservation.ranges, &mut free);
        }
        for &(offset, size) in &blocks {
            let is_free =
                reservation.ranges.range(..=offset).next_back().is_some_and(|(o, l)| o + l >= offset + size);
            if !is_free {
                reservation.live.insert(offset);
            }
        }
        self.free = free;
        (blocks, reservation)
    }
}

/// The memory of one device.
pub(crate) struct Slab {
    ordinal: usize,
    context: sys::CUcontext,
    base: u64,
    /// Size of the range of addresses.
    capacity: usize,
    granularity: usize,
    /// On the memory behind the addresses.
    limit: Option<usize>,
    /// Every buffer on its own, for finding accesses out of bounds.
    separate: bool,
    state: Mutex<State>,
}
// SAFETY: handles and addresses are plain numbers to the driver, and the state is behind a lock.
unsafe impl Send for Slab {}
unsafe impl Sync for Slab {}

fn allocation_properties(ordinal: usize) -> sys::CUmemAllocationProp {
    // SAFETY: all zeros is the documented default of this plain structure.
    let mut properties: sys::CUmemAllocationProp = unsafe { std::mem::zeroed() };
    properties.type_ = sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
    properties.location.type_ = sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE;
    properties.location.id = ordinal as i32;
    properties
}

impl Slab {
    pub(crate) fn new(
        ordinal: usize,
        context: sys::CUcontext,
        total: usize,
        limit: Option<usize>,
    ) -> Result<Self, DeviceError> {
        let properties = allocation_properties(ordinal);
        let (mut granularity, mut base) = (0, 0);
        // SAFETY: the context is current.
        unsafe {
            let option = sys::CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_RECOMMENDED;
            let result = sys::cuMemGetAllocationGranularity(&mut granularity, &properties, option);
            check("cuMemGetAllocationGranularity", ordinal, result)?;
        }
        let capacity = total.next_multiple_of(granularity);
        // SAFETY: as above.
        unsafe {
            check(
                "cuMemAddressReserve",
                ordinal,
                sys::cuMemAddressReserve(&mut base, capacity, granularity, 0, 0),
            )?;
        }
        let separate = std::env::var_os("ANNEAL_SEPARATE_BUFFERS").is_some();
        Ok(Self { ordinal, context, base, capacity, granularity, limit, separate, state: Mutex::default() })
    }

    pub(crate) fn statistics(&self) -> MemoryStatistics {
        self.lock().statistics.clone()
    }

    pub(crate) fn reset_peak(&self) {
        self.lock().statistics.reset_peak();
    }

    pub(crate) fn allocate(self: &Arc<Self>, bytes: usize, purpose: Purpose) -> Result<Buffer, DeviceError> {
        if self.separate {
            return self.allocate_alone(bytes, purpose);
        }
        let size = bytes.max(1).next_multiple_of(ALIGNMENT);
        let mut state = self.lock();
        let offset = self.find(&mut state, size, purpose)?;
        state.hand_out(offset, size, purpose);
        drop(state);
        Ok(self.buffer(offset, size, bytes, purpose))
    }

    fn allocate_alone(self: &Arc<Self>, bytes: usize, purpose: Purpose) -> Result<Buffer, DeviceError> {
        let (size, mut address) = (bytes.max(1), 0);
        // SAFETY: the context is current.
        check("cuMemAlloc", self.ordinal, unsafe { sys::cuMemAlloc_v2(&mut address, size) })?;
        self.lock().statistics.take(purpose, size);
        let pointer = NonNull::new(address as *mut u8).expect("device addresses are not zero");
        Ok(Buffer { pointer, size, bytes, purpose, owner: Arc::new(Alone { slab: self.clone() }) })
    }

    /// A block that nothing in the capture under way has used before: what is written there ahead of the captured
    /// work is still there when that reads it.
    pub(crate) fn allocate_untouched(
        self: &Arc<Self>,
        bytes: usize,
        purpose: Purpose,
    ) -> Result<Buffer, DeviceError> {
        let size = bytes.max(1).next_multiple_of(ALIGNMENT);
        let mut state = self.lock();
        self.check_limit(&state, size, purpose)?;
        let offset = match state.best_untouched(size) {
            Some(offset) => offset,
            None => {
                let end = state.mapped;
                self.extend(&mut state, size, size, purpose)?;
                end
            }
        };
        state.hand_out(offset, size, purpose);
        drop(state);
        Ok(self.buffer(offset, size, bytes, purpose))
    }

    fn buffer(self: &Arc<Self>, offset: usize, size: usize, bytes: usize, purpose: Purpose) -> Buffer {
        Buffer { pointer: self.pointer(offset), size, bytes, purpose, owner: self.clone() }
    }

    /// The address of an offset, as the pointer that buffers carry.
    pub(crate) fn pointer(&self, offset: usize) -> NonNull<u8> {
        NonNull::new((self.base as usize + offset) as *mut u8).expect("device addresses are not zero")
    }

    fn check_limit(&self, state: &State, size: usize, purpose: Purpose) -> Result<(), DeviceError> {
        match self.limit.filter(|limit| state.statistics.total() + size > *limit) {
            Some(limit) => Err(self.out_of_memory(state, size, purpose, &limit_reached(limit))),
            None => Ok(()),
        }
    }

    /// A free place, made if there is none.
    fn find(&self, state: &mut State, size: usize, purpose: Purpose) -> Result<usize, DeviceError> {
        self.check_limit(state, size, purpose)?;
        if let Some(offset) = best_fit(&state.free, size) {
            return Ok(offset);
        }
        self.grow(state, size, purpose)?;
        Ok(best_fit(&state.free, size).expect("the slab grew by what was missing"))
    }

    /// Puts memory behind the end of the slab, so that a block of `size` fits there.
    fn grow(&self, state: &mut State, size: usize, purpose: Purpose) -> Result<(), DeviceError> {
        let tail = state.free.last_key_value().filter(|(offset, len)| *offset + *len == state.mapped);
        let missing = size - tail.map_or(0, |(_, len)| *len);
        self.extend(state, missing, size, purpose)
    }

    /// Puts at least `missing` bytes behind the end of the slab for a block of `size`, more if there are more.
    fn extend(
        &self,
        state: &mut State,
        missing: usize,
        size: usize,
        purpose: Purpose,
    ) -> Result<(), DeviceError> {
        state.statistics.cache_misses += 1;
        let rounded = |bytes: usize| bytes.next_multiple_of(self.granularity);
        if self.map(state, rounded(missing.max(GROWTH))) || self.map(state, rounded(missing)) {
            return Ok(());
        }
        let why = match self.limit.filter(|limit| state.mapped + rounded(missing) > *limit) {
            Some(limit) => limit_reached(limit),
            None => "the device has no more: ".into(),
        };
        Err(self.out_of_memory(state, size, purpose, &why))
    }

    fn map(&self, state: &mut State, bytes: usize) -> bool {
        // What captured steps keep, and gaps between blocks, count to the limit as well.
        let most = self
            .limit
            .map_or(self.capacity, |limit| limit.next_multiple_of(self.granularity).min(self.capacity));
        if state.mapped + bytes > most {
            return false;
        }
        let properties = allocation_properties(self.ordinal);
        let mut handle = 0;
        // SAFETY: the range lies within the reserved addresses and has no memory yet.
        unsafe {
            sys::cuCtxSetCurrent(self.context);
            if sys::cuMemCreate(&mut handle, bytes, &properties, 0) != sys::CUresult::CUDA_SUCCESS {
                return false;
            }
            let address = self.base + state.mapped as u64;
            let mut access: sys::CUmemAccessDesc = std::mem::zeroed();
            access.location = properties.location;
            access.flags = sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
            let mapped = sys::cuMemMap(address, bytes, 0, handle, 0) == sys::CUresult::CUDA_SUCCESS;
            if !mapped || sys::cuMemSetAccess(address, bytes, &access, 1) != sys::CUresult::CUDA_SUCCESS {
                sys::cuMemRelease(handle);
                return false;
            }
        }
        state.pieces.push((handle, bytes));
        insert_joined(&mut state.free, state.mapped, bytes);
        state.mapped += bytes;
        state.statistics.reserved = state.mapped;
        true
    }

    fn out_of_memory(&self, state: &State, bytes: usize, purpose: Purpose, why: &str) -> DeviceError {
        DeviceError::OutOfMemory {
            device: format!("cuda:{}", self.ordinal),
            bytes,
            purpose: purpose.name(),
            in_use: state.statistics.total(),
            hint: format!("; {why}{}\n{}", purpose.advice(), state.statistics),
        }
    }

    /// From here on every block is noted.
    pub(crate) fn begin_capture(&self) {
        self.lock().noted = Some(Noted::default());
    }

    /// The blocks handed out since the beginning, in order; their memory is nobody else's until the
    /// reservation is dropped.
    pub(crate) fn end_capture(self: &Arc<Self>) -> (Vec<Block>, SlabReservation) {
        let mut state = self.lock();
        let (blocks, reservation) = state.reserve_noted();
        let id = state.next_reservation;
        state.next_reservation += 1;
        state.reservations.insert(id, reservation);
        drop(state);
        (blocks, SlabReservation { slab: self.clone(), id })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Owner for Slab {
    fn release(&self, pointer: NonNull<u8>, size: usize, purpose: Purpose) {
        let offset = pointer.as_ptr() as usize - self.base as usize;
        self.lock().take_back(offset, size, purpose);
    }
}

/// The owner of a buffer that is an allocation of its own.
struct Alone {
    slab: Arc<Slab>,
}

impl Owner for Alone {
    fn release(&self, pointer: NonNull<u8>, size: usize, purpose: Purpose) {
        self.slab.lock().statistics.give(purpose, size);
        // SAFETY: made by `allocate_alone`; work that uses it may still be under way, so that is waited for.
        unsafe {
            sys::cuCtxSetCurrent(self.slab.context);
            sys::cuCtxSynchronize();
            sys::cuMemFree_v2(pointer.as_ptr() as u64);
        }
        super::CURRENT.set(self.slab.context as usize);
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(|poisoned| poisoned.into_inner());
        // SAFETY: no buffer is left, and the device waits for its work before memory goes.
        unsafe {
            super::CURRENT.set(0);
            sys::cuCtxSetCurrent(self.context);
            sys::cuCtxSynchronize();
            if state.mapped > 0 {
                sys::cuMemUnmap(self.base, state.mapped);
            }
            for (handle, _) in &state.pieces {
                sys::cuMemRelease(*handle);
            }
            sys::cuMemAddressFree(self.base, self.capacity);
        }
    }
}

/// Keeps the memory of a captured step from others.
pub(crate) struct SlabReservation {
    slab: Arc<Slab>,
    id: u64,
}

impl Drop for SlabReservation {
    fn drop(&mut self) {
        let mut state = self.slab.lock();
        if let Some(reservation) = state.reservations.remove(&self.id) {
            for (offset, len) in reservation.ranges {
                insert_joined(&mut state.free, offset, len);
            }
        }
    }
}

/// The smallest range that takes `size`, and of these the first.
fn best_fit(ranges: &BTreeMap<usize, usize>, size: usize) -> Option<usize> {
    let fitting = ranges.iter().filter(|(_, len)| **len >= size);
    fitting.min_by_key(|(offset, len)| (**len, **offset)).map(|(offset, _)| *offset)
}

/// Adds a range that touches no other's inside, joined with its neighbours.
fn insert_joined(ranges: &mut BTreeMap<usize, usize>, offset: usize, len: usize) {
    let (mut start, mut end) = (offset, offset + len);
    if let Some((&before, &size)) =
        ranges.range(..start).next_back().filter(|(before, size)| *before + *size == start)
    {
        debug_assert!(before + size == start);
        ranges.remove(&before);
        start = before;
    }
    if let Some(size) = ranges.remove(&end) {
        end += size;
    }
    ranges.insert(start, end - start);
}

/// Takes a part out of the range that holds it.
fn take_range(ranges: &mut BTreeMap<usize, usize>, offset: usize, len: usize) {
    let (&start, &size) = ranges.range(..=offset).next_back().expect("the part lies in a range");
    debug_assert!(start + size >= offset + len);
    ranges.remove(&start);
    if start < offset {
        ranges.insert(start, offset - start);
    }
    if offset + len < start + size {
        ranges.insert(offset + len, start + size - offset - len);
    }
}

/// Adds a range that may overlap others.
fn insert_union(ranges: &mut BTreeMap<usize, usize>, offset: usize, len: usize) {
    let (mut start, mut end) = (offset, offset + len);
    let overlapping: Vec<usize> = ranges
        .range(..=end)
        .filter(|(other, size)| **other + **size >= start)
        .map(|(other, _)| *other)
        .collect();
    for other in overlapping {
        let size = ranges.remove(&other).expect("just seen");
        start = start.min(other);
        end = end.max(other + size);
    }
    ranges.insert(start, end - start);
}

/// Cuts a range into the parts inside `ranges` and those outside.
fn split_by(
    ranges: &BTreeMap<usize, usize>,
    offset: usize,
    len: usize,
    inside: &mut BTreeMap<usize, usize>,
    outside: &mut BTreeMap<usize, usize>,
) {
    let end = offset + len;
    let mut position = offset;
    for (&other, &size) in ranges {
        let (from, to) = (other.max(offset), (other + size).min(end));
        if from >= to {
            continue;
        }
        if from > position {
            insert_joined(outside, position, from - position);
        }
        insert_joined(inside, from, to - from);
        position = to;
    }
    if position < end {
        insert_joined(outside, position, end - position);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_taken_out_of_its_range() {
        let mut ranges = BTreeMap::from([(0, 10), (20, 30)]);
        take_range(&mut ranges, 25, 5);
        assert_eq!(ranges, BTreeMap::from([(0, 10), (20, 5), (30, 20)]));
        take_range(&mut ranges, 0, 10);
        take_range(&mut ranges, 30, 20);
        assert_eq!(ranges, BTreeMap::from([(20, 5)]));
    }

    /// Captured work may read a block of before until it is given back: an upload, which is sent ahead of that work,
    /// must not lie there, nor may anything else while the captured step lives.
    #[test]
    fn a_block_of_before_that_is_given_back_in_a_capture_stays_the_captures() {
        let purpose = Purpose::Activations;
        let mut state = State { free: BTreeMap::from([(0, 4096)]), ..State::default() };
        state.hand_out(0, 1024, purpose);
        state.noted = Some(Noted::default());
        state.hand_out(1024, 512, purpose);
        state.take_back(0, 1024, purpose);
        assert_eq!(best_fit(&state.free, 512), Some(0), "it is free for the captured work");
        assert_eq!(state.best_untouched(512), Some(1536), "and not for what is sent ahead of it");
        let (blocks, reservation) = state.reserve_noted();
        assert_eq!(blocks, [(1024, 512)]);
        assert_eq!(reservation.ranges, BTreeMap::from([(0, 1024)]));
        assert_eq!(reservation.live, BTreeSet::from([1024]));
        assert_eq!(state.free, BTreeMap::from([(1536, 2560)]));
    }

    #[test]
    fn ranges_join_and_split() {
        let mut ranges = BTreeMap::new();
        insert_joined(&mut ranges, 0, 10);
        insert_joined(&mut ranges, 20, 10);
        insert_joined(&mut ranges, 10, 10);
        assert_eq!(ranges, BTreeMap::from([(0, 30)]));
        insert_union(&mut ranges, 25, 20);
        insert_union(&mut ranges, 100, 5);
        assert_eq!(ranges, BTreeMap::from([(0, 45), (100, 5)]));
        let (mut inside, mut outside) = (BTreeMap::new(), BTreeMap::new());
        split_by(&ranges, 40, 70, &mut inside, &mut outside);
        assert_eq!(inside, BTreeMap::from([(40, 5), (100, 5)]));
        assert_eq!(outside, BTreeMap::from([(45, 55), (105, 5)]));
    }
}

//! Where the device's time goes: a timestamp before each piece of work, summed by name.
//!
//! A piece's time is that from its start to the start of the next, so gaps count to what came before them.

use std::collections::HashMap;

use cudarc::driver::sys;

use super::CudaDevice;
use super::driver::check;
use super::transfer::Event;
use crate::DeviceError;

/// The sum of one name.
#[derive(Clone, Debug)]
pub struct ProfileRow {
    pub name: &'static str,
    pub count: usize,
    pub milliseconds: f64,
}

#[derive(Default)]
pub(crate) struct Profile {
    marks: Vec<(&'static str, Event)>,
}

impl Profile {
    pub(crate) fn mark(&mut self, device: &CudaDevice, name: &'static str) -> Result<(), DeviceError> {
        let event = Event::new(device.ordinal(), true)?;
        event.record(device.ordinal(), device.stream())?;
        self.marks.push((name, event));
        Ok(())
    }

    pub(crate) fn finish(mut self, device: &CudaDevice) -> Result<Vec<ProfileRow>, DeviceError> {
        self.mark(device, "end")?;
        device.synchronize()?;
        let mut sums: HashMap<&'static str, (usize, f64)> = HashMap::new();
        for pair in self.marks.windows(2) {
            let mut milliseconds = 0.0;
            // SAFETY: both events have passed.
            let result = unsafe { sys::cuEventElapsedTime_v2(&mut milliseconds, pair[0].1.0, pair[1].1.0) };
            check("cuEventElapsedTime", device.ordinal(), result)?;
            let sum = sums.entry(pair[0].0).or_default();
            *sum = (sum.0 + 1, sum.1 + f64::from(milliseconds));
        }
        let mut rows: Vec<ProfileRow> = sums
            .into_iter()
            .map(|(name, (count, milliseconds))| ProfileRow { name, count, milliseconds })
            .collect();
        rows.sort_by(|a, b| b.milliseconds.total_cmp(&a.milliseconds));
        Ok(rows)
    }
}

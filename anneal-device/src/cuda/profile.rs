//! Where the device's time goes: marks in its stream with the time between them, and a profile: a
//! timestamp before each piece of work, summed by name.
//!
//! In a profile a piece's time is that from its start to the start of the next, so gaps count to what came before them.

use std::collections::HashMap;

use super::CudaDevice;
use super::transfer::Event;
use crate::DeviceError;

/// A point in a device's stream, to measure from.
pub struct Mark(Event);

impl CudaDevice {
    /// Marks the place after all work so far; does not wait.
    pub fn mark(&self) -> Result<Mark, DeviceError> {
        self.bind()?;
        let event = Event::new(self.ordinal(), true)?;
        event.record(self.ordinal(), self.stream())?;
        Ok(Mark(event))
    }

    /// The device's time between each mark and the next; waits for the last of them.
    pub fn milliseconds_between(&self, marks: &[Mark]) -> Result<Vec<f64>, DeviceError> {
        self.bind()?;
        if let Some(last) = marks.last().filter(|last| !last.0.passed(self.ordinal()).unwrap_or(false)) {
            self.count_wait();
            last.0.wait(self.ordinal())?;
        }
        let between = |pair: &[Mark]| pair[1].0.milliseconds_since(self.ordinal(), &pair[0].0).map(f64::from);
        marks.windows(2).map(between).collect()
    }
}

/// The sum of one name.
#[derive(Clone, Debug)]
pub struct ProfileRow {
    pub name: &'static str,
    pub count: usize,
    pub milliseconds: f64,
}

#[derive(Default)]
pub(crate) struct Profile {
    names: Vec<&'static str>,
    marks: Vec<Mark>,
}

impl Profile {
    pub(crate) fn mark(&mut self, device: &CudaDevice, name: &'static str) -> Result<(), DeviceError> {
        self.marks.push(device.mark()?);
        self.names.push(name);
        Ok(())
    }

    pub(crate) fn finish(mut self, device: &CudaDevice) -> Result<Vec<ProfileRow>, DeviceError> {
        self.mark(device, "end")?;
        let mut sums: HashMap<&'static str, (usize, f64)> = HashMap::new();
        for (name, milliseconds) in self.names.iter().zip(device.milliseconds_between(&self.marks)?) {
            let sum = sums.entry(name).or_default();
            *sum = (sum.0 + 1, sum.1 + milliseconds);
        }
        let mut rows: Vec<ProfileRow> = sums
            .into_iter()
            .map(|(name, (count, milliseconds))| ProfileRow { name, count, milliseconds })
            .collect();
        rows.sort_by(|a, b| b.milliseconds.total_cmp(&a.milliseconds));
        Ok(rows)
    }
}

//! Scales and tick marks.
//!
//! Contract: a [`Scale`] maps the shown range to 0..1; ticks lie inside the range, in increasing order.

use crate::report::summary;

/// Logarithmic where the values span at least this factor: below it, a linear axis tells as much.
const LOG_FROM: f64 = 10.0;

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scale {
    low: f64,
    high: f64,
    logarithmic: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Tick {
    pub value: f64,
    /// Empty for a minor tick.
    pub label: String,
}

impl Scale {
    /// The scale of a step axis: exactly from the first to the last step.
    pub fn of_steps(first: u64, last: u64) -> Self {
        match first == last {
            true => Self { low: first as f64 - 1.0, high: last as f64 + 1.0, logarithmic: false },
            false => Self { low: first as f64, high: last as f64, logarithmic: false },
        }
    }

    /// A scale for values between `low` and `high`, both finite, with some room around them.
    pub fn of_values(low: f64, high: f64) -> Self {
        if low > 0.0 && high / low >= LOG_FROM {
            let room = (high / low).powf(0.05);
            return Self { low: low / room, high: high * room, logarithmic: true };
        }
        // A curve that comes near zero is read against zero.
        let low = if low > 0.0 && low < 0.3 * high { 0.0 } else { low };
        let room = match high > low {
            true => 0.06 * (high - low),
            false => 0.1 * high.abs().max(1e-6),
        };
        let bottom = if low == 0.0 && high > 0.0 { 0.0 } else { low - room };
        Self { low: bottom, high: high + room, logarithmic: false }
    }

    pub fn is_logarithmic(&self) -> bool {
        self.logarithmic
    }

    /// Where a value lies: 0 at the low end, 1 at the high end, clamped to a little beyond, so that a spike leaves
    /// the panel without stretching it.
    pub fn position(&self, value: f64) -> f64 {
        let position = match self.logarithmic {
            true => (value.max(f64::MIN_POSITIVE) / self.low).ln() / (self.high / self.low).ln(),
            false => (value - self.low) / (self.high - self.low),
        };
        position.clamp(-0.5, 1.5)
    }

    /// About `wanted` ticks, at most twice as many, labelled by `label` given the value and the distance between
    /// ticks.
    fn linear_ticks(&self, wanted: usize, whole: bool, label: impl Fn(f64, f64) -> String) -> Vec<Tick> {
        let ideal = (self.high - self.low) / wanted as f64;
        let magnitude = 10_f64.powf(ideal.log10().floor());
        let factor = [1.0, 2.0, 5.0, 10.0].into_iter().find(|factor| factor * magnitude >= ideal * 0.999);
        let mut distance = factor.unwrap_or(10.0) * magnitude;
        if whole {
            distance = distance.max(1.0);
        }
        let first = (self.low / distance - 1e-9).ceil() as i64;
        let last = (self.high / distance + 1e-9).floor() as i64;
        (first..=last)
            .map(|index| index as f64 * distance)
            .map(|value| Tick { value, label: label(value, distance) })
            .collect()
    }

    /// Ticks of a step axis.
    pub fn step_ticks(&self, wanted: usize) -> Vec<Tick> {
        let thousands = self.high >= 1e5;
        self.linear_ticks(wanted, true, |value, distance| step_label(value, distance, thousands))
            .into_iter()
            .filter(|tick| tick.value >= 0.0)
            .collect()
    }

    /// Ticks of a value axis.
    pub fn value_ticks(&self, wanted: usize) -> Vec<Tick> {
        match self.logarithmic {
            true => self.logarithmic_ticks(),
            false => self.linear_ticks(wanted, false, value_label),
        }
    }

    fn logarithmic_ticks(&self) -> Vec<Tick> {
        let decades = (self.high / self.low).log10();
        let labelled: &[u32] = match decades {
            _ if decades < 1.6 => &[1, 2, 3, 5],
            _ if decades < 3.2 => &[1, 3],
            _ => &[1],
        };
        let every = (decades / 8.0).ceil().max(1.0) as i32;
        let mut ticks = Vec::new();
        for exponent in self.low.log10().floor() as i32..=self.high.log10().floor() as i32 {
            for digit in 1..10 {
                let value = f64::from(digit) * 10_f64.powi(exponent);
                if value < self.low || value > self.high {
                    continue;
                }
                let shown = labelled.contains(&digit) && exponent.rem_euclid(every) == 0;
                let label = if shown { power_label(digit, exponent) } else { String::new() };
                ticks.push(Tick { value, label });
            }
        }
        ticks
    }
}

fn step_label(value: f64, distance: f64, thousands: bool) -> String {
    match () {
        () if value == 0.0 => "0".into(),
        () if distance >= 1e6 => format!("{}M", value / 1e6),
        () if thousands && distance >= 1e3 => format!("{}k", summary::count((value / 1e3).round() as u64)),
        () => summary::count(value.round() as u64),
    }
}

/// As many decimals as the distance between ticks asks for.
fn value_label(value: f64, distance: f64) -> String {
    // 1e-12: the sum of steps that should give zero.
    if value.abs() < distance * 1e-6 {
        return "0".into();
    }
    let decimals = -(distance * 1.001).log10().floor();
    match () {
        () if decimals > 4.0 || value.abs() >= 1e6 => format!("{value:.1e}"),
        () => format!("{value:.*}", decimals.max(0.0) as usize),
    }
}

fn power_label(digit: u32, exponent: i32) -> String {
    match exponent {
        0..=4 => summary::count(u64::from(digit) * 10_u64.pow(exponent as u32)),
        -3..0 => format!("{:.*}", -exponent as usize, f64::from(digit) * 10_f64.powi(exponent)),
        _ => format!("{digit}e{exponent}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(ticks: &[Tick]) -> Vec<&str> {
        ticks.iter().map(|tick| tick.label.as_str()).filter(|label| !label.is_empty()).collect()
    }

    #[test]
    fn steps_are_whole_and_short() {
        assert_eq!(labels(&Scale::of_steps(1, 1150).step_ticks(6)), ["200", "400", "600", "800", "1,000"]);
        assert_eq!(labels(&Scale::of_steps(1, 3).step_ticks(6)), ["1", "2", "3"]);
        assert_eq!(labels(&Scale::of_steps(7, 7).step_ticks(6)), ["6", "7", "8"]);
        assert_eq!(labels(&Scale::of_steps(0, 400_000).step_ticks(4)), ["0", "100k", "200k", "300k", "400k"]);
        assert_eq!(labels(&Scale::of_steps(1, 150_000).step_ticks(3)), ["50k", "100k", "150k"]);
        assert_eq!(labels(&Scale::of_steps(0, 7_000_000).step_ticks(4)), ["0", "2M", "4M", "6M"]);
    }

    #[test]
    fn a_wide_range_is_logarithmic() {
        let scale = Scale::of_values(0.012, 1.1);
        assert!(scale.is_logarithmic());
        assert_eq!(labels(&scale.value_ticks(5)), ["0.01", "0.03", "0.1", "0.3", "1"]);
        assert!((scale.position(0.012 * 1.1_f64.sqrt() * 10.0) - 0.5).abs() < 0.1);
        let narrow = Scale::of_values(0.1, 1.1);
        assert_eq!(labels(&narrow.value_ticks(5)), ["0.1", "0.2", "0.3", "0.5", "1"]);
        let wide = Scale::of_values(1e-6, 20_000.0);
        assert_eq!(labels(&wide.value_ticks(5)), ["1e-6", "1e-4", "0.01", "1", "100", "10,000"]);
    }

    #[test]
    fn a_narrow_range_is_linear() {
        let near_zero = Scale::of_values(0.2, 1.0);
        assert!(!near_zero.is_logarithmic());
        assert_eq!(labels(&near_zero.value_ticks(5)), ["0", "0.5", "1.0"]);
        assert_eq!(near_zero.position(0.0), 0.0);
        let far = Scale::of_values(0.90, 0.98);
        assert_eq!(labels(&far.value_ticks(5)), ["0.90", "0.92", "0.94", "0.96", "0.98"]);
        let negative = Scale::of_values(-3.0, 2.0);
        assert_eq!(labels(&negative.value_ticks(5)), ["-2", "0", "2"]);
    }

    #[test]
    fn a_constant_has_a_range_too() {
        for value in [0.0, 0.5, -3.0] {
            let scale = Scale::of_values(value, value);
            let position = scale.position(value);
            assert!((0.0..=1.0).contains(&position), "{value}: {position}");
            assert!(!scale.value_ticks(4).is_empty());
        }
    }

    #[test]
    fn a_spike_stays_near_the_panel() {
        assert_eq!(Scale::of_values(0.0, 1.0).position(1e9), 1.5);
        assert_eq!(Scale::of_values(0.001, 1.0).position(0.0), -0.5);
    }
}

//! From recorded points to what a few hundred pixels can show.
//!
//! Contract: however many points come in, at most `columns` bins go out, each with its mean and its extremes, so
//! that no spike is lost; what is not finite is kept apart.

/// The points that share a column of pixels.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bin {
    pub step: f64,
    pub mean: f64,
    pub low: f64,
    pub high: f64,
    pub count: f64,
}

/// A curve made ready for drawing.
#[derive(Clone, Debug, Default)]
pub struct Binned {
    pub bins: Vec<Bin>,
    /// Steps whose value was not finite.
    pub nonfinite: Vec<u64>,
}

/// Sorts the points, in step order, into at most `columns` equal parts of their range of steps.
pub fn binned(points: &[(u64, f64)], columns: usize) -> Binned {
    let mut result = Binned::default();
    let (Some(first), Some(last)) = (points.first(), points.last()) else { return result };
    let width = ((last.0 - first.0) as f64 / columns as f64).max(f64::MIN_POSITIVE);
    let mut current = None;
    for &(step, value) in points {
        if !value.is_finite() {
            result.nonfinite.push(step);
            continue;
        }
        let column = (((step - first.0) as f64 / width) as usize).min(columns - 1);
        let point = Bin { step: step as f64, mean: value, low: value, high: value, count: 1.0 };
        match result.bins.last_mut().filter(|_| current == Some(column)) {
            Some(bin) => *bin = merged(bin, &point),
            None => result.bins.push(point),
        }
        current = Some(column);
    }
    result
}

fn merged(a: &Bin, b: &Bin) -> Bin {
    let count = a.count + b.count;
    Bin {
        step: (a.step * a.count + b.step * b.count) / count,
        mean: (a.mean * a.count + b.mean * b.count) / count,
        low: a.low.min(b.low),
        high: a.high.max(b.high),
        count,
    }
}

/// Share of the range of steps that the smoothing kernel's standard deviation spans.
const KERNEL_SHARE: f64 = 0.015;
/// Near the start, where a loss falls steeply, the kernel is at most this share of the distance to the start.
const START_SHARE: f64 = 0.3;

/// Bins on either side of a bin that tell whether it is a spike.
const NEIGHBOURS: usize = 5;

/// The means, but for isolated spikes, which would lift the smoothed curve for a long way around them: a mean
/// further from the median of its neighbourhood than 4 times the neighbourhood's mean deviation, and than half
/// that median, gives way to it. The neighbourhood is small at the start, so a steep fall is no spike.
fn without_spikes(bins: &[Bin]) -> Vec<f64> {
    (0..bins.len())
        .map(|index| {
            let reach = NEIGHBOURS.min(index);
            let around = &bins[index - reach..(index + reach + 1).min(bins.len())];
            let mut values: Vec<f64> = around.iter().map(|bin| bin.mean).collect();
            values.sort_by(f64::total_cmp);
            let median = values[values.len() / 2];
            let deviation =
                values.iter().map(|value| (value - median).abs()).sum::<f64>() / values.len() as f64;
            let limit = (4.0 * deviation).max(0.5 * median.abs());
            if (bins[index].mean - median).abs() > limit { median } else { bins[index].mean }
        })
        .collect()
}

/// The mean under a Gaussian window over the steps, centred, so that the curve does not lag behind its points as a
/// running average does. Isolated spikes are left out.
pub fn smoothed(bins: &[Bin]) -> Vec<(f64, f64)> {
    let (Some(first), Some(last)) = (bins.first(), bins.last()) else { return Vec::new() };
    let range = last.step - first.step;
    let widest = (KERNEL_SHARE * range).max(2.0 * range / bins.len() as f64);
    let means = without_spikes(bins);
    let mut start = 0;
    bins.iter()
        .map(|bin| {
            let sigma = widest.min(START_SHARE * (bin.step - first.step)).max(f64::MIN_POSITIVE);
            while bins[start].step < bin.step - 3.0 * widest {
                start += 1;
            }
            let (mut sum, mut weights) = (0.0, 0.0);
            for (other, mean) in bins[start..].iter().zip(&means[start..]) {
                let distance = (other.step - bin.step) / sigma;
                if distance > 3.0 {
                    break;
                }
                if distance < -3.0 {
                    continue;
                }
                let weight = other.count * (-0.5 * distance * distance).exp();
                sum += weight * mean;
                weights += weight;
            }
            (bin.step, sum / weights)
        })
        .collect()
}

/// The value below which a share of the sorted values lies.
pub fn quantile(sorted: &[f64], share: f64) -> f64 {
    sorted[((sorted.len() - 1) as f64 * share).round() as usize]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bins_keep_mean_and_extremes() {
        let points: Vec<(u64, f64)> =
            (0..1000).map(|step| (step, if step == 503 { 90.0 } else { 1.0 })).collect();
        let bins = binned(&points, 10).bins;
        assert_eq!(bins.len(), 10);
        assert_eq!(bins.iter().map(|bin| bin.count).sum::<f64>(), 1000.0);
        assert_eq!(bins[5].high, 90.0);
        assert!((bins[5].mean - (99.0 + 90.0) / 100.0).abs() < 0.01);
        assert_eq!(bins[4], Bin { low: 1.0, high: 1.0, ..bins[4] });
    }

    #[test]
    fn few_points_stay_as_they_are() {
        let points = [(1, 4.0), (2, 3.0), (9, 2.0)];
        let bins = binned(&points, 500).bins;
        assert_eq!(bins.iter().map(|bin| (bin.step as u64, bin.mean)).collect::<Vec<_>>(), points);
        assert_eq!(binned(&[(5, 1.0)], 500).bins.len(), 1);
        assert!(binned(&[], 500).bins.is_empty());
    }

    #[test]
    fn what_is_not_finite_is_kept_apart() {
        let curve = binned(&[(1, 1.0), (2, f64::NAN), (3, f64::INFINITY), (4, 2.0)], 100);
        assert_eq!(curve.nonfinite, [2, 3]);
        assert_eq!(curve.bins.len(), 2);
    }

    #[test]
    fn a_straight_line_stays_straight_inside() {
        let points: Vec<(u64, f64)> = (0..2000).map(|step| (step, 3.0 - 0.001 * step as f64)).collect();
        for (step, value) in &smoothed(&binned(&points, 2000).bins)[..1800] {
            assert!((value - (3.0 - 0.001 * step)).abs() < 1e-4, "{step}: {value}");
        }
    }

    #[test]
    fn noise_is_averaged_and_the_first_value_kept() {
        let noise = |step: u64| if step.is_multiple_of(2) { 0.3 } else { -0.3 };
        let points: Vec<(u64, f64)> = (0..1000).map(|step| (step, 1.0 + noise(step))).collect();
        let curve = smoothed(&binned(&points, 1000).bins);
        assert_eq!(curve[0].1, 1.3);
        assert!(curve[100..].iter().all(|(_, value)| (value - 1.0).abs() < 0.02));
    }

    #[test]
    fn an_isolated_spike_leaves_the_smoothed_curve_alone() {
        let mut points: Vec<(u64, f64)> = (0..1000).map(|step| (step, 1.0)).collect();
        points[500].1 = 1e6;
        let curve = smoothed(&binned(&points, 1000).bins);
        assert!(curve.iter().all(|(_, value)| (value - 1.0).abs() < 1e-9));
        // A lasting rise is no spike.
        points[500..540].iter_mut().for_each(|point| point.1 = 9.0);
        let curve = smoothed(&binned(&points, 1000).bins);
        assert!(curve[520].1 > 6.0, "{:?}", curve[520]);
    }

    #[test]
    fn quantiles() {
        let values: Vec<f64> = (0..=100).map(f64::from).collect();
        assert_eq!(
            (quantile(&values, 0.0), quantile(&values, 0.5), quantile(&values, 1.0)),
            (0.0, 50.0, 100.0)
        );
        assert_eq!(quantile(&[4.0], 0.99), 4.0);
    }
}

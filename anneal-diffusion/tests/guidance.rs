//! Guidance against its formula, on a model that says which branch it was asked for.

use anneal_diffusion::{BetaSchedule, Branch, Guidance, GuidanceShape, Process, Result, Schedule};
use anneal_tensor::{Device, Tensor};

fn process() -> Process {
    Process::Diffusion(Schedule::new(BetaSchedule::linear(1000), 1000).unwrap())
}

/// Channel c of sample s is 10 s + c with its condition and 1 + c^2 without; `channels` of them.
fn output(branches: &[Branch], channels: usize) -> Vec<f32> {
    let value = |branch: &Branch, channel: usize| match branch {
        Branch::Conditional(sample) => (10 * sample + channel) as f32,
        Branch::Unconditional(_) => (1 + channel * channel) as f32,
    };
    branches.iter().flat_map(|branch| (0..channels).map(|channel| value(branch, channel))).collect()
}

/// The guided output on two samples of four channels, and the rows of each model call.
fn guided(guidance: Guidance, timesteps: &[f64], channels: usize) -> (Vec<f32>, Vec<usize>) {
    let (device, process) = (Device::cpu(Some(1), None), process());
    let x =
        Tensor::from_slice(&device, &[0.25f32, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], &[2, 4, 1, 1]).unwrap();
    let mut calls = Vec::new();
    let model = |x: &Tensor, timesteps: &[f64], branches: &[Branch]| -> Result<Tensor> {
        assert_eq!((x.size(0), timesteps.len()), (branches.len(), branches.len()));
        let values = x.to_vec::<f32>()?;
        for (row, branch) in branches.iter().enumerate() {
            let (Branch::Conditional(sample) | Branch::Unconditional(sample)) = *branch;
            assert_eq!(values[row * 4], [0.25, 4.0][sample], "row {row} holds another sample");
        }
        calls.push(branches.len());
        Ok(Tensor::from_slice(x.device(), &output(branches, channels), &[branches.len(), channels, 1, 1])?)
    };
    let values = guidance.guide(&process, model)(&x, timesteps).unwrap().to_vec::<f32>().unwrap();
    (values, calls)
}

/// u + scale (c - u) on the first `guided` channels, c on the rest.
fn expected(scales: [f64; 2], guided: usize, channels: usize) -> Vec<f32> {
    let mut values = Vec::new();
    for (sample, scale) in scales.iter().enumerate() {
        let conditional = output(&[Branch::Conditional(sample)], channels);
        let unconditional = output(&[Branch::Unconditional(sample)], channels);
        for channel in 0..channels {
            let (c, u) = (f64::from(conditional[channel]), f64::from(unconditional[channel]));
            values.push(if channel < guided { u + scale * (c - u) } else { c } as f32);
        }
    }
    values
}

fn assert_near(got: &[f32], expected: &[f32]) {
    assert_eq!(got.len(), expected.len());
    for (got, expected) in got.iter().zip(expected) {
        assert!((got - expected).abs() <= 1e-5 * expected.abs().max(1.0), "{got} for {expected}");
    }
}

#[test]
fn all_or_the_first_three_channels_are_guided_in_one_call_and_the_rest_is_conditional() {
    for (choice, channels, guided_channels) in [(None, 4, 4), (Some(3), 4, 3), (None, 8, 4), (Some(3), 8, 3)]
    {
        let guidance = Guidance::new(4.0, GuidanceShape::Constant, choice).unwrap();
        let (values, calls) = guided(guidance, &[500.0, 500.0], channels);
        assert_eq!(calls, [4], "one call on both branches");
        assert_near(&values, &expected([4.0, 4.0], guided_channels, channels));
    }
}

#[test]
fn a_scale_of_one_and_times_outside_the_interval_cost_one_branch() {
    let constant = Guidance::new(1.0, GuidanceShape::Constant, None).unwrap();
    assert_eq!(guided(constant, &[500.0, 500.0], 8).1, [2]);
    let shape = GuidanceShape::Interval { low: 0.2, high: 0.6 };
    let interval = Guidance::new(3.0, shape, None).unwrap();
    for (time, scale, rows) in [(100.0, 1.0, 2), (200.0, 3.0, 4), (600.0, 3.0, 4), (601.0, 1.0, 2)] {
        let (values, calls) = guided(interval, &[time, time], 4);
        assert_eq!(calls, [rows], "at {time}");
        assert_near(&values, &expected([scale, scale], 4, 4));
    }
}

#[test]
fn rows_at_different_timesteps_have_their_own_scale() {
    let shape = GuidanceShape::Interval { low: 0.2, high: 0.6 };
    let interval = Guidance::new(3.0, shape, Some(3)).unwrap();
    assert_near(&guided(interval, &[400.0, 900.0], 8).0, &expected([3.0, 1.0], 3, 8));
    let power = 0.01;
    let cosine = Guidance::new(3.8, GuidanceShape::PowerCosine { power }, None).unwrap();
    let scale =
        |t: f64| 1.0 + 2.8 * (1.0 - (std::f64::consts::PI * (1.0 - t / 1000.0).powf(power)).cos()) / 2.0;
    assert_near(&guided(cosine, &[247.0, 519.0], 4).0, &expected([scale(247.0), scale(519.0)], 4, 4));
}

#[test]
fn the_power_cosine_rises_from_one_at_noise_to_the_scale_at_the_data() {
    let guidance = Guidance::new(4.0, GuidanceShape::PowerCosine { power: 2.0 }, None).unwrap();
    let scale = |timestep| guidance.scale_at(&Process::Flow, timestep);
    assert_eq!((scale(1000.0), scale(0.0)), (1.0, 4.0));
    // (1 - t)^2 = 1/2 is the middle of the rise.
    assert!((scale(1000.0 * (1.0 - 0.5f64.sqrt())) - 2.5).abs() < 1e-12);
}

#[test]
fn guidance_that_cannot_be_is_refused() {
    let message = |scale, shape, channels| Guidance::new(scale, shape, channels).unwrap_err().to_string();
    assert!(message(f64::NAN, GuidanceShape::Constant, None).contains("must be a number"));
    assert!(message(2.0, GuidanceShape::Interval { low: 0.6, high: 0.2 }, None).contains("0.6 to 0.2"));
    assert!(message(2.0, GuidanceShape::PowerCosine { power: 0.0 }, None).contains("positive, not 0"));
    assert!(message(2.0, GuidanceShape::Constant, Some(0)).contains("at least one channel"));
}

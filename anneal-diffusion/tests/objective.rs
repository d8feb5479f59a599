//! The objective's closed forms, and the draws of training.

use anneal_diffusion::NoiseSource;
use anneal_diffusion::{
    BetaSchedule, Objective, Prediction, Process, Schedule, SeededNoise, TimeDensity, draw_label_drops,
    draw_latents, draw_noise, draw_timesteps,
};
use anneal_tensor::Device;

const PREDICTIONS: [Prediction; 4] =
    [Prediction::Epsilon, Prediction::V, Prediction::Clean, Prediction::Flow];

fn diffusion() -> Process {
    Process::Diffusion(Schedule::new(BetaSchedule::SquaredCosine, 1000).unwrap())
}

fn processes() -> [(Process, [f64; 3]); 2] {
    [(diffusion(), [0.0, 400.0, 900.0]), (Process::Flow, [10.0, 400.0, 990.0])]
}

#[test]
fn the_exact_target_has_no_loss_and_gives_back_the_clean_sample() {
    let device = Device::cpu(Some(1), None);
    let draw = |step| draw_noise(&device, &[2, 3], 5, step, &[0, 1, 2]).unwrap();
    let (clean, noise) = (draw(0), draw(1));
    for (process, timesteps) in processes() {
        for prediction in PREDICTIONS {
            let objective = Objective::new(process.clone(), prediction, false, None).unwrap();
            let noised = objective.noised(&clean, &noise, &timesteps).unwrap().to_vec::<f32>().unwrap();
            let (x, z) = (clean.to_vec::<f32>().unwrap(), noise.to_vec::<f32>().unwrap());
            let mut output = Vec::new();
            for index in 0..x.len() {
                let level = process.level(timesteps[index / 6]).unwrap();
                let target = prediction.target(level);
                let value = target.first * f64::from(x[index]) + target.second * f64::from(z[index]);
                let pair = prediction.clean(level);
                let back = pair.first * f64::from(noised[index]) + pair.second * value;
                let scale = pair.first.abs().max(1.0);
                assert!((back - f64::from(x[index])).abs() < 1e-6 * scale, "{prediction:?}: {back}");
                output.push(value as f32);
            }
            let output = anneal_tensor::Tensor::from_slice(&device, &output, clean.dims()).unwrap();
            let loss = objective.loss(&output, &clean, &noise, &timesteps).unwrap();
            for error in loss.total.to_vec::<f32>().unwrap() {
                assert!((0.0..1e-12).contains(&error), "{prediction:?}: {error}");
            }
        }
    }
}

#[test]
fn noise_drawn_with_its_samples_is_the_noise_drawn_alone() {
    let device = Device::cpu(Some(2), None);
    let clean = draw_noise(&device, &[2, 3], 5, 0, &[0, 1, 2]).unwrap();
    for (process, timesteps) in processes() {
        let objective = Objective::new(process, Prediction::V, false, None).unwrap();
        let (noise, noised) = objective.draw_noised(&clean, &timesteps, 5, 9, &[4, 7, 6]).unwrap();
        let expected = draw_noise(&device, &[2, 3], 5, 9, &[4, 7, 6]).unwrap();
        assert_eq!(noise.to_vec::<f32>().unwrap(), expected.to_vec::<f32>().unwrap());
        let expected = objective.noised(&clean, &expected, &timesteps).unwrap();
        assert_eq!(noised.to_vec::<f32>().unwrap(), expected.to_vec::<f32>().unwrap());
        assert!(objective.draw_noised(&clean, &timesteps, 5, 9, &[4]).is_err());
    }
}

#[test]
fn min_snr_weights_are_those_of_the_paper_for_each_prediction() {
    let gamma = 5.0;
    for (process, timesteps) in processes() {
        for prediction in PREDICTIONS {
            let objective = Objective::new(process.clone(), prediction, false, Some(gamma)).unwrap();
            for (timestep, row) in timesteps.iter().zip(objective.rows(&timesteps).unwrap()) {
                let level = process.level(*timestep).unwrap();
                let snr = level.alpha.powi(2) / level.sigma.powi(2);
                let expected = match (prediction, &process) {
                    (Prediction::Clean, _) => snr.min(gamma),
                    (Prediction::Epsilon, _) => snr.min(gamma) / snr,
                    (Prediction::V, Process::Diffusion(_)) => snr.min(gamma) / (snr + 1.0),
                    (Prediction::Flow, Process::Flow) => snr.min(gamma) * level.sigma.powi(2),
                    _ => continue,
                };
                let ratio = row.error_weight / expected;
                assert!((ratio - 1.0).abs() < 1e-9, "{prediction:?} at {timestep}: {ratio}");
            }
        }
    }
}

#[test]
fn the_flow_is_a_straight_line_and_its_target_the_slope() {
    let objective = Objective::new(Process::Flow, Prediction::Flow, false, None).unwrap();
    let row = objective.rows(&[250.0]).unwrap()[0];
    assert_eq!((row.target_clean, row.target_noise, row.error_weight), (-1.0, 1.0, 1.0));
    let device = Device::cpu(Some(1), None);
    let tensor = |values: [f32; 2]| anneal_tensor::Tensor::from_slice(&device, &values, &[1, 2]).unwrap();
    let noised = objective.noised(&tensor([1.0, -2.0]), &tensor([3.0, 2.0]), &[250.0]).unwrap();
    assert_eq!(noised.to_vec::<f32>().unwrap(), [1.5, -1.0]);
}

#[test]
fn an_objective_that_cannot_be_is_refused() {
    let message = |process, learned, gamma| {
        Objective::new(process, Prediction::Epsilon, learned, gamma).unwrap_err().to_string()
    };
    assert!(message(Process::Flow, true, None).contains("set learn_sigma to false"));
    assert!(message(diffusion(), false, Some(0.0)).contains("must be positive, not 0"));
    let Process::Diffusion(schedule) = diffusion() else { unreachable!() };
    let no_signal = Process::Diffusion(schedule.with_zero_terminal_snr().unwrap());
    assert!(message(no_signal, false, None).contains("predict v or x0"));
    let objective = Objective::new(diffusion(), Prediction::Epsilon, true, None).unwrap();
    assert!(objective.rows(&[3.5]).unwrap_err().to_string().contains("whole timesteps, not 3.5"));
    assert!(objective.rows(&[1000.0]).unwrap_err().to_string().contains("outside 0 to 999"));
    assert!("eps".parse::<Prediction>().unwrap_err().to_string().contains("epsilon, v, x0, flow"));
    assert!(
        PREDICTIONS.iter().all(|prediction| prediction.name().parse::<Prediction>().unwrap() == *prediction)
    );
}

#[test]
fn a_draw_depends_on_its_sample_and_not_on_its_company() {
    let device = Device::cpu(Some(2), None);
    let noise =
        |samples: &[u64]| draw_noise(&device, &[3, 5], 1, 9, samples).unwrap().to_vec::<f32>().unwrap();
    let together = noise(&[4, 5, 6]);
    assert_eq!(together[15..30], noise(&[5]));
    assert_ne!(together[..15], together[15..30]);
    let latents = |seeds: &[u64]| draw_latents(&device, &[3, 5], seeds).unwrap();
    assert_eq!(latents(&[8, 3]).to_vec::<f32>().unwrap()[15..], latents(&[3]).to_vec::<f32>().unwrap());
    let fresh = |seeds: &[u64], step| {
        SeededNoise { seeds: seeds.to_vec() }.noise(step, &latents(seeds)).unwrap().to_vec::<f32>().unwrap()
    };
    assert_eq!(fresh(&[8, 3], 2)[15..], fresh(&[3], 2));
    assert_ne!(fresh(&[3], 2), fresh(&[3], 1));
    assert_ne!(fresh(&[3], 0), latents(&[3]).to_vec::<f32>().unwrap());
    let times =
        |samples: &[u64]| draw_timesteps(&Process::Flow, TimeDensity::Uniform, 1, 9, samples).unwrap();
    assert_eq!(times(&[4, 5, 6])[1..], times(&[5, 6]));
    assert_eq!(draw_label_drops(0.5, 1, 9, &[4, 5, 6, 7])[2..], draw_label_drops(0.5, 1, 9, &[6, 7]));
}

#[test]
fn timesteps_have_the_density_that_was_asked_for() {
    let samples: Vec<u64> = (0..20_000).collect();
    let count = samples.len() as f64;
    let moments = |values: Vec<f64>| {
        let mean = values.iter().sum::<f64>() / count;
        (mean, (values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / count).sqrt())
    };
    let chain = draw_timesteps(&diffusion(), TimeDensity::Uniform, 3, 0, &samples).unwrap();
    assert!(chain.iter().all(|time| time.fract() == 0.0 && (0.0..1000.0).contains(time)));
    assert!(chain.contains(&0.0) && chain.contains(&999.0));
    // Uniform over 0..1000: mean 500, deviation 288.7; four standard errors of each.
    for times in [chain, draw_timesteps(&Process::Flow, TimeDensity::Uniform, 3, 0, &samples).unwrap()] {
        let (mean, deviation) = moments(times);
        assert!((mean - 500.0).abs() < 8.2 && (deviation - 288.7).abs() < 3.7, "{mean} {deviation}");
    }
    let density = TimeDensity::LogitNormal { mean: 0.5, standard_deviation: 1.5 };
    let times = draw_timesteps(&Process::Flow, density, 3, 0, &samples).unwrap();
    let (mean, deviation) = moments(times.iter().map(|time| (time / (1000.0 - time)).ln()).collect());
    assert!((mean - 0.5).abs() < 0.043 && (deviation - 1.5).abs() < 0.03, "{mean} {deviation}");
    assert!(draw_timesteps(&diffusion(), density, 3, 0, &samples).is_err());

    let drops = draw_label_drops(0.1, 3, 0, &samples).into_iter().filter(|drop| *drop).count();
    assert!((1830..2170).contains(&drops), "{drops} of 20000 dropped at 0.1");
    assert!(!draw_label_drops(0.0, 3, 0, &samples).contains(&true));
}

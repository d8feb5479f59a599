//! The schedule's tables and respacings against published ones.

use anneal_diffusion::{BetaSchedule, Prediction, Process, Schedule, respaced_steps};
use anneal_testkit::{Golden, Tolerance, assert_close};

fn files() -> Vec<Golden> {
    Golden::matching_with("diffusion_tables", "linear.betas")
}

/// Each value against its own size: a table spans many orders of magnitude.
fn assert_each_close(name: &str, got: &[f64], expected: &[f64], tolerance: Tolerance) {
    assert_eq!(got.len(), expected.len(), "{name}");
    for (index, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert_close(&format!("{name}[{index}]"), &[*got], &[*expected], tolerance);
    }
}

fn schedule(kind: &str, steps: usize) -> Schedule {
    let kind = match kind {
        "linear" => BetaSchedule::linear(steps),
        "squaredcos_cap_v2" => BetaSchedule::SquaredCosine,
        other => panic!("no schedule is called {other}"),
    };
    Schedule::new(kind, steps).unwrap()
}

#[test]
fn every_constant_of_every_schedule_equals_the_published_table() {
    for golden in files() {
        let kinds: Vec<String> = golden
            .names("")
            .iter()
            .filter(|name| !name.starts_with("respace."))
            .filter_map(|name| name.strip_suffix(".betas").map(String::from))
            .collect();
        assert!(!kinds.is_empty());
        for kind in kinds {
            let table = |name: &str| golden.f64(&format!("{kind}.{name}")).0;
            let betas = table("betas");
            let schedule = schedule(&kind, betas.len());
            let check = |name: &str, got: &[f64], tolerance| {
                assert_each_close(&format!("{kind}.{name}"), got, &table(name), tolerance);
            };
            check("betas", &schedule.betas, Tolerance::Exact);
            check("alphas_cumprod", &schedule.alphas_cumprod, Tolerance::Table);
            check("posterior_variance", &schedule.posterior_variance, Tolerance::Table);
            let log_variance = &schedule.posterior_log_variance_clipped;
            check("posterior_log_variance_clipped", log_variance, Tolerance::Table);
            check("posterior_mean_coef1", &schedule.posterior_mean_clean, Tolerance::Table);
            check("posterior_mean_coef2", &schedule.posterior_mean_sample, Tolerance::Table);
            let process = Process::Diffusion(schedule);
            let pairs: Vec<_> = (0..betas.len())
                .map(|index| Prediction::Epsilon.clean(process.level(index as f64).unwrap()))
                .collect();
            let of_sample: Vec<f64> = pairs.iter().map(|pair| pair.first).collect();
            let of_output: Vec<f64> = pairs.iter().map(|pair| -pair.second).collect();
            check("sqrt_recip_alphas_cumprod", &of_sample, Tolerance::Table);
            check("sqrt_recipm1_alphas_cumprod", &of_output, Tolerance::Table);
        }
    }
}

#[test]
fn every_respacing_visits_the_published_steps_with_the_published_betas() {
    for golden in files() {
        let specifications: Vec<String> = golden
            .names("respace.")
            .iter()
            .filter_map(|name| name.strip_prefix("respace.")?.strip_suffix(".timesteps").map(String::from))
            .collect();
        assert!(!specifications.is_empty());
        let chain = schedule("linear", golden.shape("linear.betas")[0]);
        for specification in specifications {
            let steps = respaced_steps(chain.len(), &specification).unwrap();
            let respaced = chain.respaced(&steps).unwrap();
            let timesteps: Vec<f64> = respaced.timesteps.iter().map(|step| *step as f64).collect();
            let expected = golden.i64(&format!("respace.{specification}.timesteps")).0;
            let expected: Vec<f64> = expected.into_iter().map(|step| step as f64).collect();
            assert_close(&specification, &timesteps, &expected, Tolerance::Exact);
            let betas = golden.f64(&format!("respace.{specification}.betas")).0;
            assert_each_close(&specification, &respaced.betas, &betas, Tolerance::Table);
        }
    }
}

#[test]
fn a_respacing_that_cannot_be_is_refused_with_its_reason() {
    let message = |text: &str| respaced_steps(1000, text).unwrap_err().to_string();
    assert_eq!(
        message("ddim300"),
        "respacing 'ddim300': no whole stride visits exactly 300 steps of a chain of 1000"
    );
    assert_eq!(message("600,10"), "respacing '600,10': a section of 500 steps cannot be visited 600 times");
    assert!(message("ten").contains("'ten' is not a count; write \"250\""));
    assert!(message("0").contains("'0' is not a count"));
    assert!(message("").contains("'' is not a count"));
}

#[test]
fn a_schedule_out_of_range_is_refused() {
    let message = |start, end, steps| {
        Schedule::new(BetaSchedule::Linear { start, end }, steps).unwrap_err().to_string()
    };
    assert_eq!(message(0.1, 1.5, 3), "noise schedule: beta at step 2 is 1.5; it must lie between 0 and 1");
    assert!(message(1e-4, 0.02, 0).contains("at least one step"));
    let chain = Schedule::new(BetaSchedule::SquaredCosine, 10).unwrap();
    assert!(chain.respaced(&[3, 2]).unwrap_err().to_string().contains("[3, 2] are not ascending"));
    assert!(chain.respaced(&[3, 10]).is_err());
    let process = Process::Diffusion(chain);
    assert_eq!(process.level(9.5).unwrap_err().to_string(), "timestep 9.5 is outside 0 to 9 of this process");
    assert!(process.level(f64::NAN).is_err());
}

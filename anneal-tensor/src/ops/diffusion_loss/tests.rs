use anneal_tensor::ops::{DiffusionLossRow, VariationalRow, diffusion_loss};
use anneal_tensor::{DType, Device, Tape, Tensor, ops};
use anneal_testkit::{Array, check_op, on_every_device};

const DIMS: [usize; 4] = [3, 3, 5, 1];

fn plain_rows() -> Vec<DiffusionLossRow> {
    [(0.0, 1.0, 1.0), (-0.6, 0.8, 0.25), (1.0, 0.0, 2.5)]
        .map(|(target_clean, target_noise, error_weight)| DiffusionLossRow {
            target_clean,
            target_noise,
            error_weight,
            variational: None,
        })
        .to_vec()
}

fn variational_rows() -> Vec<DiffusionLossRow> {
    let parts = [(1.0, 0.3, -2.0, 0.7, false), (0.5, -0.2, -3.5, 0.4, false), (1.0, -0.02, -6.0, 3.0, true)];
    let variational = parts.map(|(weight, mean_slope, log_variance_low, log_variance_range, decoder)| {
        VariationalRow { weight, mean_slope, log_variance_low, log_variance_range, decoder }
    });
    let rows = plain_rows().into_iter().zip(variational);
    rows.map(|(row, part)| DiffusionLossRow { variational: Some(part), ..row }).collect()
}

/// Pixels within -1..1, with some in the two end bins of the decoder.
fn pixels() -> Array {
    let mut clean = Array::uniform(1, &DIMS, -1.3, 1.3);
    clean.values.iter_mut().for_each(|value| *value = f64::from(value.clamp(-1.0, 1.0) as f32));
    clean
}

fn tensor(device: &Device, array: &Array) -> Tensor {
    let values: Vec<f32> = array.values.iter().map(|value| *value as f32).collect();
    Tensor::from_slice(device, &values, &array.dims).unwrap()
}

fn squared_errors(output: &Array, rows: &[DiffusionLossRow]) -> Vec<f64> {
    let (clean, noise) = (pixels(), Array::normal(2, &DIMS));
    let size = clean.values.len() / rows.len();
    rows.iter()
        .enumerate()
        .map(|(sample, row)| {
            let square = |place: usize| {
                let target = row.target_clean * clean.values[place] + row.target_noise * noise.values[place];
                (output.values[place] - target).powi(2)
            };
            row.error_weight * (sample * size..(sample + 1) * size).map(square).sum::<f64>() / size as f64
        })
        .collect()
}

#[test]
fn the_weighted_error_of_every_target_has_the_value_and_gradient_of_its_formula() {
    let rows = plain_rows();
    let (clean, noise) = (pixels(), Array::normal(2, &DIMS));
    check_op(
        "diffusion_loss",
        &[Array::normal(3, &DIMS)],
        |t| {
            let (clean, noise) = (tensor(t[0].device(), &clean), tensor(t[0].device(), &noise));
            Ok(vec![diffusion_loss(&t[0], &clean, &noise, &rows)?.total])
        },
        |t| vec![Array::new(&[3], squared_errors(&t[0], &rows))],
    );
}

#[test]
fn the_variational_term_has_the_value_and_variance_gradient_of_its_formula() {
    let rows = variational_rows();
    let (clean, noise) = (pixels(), Array::normal(2, &DIMS));
    // Multiples of 1/64, so that every dtype holds the same prediction.
    let mut prediction = Array::normal(3, &DIMS);
    prediction.values.iter_mut().for_each(|value| *value = (*value * 64.0).round() / 64.0);
    check_op(
        "diffusion_loss with variance",
        &[Array::normal(4, &DIMS)],
        |t| {
            let prediction = ops::cast(&tensor(t[0].device(), &prediction), t[0].dtype())?;
            let output = ops::concat(&[&prediction, &t[0]], 1)?;
            let (clean, noise) = (tensor(t[0].device(), &clean), tensor(t[0].device(), &noise));
            Ok(vec![diffusion_loss(&output, &clean, &noise, &rows)?.total])
        },
        |t| {
            let size = clean.values.len() / rows.len();
            let mut losses = squared_errors(&prediction, &rows);
            for (place, variance) in t[0].values.iter().enumerate() {
                let (row, pixel) = (&rows[place / size], clean.values[place]);
                let part = row.variational.unwrap();
                let target = row.target_clean * pixel + row.target_noise * noise.values[place];
                let offset = part.mean_slope * (target - prediction.values[place]);
                let log_variance = part.log_variance_low + (variance + 1.0) / 2.0 * part.log_variance_range;
                let nats = if part.decoder {
                    decoder_cost(pixel, offset, (0.5 * log_variance).exp())
                } else {
                    gaussian_divergence(offset, part.log_variance_low, log_variance)
                };
                losses[place / size] += part.weight * nats / (size as f64 * std::f64::consts::LN_2);
            }
            vec![Array::new(&[3], losses)]
        },
    );
}

#[test]
fn the_prediction_is_trained_by_the_squared_error_alone() {
    on_every_device("the gradient of the prediction", |device| {
        let (clean, noise) = (tensor(device, &pixels()), tensor(device, &Array::normal(2, &DIMS)));
        let prediction = tensor(device, &Array::normal(3, &DIMS));
        let gradient = |rows: &[DiffusionLossRow], learned: bool| {
            let tape = Tape::new();
            let variable = tape.variable(&prediction);
            let output = match learned {
                true => ops::concat(&[&variable, &tensor(device, &Array::normal(4, &DIMS))], 1).unwrap(),
                false => variable.clone(),
            };
            let total = diffusion_loss(&output, &clean, &noise, rows).unwrap().total;
            let upstream = Tensor::from_slice(device, &[1.0f32, -2.0, 0.5], &[3]).unwrap();
            tape.backward_from(vec![(total, upstream)]).unwrap();
            tape.take_gradient(&variable).unwrap().to_vec::<f32>().unwrap()
        };
        assert_eq!(gradient(&variational_rows(), true), gradient(&plain_rows(), false));
    });
}

/// KL(N(offset, e^a) || N(0, e^b)).
fn gaussian_divergence(offset: f64, a: f64, b: f64) -> f64 {
    0.5 * (b - a - 1.0 + (a - b).exp() + offset * offset / b.exp())
}

fn decoder_cost(pixel: f64, offset: f64, scale: f64) -> f64 {
    let cdf =
        |x: f64| 0.5 * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh());
    let upper = if pixel > 0.999 { 1.0 } else { cdf((offset + 1.0 / 255.0) / scale) };
    let lower = if pixel < -0.999 { 0.0 } else { cdf((offset - 1.0 / 255.0) / scale) };
    -(upper - lower).max(1e-12).ln()
}

#[test]
fn error_and_variational_term_are_reported_without_their_weights() {
    on_every_device("the parts of the diffusion loss", |device| {
        let rows = variational_rows();
        let output = tensor(device, &Array::normal(3, &[3, 6, 5, 1]));
        let (clean, noise) = (tensor(device, &pixels()), tensor(device, &Array::normal(2, &DIMS)));
        let loss = diffusion_loss(&output, &clean, &noise, &rows).unwrap();
        let [total, error, variational] =
            [&loss.total, &loss.error, &loss.variational].map(|loss| loss.to_vec::<f32>().unwrap());
        for (index, row) in rows.iter().enumerate() {
            let weight = row.variational.unwrap().weight as f32;
            let expected = row.error_weight as f32 * error[index] + weight * variational[index];
            assert!(
                (total[index] - expected).abs() <= 1e-6 * expected.abs(),
                "{} for {expected}",
                total[index]
            );
            assert!(error[index] > 0.0 && variational[index] > 0.0);
        }
    });
}

#[test]
fn wrong_shapes_and_half_learned_rows_are_refused_by_name() {
    let device = Device::cpu(Some(1), None);
    let zeros = |dims: &[usize]| Tensor::zeros(&device, dims, DType::F32).unwrap();
    let (clean, noise) = (zeros(&DIMS), zeros(&DIMS));
    let message = |output: &[usize], noise: &Tensor, rows: &[DiffusionLossRow]| {
        diffusion_loss(&zeros(output), &clean, noise, rows).err().unwrap().to_string()
    };
    let rows = variational_rows();
    assert_eq!(
        message(&DIMS, &noise, &rows),
        "diffusion_loss: the model's output is [3, 3, 5, 1]; with a learned variance [3, 6, 5, 1]"
    );
    assert_eq!(
        message(&[3, 6, 5, 1], &noise, &plain_rows()),
        "diffusion_loss: the model's output is [3, 6, 5, 1]; without a learned variance [3, 3, 5, 1]"
    );
    assert!(message(&DIMS, &zeros(&[3, 3, 5]), &plain_rows()).contains("noise [3, 3, 5] and 3 rows"));
    assert!(message(&DIMS, &noise, &rows[..2]).contains("2 rows"));
    let mixed = [rows[0], plain_rows()[1], rows[2]];
    assert!(message(&DIMS, &noise, &mixed).contains("in all rows or in none"));
}

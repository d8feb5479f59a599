use anneal_tensor::rng::{Purpose, Stream};
use anneal_tensor::{DType, Device, Tape, Tensor, ops};
use anneal_testkit::{Array, on_every_device};

fn streams(count: u64) -> Vec<Stream> {
    // Seeds, steps and samples whose upper words are in use too.
    (0..count)
        .map(|row| Stream::new(5 + (row << 33), Purpose::Test, row << 20, 3 * row + (1 << 35)))
        .collect()
}

fn assert_near(got: &[f32], expected: &[f32]) {
    assert_eq!(got.len(), expected.len());
    for (place, (a, b)) in got.iter().zip(expected).enumerate() {
        assert!((a - b).abs() <= 1e-6 * b.abs().max(1.0), "element {place}: {a} for {b}");
    }
}

#[test]
fn rows_are_the_draws_of_their_streams_on_every_device() {
    on_every_device("normal_rows", |device| {
        // Rows of several blocks, rows that are no multiple of a block of words, and many rows.
        for (rows, sizes) in
            [(3, &[4, 32, 33][..]), (5, &[7]), (2, &[1]), (4, &[]), (70_000, &[3]), (0, &[4])]
        {
            let streams = streams(rows);
            let row: usize = sizes.iter().product();
            let mut expected = vec![0.0; streams.len() * row];
            for (part, stream) in expected.chunks_mut(row).zip(&streams) {
                stream.clone().fill_normal(part);
            }
            let noise = ops::normal_rows(device, sizes, &streams).unwrap();
            assert_eq!(&noise.dims()[1..], sizes);
            assert_near(&noise.to_vec::<f32>().unwrap(), &expected);
        }
    });
}

#[test]
fn a_stream_goes_on_from_its_position() {
    on_every_device("normal_rows of a stream in use", |device| {
        let mut stream = streams(1).remove(0);
        stream.fill_normal(&mut [0.0; 12]);
        let mut expected = [0.0; 9];
        stream.clone().fill_normal(&mut expected);
        let noise = ops::normal_rows(device, &[9], &[stream]).unwrap();
        assert_near(&noise.to_vec::<f32>().unwrap(), &expected);
    });
}

#[test]
fn noised_is_the_combination_of_clean_and_noise() {
    on_every_device("noised", |device| {
        for sizes in [&[3, 4, 16, 17][..], &[3, 5], &[3]] {
            let values: Vec<f32> = Array::normal(1, sizes).values.iter().map(|value| *value as f32).collect();
            let clean = Tensor::from_slice(device, &values, sizes).unwrap();
            let (alphas, sigmas) = ([1.0, 0.6, -0.25], [0.0, 0.8, 2.0]);
            let (noise, noised) = ops::noised(&clean, &streams(3), &alphas, &sigmas).unwrap();
            assert_eq!((noise.dims(), noised.dims()), (sizes, sizes));
            let drawn = ops::normal_rows(device, &sizes[1..], &streams(3)).unwrap().to_vec::<f32>().unwrap();
            let noise = noise.to_vec::<f32>().unwrap();
            assert_eq!(noise, drawn);
            let row = noise.len() / 3;
            let mix = |place: usize| alphas[place / row] * values[place] + sigmas[place / row] * noise[place];
            let expected: Vec<f32> = (0..noise.len()).map(mix).collect();
            assert_near(&noised.to_vec::<f32>().unwrap(), &expected);
        }
    });
}

#[test]
fn what_does_not_fit_is_named() {
    let device = Device::cpu(Some(1), None);
    let clean = Tensor::zeros(&device, &[2, 3], DType::F32).unwrap();
    let message = ops::noised(&clean, &streams(2), &[1.0], &[0.0, 1.0]).err().unwrap().to_string();
    assert!(message.contains("2 streams, 1 alphas and 2 sigmas for [2, 3]"), "{message}");
    let whole = Tensor::zeros(&device, &[2, 3], DType::I64).unwrap();
    let message = ops::noised(&whole, &streams(2), &[1.0; 2], &[0.0; 2]).err().unwrap().to_string();
    assert!(message.contains("noised: dtype i64"), "{message}");
    let tracked = Tape::new().variable(&clean);
    let message = ops::noised(&tracked, &streams(2), &[1.0; 2], &[0.0; 2]).err().unwrap().to_string();
    assert!(message.contains("noised has no gradient"), "{message}");
}

//! The order of batches, resuming, ranks, augmentations and the cache.

mod common;

use anneal_data::npz::{Array, Values, write_npz};
use anneal_data::{BUILTIN_DIGITS, Batch, Crop, Cursor, Dataset, LoaderConfig, SourceConfig, open};
use common::{batches, class_folder, loader, open_path, write};
use std::sync::Arc;

fn digits() -> Arc<dyn Dataset> {
    open(&SourceConfig { path: BUILTIN_DIGITS.to_owned(), ..SourceConfig::default() }).unwrap()
}

/// Everything that draws: shuffle, flip and random crop, over images of mixed sizes.
fn augmented() -> LoaderConfig {
    LoaderConfig {
        batch: 8,
        size: Some([16, 12]),
        flip: true,
        crop: Crop::Random,
        workers: 0,
        ..LoaderConfig::default()
    }
}

#[test]
fn any_number_of_workers_gives_the_same_batches() {
    let folder = tempfile::tempdir().unwrap();
    class_folder(folder.path(), 30);
    write(&folder.path().join("bee/0013.png"), "broken");
    let dataset = open_path(folder.path());
    // 12 batches of 8 are more than three epochs of 30.
    let reference = batches(&mut loader(&dataset, &augmented(), Cursor::start(5)), 12);
    for (workers, prefetch) in [(1, 1), (4, 1), (4, 5)] {
        let config = LoaderConfig { workers, prefetch, ..augmented() };
        let mut loader = loader(&dataset, &config, Cursor::start(5));
        assert!(batches(&mut loader, 12) == reference, "{workers} workers, {prefetch} ahead");
    }
}

#[test]
fn the_cache_does_not_change_a_bit_and_keeps_to_its_limit() {
    let folder = tempfile::tempdir().unwrap();
    class_folder(folder.path(), 30);
    let dataset = open_path(folder.path());
    for crop in [Crop::Center, Crop::Random] {
        let config = |cache_bytes| LoaderConfig { crop, workers: 2, cache_bytes, ..augmented() };
        let mut without = loader(&dataset, &config(0), Cursor::start(5));
        let reference = batches(&mut without, 12);
        assert_eq!(without.cached_bytes(), 0);
        for limit in [5_000, 1 << 30] {
            let mut with = loader(&dataset, &config(limit), Cursor::start(5));
            assert!(batches(&mut with, 12) == reference, "{crop:?}, {limit} bytes");
            assert!(with.cached_bytes() > 0 && with.cached_bytes() <= limit);
        }
    }
}

#[test]
fn a_cached_sample_is_not_read_again() {
    let folder = tempfile::tempdir().unwrap();
    class_folder(folder.path(), 12);
    let dataset = open_path(folder.path());
    let config = LoaderConfig { batch: 12, ..augmented() };
    let mut whole = loader(&dataset, &config, Cursor::start(1));
    let reference = batches(&mut whole, 3);
    let mut cached = loader(&dataset, &config, Cursor::start(1));
    batches(&mut cached, 1);
    std::fs::remove_dir_all(folder.path().join("ape")).unwrap();
    assert!(batches(&mut cached, 2) == reference[1..]);
    assert_eq!(cached.bad_samples(), 0);
}

#[test]
fn resuming_in_the_middle_of_an_epoch_equals_going_on() {
    let dataset = digits();
    for workers in [0, 2] {
        let config = LoaderConfig { batch: 128, flip: true, workers, prefetch: 3, ..LoaderConfig::default() };
        let reference = batches(&mut loader(&dataset, &config, Cursor::start(3)), 40);
        for stop in [0, 1, 13, 14, 15, 29] {
            let mut first = loader(&dataset, &config, Cursor::start(3));
            batches(&mut first, stop);
            let saved = serde_json::to_string(&first.cursor()).unwrap();
            drop(first);
            let mut resumed = loader(&dataset, &config, serde_json::from_str(&saved).unwrap());
            assert!(batches(&mut resumed, 40 - stop) == reference[stop..], "stopped after {stop}");
        }
    }
}

#[test]
fn the_cursor_counts_what_was_handed_out_and_epochs_run_on() {
    let dataset = digits();
    let config = LoaderConfig { batch: 1000, prefetch: 4, ..LoaderConfig::default() };
    let mut loader = loader(&dataset, &config, Cursor::start(3));
    assert_eq!(loader.cursor(), Cursor::start(3));
    let mut indices = Vec::new();
    for (epoch, position) in [(0, 1000), (1, 203), (1, 1203), (2, 406)] {
        indices.extend_from_slice(&loader.next_batch().unwrap().indices);
        assert_eq!(loader.cursor(), Cursor { seed: 3, epoch, position, samples: 1797 });
    }
    for epoch in indices.chunks_exact(1797) {
        let mut epoch = epoch.to_vec();
        epoch.sort_unstable();
        assert!(epoch.into_iter().eq(0..1797));
    }
}

#[test]
fn ranks_share_the_batches_of_one_rank() {
    let dataset = digits();
    let config = LoaderConfig { batch: 96, flip: true, ..LoaderConfig::default() };
    let mut whole = loader(&dataset, &config, Cursor::start(2));
    let mut ranks: Vec<_> = (0..3)
        .map(|rank| loader(&dataset, &LoaderConfig { rank, world: 3, ..config.clone() }, Cursor::start(2)))
        .collect();
    for _ in 0..25 {
        let expected = whole.next_batch().unwrap().clone();
        let parts: Vec<Batch> = ranks.iter_mut().map(|rank| rank.next_batch().unwrap().clone()).collect();
        let joined = |field: fn(&Batch) -> Vec<f32>| parts.iter().flat_map(field).collect::<Vec<f32>>();
        assert_eq!(joined(|part| part.images.clone()), expected.images);
        assert_eq!(joined(|part| part.labels.iter().map(|label| *label as f32).collect()).len(), 96);
        assert!(parts.iter().flat_map(|part| &part.indices).eq(&expected.indices));
        assert!(parts.iter().flat_map(|part| &part.labels).eq(&expected.labels));
        assert!(ranks.iter().all(|rank| rank.cursor() == whole.cursor()));
    }
}

#[test]
fn without_shuffle_the_order_is_the_data_sets() {
    let dataset = digits();
    let config = LoaderConfig { batch: 5, shuffle: false, ..LoaderConfig::default() };
    let mut loader = loader(&dataset, &config, Cursor::start(2));
    let batch = loader.next_batch().unwrap();
    assert_eq!(batch.indices, [0, 1, 2, 3, 4]);
    assert_eq!(batch.labels, [0, 1, 2, 3, 4]);
    assert_eq!((batch.channels, batch.height, batch.width), (1, 8, 8));
    let anneal_data::Content::Pixels(pixels) = dataset.load(3).unwrap().content else { panic!("not pixels") };
    let expected: Vec<f32> = pixels.bytes.iter().map(|byte| f32::from(*byte) / 127.5 - 1.0).collect();
    assert_eq!(batch.images[3 * 64..4 * 64], expected);
}

#[test]
fn flips_mirror_half_of_the_samples_anew_in_each_epoch() {
    let dataset = digits();
    let config = |flip| LoaderConfig { batch: 1797, flip, shuffle: false, ..LoaderConfig::default() };
    let plain = batches(&mut loader(&dataset, &config(false), Cursor::start(2)), 1).remove(0);
    let epochs = batches(&mut loader(&dataset, &config(true), Cursor::start(2)), 2);
    let mut flipped = epochs.iter().map(|epoch| {
        (0..1797)
            .map(|index| {
                let rows = |batch: &Batch| batch.images[index * 64..(index + 1) * 64].to_vec();
                let (plain, ours) = (rows(&plain), rows(epoch));
                let mirror: Vec<f32> = plain.chunks(8).flat_map(|row| row.iter().rev().copied()).collect();
                assert!(ours == plain || ours == mirror, "sample {index}");
                ours != plain
            })
            .collect::<Vec<bool>>()
    });
    let (first, second) = (flipped.next().unwrap(), flipped.next().unwrap());
    let count = first.iter().filter(|flipped| **flipped).count();
    // Four standard deviations of a fair coin thrown 1797 times are 85.
    assert!(count.abs_diff(898) < 85, "{count}");
    let both = first.iter().zip(&second).filter(|(first, second)| first == second).count();
    assert!(both.abs_diff(898) < 85, "{both}");
}

#[test]
fn random_crops_reach_every_position_evenly() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.npz");
    // A value says its column: 4 wide at height 1, so a crop of 1 x 1 has four places.
    let image: Vec<u8> = vec![0, 85, 170, 255];
    write_npz(&path, &[("images", &Array::new([1, 1, 4, 1], Values::U8(image)))]).unwrap();
    let config =
        LoaderConfig { batch: 400, crop: Crop::Random, size: Some([1, 1]), ..LoaderConfig::default() };
    let batch = batches(&mut loader(&open_path(&path), &config, Cursor::start(2)), 1).remove(0);
    for place in 0..4 {
        let value = place as f32 * 85.0 / 127.5 - 1.0;
        let count = batch.images.iter().filter(|image| (**image - value).abs() < 1e-6).count();
        // Four standard deviations of 400 draws at 1/4 are 35.
        assert!(count.abs_diff(100) < 35, "place {place}: {count}");
    }
}

#[test]
fn buffers_are_used_again() {
    let dataset = digits();
    for workers in [0, 2] {
        let config = LoaderConfig { batch: 64, workers, prefetch: 2, ..LoaderConfig::default() };
        let mut loader = loader(&dataset, &config, Cursor::start(2));
        let mut addresses: Vec<*const f32> =
            (0..60).map(|_| loader.next_batch().unwrap().images.as_ptr()).collect();
        addresses.sort_unstable();
        addresses.dedup();
        // The batches ahead, the one being made in place of the last, and the one that is lent.
        assert!(addresses.len() <= 4, "{} buffers", addresses.len());
    }
}

#[test]
fn dropping_a_loader_ends_its_workers_at_any_time() {
    let dataset = digits();
    for taken in 0..4 {
        let config = LoaderConfig { batch: 32, workers: 3, prefetch: 2, ..LoaderConfig::default() };
        let mut loader = loader(&dataset, &config, Cursor::start(2));
        batches(&mut loader, taken);
        drop(loader);
        assert_eq!(Arc::strong_count(&dataset), 1, "a worker still holds the data");
    }
}

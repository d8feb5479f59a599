//! A recipe's data pipeline: alone, and as a brake on training.

use std::time::Instant;

use anneal_data::npz::{self, Array, Values};
use anneal_data::{Cursor, Loader};
use anneal_recipe::{DataKind, Recipe};
use anneal_train::report::summary::{Align, Table};
use anneal_train::settings;
use anneal_train::trainer::Trainer;
use anyhow::Result;
use serde_json::json;

use super::model::normals;
use super::{median, scratch};
use crate::cli::BenchData;

pub fn data(arguments: &BenchData) -> Result<()> {
    let recipe = Recipe::load(&arguments.recipe, &arguments.overrides)?;
    let dataset = anneal_data::open(&settings::data_source(&recipe))?;
    let samples = dataset.len();
    let mut loader = Loader::new(dataset, &settings::loader(&recipe), Cursor::start(recipe.seed))?;
    let epoch = samples.div_ceil(recipe.train.batch).min(arguments.batches);
    let first = drain(&mut loader, epoch)?;
    let second = drain(&mut loader, epoch)?;
    drop(loader);

    let folder = scratch()?;
    let mut own = Trainer::new(&recipe)?;
    let mut ready = Trainer::new(&ready_recipe(&recipe, folder.path())?)?;
    let mut times = [Vec::new(), Vec::new()];
    // In turns, so that the machine's moods meet both alike; the first round warms up.
    for round in 0..=arguments.batches {
        for (trainer, times) in [&mut own, &mut ready].into_iter().zip(&mut times) {
            let mut outcomes = Vec::new();
            trainer.step(&mut outcomes)?;
            if round > 0 {
                times.extend(outcomes.iter().map(|outcome| outcome.seconds));
            }
        }
    }
    let [own, ready] =
        times.map(|times| (median(&times) * 1e3, times.iter().sum::<f64>() / times.len() as f64 * 1e3));
    let batch = recipe.train.batch as f64;
    let rate = |milliseconds: f64| batch / milliseconds * 1e3;
    if arguments.json {
        println!(
            "{}",
            json!({
                "samples": samples, "loader_first_epoch_per_second": first * batch, "loader_later_per_second": second * batch,
                "step_ms": own.0, "step_mean_ms": own.1, "ready_step_ms": ready.0, "ready_step_mean_ms": ready.1,
                "share_of_ready": ready.1 / own.1,
            })
        );
        return Ok(());
    }
    let mut table = Table::new([("images/s", Align::Left), ("", Align::Right)]);
    table.row(["loader alone, first pass".to_owned(), format!("{:.0}", first * batch)]);
    table.row(["loader alone, later".to_owned(), format!("{:.0}", second * batch)]);
    table.row(["training on this data (mean)".to_owned(), format!("{:.1}", rate(own.1))]);
    table.row(["training on ready tensors (mean)".to_owned(), format!("{:.1}", rate(ready.1))]);
    print!("{table}");
    println!("training reaches {:.1} % of the rate with ready tensors", ready.1 / own.1 * 100.0);
    Ok(())
}

/// Batches a second over so many batches.
fn drain(loader: &mut Loader, batches: usize) -> Result<f64> {
    let start = Instant::now();
    for _ in 0..batches {
        loader.next_batch()?;
    }
    Ok(batches as f64 / start.elapsed().as_secs_f64())
}

/// The same training over ready random tensors.
fn ready_recipe(recipe: &Recipe, folder: &std::path::Path) -> Result<Recipe> {
    let size = recipe.data.image_size;
    let count = 2 * recipe.train.batch;
    let dims = [count, size.height, size.width, recipe.data.channels];
    let path = folder.join("ready.npz");
    let labels = (0..count as i64).map(|index| index % recipe.model.classes() as i64).collect();
    let images = Array::new(dims, Values::F32(normals(1, dims.iter().product())));
    npz::write_npz(&path, &[("images", &images), ("labels", &Array::new([count], Values::I64(labels)))])?;
    let mut ready = recipe.clone();
    ready.data.kind = DataKind::Npz;
    ready.data.path = Some(path);
    ready.data.range = None;
    ready.data.scale = 1.0;
    ready.data.flip = false;
    ready.data.images = None;
    ready.data.labels = None;
    Ok(ready)
}

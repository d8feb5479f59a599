//! A recipe's data: opened, compared with the model, and described.

use std::fmt;

use anneal_data::{Cursor, Dataset, Holds, Loader};
use anneal_models::dit::DitConfig;
use anneal_recipe::{Data, DataKind, Recipe};

use crate::error::{Result, TrainError};
use crate::report::summary;
use crate::settings;

/// A loader of the recipe's data from a cursor on.
///
/// # Errors
/// Data that cannot be read or is not what the recipe says.
pub(crate) fn open_loader(recipe: &Recipe, cursor: Cursor) -> Result<Loader> {
    let dataset = anneal_data::open(&settings::data_source(recipe))?;
    Ok(Loader::new(dataset, &settings::loader(recipe), cursor)?)
}

/// # Errors
/// If the model cannot be trained on the images as they come.
pub(crate) fn check(recipe: &Recipe, config: &DitConfig, loader: &Loader) -> Result<()> {
    let [height, width] = config.image_size;
    let expected = [config.channels, height, width];
    if loader.shape() != expected {
        let message = format!(
            "the model sees images of {expected:?} (channels, height, width), but the data gives {:?}: set data.image_size and data.channels, or model.image_size and model.channels",
            loader.shape()
        );
        return Err(TrainError::Settings { message });
    }
    if !recipe.train.batch.is_multiple_of(recipe.train.accumulate) {
        let message = format!(
            "train.batch {} is not a multiple of train.accumulate {}",
            recipe.train.batch, recipe.train.accumulate
        );
        return Err(TrainError::Settings { message });
    }
    Ok(())
}

/// What is in the data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataSummary {
    source: String,
    samples: usize,
    holds: Holds,
    /// Of the labels; 0 if there are none.
    classes: usize,
    model_classes: usize,
}

impl DataSummary {
    /// Opens the data as training does, without starting to read it; with what is odd about it.
    ///
    /// # Errors
    /// Those with which training would end before its first step.
    pub fn open(recipe: &Recipe) -> Result<(Self, Vec<String>)> {
        let mut recipe = recipe.clone();
        recipe.data.workers = 0;
        let mut loader = open_loader(&recipe, Cursor::start(recipe.seed))?;
        check(&recipe, &settings::model_config(&recipe)?, &loader)?;
        let summary = Self::new(&recipe, loader.dataset());
        let warnings = loader.take_warnings().into_iter().chain(summary.warning()).collect();
        Ok((summary, warnings))
    }

    pub(crate) fn new(recipe: &Recipe, dataset: &dyn Dataset) -> Self {
        let Data { kind, path, .. } = &recipe.data;
        let source = match (kind, path) {
            (DataKind::Digits, _) | (_, None) => "built-in digits".into(),
            (_, Some(path)) => path.display().to_string(),
        };
        // The data set itself counts as many as the recipe says.
        let of_labels = || (0..dataset.len()).map(|index| dataset.label(index) as usize + 1).max();
        let classes = match dataset.classes() {
            0 => 0,
            _ => of_labels().unwrap_or(0).max(dataset.class_names().len()),
        };
        let (samples, holds) = (dataset.len(), dataset.holds());
        Self { source, samples, holds, classes, model_classes: recipe.model.classes() }
    }

    /// If the model has classes that the data has not.
    pub(crate) fn warning(&self) -> Option<String> {
        let Self { classes, model_classes, .. } = *self;
        match classes {
            _ if model_classes <= classes.max(1) => None,
            0 => Some(format!(
                "the data has no labels, so of the {model_classes} classes of the model only class 0 is trained: give model.classes=1"
            )),
            _ => Some(format!(
                "the data has {}, so those of the model from class {classes} on are never trained: give model.classes={classes}, not {model_classes}",
                summary::plural(classes as u64, "class")
            )),
        }
    }
}

impl fmt::Display for DataSummary {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.holds {
            Holds::Images | Holds::FloatImages => "image",
            Holds::Latents => "latent",
        };
        write!(out, "{}: {}, ", self.source, summary::plural(self.samples as u64, what))?;
        match self.classes {
            0 => write!(out, "no labels"),
            classes => write!(out, "{}", summary::plural(classes as u64, "class")),
        }
    }
}

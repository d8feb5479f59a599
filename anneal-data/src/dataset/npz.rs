//! Images in one `.npz`: `images` u8, f32 or f64 [N, H, W, C] or [N, H, W], and `labels` [N].
//!
//! Held in memory. Floating-point images are used as they are (or mapped by the loader's range),
//! so they must have the model's size; 8-bit ones have 1 or 3 channels and are resized.

use super::{BUILTIN_DIGITS, Content, Dataset, Holds, Item, SourceConfig, count_classes};
use crate::DataError;
use crate::decode::Pixels;
use crate::npz::{Array, Npz, Values, shipped_digits};
use std::path::Path;

enum Images {
    Bytes(Vec<u8>),
    Floats(Vec<f32>),
}

pub(super) struct NpzDataset {
    name: String,
    shape_chw: [usize; 3],
    images: Images,
    labels: Option<Vec<i64>>,
    classes: usize,
}

impl NpzDataset {
    pub(super) fn open(config: &SourceConfig) -> Result<Self, DataError> {
        let mut arrays = if config.path == BUILTIN_DIGITS {
            Npz::parse(BUILTIN_DIGITS, shipped_digits())?
        } else {
            Npz::read(Path::new(&config.path))?
        };
        let name = config.path.clone();
        let image_array = array_name(&arrays, config.image_array.as_deref(), ["images", "arr_0"]);
        let (samples, shape_chw, images) = images(&name, &image_array, arrays.take(&image_array)?)?;
        if samples == 0 {
            return Err(DataError::Empty {
                source_name: name,
                expected: format!("the array `{image_array}` has length 0"),
            });
        }
        let label_array = array_name(&arrays, config.label_array.as_deref(), ["labels", "arr_1"]);
        let wanted = config.label_array.is_some() || arrays.contains(&label_array);
        let labels =
            wanted.then(|| labels(&name, &label_array, arrays.take(&label_array)?, samples)).transpose()?;
        let classes = match &labels {
            Some(labels) => count_classes(labels.iter().copied(), config.classes, |index| {
                format!("{name}, sample {index}")
            })?,
            None => 0,
        };
        Ok(Self { name, shape_chw, images, labels, classes })
    }
}

fn array_name(arrays: &Npz, asked: Option<&str>, [usual, numbered]: [&str; 2]) -> String {
    let found = if !arrays.contains(usual) && arrays.contains(numbered) { numbered } else { usual };
    asked.unwrap_or(found).to_owned()
}

fn images(name: &str, array: &str, images: Array) -> Result<(usize, [usize; 3], Images), DataError> {
    let (samples, shape_chw) = match *images.shape() {
        [samples, height, width] => (samples, [1, height, width]),
        [samples, height, width, channels] => (samples, [channels, height, width]),
        _ => {
            return Err(DataError::unsupported(
                name,
                format!("array `{array}` has shape {:?}; expected [N, H, W, C] or [N, H, W]", images.shape()),
            ));
        }
    };
    let shape_text = format!("{:?}", images.shape());
    let images = match images.into_values() {
        Values::U8(values) => Images::Bytes(values),
        Values::F32(values) => Images::Floats(values),
        Values::F64(values) => Images::Floats(values.into_iter().map(|value| value as f32).collect()),
        _ => {
            return Err(DataError::unsupported(
                name,
                format!("array `{array}` must hold uint8, float32 or float64"),
            ));
        }
    };
    if matches!(images, Images::Bytes(_)) && ![1, 3].contains(&shape_chw[0]) {
        return Err(DataError::unsupported(
            name,
            format!("array `{array}` has shape {shape_text}; 8-bit images are [N, H, W, C] with C = 1 or 3"),
        ));
    }
    if samples > 0 && shape_chw.contains(&0) {
        return Err(DataError::unsupported(
            name,
            format!("array `{array}` has shape {shape_text}: no pixels"),
        ));
    }
    Ok((samples, shape_chw, images))
}

fn labels(name: &str, array: &str, labels: Array, samples: usize) -> Result<Vec<i64>, DataError> {
    if labels.shape() != [samples] {
        return Err(DataError::unsupported(
            name,
            format!(
                "array `{array}` has shape {:?}; expected one label for each of {samples} images",
                labels.shape()
            ),
        ));
    }
    match labels.into_values() {
        Values::I64(values) => Ok(values),
        Values::I32(values) => Ok(values.into_iter().map(i64::from).collect()),
        Values::U8(values) => Ok(values.into_iter().map(i64::from).collect()),
        _ => Err(DataError::unsupported(name, format!("array `{array}` must hold int64, int32 or uint8"))),
    }
}

impl Dataset for NpzDataset {
    fn len(&self) -> usize {
        let elements = match &self.images {
            Images::Bytes(values) => values.len(),
            Images::Floats(values) => values.len(),
        };
        elements / self.shape_chw.iter().product::<usize>()
    }

    fn classes(&self) -> usize {
        self.classes
    }

    fn shape(&self) -> Option<[usize; 3]> {
        Some(self.shape_chw)
    }

    fn holds(&self) -> Holds {
        match self.images {
            Images::Bytes(_) => Holds::Images,
            Images::Floats(_) => Holds::FloatImages,
        }
    }

    fn sample_name(&self, index: usize) -> String {
        format!("{}, sample {index}", self.name)
    }

    fn label(&self, index: usize) -> i64 {
        self.labels.as_ref().map_or(0, |labels| labels[index])
    }

    fn load(&self, index: usize) -> Result<Item, DataError> {
        let [channels, height, width] = self.shape_chw;
        let size = channels * height * width;
        let range = index * size..(index + 1) * size;
        let content = match &self.images {
            Images::Bytes(values) => {
                Content::Pixels(Pixels { channels, height, width, bytes: values[range].to_vec() })
            }
            Images::Floats(values) => Content::Values(channels_first(&values[range], channels)),
        };
        Ok(Item { content, caption: String::new() })
    }
}

/// [pixels, channels] to [channels, pixels].
fn channels_first<T: Copy>(values: &[T], channels: usize) -> Vec<T> {
    (0..channels).flat_map(|channel| values[channel..].iter().step_by(channels).copied()).collect()
}

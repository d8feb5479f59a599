//! CIFAR-10 in its binary version: `data_batch_*.bin`, records of 3073 bytes.
//!
//! A record is the label and then 1024 red, green and blue values of a 32 x 32 image.
//! Source: the description beside the data set (Krizhevsky, "Learning multiple layers of features
//! from tiny images", 2009). The names of the classes come from `batches.meta.txt` where it is.
//! All of it (184 MB) is held in memory; `test_batch.bin` is read only when it is named itself.

use super::{Content, Dataset, Holds, Item, SourceConfig, count_classes, shard};
use crate::DataError;
use crate::decode::Pixels;
use std::path::{Path, PathBuf};

const SIDE: usize = 32;
const PLANE: usize = SIDE * SIDE;
const RECORD: usize = 1 + 3 * PLANE;
const CLASSES: usize = 10;

struct File {
    path: PathBuf,
    records: Vec<u8>,
    /// The index of the first record.
    start: usize,
}

pub(super) struct CifarDataset {
    files: Vec<File>,
    samples: usize,
    classes: usize,
    class_names: Vec<String>,
}

impl CifarDataset {
    pub(super) fn open(config: &SourceConfig) -> Result<Self, DataError> {
        let root = Path::new(&config.path);
        let paths = if root.is_dir() { batch_files(root)? } else { vec![root.to_owned()] };
        let mut files = Vec::with_capacity(paths.len());
        let mut samples = 0;
        for path in paths {
            let records = std::fs::read(&path).map_err(|error| DataError::read(&path, error))?;
            if records.len() % RECORD != 0 {
                return Err(DataError::damaged(
                    path.display().to_string(),
                    format!("its {} bytes are not a whole number of {RECORD}-byte records", records.len()),
                ));
            }
            let count = records.len() / RECORD;
            files.push(File { path, records, start: samples });
            samples += count;
        }
        if samples == 0 {
            return Err(DataError::Empty {
                source_name: config.path.clone(),
                expected: "expected data_batch_1.bin and so on, each with records of 3073 bytes".to_owned(),
            });
        }
        let names_file = root.join("batches.meta.txt");
        let class_names = std::fs::read_to_string(names_file).unwrap_or_default();
        let class_names: Vec<String> = class_names.split_whitespace().map(str::to_owned).collect();
        let mut dataset = Self { files, samples, classes: 0, class_names };
        let asked = Some(config.classes.unwrap_or(CLASSES));
        let labels = (0..samples).map(|index| i64::from(dataset.record(index)[0]));
        dataset.classes = count_classes(labels, asked, |index| dataset.sample_name(index))?;
        Ok(dataset)
    }

    fn file(&self, index: usize) -> &File {
        &self.files[self.files.partition_point(|file| file.start <= index) - 1]
    }

    fn record(&self, index: usize) -> &[u8] {
        let file = self.file(index);
        &file.records[(index - file.start) * RECORD..][..RECORD]
    }
}

fn batch_files(root: &Path) -> Result<Vec<PathBuf>, DataError> {
    let is_batch = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("data_batch_") && name.ends_with(".bin")
    };
    Ok(shard::folder_files(root)?.into_iter().filter(is_batch).collect())
}

impl Dataset for CifarDataset {
    fn len(&self) -> usize {
        self.samples
    }

    fn classes(&self) -> usize {
        self.classes
    }

    fn class_names(&self) -> &[String] {
        &self.class_names
    }

    fn shape(&self) -> Option<[usize; 3]> {
        Some([3, SIDE, SIDE])
    }

    fn holds(&self) -> Holds {
        Holds::Images
    }

    fn sample_name(&self, index: usize) -> String {
        let file = self.file(index);
        format!("{}, record {}", file.path.display(), index - file.start)
    }

    fn label(&self, index: usize) -> i64 {
        i64::from(self.record(index)[0])
    }

    fn load(&self, index: usize) -> Result<Item, DataError> {
        let planes = &self.record(index)[1..];
        let bytes = (0..PLANE)
            .flat_map(|pixel| [planes[pixel], planes[PLANE + pixel], planes[2 * PLANE + pixel]])
            .collect();
        let pixels = Pixels { channels: 3, height: SIDE, width: SIDE, bytes };
        Ok(Item { content: Content::Pixels(pixels), caption: String::new() })
    }
}

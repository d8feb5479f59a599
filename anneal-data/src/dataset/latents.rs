//! Ready latents in safetensors shards: `latents` [N, C, H, W] (f32, f16 or bf16) and `labels`
//! i64 [N].
//!
//! Samples are read at their positions, so a set may be larger than memory. All shards share
//! C, H, W and either all or none have labels. Values are given as stored, without scaling.

use super::pattern::shard_files;
use super::shard::Shard;
use super::{Content, Dataset, Holds, Item, SourceConfig, count_classes};
use crate::DataError;
use half::{bf16, f16};
use safetensors::tensor::{Dtype, Metadata, TensorInfo};

struct LatentShard {
    shard: Shard,
    element: Dtype,
    /// Where `latents` begin in the file.
    offset: u64,
    /// The index of the first sample.
    start: usize,
}

pub(super) struct LatentDataset {
    shards: Vec<LatentShard>,
    shape_chw: [usize; 3],
    samples: usize,
    labels: Option<Vec<i64>>,
    classes: usize,
}

impl LatentDataset {
    pub(super) fn open(config: &SourceConfig) -> Result<Self, DataError> {
        let mut dataset =
            Self { shards: Vec::new(), shape_chw: [0; 3], samples: 0, labels: None, classes: 0 };
        for (ordinal, path) in shard_files(&config.path, "safetensors")?.iter().enumerate() {
            dataset.add(Shard::open(path, ordinal)?)?;
        }
        if dataset.samples == 0 {
            return Err(DataError::Empty {
                source_name: config.path.clone(),
                expected: "`latents` has length 0 in every shard".to_owned(),
            });
        }
        if let Some(labels) = &dataset.labels {
            dataset.classes =
                count_classes(labels.iter().copied(), config.classes, |index| dataset.sample_name(index))?;
        }
        Ok(dataset)
    }

    fn add(&mut self, shard: Shard) -> Result<(), DataError> {
        let name = shard.path().display().to_string();
        let (metadata, data_start) = read_header(&shard, &name)?;
        let latents = metadata.info("latents").ok_or_else(|| missing(&name, &metadata, "latents"))?;
        let [count, channels, height, width] = latents.shape[..] else {
            return Err(DataError::unsupported(
                name,
                format!("`latents` has shape {:?}; expected [N, C, H, W]", latents.shape),
            ));
        };
        let element_bytes = element_bytes(latents.dtype).ok_or_else(|| {
            let detail = format!("`latents` holds {:?}; expected F32, F16 or BF16", latents.dtype);
            DataError::unsupported(&name, detail)
        })?;
        check_extent(&name, "latents", latents, element_bytes)?;
        if channels * height * width == 0 {
            let detail = format!("`latents` has shape {:?}: its samples are empty", latents.shape);
            return Err(DataError::unsupported(name, detail));
        }
        let shape_chw = [channels, height, width];
        if self.shards.is_empty() {
            self.shape_chw = shape_chw;
        } else if self.shape_chw != shape_chw {
            return Err(DataError::unsupported(
                name,
                format!("`latents` has samples of {shape_chw:?}; the first shard has {:?}", self.shape_chw),
            ));
        }
        let labels = metadata
            .info("labels")
            .map(|info| read_labels(&shard, &name, info, data_start, count))
            .transpose()?;
        self.add_labels(&name, labels)?;
        let offset = data_start + latents.data_offsets.0 as u64;
        self.shards.push(LatentShard { shard, element: latents.dtype, offset, start: self.samples });
        self.samples += count;
        Ok(())
    }

    fn add_labels(&mut self, name: &str, labels: Option<Vec<i64>>) -> Result<(), DataError> {
        if self.shards.is_empty() {
            self.labels = labels;
            return Ok(());
        }
        match (&mut self.labels, labels) {
            (Some(all), Some(labels)) => all.extend(labels),
            (None, None) => {}
            (Some(_), None) => {
                return Err(DataError::unsupported(name, "has no `labels`, but the shards before it have"));
            }
            (None, Some(_)) => {
                return Err(DataError::unsupported(name, "has `labels`, but the shards before it have none"));
            }
        }
        Ok(())
    }

    fn shard(&self, index: usize) -> &LatentShard {
        &self.shards[self.shards.partition_point(|shard| shard.start <= index) - 1]
    }
}

/// The tensors of a file and the position of their data, checked against its length.
fn read_header(shard: &Shard, name: &str) -> Result<(Metadata, u64), DataError> {
    const LENGTH_BYTES: u64 = 8;
    let short = |_| DataError::damaged(name, "it ends within its header");
    let length = shard.read(0, LENGTH_BYTES as usize).map_err(short)?;
    let length = length.try_into().map(u64::from_le_bytes).expect("eight bytes were read");
    if length > shard.len().saturating_sub(LENGTH_BYTES) {
        return Err(DataError::damaged(name, "it ends within its header, or is not a safetensors file"));
    }
    let header = shard.read(LENGTH_BYTES, length as usize).map_err(short)?;
    let metadata: Metadata = serde_json::from_slice(&header)
        .map_err(|error| DataError::damaged(name, format!("its header cannot be read ({error})")))?;
    let data_start = LENGTH_BYTES + length;
    let expected = data_start + metadata.data_len() as u64;
    if shard.len() != expected {
        return Err(DataError::damaged(
            name,
            format!("its header describes {expected} bytes, and it has {}", shard.len()),
        ));
    }
    Ok((metadata, data_start))
}

fn element_bytes(dtype: Dtype) -> Option<usize> {
    match dtype {
        Dtype::F32 => Some(4),
        Dtype::F16 | Dtype::BF16 => Some(2),
        _ => None,
    }
}

/// The extent that the header gives a tensor must be what its shape needs.
fn check_extent(name: &str, tensor: &str, info: &TensorInfo, element_bytes: usize) -> Result<(), DataError> {
    let needed = info.shape.iter().try_fold(element_bytes, |size, dimension| size.checked_mul(*dimension));
    if needed != info.data_offsets.1.checked_sub(info.data_offsets.0) {
        return Err(DataError::damaged(name, format!("the shape of `{tensor}` contradicts its size")));
    }
    Ok(())
}

fn missing(name: &str, metadata: &Metadata, array: &str) -> DataError {
    let mut present: Vec<String> = metadata.tensors().keys().map(|name| format!("`{name}`")).collect();
    present.sort_unstable();
    let present = if present.is_empty() { "none".to_owned() } else { present.join(", ") };
    DataError::MissingArray { file: name.to_owned(), array: array.to_owned(), present }
}

fn read_labels(
    shard: &Shard,
    name: &str,
    info: &TensorInfo,
    data_start: u64,
    count: usize,
) -> Result<Vec<i64>, DataError> {
    if info.dtype != Dtype::I64 || info.shape != [count] {
        return Err(DataError::unsupported(
            name,
            format!("`labels` is {:?} {:?}; expected I64 [{count}]", info.dtype, info.shape),
        ));
    }
    check_extent(name, "labels", info, size_of::<i64>())?;
    let bytes = shard
        .read(data_start + info.data_offsets.0 as u64, count * size_of::<i64>())
        .map_err(|error| DataError::read(shard.path(), error))?;
    Ok(bytes.as_chunks().0.iter().map(|chunk| i64::from_le_bytes(*chunk)).collect())
}

impl Dataset for LatentDataset {
    fn len(&self) -> usize {
        self.samples
    }

    fn classes(&self) -> usize {
        self.classes
    }

    fn shape(&self) -> Option<[usize; 3]> {
        Some(self.shape_chw)
    }

    fn holds(&self) -> Holds {
        Holds::Latents
    }

    fn sample_name(&self, index: usize) -> String {
        let shard = self.shard(index);
        format!("{}, sample {}", shard.shard.path().display(), index - shard.start)
    }

    fn label(&self, index: usize) -> i64 {
        self.labels.as_ref().map_or(0, |labels| labels[index])
    }

    fn load(&self, index: usize) -> Result<Item, DataError> {
        let shard = self.shard(index);
        let elements = self.shape_chw.iter().product::<usize>();
        let size = elements * element_bytes(shard.element).expect("open accepts only these types");
        let offset = shard.offset + ((index - shard.start) * size) as u64;
        let bytes =
            shard.shard.read(offset, size).map_err(|error| DataError::read(shard.shard.path(), error))?;
        let values = match shard.element {
            Dtype::F32 => bytes.as_chunks().0.iter().map(|chunk| f32::from_le_bytes(*chunk)).collect(),
            Dtype::F16 => {
                bytes.as_chunks().0.iter().map(|chunk| f16::from_le_bytes(*chunk).to_f32()).collect()
            }
            _ => bytes.as_chunks().0.iter().map(|chunk| bf16::from_le_bytes(*chunk).to_f32()).collect(),
        };
        Ok(Item { content: Content::Values(values), caption: String::new() })
    }
}

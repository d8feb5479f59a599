//! Writing safetensors files: one, or shards with an index. Values are asked for tensor by tensor, so
//! memory holds one at a time, and every byte is hashed on its way.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use sha2::{Digest, Sha256};

use super::{StoredDType, TensorSpec, header};
use crate::files::{self, write_atomic};
use crate::hash;
use crate::{FileError, WeightsError};

/// Values converted at once.
const BUFFER_ELEMENTS: usize = 1 << 16;

/// A file that was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WrittenFile {
    /// In its folder.
    pub name: String,
    pub bytes: u64,
    /// Of the whole file, in lower-case hexadecimal.
    pub sha256: String,
}

/// Takes the values of one tensor, in one or several calls.
pub struct TensorSink<'a> {
    output: &'a mut HashedFile,
    spec: &'a TensorSpec,
    /// Bytes that are still to come.
    missing: u64,
}

impl TensorSink<'_> {
    pub fn spec(&self) -> &TensorSpec {
        self.spec
    }

    /// The next values, rounded to the tensor's floating-point type.
    ///
    /// # Errors
    /// If the tensor is not of floating point, there are too many values, or the disk refuses them.
    pub fn f32(&mut self, values: &[f32]) -> Result<(), WeightsError> {
        match self.spec.dtype {
            StoredDType::F32 => self.convert(values, f32::to_le_bytes),
            StoredDType::BF16 => self.convert(values, |value| bf16::from_f32(value).to_le_bytes()),
            StoredDType::F16 => self.convert(values, |value| f16::from_f32(value).to_le_bytes()),
            StoredDType::F64 => self.convert(values, |value| f64::from(value).to_le_bytes()),
            other => Err(self.refuse(format!("is {other}; f32 values cannot be written to it"))),
        }
    }

    /// The next bytes, as they are to be stored: little endian.
    ///
    /// # Errors
    /// If there are too many or the disk refuses them.
    pub fn bytes(&mut self, bytes: &[u8]) -> Result<(), WeightsError> {
        match self.missing.checked_sub(bytes.len() as u64) {
            Some(missing) => self.missing = missing,
            None => {
                let given = self.spec.bytes() - self.missing + bytes.len() as u64;
                return Err(self.refuse(format!("needs {} bytes and was given {given}", self.spec.bytes())));
            }
        }
        self.output.write(bytes)
    }

    fn convert<const SIZE: usize>(
        &mut self,
        values: &[f32],
        convert: impl Fn(f32) -> [u8; SIZE],
    ) -> Result<(), WeightsError> {
        let mut buffer = Vec::with_capacity(SIZE * BUFFER_ELEMENTS.min(values.len()));
        for part in values.chunks(BUFFER_ELEMENTS) {
            buffer.clear();
            buffer.extend(part.iter().flat_map(|value| convert(*value)));
            self.bytes(&buffer)?;
        }
        Ok(())
    }

    fn finish(self) -> Result<(), WeightsError> {
        if self.missing == 0 {
            return Ok(());
        }
        let given = self.spec.bytes() - self.missing;
        Err(self.refuse(format!("needs {} bytes and was given {given}", self.spec.bytes())))
    }

    fn refuse(&self, reason: String) -> WeightsError {
        WeightsError::Writing { path: self.output.path.clone(), name: self.spec.name.clone(), reason }
    }
}

/// What failed: the caller's part, whose error is its own, or the renaming.
enum Replacing<E> {
    Writing(E),
    Name(FileError),
}

impl<E> From<FileError> for Replacing<E> {
    fn from(error: FileError) -> Self {
        Self::Name(error)
    }
}

/// Writes one file; it appears whole. `data` is called once for each index of `specs`, in the order in
/// which they are stored: wide element types first, so that all are aligned, else as given.
///
/// # Errors
/// Those of `data` and of the disk; the file is then as it was.
pub fn write_file<E: From<WeightsError>>(
    path: &Path,
    specs: &[TensorSpec],
    metadata: &BTreeMap<String, String>,
    mut data: impl FnMut(usize, &mut TensorSink<'_>) -> Result<(), E>,
) -> Result<WrittenFile, E> {
    check_names(path, specs)?;
    let replaced = files::replace_by(path, true, |temporary| {
        write_one(temporary, specs, &stored_order(specs), metadata, &mut data).map_err(Replacing::Writing)
    });
    match replaced {
        Ok(written) => Ok(WrittenFile { name: file_name(path), ..written }),
        Err(Replacing::Writing(error)) => Err(error),
        Err(Replacing::Name(error)) => Err(WeightsError::from(error).into()),
    }
}

/// Writes `<stem>[.<variant>].safetensors`, or, beyond `max_shard_bytes`, numbered shards and their index,
/// into a folder that nobody reads yet. See [`write_file`] for `data`.
///
/// # Errors
/// Those of `data` and of the disk.
pub fn write_sharded<E: From<WeightsError>>(
    folder: &Path,
    stem: &str,
    variant: Option<&str>,
    specs: &[TensorSpec],
    metadata: &BTreeMap<String, String>,
    max_shard_bytes: u64,
    data: impl FnMut(usize, &mut TensorSink<'_>) -> Result<(), E>,
) -> Result<Vec<WrittenFile>, E> {
    let base = match variant {
        Some(variant) => format!("{stem}.{variant}"),
        None => stem.to_string(),
    };
    let shards = plan(specs, max_shard_bytes);
    let name = |index: usize| match shards.len() {
        1 => format!("{base}.safetensors"),
        count => format!("{base}-{:05}-of-{count:05}.safetensors", index + 1),
    };
    let written = write_planned(folder, name, specs, &shards, metadata, data)?;
    if shards.len() > 1 {
        let path = folder.join(index_name(stem, variant));
        write_atomic(&path, &index_text(specs, &shards, &written)).map_err(WeightsError::from)?;
    }
    Ok(written)
}

/// Writes `<stem>-00001.safetensors` and so on, without an index, into a folder that nobody reads yet. At
/// least one file is written. See [`write_file`] for `data`.
///
/// # Errors
/// Those of `data` and of the disk.
pub fn write_shards<E: From<WeightsError>>(
    folder: &Path,
    stem: &str,
    specs: &[TensorSpec],
    metadata: &BTreeMap<String, String>,
    max_shard_bytes: u64,
    data: impl FnMut(usize, &mut TensorSink<'_>) -> Result<(), E>,
) -> Result<Vec<WrittenFile>, E> {
    let shards = plan(specs, max_shard_bytes);
    write_planned(folder, |index| shard_name(stem, index), specs, &shards, metadata, data)
}

/// The name of a shard without an index, counted from 0.
pub fn shard_name(stem: &str, index: usize) -> String {
    format!("{stem}-{:05}.safetensors", index + 1)
}

/// The index file's name; its variant stands before the ending, as diffusers writes it.
pub(crate) fn index_name(stem: &str, variant: Option<&str>) -> String {
    match variant {
        Some(variant) => format!("{stem}.safetensors.index.{variant}.json"),
        None => format!("{stem}.safetensors.index.json"),
    }
}

fn index_text(specs: &[TensorSpec], shards: &[Vec<usize>], written: &[WrittenFile]) -> Vec<u8> {
    let mut weight_map = BTreeMap::new();
    for (members, file) in shards.iter().zip(written) {
        weight_map.extend(members.iter().map(|member| (specs[*member].name.as_str(), file.name.as_str())));
    }
    let total: u64 = specs.iter().map(TensorSpec::bytes).sum();
    let index = serde_json::json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
    let mut text = serde_json::to_vec_pretty(&index).expect("strings and numbers serialize");
    text.push(b'\n');
    text
}

/// Indices in the order of their data: readers that view the file's memory need each tensor to start
/// on a multiple of its element's size.
fn stored_order(specs: &[TensorSpec]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..specs.len()).collect();
    order.sort_by_key(|index| std::cmp::Reverse(specs[*index].dtype.size()));
    order
}

/// The members of each shard: consecutive tensors until the next does not fit. One that is larger than a
/// shard has its own.
fn plan(specs: &[TensorSpec], max_shard_bytes: u64) -> Vec<Vec<usize>> {
    let mut shards: Vec<Vec<usize>> = vec![Vec::new()];
    let mut filled = 0;
    for index in stored_order(specs) {
        let bytes = specs[index].bytes();
        if filled > 0 && filled + bytes > max_shard_bytes {
            shards.push(Vec::new());
            filled = 0;
        }
        filled += bytes;
        shards.last_mut().expect("there is always an open shard").push(index);
    }
    shards
}

fn write_planned<E: From<WeightsError>>(
    folder: &Path,
    name: impl Fn(usize) -> String,
    specs: &[TensorSpec],
    shards: &[Vec<usize>],
    metadata: &BTreeMap<String, String>,
    mut data: impl FnMut(usize, &mut TensorSink<'_>) -> Result<(), E>,
) -> Result<Vec<WrittenFile>, E> {
    check_names(folder, specs)?;
    let mut written = Vec::with_capacity(shards.len());
    for (index, members) in shards.iter().enumerate() {
        written.push(write_one(&folder.join(name(index)), specs, members, metadata, &mut data)?);
    }
    Ok(written)
}

fn write_one<E: From<WeightsError>>(
    path: &Path,
    specs: &[TensorSpec],
    members: &[usize],
    metadata: &BTreeMap<String, String>,
    data: &mut impl FnMut(usize, &mut TensorSink<'_>) -> Result<(), E>,
) -> Result<WrittenFile, E> {
    let mut output = HashedFile::create(path)?;
    let ordered: Vec<&TensorSpec> = members.iter().map(|member| &specs[*member]).collect();
    output.write(&header::write(&ordered, metadata))?;
    for member in members {
        let spec = &specs[*member];
        let mut sink = TensorSink { output: &mut output, spec, missing: spec.bytes() };
        data(*member, &mut sink)?;
        sink.finish()?;
    }
    Ok(output.finish()?)
}

fn check_names(path: &Path, specs: &[TensorSpec]) -> Result<(), WeightsError> {
    let mut names = BTreeSet::from([header::METADATA_KEY]);
    match specs.iter().find(|spec| !names.insert(spec.name.as_str())) {
        Some(taken) => {
            let reason = "is a name that is already taken".to_string();
            Err(WeightsError::Writing { path: path.to_path_buf(), name: taken.name.clone(), reason })
        }
        None => Ok(()),
    }
}

fn file_error(action: &'static str, path: &Path) -> impl Fn(io::Error) -> WeightsError {
    move |error| FileError::on(action, path)(error).into()
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// A new file whose hash grows with it.
struct HashedFile {
    path: PathBuf,
    file: File,
    hash: Sha256,
    bytes: u64,
}

impl HashedFile {
    fn create(path: &Path) -> Result<Self, WeightsError> {
        let file = File::create(path).map_err(file_error("write", path))?;
        Ok(Self { path: path.to_path_buf(), file, hash: Sha256::new(), bytes: 0 })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), WeightsError> {
        self.file.write_all(bytes).map_err(file_error("write", &self.path))?;
        self.hash.update(bytes);
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    /// Waits until the file is on the disk.
    fn finish(self) -> Result<WrittenFile, WeightsError> {
        self.file.sync_all().map_err(file_error("write", &self.path))?;
        Ok(WrittenFile {
            name: file_name(&self.path),
            bytes: self.bytes,
            sha256: hash::hexadecimal(&self.hash.finalize()),
        })
    }
}

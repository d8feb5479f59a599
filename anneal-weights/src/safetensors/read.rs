//! One or many safetensors files as one set of tensors.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use half::{bf16, f16};
use serde::Deserialize;

use super::header::{self, Refusal};
use super::{StoredDType, TensorSpec};
use crate::{FileError, WeightsError};

/// Bytes read at once.
const BUFFER_BYTES: usize = 1 << 20;

pub(crate) const FILE_ENDING: &str = ".safetensors";
/// In the name of every index file; a variant may stand between it and `json`.
pub(crate) const INDEX_PART: &str = ".safetensors.index.";

#[derive(Debug)]
struct Shard {
    path: PathBuf,
    file: File,
}

#[derive(Clone, Debug)]
struct Found {
    spec: TensorSpec,
    shard: usize,
    offset: u64,
}

/// The tensors of one file or of several shards. Clones share the open files.
#[derive(Clone, Debug)]
pub struct TensorFiles {
    /// What the user named: a file, an index or a folder.
    path: PathBuf,
    shards: Arc<Vec<Shard>>,
    tensors: BTreeMap<String, Found>,
    metadata: BTreeMap<String, String>,
}

/// The part of an index file that matters here.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl TensorFiles {
    /// Opens a `.safetensors` file, an index of shards, or a folder that holds exactly one of these
    /// (an index goes before the shards that it names).
    ///
    /// # Errors
    /// Names what is missing, damaged, or no such file.
    pub fn open(path: &Path) -> Result<Self, WeightsError> {
        if path.is_dir() {
            return Self::open(&only_weights(path)?);
        }
        if path.extension().is_some_and(|extension| extension == "json") {
            open_index(path)
        } else {
            open_shards(path, &[path.to_path_buf()])
        }
    }

    /// Opens these files as one set.
    ///
    /// # Errors
    /// As [`Self::open`]; also if two of them hold the same name, or there is none.
    pub fn open_all(paths: &[PathBuf]) -> Result<Self, WeightsError> {
        let Some(first) = paths.first() else {
            return Err(WeightsError::NoWeights { message: "no weight files were given".into() });
        };
        open_shards(first, paths)
    }

    /// The tensors whose names start with `prefix`, under the rest of their names.
    pub fn under(&self, prefix: &str) -> Self {
        let inside = |(name, found): (&String, &Found)| {
            let name = name.strip_prefix(prefix)?.to_string();
            Some((name.clone(), Found { spec: TensorSpec { name, ..found.spec.clone() }, ..found.clone() }))
        };
        Self { tensors: self.tensors.iter().filter_map(inside).collect(), ..self.clone() }
    }

    /// What was opened: a file or an index; of several files the first.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The files themselves.
    pub fn paths(&self) -> Vec<&Path> {
        self.shards.iter().map(|shard| shard.path.as_path()).collect()
    }

    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// All names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    pub fn spec(&self, name: &str) -> Option<&TensorSpec> {
        self.tensors.get(name).map(|found| &found.spec)
    }

    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.spec(name).map(|spec| spec.shape.as_slice())
    }

    pub fn dtype(&self, name: &str) -> Option<StoredDType> {
        self.spec(name).map(|spec| spec.dtype)
    }

    /// The text entries of the first file's header.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// The file that holds a tensor.
    pub fn file_of(&self, name: &str) -> Option<&Path> {
        self.tensors.get(name).map(|found| self.shards[found.shard].path.as_path())
    }

    /// The values of a floating-point tensor, rounded to f32.
    ///
    /// # Errors
    /// If there is no such tensor, it is not of floating point, or the file cannot be read.
    pub fn read_f32(&self, name: &str) -> Result<Vec<f32>, WeightsError> {
        let found = self.found(name)?;
        let mut values = Vec::with_capacity(found.spec.elements());
        match found.spec.dtype {
            StoredDType::F32 => self.convert(found, &mut values, f32::from_le_bytes)?,
            StoredDType::BF16 => {
                self.convert(found, &mut values, |bytes| bf16::from_le_bytes(bytes).to_f32())?
            }
            StoredDType::F16 => {
                self.convert(found, &mut values, |bytes| f16::from_le_bytes(bytes).to_f32())?
            }
            StoredDType::F64 => self.convert(found, &mut values, |bytes| f64::from_le_bytes(bytes) as f32)?,
            _ => return Err(self.element_type(found, "f32")),
        }
        Ok(values)
    }

    /// The values of an i64 tensor.
    ///
    /// # Errors
    /// As [`Self::read_f32`].
    pub fn read_i64(&self, name: &str) -> Result<Vec<i64>, WeightsError> {
        let found = self.found(name)?;
        let mut values = Vec::with_capacity(found.spec.elements());
        match found.spec.dtype {
            StoredDType::I64 => self.convert(found, &mut values, i64::from_le_bytes)?,
            _ => return Err(self.element_type(found, "i64")),
        }
        Ok(values)
    }

    /// A tensor's bytes as they are stored.
    ///
    /// # Errors
    /// If there is no such tensor or the file cannot be read.
    pub fn read_bytes(&self, name: &str) -> Result<Vec<u8>, WeightsError> {
        let found = self.found(name)?;
        let mut bytes = vec![0; found.spec.bytes() as usize];
        self.read_at(found, &mut bytes, 0)?;
        Ok(bytes)
    }

    fn convert<const SIZE: usize, T>(
        &self,
        found: &Found,
        values: &mut Vec<T>,
        convert: impl Fn([u8; SIZE]) -> T,
    ) -> Result<(), WeightsError> {
        let total = found.spec.bytes() as usize;
        let mut buffer = vec![0; BUFFER_BYTES.min(total)];
        for start in (0..total).step_by(BUFFER_BYTES) {
            let part = &mut buffer[..BUFFER_BYTES.min(total - start)];
            self.read_at(found, part, start as u64)?;
            values.extend(part.as_chunks::<SIZE>().0.iter().map(|bytes| convert(*bytes)));
        }
        Ok(())
    }

    fn read_at(&self, found: &Found, bytes: &mut [u8], start: u64) -> Result<(), WeightsError> {
        let shard = &self.shards[found.shard];
        shard.file.read_exact_at(bytes, found.offset + start).map_err(FileError::on("read", &shard.path))?;
        Ok(())
    }

    fn found(&self, name: &str) -> Result<&Found, WeightsError> {
        let missing = || WeightsError::NoTensor { path: self.path.clone(), name: name.into() };
        self.tensors.get(name).ok_or_else(missing)
    }

    fn element_type(&self, found: &Found, wanted: &'static str) -> WeightsError {
        let path = self.shards[found.shard].path.clone();
        let (name, dtype) = (found.spec.name.clone(), found.spec.dtype.name());
        WeightsError::ElementType { path, name, dtype, wanted }
    }
}

/// The one index or weight file of a folder.
fn only_weights(folder: &Path) -> Result<PathBuf, WeightsError> {
    let names = file_names(folder)?;
    let indices: Vec<&String> = names.iter().filter(|name| name.contains(INDEX_PART)).collect();
    let files: Vec<&String> = names.iter().filter(|name| name.ends_with(FILE_ENDING)).collect();
    let candidates = if indices.is_empty() { files } else { indices };
    match candidates.as_slice() {
        [only] => Ok(folder.join(only)),
        [] => {
            let message = format!("{} holds no {FILE_ENDING} file", folder.display());
            Err(WeightsError::NoWeights { message })
        }
        several => {
            let list = several.iter().map(|name| name.as_str()).collect::<Vec<_>>().join(", ");
            let message =
                format!("{} holds several weight files ({list}); name one of them", folder.display());
            Err(WeightsError::NoWeights { message })
        }
    }
}

/// The names in a folder, sorted.
pub(crate) fn file_names(folder: &Path) -> Result<Vec<String>, WeightsError> {
    let listing = fs::read_dir(folder).map_err(FileError::on("read", folder))?;
    let mut names = Vec::new();
    for entry in listing {
        let entry = entry.map_err(FileError::on("read", folder))?;
        names.push(entry.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

fn open_shards(path: &Path, paths: &[PathBuf]) -> Result<TensorFiles, WeightsError> {
    let mut shards = Vec::with_capacity(paths.len());
    let mut tensors: BTreeMap<String, Found> = BTreeMap::new();
    let mut metadata = BTreeMap::new();
    for (index, path) in paths.iter().enumerate() {
        let (file, header) = open_shard(path)?;
        for header::Placed { spec, offset } in header.tensors {
            let name = spec.name.clone();
            if let Some(twice) = tensors.insert(name.clone(), Found { spec, shard: index, offset }) {
                let (path, other) = (path.clone(), paths[twice.shard].clone());
                return Err(WeightsError::Twice { name, path, other });
            }
        }
        if index == 0 {
            metadata = header.metadata;
        }
        shards.push(Shard { path: path.clone(), file });
    }
    Ok(TensorFiles { path: path.to_path_buf(), shards: Arc::new(shards), tensors, metadata })
}

fn open_shard(path: &Path) -> Result<(File, header::Header), WeightsError> {
    let file = File::open(path).map_err(FileError::on("read", path))?;
    let about = file.metadata().map_err(FileError::on("read", path))?;
    let header = header::read(about.len(), |bytes, offset| file.read_exact_at(bytes, offset));
    let path_of = || path.to_path_buf();
    match header {
        Ok(header) => Ok((file, header)),
        Err(Refusal::Foreign(reason)) => Err(WeightsError::NotSafetensors { path: path_of(), reason }),
        Err(Refusal::Damaged(reason)) => Err(WeightsError::Damaged { path: path_of(), reason }),
        Err(Refusal::Io(error)) => Err(FileError::on("read", path)(error).into()),
    }
}

fn open_index(path: &Path) -> Result<TensorFiles, WeightsError> {
    let text = fs::read(path).map_err(FileError::on("read", path))?;
    let bad = |reason: String| WeightsError::Json { path: path.to_path_buf(), reason };
    let index: Index = serde_json::from_slice(&text)
        .map_err(|error| bad(format!("not an index of weight shards: {error}")))?;
    let names: BTreeSet<&str> = index.weight_map.values().map(String::as_str).collect();
    if names.is_empty() {
        return Err(bad("the index names no tensors".into()));
    }
    // A shard lies beside its index; a path could point anywhere.
    if let Some(name) =
        names.iter().find(|name| Path::new(name).file_name().is_none_or(|last| last != **name))
    {
        return Err(bad(format!("the index names the shard '{name}', which is not a plain file name")));
    }
    let folder = path.parent().unwrap_or(Path::new(""));
    let missing: Vec<&str> = names.iter().copied().filter(|name| !folder.join(name).is_file()).collect();
    if !missing.is_empty() {
        return Err(WeightsError::MissingShards { index: path.to_path_buf(), missing: missing.join(", ") });
    }
    let paths: Vec<PathBuf> = names.iter().map(|name| folder.join(name)).collect();
    let files = open_shards(path, &paths)?;
    for (tensor, shard) in &index.weight_map {
        if files.file_of(tensor) != Some(&folder.join(shard)) {
            return Err(bad(format!("the index says that '{tensor}' is in {shard}, and it is not")));
        }
    }
    Ok(files)
}

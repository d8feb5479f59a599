//! Folders in the layout of diffusers' pipelines.
//!
//! `model_index.json` names the pipeline's class and each component's library and class; a component
//! is a folder with `config.json` and `diffusion_pytorch_model[.variant].safetensors` (or shards with
//! an index); a scheduler has `scheduler_config.json` and no weights; components of the transformers
//! library call their weights `model[.variant].safetensors`.
//! Configurations are plain JSON here: what they mean is known where the models are.
//! Deliberately absent: pickled `.bin` weights.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::files::sync_folder;
use crate::safetensors::{FILE_ENDING, INDEX_PART, file_names, index_name};
use crate::{FileError, StagedFolder, TensorFiles, WeightsError, write_atomic};

/// What weight files of diffusers' own models are called.
pub(crate) const WEIGHTS_STEM: &str = "diffusion_pytorch_model";

/// What weight files of the transformers library are called.
const TRANSFORMERS_STEM: &str = "model";

const INDEX_NAME: &str = "model_index.json";

/// The names of a component's configuration; the second is a scheduler's.
const CONFIG_NAMES: [&str; 2] = ["config.json", "scheduler_config.json"];

/// The oldest diffusers that the written folders are meant for.
const DIFFUSERS_VERSION: &str = "0.30.0";

/// A part of a pipeline.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Component {
    /// Its folder's name.
    pub name: String,
    /// The library of its class: `diffusers` or `transformers`.
    pub library: String,
    pub class: String,
}

/// A pipeline's folder, for reading.
#[derive(Clone, Debug)]
pub struct DiffusersFolder {
    path: PathBuf,
    index: Map<String, Value>,
}

impl DiffusersFolder {
    /// Reads a folder's `model_index.json`.
    ///
    /// # Errors
    /// If there is none, or it is not one.
    pub fn open(path: &Path) -> Result<Self, WeightsError> {
        let refuse = |reason: String| WeightsError::NotDiffusers { path: path.to_path_buf(), reason };
        let file = path.join(INDEX_NAME);
        if !file.is_file() {
            let reason = if !path.is_dir() {
                "there is no such folder".to_string()
            } else if path.join(CONFIG_NAMES[0]).is_file() {
                format!("it has no {INDEX_NAME}; it is one component, so name the folder above it")
            } else {
                format!("it has no {INDEX_NAME}")
            };
            return Err(refuse(reason));
        }
        match read_json(&file)? {
            Value::Object(index) if index.get("_class_name").is_some_and(Value::is_string) => {
                Ok(Self { path: path.to_path_buf(), index })
            }
            _ => Err(refuse(format!("its {INDEX_NAME} names no class"))),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The pipeline's class, for example `DiTPipeline`.
    pub fn class_name(&self) -> &str {
        self.index.get("_class_name").and_then(Value::as_str).unwrap_or_default()
    }

    /// The content of `model_index.json`.
    pub fn index(&self) -> &Map<String, Value> {
        &self.index
    }

    /// The components that the folder has, by name.
    pub fn components(&self) -> Vec<Component> {
        let component = |(name, value): (&String, &Value)| {
            let [library, class] = value.as_array()?.as_slice() else { return None };
            let (library, class) = (library.as_str()?.to_string(), class.as_str()?.to_string());
            Some(Component { name: name.clone(), library, class })
        };
        let mut components: Vec<Component> = self.index.iter().filter_map(component).collect();
        components.sort_by(|left, right| left.name.cmp(&right.name));
        components
    }

    /// The configuration of a component, a scheduler's too.
    ///
    /// # Errors
    /// If the pipeline has no such component, or it has no configuration.
    pub fn component_config(&self, name: &str) -> Result<Value, WeightsError> {
        let folder = self.component_folder(name)?;
        match CONFIG_NAMES.iter().map(|file| folder.join(file)).find(|path| path.is_file()) {
            Some(path) => read_json(&path),
            None => {
                let reason = format!("its component {name} has no {}", CONFIG_NAMES.join(" or "));
                Err(WeightsError::NotDiffusers { path: self.path.clone(), reason })
            }
        }
    }

    /// The weights of a component: of a variant such as `fp16`, or the plain ones.
    ///
    /// # Errors
    /// If there are none (saying which there are), or they are damaged.
    pub fn component_weights(&self, name: &str, variant: Option<&str>) -> Result<TensorFiles, WeightsError> {
        component_weights(&self.component_folder(name)?, variant)
    }

    fn component_folder(&self, name: &str) -> Result<PathBuf, WeightsError> {
        let components = self.components();
        if components.iter().any(|component| component.name == name) {
            return Ok(self.path.join(name));
        }
        let known = components.iter().map(|component| component.name.as_str()).collect::<Vec<_>>().join(", ");
        let reason = format!("its {INDEX_NAME} names no component '{name}' (it names {known})");
        Err(WeightsError::NotDiffusers { path: self.path.clone(), reason })
    }
}

fn component_weights(folder: &Path, variant: Option<&str>) -> Result<TensorFiles, WeightsError> {
    for stem in [WEIGHTS_STEM, TRANSFORMERS_STEM] {
        let single = match variant {
            Some(variant) => format!("{stem}.{variant}{FILE_ENDING}"),
            None => format!("{stem}{FILE_ENDING}"),
        };
        for file in [index_name(stem, variant), single] {
            let path = folder.join(file);
            if path.is_file() {
                return TensorFiles::open(&path);
            }
        }
    }
    let names = file_names(folder)?;
    let is_weights =
        |name: &&String| name.ends_with(FILE_ENDING) || name.contains(INDEX_PART) || name.ends_with(".bin");
    let there: Vec<&str> = names.iter().filter(is_weights).map(String::as_str).collect();
    let wanted =
        variant.map_or("weights".to_string(), |variant| format!("weights of the variant '{variant}'"));
    let found = if there.is_empty() { "no weight file".to_string() } else { there.join(", ") };
    let message = format!("{} holds no {wanted} in {FILE_ENDING} files; it holds {found}", folder.display());
    Err(WeightsError::NoWeights { message })
}

fn read_json(path: &Path) -> Result<Value, WeightsError> {
    let text = fs::read(path).map_err(FileError::on("read", path))?;
    serde_json::from_slice(&text).map_err(|error| WeightsError::Json {
        path: path.to_path_buf(),
        reason: format!("not JSON: {error}"),
    })
}

fn write_json(path: &Path, value: &Value) -> Result<(), WeightsError> {
    let mut text = serde_json::to_vec_pretty(value).expect("JSON values serialize");
    text.push(b'\n');
    Ok(write_atomic(path, &text)?)
}

/// A pipeline's folder, for writing. It appears whole at [`Self::finish`], or not at all.
#[derive(Debug)]
pub struct DiffusersWriter {
    staged: StagedFolder,
    index: Map<String, Value>,
    folders: Vec<PathBuf>,
}

impl DiffusersWriter {
    /// Begins a folder for a pipeline of class `class_name`. Folders above `path` are created.
    ///
    /// # Errors
    /// If `path` exists and is not an empty folder, or the disk refuses.
    pub fn create(path: &Path, class_name: &str) -> Result<Self, WeightsError> {
        refuse_existing(path)?;
        if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            fs::create_dir_all(parent).map_err(FileError::on("create", path))?;
        }
        let mut index = Map::new();
        index.insert("_class_name".into(), class_name.into());
        index.insert("_diffusers_version".into(), DIFFUSERS_VERSION.into());
        Ok(Self { staged: StagedFolder::create(path)?, index, folders: Vec::new() })
    }

    /// Adds a component with its configuration, and gives its folder, for weights.
    ///
    /// # Errors
    /// If the disk refuses.
    pub fn component(
        &mut self,
        name: &str,
        library: &str,
        class: &str,
        config: &Value,
    ) -> Result<PathBuf, WeightsError> {
        let folder = self.add(name, library, class)?;
        // Only schedulers have no weights, and only their file has another name.
        let is_scheduler = class.ends_with("Scheduler");
        write_json(&folder.join(CONFIG_NAMES[usize::from(is_scheduler)]), config)?;
        Ok(folder)
    }

    /// Adds a component of another folder as it is.
    ///
    /// # Errors
    /// If `from` has no such component, or the disk refuses.
    pub fn copy_component(&mut self, from: &DiffusersFolder, name: &str) -> Result<(), WeightsError> {
        let source = from.component_folder(name)?;
        let component = from.components().into_iter().find(|component| component.name == name);
        let Component { library, class, .. } = component.expect("its folder was just found");
        let folder = self.add(name, &library, &class)?;
        for file in file_names(&source)? {
            let (source, target) = (source.join(&file), folder.join(&file));
            fs::copy(&source, &target).map_err(FileError::on("copy", &source))?;
            File::open(&target).and_then(|file| file.sync_all()).map_err(FileError::on("write", &target))?;
        }
        Ok(())
    }

    /// Adds another entry to `model_index.json`, such as `id2label`.
    pub fn index_value(&mut self, key: &str, value: Value) {
        self.index.insert(key.into(), value);
    }

    /// Gives the folder its name.
    ///
    /// # Errors
    /// If the disk refuses; nothing is then left of the folder.
    pub fn finish(self) -> Result<(), WeightsError> {
        refuse_existing(self.staged.target())?;
        write_json(&self.staged.path().join(INDEX_NAME), &Value::Object(self.index))?;
        for folder in &self.folders {
            sync_folder(folder)?;
        }
        Ok(self.staged.commit()?)
    }

    fn add(&mut self, name: &str, library: &str, class: &str) -> Result<PathBuf, WeightsError> {
        let folder = self.staged.path().join(name);
        fs::create_dir(&folder).map_err(FileError::on("create", &folder))?;
        self.index.insert(name.into(), Value::from(vec![library, class]));
        self.folders.push(folder.clone());
        Ok(folder)
    }
}

fn refuse_existing(path: &Path) -> Result<(), WeightsError> {
    let is_free = match fs::read_dir(path) {
        Ok(entries) => entries.take(1).count() == 0,
        Err(error) => error.kind() == std::io::ErrorKind::NotFound,
    };
    if is_free { Ok(()) } else { Err(WeightsError::Exists { path: path.to_path_buf() }) }
}

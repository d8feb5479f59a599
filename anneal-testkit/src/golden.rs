//! Reads the golden files: numbers made by public PyTorch implementations on small random models.
//!
//! A file is one safetensors file: weights under their public names (`param.`), inputs (`in.`),
//! outputs (`out.`), gradients (`grad.`), and the configuration as JSON in its metadata.
//! The folder is the one that `ANNEAL_GOLDEN` names, so that further cases of the same form
//! can be checked by the same tests; a file or form that it lacks is taken from this crate's
//! own `golden/`, with a printed line that says so.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};

struct Entry {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

/// One golden file, held in memory.
pub struct Golden {
    name: String,
    path: PathBuf,
    config: serde_json::Value,
    entries: BTreeMap<String, Entry>,
}

impl Golden {
    /// Opens `<folder>/<name>.safetensors`.
    pub fn open(name: &str) -> Self {
        let file = format!("{name}.safetensors");
        let asked = Self::folder();
        if asked.join(&file).is_file() {
            return Self::read(&asked.join(&file));
        }
        report_fallback(&asked, &file);
        Self::read(&shipped_folder().join(&file))
    }

    /// Every file `<prefix>*.safetensors` that records a model's `out.forward`, by name.
    /// A file of another form under the same prefix (a pipeline's images, say) is left out.
    pub fn matching(prefix: &str) -> Vec<Self> {
        Self::matching_with(prefix, "out.forward")
    }

    /// Every file `<prefix>*.safetensors` that holds the tensor `marker`, by name; never empty.
    pub fn matching_with(prefix: &str, marker: &str) -> Vec<Self> {
        let asked = Self::folder();
        let mut found = list(&asked, prefix, marker);
        if found.is_empty() {
            report_fallback(&asked, &format!("{prefix}*.safetensors with {marker}"));
            found = list(&shipped_folder(), prefix, marker);
        }
        assert!(!found.is_empty(), "no golden file {prefix}*.safetensors holds {marker}");
        found
    }

    /// The folder that golden files are read from: `ANNEAL_GOLDEN`, or this crate's own.
    pub fn folder() -> PathBuf {
        let Some(asked) = std::env::var_os("ANNEAL_GOLDEN") else { return shipped_folder() };
        let asked = PathBuf::from(asked);
        assert!(asked.is_dir(), "ANNEAL_GOLDEN names {}, which is not a folder", asked.display());
        asked
    }

    fn read(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let broken = |error| -> ! { panic!("{}: not a safetensors file: {error}", path.display()) };
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap_or_else(|error| broken(error));
        let config = match header.metadata().as_ref().and_then(|metadata| metadata.get("config")) {
            Some(text) => serde_json::from_str(text)
                .unwrap_or_else(|error| panic!("{}: metadata config: {error}", path.display())),
            None => serde_json::Value::Null,
        };
        let tensors = SafeTensors::deserialize(&bytes).unwrap_or_else(|error| broken(error));
        let entries = tensors
            .iter()
            .map(|(name, view)| {
                let (dtype, shape, bytes) = (view.dtype(), view.shape().to_vec(), view.data().to_vec());
                (name.to_string(), Entry { dtype, shape, bytes })
            })
            .collect();
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        Self { name, path: path.to_path_buf(), config, entries }
    }

    /// The file's name without folder and ending.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where the file lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The configuration in the file's metadata; `Null` if it has none.
    pub fn config(&self) -> &serde_json::Value {
        &self.config
    }

    /// Whether the file holds this tensor.
    pub fn has(&self, tensor: &str) -> bool {
        self.entries.contains_key(tensor)
    }

    /// The full names of the tensors that start with `prefix`, sorted.
    pub fn names(&self, prefix: &str) -> Vec<String> {
        self.entries.keys().filter(|name| name.starts_with(prefix)).cloned().collect()
    }

    /// A tensor's shape.
    pub fn shape(&self, tensor: &str) -> &[usize] {
        &self.entry(tensor).shape
    }

    /// Values in row-major order, and the shape.
    pub fn f32(&self, tensor: &str) -> (Vec<f32>, Vec<usize>) {
        self.values(tensor, Dtype::F32, f32::from_le_bytes)
    }

    /// Values in row-major order, and the shape.
    pub fn f64(&self, tensor: &str) -> (Vec<f64>, Vec<usize>) {
        self.values(tensor, Dtype::F64, f64::from_le_bytes)
    }

    /// Values in row-major order, and the shape.
    pub fn i64(&self, tensor: &str) -> (Vec<i64>, Vec<usize>) {
        self.values(tensor, Dtype::I64, i64::from_le_bytes)
    }

    fn values<const SIZE: usize, T>(
        &self,
        tensor: &str,
        dtype: Dtype,
        read: impl Fn([u8; SIZE]) -> T,
    ) -> (Vec<T>, Vec<usize>) {
        let entry = self.entry(tensor);
        assert!(
            entry.dtype == dtype,
            "{}: {tensor} is {:?}, the test reads it as {dtype:?}",
            self.path.display(),
            entry.dtype
        );
        let values = entry.bytes.as_chunks::<SIZE>().0.iter().map(|chunk| read(*chunk)).collect();
        (values, entry.shape.clone())
    }

    fn entry(&self, tensor: &str) -> &Entry {
        self.entries.get(tensor).unwrap_or_else(|| panic!("{} holds no tensor {tensor}", self.path.display()))
    }
}

fn shipped_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden")
}

fn list(folder: &Path, prefix: &str, marker: &str) -> Vec<Golden> {
    let listing = std::fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut paths: Vec<PathBuf> = listing.map(|entry| entry.expect("a folder's entry").path()).collect();
    paths.retain(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with(prefix) && name.ends_with(".safetensors")
    });
    paths.sort();
    paths.iter().map(|path| Golden::read(path)).filter(|golden| golden.has(marker)).collect()
}

/// Written past the test harness's capture: a reader of a green run must see what was not asked for.
fn report_fallback(asked: &Path, what: &str) {
    if asked != shipped_folder() {
        let line = format!("{} holds no {what}: the project's own copy is used\n", asked.display());
        let _ = std::io::stderr().write_all(line.as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_gives_its_configuration_names_shapes_and_values() {
        let golden = Golden::read(&shipped_folder().join("dit_small.safetensors"));
        assert_eq!(golden.name(), "dit_small");
        assert_eq!(golden.config()["hidden_size"], 48);
        assert_eq!(golden.shape("out.forward"), [3, 8, 8, 8]);
        let (loss, shape) = golden.f32("out.loss");
        assert_eq!(shape, [3]);
        let (mse, vb) = (golden.f32("out.mse").0, golden.f32("out.vb").0);
        for index in 0..3 {
            assert!((loss[index] - mse[index] - vb[index]).abs() < 1e-6);
        }
        assert!(golden.names("sample.ddim.").contains(&"sample.ddim.noise".to_string()));
        assert!(golden.i64("in.t").0.iter().all(|timestep| (0..1000).contains(timestep)));
    }

    #[test]
    fn only_files_of_the_form_match() {
        let names: Vec<String> = list(&shipped_folder(), "dit_", "out.forward")
            .iter()
            .map(|golden| golden.name().to_string())
            .collect();
        assert_eq!(names, ["dit_head72", "dit_pixel", "dit_small"]);
    }

    #[test]
    #[should_panic(expected = "out.loss is F32, the test reads it as I64")]
    fn a_wrong_type_is_named() {
        Golden::read(&shipped_folder().join("dit_small.safetensors")).i64("out.loss");
    }
}

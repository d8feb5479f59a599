//! Finds NVIDIA's libraries at run time and brings them into the process.
//!
//! Looked at in order: what the dynamic loader finds by itself, `CUDA_HOME` (or `CUDA_PATH`,
//! `/usr/local/cuda`), and the `nvidia/*/lib` folders of installed Python environments (active
//! virtual environment, the interpreters on `PATH`, the user's site packages). A library is opened when it is first
//! asked for, by its path and with global symbols, after which the bindings find it by name; the
//! bindings panic where it is missing, so nothing may call them before [`Libraries::get`] says it
//! is there. libnvrtc-builtins is opened before libnvrtc, which else fails inside cuDNN.
//! Not done: Windows and macOS, where CUDA devices are reported as missing.

use std::collections::BTreeSet;
use std::ffi::{CStr, c_void};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::DeviceError;

/// A library that the engine can use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Library {
    Driver,
    NvrtcBuiltins,
    Nvrtc,
    CublasLt,
    Cudnn,
    Nccl,
}

impl Library {
    pub const ALL: [Library; 6] = [
        Library::Driver,
        Library::NvrtcBuiltins,
        Library::Nvrtc,
        Library::CublasLt,
        Library::Cudnn,
        Library::Nccl,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Library::Driver => "libcuda",
            Library::NvrtcBuiltins => "libnvrtc-builtins",
            Library::Nvrtc => "libnvrtc",
            Library::CublasLt => "libcublasLt",
            Library::Cudnn => "libcudnn",
            Library::Nccl => "libnccl",
        }
    }

    /// What the engine does with it.
    pub fn purpose(self) -> &'static str {
        match self {
            Library::Driver => "runs everything on the GPU",
            Library::NvrtcBuiltins | Library::Nvrtc => "compiles kernels",
            Library::CublasLt => "multiplies matrices",
            Library::Cudnn => "attention over long sequences",
            Library::Nccl => "several devices together",
        }
    }

    /// Where one gets it.
    pub fn source(self) -> &'static str {
        match self {
            Library::Driver => "comes with NVIDIA's driver",
            Library::NvrtcBuiltins | Library::Nvrtc => "pip install nvidia-cuda-nvrtc",
            Library::CublasLt => "pip install nvidia-cublas",
            Library::Cudnn => "pip install nvidia-cudnn-cu13",
            Library::Nccl => "pip install nvidia-nccl-cu13",
        }
    }

    /// What it looks for by name, and so must have been opened before.
    fn needs(self) -> &'static [Library] {
        match self {
            Library::Nvrtc => &[Library::NvrtcBuiltins],
            Library::Cudnn => &[Library::Nvrtc, Library::CublasLt],
            Library::Driver | Library::NvrtcBuiltins | Library::CublasLt | Library::Nccl => &[],
        }
    }

    /// Whether the engine does without it.
    pub fn is_optional(self) -> bool {
        matches!(self, Library::Cudnn | Library::Nccl)
    }

    /// What it is for, and how to get it.
    pub fn hint(self) -> String {
        format!("{}: {}", self.purpose(), self.source())
    }

    /// File names that a loader may know, newest first.
    fn file_names(self) -> Vec<String> {
        let versions: &[&str] = match self {
            Library::Driver => &[".1", ""],
            Library::NvrtcBuiltins => &[".13.3", ".13.2", ".13.1", ".13.0", ".12.9", ".12.8", ""],
            Library::Nvrtc | Library::CublasLt => &[".13", ".12", ""],
            Library::Cudnn => &[".9", ""],
            Library::Nccl => &[".2", ""],
        };
        versions.iter().map(|version| format!("{}.so{version}", self.name())).collect()
    }
}

/// A library that was found.
#[derive(Clone, Debug)]
pub struct Found {
    /// Where; the bare name if the loader found it by itself.
    pub path: PathBuf,
    /// As the loader gave it; the library is never closed.
    handle: usize,
}

impl Found {
    /// The address of a function of the library.
    #[cfg(unix)]
    pub(crate) fn symbol(&self, name: &CStr) -> Option<*const c_void> {
        // SAFETY: the handle is the loader's, and is never closed.
        let address = unsafe { libc::dlsym(self.handle as *mut c_void, name.as_ptr()) };
        (!address.is_null()).then_some(address.cast_const())
    }

    #[cfg(not(unix))]
    pub(crate) fn symbol(&self, _name: &CStr) -> Option<*const c_void> {
        None
    }
}

/// What was found of what was asked for, and where it is looked for.
pub struct Libraries {
    asked: [OnceLock<Option<Found>>; 6],
    pub searched: Vec<PathBuf>,
}

impl Libraries {
    /// Those of the process. Only the folders are looked for here.
    pub fn load() -> &'static Libraries {
        static LIBRARIES: OnceLock<Libraries> = OnceLock::new();
        LIBRARIES.get_or_init(|| Self::in_folders(folders()))
    }

    fn in_folders(searched: Vec<PathBuf>) -> Self {
        Self { asked: Default::default(), searched }
    }

    /// A library, opened at the first call.
    pub fn get(&self, library: Library) -> Option<&Found> {
        let opened = self.asked[library as usize].get_or_init(|| {
            for needed in library.needs() {
                self.get(*needed);
            }
            open(library, &self.searched)
        });
        opened.as_ref()
    }

    /// Looks for what cannot be done without.
    ///
    /// # Errors
    /// Names each that is missing, what it is for, and how to get it.
    pub(crate) fn require(&self, required: &[Library]) -> Result<(), DeviceError> {
        let missing: Vec<String> = required
            .iter()
            .filter(|library| self.get(**library).is_none())
            .map(|library| format!("{} is not installed ({})", library.name(), library.hint()))
            .collect();
        match missing.is_empty() {
            true => Ok(()),
            false => {
                Err(DeviceError::NoLibrary { missing: missing.join(", "), searched: self.searched_text() })
            }
        }
    }

    /// A sentence for errors: where the libraries were looked for.
    pub fn searched_text(&self) -> String {
        let folders: Vec<String> = self.searched.iter().map(|path| path.display().to_string()).collect();
        match folders.is_empty() {
            true => {
                "looked in the loader's path only; set CUDA_HOME, or install the nvidia-* Python packages"
                    .into()
            }
            false => format!("looked in the loader's path and in {}", folders.join(", ")),
        }
    }
}

#[cfg(unix)]
fn open(library: Library, folders: &[PathBuf]) -> Option<Found> {
    use std::ffi::CString;
    let open = |path: &Path| {
        let name = CString::new(path.as_os_str().as_encoded_bytes()).ok()?;
        // SAFETY: NVIDIA's libraries may be opened at any time; the handle is kept for ever.
        let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
        (!handle.is_null()).then(|| Found { path: path.to_path_buf(), handle: handle as usize })
    };
    let names = library.file_names();
    let by_loader = || names.iter().find_map(|name| open(Path::new(name)));
    let in_folders = || {
        let candidates = folders.iter().flat_map(|folder| names.iter().map(move |name| folder.join(name)));
        candidates.filter(|path| path.exists()).find_map(|path| open(&path))
    };
    by_loader().or_else(in_folders)
}

#[cfg(not(unix))]
fn open(_library: Library, _folders: &[PathBuf]) -> Option<Found> {
    None
}

/// The folders that exist, in order of preference.
fn folders() -> Vec<PathBuf> {
    let mut all = Vec::new();
    for variable in ["CUDA_HOME", "CUDA_PATH"] {
        if let Some(home) = std::env::var_os(variable) {
            let home = PathBuf::from(home);
            all.extend([home.join("lib64"), home.join("lib"), home.join("targets/x86_64-linux/lib")]);
        }
    }
    for site in site_packages() {
        all.extend(python_folders(&site));
    }
    all.push("/usr/local/cuda/lib64".into());
    // `lib64` is often a link to `lib`.
    let mut seen = BTreeSet::new();
    all.retain(|folder| folder.canonicalize().is_ok_and(|path| path.is_dir() && seen.insert(path)));
    all
}

/// `nvidia/*/lib` of a Python environment's packages.
fn python_folders(site: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(site.join("nvidia")) else { return Vec::new() };
    let mut folders: Vec<PathBuf> =
        entries.flatten().map(|entry| entry.path().join("lib")).filter(|path| path.is_dir()).collect();
    folders.sort();
    folders
}

/// The `site-packages` folders of the environments in reach, without starting Python.
fn site_packages() -> Vec<PathBuf> {
    let mut prefixes = Vec::new();
    for variable in ["VIRTUAL_ENV", "CONDA_PREFIX"] {
        prefixes.extend(std::env::var_os(variable).map(PathBuf::from));
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    for folder in std::env::split_paths(&path) {
        // A virtual environment's python is a link out of it, so the folder itself comes first.
        if let Ok(target) = folder.join("python3").canonicalize() {
            prefixes.extend(folder.parent().map(Path::to_path_buf));
            prefixes.extend(target.ancestors().nth(2).map(Path::to_path_buf));
        }
    }
    prefixes.extend(std::env::var_os("HOME").map(|home| Path::new(&home).join(".local")));
    let mut sites = Vec::new();
    for prefix in prefixes {
        for lib in ["lib", "lib64"] {
            let Ok(entries) = std::fs::read_dir(prefix.join(lib)) else { continue };
            let pythons = entries.flatten().map(|entry| entry.path()).filter(|path| {
                path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"python3"))
            });
            for python in pythons {
                sites.extend([python.join("site-packages"), python.join("dist-packages")]);
            }
        }
    }
    sites
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_is_opened_when_it_is_asked_for() {
        let libraries = Libraries::in_folders(folders());
        let asked = || Library::ALL.map(|library| libraries.asked[library as usize].get().is_some());
        assert_eq!(asked(), [false; 6]);
        libraries.get(Library::Driver);
        assert_eq!(asked(), [true, false, false, false, false, false]);
        libraries.get(Library::Nvrtc);
        assert_eq!(asked(), [true, true, true, false, false, false]);
        libraries.get(Library::Cudnn);
        assert_eq!(asked(), [true, true, true, true, true, false]);
    }

    #[test]
    fn missing_libraries_are_named_together_with_how_to_get_them() {
        let with = |there: &[Library]| {
            let libraries = Libraries::in_folders(Vec::new());
            for library in Library::ALL {
                let found = Found { path: library.name().into(), handle: 1 };
                let _ = libraries.asked[library as usize].set(there.contains(&library).then_some(found));
            }
            libraries.require(&[Library::Nvrtc, Library::CublasLt]).map_err(|error| error.to_string())
        };
        assert_eq!(with(&[Library::Nvrtc, Library::CublasLt]), Ok(()));
        let one = with(&[Library::Driver, Library::Nvrtc]).unwrap_err();
        assert!(one.starts_with(
            "libcublasLt is not installed (multiplies matrices: pip install nvidia-cublas); looked"
        ));
        let both = with(&[Library::Driver]).unwrap_err();
        assert!(both.contains("pip install nvidia-cuda-nvrtc") && both.contains("nvidia-cublas"), "{both}");
    }
}

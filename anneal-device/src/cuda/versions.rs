//! What the libraries say of themselves: their versions, and the files that they came from.

use std::ffi::{CStr, c_int, c_void};
use std::path::PathBuf;

use super::libraries::{Libraries, Library};

/// How a library gives its version, by the C function of this name.
enum Getter {
    /// `int f(int *version)`.
    Written(&'static CStr),
    /// `int f(int *major, int *minor)`.
    Pair(&'static CStr),
    /// `size_t f()`.
    Returned(&'static CStr),
}

impl Getter {
    fn of(library: Library) -> Option<Self> {
        match library {
            Library::Driver => Some(Self::Written(c"cuDriverGetVersion")),
            // Belongs to the compiler and has its version.
            Library::NvrtcBuiltins => None,
            Library::Nvrtc => Some(Self::Pair(c"nvrtcVersion")),
            Library::CublasLt => Some(Self::Returned(c"cublasLtGetVersion")),
            Library::Cudnn => Some(Self::Returned(c"cudnnGetVersion")),
            Library::Nccl => Some(Self::Written(c"ncclGetVersion")),
        }
    }

    fn symbol(&self) -> &'static CStr {
        match self {
            Self::Written(name) | Self::Pair(name) | Self::Returned(name) => name,
        }
    }
}

/// The version of a library, as its maker writes it; `None` if it is missing or does not say.
pub fn library_version(library: Library) -> Option<String> {
    let getter = Getter::of(library)?;
    let function = Libraries::load().get(library)?.symbol(getter.symbol())?;
    // SAFETY: the functions have the types that NVIDIA documents, and need no device.
    let number = unsafe { call(&getter, function) }?;
    Some(written(library, number))
}

/// # Safety
/// The function is of the getter's type.
unsafe fn call(getter: &Getter, function: *const c_void) -> Option<[usize; 2]> {
    let (mut first, mut second): (c_int, c_int) = (0, 0);
    // SAFETY: the caller's promise.
    let failed = unsafe {
        match getter {
            Getter::Written(_) => {
                let function: extern "C" fn(*mut c_int) -> c_int = std::mem::transmute(function);
                function(&mut first)
            }
            Getter::Pair(_) => {
                let function: extern "C" fn(*mut c_int, *mut c_int) -> c_int = std::mem::transmute(function);
                function(&mut first, &mut second)
            }
            Getter::Returned(_) => {
                let function: extern "C" fn() -> usize = std::mem::transmute(function);
                return Some([function(), 0]);
            }
        }
    };
    (failed == 0).then_some([first as usize, second as usize])
}

/// The makers pack the parts of a version into a number, each in its own way.
fn written(library: Library, [number, minor]: [usize; 2]) -> String {
    match library {
        Library::Driver => format!("CUDA {}.{}", number / 1000, number % 1000 / 10),
        Library::NvrtcBuiltins | Library::Nvrtc => format!("{number}.{minor}"),
        Library::CublasLt | Library::Cudnn | Library::Nccl => {
            format!("{}.{}.{}", number / 10000, number % 10000 / 100, number % 100)
        }
    }
}

/// The file that a library was read from, also where the loader found it by its name alone.
pub fn library_file(library: Library) -> Option<PathBuf> {
    let found = Libraries::load().get(library)?;
    let by_symbol = Getter::of(library).and_then(|getter| file_of(found.symbol(getter.symbol())?));
    Some(by_symbol.unwrap_or_else(|| found.path.clone()))
}

#[cfg(unix)]
fn file_of(address: *const c_void) -> Option<PathBuf> {
    use std::os::unix::ffi::OsStrExt;
    // SAFETY: all zeros is a valid value of this plain structure, and the loader fills it.
    let mut information: libc::Dl_info = unsafe { std::mem::zeroed() };
    // SAFETY: as above; the loader owns the name.
    unsafe {
        if libc::dladdr(address, &mut information) == 0 || information.dli_fname.is_null() {
            return None;
        }
        let name = CStr::from_ptr(information.dli_fname).to_bytes();
        Some(PathBuf::from(std::ffi::OsStr::from_bytes(name)))
    }
}

#[cfg(not(unix))]
fn file_of(_address: *const c_void) -> Option<PathBuf> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packed_versions_are_written_as_their_makers_write_them() {
        assert_eq!(written(Library::Driver, [13020, 0]), "CUDA 13.2");
        assert_eq!(written(Library::Nvrtc, [13, 0]), "13.0");
        assert_eq!(written(Library::Cudnn, [91900, 0]), "9.19.0");
        assert_eq!(written(Library::CublasLt, [130402, 0]), "13.4.2");
        assert_eq!(written(Library::Nccl, [22809, 0]), "2.28.9");
    }

    #[test]
    fn what_is_missing_has_no_version() {
        for library in Library::ALL {
            let found = Libraries::load().get(library).is_some();
            assert!(found || (library_version(library).is_none() && library_file(library).is_none()));
        }
    }
}

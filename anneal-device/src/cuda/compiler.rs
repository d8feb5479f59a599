//! Kernels from CUDA C++ to machine code: NVRTC, with a cache on disk.
//!
//! Contract: a source is text that includes no file; [`PRELUDE`] goes before it. The result is a
//! function of text, options, architecture and compiler version, whose hash names the file in the cache:
//! `ANNEAL_CACHE`, else `XDG_CACHE_HOME/anneal`, else `~/.cache/anneal`, in the folder `kernels`. A cache that cannot be
//! written is not an error: the kernel is compiled again next time.

use std::ffi::{CStr, CString, c_char};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use cudarc::nvrtc::sys;
use sha2::{Digest, Sha256};

use super::libraries::{Libraries, Library};
use crate::DeviceError;

/// What every kernel may use: element types, vector loads, reductions, the counter generator.
pub const PRELUDE: &str = include_str!("prelude.cuh");

/// A kernel file of an op.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    /// Names the file in errors.
    pub name: &'static str,
    /// CUDA C++; its functions are `extern "C" __global__`.
    pub code: &'static str,
}

/// A number that is another one when the text of these kernels is: part of the name of what was measured with them, so
/// that a choice is not kept for longer than it is true.
pub fn revision(sources: &[Source]) -> u64 {
    let mut hasher = DefaultHasher::new();
    sources.iter().for_each(|source| source.code.hash(&mut hasher));
    hasher.finish()
}

/// Macros that a source is compiled with, in a fixed order.
pub type Macros<'a> = &'a [(&'static str, String)];

/// A source with the macros of one use, for compiling all kernels ahead.
#[derive(Clone, Debug)]
pub struct Variant {
    pub source: Source,
    pub macros: Vec<(&'static str, String)>,
}

/// Machine code for an architecture (`sm_90a`), from the cache or the compiler.
///
/// # Errors
/// If NVRTC is missing or the source does not compile; the compiler's log is in the message.
pub fn compile(source: &Source, macros: Macros, architecture: &str) -> Result<Vec<u8>, DeviceError> {
    Libraries::load().require(&[Library::Nvrtc])?;
    let mut options = vec![
        format!("--gpu-architecture={architecture}"),
        "--std=c++17".into(),
        // Fast mathematics would change divisions and functions behind the kernels' backs: they name
        // the fast forms where those are good enough.
        "--fmad=true".into(),
    ];
    options.extend(macros.iter().map(|(name, value)| format!("-D{name}={value}")));
    let text = format!("{PRELUDE}\n#line 1 \"{}.cu\"\n{}", source.name, source.code);
    let path = cache_path(&text, &options);
    if let Some(cubin) = path.as_deref().and_then(read_cached) {
        return Ok(cubin);
    }
    let cubin = compile_text(source.name, &text, &options, architecture)?;
    if let Some(path) = path {
        write_cached(&path, &sealed(cubin.clone()));
    }
    Ok(cubin)
}

fn compile_text(
    name: &str,
    text: &str,
    options: &[String],
    architecture: &str,
) -> Result<Vec<u8>, DeviceError> {
    let failed =
        |log: String| DeviceError::Compile { kernel: name.into(), architecture: architecture.into(), log };
    let text = CString::new(text).map_err(|_| failed("the source holds a zero byte".into()))?;
    let file = CString::new(format!("{name}.cu")).expect("names of kernels are plain");
    let options: Vec<CString> =
        options.iter().map(|option| CString::new(option.as_str()).expect("options are plain")).collect();
    let pointers: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
    let mut program = std::ptr::null_mut();
    // SAFETY: the library is there; all texts live until the program is destroyed, and buffers
    // have the sizes that the library asked for.
    unsafe {
        let none = std::ptr::null();
        let created = sys::nvrtcCreateProgram(&mut program, text.as_ptr(), file.as_ptr(), 0, none, none);
        if created != sys::nvrtcResult::NVRTC_SUCCESS {
            return Err(failed(format!("NVRTC refused it: {created:?}")));
        }
        let compiled = sys::nvrtcCompileProgram(program, pointers.len() as i32, pointers.as_ptr());
        let result = if compiled == sys::nvrtcResult::NVRTC_SUCCESS {
            let mut size = 0;
            sys::nvrtcGetCUBINSize(program, &mut size);
            let mut cubin = vec![0u8; size];
            match sys::nvrtcGetCUBIN(program, cubin.as_mut_ptr().cast()) {
                sys::nvrtcResult::NVRTC_SUCCESS if size > 0 => Ok(cubin),
                other => Err(failed(format!("no machine code: {other:?}"))),
            }
        } else {
            Err(failed(program_log(program)))
        };
        sys::nvrtcDestroyProgram(&mut program);
        result
    }
}

/// # Safety
/// The program exists.
unsafe fn program_log(program: sys::nvrtcProgram) -> String {
    let mut size = 0;
    unsafe {
        sys::nvrtcGetProgramLogSize(program, &mut size);
        let mut log = vec![0u8; size.max(1)];
        sys::nvrtcGetProgramLog(program, log.as_mut_ptr().cast());
        CStr::from_bytes_until_nul(&log)
            .map_or_else(|_| "no log".into(), |log| log.to_string_lossy().into_owned())
    }
}

/// Version of the compiler, as (major, minor); `None` if it is missing.
pub fn version() -> Option<(i32, i32)> {
    Libraries::load().get(Library::Nvrtc)?;
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the library is there.
    unsafe { sys::nvrtcVersion(&mut major, &mut minor) };
    Some((major, minor))
}

/// The folder of everything that may be deleted and made again.
pub fn cache_folder() -> Option<PathBuf> {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    variable("ANNEAL_CACHE")
        .or_else(|| Some(variable("XDG_CACHE_HOME")?.join("anneal")))
        .or_else(|| Some(variable("HOME")?.join(".cache/anneal")))
}

fn cache_path(text: &str, options: &[String]) -> Option<PathBuf> {
    let (major, minor) = version()?;
    let mut hash = Sha256::new();
    hash.update(text.as_bytes());
    options.iter().for_each(|option| hash.update(option.as_bytes()));
    hash.update(format!("nvrtc {major}.{minor}"));
    let name: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Some(cache_folder()?.join("kernels").join(format!("{name}.cubin")))
}

/// What [`sealed`] made, or nothing: a file that was cut off or damaged is made again.
fn read_cached(path: &Path) -> Option<Vec<u8>> {
    let mut bytes = std::fs::read(path).ok()?;
    let seal = bytes.split_off(bytes.len().checked_sub(32)?);
    (Sha256::digest(&bytes)[..] == seal[..]).then_some(bytes)
}

/// Bytes with their SHA-256 behind them.
fn sealed(mut bytes: Vec<u8>) -> Vec<u8> {
    let seal = Sha256::digest(&bytes);
    bytes.extend_from_slice(&seal);
    bytes
}

/// Best effort, by a rename so that no reader sees half a file.
pub(crate) fn write_cached(path: &Path, bytes: &[u8]) {
    let _ = publish(path, bytes, |temporary| std::fs::rename(temporary, path));
}

/// The same unless there is a file already; whether there was. Of processes that write at once one is the first, where
/// the file system has hard links; elsewhere the last one's file stays.
pub(crate) fn write_cached_first(path: &Path, bytes: &[u8]) -> bool {
    let link = |temporary: &Path| match std::fs::hard_link(temporary, path) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => std::fs::rename(temporary, path),
        other => other,
    };
    publish(path, bytes, link).is_err_and(|error| error.kind() == ErrorKind::AlreadyExists)
}

/// Writes a whole file beside `path`, for `place` to give it its name.
fn publish(
    path: &Path,
    bytes: &[u8],
    place: impl FnOnce(&Path) -> std::io::Result<()>,
) -> std::io::Result<()> {
    std::fs::create_dir_all(path.parent().expect("files of the cache lie in its folders"))?;
    let (temporary, mut file) = new_beside(path)?;
    let placed = file.write_all(bytes).and_then(|()| place(&temporary));
    // What was renamed is gone; what was linked or refused is not.
    let _ = std::fs::remove_file(&temporary);
    placed
}

/// A file that nobody else has: processes of other containers or nodes that share the cache may have the same number.
fn new_beside(path: &Path) -> std::io::Result<(PathBuf, std::fs::File)> {
    static WRITTEN: AtomicUsize = AtomicUsize::new(0);
    loop {
        let number = WRITTEN.fetch_add(1, Ordering::Relaxed);
        let temporary = path.with_extension(format!("{}-{number}.new", std::process::id()));
        match std::fs::File::create_new(&temporary) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => continue,
            other => return other.map(|file| (temporary, file)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_file_is_not_read() {
        let path = std::env::temp_dir().join(format!("anneal-cache-test-{}", std::process::id()));
        write_cached(&path, &sealed(vec![7; 100]));
        assert_eq!(read_cached(&path), Some(vec![7; 100]));
        for damaged in [&sealed(vec![7; 100])[..90], &[7; 132], &[]] {
            write_cached(&path, damaged);
            assert_eq!(read_cached(&path), None);
        }
        std::fs::remove_file(&path).unwrap();
    }
}

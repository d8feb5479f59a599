//! Standard output that may fail: a full disk behind `> file`, or a reader that has gone.
//!
//! The macros here take the place of the standard library's, which panic. A command goes on after a failure, so that what
//! it does is done and cleaned up; [`finish`] tells at its end.

use std::fmt;
use std::io::{self, ErrorKind, Write};
use std::sync::OnceLock;

use anyhow::{Result, bail};

/// The first failure; nothing is written after it.
static FAILED: OnceLock<ErrorKind> = OnceLock::new();

pub fn write(text: fmt::Arguments) {
    note(io::stdout().write_fmt(text));
}

pub fn write_bytes(bytes: &[u8]) {
    note(io::stdout().write_all(bytes));
}

pub fn note(written: io::Result<()>) {
    if let Err(error) = written {
        // A terminal that was closed is a reader that has gone.
        let closed = error.raw_os_error() == Some(libc::EIO);
        FAILED.get_or_init(|| if closed { ErrorKind::BrokenPipe } else { error.kind() });
    }
}

/// Writes what is held back.
///
/// # Errors
/// If anything could not be written. That its reader has read enough (`| head`) is no error.
pub fn finish() -> Result<()> {
    note(io::stdout().flush());
    let reason = match FAILED.get() {
        None | Some(ErrorKind::BrokenPipe) => return Ok(()),
        Some(ErrorKind::StorageFull) => "no space left".to_owned(),
        Some(kind) => kind.to_string(),
    };
    bail!("cannot write to standard output: {reason}")
}

macro_rules! print {
    ($($text:tt)*) => { $crate::stdout::write(format_args!($($text)*)) };
}

macro_rules! println {
    () => { $crate::stdout::write(format_args!("\n")) };
    ($($text:tt)*) => { $crate::stdout::write(format_args!("{}\n", format_args!($($text)*))) };
}

/// The same for standard error, whose failure nobody can be told of.
macro_rules! eprintln {
    ($($text:tt)*) => {{
        let line = format!($($text)*) + "\n";
        let _ = std::io::Write::write_all(&mut std::io::stderr(), line.as_bytes());
    }};
}

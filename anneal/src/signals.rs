//! Signals that ask a command to stop, so that it can save or clear away something first.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use anyhow::{Context, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

/// What the first Ctrl-C, SIGTERM or SIGHUP (its terminal was closed) sets. A second one ends the process.
pub struct Signals {
    pub stop: Arc<AtomicBool>,
    which: Arc<AtomicUsize>,
}

impl Signals {
    /// # Errors
    /// If the operating system refuses a handler.
    pub fn catch() -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let which = Arc::new(AtomicUsize::new(0));
        let hangup = (!is_hangup_ignored()).then_some(SIGHUP);
        for signal in hangup.into_iter().chain([SIGINT, SIGTERM]) {
            // The order matters: a signal that finds the flag already set ends the process.
            signal_hook::flag::register_conditional_shutdown(signal, 128 + signal, stop.clone())
                .and_then(|_| signal_hook::flag::register_usize(signal, which.clone(), signal as usize))
                .and_then(|_| signal_hook::flag::register(signal, stop.clone()))
                .context("the operating system refused a signal handler")?;
        }
        Ok(Self { stop, which })
    }

    /// Whether one has come, and which.
    pub fn came(&self) -> Option<i32> {
        let signal = self.which.load(Ordering::Relaxed);
        (signal != 0).then_some(signal as i32)
    }

    /// 128 plus the signal's number; success if none has come.
    pub fn exit_code(&self) -> ExitCode {
        self.came().map_or(ExitCode::SUCCESS, |signal| ExitCode::from((128 + signal) as u8))
    }
}

/// Whether the caller wants closed terminals to be ignored, as `nohup` does.
fn is_hangup_ignored() -> bool {
    let mut action = std::mem::MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: without a new action the present one is written into `action`, which is large enough; zeros are valid too.
    unsafe {
        libc::sigaction(SIGHUP, std::ptr::null(), action.as_mut_ptr()) == 0
            && action.assume_init().sa_sigaction == libc::SIG_IGN
    }
}

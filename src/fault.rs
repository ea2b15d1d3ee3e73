//! Fault points: named steps at which a test can kill, stop or fail the process that reaches them.
//!
//! The tests of guarantee G4 arm one fault by writing `<point> <action>` to the file `crossover_fault` in the data
//! directory (aside, then renamed). The first process that reaches the point takes the file away and does the
//! action: `kill` (SIGKILL to itself), `stop` (SIGSTOP to itself) or `error` (a transient error). Without the cargo
//! feature `fault-points`, as in every build that serves data, a point is nothing at all.

use crate::error::Result;

/// Every point there is, in the order of a migration's life.
pub const POINTS: &[&str] = &[
    "scout:begun",
    "clerk:begun",
    "clerk:filing",
    "clerk:filed",
    "request:taken",
    "request:answering",
    "start:peer",
    "start:capture",
    "start:watermark",
    "start:ready",
    "undo:first",
    "undo:second",
    "copy:claimed",
    "copy:sent",
    "copy:committed",
    "copy:complete",
    "copy:caught-up",
    "cycle:read",
    "cycle:put-off",
    "cycle:flushed",
    "cycle:first-written",
    "cycle:first-committed",
    "cycle:second-written",
    "cycle:second-committed",
    "capture:renewed",
    "rotate:first",
    "conflict:copied",
    "switch:begin",
    "switch:opening",
    "switch:locked",
    "switch:drained",
    "switch:moved",
    "switch:first-committed",
    "switch:second-committed",
    "end:moved",
    "finish:committed",
    "cancel:committed",
    "cleanup:triggers",
    "cleanup:peer",
    "resync:dropped",
    "resync:emptied",
    "resync:begun",
    "reconcile:first",
    "reconcile:second",
];

/// Passes the point `name`, one of [`POINTS`], unless a fault is armed there.
///
/// # Errors
/// `Fault` when the action is `error`; it is transient, so that the step is tried again.
#[cfg(not(feature = "fault-points"))]
#[inline(always)]
pub fn point(name: &'static str) -> Result<()> {
    debug_assert!(POINTS.contains(&name), "{name} is missing in POINTS");
    Ok(())
}

/// Passes the point `name`, one of [`POINTS`], unless a fault is armed there.
///
/// # Errors
/// `Fault` when the action is `error`; it is transient, so that the step is tried again.
#[cfg(feature = "fault-points")]
pub fn point(name: &'static str) -> Result<()> {
    debug_assert!(POINTS.contains(&name), "{name} is missing in POINTS");
    armed::take(name).map_or(Ok(()), |action| armed::perform(name, &action))
}

/// Tests take a safeguard of the protocol out, to show that it is needed: the file `crossover_break` in the data directory names it.
#[cfg(feature = "fault-points")]
pub fn is_taken_out(safeguard: &str) -> bool {
    std::fs::read_to_string("crossover_break").is_ok_and(|text| text.contains(safeguard))
}

/// Never, without the feature `fault-points`.
#[cfg(not(feature = "fault-points"))]
#[inline(always)]
pub fn is_taken_out(_safeguard: &str) -> bool {
    false
}

#[cfg(feature = "fault-points")]
mod armed {
    use std::ffi::{CStr, OsStr};
    use std::fs;
    use std::os::unix::ffi::OsStrExt;
    use std::path::{Path, PathBuf};

    use crate::error::{Error, Result};

    /// Disarms a fault at `name` and returns its action; of several processes one gets it.
    pub(super) fn take(name: &str) -> Option<String> {
        let file = data_directory().join("crossover_fault");
        action_at(&file, name)?;
        // Whoever moves the file away owns it. By now it may be the next fault, for another point.
        let mine = file.with_extension(std::process::id().to_string());
        fs::rename(&file, &mine).ok()?;
        let action = action_at(&mine, name);
        match action {
            Some(_) => fs::remove_file(&mine).ok()?,
            None => fs::rename(&mine, &file).ok()?,
        }
        action
    }

    /// The action in `file`, if it is for the point `name`.
    fn action_at(file: &Path, name: &str) -> Option<String> {
        let text = fs::read_to_string(file).ok()?;
        let (point, action) = text.trim().split_once(' ')?;
        (point == name).then(|| action.trim().to_string())
    }

    /// Does what a fault asks for; `kill` does not return.
    pub(super) fn perform(name: &'static str, action: &str) -> Result<()> {
        let signal = match action {
            "kill" => libc::SIGKILL,
            "stop" => libc::SIGSTOP,
            "error" => return Err(Error::Fault(name)),
            other => return Err(Error::internal(format!("unknown fault action \"{other}\""))),
        };
        // SAFETY: a signal to ourselves; it acts before the call returns to a thread that does not block it.
        unsafe { libc::raise(signal) };
        Ok(())
    }

    fn data_directory() -> PathBuf {
        // SAFETY: set once, long before any worker or backend starts, to a string that stays.
        let path = unsafe { CStr::from_ptr(pgrx::pg_sys::DataDir) };
        PathBuf::from(OsStr::from_bytes(path.to_bytes()))
    }
}

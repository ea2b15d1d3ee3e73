//! A worker whose database has been dropped (`DROP DATABASE ... WITH (FORCE)`) ends for good.
//!
//! The postmaster starts a worker again that did not exit with 0, and cannot know that there is nothing left to connect to: it would do so for
//! ever, each time with a FATAL error in the log. PostgreSQL ends a process that cannot connect without giving it a say, so what it
//! reports is looked at on its way to the log, and the exit that follows is made one without an error.

use std::ffi::c_int;
use std::sync::atomic::{AtomicBool, Ordering};

use pgrx::pg_sys;
use pgrx::prelude::*;

static mut PREVIOUS: pg_sys::emit_log_hook_type = None;
/// The database of this worker is not there.
static GONE: AtomicBool = AtomicBool::new(false);

/// From here on, or no longer: whether the database is there.
///
/// # Safety
/// In a background worker's only thread; `true` once, then `false`.
pub unsafe fn watch(on: bool) {
    // SAFETY: as the caller vouches; both functions stay, as PostgreSQL never unloads a module.
    unsafe {
        if on {
            PREVIOUS = pg_sys::emit_log_hook;
            pg_sys::emit_log_hook = Some(look);
            pg_sys::before_shmem_exit(Some(leave), pg_sys::Datum::from(0));
        } else {
            pg_sys::emit_log_hook = PREVIOUS;
        }
    }
}

/// Looks at a report. The one that says that the database is gone is made a message of ours, and no error.
#[pg_guard]
unsafe extern "C-unwind" fn look(report: *mut pg_sys::ErrorData) {
    // SAFETY: PostgreSQL passes the report that it is about to write; which it frees afterwards; the previous hook gets what we got.
    unsafe {
        let report = &mut *report;
        if report.elevel == pg_sys::FATAL as c_int
            && report.sqlerrcode == PgSqlErrorCode::ERRCODE_INVALID_CATALOG_NAME as c_int
        {
            GONE.store(true, Ordering::Relaxed);
            report.elevel = pg_sys::LOG as c_int;
            report.message = pg_sys::pstrdup(c"pg_crossover worker ends: its database has been dropped".as_ptr());
            report.detail = std::ptr::null_mut();
        }
        if let Some(previous) = PREVIOUS {
            pg_sys::ffi::pg_guard_ffi_boundary(|| previous(report));
        }
    }
}

/// `proc_exit` may be called again from here: it goes on with what is left to be done.
#[pg_guard]
unsafe extern "C-unwind" fn leave(_code: c_int, _argument: pg_sys::Datum) {
    if GONE.load(Ordering::Relaxed) {
        // SAFETY: this process is exiting already.
        unsafe { pg_sys::proc_exit(0) }
    }
}

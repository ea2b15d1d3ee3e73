//! The server's background workers, in whatever database they run: what pg_stat_activity is made of, without a query.

use std::ffi::{CStr, c_char};

use pgrx::pg_sys;

/// A background worker, this extension's or another's.
#[derive(Debug, Clone)]
pub struct Process {
    pub pid: i32,
    pub database: pg_sys::Oid,
    /// Its `backend_type`.
    pub kind: String,
    pub application: String,
}

/// All that run now, or ran when this transaction first looked.
pub fn background_workers() -> Vec<Process> {
    let mut found = Vec::new();
    // SAFETY: a copy of the server's process table, made by this process and valid until it is cleared; entries count from 1. The type is
    // null for a process that has just gone.
    unsafe {
        for i in 1..=pg_sys::pgstat_fetch_stat_numbackends() {
            #[cfg(feature = "pg15")]
            let entry = pg_sys::pgstat_fetch_stat_local_beentry(i);
            #[cfg(not(feature = "pg15"))]
            let entry = pg_sys::pgstat_get_local_beentry_by_index(i);
            if entry.is_null() || (*entry).backendStatus.st_backendType != pg_sys::BackendType::B_BG_WORKER {
                continue;
            }
            let status = &(*entry).backendStatus;
            let kind = pg_sys::GetBackgroundWorkerTypeByPid(status.st_procpid);
            let text = |s: *const c_char| {
                if s.is_null() { String::new() } else { CStr::from_ptr(s).to_string_lossy().into_owned() }
            };
            found.push(Process {
                pid: status.st_procpid,
                database: status.st_databaseid,
                kind: text(kind),
                application: text(status.st_appname),
            });
        }
    }
    found
}

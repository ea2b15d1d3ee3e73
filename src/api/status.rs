//! What `migration_status` says where a migration has no worker: why not.

use pgrx::pg_sys;
use pgrx::prelude::*;

use super::{look, may_have_worker};
use crate::error::Error;
use crate::processes::background_workers;
use crate::version;
use crate::worker::{is_preloaded, max_worker_processes};

/// Why no worker of this database can run as this role; NULL where there is no reason to be seen.
#[pg_extern(sql = false)]
fn crossover_why_no_worker(owner: pg_sys::Oid) -> Option<String> {
    let said = |e: Error| Some([Some(e.to_string()), e.hint()].into_iter().flatten().collect::<Vec<_>>().join(": "));
    if !is_preloaded() {
        return said(Error::NotPreloaded);
    }
    // SAFETY: reads a flag in shared memory.
    if unsafe { pg_sys::RecoveryInProgress() } {
        return Some(
            "This server is a standby: the workers run on the primary, and here once it has been promoted.".into(),
        );
    }
    if let Err(e @ Error::Version { .. }) = look(version::QUERY).and_then(|answer| version::check(&answer)) {
        return said(e);
    }
    if let Err(e) = may_have_worker(owner.to_u32()) {
        return said(e);
    }
    let limit = max_worker_processes();
    (background_workers().len() >= limit as usize).then_some(Error::NoWorkerSlot { limit }).and_then(said)
}

//! Finds every database with work, at the start of the cluster and after a crash. Later starts need no launcher: the
//! postmaster restarts a migration's worker, and `migration_start` starts new ones.

use std::time::Duration;

use pgrx::pg_sys;
use pgrx::prelude::*;

use super::{assignment, connect, exit, my_database, reload_configuration, start_migration, start_scout};
use crate::error::Result;
use crate::lock::wait_latch;
use crate::store::local::{LocalSession, catch};
use crate::store::{Isolation, Session, parse};

/// How long the launcher waits before it looks again when a scout found no slot.
const RETRY: Duration = Duration::from_secs(5);

#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn crossover_launcher_main(_arg: pg_sys::Datum) {
    connect(assignment());
    let mut pending = databases();
    loop {
        reload_configuration();
        pending.retain(|database| match start_scout(*database) {
            Ok(scout) => {
                while !scout.has_stopped() {
                    wait_latch(Duration::from_millis(100));
                }
                false
            }
            Err(_) => true,
        });
        wait_latch(if pending.is_empty() { Duration::from_secs(3600) } else { RETRY });
    }
}

/// The databases that can be connected to, from the shared catalog.
fn databases() -> Vec<pg_sys::Oid> {
    let result = catch(|| {
        let mut found = Vec::new();
        // SAFETY: a plain scan of a shared catalog inside a transaction; the tuple is valid until the next one is fetched.
        unsafe {
            pg_sys::StartTransactionCommand();
            pg_sys::PushActiveSnapshot(pg_sys::GetTransactionSnapshot());
            let relation = pg_sys::table_open(pg_sys::DatabaseRelationId, pg_sys::AccessShareLock as i32);
            let scan = pg_sys::table_beginscan_catalog(relation, 0, std::ptr::null_mut());
            loop {
                let tuple = pg_sys::heap_getnext(scan, pg_sys::ScanDirection::ForwardScanDirection);
                if tuple.is_null() {
                    break;
                }
                let data = (*tuple).t_data;
                let form = data.cast::<u8>().add((*data).t_hoff as usize).cast::<pg_sys::FormData_pg_database>();
                if (*form).datallowconn && !(*form).datistemplate {
                    found.push((*form).oid);
                }
            }
            pg_sys::heap_endscan(scan);
            pg_sys::table_close(relation, pg_sys::AccessShareLock as i32);
            pg_sys::PopActiveSnapshot();
            pg_sys::CommitTransactionCommand();
        }
        found
    });
    match result {
        Ok(found) => found,
        Err(e) => {
            crate::error::raise(PgLogLevel::WARNING, &e);
            exit(1)
        }
    }
}

#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn crossover_scout_main(_arg: pg_sys::Datum) {
    connect(assignment());
    if let Err(e) = scout() {
        crate::error::raise(PgLogLevel::WARNING, &e);
        exit(1);
    }
    exit(0)
}

/// Starts a worker for every migration of this database that has not ended.
fn scout() -> Result<()> {
    // No extension here: nothing to do.
    let Ok(mut session) = LocalSession::new() else { return Ok(()) };
    session.begin(Isolation::ReadCommitted, &[])?;
    let rows = session.query("SELECT id, owner::int8 FROM crossover.migration WHERE phase <> 'done'", &[]);
    session.rollback();
    for row in rows? {
        let id: i32 = parse(row[0].as_deref().unwrap_or(""))?;
        let owner: u32 = parse(row[1].as_deref().unwrap_or(""))?;
        start_migration(my_database(), pg_sys::Oid::from(owner), id)?;
    }
    Ok(())
}

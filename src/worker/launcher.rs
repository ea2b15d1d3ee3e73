//! Finds every database with work, at the start of the cluster and after a crash, and starts a worker for each migration, as soon as there are
//! slots. Later starts need no launcher: the postmaster restarts a migration's worker, and `migration_start` starts new ones.

use std::time::{Duration, Instant};

use pgrx::pg_sys;
use pgrx::prelude::*;

use super::migration::has_worker;
use super::roster::Roster;
use super::{Assignment, assignment, connect, exit, reload_configuration, start_migration, start_scout};
use crate::catalog;
use crate::error::{Error, Result};
use crate::fault;
use crate::lock::wait_latch;
use crate::store::local::{LocalSession, catch};
use crate::store::parse;

/// How long the launcher waits before it tries again to start what found no slot.
const RETRY: Duration = Duration::from_secs(1);
/// And before it sends a scout again that ended without a report.
const SCOUT_AGAIN: Duration = Duration::from_secs(10);

#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn crossover_launcher_main(_arg: pg_sys::Datum) {
    connect(assignment());
    let mut unknown: Vec<(pg_sys::Oid, Instant)> = databases().into_iter().map(|d| (d, Instant::now())).collect();
    let mut waiting: Vec<Assignment> = Vec::new();
    loop {
        reload_configuration();
        if unknown.iter().any(|(_, due)| *due <= Instant::now()) {
            let present = databases();
            unknown.retain(|(database, _)| present.contains(database));
        }
        unknown.retain_mut(|(database, due)| {
            if Instant::now() < *due {
                return true;
            }
            match scout_out(*database) {
                Ok(Some(found)) => waiting.extend(found),
                Ok(None) => *due = Instant::now() + SCOUT_AGAIN,
                Err(_) => *due = Instant::now() + RETRY,
            }
            *due > Instant::now()
        });
        waiting.retain(|migration| start_migration(*migration).is_err());
        wait_latch(if unknown.is_empty() && waiting.is_empty() { Duration::from_secs(3600) } else { RETRY });
    }
}

/// The migrations of a database that need a worker; None when the scout has not come to tell.
///
/// # Errors
/// `Error::NoWorkerSlot` when there is none for the scout.
fn scout_out(database: pg_sys::Oid) -> Result<Option<Vec<Assignment>>> {
    let roster = Roster::create();
    let scout = start_scout(database, roster.handle());
    while scout.as_ref().is_ok_and(|scout| !scout.has_stopped()) {
        wait_latch(Duration::from_millis(100));
    }
    let found = roster.read(database);
    scout.map(|_| found)
}

/// What PostgreSQL writes into datconnlimit before it drops a database.
const HALF_DROPPED: i32 = -2;

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
                if (*form).datallowconn && !(*form).datistemplate && (*form).datconnlimit != HALF_DROPPED {
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
    let assignment = assignment();
    connect(assignment);
    if let Err(e) = scout(assignment.number) {
        crate::error::raise(PgLogLevel::WARNING, &e);
        exit(1);
    }
    exit(0)
}

/// Reports every migration of this database that has not ended and has no worker: the postmaster restarts those that it knows.
fn scout(roster: u32) -> Result<()> {
    let migrations = match LocalSession::new() {
        Ok(mut session) => {
            fault::point("scout:begun")?;
            catalog::find_servers_again(&mut session)?;
            without_worker(&mut session)?
        }
        Err(Error::NotInstalled) => Vec::new(),
        Err(e) => return Err(e),
    };
    // Attaching needs a resource owner.
    // SAFETY: as parallel workers do it; the process ends with it.
    unsafe {
        pg_sys::CurrentResourceOwner =
            pg_sys::ResourceOwnerCreate(std::ptr::null_mut(), c"pg_crossover scout".as_ptr());
    }
    if let Some(roster) = catch(|| Roster::attach(roster))? {
        roster.report(&migrations);
    }
    Ok(())
}

fn without_worker(session: &mut LocalSession) -> Result<Vec<(u32, i32)>> {
    let rows = session.read("SELECT owner::int8, id FROM crossover.migration WHERE phase <> 'done'", &[])?;
    let mut found = Vec::new();
    for row in rows {
        let id = parse(row[1].as_deref().unwrap_or(""))?;
        if !has_worker(id)? {
            found.push((parse(row[0].as_deref().unwrap_or(""))?, id));
        }
    }
    Ok(found)
}

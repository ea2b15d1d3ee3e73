//! `DROP DATABASE` and the like while migrations run in the database: refused at once, and it says why.
//!
//! PostgreSQL would wait five seconds for the workers to go, and then speak of "other sessions". They are found by their database among the
//! server's processes, as the statement runs in another database, and named by their application_name, which `worker::show_name` sets.
//! `WITH (FORCE)` is PostgreSQL's own business: it ends the workers, and `worker::connect` sees to it that they stay away.

use std::collections::BTreeMap;
use std::ffi::{CStr, c_char};

use pgrx::pg_sys;
use pgrx::prelude::*;

use crate::processes::{Process, background_workers};
use crate::worker::{APPLICATION, LASTING};

static mut PREVIOUS: pg_sys::ProcessUtility_hook_type = None;

// As a C function: pgrx's wrapper would copy an error and lose its position, and the names of table and constraint.
unsafe extern "C-unwind" {
    fn standard_ProcessUtility(
        statement: *mut pg_sys::PlannedStmt,
        source: *const c_char,
        read_only_tree: bool,
        context: pg_sys::ProcessUtilityContext::Type,
        parameters: pg_sys::ParamListInfo,
        environment: *mut pg_sys::QueryEnvironment,
        destination: *mut pg_sys::DestReceiver,
        completion: *mut pg_sys::QueryCompletion,
    );
}

/// Installs the hook; from `_PG_init`, while the postmaster preloads.
pub fn init() {
    // SAFETY: the process is single-threaded and loads libraries now.
    unsafe {
        PREVIOUS = pg_sys::ProcessUtility_hook;
        pg_sys::ProcessUtility_hook = Some(process_utility);
    }
}

/// No `pg_guard`: an error of the statement leaves this frame, which has nothing to destroy, as it came.
unsafe extern "C-unwind" fn process_utility(
    statement: *mut pg_sys::PlannedStmt,
    source: *const c_char,
    read_only_tree: bool,
    context: pg_sys::ProcessUtilityContext::Type,
    parameters: pg_sys::ParamListInfo,
    environment: *mut pg_sys::QueryEnvironment,
    destination: *mut pg_sys::DestReceiver,
    completion: *mut pg_sys::QueryCompletion,
) {
    // SAFETY: PostgreSQL passes a valid statement; whoever is next gets what we got. The guard turns our error into PostgreSQL's.
    unsafe {
        let tree = (*statement).utilityStmt;
        if matters((*tree).type_) {
            pg_sys::panic::pgrx_extern_c_guard(|| refuse_in_use(tree));
        }
        let next = match PREVIOUS {
            Some(previous) => previous,
            None => standard_ProcessUtility,
        };
        next(statement, source, read_only_tree, context, parameters, environment, destination, completion);
    }
}

fn matters(tag: pg_sys::NodeTag) -> bool {
    use pg_sys::NodeTag::{T_AlterDatabaseStmt, T_CreatedbStmt, T_DropdbStmt, T_RenameStmt};
    matches!(tag, T_DropdbStmt | T_AlterDatabaseStmt | T_RenameStmt | T_CreatedbStmt)
}

/// What a statement needs to have for itself.
struct Wanted {
    database: *const c_char,
    hint: &'static str,
}

const END_THEM: &str = "Finish or cancel the migrations first.";
const END_OR_FORCE: &str = "Finish or cancel the migrations first. DROP DATABASE ... WITH (FORCE) ends their workers and drops the database all the same.";

/// # Safety
/// `tree` is a valid utility statement.
unsafe fn wanted(tree: *mut pg_sys::Node) -> Option<Wanted> {
    // SAFETY: node tags are checked before casts; strings and lists are the parser's.
    unsafe {
        let option = |list: *mut pg_sys::List, name: &CStr| {
            pgrx::PgList::<pg_sys::DefElem>::from_pg(list).iter_ptr().find(|o| CStr::from_ptr((**o).defname) == name)
        };
        match (*tree).type_ {
            pg_sys::NodeTag::T_DropdbStmt => {
                let drop = tree.cast::<pg_sys::DropdbStmt>();
                let forced = option((*drop).options, c"force").is_some();
                (!forced).then_some(Wanted { database: (*drop).dbname, hint: END_OR_FORCE })
            }
            pg_sys::NodeTag::T_AlterDatabaseStmt => {
                let alter = tree.cast::<pg_sys::AlterDatabaseStmt>();
                let moves = option((*alter).options, c"tablespace").is_some();
                moves.then_some(Wanted { database: (*alter).dbname, hint: END_THEM })
            }
            pg_sys::NodeTag::T_RenameStmt => {
                let rename = tree.cast::<pg_sys::RenameStmt>();
                let database = (*rename).renameType == pg_sys::ObjectType::OBJECT_DATABASE;
                database.then_some(Wanted { database: (*rename).subname, hint: END_THEM })
            }
            pg_sys::NodeTag::T_CreatedbStmt => {
                let template = option((*tree.cast::<pg_sys::CreatedbStmt>()).options, c"template")?;
                let named = !(*template).arg.is_null();
                named.then(|| Wanted { database: pg_sys::defGetString(template), hint: END_THEM })
            }
            _ => None,
        }
    }
}

/// Raises an error where migrations run in the database that the statement wants. Not for those to whom PostgreSQL will refuse it anyway: what
/// runs in a database is not theirs to know.
///
/// # Safety
/// As [`wanted`].
unsafe fn refuse_in_use(tree: *mut pg_sys::Node) {
    // SAFETY: as the caller vouches; look-ups in shared catalogs, inside the statement's transaction.
    let (database, name, hint) = unsafe {
        let Some(wanted) = wanted(tree) else { return };
        if wanted.database.is_null() {
            return;
        }
        let database = pg_sys::get_database_oid(wanted.database, true);
        if database == pg_sys::InvalidOid || database == pg_sys::MyDatabaseId || !is_owner(database) {
            return;
        }
        (database, CStr::from_ptr(wanted.database).to_string_lossy().into_owned(), wanted.hint)
    };
    let workers = workers_in(database);
    if workers.is_empty() {
        return;
    }
    let message = format!("database \"{name}\" is in use by pg_crossover migrations");
    pg_sys::panic::ErrorReport::new(PgSqlErrorCode::ERRCODE_OBJECT_IN_USE, message, "pg_crossover")
        .set_detail(describe(&workers))
        .set_hint(hint)
        .report(PgLogLevel::ERROR);
}

fn is_owner(database: pg_sys::Oid) -> bool {
    // SAFETY: a look-up in the system caches.
    unsafe {
        #[cfg(feature = "pg15")]
        return pg_sys::pg_database_ownercheck(database, pg_sys::GetUserId());
        #[cfg(not(feature = "pg15"))]
        return pg_sys::object_ownercheck(pg_sys::DatabaseRelationId, database, pg_sys::GetUserId());
    }
}

fn workers_in(database: pg_sys::Oid) -> Vec<Process> {
    // SAFETY: forgets a copy that this transaction may have made before.
    unsafe { pg_sys::pgstat_clear_backend_activity_snapshot() };
    let mut workers = background_workers();
    workers.retain(|w| w.database == database && LASTING.contains(&w.kind.as_str()));
    workers
}

/// `migration "shop": pid 123, pid 124`, a line for each.
fn describe(workers: &[Process]) -> String {
    let mut lines: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for worker in workers {
        let of = match worker.application.strip_prefix(APPLICATION).map(str::trim) {
            Some(name) if !name.is_empty() => format!("migration \"{name}\""),
            _ => "a migration that is about to start".to_string(),
        };
        lines.entry(of).or_default().push(format!("pid {}", worker.pid));
    }
    lines.iter().map(|(of, pids)| format!("{of}: {}", pids.join(", "))).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use pgrx::pg_sys;

    use super::{Process, describe};

    #[test]
    fn workers_are_named_by_their_migration() {
        let worker = |pid, kind: &str, application: &str| Process {
            pid,
            database: pg_sys::InvalidOid,
            kind: format!("pg_crossover {kind}"),
            application: application.into(),
        };
        let workers = [
            worker(7, "migration", "pg_crossover shop"),
            worker(8, "copy", "pg_crossover shop"),
            worker(9, "migration", ""),
        ];
        assert_eq!(describe(&workers), "a migration that is about to start: pid 9\nmigration \"shop\": pid 7, pid 8");
    }
}

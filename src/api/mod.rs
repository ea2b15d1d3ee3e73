//! The SQL-callable functions. Thin: they read arguments, check who calls, have the migration's worker do it, and wait.

use std::time::Duration;

use pgrx::JsonB;
use pgrx::datum::Interval;
use pgrx::pg_sys;
use pgrx::prelude::*;

use self::document::Document;
use crate::caller::Caller;
use crate::error::{Error, Result, report};
use crate::lock::wait_latch;
use crate::mapping::ident::MAX_BYTES;
use crate::mapping::model::{Mapping, Options};
use crate::owner::{self, Warning};
use crate::state::State;
use crate::version;
use crate::worker::clerk::{Reply, Request, Segment, Start};
use crate::worker::{is_preloaded, my_database, start_clerk};

mod document;
mod status;
#[cfg(any(test, feature = "pg_test"))]
mod tests;

/// The states of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PostgresEnum)]
#[allow(non_camel_case_types)]
pub enum migration_state {
    copying,
    first,
    both,
    second,
    finished,
    cancelled,
}

impl From<State> for migration_state {
    fn from(state: State) -> Self {
        match state {
            State::Copying => migration_state::copying,
            State::First => migration_state::first,
            State::Both => migration_state::both,
            State::Second => migration_state::second,
            State::Finished => migration_state::finished,
            State::Cancelled => migration_state::cancelled,
        }
    }
}

impl From<migration_state> for State {
    fn from(state: migration_state) -> Self {
        match state {
            migration_state::copying => State::Copying,
            migration_state::first => State::First,
            migration_state::both => State::Both,
            migration_state::second => State::Second,
            migration_state::finished => State::Finished,
            migration_state::cancelled => State::Cancelled,
        }
    }
}

extension_sql_file!("../../sql/catalog.sql", name = "catalog", requires = [migration_state]);
extension_sql_file!("../../sql/views.sql", name = "views", requires = ["catalog", migration_state]);
extension_sql_file!("../../sql/comments.sql", name = "comments", requires = ["views"]);
extension_sql_file!("../../sql/privileges.sql", name = "privileges", requires = ["comments"], finalize);

/// Starts a migration: checks the mapping, installs capture, begins the copy. Returns when the copy has begun.
#[pg_extern]
fn migration_start(
    name: &str,
    mapping: Document,
    options: default!(Document, "'{}'"),
    timeout: default!(Interval, "'30 seconds'"),
) -> migration_state {
    let (text, options) = (mapping.0, options.0);
    or_report((|| {
        check_name(name)?;
        Mapping::parse(&text).map_err(|problems| Error::Mapping { name: name.to_string(), problems })?;
        Options::parse(&options).map_err(|problem| Error::Options { name: name.to_string(), problem })?;
        let start = Start { mapping: text.clone(), options: options.clone() };
        request(name, "start", serde_json::json!({}), &timeout, Some(start))
    })())
}

/// Waits until the copy is complete and every change committed before the call has been replicated.
#[pg_extern]
fn migration_wait(name: &str, timeout: default!(Interval, "'1 hour'")) -> migration_state {
    or_report(request(name, "wait", serde_json::json!({}), &timeout, None))
}

/// Moves a migration between the states first, both and second, one step at a time.
#[pg_extern]
fn migration_set_state(
    name: &str,
    state: migration_state,
    timeout: default!(Interval, "'30 seconds'"),
    force: default!(bool, "false"),
) -> migration_state {
    let state: State = state.into();
    let arguments = serde_json::json!({ "state": state.as_str(), "force": force });
    or_report(request(name, "set_state", arguments, &timeout, None))
}

/// Stops copy and replication; changes go on being captured.
#[pg_extern]
fn migration_pause(name: &str) -> migration_state {
    or_report(request(name, "pause", serde_json::json!({}), &seconds(30.0), None))
}

/// Goes on after migration_pause.
#[pg_extern]
fn migration_resume(name: &str) -> migration_state {
    or_report(request(name, "resume", serde_json::json!({}), &seconds(30.0), None))
}

/// Decides a recorded conflict anew, or has a parked row tried again; returns the image that stands now.
#[pg_extern]
fn migration_resolve(conflict: i64, keep: &str) -> Option<JsonB> {
    let resolved = (|| {
        if !matches!(keep, "first" | "second") {
            return Err(Error::BadArgument {
                message: format!("\"{keep}\" is not a store"),
                hint: "keep is 'first' or 'second'.".into(),
            });
        }
        let entry = look(&format!("SELECT name FROM crossover.conflict WHERE id = {conflict}"))?;
        let name = entry.first().and_then(|r| r[0].clone()).ok_or(Error::UnknownConflict { conflict })?;
        let arguments = serde_json::json!({ "conflict": conflict, "keep": keep });
        request(&name, "resolve", arguments, &seconds(30.0), None)?;
        let standing = look(&format!("SELECT standing::text FROM crossover.conflict WHERE id = {conflict}"))?;
        Ok(standing.into_iter().next().and_then(|mut r| r.pop().flatten()))
    })();
    match resolved {
        Ok(image) => image.and_then(|text| serde_json::from_str(&text).ok()).map(JsonB),
        Err(e) => report(&e),
    }
}

/// Ends a migration that is in state second: the views stay, replication goes.
#[pg_extern]
fn migration_finish(
    name: &str,
    timeout: default!(Interval, "'30 seconds'"),
    drop_first: default!(bool, "false"),
) -> migration_state {
    or_report(request(name, "finish", serde_json::json!({ "drop_first": drop_first }), &timeout, None))
}

/// Undoes a migration that is in state copying or first: everything as before.
#[pg_extern]
fn migration_cancel(
    name: &str,
    timeout: default!(Interval, "'30 seconds'"),
    force: default!(bool, "false"),
) -> migration_state {
    or_report(request(name, "cancel", serde_json::json!({ "force": force }), &timeout, None))
}

fn or_report(result: Result<State>) -> migration_state {
    match result {
        Ok(state) => state.into(),
        Err(e) => report(&e),
    }
}

/// Seconds: far from where dates end, and longer than any server runs.
const LONGEST_TIMEOUT: f64 = 10.0 * 366.0 * 86400.0;

fn seconds(seconds: f64) -> Interval {
    Interval::from_seconds(seconds)
}

fn check_name(name: &str) -> Result<()> {
    if name.trim().is_empty() {
        return Err(Error::BadArgument {
            message: "the name of the migration is empty".into(),
            hint: "Choose a name of 1 to 63 bytes.".into(),
        });
    }
    if name.len() > MAX_BYTES {
        return Err(Error::NameTooLong { bytes: name.len(), most: MAX_BYTES });
    }
    Ok(())
}

/// Has a clerk file the request, then waits for the worker's answer; interruptible. The request of a caller that is cancelled is given
/// up at the next step that changes nothing.
fn request(
    name: &str,
    kind: &str,
    arguments: serde_json::Value,
    timeout: &Interval,
    start: Option<Start>,
) -> Result<State> {
    if !is_preloaded() {
        return Err(Error::NotPreloaded);
    }
    // SAFETY: reads a flag in shared memory.
    if unsafe { pg_sys::RecoveryInProgress() } {
        return Err(Error::InRecovery);
    }
    // Waiting changes nothing.
    // SAFETY: reads a flag of this process's transaction.
    if kind != "wait" && unsafe { pg_sys::XactReadOnly } {
        return Err(Error::ReadOnly { function: format!("migration_{kind}") });
    }
    version::check(&look(version::QUERY)?)?;
    let timeout = timeout.as_micros() as f64 / 1e6;
    if timeout <= 0.0 {
        return Err(Error::BadArgument {
            message: "the timeout must be positive".into(),
            hint: "For example: interval '30 seconds'.".into(),
        });
    }
    if timeout > LONGEST_TIMEOUT {
        return Err(Error::BadArgument {
            message: "the timeout is too long".into(),
            hint: "It can be 10 years at most.".into(),
        });
    }
    let owner = if start.is_none() { check_owner(name)? } else { new_owner()? };
    // SAFETY: reads the calling role and its name.
    let who = unsafe {
        let name = pg_sys::GetUserNameFromId(pg_sys::GetUserId(), false);
        std::ffi::CStr::from_ptr(name).to_string_lossy().into_owned()
    };
    let caller = Caller::here();
    let request =
        Request { name: name.to_string(), kind: kind.to_string(), arguments, who, caller, timeout, owner, start };
    let segment = Segment::create(&request)?;
    let clerk = start_clerk(my_database(), segment.handle())?;
    while !clerk.has_stopped() {
        wait_latch(Duration::from_millis(10));
    }
    let reply = segment.reply();
    segment.detach();
    match reply {
        Some(Reply::Filed(id)) => {
            let state = await_answer(id, name, owner, timeout)?;
            caller.leave();
            Ok(state)
        }
        Some(Reply::Refused { sqlstate, message, detail, hint }) => {
            Err(Error::Request { sqlstate, message, detail, hint })
        }
        None => Err(Error::NotFiled),
    }
}

/// Reads the extension's tables with the latest snapshot: the caller's own would not show the answer.
fn look(sql: &str) -> Result<Vec<crate::store::Row>> {
    crate::store::local::look(sql)
}

/// The role that calls, which a worker is to run as.
fn new_owner() -> Result<u32> {
    // SAFETY: reads the role that calls.
    let role = unsafe { pg_sys::GetUserId() }.to_u32();
    may_have_worker(role)?;
    Ok(role)
}

/// # Errors
/// Why a worker cannot connect as `owner`.
fn may_have_worker(owner: u32) -> Result<()> {
    owner::may_connect(owner, &look(&owner::query(owner))?)
}

fn check_owner(name: &str) -> Result<u32> {
    let name_sql = crate::mapping::ident::quote_literal(name);
    let rows =
        look(&format!("SELECT owner::int8, owner::regrole::text FROM crossover.migration WHERE name = {name_sql}"))?;
    let Some(row) = rows.first() else { return Err(Error::UnknownMigration { name: name.to_string() }) };
    let owner: u32 = crate::store::parse(row[0].as_deref().unwrap_or("0"))?;
    let owner_name = row[1].clone().unwrap_or_default();
    // SAFETY: catalog look-ups in the caller's transaction.
    let member = unsafe { pg_sys::has_privs_of_role(pg_sys::GetUserId(), pg_sys::Oid::from(owner)) };
    if member { Ok(owner) } else { Err(Error::NotOwner { name: name.to_string(), owner: owner_name }) }
}

fn warn(warning: Warning) {
    pg_sys::panic::ErrorReport::new(
        PgSqlErrorCode::ERRCODE_WARNING_PRIVILEGE_NOT_GRANTED,
        warning.message,
        "pg_crossover",
    )
    .set_detail(warning.detail)
    .set_hint(warning.hint)
    .report(PgLogLevel::WARNING);
}

fn await_answer(id: i64, name: &str, owner: u32, timeout: f64) -> Result<State> {
    // The worker keeps the deadline; this one is for when there is no worker.
    let until = std::time::Instant::now() + Duration::from_secs_f64(timeout + 5.0);
    loop {
        let rows = look(&format!("SELECT status, answer::text FROM crossover.request WHERE id = {id}"))?;
        let Some(row) = rows.first() else { return Err(Error::internal("the migration is gone")) };
        let answer: serde_json::Value = serde_json::from_str(row[1].as_deref().unwrap_or("{}")).unwrap_or_default();
        let text = |key: &str| answer[key].as_str().map(str::to_string);
        match row[0].as_deref() {
            Some("done") => {
                let warnings = serde_json::from_value::<Vec<Warning>>(answer["warnings"].clone()).unwrap_or_default();
                warnings.into_iter().for_each(warn);
                return text("state").unwrap_or_default().parse().map_err(Error::Internal);
            }
            Some("failed") => {
                return Err(Error::Request {
                    sqlstate: text("sqlstate").unwrap_or_else(|| "XX000".into()),
                    message: text("message").unwrap_or_default(),
                    detail: text("detail"),
                    hint: text("hint"),
                });
            }
            _ if std::time::Instant::now() >= until => {
                // Whether a worker could run at all comes first.
                may_have_worker(owner)?;
                return Err(Error::Timeout {
                    name: name.to_string(),
                    waited_ms: (timeout * 1000.0) as u64,
                    detail: "The migration's worker has not answered; migration_status shows whether it runs.".into(),
                });
            }
            _ => wait_latch(Duration::from_millis(10)),
        }
    }
}

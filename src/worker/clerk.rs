//! Files a caller's request, in a transaction of its own: the caller's may be rolled back, and may hold locks.
//!
//! The request travels in a dynamic shared memory segment; the answer is a row of `crossover.request`.

use std::time::{Duration, Instant};

use pgrx::pg_sys;
use pgrx::prelude::*;
use serde::{Deserialize, Serialize};

use super::migration::has_worker;
use super::{Assignment, assignment, connect, exit, my_database, start_migration};
use crate::caller::Caller;
use crate::error::{Error, Result};
use crate::fault;
use crate::lock::wait_latch;
use crate::store::local::{LocalSession, catch};
use crate::store::{Isolation, Session, parse};

/// What a function asks for.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Request {
    pub name: String,
    pub kind: String,
    pub arguments: serde_json::Value,
    pub who: String,
    pub caller: Caller,
    /// Seconds from now.
    pub timeout: f64,
    /// The owner of the migration that the caller has the rights of.
    pub owner: u32,
    /// For `start`: the new migration.
    pub start: Option<Start>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Start {
    pub mapping: String,
    pub options: String,
}

/// What the clerk says: the request's number, or why there is none.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Reply {
    Filed(i64),
    Refused { sqlstate: String, message: String, detail: Option<String>, hint: Option<String> },
}

/// Bytes at the start of a segment: the length of the request, then of the reply.
const HEADER: usize = 16;
/// A start that has failed gives its name up within this time.
const UNDONE_WITHIN: Duration = Duration::from_secs(8);
/// Room for a reply.
const REPLY: usize = 16 * 1024;

/// The memory that a caller and its clerk share.
pub struct Segment(*mut pg_sys::dsm_segment);

impl Segment {
    pub fn create(request: &Request) -> Result<Segment> {
        let text = serde_json::to_vec(request).map_err(|e| Error::internal(e.to_string()))?;
        // SAFETY: the segment is as long as what is written into it; nobody else knows it yet.
        unsafe {
            let segment = pg_sys::dsm_create(HEADER + text.len() + REPLY, 0);
            let base = pg_sys::dsm_segment_address(segment).cast::<u8>();
            base.cast::<u64>().write_unaligned(text.len() as u64);
            base.add(8).cast::<u64>().write_unaligned(0);
            std::ptr::copy_nonoverlapping(text.as_ptr(), base.add(HEADER), text.len());
            Ok(Segment(segment))
        }
    }

    pub fn handle(&self) -> u32 {
        // SAFETY: the segment is mapped while this value lives.
        unsafe { pg_sys::dsm_segment_handle(self.0) }
    }

    fn attach(handle: u32) -> Option<Segment> {
        // SAFETY: returns null when the creator is gone.
        let segment = unsafe { pg_sys::dsm_attach(handle) };
        (!segment.is_null()).then_some(Segment(segment))
    }

    fn request(&self) -> Result<Request> {
        // SAFETY: written by `create` before the clerk was started.
        let text = unsafe {
            let base = pg_sys::dsm_segment_address(self.0).cast::<u8>();
            let length = base.cast::<u64>().read_unaligned() as usize;
            std::slice::from_raw_parts(base.add(HEADER), length)
        };
        serde_json::from_slice(text).map_err(|e| Error::internal(e.to_string()))
    }

    fn answer(&self, reply: &Reply) {
        let mut text = serde_json::to_vec(reply).unwrap_or_default();
        if text.len() > REPLY {
            text = serde_json::to_vec(&Reply::Refused {
                sqlstate: "XX000".into(),
                message: "the error was too long to report".into(),
                detail: None,
                hint: None,
            })
            .unwrap_or_default();
        }
        // SAFETY: the reply's room follows the request; the length is written last, and read after the clerk has ended.
        unsafe {
            let base = pg_sys::dsm_segment_address(self.0).cast::<u8>();
            let length = base.cast::<u64>().read_unaligned() as usize;
            std::ptr::copy_nonoverlapping(text.as_ptr(), base.add(HEADER + length), text.len());
            std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
            base.add(8).cast::<u64>().write_unaligned(text.len() as u64);
        }
    }

    /// The reply, once the clerk has ended; None when it died without one.
    pub fn reply(&self) -> Option<Reply> {
        // SAFETY: as in `answer`.
        let text = unsafe {
            let base = pg_sys::dsm_segment_address(self.0).cast::<u8>();
            let length = base.cast::<u64>().read_unaligned() as usize;
            let reply = base.add(8).cast::<u64>().read_volatile() as usize;
            std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
            std::slice::from_raw_parts(base.add(HEADER + length), reply)
        };
        serde_json::from_slice(text).ok()
    }

    pub fn detach(self) {
        // SAFETY: nobody uses the address afterwards.
        unsafe { pg_sys::dsm_detach(self.0) }
    }
}

#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn crossover_clerk_main(_arg: pg_sys::Datum) {
    let assignment = assignment();
    connect(assignment);
    // Attaching needs a resource owner, and the mapping must outlive the transaction.
    // SAFETY: as parallel workers do it.
    unsafe {
        pg_sys::CurrentResourceOwner =
            pg_sys::ResourceOwnerCreate(std::ptr::null_mut(), c"pg_crossover clerk".as_ptr());
    }
    let Ok(Some(segment)) = catch(|| Segment::attach(assignment.number)) else { exit(1) };
    // SAFETY: keeps the mapping until the process ends.
    unsafe { pg_sys::dsm_pin_mapping(segment.0) };
    let reply = match segment.request().and_then(|r| file(&r)) {
        Ok(id) => Reply::Filed(id),
        Err(e) => Reply::Refused { sqlstate: e.sqlstate(), message: e.to_string(), detail: e.detail(), hint: e.hint() },
    };
    segment.answer(&reply);
    exit(0)
}

fn file(request: &Request) -> Result<i64> {
    let mut session = LocalSession::new()?;
    fault::point("clerk:begun")?;
    let until = Instant::now() + UNDONE_WITHIN;
    loop {
        session.begin(Isolation::ReadCommitted, &[])?;
        let undoing = session.query(
            "SELECT FROM crossover.migration m JOIN crossover.request r ON r.migration_id = m.id \
             WHERE m.name = $1::text AND m.phase = 'setting up' AND r.kind = 'start' AND r.status = 'failed'",
            &[Some(&request.name)],
        );
        session.rollback();
        if undoing?.is_empty() || Instant::now() >= until {
            break;
        }
        wait_latch(Duration::from_millis(10));
    }
    session.begin(Isolation::ReadCommitted, &[])?;
    let filed = file_in(&mut session, request).and_then(|filed| fault::point("clerk:filing").map(|()| filed));
    match filed {
        Ok((id, migration)) => {
            if !request.caller.is_waiting()? {
                session.rollback();
                return Err(Error::Withdrawn);
            }
            let _whole = NoInterrupts::begin();
            session.commit()?;
            let begun = fault::point("clerk:filed").and_then(|()| match request.kind.as_str() {
                "pause" => cancel_work(&mut session, migration),
                "start" => start_worker(request.owner, migration),
                _ => revive(&mut session, request.owner, migration, id),
            });
            if begun.is_err() && request.start.is_some() {
                let id = migration.to_string();
                session.write("DELETE FROM crossover.migration WHERE id = $1::text::int", &[Some(&id)])?;
            }
            begun.map(|()| id)
        }
        Err(e) => {
            session.rollback();
            Err(e)
        }
    }
}

/// While this lives, this process is not cancelled or terminated: a migration that is filed has a worker.
struct NoInterrupts;

impl NoInterrupts {
    fn begin() -> NoInterrupts {
        // SAFETY: a counter of this process, as HOLD_INTERRUPTS() keeps it.
        unsafe { pg_sys::InterruptHoldoffCount += 1 };
        NoInterrupts
    }
}

impl Drop for NoInterrupts {
    fn drop(&mut self) {
        // SAFETY: as above. An error has set it to zero.
        unsafe { pg_sys::InterruptHoldoffCount = pg_sys::InterruptHoldoffCount.saturating_sub(1) };
    }
}

fn start_worker(owner: u32, migration: i32) -> Result<()> {
    let role = pg_sys::Oid::from(owner);
    start_migration(Assignment { database: my_database(), role, number: migration as u32 }).map(drop)
}

/// A migration whose worker the postmaster cannot start again, as its role is gone, has none: its present owner's is started.
fn revive(session: &mut LocalSession, owner: u32, migration: i32, request: i64) -> Result<()> {
    let started_as = session.read(
        "SELECT FROM crossover.activity a JOIN crossover.request r USING (migration_id) WHERE a.migration_id = $1::text::int \
         AND r.id = $2::text::bigint AND r.status = 'queued' AND a.worker_role <> $3::text::oid",
        &[Some(&migration.to_string()), Some(&request.to_string()), Some(&owner.to_string())],
    )?;
    if started_as.is_empty() || has_worker(migration)? { Ok(()) } else { start_worker(owner, migration) }
}

/// Cancels what the migration's processes are doing, so that they look at their requests now. Not a switch: that one ends first.
fn cancel_work(session: &mut LocalSession, migration: i32) -> Result<()> {
    session
        .read(
            "SELECT pg_cancel_backend(p.pid) FROM pg_stat_activity p WHERE p.backend_type IN ('pg_crossover migration', 'pg_crossover copy') \
               AND p.pid IN (SELECT worker_pid FROM crossover.activity WHERE migration_id = $1::text::int \
                             UNION ALL SELECT worker FROM crossover.chunk WHERE migration_id = $1::text::int) \
               AND NOT EXISTS (SELECT FROM crossover.request WHERE migration_id = $1::text::int AND status = 'running')",
            &[Some(&migration.to_string())],
        )
        .map(drop)
}

fn file_in(session: &mut LocalSession, request: &Request) -> Result<(i64, i32)> {
    if let Some(start) = &request.start {
        // An ended migration gives its name up, and its records, to whoever may see them.
        session.execute(
            "DELETE FROM crossover.migration WHERE name = $1::text AND phase = 'done' AND state IN ('finished', 'cancelled') \
             AND pg_has_role($2::text::oid, owner, 'USAGE')",
            &[Some(&request.name), Some(&request.owner.to_string())],
        )?;
        let taken = session.query("SELECT FROM crossover.migration WHERE name = $1::text", &[Some(&request.name)])?;
        if !taken.is_empty() {
            return Err(Error::NameTaken { name: request.name.clone() });
        }
        session.execute("DELETE FROM crossover.history WHERE name = $1::text", &[Some(&request.name)])?;
        session.execute("DELETE FROM crossover.conflict WHERE name = $1::text", &[Some(&request.name)])?;
        // Two starts at once: the second has waited for the first here.
        let inserted = session.execute(
            "WITH m AS (INSERT INTO crossover.migration (name, tag, owner, server_id, mapping, options, state, phase) \
             VALUES ($1::text, left(replace(gen_random_uuid()::text, '-', ''), 8), $2::text::oid, 0, $3::text, $4::text, 'copying', 'setting up') RETURNING id) \
             INSERT INTO crossover.activity (migration_id) SELECT id FROM m",
            &[Some(&request.name), Some(&request.owner.to_string()), Some(&start.mapping), Some(&start.options)],
        );
        inserted.map_err(|e| match e {
            e if e.is_unique_violation() => Error::NameTaken { name: request.name.clone() },
            e => e,
        })?;
    }
    if request.kind == "pause" {
        // Before the row is locked below: two clerks that both want to change what the other has locked would wait for each other.
        session
            .execute("UPDATE crossover.migration SET paused = true WHERE name = $1::text", &[Some(&request.name)])?;
    }
    let answer = answer_of_the_past(session, request)?;
    let status = if answer.is_some() { "done" } else { "queued" };
    let rows = session.query(
        "INSERT INTO crossover.request (migration_id, kind, arguments, who, caller_pid, caller_call, deadline, status, answer) \
         SELECT id, $2::text, $3::text::jsonb, $4::text, $5::text::int, $9::text::bigint, clock_timestamp() + make_interval(secs => $6::text::float8), $7::text, $8::text::jsonb \
         FROM crossover.migration WHERE name = $1::text AND owner = $10::text::oid RETURNING id, migration_id",
        &[
            Some(&request.name),
            Some(&request.kind),
            Some(&request.arguments.to_string()),
            Some(&request.who),
            Some(&request.caller.pid.to_string()),
            Some(&request.timeout.to_string()),
            Some(status),
            answer.as_deref(),
            Some(&request.caller.call.to_string()),
            Some(&request.owner.to_string()),
        ],
    )?;
    let Some(row) = rows.first() else { return Err(Error::UnknownMigration { name: request.name.clone() }) };
    let field = |i: usize| row[i].as_deref().unwrap_or("");
    Ok((parse(field(0))?, parse(field(1))?))
}

/// A migration that has ended has no worker to ask: the answer, where it is what was asked for.
///
/// Locks the migration's row until the request is filed or refused: a worker that notes the end meanwhile waits for that, and then finds
/// the request when it looks for the last time. So there is none that comes after the last look.
///
/// # Errors
/// `WrongState` where it is not.
fn answer_of_the_past(session: &mut LocalSession, request: &Request) -> Result<Option<String>> {
    let rows = session.query(
        "SELECT CASE WHEN phase = 'done' AND state IN ('finished', 'cancelled') THEN state END FROM crossover.migration \
         WHERE name = $1::text FOR SHARE",
        &[Some(&request.name)],
    )?;
    let Some(state) = rows.first().and_then(|r| r[0].as_deref()) else { return Ok(None) };
    if matches!((request.kind.as_str(), state), ("wait", _) | ("finish", "finished") | ("cancel", "cancelled"))
        || request.arguments["state"] == state
    {
        return Ok(Some(serde_json::json!({ "state": state }).to_string()));
    }
    let (name, state) = (request.name.clone(), parse(state)?);
    if let Some(to) = request.arguments["state"].as_str() {
        return Err(Error::Transition { name, from: state, to: parse(to)? });
    }
    let action = match request.kind.as_str() {
        "finish" => "be finished",
        "cancel" => "be cancelled",
        "pause" => "be paused",
        "resume" => "be resumed",
        _ => "resolve a conflict",
    };
    Err(Error::WrongState { name, action, state, hint: "" })
}

//! Lock attempts: short, jittered, a fifth of the time at most, until a deadline; nobody is killed.

use std::time::{Duration, Instant};

use pgrx::pg_sys;

use crate::caller::Caller;
use crate::error::{Error, InTheWay, Result};
use crate::mapping::text::array_literal;
use crate::settings;
use crate::store::Session;

/// How long a pause goes on after the caller has gone.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Until when an operation may try, and how long it has tried.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    pub started: Instant,
    pub deadline: Instant,
    /// Who waits for it; None: nobody in particular, and it goes on all the same.
    pub caller: Option<Caller>,
}

impl Patience {
    pub fn until(deadline: Instant) -> Patience {
        Patience { started: Instant::now(), deadline, caller: None }
    }

    pub fn of(caller: Option<Caller>, deadline: Instant) -> Patience {
        Patience { caller, ..Patience::until(deadline) }
    }

    pub fn is_over(&self) -> bool {
        Instant::now() >= self.deadline
    }

    pub fn waited_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    /// When the next attempt has to let go.
    pub fn attempt(&self) -> Instant {
        let attempt = settings::lock_attempt();
        // Between half and all of it, so that several switches and clients do not fall into step.
        (Instant::now() + attempt / 2 + attempt.mul_f64(0.5 * random())).min(self.deadline)
    }

    /// Pauses four times as long as an attempt, or until the deadline; interruptible. Outside a transaction.
    ///
    /// # Errors
    /// `Error::Withdrawn` as [`Patience::check`].
    pub fn pause(&self) -> Result<()> {
        let pause = settings::lock_attempt().mul_f64(3.0 + 2.0 * random());
        let until = Instant::now() + pause.min(self.deadline.saturating_duration_since(Instant::now()));
        while Instant::now() < until {
            self.check()?;
            wait_latch(until.saturating_duration_since(Instant::now()).min(LOOK_EVERY));
        }
        self.check()
    }

    /// Between two steps: is the caller still there?
    ///
    /// # Errors
    /// `Error::Withdrawn` when it is not.
    pub fn check(&self) -> Result<()> {
        match self.caller {
            Some(caller) if !caller.is_waiting()? => Err(Error::Withdrawn),
            _ => Ok(()),
        }
    }
}

fn random() -> f64 {
    // SAFETY: PostgreSQL's own generator; no arguments, no state but its own.
    f64::from(unsafe { pg_sys::pg_prng_uint32(&raw mut pg_sys::pg_global_prng_state) }) / f64::from(u32::MAX)
}

/// Waits for the latch or until `timeout` has passed. Interrupts are served (an error or exit may be raised).
pub fn wait_latch(timeout: Duration) {
    if !timeout.is_zero() {
        // SAFETY: MyLatch is this process's own latch, set up at its start.
        unsafe {
            pg_sys::WaitLatch(
                pg_sys::MyLatch,
                (pg_sys::WL_LATCH_SET | pg_sys::WL_TIMEOUT | pg_sys::WL_EXIT_ON_PM_DEATH) as i32,
                timeout.as_millis().max(1) as std::ffi::c_long,
                pg_sys::PG_WAIT_EXTENSION,
            );
            pg_sys::ResetLatch(pg_sys::MyLatch);
        }
    }
    pgrx::check_for_interrupts!();
}

/// Who holds a lock on these relations that keeps a switch out, on the server that `session` speaks to: with `readers`, also those
/// that have only read a table. Reads only. Not what they are doing: the text of a statement is not for other roles, and may hold a
/// password.
pub fn in_the_way<S: Session>(
    session: &mut S,
    oids: &[u32],
    server: &str,
    caller_pid: i32,
    readers: bool,
) -> Result<InTheWay> {
    if oids.is_empty() {
        return Ok(InTheWay::default());
    }
    let caller = caller_pid.to_string();
    let oids = array_literal(oids.iter().map(u32::to_string));
    let trees = session.admin_query(
        "WITH RECURSIVE tree AS (SELECT unnest($1::text::oid[]) AS rel UNION SELECT h.inhrelid FROM tree JOIN pg_inherits h ON h.inhparent = tree.rel) \
         SELECT rel::text FROM tree",
        &[Some(&oids)],
    )?;
    let oids = array_literal(trees.iter().filter_map(|r| r[0].as_deref()));
    let rows = session.admin_query(
        "SELECT l.pid::text, a.application_name, a.usename::text, a.state, round(extract(epoch FROM clock_timestamp() - a.xact_start))::text, \
                string_agg(DISTINCT l.mode || ' on ' || l.relation::regclass, ', '), \
                bool_or(l.mode <> 'RowShareLock' OR $2::text::boolean OR EXISTS (SELECT FROM pg_class c WHERE c.oid = l.relation AND c.relkind = 'v')) \
           FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid \
          WHERE l.relation = ANY ($1::text::oid[]) AND l.granted AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database()) \
            AND l.pid <> pg_backend_pid() \
            AND (l.mode <> 'AccessShareLock' OR $2::text::boolean OR EXISTS (SELECT FROM pg_class c WHERE c.oid = l.relation AND c.relkind = 'v')) \
          GROUP BY l.pid, a.application_name, a.usename, a.state, a.xact_start ORDER BY a.xact_start, l.pid",
        &[Some(&oids), Some(if readers { "t" } else { "f" })],
    )?;
    // What locks rows alone is in the way of some switches only: let the time decide.
    let is_caller = rows.iter().any(|r| r[0].as_deref() == Some(caller.as_str()) && r[6].as_deref() == Some("t"));
    let mut holders: Vec<String> = rows
        .into_iter()
        .map(|r| {
            let field = |i: usize| r[i].as_deref().unwrap_or("");
            let own = if field(0) == caller { " (the session that called)" } else { "" };
            // Of other roles' sessions the second server may tell nothing more.
            let or_hidden = |i: usize| r[i].as_deref().unwrap_or("not shown");
            format!(
                "pid {}{own} on the {server} server, application \"{}\", role {}, {}, transaction open for {} s, {}",
                field(0),
                or_hidden(1),
                or_hidden(2),
                or_hidden(3),
                or_hidden(4),
                field(5)
            )
        })
        .collect();
    let prepared = session.admin_query(
        "SELECT p.gid, p.owner::text, round(extract(epoch FROM clock_timestamp() - p.prepared))::text FROM pg_prepared_xacts p \
         JOIN pg_locks x ON x.pid IS NULL AND x.locktype = 'transactionid' AND x.transactionid = p.transaction \
         WHERE EXISTS (SELECT FROM pg_locks l WHERE l.pid IS NULL AND l.virtualtransaction = x.virtualtransaction AND l.relation = ANY ($1::text::oid[]))",
        &[Some(&oids)],
    )?;
    holders.extend(prepared.into_iter().map(|r| {
        let field = |i: usize| r[i].as_deref().unwrap_or("");
        format!(
            "prepared transaction '{}' on the {server} server, role {}, prepared {} s ago",
            field(0),
            field(1),
            field(2)
        )
    }));
    Ok(InTheWay { holders, is_caller })
}

/// The error for when the time is over.
pub fn timed_out(name: &str, patience: &Patience, in_the_way: InTheWay) -> Error {
    Error::LockTimeout { name: name.to_string(), waited_ms: patience.waited_ms(), in_the_way }
}

//! The worker of one migration: serves requests, copies, replicates, and tells how it is doing.
//!
//! One loop; each turn is short and repeatable. An error ends the turn's transactions, is shown in `migration_status`, and the
//! next turn comes after a pause that grows. What the loop must know after a crash is in the catalog or on the stores.

mod claim;
mod log_size;
mod report;
mod requests;

use std::time::{Duration, Instant};

use pgrx::pg_sys;
use pgrx::prelude::*;

use self::claim::claim;
pub use self::claim::has_worker;
use self::report::waiting_for;
use super::{
    Assignment, Handle, assignment, connect, exit, my_database, reload_configuration, show_name, start_copy,
    start_migration,
};
use crate::caller::Caller;
use crate::context::Context;
use crate::copy;
use crate::cycle::{self, Outcome};
use crate::divergence;
use crate::ending;
use crate::error::{Error, Result};
use crate::fault;
use crate::lock::wait_latch;
use crate::owner;
use crate::reconcile;
use crate::resync;
use crate::settings;
use crate::setup;
use crate::state::{Phase, State};
use crate::statistics;
use crate::store::local::{LocalSession, catch};
use crate::store::{Isolation, Session, parse};
use crate::switch::{self, Order};
use crate::version;

/// How often parked rows are tried again, and logs are emptied.
const PARKED_EVERY: Duration = Duration::from_secs(5);
const ROTATE_EVERY: Duration = Duration::from_secs(10);
/// How often library and extension are compared.
const VERSION_EVERY: Duration = Duration::from_secs(1);
/// The pause before a copy worker that has ended is replaced.
const COPIER_EVERY: Duration = Duration::from_millis(500);
/// Scopes in a catching-up cycle below which the copy counts as caught up; so it does where cycles do not get smaller any more: then
/// that is what clients change meanwhile.
const CAUGHT_UP: usize = 1000;

#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn crossover_migration_main(_arg: pg_sys::Datum) {
    let assignment = assignment();
    connect(assignment);
    match run(assignment) {
        Ok(()) => exit(0),
        // DROP EXTENSION: there is nothing to come back to.
        Err(e @ Error::NotInstalled) => {
            crate::error::raise(PgLogLevel::LOG, &e);
            exit(0)
        }
        Err(e) => {
            crate::error::raise(PgLogLevel::WARNING, &e);
            exit(1)
        }
    }
}

struct Worker {
    ctx: Context,
    copiers: Vec<Handle>,
    /// When copy workers may be started again.
    copiers_at: Instant,
    failures: u32,
    retry_at: Option<Instant>,
    parked_at: Instant,
    rotate_at: Instant,
    figures_at: Instant,
    /// [`Worker::begin`] is done.
    begun: bool,
    /// One of the tables has been dropped, or is not what the mapping is about any more.
    tables_are_gone: bool,
    version_at: Instant,
    log_size_at: Instant,
    /// Of `crossover.max_log_size`, in percent, as far as it has been warned of.
    warned: i64,
    caught_up_at: Instant,
    /// Scopes of the catching-up cycle before.
    caught_up_with: usize,
    copied: u64,
    had_error: bool,
    /// When a diverged migration was looked at last.
    diverged_at: Instant,
    /// A request is being carried out.
    serving: bool,
}

/// Waits until library and objects are of one version; says so, in the log and as far as another version's tables let it in the status.
fn await_version(session: &mut LocalSession, id: i32) -> Result<()> {
    let mut said = false;
    loop {
        let Err(e) = version::check(&session.read(version::QUERY, &[])?) else { return Ok(()) };
        if !matches!(e, Error::Version { .. }) {
            return Err(e);
        }
        if !said {
            said = true;
            crate::error::raise(PgLogLevel::WARNING, &e);
            // SAFETY: this process's pid.
            let pid = unsafe { pg_sys::MyProcPid };
            let _ = session.write(
                "UPDATE crossover.activity SET worker_pid = $2::text::int, last_error = $3::text, last_error_at = clock_timestamp(), \
                 last_error_hint = $4::text, waiting_for = $5::text WHERE migration_id = $1::text::int",
                &[Some(&id.to_string()), Some(&pid.to_string()), Some(&e.to_string()), e.hint().as_deref(), Some(waiting_for(&e))],
            );
        }
        wait_latch(VERSION_EVERY);
        reload_configuration();
    }
}

/// What a turn of the loop wants next.
enum Next {
    Again,
    Wait(Duration),
    Stop,
}

fn run(assignment: Assignment) -> Result<()> {
    let id = assignment.number as i32;
    let mut session = LocalSession::new()?;
    let owner = session
        .read("SELECT owner::int8 FROM crossover.migration WHERE id = $1::text::int", &[Some(&id.to_string())])?;
    let Some(owner) = owner.first().and_then(|row| row[0].as_deref()) else { return Ok(()) };
    let owner: u32 = parse(owner)?;
    if owner != owner::of_this_process() {
        // A superuser has given the migration to another role.
        return start_migration(Assignment { role: pg_sys::Oid::from(owner), ..assignment }).map(drop);
    }
    if !claim(id)? {
        return Ok(());
    }
    await_version(&mut session, id)?;
    let Some(ctx) = Context::load(session, id)? else { return Ok(()) };
    show_name(&ctx.migration.name);
    let now = Instant::now();
    let mut worker = Worker {
        ctx,
        copiers: Vec::new(),
        copiers_at: now,
        failures: 0,
        retry_at: None,
        parked_at: now,
        rotate_at: now,
        figures_at: now,
        begun: false,
        tables_are_gone: false,
        version_at: now,
        log_size_at: now,
        warned: 0,
        caught_up_at: now,
        caught_up_with: usize::MAX,
        copied: 0,
        had_error: true,
        diverged_at: now,
        serving: false,
    };
    let mut pause = Duration::ZERO;
    loop {
        let turn = catch(|| {
            wait_latch(pause);
            // SAFETY: starts the statement clock of this turn.
            unsafe { pg_sys::SetCurrentStatementStartTimestamp() };
            reload_configuration();
            worker.turn()
        });
        let next = match turn {
            Ok(Ok(next)) => next,
            Ok(Err(e)) if e.is_cancel() => {
                worker.ctx.rollback_all();
                Next::Again
            }
            Ok(Err(e)) => {
                let error = worker.explained(e);
                worker.failed(&error)
            }
            Err(e) => worker.interrupted(e)?,
        };
        pause = match next {
            Next::Again => Duration::ZERO,
            Next::Wait(time) => time,
            Next::Stop => return Ok(()),
        };
    }
}

impl Worker {
    fn id(&self) -> String {
        self.ctx.migration.id.to_string()
    }

    fn write(&mut self, sql: &str, params: &[Option<&str>]) -> Result<u64> {
        self.ctx.first.session.write(sql, params)
    }

    fn begin(&mut self) -> Result<()> {
        let id = self.id();
        // SAFETY: this process's pid.
        let pid = unsafe { pg_sys::MyProcPid }.to_string();
        self.write(
            "UPDATE crossover.activity SET worker_pid = $2::text::int, worker_role = $3::text::oid WHERE migration_id = $1::text::int",
            &[Some(&id), Some(&pid), Some(&owner::of_this_process().to_string())],
        )?;
        // What a predecessor was doing when it died is done again: every request can be repeated. Callers that died with it had no say.
        let running = self.ctx.first.session.read(
            "SELECT id, caller_pid, caller_call FROM crossover.request WHERE migration_id = $1::text::int AND status = 'running'",
            &[Some(&id)],
        )?;
        // A start may have left something on either server.
        self.ctx.installing = !running.is_empty() && self.ctx.migration.phase == Phase::SettingUp;
        for row in running {
            let field = |i: usize| row[i].as_deref().unwrap_or("0");
            let caller = Caller { pid: parse(field(1))?, call: parse(field(2))? };
            let kept = if caller.is_waiting()? { row[2].as_deref() } else { None };
            self.write(
                "UPDATE crossover.request SET status = 'queued', caller_call = $2::text::bigint WHERE id = $1::text::bigint",
                &[Some(field(0)), kept],
            )?;
        }
        // What has ended needs no tables; the first ones may be gone.
        if !matches!(self.ctx.migration.phase, Phase::SettingUp | Phase::Finishing | Phase::Done) {
            match self.ctx.load_tables() {
                // It can still be cancelled.
                Err(Error::TableIsGone { .. } | Error::Misfit { .. }) => self.tables_are_gone = true,
                result => result?,
            }
        }
        Ok(())
    }

    fn turn(&mut self) -> Result<Next> {
        if self.version_at <= Instant::now() {
            version::check(&self.ctx.first.session.read(version::QUERY, &[])?)?;
            self.version_at = Instant::now() + VERSION_EVERY;
        }
        if !self.begun {
            self.begin()?;
            self.begun = true;
        }
        if !self.ctx.reload()? {
            return Ok(Next::Stop);
        }
        if let Some(next) = self.serve()? {
            return Ok(next);
        }
        if self.tables_are_gone {
            self.ctx.load_tables()?;
            self.tables_are_gone = false;
        }
        self.watch_log_size()?;
        if let Some(at) = self.retry_at
            && Instant::now() < at
        {
            return Ok(Next::Wait((at - Instant::now()).min(Duration::from_millis(100))));
        }
        let next = self.work()?;
        self.recovered()?;
        Ok(next)
    }

    /// What the migration's state and phase ask for.
    fn work(&mut self) -> Result<Next> {
        let idle = Next::Wait(settings::idle_wait());
        let (state, phase) = (self.ctx.migration.state, self.ctx.migration.phase);
        match phase {
            Phase::SettingUp => {
                // Nobody waits for this start any more: undo what it has done.
                self.undo_start(true)?;
                return Ok(Next::Stop);
            }
            Phase::Done => return Ok(Next::Stop),
            Phase::Finishing => {
                ending::clean_up(&mut self.ctx)?;
                // What was filed meanwhile has an answer first. Nothing is filed any more after this phase (see the clerk).
                return Ok(Next::Again);
            }
            _ => {}
        }
        if self.ctx.migration.paused {
            self.ctx.second = None;
            return Ok(idle);
        }
        if self.ctx.migration.diverged.is_some() {
            if phase == Phase::Reconciling {
                let order = Order::by_worker(&self.ctx, Duration::from_secs(2));
                reconcile::run(&mut self.ctx, &order)?;
                return Ok(Next::Again);
            }
            divergence::stay(&mut self.ctx, &mut self.diverged_at)?;
            return Ok(idle);
        }
        match (state, phase) {
            (State::Copying, Phase::Copying) => return self.copy(),
            (State::Copying, Phase::CaptureDropped) => return self.copy_again(),
            _ => {}
        }
        let retry_parked = self.parked_at <= Instant::now();
        if retry_parked {
            self.parked_at = Instant::now() + PARKED_EVERY;
        }
        let outcome = cycle::run(&mut self.ctx, retry_parked)?;
        self.copied += outcome.rows;
        if outcome.scopes.max(outcome.left) < CAUGHT_UP {
            self.caught_up_at = Instant::now();
        }
        if phase == Phase::Reconciling && outcome.left == 0 {
            reconcile::done(&mut self.ctx)?;
        }
        if phase == Phase::FencePending {
            let order = Order::by_worker(&self.ctx, Duration::from_secs(2));
            switch::fence_pending(&mut self.ctx, &order)?;
        }
        let settled = outcome.scopes < CAUGHT_UP || outcome.scopes > self.caught_up_with / 2;
        if phase == Phase::CatchingUp && !settled {
            self.caught_up_with = outcome.scopes;
        }
        if phase == Phase::CatchingUp && settled && outcome.left == 0 {
            if copy::owe_violations(&mut self.ctx)? > 0 {
                return Ok(Next::Again);
            }
            statistics::refresh(&mut self.ctx)?;
            copy::enter_first(&mut self.ctx, self.copied)?;
        }
        self.figures(&outcome)?;
        if self.rotate_at <= Instant::now() {
            self.rotate(settings::log_retention())?;
        }
        Ok(if outcome.scopes > 0 && outcome.contended < outcome.scopes { Next::Again } else { idle })
    }

    /// Keeps copy workers going until every chunk is there.
    fn copy(&mut self) -> Result<Next> {
        self.ctx.connect()?;
        self.ctx.stores()?.1.session.set_patience(cycle::STALL);
        divergence::guard(&mut self.ctx)?;
        setup::ensure_watermark(&mut self.ctx)?;
        cycle::look_after_capture(&mut self.ctx)?;
        let running = self.copiers.len();
        self.copiers.retain(|c| !c.has_stopped());
        if self.copiers.len() < running {
            // It found nothing left to do, or met an error: no need to hurry.
            self.copiers_at = Instant::now() + COPIER_EVERY;
        }
        if self.copiers.is_empty() && copy::is_complete(&mut self.ctx)? {
            copy::complete(&mut self.ctx)?;
            return Ok(Next::Again);
        }
        let owner = pg_sys::Oid::from(owner::of_this_process());
        while self.copiers_at <= Instant::now() && self.copiers.len() < self.ctx.migration.options.copy_workers as usize
        {
            match start_copy(my_database(), owner, self.ctx.migration.id) {
                Ok(handle) => self.copiers.push(handle),
                // Fewer workers than wished for will do; none is an error.
                Err(_) if !self.copiers.is_empty() => break,
                Err(e) => return Err(e),
            }
        }
        self.figures(&Outcome::default())?;
        Ok(Next::Wait(Duration::from_millis(100)))
    }

    /// Begins the copy anew, once the copy workers of the one before have ended and the second server is there.
    fn copy_again(&mut self) -> Result<Next> {
        self.copiers.retain(|c| !c.has_stopped());
        if !self.copiers.is_empty() || !resync::begin(&mut self.ctx)? {
            return Ok(Next::Wait(Duration::from_millis(100)));
        }
        self.copied = 0;
        self.caught_up_with = usize::MAX;
        Ok(Next::Again)
    }

    /// Somebody has cancelled what was going on: `migration_pause`, or a DBA. A cycle or a chunk is begun anew (or not, as the requests
    /// say); out of a request the way back is the one after a crash.
    fn interrupted(&mut self, error: Error) -> Result<Next> {
        self.ctx.rollback_all();
        if self.serving || error.sqlstate() != "57014" || self.ctx.first.session.in_transaction() {
            return Err(error);
        }
        Ok(Next::Again)
    }

    /// Empties consumed logs on both stores, and forgets old requests.
    fn rotate(&mut self, retention: Duration) -> Result<()> {
        self.rotate_at = Instant::now() + ROTATE_EVERY;
        let (first, second) = self.ctx.stores()?;
        first.forget_origins()?;
        second.forget_origins()?;
        if let Some(mark) = second.watermark()? {
            first.rotate_log(&mark.snapshot, retention)?;
        }
        fault::point("rotate:first")?;
        first.session.begin(Isolation::ReadCommitted, &[])?;
        let mark = first.watermark();
        first.session.rollback();
        if let Some(mark) = mark? {
            second.rotate_log(&mark.snapshot, retention)?;
        }
        let id = self.id();
        self.write(
            "DELETE FROM crossover.request WHERE migration_id = $1::text::int AND status IN ('done', 'failed') AND created_at < clock_timestamp() - interval '1 day'",
            &[Some(&id)],
        )?;
        Ok(())
    }
}

/// The second server is away, or says "later".
fn is_transient(error: &Error) -> bool {
    let code = error.sqlstate();
    matches!(error, Error::RemoteConnection { .. } | Error::RemoteTimeout | Error::Fault(_))
        || ["08", "53", "57P", "40"].iter().any(|class| code.starts_with(class))
}

//! What the functions ask of a migration's worker: taken up one at a time, answered in the catalog, and done again if it was cut off.

use std::time::{Duration, Instant};

use super::{Next, Worker, is_transient};
use crate::caller::Caller;
use crate::catalog::Migration;
use crate::cycle;
use crate::ending;
use crate::error::{Error, Result, Side};
use crate::fault;
use crate::lock::{Patience, wait_latch};
use crate::parked;
use crate::resolve;
use crate::setup;
use crate::state::{Phase, State};
use crate::store::parse;
use crate::switch::{self, Order};
use crate::transition;

/// How long one try to undo a start may wait for clients, pauses included.
const UNDO_PATIENCE: Duration = Duration::from_secs(2);

impl Worker {
    /// Serves the oldest request, if there is one that can be served now.
    pub(super) fn serve(&mut self) -> Result<Option<Next>> {
        let id = self.id();
        // One that is running here was cut off by an error of this server's: every request can be repeated.
        let rows = self.ctx.first.session.read(
            "SELECT id, kind, arguments::text, who, caller_pid, extract(epoch FROM deadline - clock_timestamp()), caller_call, \
                    (extract(epoch FROM clock_timestamp() - created_at) * 1000)::bigint FROM crossover.request \
             WHERE migration_id = $1::text::int AND status IN ('queued', 'running') ORDER BY kind = 'wait', id",
            &[Some(&id)],
        )?;
        for row in rows {
            let field = |i: usize| row[i].clone().unwrap_or_default();
            let left: f64 = parse(&field(5))?;
            if left <= 0.0 {
                let detail = self.why_not_served()?;
                self.answer(
                    &field(0),
                    &Err(Error::Timeout {
                        name: self.ctx.migration.name.clone(),
                        waited_ms: parse(&field(7))?,
                        detail,
                    }),
                )?;
                continue;
            }
            let caller_pid = parse(&field(4))?;
            let call = row[6].as_deref().map(parse).transpose()?;
            let caller = call.map(|call| Caller { pid: caller_pid, call });
            let order = Order {
                who: field(3),
                caller_pid,
                patience: Patience::of(caller, Instant::now() + Duration::from_secs_f64(left)),
                reason: None,
            };
            // What is done in a moment is done in any case: the clerk has begun it.
            let wanted = if matches!(field(1).as_str(), "pause" | "resume") { Ok(()) } else { order.patience.check() };
            let arguments: serde_json::Value = serde_json::from_str(&field(2)).unwrap_or_default();
            if field(1) == "wait" {
                if wanted.is_err() {
                    self.answer(&field(0), &wanted)?;
                } else if let Some(result) = self.caught_up()? {
                    self.answer(&field(0), &result)?;
                }
                continue;
            }
            self.write(
                "UPDATE crossover.request SET status = 'running' WHERE id = $1::text::bigint",
                &[Some(&field(0))],
            )?;
            fault::point("request:taken")?;
            // A pause is simply served again, whatever cuts it off: the cancel request that goes with it, perhaps.
            self.serving = field(1) != "pause";
            let result = wanted.and_then(|()| self.carry_out(&field(1), &arguments, &order));
            self.serving = false;
            self.ctx.rollback_all();
            if matches!(result, Err(Error::Withdrawn)) {
                await_shutdown();
            }
            let result = result.map_err(|e| self.explained(e));
            if result.as_ref().is_err_and(Error::is_cancel) && self.ctx.reload()? && self.ctx.migration.paused {
                // Sent for what was going on before this request, by a pause (perhaps this one): it is served again.
                return Ok(Some(Next::Again));
            }
            switch::show_waiting(&mut self.ctx, None)?;
            if matches!(result, Err(Error::Parked { .. })) {
                parked::list(&mut self.ctx)?;
            }
            fault::point("request:answering")?;
            let started = field(1) == "start";
            if started && result.is_err() {
                // From here on it is undone, after a crash as well: nobody may be told that it failed, and find it running.
                self.ctx.reload()?;
                if self.ctx.migration.phase != Phase::SettingUp {
                    self.ctx.set_phase(Phase::SettingUp)?;
                }
                // The answer first: the request goes with the migration.
                self.answer(&field(0), &result)?;
                await_reader(caller);
                self.undo_start(false)?;
                return Ok(Some(Next::Stop));
            }
            self.answer(&field(0), &result)?;
            return Ok(Some(Next::Again));
        }
        Ok(None)
    }

    /// With the error that the worker meets again and again, if it does.
    fn why_not_served(&mut self) -> Result<String> {
        let mut why = String::from("The request was not served in time.");
        if self.failures > 0 {
            let id = self.id();
            let error = self.ctx.first.session.read(
                "SELECT concat_ws(' ', last_error || '.', last_error_hint) FROM crossover.activity WHERE migration_id = $1::text::int",
                &[Some(&id)],
            )?;
            let error = error.first().and_then(|row| row[0].as_deref()).unwrap_or_default();
            why += &format!(" The worker's last error: {error}");
        }
        Ok(why)
    }

    fn carry_out(&mut self, kind: &str, arguments: &serde_json::Value, order: &Order) -> Result<()> {
        let force = arguments["force"].as_bool() == Some(true);
        if self.tables_are_gone && !(kind == "cancel" && (force || !self.ctx.migration.taken_over)) {
            self.ctx.load_tables()?;
        }
        match kind {
            // A predecessor may have died after it was done.
            "start" if self.ctx.migration.phase != Phase::SettingUp => Ok(()),
            "start" => setup::run(&mut self.ctx, order.patience, &order.who, order.caller_pid),
            "set_state" => {
                let to: State = arguments["state"].as_str().unwrap_or("").parse().map_err(Error::Internal)?;
                self.resumed_only("change its state")?;
                transition::set_state(&mut self.ctx, to, force, order)
            }
            "pause" | "resume" => {
                let id = self.id();
                let paused = if kind == "pause" { "t" } else { "f" };
                self.write(
                    "UPDATE crossover.migration SET paused = $2::text::boolean WHERE id = $1::text::int",
                    &[Some(&id), Some(paused)],
                )?;
                while kind == "pause" && !self.copiers.is_empty() {
                    wait_latch(Duration::from_millis(10));
                    self.copiers.retain(|c| !c.has_stopped());
                }
                self.retry_at = None;
                Ok(())
            }
            "resolve" => {
                self.resumed_only("resolve a conflict")?;
                let keep = if arguments["keep"] == "second" { Side::Second } else { Side::First };
                let conflict = arguments["conflict"].as_i64().unwrap_or(0);
                let result = resolve::resolve(&mut self.ctx, conflict, keep, &order.patience);
                self.ctx.rollback_all();
                parked::list(&mut self.ctx)?;
                result
            }
            "finish" => {
                ending::finish(&mut self.ctx, order, arguments["drop_first"].as_bool().unwrap_or(false))?;
                self.clean_up(order, false)
            }
            "cancel" => {
                ending::cancel(&mut self.ctx, order, force && self.tables_are_gone)?;
                while !self.copiers.is_empty() {
                    wait_latch(Duration::from_millis(10));
                    self.copiers.retain(|c| !c.has_stopped());
                }
                self.clean_up(order, force)
            }
            other => Err(Error::internal(format!("unknown request \"{other}\""))),
        }
    }

    fn resumed_only(&self, action: &'static str) -> Result<()> {
        if !self.ctx.migration.paused {
            return Ok(());
        }
        Err(Error::Paused { name: self.ctx.migration.name.clone(), action })
    }

    /// The second server's part of finish and cancel, as long as the caller waits; the loop goes on with it. With `force` it is tried once.
    ///
    /// # Errors
    /// `Error::NotCleanedUp`: it has ended all the same.
    fn clean_up(&mut self, order: &Order, force: bool) -> Result<()> {
        if self.ctx.migration.phase == Phase::Done {
            return Ok(());
        }
        loop {
            let Err(e) = ending::clean_up(&mut self.ctx) else { return Ok(()) };
            if force {
                return Ok(());
            }
            if order.patience.is_over() || !(e.is_contention() || is_transient(&e)) {
                let Migration { name, state, .. } = &self.ctx.migration;
                return Err(Error::NotCleanedUp { name: name.clone(), state: *state, cause: Box::new(e) });
            }
            self.ctx.rollback_all();
            order.patience.pause()?;
        }
    }

    /// For `wait`: None while there is more to do; an answer when the copy is complete and nothing is left to replicate.
    fn caught_up(&mut self) -> Result<Option<Result<()>>> {
        if self.tables_are_gone {
            return Ok(self.ctx.load_tables().err().map(Err));
        }
        let m = &self.ctx.migration;
        if m.state.has_ended() {
            return Ok(Some(Ok(())));
        }
        if m.paused {
            return Ok(Some(self.resumed_only("catch up")));
        }
        if let Some(diverged) = &m.diverged {
            return Ok(Some(Err(diverged.error(m))));
        }
        if m.state == State::Copying
            || m.phase == Phase::Reconciling
            || m.phase == Phase::FencePending
            || self.retry_at.is_some_and(|at| Instant::now() < at)
        {
            return Ok(None);
        }
        let outcome = cycle::run(&mut self.ctx, true)?;
        self.figures(&outcome)?;
        // What is owed may be what a parked row lacks.
        if outcome.parked > 0 && outcome.left == 0 {
            parked::list(&mut self.ctx)?;
            return Ok(Some(Err(Error::Parked {
                name: self.ctx.migration.name.clone(),
                count: outcome.parked as i64,
            })));
        }
        if outcome.left > 0 {
            return Ok(None);
        }
        if parked::are_listed(&mut self.ctx) {
            parked::list(&mut self.ctx)?;
        }
        Ok(Some(Ok(())))
    }

    fn answer(&mut self, request: &str, result: &Result<()>) -> Result<()> {
        let (status, answer) = match result {
            Ok(()) => {
                let warnings = std::mem::take(&mut self.ctx.warnings);
                ("done", serde_json::json!({ "state": self.ctx.migration.state.as_str(), "warnings": warnings }))
            }
            Err(e) => (
                "failed",
                serde_json::json!({ "sqlstate": e.sqlstate(), "message": e.to_string(), "detail": e.detail(), "hint": e.hint() }),
            ),
        };
        self.write(
            "UPDATE crossover.request SET status = $2::text, answer = $3::text::jsonb WHERE id = $1::text::bigint",
            &[Some(request), Some(status), Some(&answer.to_string())],
        )?;
        Ok(())
    }

    /// Removes what a failed start has installed, and the migration.
    pub(super) fn undo_start(&mut self, after_restart: bool) -> Result<()> {
        self.ctx.rollback_all();
        self.ctx.reload()?;
        if setup::is_captured(&mut self.ctx)? {
            self.ctx.load_tables()?;
            let order = Order::by_worker(&self.ctx, UNDO_PATIENCE);
            ending::undo_start(&mut self.ctx, &order)?;
        } else if after_restart {
            // What was to be installed is described again.
            setup::describe(&mut self.ctx, Patience::until(Instant::now() + UNDO_PATIENCE))?;
        }
        if after_restart || self.ctx.installing {
            setup::remove_first(&mut self.ctx)?;
            fault::point("undo:first")?;
            setup::remove_second(&mut self.ctx, false)?;
            fault::point("undo:second")?;
        }
        let id = self.id();
        self.write("DELETE FROM crossover.migration WHERE id = $1::text::int", &[Some(&id)])?;
        Ok(())
    }
}

/// A fast shutdown ends callers, and us, in whatever order: a caller that has gone has withdrawn nothing then, and the request is one that was
/// cut off. Returns where no shutdown has begun; where one has, but is one that lets sessions end by themselves, after a while.
fn await_shutdown() {
    let until = Instant::now() + Duration::from_secs(10);
    while shutdown_has_begun() && Instant::now() < until {
        wait_latch(Duration::from_millis(20));
    }
}

/// As the postmaster writes it into `postmaster.pid` (`LOCK_FILE_LINE_PM_STATUS`) before it sends the first signal.
fn shutdown_has_begun() -> bool {
    const STATUS_LINE: usize = 8;
    const STOPPING: &str = "stopping";
    // The working directory of every server process is the data directory.
    std::fs::read_to_string("postmaster.pid")
        .is_ok_and(|text| text.lines().nth(STATUS_LINE - 1).is_some_and(|status| status.trim() == STOPPING))
}

/// Gives the caller a moment to read its answer before the row goes.
fn await_reader(caller: Option<Caller>) {
    let until = Instant::now() + Duration::from_secs(5);
    while Instant::now() < until && caller.is_some_and(|c| c.is_waiting().unwrap_or(false)) {
        wait_latch(Duration::from_millis(20));
    }
}

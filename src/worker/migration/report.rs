//! What `migration_status` shows of a worker: its errors, with what they come from, and how far behind it is.

use std::time::{Duration, Instant};

use super::{Next, Worker, exit, is_transient};
use crate::cycle::Outcome;
use crate::ending;
use crate::error::{Error, Result, Side};
use crate::parked;
use crate::state::State;
use crate::store::{Isolation, MANY, Session};

/// The longest pause between two tries after an error.
const MAX_BACKOFF: Duration = Duration::from_secs(5);
/// How often figures are written.
const FIGURES_EVERY: Duration = Duration::from_millis(500);

impl Worker {
    /// Says of an error on this server that a table of the migration has been dropped, or changed, where that is the cause.
    pub(super) fn explained(&mut self, error: Error) -> Error {
        let is_missing = matches!(&error, Error::Server { side: Side::First, error } if matches!(error.sqlstate.as_str(), "42P01" | "42703"));
        if !is_missing || self.ctx.pairs.is_empty() {
            return error;
        }
        self.ctx.rollback_all();
        match self.ctx.load_tables() {
            Err(gone @ (Error::TableIsGone { .. } | Error::Misfit { .. })) => {
                self.tables_are_gone = true;
                // As after a restart.
                self.ctx.second = None;
                self.ctx.set_tables(Vec::new(), Vec::new(), Vec::new());
                gone
            }
            _ => error,
        }
    }

    pub(super) fn failed(&mut self, error: &Error) -> Next {
        self.ctx.rollback_all();
        if self.ctx.first.session.in_transaction() {
            exit(1);
        }
        // A client in the way is everyday business in `both`: try again soon, and say nothing.
        if error.is_contention() && self.failures < 3 {
            self.failures += 1;
            return Next::Wait(Duration::from_millis(20));
        }
        self.failures += 1;
        let pause = Duration::from_millis(100).saturating_mul(1 << self.failures.min(6)).min(MAX_BACKOFF);
        self.retry_at = Some(Instant::now() + pause);
        self.had_error = true;
        let id = self.id();
        let text = error.detail().map_or_else(|| error.to_string(), |d| format!("{error}: {d}"));
        let waiting = waiting_for(error);
        let shown = self.write(
            "UPDATE crossover.activity SET last_error = $2::text, last_error_at = clock_timestamp(), last_error_hint = $3::text, \
             waiting_for = $4::text, retries = retries + 1 WHERE migration_id = $1::text::int",
            &[Some(&id), Some(&text), error.hint().as_deref(), Some(waiting)],
        );
        if shown.is_err() {
            exit(1);
        }
        Next::Wait(Duration::from_millis(50))
    }

    /// After an error: replication works again.
    pub(super) fn recovered(&mut self) -> Result<()> {
        self.failures = 0;
        self.retry_at = None;
        if self.had_error {
            self.had_error = false;
            let id = self.id();
            self.write(
                "UPDATE crossover.activity SET waiting_for = NULL, last_error_hint = NULL WHERE migration_id = $1::text::int",
                &[Some(&id)],
            )?;
        }
        Ok(())
    }

    /// Writes the figures that `migration_status` shows, brings conflicts home and lists parked rows.
    pub(super) fn figures(&mut self, outcome: &Outcome) -> Result<()> {
        if Instant::now() < self.figures_at {
            return Ok(());
        }
        self.figures_at = Instant::now() + FIGURES_EVERY;
        let id = self.id();
        let mut backlog = outcome.scopes.max(outcome.left);
        if outcome.left >= MANY {
            backlog = self.waiting()?;
        }
        let (rows, parked) = (backlog.to_string(), outcome.parked.to_string());
        let since = outcome.oldest.filter(|_| backlog > 0).map(|m| m.to_string());
        self.write(
            "UPDATE crossover.activity SET backlog_rows = $2::text::bigint, backlog_since = to_timestamp($3::text::numeric / 1000000), \
             parked = $4::text::bigint WHERE migration_id = $1::text::int \
             AND (backlog_rows, parked) IS DISTINCT FROM ($2::text::bigint, $4::text::bigint)",
            &[Some(&id), Some(&rows), since.as_deref(), Some(&parked)],
        )?;
        if self.ctx.second.is_some() && self.ctx.migration.state != State::Copying {
            ending::bring_conflicts_home(&mut self.ctx)?;
        }
        if outcome.parked > 0 || self.had_error || parked::are_listed(&mut self.ctx) {
            parked::list(&mut self.ctx)?;
        }
        Ok(())
    }

    /// How many scopes are owed to either store.
    fn waiting(&mut self) -> Result<usize> {
        let (first, second) = self.ctx.stores()?;
        first.session.begin(Isolation::ReadCommitted, &[])?;
        let waiting = first.waiting();
        first.session.rollback();
        Ok(waiting? + second.waiting()?)
    }
}

/// As `migration_status` says it.
pub(super) fn waiting_for(error: &Error) -> &'static str {
    match error {
        Error::Version { .. } => "library and extension to be of one version",
        Error::NoWorkerSlot { .. } => "a free slot of max_worker_processes",
        e if is_transient(e) => "the second server",
        _ => "the error to be mended",
    }
}

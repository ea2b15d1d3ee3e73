//! The size of a migration's change logs: shown, warned of, and past `crossover.max_log_size` put an end to where that can be done.

use std::time::{Duration, Instant};

use super::Worker;
use crate::error::{Error, Result};
use crate::resync;
use crate::settings;
use crate::state::{Phase, State};
use crate::store::{Isolation, Session};
use crate::switch::Order;

/// How often it is looked at.
const LOG_SIZE_EVERY: Duration = Duration::from_secs(1);
/// A replicator that was done with its backlog this short a time ago keeps up: its log is as long as it has to be.
const KEEPS_UP: Duration = Duration::from_secs(10);

impl Worker {
    /// Shows how large the change logs are, warns where they near their limit, and gives up capture past it where it can be given up.
    pub(super) fn watch_log_size(&mut self) -> Result<()> {
        let phase = self.ctx.migration.phase;
        if Instant::now() < self.log_size_at
            || matches!(phase, Phase::SettingUp | Phase::CaptureDropped | Phase::Finishing | Phase::Done)
        {
            return Ok(());
        }
        self.log_size_at = Instant::now() + LOG_SIZE_EVERY;
        let limit = settings::max_log_size();
        let mut bytes = self.log_bytes()?;
        if limit.is_some_and(|limit| bytes > limit)
            && self.ctx.second.is_some()
            && self.ctx.verified
            && phase != Phase::Copying
        {
            self.rotate(Duration::ZERO)?;
            bytes = self.log_bytes()?;
        }
        let (id, size, shown) = (self.id(), bytes.to_string(), limit.map(|l| l.to_string()));
        self.write(
            "UPDATE crossover.activity SET log_bytes = $2::text::bigint, log_limit = $3::text::bigint WHERE migration_id = $1::text::int \
             AND (log_bytes, log_limit) IS DISTINCT FROM ($2::text::bigint, $3::text::bigint)",
            &[Some(&id), Some(&size), shown.as_deref()],
        )?;
        let Some(limit) = limit else { return Ok(()) };
        let percent = bytes.saturating_mul(100) / limit.max(1);
        let level = [80, 50].into_iter().find(|level| percent >= *level).unwrap_or(0);
        if level > self.warned {
            let name = &self.ctx.migration.name;
            pgrx::warning!(
                "the change logs of migration \"{name}\" have reached {percent} % of crossover.max_log_size"
            );
        }
        self.warned = level;
        if bytes > limit && self.may_drop_capture() {
            let reason = Some("the change log passed crossover.max_log_size");
            let order = Order { reason, ..Order::by_worker(&self.ctx, settings::lock_attempt()) };
            match resync::drop_capture(&mut self.ctx, &order) {
                // Somebody writes; it is tried again in a second.
                Err(Error::LockTimeout { .. }) => {}
                Err(e) => return Err(e),
                Ok(()) => pgrx::warning!(
                    "the change log of migration \"{}\" has passed crossover.max_log_size: capture is dropped, and all rows will be copied again",
                    self.ctx.migration.name
                ),
            }
        }
        Ok(())
    }

    /// Where nothing but the second store depends on the log, and replication is not simply keeping up with a log that is long.
    fn may_drop_capture(&self) -> bool {
        match (self.ctx.migration.state, self.ctx.migration.phase) {
            // What only the second store has is not thrown away unasked.
            _ if self.ctx.migration.diverged.is_some() => false,
            (State::Copying, Phase::Copying) => true,
            (State::Copying, _) | (State::First, Phase::Replicating) => self.caught_up_at.elapsed() > KEEPS_UP,
            _ => false,
        }
    }

    /// Of both stores, where the second one's log matters and can be reached.
    fn log_bytes(&mut self) -> Result<i64> {
        self.ctx.first.session.begin(Isolation::ReadCommitted, &[])?;
        let bytes = self.ctx.first.log_bytes();
        self.ctx.first.session.rollback();
        let mut bytes = bytes?;
        if self.ctx.migration.state.replicates_backward()
            && let Some(second) = &mut self.ctx.second
        {
            bytes += second.log_bytes()?;
        }
        Ok(bytes)
    }
}

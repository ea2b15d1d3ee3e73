//! Copying again from the beginning: capture of the first store is dropped, the second store emptied, and the copy begun anew.
//!
//! Where the change log passes `crossover.max_log_size` while nothing but the second store depends on it, or where an operator asks for it.
//! Dropping is one transaction here, which needs no second server; beginning anew waits until that is there. Every step can be repeated
//! after a crash: the phase says what is left to do.

use std::time::Duration;

use pgrx::pg_sys;

use crate::context::Context;
use crate::copy::PATIENCE;
use crate::divergence;
use crate::error::{Error, Result};
use crate::fault;
use crate::mapping::sql::LOG_RING;
use crate::setup;
use crate::state::{By, Phase, State};
use crate::store::Session;
use crate::switch::{Order, Pause, commit_state, in_attempts, lock_first};

/// How long one try to lock writers out for a moment may take, pauses included.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);

/// Turns capture off and empties the log, under a lock that waits for writers: nobody writes to the log any more.
pub fn drop_capture(ctx: &mut Context, order: &Order) -> Result<()> {
    let from = ctx.migration.state;
    if !from.allows(State::Copying, By::SetState) && from != State::Copying {
        return Err(Error::Transition { name: ctx.migration.name.clone(), from, to: State::Copying });
    }
    in_attempts(ctx, order, false, |ctx| {
        lock_first(ctx, order.patience.attempt(), false, false, Some(pg_sys::ShareRowExclusiveLock))?;
        let first = &mut ctx.first;
        first.enable_capture(false)?;
        let logs: Vec<String> = (0..LOG_RING).map(|i| first.objects.log_ring(i).to_string()).collect();
        let seen = first.snapshot()?;
        first.remember_cut(&seen)?;
        // What the second store's clients have done does not matter any more, nor whether it has been lost.
        first.session.admin_batch(&format!("TRUNCATE {}; DELETE FROM {}", logs.join(", "), first.objects.mark()))?;
        ctx.migration.diverged = None;
        forget_progress(ctx)?;
        ctx.first.session.admin_execute(
            "UPDATE crossover.activity SET log_bytes = 0, backlog_rows = 0, backlog_since = NULL WHERE migration_id = $1::text::int",
            &[Some(&ctx.migration.id.to_string())],
        )?;
        commit_state(ctx, order, State::Copying, Phase::CaptureDropped, &Pause::default())
    })?;
    fault::point("resync:dropped")
}

/// Empties the second store, puts capture back and lets the copy begin. False while a copy worker has not noticed yet.
pub fn begin(ctx: &mut Context) -> Result<bool> {
    if copy_workers_are_left(ctx)? {
        return Ok(false);
    }
    ctx.connect()?;
    if !divergence::is_installed(ctx.stores()?.1)? {
        let fence = ctx.migration.options.fence;
        setup::install_second(ctx, false, fence)?;
    }
    ctx.patiently(PATIENCE, empty_second)?;
    fault::point("resync:emptied")?;
    let order = Order::by_worker(ctx, LOCK_PATIENCE);
    in_attempts(ctx, &order, false, |ctx| {
        lock_first(ctx, order.patience.attempt(), false, false, Some(pg_sys::ShareRowExclusiveLock))?;
        ctx.first.enable_capture(true)?;
        forget_progress(ctx)?;
        ctx.first.session.admin_execute(
            "DELETE FROM crossover.chunk WHERE migration_id = $1::text::int",
            &[Some(&ctx.migration.id.to_string())],
        )?;
        commit_state(ctx, &order, State::Copying, Phase::Copying, &Pause::default())
    })?;
    fault::point("resync:begun")?;
    Ok(true)
}

/// One that has claimed a chunk would still copy it.
fn copy_workers_are_left(ctx: &mut Context) -> Result<bool> {
    let rows = ctx.first.session.read(
        "SELECT EXISTS (SELECT FROM crossover.chunk c JOIN pg_stat_activity a ON a.pid = c.worker AND a.backend_type = 'pg_crossover copy' \
         WHERE c.migration_id = $1::text::int)",
        &[Some(&ctx.migration.id.to_string())],
    )?;
    Ok(rows[0][0].as_deref() == Some("t"))
}

/// Rows, checkpoints, watermark and what is owed, in one transaction of the second server.
fn empty_second(ctx: &mut Context) -> Result<()> {
    let (_, second) = ctx.stores()?;
    second.begin_write()?;
    let rels: Vec<String> = second.tables.iter().map(|t| t.rel.to_string()).collect();
    second.session.savepoint()?;
    match second.session.batch(&format!("TRUNCATE {}", rels.join(", "))) {
        Ok(()) => second.session.release()?,
        // Another table refers to one of them, or the role may only delete.
        Err(e) if matches!(e.sqlstate().as_str(), "0A000" | "42501") => {
            second.session.rollback_to()?;
            for rel in rels.iter().rev() {
                second.session.batch(&format!("DELETE FROM {rel}"))?;
            }
        }
        Err(e) => return Err(e),
    }
    let objects = &second.objects;
    let kept =
        format!("DELETE FROM {};\nDELETE FROM {};\nDELETE FROM {};", objects.chunk(), objects.mark(), objects.owed());
    second.session.admin_batch(&kept)?;
    second.session.commit()
}

fn forget_progress(ctx: &mut Context) -> Result<()> {
    let sql = "UPDATE crossover.migrated_table SET rows_copied = 0, copy_started = NULL, copy_finished = NULL, last_chunk = 0, last_key = NULL, \
               handed_out = false WHERE migration_id = $1::text::int";
    let id = ctx.migration.id.to_string();
    ctx.first.session.admin_execute(sql, &[Some(&id)]).map(drop)
}

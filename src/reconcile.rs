//! Out of phase `diverged`: all rows of both stores are compared, nothing is deleted that only one of them has.
//!
//! Every key is logged on both stores, under the time of its last change where the log still knows it, and new watermarks are set: what
//! follows is a cycle in both directions as ever, with conflicts and both images. Every step can be repeated; the divergence stays in
//! the catalog until all of them are made.

use crate::catalog::{self, Move};
use crate::context::Context;
use crate::divergence;
use crate::error::{Error, Result, Side};
use crate::fault;
use crate::setup;
use crate::state::{Phase, State};
use crate::store::{Isolation, Session, Store, Watermark, parse};
use crate::switch::Order;

/// Prepares the comparison; the cycles that follow make it.
pub fn run(ctx: &mut Context, order: &Order) -> Result<()> {
    let Some(diverged) = ctx.migration.diverged.clone() else { return Ok(()) };
    ctx.set_phase(Phase::Reconciling)?;
    ctx.connect()?;
    let (_, second) = ctx.stores()?;
    if !divergence::is_installed(second)? {
        let fence = ctx.migration.options.fence && ctx.migration.state == State::First;
        setup::install_second(ctx, false, fence)?;
    }
    let id = ctx.migration.id.to_string();
    let (first, second) = ctx.stores()?;

    // The store that has lost nothing knows its rows from when it last heard of the other; those of the other may be of any time before.
    let heard = match diverged.lost {
        Side::First => last_heard(second)?,
        Side::Second => {
            first.session.begin(Isolation::ReadCommitted, &[])?;
            let heard = last_heard(first);
            first.session.rollback();
            heard?
        }
    };
    let unknown = "1970-01-01 00:00:00+00".to_string();
    let (at_first, at_second) = match diverged.lost {
        Side::First => (unknown, heard),
        Side::Second => (heard, unknown),
    };
    let theirs = second.watermark()?.map_or(0, |m| m.counter);
    second.session.begin(Isolation::ReadCommitted, &[])?;
    let s2 = second.snapshot()?;
    second.session.commit()?;
    let counter2 = second.flush()?;

    first.session.begin(Isolation::ReadCommitted, &[])?;
    // Before this transaction writes: the watermark must not cover what it logs.
    let s1 = first.snapshot()?;
    log_all(first, &at_first)?;
    first.set_watermark(&Watermark { snapshot: s2, counter: counter2 })?;
    let forget = "UPDATE crossover.migrated_table SET last_chunk = 0 WHERE migration_id = $1::text::int";
    first.session.admin_execute(forget, &[Some(&id)])?;
    let raise = format!("UPDATE {} SET n = greatest(n, $1::text::bigint) + 1 RETURNING n", first.objects.counter());
    let rows = first.session.admin_query(&raise, &[Some(&theirs.to_string())])?;
    let counter1: i64 = parse(rows.first().and_then(|r| r[0].as_deref()).unwrap_or("0"))?;
    first.session.commit()?;
    fault::point("reconcile:first")?;

    second.session.begin(Isolation::ReadCommitted, &[])?;
    log_all(second, &at_second)?;
    second.set_watermark(&Watermark { snapshot: s1, counter: counter1 })?;
    let forget = format!("DELETE FROM {}", second.objects.chunk());
    second.session.admin_batch(&forget)?;
    second.session.commit()?;
    fault::point("reconcile:second")?;
    clear(ctx, order)
}

/// The comparison has been made: goes on as the state asks for.
pub fn done(ctx: &mut Context) -> Result<()> {
    let fence = ctx.migration.state == State::First && ctx.migration.options.fence;
    ctx.set_phase(if fence { Phase::FencePending } else { Phase::Replicating })
}

/// When this store's watermark was set last.
fn last_heard<S: Session>(store: &mut Store<S>) -> Result<String> {
    let sql = format!("SELECT coalesce(max(at), clock_timestamp())::text FROM {}", store.objects.mark());
    let rows = store.session.admin_query(&sql, &[])?;
    rows.into_iter().next().and_then(|mut r| r.pop().flatten()).ok_or_else(|| Error::internal("no time"))
}

/// Logs every key, in the caller's transaction: those that the log knows at their last change, the others at `otherwise`.
fn log_all<S: Session>(store: &mut Store<S>, otherwise: &str) -> Result<()> {
    for i in 0..store.tables.len() {
        let sql = store.tables[i].log_all(&store.objects);
        store.session.admin_execute(&sql, &[Some(otherwise)])?;
    }
    Ok(())
}

fn clear(ctx: &mut Context, order: &Order) -> Result<()> {
    let before = ctx.migration.diverged.take();
    let Context { migration, first, .. } = ctx;
    first.session.begin(Isolation::ReadCommitted, &[])?;
    let made = Move {
        reason: Some("the stores had diverged: all rows are compared"),
        forced: true,
        ..Move::new(&migration.name, &order.who, Some(migration.state), migration.state)
    };
    let result = migration
        .store(&mut first.session)
        .and_then(|()| catalog::record_history(&mut first.session, &made))
        .and_then(|()| first.session.commit());
    if result.is_err() {
        first.session.rollback();
        migration.diverged = before;
    }
    result
}

//! The ends of a migration: finish and cancel, and what they leave to clean up on the second server.
//!
//! The end is one transaction of the first store, under the locks of everything that it changes. What is on the second server goes
//! afterwards, and again until it is gone.

use std::ops::ControlFlow;
use std::time::Instant;

use pgrx::pg_sys;

use crate::context::Context;
use crate::cycle;
use crate::error::{Error, Result};
use crate::fault;
use crate::setup;
use crate::state::{By, Phase, State};
use crate::store::{Isolation, Row, Session, text};
use crate::switch::{Order, Pause, commit_state, in_attempts, lock_first};
use crate::views;

/// Bytes of conflicts with their images after which a transaction has enough of them.
const MOST_BYTES: usize = 1 << 20;

/// Ends replication from `second`. What is on the second server is removed afterwards, by [`clean_up`].
pub fn finish(ctx: &mut Context, order: &Order, drop_first: bool) -> Result<()> {
    let from = ctx.migration.state;
    if from == State::Finished {
        return Ok(());
    }
    if !from.allows(State::Finished, By::Finish) {
        return Err(Error::WrongState {
            name: ctx.migration.name.clone(),
            action: "be finished",
            state: from,
            hint: "A migration is finished from second.",
        });
    }
    if drop_first {
        check_drop(ctx)?;
    }
    cycle::run(ctx, true)?;
    bring_conflicts_home(ctx)?;
    end(ctx, order, State::Finished, |ctx| {
        setup::remove_first_locked(ctx)?;
        if drop_first {
            for (oid, rel) in ctx.first_tables.clone().iter().rev() {
                keep_sequences(ctx, *oid)?;
                ctx.first.session.batch(&format!("DROP TABLE {rel}"))?;
            }
        }
        Ok(())
    })?;
    fault::point("finish:committed")
}

/// The managed views take new values from the tables' sequences; an identity's cannot outlive its table.
fn check_drop(ctx: &Context) -> Result<()> {
    match ctx.pairs.iter().find(|p| p.first.columns.iter().any(|c| c.identity.is_some())) {
        None => Ok(()),
        Some(pair) => Err(Error::BadArgument {
            message: format!("table {} has an identity column, whose sequence the managed view uses", pair.first.rel),
            hint: "Finish without drop_first; the table stays under its reserved name.".into(),
        }),
    }
}

/// Sequences of serial columns stay when their table goes.
fn keep_sequences(ctx: &mut Context, table: u32) -> Result<()> {
    let session = &mut ctx.first.session;
    let owned = session.query(
        "SELECT d.objid::regclass::text FROM pg_depend d JOIN pg_class c ON c.oid = d.objid AND c.relkind = 'S' \
         WHERE d.classid = 'pg_class'::regclass AND d.refobjid = $1::text::oid AND d.deptype = 'a'",
        &[Some(&table.to_string())],
    )?;
    for sequence in owned.iter().filter_map(|r| r[0].as_deref()) {
        session.batch(&format!("ALTER SEQUENCE {sequence} OWNED BY NONE"))?;
    }
    Ok(())
}

/// Undoes everything from `copying` or `first`; from any state where `regardless`, as there is nothing to go on with.
pub fn cancel(ctx: &mut Context, order: &Order, regardless: bool) -> Result<()> {
    let from = ctx.migration.state;
    if from == State::Cancelled {
        return Ok(());
    }
    let may = from.allows(State::Cancelled, By::Cancel) || regardless && !from.has_ended();
    if !may {
        return Err(Error::WrongState {
            name: ctx.migration.name.clone(),
            action: "be cancelled",
            state: from,
            hint: "A migration is cancelled from copying or first.",
        });
    }
    end(ctx, order, State::Cancelled, |ctx| {
        if ctx.migration.taken_over {
            views::give_back(ctx)?;
        }
        views::drop_second_shape(ctx)?;
        setup::remove_first_locked(ctx)
    })?;
    fault::point("cancel:committed")
}

/// Undoes here what a start that failed has installed, and gives the tables' names back where it had taken them. Repeatable.
pub fn undo_start(ctx: &mut Context, order: &Order) -> Result<()> {
    in_attempts(ctx, order, true, |ctx| {
        let takeover = ctx.migration.taken_over;
        lock_first(ctx, order.patience.attempt(), takeover, false, Some(pg_sys::AccessExclusiveLock))?;
        if takeover {
            views::give_back(ctx)?;
        }
        setup::remove_first_locked(ctx)?;
        let Context { migration, first, .. } = ctx;
        migration.store(&mut first.session)?;
        first.session.commit()
    })
}

/// One transaction here that ends the migration, under the locks of everything that it changes.
fn end(ctx: &mut Context, order: &Order, to: State, work: impl Fn(&mut Context) -> Result<()>) -> Result<()> {
    in_attempts(ctx, order, true, |ctx| {
        let pause = Pause { began: Some(Instant::now()), drained: 0 };
        let second_shape = to == State::Cancelled;
        lock_first(ctx, order.patience.attempt(), true, second_shape, Some(pg_sys::AccessExclusiveLock))?;
        work(ctx)?;
        // What the status shows is written now and then: the last figures would stand for ever.
        let id = ctx.migration.id.to_string();
        ctx.first.session.admin_execute(
            "UPDATE crossover.activity SET backlog_rows = 0, backlog_since = NULL, log_bytes = 0 WHERE migration_id = $1::text::int",
            &[Some(&id)],
        )?;
        fault::point("end:moved")?;
        commit_state(ctx, order, to, Phase::Finishing, &pause)
    })
}

/// Removes what an ended migration has on the second server. Repeated by the worker until it works.
pub fn clean_up(ctx: &mut Context) -> Result<()> {
    setup::remove_second(ctx, false)?;
    fault::point("cleanup:peer")?;
    ctx.set_phase(Phase::Done)
}

/// Brings the conflicts home that a switch towards `second` recorded on the second server. Repeatable: each has a number there.
pub fn bring_conflicts_home(ctx: &mut Context) -> Result<()> {
    while bring_some_home(ctx)? {}
    Ok(())
}

/// As many as a transaction should have. False when there was none.
fn bring_some_home(ctx: &mut Context) -> Result<bool> {
    let names: Vec<String> = ctx.pairs.iter().map(|p| p.first.rel.to_string()).collect();
    let name = ctx.migration.name.clone();
    let (first, second) = ctx.stores()?;
    let table = second.objects.conflict();
    let sql = format!(
        "SELECT id, source, key::text, kept, first_image::text, second_image::text, at::text FROM {table} ORDER BY id LIMIT 100"
    );
    let (mut rows, mut bytes): (Vec<Row>, usize) = (Vec::new(), 0);
    second.session.stream(&sql, &[], &mut |row| {
        bytes += row.iter().flatten().map(|value| value.len()).sum::<usize>();
        rows.push(row.iter().map(|value| value.map(text).transpose()).collect::<Result<_>>()?);
        Ok(if bytes < MOST_BYTES { ControlFlow::Continue(()) } else { ControlFlow::Break(()) })
    })?;
    let Some(last) = rows.last().and_then(|r| r[0].clone()) else { return Ok(false) };
    first.session.begin(Isolation::ReadCommitted, &[])?;
    for r in &rows {
        let source: usize = crate::store::parse(r[1].as_deref().unwrap_or(""))?;
        let table_name = names.get(source).map_or("", String::as_str);
        let inserted = first.session.admin_execute(
            "INSERT INTO crossover.conflict (name, table_name, key, kind, kept, first_image, second_image, recorded_at, peer_id) \
             VALUES ($1::text, $2::text, $3::text, 'conflict', $4::text, $5::text::jsonb, $6::text::jsonb, $7::text::timestamptz, $8::text::bigint) \
             ON CONFLICT (name, peer_id) DO NOTHING",
            &[
                Some(&name), Some(table_name), r[2].as_deref(), r[3].as_deref(), r[4].as_deref(), r[5].as_deref(),
                r[6].as_deref(), r[0].as_deref(),
            ],
        );
        if let Err(e) = inserted {
            first.session.rollback();
            return Err(e);
        }
    }
    first.session.commit()?;
    fault::point("conflict:copied")?;
    second.session.execute(&format!("DELETE FROM {table} WHERE id <= $1::text::bigint"), &[Some(&last)]).map(|_| true)
}

//! The initial copy: key-ordered chunks, several workers, each chunk's checkpoint committed with its rows.
//!
//! Capture is there before the first chunk is read, and its backlog is applied only after the last: what a chunk shows of
//! a row that changes meanwhile does not matter, and nothing that was deleted comes back. A chunk holds a snapshot for
//! its own length only.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use crate::catalog::{self, Move};
use crate::context::{Context, FirstStore};
use crate::cycle;
use crate::cycle::write::Writer;
use crate::error::{Error, Result};
use crate::fault;
use crate::mapping::text::copy_line;
use crate::store::{Derived, Isolation, Session, parse};

/// Bytes collected before they are handed to the connection.
const BUFFER: usize = 64 * 1024;
/// How long the second server may take for a whole table: to analyze it, or to empty it.
pub const PATIENCE: Duration = Duration::from_secs(600);
/// How often a worker that waits for its turn looks whether the copy goes on.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// A part of the copy: keys after `after` (exclusive) up to `last` (inclusive).
#[derive(Debug)]
struct Chunk {
    index: usize,
    number: i64,
    after: Option<String>,
    last: Option<String>,
    /// When its turn comes in a throttled copy.
    due: Instant,
}

/// Copies chunk after chunk until none is left or the migration is not copying any more. The body of a copy worker.
pub fn work(ctx: &mut Context) -> Result<()> {
    loop {
        crate::lock::wait_latch(Duration::ZERO);
        if !ctx.reload()? || ctx.migration.paused || ctx.migration.phase != crate::state::Phase::Copying {
            return Ok(());
        }
        ctx.connect()?;
        let Some(chunk) = claim(ctx)? else { return Ok(()) };
        if !wait_until_due(ctx, &chunk)? {
            return Ok(());
        }
        ctx.refresh_constraints()?;
        ctx.stores()?.1.session.set_patience(cycle::STALL);
        fault::point("copy:claimed")?;
        let rows = match copy(ctx, &chunk) {
            Err(e) if e.is_rejected_row() || e.is_undefined_name() => {
                ctx.rollback_all();
                ctx.connect()?;
                copy_row_by_row(ctx, &chunk)?
            }
            other => other?,
        };
        fault::point("copy:committed")?;
        done(ctx, &chunk, rows)?;
    }
}

/// Is every chunk of every table on the second store?
pub fn is_complete(ctx: &mut Context) -> Result<bool> {
    let rows = ctx.first.session.read(
        "SELECT NOT EXISTS (SELECT FROM crossover.migrated_table WHERE migration_id = $1::text::int AND NOT handed_out) \
            AND NOT EXISTS (SELECT FROM crossover.chunk WHERE migration_id = $1::text::int)",
        &[Some(&ctx.migration.id.to_string())],
    )?;
    Ok(rows[0][0].as_deref() == Some("t"))
}

/// Takes over a chunk whose worker died, or hands out the next one. A transaction of its own; other workers wait for it.
fn claim(ctx: &mut Context) -> Result<Option<Chunk>> {
    let session = &mut ctx.first.session;
    session.begin(Isolation::ReadCommitted, &[])?;
    let chunk = claim_in(ctx);
    match &chunk {
        Ok(_) => ctx.first.session.commit()?,
        Err(_) => ctx.first.session.rollback(),
    }
    chunk
}

fn claim_in(ctx: &mut Context) -> Result<Option<Chunk>> {
    let id = ctx.migration.id.to_string();
    let (size, rate) = (ctx.migration.options.chunk_size(), ctx.migration.options.copy_rate);
    let rows = size.to_string();
    let first = &mut ctx.first;
    // A copy that is paused, or to begin anew, hands nothing out: whoever stops it waits for us (and then knows our chunk), or we see
    // that it has.
    let copying = first.session.admin_query(
        "SELECT FROM crossover.migration WHERE id = $1::text::int AND phase = 'copying' AND NOT paused FOR SHARE",
        &[Some(&id)],
    )?;
    if copying.is_empty() {
        return Ok(None);
    }
    let orphan = first.session.admin_query(
        "UPDATE crossover.chunk c SET worker = pg_backend_pid() WHERE (migration_id, index, chunk) = ( \
            SELECT migration_id, index, chunk FROM crossover.chunk o WHERE migration_id = $1::text::int \
               AND (worker = pg_backend_pid() OR NOT EXISTS (SELECT FROM pg_stat_activity a WHERE a.pid = o.worker AND a.backend_type = 'pg_crossover copy')) \
             ORDER BY index, chunk LIMIT 1 FOR UPDATE SKIP LOCKED) RETURNING index, chunk, after_key, last_key",
        &[Some(&id)],
    )?;
    if let Some(row) = orphan.into_iter().next() {
        return Ok(Some(Chunk {
            index: parse(row[0].as_deref().unwrap_or(""))?,
            number: parse(row[1].as_deref().unwrap_or(""))?,
            after: row[2].clone(),
            last: row[3].clone(),
            due: Instant::now(),
        }));
    }
    let next = first.session.admin_query(
        "SELECT index, last_chunk, last_key FROM crossover.migrated_table WHERE migration_id = $1::text::int AND NOT handed_out \
         ORDER BY index LIMIT 1 FOR UPDATE",
        &[Some(&id)],
    )?;
    let Some(row) = next.into_iter().next() else {
        // FOR UPDATE may have waited for a worker that handed the table's last chunk out; look for another table.
        let left = first.session.admin_query(
            "SELECT EXISTS (SELECT FROM crossover.migrated_table WHERE migration_id = $1::text::int AND NOT handed_out)",
            &[Some(&id)],
        )?;
        return if left[0][0].as_deref() == Some("t") { claim_in(ctx) } else { Ok(None) };
    };
    let index: usize = parse(row[0].as_deref().unwrap_or(""))?;
    let number: i64 = parse::<i64>(row[1].as_deref().unwrap_or(""))? + 1;
    let after = row[2].clone();
    let sql = first.table(index).chunk_end();
    let last = first.one(&sql, &[after.as_deref(), Some(&rows)])?;
    let (i, n) = (index.to_string(), number.to_string());
    first.session.admin_execute(
        "UPDATE crossover.migrated_table SET last_chunk = $3::text::bigint, last_key = $4::text, handed_out = $4 IS NULL, \
         copy_started = coalesce(copy_started, clock_timestamp()) WHERE migration_id = $1::text::int AND index = $2::text::int",
        &[Some(&id), Some(&i), Some(&n), last.as_deref()],
    )?;
    first.session.admin_execute(
        "INSERT INTO crossover.chunk (migration_id, index, chunk, after_key, last_key, worker) \
         VALUES ($1::text::int, $2::text::int, $3::text::bigint, $4::text, $5::text, pg_backend_pid())",
        &[Some(&id), Some(&i), Some(&n), after.as_deref(), last.as_deref()],
    )?;
    let wait = match rate {
        Some(rate) => schedule(first, &id, size as f64 / rate as f64)?,
        None => Duration::ZERO,
    };
    Ok(Some(Chunk { index, number, after, last, due: Instant::now() + wait }))
}

/// Takes the next turn of a throttled copy, which is as long as its rows are due in: one schedule for all workers, so that it does not
/// matter how many there are, nor how long each takes. Time in which nobody copied is not made up for.
fn schedule(first: &mut FirstStore, migration: &str, seconds: f64) -> Result<Duration> {
    let rows = first.session.admin_query(
        "UPDATE crossover.activity SET copy_due = greatest(copy_due, clock_timestamp()) + make_interval(secs => $2::text::float8) \
         WHERE migration_id = $1::text::int RETURNING extract(epoch FROM copy_due - clock_timestamp())::float8 - $2::text::float8",
        &[Some(migration), Some(&seconds.to_string())],
    )?;
    let wait: f64 = parse(rows.first().and_then(|r| r[0].as_deref()).unwrap_or("0"))?;
    Ok(Duration::from_secs_f64(wait.clamp(0.0, 3600.0)))
}

/// Waits for a chunk's turn, in no transaction. False when the copy has been stopped meanwhile.
fn wait_until_due(ctx: &mut Context, chunk: &Chunk) -> Result<bool> {
    while Instant::now() < chunk.due {
        crate::lock::wait_latch(chunk.due.saturating_duration_since(Instant::now()).min(LOOK_EVERY));
        if !ctx.reload()? || ctx.migration.paused || ctx.migration.phase != crate::state::Phase::Copying {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The rows of a chunk that is on the second store already; a crash came between its commit and ours.
fn checkpoint(ctx: &mut Context, chunk: &Chunk) -> Result<Option<u64>> {
    let (_, second) = ctx.stores()?;
    let sql = format!(
        "SELECT rows FROM {} WHERE source = $1::text::int AND chunk = $2::text::bigint",
        second.objects.chunk()
    );
    let rows = second.one(&sql, &[Some(&chunk.index.to_string()), Some(&chunk.number.to_string())])?;
    rows.map(|r| parse(&r)).transpose()
}

/// Copies one chunk with COPY: one snapshot here, one transaction there.
fn copy(ctx: &mut Context, chunk: &Chunk) -> Result<u64> {
    if let Some(rows) = checkpoint(ctx, chunk)? {
        return Ok(rows);
    }
    let (first, second) = ctx.stores()?;
    let (query, copy_in) = (first.table(chunk.index).chunk(), second.table(chunk.index).copy_in());
    let lock = vec![first.table(chunk.index).rel.to_string()];
    first.session.begin(Isolation::RepeatableRead, &lock)?;
    second.begin_write()?;
    second.session.armed().copy_in(&copy_in)?;
    let (mut buffer, mut rows) = (Vec::with_capacity(2 * BUFFER), 0);
    let streamed = first.session.stream(&query, &[chunk.after.as_deref(), chunk.last.as_deref()], &mut |row| {
        rows += 1;
        copy_line(&mut buffer, row, |buffer| {
            if buffer.len() >= BUFFER {
                second.session.armed().copy_data(buffer)?;
                buffer.clear();
            }
            Ok(())
        })?;
        Ok(ControlFlow::Continue(()))
    });
    if let Err(e) = streamed {
        // The COPY ends before its transaction can be rolled back; what the server says of it adds nothing.
        let _ = second.session.armed().copy_end(Some("rolled back"));
        return Err(e);
    }
    second.session.armed().copy_data(&buffer)?;
    second.session.armed().copy_end(None)?;
    first.end_read()?;
    commit_chunk(ctx, chunk, rows)?;
    Ok(rows)
}

/// Two snapshots can show one unique value twice, and a target may refuse a row: then the chunk's rows are written one by
/// one where need be, and those that do not go in are owed.
fn copy_row_by_row(ctx: &mut Context, chunk: &Chunk) -> Result<u64> {
    let (first, second) = ctx.stores()?;
    let lock = vec![first.table(chunk.index).rel.to_string()];
    first.session.begin(Isolation::RepeatableRead, &lock)?;
    second.begin_write()?;
    let (mut written, mut after) = (0, chunk.after.clone());
    loop {
        let keys = first.chunk_keys(chunk.index, after.as_deref(), chunk.last.as_deref())?;
        let Some(last) = keys.last() else { break };
        after = Some(last.clone());
        first.derive_in_batches(chunk.index, &keys.iter().collect::<Vec<_>>(), &mut |_, derived| {
            // Two snapshots can show one unique value twice: what is in the way is put right by the cycle that catches up.
            let (at, mut others) = (|_: &_| 0, |_: &[_]| Ok(BTreeMap::new()));
            let mut writer = Writer::new(chunk.index, false, &at, &mut others);
            writer.write(second, &derived.list())?;
            let mut owed = writer.parked;
            written += writer.written;
            owed.extend(Derived::parked(&derived.refused, &at));
            second.owe(chunk.index, &owed)
        })?;
    }
    first.end_read()?;
    commit_chunk(ctx, chunk, written)?;
    Ok(written)
}

fn commit_chunk(ctx: &mut Context, chunk: &Chunk, rows: u64) -> Result<()> {
    let (_, second) = ctx.stores()?;
    let sql =
        format!("INSERT INTO {} VALUES ($1::text::int, $2::text::bigint, $3::text::bigint)", second.objects.chunk());
    second
        .session
        .execute(&sql, &[Some(&chunk.index.to_string()), Some(&chunk.number.to_string()), Some(&rows.to_string())])?;
    fault::point("copy:sent")?;
    second.session.commit()
}

fn done(ctx: &mut Context, chunk: &Chunk, rows: u64) -> Result<()> {
    let session = &mut ctx.first.session;
    let (id, i) = (ctx.migration.id.to_string(), chunk.index.to_string());
    session.begin(Isolation::ReadCommitted, &[])?;
    let result = session
        .admin_execute(
            "DELETE FROM crossover.chunk WHERE migration_id = $1::text::int AND index = $2::text::int AND chunk = $3::text::bigint",
            &[Some(&id), Some(&i), Some(&chunk.number.to_string())],
        )
        .and_then(|_| {
            session.admin_execute(
                "UPDATE crossover.migrated_table t SET rows_copied = rows_copied + $3::text::bigint, copy_finished = CASE WHEN handed_out AND NOT EXISTS ( \
                    SELECT FROM crossover.chunk c WHERE c.migration_id = t.migration_id AND c.index = t.index) THEN clock_timestamp() END \
                 WHERE migration_id = $1::text::int AND index = $2::text::int",
                &[Some(&id), Some(&i), Some(&rows.to_string())],
            )
        })
        .and_then(|_| session.commit());
    if result.is_err() {
        session.rollback();
    }
    result
}

/// COPY runs in replica mode, which checks neither foreign keys nor deferrable constraints: the rows that violate one which first has not
/// are owed, so that the next cycle takes them out and parks them. Returns how many.
pub fn owe_violations(ctx: &mut Context) -> Result<u64> {
    ctx.refresh_constraints()?;
    ctx.patiently(PATIENCE, |ctx| {
        let (_, second) = ctx.stores()?;
        let mut found = 0;
        second.session.begin(Isolation::ReadCommitted, &[])?;
        for i in 0..second.tables.len() {
            for query in second.violations(i) {
                found += second.owe_result(i, &query, 0)?;
            }
        }
        second.session.commit()?;
        Ok(found)
    })
}

/// Marks the copy as complete: from now on its backlog is applied.
pub fn complete(ctx: &mut Context) -> Result<()> {
    fault::point("copy:complete")?;
    ctx.migration.phase = crate::state::Phase::CatchingUp;
    ctx.first.session.begin(Isolation::ReadCommitted, &[])?;
    let result = ctx.migration.store(&mut ctx.first.session).and_then(|()| ctx.first.session.commit());
    if result.is_err() {
        ctx.first.session.rollback();
    }
    result
}

/// `copying` to `first`.
pub fn enter_first(ctx: &mut Context, rows: u64) -> Result<()> {
    fault::point("copy:caught-up")?;
    let from = ctx.migration.state;
    ctx.migration.state = crate::state::State::First;
    ctx.migration.phase = crate::state::Phase::Replicating;
    ctx.first.session.begin(Isolation::ReadCommitted, &[])?;
    let result = ctx
        .migration
        .store(&mut ctx.first.session)
        .and_then(|()| {
            let (name, owner) = (ctx.migration.name.clone(), ctx.migration.owner_name.as_str().to_string());
            let copied =
                Move { drained: Some(rows as i64), ..Move::new(&name, &owner, Some(from), ctx.migration.state) };
            catalog::record_history(&mut ctx.first.session, &copied)
        })
        .and_then(|()| ctx.first.session.commit());
    if result.is_err() {
        ctx.first.session.rollback();
        ctx.migration.state = from;
        ctx.migration.phase = crate::state::Phase::CatchingUp;
    }
    result.map_err(|e| match e {
        Error::Internal(m) => Error::Internal(format!("copy: {m}")),
        e => e,
    })
}

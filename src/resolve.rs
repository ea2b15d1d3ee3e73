//! `migration_resolve`: an operator decides a recorded conflict anew, or has a parked row tried again.
//!
//! The image that is to stand is written as a client would write it, to a store that clients may write to: it is captured and replicated
//! like any other change, and whatever stands there before is kept in `migration_conflicts`.

use std::time::Duration;

use crate::context::Context;
use crate::cycle;
use crate::error::{Error, Result, Side};
use crate::lock::Patience;
use crate::state::State;
use crate::store::{Isolation, Key, Session, Store};

/// How long the write may wait for a row that a client holds.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

/// What `crossover.conflict` says of one entry.
struct Entry {
    id: String,
    index: usize,
    key: Key,
    parked: bool,
    /// The image that is to stand; None: no row.
    image: Option<String>,
    /// Both images, as they were recorded.
    recorded: [Option<String>; 2],
}

/// Makes the image of `keep` stand on both stores; a parked row whose own store is `keep` is tried again. Transactions of its own.
///
/// # Errors
/// `BadArgument` for an entry that there is not, or whose image is no row; `StillParked` when the row is refused again; what a server
/// says of the write, which has changed nothing then.
pub fn resolve(ctx: &mut Context, conflict: i64, keep: Side, patience: &Patience) -> Result<()> {
    if !(ctx.migration.state.replicates_forward() || ctx.migration.state.replicates_backward()) {
        return Err(Error::WrongState {
            name: ctx.migration.name.clone(),
            action: "resolve a conflict",
            state: ctx.migration.state,
            hint: "Conflicts are resolved in first, both and second.",
        });
    }
    ctx.connect()?;
    ctx.refresh_constraints()?;
    let entry = load(ctx, conflict, keep)?;
    let before = standing(ctx, &entry)?;
    match refused_by(ctx, &entry)? {
        Some(store) if entry.parked && store != keep => {}
        Some(store) if entry.parked => overwrite(ctx, &entry, store)?,
        _ if entry.parked => {}
        _ => write(ctx, &entry, keep)?,
    }
    replicate(ctx, patience)?;
    if let (true, Some(_)) = (entry.parked, refused_by(ctx, &entry)?) {
        return Err(Error::StillParked { conflict, detail: refusal(ctx, &entry)? });
    }
    record(ctx, &entry, keep, &before)
}

fn load(ctx: &mut Context, conflict: i64, keep: Side) -> Result<Entry> {
    let id = conflict.to_string();
    let rows = ctx.first.session.read(
        "SELECT table_name, key, kind, first_image::text, second_image::text, jsonb_typeof(CASE $2 WHEN 'first' THEN first_image ELSE second_image END), resolved_at IS NOT NULL \
         FROM crossover.conflict WHERE id = $1::text::bigint",
        &[Some(&id), Some(&keep.to_string())],
    )?;
    let Some([Some(table), Some(key), Some(kind), first, second, image_type, resolved]) =
        rows.first().map(Vec::as_slice)
    else {
        return Err(unknown(conflict));
    };
    let index = ctx.pairs.iter().position(|p| p.first.rel.to_string() == *table).ok_or_else(|| unknown(conflict))?;
    let parked = kind == "parked";
    if parked && resolved.as_deref() == Some("t") {
        return Err(Error::BadArgument {
            message: format!("the row of conflict {conflict} is not parked any more"),
            hint: "Nothing is left to do.".into(),
        });
    }
    let recorded = [first.clone(), second.clone()];
    let image = recorded[usize::from(keep == Side::Second)].clone();
    if !parked && image_type.as_deref().is_some_and(|t| t != "object") {
        return Err(Error::BadArgument {
            message: format!("the image of conflict {conflict} is the text of a row that jsonb does not take"),
            hint: "Write the right values through the view, as any client would.".into(),
        });
    }
    Ok(Entry { id, index, key: key.clone(), parked, image, recorded })
}

fn unknown(conflict: i64) -> Error {
    Error::UnknownConflict { conflict }
}

/// The row as it stands on either store, as jsonb.
fn standing(ctx: &mut Context, entry: &Entry) -> Result<[Option<String>; 2]> {
    let (first, second) = ctx.stores()?;
    Ok([image_on(first, entry)?, image_on(second, entry)?])
}

fn image_on<S: Session>(store: &mut Store<S>, entry: &Entry) -> Result<Option<String>> {
    in_transaction(store, false, |store| Ok(store.images(entry.index, &[&entry.key])?.remove(&entry.key)))
}

/// The store that refuses the row of a parked entry.
fn refused_by(ctx: &mut Context, entry: &Entry) -> Result<Option<Side>> {
    Ok(owed_error(ctx, entry)?.map(|(side, _)| side))
}

fn refusal(ctx: &mut Context, entry: &Entry) -> Result<String> {
    Ok(owed_error(ctx, entry)?.map(|(_, error)| error).unwrap_or_default())
}

fn owed_error(ctx: &mut Context, entry: &Entry) -> Result<Option<(Side, String)>> {
    fn of<S: Session>(store: &mut Store<S>, entry: &Entry) -> Result<Option<(Side, String)>> {
        let refusal = in_transaction(store, false, |store| store.refusal(entry.index, &entry.key))?;
        Ok(refusal.map(|error| (store.side(), error)))
    }
    let (first, second) = ctx.stores()?;
    Ok(match of(second, entry)? {
        Some(found) => Some(found),
        None => of(first, entry)?,
    })
}

/// Which store clients write to, so that a write there is captured: the wished one, if it is exposed.
fn exposed(state: State, wished: Side) -> Side {
    match state {
        State::Both => wished,
        State::Second => Side::Second,
        _ => Side::First,
    }
}

/// Writes the image of `keep` to an exposed store.
fn write(ctx: &mut Context, entry: &Entry, keep: Side) -> Result<()> {
    let target = exposed(ctx.migration.state, keep);
    let (first, second) = ctx.stores()?;
    match (target, keep) {
        (Side::First, Side::First) => put(first, entry),
        (Side::Second, Side::Second) => put(second, entry),
        (Side::First, Side::Second) => {
            let row = try_out(second, entry)?;
            put_row(first, entry, row.as_deref())
        }
        (Side::Second, Side::First) => {
            let row = try_out(first, entry)?;
            put_row(second, entry, row.as_deref())
        }
    }
}

/// For a parked row that is given up: what `store`, which refuses it, holds takes its place on the other one.
fn overwrite(ctx: &mut Context, entry: &Entry, store: Side) -> Result<()> {
    let (first, second) = ctx.stores()?;
    let key = [&entry.key];
    match store {
        Side::Second => {
            let row = in_transaction(second, false, |s| Ok(s.derive(entry.index, &key)?.rows.remove(&entry.key)))?;
            put_row(first, entry, row.as_deref())
        }
        Side::First => {
            let row = in_transaction(first, false, |s| Ok(s.derive(entry.index, &key)?.rows.remove(&entry.key)))?;
            put_row(second, entry, row.as_deref())
        }
    }
}

/// Writes the image itself, or deletes the row.
fn put<S: Session>(store: &mut Store<S>, entry: &Entry) -> Result<()> {
    in_transaction(store, true, |store| {
        let sql = store.tables[entry.index].put_image();
        match &entry.image {
            Some(image) => store.session.execute(&sql, &[Some(image)]),
            None => store.delete(entry.index, &[&entry.key]),
        }
    })
    .map(drop)
}

/// Writes a row in the second shape, or deletes it.
fn put_row<S: Session>(store: &mut Store<S>, entry: &Entry, row: Option<&str>) -> Result<()> {
    in_transaction(store, true, |store| match row {
        Some(row) => store.upsert(entry.index, &[row]),
        None => store.delete(entry.index, &[&entry.key]),
    })
    .map(drop)
}

/// The image as a row in the second shape: puts it into the store, reads what the rule makes of it, and rolls back.
fn try_out<S: Session>(store: &mut Store<S>, entry: &Entry) -> Result<Option<String>> {
    let Some(image) = &entry.image else { return Ok(None) };
    in_transaction(store, false, |store| {
        store.mark_origin()?;
        store.session.set_lock_timeout(LOCK_PATIENCE)?;
        let sql = store.tables[entry.index].put_image();
        store.session.execute(&sql, &[Some(image)])?;
        let mut derived = store.derive(entry.index, &[&entry.key])?;
        match derived.refused.remove(&entry.key) {
            Some(error) => Err(Error::BadArgument {
                message: format!("the image does not fit the mapping: {error}"),
                hint: "Write the right values through the view, as any client would.".into(),
            }),
            None => Ok(derived.rows.remove(&entry.key)),
        }
    })
}

fn in_transaction<S: Session, T>(
    store: &mut Store<S>,
    commit: bool,
    work: impl FnOnce(&mut Store<S>) -> Result<T>,
) -> Result<T> {
    store.session.begin(Isolation::ReadCommitted, &[])?;
    let limited = if commit { store.session.set_lock_timeout(LOCK_PATIENCE) } else { Ok(()) };
    let result = limited.and_then(|()| work(store));
    match result {
        Ok(value) if commit => store.session.commit().map(|()| value),
        other => {
            store.session.rollback();
            other
        }
    }
}

/// Runs cycles until nothing is left, or the time is over; what is left then goes on by itself.
fn replicate(ctx: &mut Context, patience: &Patience) -> Result<()> {
    loop {
        match cycle::run(ctx, true) {
            Ok(outcome) if outcome.scopes == 0 => return Ok(()),
            Ok(outcome) if outcome.left == 0 && outcome.scopes <= outcome.parked => return Ok(()),
            Err(e) if !e.is_contention() => return Err(e),
            _ if patience.is_over() => return Ok(()),
            _ => crate::lock::wait_latch(Duration::from_millis(10)),
        }
    }
}

/// The entry is resolved; if what stood before was neither of its images, that is kept in one of its own.
fn record(ctx: &mut Context, entry: &Entry, keep: Side, before: &[Option<String>; 2]) -> Result<()> {
    let now = standing(ctx, entry)?;
    let session = &mut ctx.first.session;
    session.begin(Isolation::ReadCommitted, &[])?;
    let result = (|| {
        session.admin_execute(
            "UPDATE crossover.conflict SET kept = $2::text, resolved_at = clock_timestamp(), standing = $3::text::jsonb WHERE id = $1::text::bigint",
            &[Some(&entry.id), Some(&keep.to_string()), now[usize::from(keep == Side::Second)].as_deref()],
        )?;
        session.admin_execute(
            "INSERT INTO crossover.conflict (name, table_name, key, kind, kept, first_image, second_image, resolved_at) \
             SELECT name, table_name, key, 'replaced', $2::text, $3::text::jsonb, $4::text::jsonb, clock_timestamp() FROM crossover.conflict \
             WHERE id = $1::text::bigint AND ($3::text::jsonb IS DISTINCT FROM $5::text::jsonb AND $3::text::jsonb IS DISTINCT FROM $7::text::jsonb \
                OR $4::text::jsonb IS DISTINCT FROM $6::text::jsonb AND $4::text::jsonb IS DISTINCT FROM $8::text::jsonb)",
            &[
                Some(&entry.id),
                Some(&keep.to_string()),
                before[0].as_deref(),
                before[1].as_deref(),
                entry.recorded[0].as_deref(),
                entry.recorded[1].as_deref(),
                now[0].as_deref(),
                now[1].as_deref(),
            ],
        )?;
        session.commit()
    })();
    if result.is_err() {
        session.rollback();
    }
    result
}

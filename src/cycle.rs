//! One run of replication: read the change logs, derive the rows anew, decide, apply, look again.
//!
//! DESIGN "Replication". While one store only is exposed the other has no clients, and a cycle streams its batches through
//! ([`one_way`]); while both are, one cycle serves both directions ([`two_way`]). The switch composes the same steps
//! under its locks. A watermark commits with the rows that it speaks for, after its source has been flushed.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::catalog::Migration;
use crate::conflict::{Decision, Scope, decide};
use crate::context::{Context, FirstStore, SecondStore};
use crate::error::{Error, Result, Side};
use crate::fault;
use crate::mapping::rule::Pair;
use crate::state::Phase;
use crate::store::{Changes, Isolation, Key, Owed, Session, Snapshot, Store, Watermark};

/// Rows written by one statement.
const BATCH: usize = 1000;
/// A write in `both` yields to a client after this long at one lock, well below PostgreSQL's deadlock_timeout of 1 s.
const YIELD_AFTER: Duration = Duration::from_millis(200);
/// A cycle's source transaction ends after this long without an answer of the second server.
const STALL: Duration = Duration::from_secs(5);

/// What a cycle did.
#[derive(Debug, Clone, Copy, Default)]
pub struct Outcome {
    /// Changed scopes read.
    pub scopes: usize,
    /// Rows written or deleted.
    pub rows: u64,
    /// Scopes that a client held; they come again.
    pub contended: usize,
    /// Rows that a target refuses, all in all.
    pub parked: usize,
    /// The oldest change that this cycle has read.
    pub oldest: Option<i64>,
}

/// Which directions are replicated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Directions {
    pub forward: bool,
    pub backward: bool,
}

impl Directions {
    pub const BOTH: Directions = Directions { forward: true, backward: true };

    pub fn of(migration: &Migration) -> Directions {
        match migration.phase {
            Phase::FencePending => return Directions::BOTH,
            Phase::CatchingUp => return Directions { forward: true, backward: false },
            _ => {}
        }
        Directions { forward: migration.state.replicates_forward(), backward: migration.state.replicates_backward() }
    }
}

/// Runs one cycle, in transactions of its own on both stores. `retry_parked`: try the parked rows again, too.
///
/// # Errors
/// Whatever a server reports; nothing is half done, and the next cycle repeats what is missing.
pub fn run(ctx: &mut Context, retry_parked: bool) -> Result<Outcome> {
    ctx.connect()?;
    let directions = Directions::of(&ctx.migration);
    let name = ctx.migration.name.clone();
    let Context { pairs, first, second, .. } = ctx;
    let second = second.as_mut().ok_or_else(|| Error::internal("not connected"))?;
    second.session.set_deadline(Some(Instant::now() + STALL));
    let result = match directions {
        Directions { forward: true, backward: true } => two_way(&name, pairs, first, second, retry_parked),
        Directions { forward: true, .. } => one_way(first, second, retry_parked),
        Directions { backward: true, .. } => one_way(second, first, retry_parked),
        _ => Ok(Outcome::default()),
    };
    second.session.set_deadline(None);
    result.map_err(|e| {
        ctx.rollback_all();
        match e {
            Error::Diverged { detail, .. } => Error::Diverged { name, detail },
            e => e,
        }
    })
}

/// The changes of one direction: the log's since the watermark that `destination` keeps, and what is owed to it.
pub struct Incoming {
    pub changes: Vec<Changes>,
    pub owed: Vec<Vec<Owed>>,
}

impl Incoming {
    fn is_empty(&self) -> bool {
        self.changes.iter().all(Changes::is_empty)
    }

    fn scopes(&self) -> usize {
        self.changes.iter().map(|c| c.keys.len() + usize::from(c.whole.is_some())).sum()
    }

    pub fn log_rows(&self) -> i64 {
        self.changes.iter().map(|c| c.log_rows).sum()
    }

    fn parked(&self) -> usize {
        self.owed.iter().flatten().filter(|o| o.error.is_some()).count()
    }
}

/// Reads what `destination` has not seen of `source` yet, in the transactions that both are in.
///
/// # Errors
/// `Error::Diverged` when the source has lost changes that the watermark covers.
pub fn incoming<A: Session, B: Session>(
    source: &mut Store<A>,
    destination: &mut Store<B>,
    retry_parked: bool,
) -> Result<Incoming> {
    let watermark = destination.watermark()?.ok_or_else(|| Error::internal("no watermark"))?;
    let owed = destination.owed()?;
    let counter = source.counter()?;
    if counter < watermark.counter {
        return Err(Error::Diverged {
            name: String::new(),
            detail: format!(
                "The {} store stands at counter {counter}, but changes up to counter {} have been replicated from it: it has lost some.",
                source.side(),
                watermark.counter
            ),
        });
    }
    let mut changes = source.changes(&watermark.snapshot)?;
    for (table, owed) in changes.iter_mut().zip(&owed) {
        for o in owed.iter().filter(|o| o.error.is_none() || retry_parked) {
            table.add(o.key.clone(), o.at);
        }
    }
    Ok(Incoming { changes, owed })
}

/// One direction; the destination is fenced, so nobody else writes there.
fn one_way<A: Session, B: Session>(
    source: &mut Store<A>,
    destination: &mut Store<B>,
    retry_parked: bool,
) -> Result<Outcome> {
    let capture = source.side();
    let seen = source.begin_read()?;
    check_capture(source)?;
    destination.session.begin(Isolation::ReadCommitted, &[])?;
    let incoming = incoming(source, destination, retry_parked)?;
    let mut outcome = Outcome { parked: incoming.parked(), ..Outcome::default() };
    if incoming.is_empty() {
        destination.session.rollback();
        source.end_read()?;
        return Ok(outcome);
    }
    destination.mark_origin()?;
    outcome.scopes = incoming.scopes();
    outcome.oldest = incoming.changes.iter().filter_map(Changes::oldest).min();
    fault::point("cycle:read")?;
    let mut parked = 0;
    // Deletes first, children before parents: a unique value may have moved to another key.
    for (i, changes) in incoming.changes.iter().enumerate().rev() {
        for keys in batches(changes) {
            let keys = keys.as_deref();
            let rows = source.derive(i, keys)?;
            let gone = missing(destination, i, keys, &rows)?;
            outcome.rows += destination.delete(i, &gone.iter().collect::<Vec<_>>())?;
        }
    }
    for (i, changes) in incoming.changes.iter().enumerate() {
        let mut owed = Vec::new();
        let mut settled: Vec<Key> = Vec::new();
        for keys in batches(changes) {
            let rows = source.derive(i, keys.as_deref())?;
            let at = |key: &Key| changes.keys.get(key).copied().or(changes.whole).unwrap_or(0);
            outcome.rows += write_rows(destination, i, &rows, &mut owed, None, &at)?;
            settled.extend(keys.into_iter().flatten().cloned());
        }
        parked += owed.len();
        settle(destination, i, &incoming.owed[i], changes, &settled, &owed)?;
    }
    source.end_read()?;
    let counter = source.flush()?;
    fault::point("cycle:flushed")?;
    destination.set_watermark(&Watermark { snapshot: seen, counter })?;
    fault::point(if capture == Side::First { "cycle:second-written" } else { "cycle:first-written" })?;
    destination.session.commit()?;
    fault::point(if capture == Side::First { "cycle:second-committed" } else { "cycle:first-committed" })?;
    outcome.parked = parked + incoming.owed.iter().flatten().filter(|o| o.error.is_some() && !retry_parked).count();
    Ok(outcome)
}

/// Both directions: first commits first, with the conflicts; then second.
fn two_way(
    name: &str,
    pairs: &[Pair],
    first: &mut FirstStore,
    second: &mut SecondStore,
    retry_parked: bool,
) -> Result<Outcome> {
    let s1 = first.begin_read()?;
    let s2 = second.begin_read()?;
    check_capture(first)?;
    check_capture(second)?;
    let forward = incoming(first, second, retry_parked)?;
    let backward = incoming(second, first, retry_parked)?;
    let parked = forward.parked() + backward.parked();
    if forward.is_empty() && backward.is_empty() {
        second.end_read()?;
        first.end_read()?;
        return Ok(Outcome { parked, ..Outcome::default() });
    }
    let plan = Plan::make(pairs, first, second, forward, backward)?;
    second.end_read()?;
    first.end_read()?;
    fault::point("cycle:read")?;
    let mut outcome = Outcome { scopes: plan.scopes(), oldest: plan.oldest(), ..Outcome::default() };
    let counter2 = if plan.writes_first() { Some(second.flush()?) } else { None };
    fault::point("cycle:flushed")?;

    // What first owes to itself is, in a conflict, owed to second as well: the next cycle must see both changes.
    let mut skip: Vec<Vec<Key>> = vec![Vec::new(); pairs.len()];
    let counter1;
    loop {
        first.begin_write()?;
        first.session.set_lock_timeout(YIELD_AFTER)?;
        let written = plan.write_first(first, pairs, name, &s1, &mut skip, Contended::Skip, Some(Side::First))?;
        outcome.rows += written.rows;
        if written.looked_again {
            first.session.rollback();
            continue;
        }
        if let Some(counter) = counter2 {
            first.set_watermark(&Watermark { snapshot: s2.clone(), counter })?;
        }
        fault::point("cycle:first-written")?;
        counter1 = bump(first)?;
        first.session.commit()?;
        outcome.parked += written.parked;
        break;
    }
    fault::point("cycle:first-committed")?;
    outcome.contended += skip.iter().map(Vec::len).sum::<usize>();
    if plan.writes_second() {
        let mut skip2: Vec<Vec<Key>> = vec![Vec::new(); pairs.len()];
        loop {
            second.begin_write()?;
            second.session.set_lock_timeout(YIELD_AFTER)?;
            let written = plan.write_second(second, &s2, &skip, &mut skip2, Contended::Skip)?;
            outcome.rows += written.rows;
            if written.looked_again {
                second.session.rollback();
                continue;
            }
            second.set_watermark(&Watermark { snapshot: s1.clone(), counter: counter1 })?;
            fault::point("cycle:second-written")?;
            second.session.commit()?;
            outcome.parked += written.parked;
            break;
        }
        outcome.contended += skip2.iter().map(Vec::len).sum::<usize>();
        fault::point("cycle:second-committed")?;
    }
    Ok(outcome)
}

/// Increments first's counter in the transaction that is about to commit: its commit is what flushes.
pub fn bump(first: &mut FirstStore) -> Result<i64> {
    let sql = format!("UPDATE {} SET n = n + 1 RETURNING n", first.objects.counter());
    let rows = first.session.admin_query(&sql, &[])?;
    crate::store::parse(rows.first().and_then(|r| r[0].as_deref()).unwrap_or("0"))
}

/// # Errors
/// A trigger that was dropped or disabled lets changes slip: replication stops rather than lose them silently.
pub fn check_capture<S: Session>(store: &mut Store<S>) -> Result<()> {
    let disabled = store.disabled_capture()?;
    if disabled.is_empty() {
        return Ok(());
    }
    Err(Error::Diverged {
        name: String::new(),
        detail: format!("Capture is not enabled on the {} store: {}.", store.side(), disabled.join(", ")),
    })
}

/// What to do with a row that a client holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Contended {
    /// Leave it for the next cycle.
    Skip,
    /// Wait for it, as long as the lock timeout says.
    Wait,
}

/// The rows of one table that one direction writes.
#[derive(Debug, Default)]
struct Rows {
    upserts: BTreeMap<Key, String>,
    deletes: Vec<Key>,
}

struct ConflictRow {
    key: Key,
    kept: Side,
    first_image: Option<String>,
    second_image: Option<String>,
}

/// What a cycle in both directions is going to write, read from one snapshot of each store.
pub struct Plan {
    forward: Vec<Rows>,
    backward: Vec<Rows>,
    conflicts: Vec<Vec<ConflictRow>>,
    pub incoming_forward: Incoming,
    pub incoming_backward: Incoming,
}

/// What a store's part of a plan came to.
pub struct Written {
    pub rows: u64,
    pub parked: usize,
    /// A client was faster: roll back and write again; the keys have been added to those to skip.
    pub looked_again: bool,
}

impl Plan {
    /// Reads the rows and decides, in the transactions that both stores are in.
    pub fn make(
        pairs: &[Pair],
        first: &mut FirstStore,
        second: &mut SecondStore,
        incoming_forward: Incoming,
        incoming_backward: Incoming,
    ) -> Result<Plan> {
        let mut plan = Plan {
            forward: Vec::new(),
            backward: Vec::new(),
            conflicts: Vec::new(),
            incoming_forward,
            incoming_backward,
        };
        for i in 0..pairs.len() {
            let Decision { forward, backward, conflicts } =
                decide(&plan.incoming_forward.changes[i], &plan.incoming_backward.changes[i]);
            plan.forward.push(rows_of(first, second, i, &forward)?);
            plan.backward.push(rows_of(second, first, i, &backward)?);
            plan.conflicts.push(conflict_rows(first, second, i, &conflicts)?);
        }
        Ok(plan)
    }

    fn scopes(&self) -> usize {
        self.incoming_forward.scopes() + self.incoming_backward.scopes()
    }

    pub fn log_rows(&self) -> i64 {
        self.incoming_forward.log_rows() + self.incoming_backward.log_rows()
    }

    fn oldest(&self) -> Option<i64> {
        let all = self.incoming_forward.changes.iter().chain(&self.incoming_backward.changes);
        all.filter_map(Changes::oldest).min()
    }

    /// Is there anything for the first store: rows, conflicts, or a watermark to advance?
    fn writes_first(&self) -> bool {
        !self.incoming_backward.is_empty()
    }

    fn writes_second(&self) -> bool {
        !self.incoming_forward.is_empty()
    }

    /// Applies the backward rows in first's transaction, records the conflicts (if `record` says that first commits
    /// first), looks again.
    #[allow(clippy::too_many_arguments)]
    pub fn write_first(
        &self,
        first: &mut FirstStore,
        pairs: &[Pair],
        name: &str,
        seen: &Snapshot,
        skip: &mut [Vec<Key>],
        contended: Contended,
        record: Option<Side>,
    ) -> Result<Written> {
        let written = apply(first, &self.backward, &self.incoming_backward, seen, &[], skip, contended)?;
        if !written.looked_again && record == Some(Side::First) {
            for (i, conflicts) in self.conflicts.iter().enumerate() {
                for c in conflicts.iter().filter(|c| !skip[i].contains(&c.key)) {
                    record_conflict(&mut first.session, name, &pairs[i].first.rel.to_string(), c)?;
                }
            }
        }
        Ok(written)
    }

    /// Applies the forward rows in second's transaction and looks again. `owed_to_first`: conflicts whose decision was
    /// put off; they stay owed here as well.
    pub fn write_second(
        &self,
        second: &mut SecondStore,
        seen: &Snapshot,
        owed_to_first: &[Vec<Key>],
        skip: &mut [Vec<Key>],
        contended: Contended,
    ) -> Result<Written> {
        apply(second, &self.forward, &self.incoming_forward, seen, owed_to_first, skip, contended)
    }

    /// Keeps the conflicts on second, which commits first in a switch towards `second`, until they are brought home.
    pub fn record_on_second(&self, second: &mut SecondStore) -> Result<()> {
        let sql = format!(
            "INSERT INTO {} (source, key, kept, first_image, second_image) VALUES ($1::text::int, $2::text[], $3::text, $4::text::jsonb, $5::text::jsonb)",
            second.objects.conflict()
        );
        for (i, conflicts) in self.conflicts.iter().enumerate() {
            for c in conflicts {
                let (source, kept) = (i.to_string(), c.kept.to_string());
                second.session.execute(
                    &sql,
                    &[Some(&source), Some(&c.key), Some(&kept), c.first_image.as_deref(), c.second_image.as_deref()],
                )?;
            }
        }
        Ok(())
    }
}

fn record_conflict<S: Session>(session: &mut S, name: &str, table: &str, c: &ConflictRow) -> Result<()> {
    session
        .admin_execute(
            "INSERT INTO crossover.conflict (name, table_name, key, kind, kept, first_image, second_image) \
             VALUES ($1::text, $2::text, $3::text, 'conflict', $4::text, $5::text::jsonb, $6::text::jsonb)",
            &[
                Some(name),
                Some(table),
                Some(&c.key),
                Some(&c.kept.to_string()),
                c.first_image.as_deref(),
                c.second_image.as_deref(),
            ],
        )
        .map(drop)
}

/// Applies one direction's rows: deletes (children first), then upserts (parents first); then looks again.
fn apply<S: Session>(
    store: &mut Store<S>,
    rows: &[Rows],
    incoming: &Incoming,
    seen: &Snapshot,
    also_owed: &[Vec<Key>],
    skip: &mut [Vec<Key>],
    contended: Contended,
) -> Result<Written> {
    let mut written = Written { rows: 0, parked: 0, looked_again: false };
    if contended == Contended::Skip {
        for (i, table) in rows.iter().enumerate() {
            let (upserts, deletes) = without(table, &skip[i]);
            let keys: Vec<&Key> = upserts.keys().copied().collect();
            skip[i].extend(store.lock_rows(i, &keys, "NO KEY UPDATE")?);
            skip[i].extend(store.lock_rows(i, &deletes, "UPDATE")?);
        }
    }
    for (i, table) in rows.iter().enumerate().rev() {
        let (_, deletes) = without(table, &skip[i]);
        for keys in deletes.chunks(BATCH) {
            written.rows += store.delete(i, keys)?;
        }
    }
    let mut parked: Vec<Vec<Owed>> = vec![Vec::new(); rows.len()];
    for (i, table) in rows.iter().enumerate() {
        let at = |key: &Key| incoming.changes[i].keys.get(key).copied().or(incoming.changes[i].whole).unwrap_or(0);
        let (upserts, _) = without(table, &skip[i]);
        let upserts: BTreeMap<Key, String> = upserts.into_iter().map(|(k, v)| (k.clone(), v.clone())).collect();
        let mut held = Vec::new();
        let yields = (contended == Contended::Skip).then_some(&mut held);
        written.rows += write_rows(store, i, &upserts, &mut parked[i], yields, &at)?;
        skip[i].extend(held);
    }
    if !fault::is_taken_out("no-look-again") {
        for (i, table) in rows.iter().enumerate() {
            let (upserts, deletes) = without(table, &skip[i]);
            let keys: Vec<&Key> = upserts.keys().copied().chain(deletes).collect();
            let changed = store.changed_since(i, &keys, seen)?;
            written.looked_again |= !changed.is_empty();
            skip[i].extend(changed);
        }
    }
    if written.looked_again {
        return Ok(written);
    }
    for (i, parked) in parked.into_iter().enumerate() {
        let changes = &incoming.changes[i];
        let at = |key: &Key| changes.keys.get(key).copied().or(changes.whole).unwrap_or(0);
        let held =
            skip[i].iter().chain(also_owed.get(i).into_iter().flatten().filter(|k| changes.keys.contains_key(*k)));
        let mut owed: Vec<Owed> =
            held.map(|key| Owed { key: key.clone(), at: at(key), error: None, image: None }).collect();
        written.parked += parked.len();
        owed.extend(parked);
        let settled: Vec<Key> = changes.keys.keys().cloned().collect();
        settle(store, i, &incoming.owed[i], changes, &settled, &owed)?;
    }
    Ok(written)
}

fn without<'r>(rows: &'r Rows, skip: &[Key]) -> (BTreeMap<&'r Key, &'r String>, Vec<&'r Key>) {
    (
        rows.upserts.iter().filter(|(k, _)| !skip.contains(k)).collect(),
        rows.deletes.iter().filter(|k| !skip.contains(k)).collect(),
    )
}

/// Brings the table of owed scopes up to date: what this cycle applied goes, what it could not apply comes.
fn settle<S: Session>(
    store: &mut Store<S>,
    index: usize,
    before: &[Owed],
    changes: &Changes,
    settled: &[Key],
    owed: &[Owed],
) -> Result<()> {
    let gone: Vec<&Key> = before
        .iter()
        .map(|o| &o.key)
        .filter(|k| (settled.contains(k) || changes.whole.is_some()) && !owed.iter().any(|o| o.key == **k))
        .collect();
    store.set_owed(index, &gone, owed)
}

/// Writes rows in batches. One that the target refuses is found by halving and parked; so is, with `held`, one that has
/// to wait for a client (it goes to `held`; without, that is an error).
pub fn write_rows<S: Session>(
    store: &mut Store<S>,
    index: usize,
    rows: &BTreeMap<Key, String>,
    parked: &mut Vec<Owed>,
    mut held: Option<&mut Vec<Key>>,
    at: &dyn Fn(&Key) -> i64,
) -> Result<u64> {
    let rows: Vec<(&Key, &str)> = rows.iter().map(|(k, v)| (k, v.as_str())).collect();
    let mut written = 0;
    for batch in rows.chunks(BATCH) {
        written += write_batch(store, index, batch, parked, &mut held, at)?;
    }
    Ok(written)
}

fn write_batch<S: Session>(
    store: &mut Store<S>,
    index: usize,
    batch: &[(&Key, &str)],
    parked: &mut Vec<Owed>,
    held: &mut Option<&mut Vec<Key>>,
    at: &dyn Fn(&Key) -> i64,
) -> Result<u64> {
    let rows: Vec<&str> = batch.iter().map(|(_, row)| *row).collect();
    store.session.savepoint()?;
    match store.upsert(index, &rows) {
        Ok(n) => {
            store.session.release()?;
            Ok(n)
        }
        Err(e) if e.is_rejected_row() || (e.is_contention() && held.is_some()) => {
            store.session.rollback_to()?;
            if let ([(key, _)], Some(held), true) = (batch, held.as_mut(), e.is_contention()) {
                held.push((*key).clone());
                return Ok(0);
            }
            if let [(key, row)] = batch {
                parked.push(Owed {
                    key: (*key).clone(),
                    at: at(key),
                    error: Some(e.to_string()),
                    image: Some((*row).to_string()),
                });
                return Ok(0);
            }
            let (a, b) = batch.split_at(batch.len() / 2);
            Ok(write_batch(store, index, a, parked, held, at)? + write_batch(store, index, b, parked, held, at)?)
        }
        Err(e) => Err(e),
    }
}

/// The keys of a table's changes in batches; None stands for the whole table.
fn batches(changes: &Changes) -> Vec<Option<Vec<&Key>>> {
    if changes.whole.is_some() {
        return vec![None];
    }
    let keys: Vec<&Key> = changes.keys.keys().collect();
    keys.chunks(BATCH).map(|c| Some(c.to_vec())).collect()
}

/// Keys that the destination has, or the cycle speaks of, and the source does not derive any more.
fn missing<S: Session>(
    destination: &mut Store<S>,
    index: usize,
    keys: Option<&[&Key]>,
    rows: &BTreeMap<Key, String>,
) -> Result<Vec<Key>> {
    let all = match keys {
        Some(keys) => keys.iter().map(|k| (*k).clone()).collect(),
        None => destination.present(index, None)?,
    };
    Ok(all.into_iter().filter(|k| !rows.contains_key(k)).collect())
}

fn rows_of<A: Session, B: Session>(
    source: &mut Store<A>,
    destination: &mut Store<B>,
    index: usize,
    scope: &Scope,
) -> Result<Rows> {
    if scope.is_empty() {
        return Ok(Rows::default());
    }
    let keys: Option<Vec<&Key>> = match scope {
        Scope::Keys(keys) => Some(keys.iter().collect()),
        Scope::Whole => None,
    };
    let upserts = source.derive(index, keys.as_deref())?;
    let deletes = missing(destination, index, keys.as_deref(), &upserts)?;
    Ok(Rows { upserts, deletes })
}

/// Both images of each conflict; none is recorded where both stores derive the same row.
fn conflict_rows(
    first: &mut FirstStore,
    second: &mut SecondStore,
    index: usize,
    conflicts: &[(Key, Side)],
) -> Result<Vec<ConflictRow>> {
    if conflicts.is_empty() {
        return Ok(Vec::new());
    }
    let keys: Vec<&Key> = conflicts.iter().map(|(k, _)| k).collect();
    let (derived, stored) = (first.derive(index, Some(&keys))?, second.derive(index, Some(&keys))?);
    let differing: Vec<&Key> = keys.into_iter().filter(|k| derived.get(*k) != stored.get(*k)).collect();
    let (mut a, mut b) = (first.images(index, &differing)?, second.images(index, &differing)?);
    Ok(conflicts
        .iter()
        .filter(|(k, _)| differing.contains(&k))
        .map(|(key, kept)| ConflictRow {
            key: key.clone(),
            kept: *kept,
            first_image: a.remove(key),
            second_image: b.remove(key),
        })
        .collect())
}

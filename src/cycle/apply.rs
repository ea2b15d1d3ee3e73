//! Rows into a store: deletes, upserts in batches, rows that are refused or held, and the second look at the log.

use std::collections::BTreeMap;

use super::Incoming;
use crate::error::Result;
use crate::fault;
use crate::store::{Changes, Derived, Key, Owed, Session, Snapshot, Store};

/// Rows written by one statement.
pub const BATCH: usize = 1000;

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
pub struct Rows {
    pub upserts: BTreeMap<Key, String>,
    pub deletes: Vec<Key>,
    /// Rows for which a rule's expression failed: parked.
    pub refused: BTreeMap<Key, String>,
}

/// What a store's part of a plan came to.
pub struct Written {
    pub rows: u64,
    pub parked: usize,
    /// A client was faster: roll back and write again; the keys have been added to those to skip.
    pub looked_again: bool,
}

/// Applies one direction's rows: deletes (children first), then upserts (parents first); then looks again.
pub fn apply<S: Session>(
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
        parked[i].extend(Derived::parked(&table.refused, &at));
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
pub fn settle<S: Session>(
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
pub fn batches(changes: &Changes) -> Vec<Option<Vec<&Key>>> {
    if changes.whole.is_some() {
        return vec![None];
    }
    let keys: Vec<&Key> = changes.keys.keys().collect();
    keys.chunks(BATCH).map(|c| Some(c.to_vec())).collect()
}

/// Keys that the destination has, or the cycle speaks of, and the source does not derive any more.
pub fn missing<S: Session>(
    destination: &mut Store<S>,
    index: usize,
    keys: Option<&[&Key]>,
    derived: &Derived,
) -> Result<Vec<Key>> {
    let all = match keys {
        Some(keys) => keys.iter().map(|k| (*k).clone()).collect(),
        None => destination.present(index, None)?,
    };
    Ok(all.into_iter().filter(|k| !derived.rows.contains_key(k) && !derived.refused.contains_key(k)).collect())
}

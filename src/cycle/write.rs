//! Upserts in batches: a value that moves between rows, a row that is refused, a row that somebody holds.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::store::{Key, Owed, Session, Store, in_batches};

/// The new rows of some keys, as far as the same cycle may write them: None, where the row is to go.
pub type Others<'w> = dyn FnMut(&[Key]) -> Result<BTreeMap<Key, Option<String>>> + 'w;

/// Writes rows of one table, and tells what became of them.
pub struct Writer<'w> {
    index: usize,
    /// A row that has to wait for a client is `held`; otherwise that is an error.
    yields: bool,
    /// Until when it may wait for clients, all its locks together, while they wait for those that this transaction has.
    pub deadline: Option<Instant>,
    at: &'w dyn Fn(&Key) -> i64,
    others: &'w mut Others<'w>,
    /// Rows that differed from what was there.
    pub written: u64,
    /// Rows that the store refuses.
    pub parked: Vec<Owed>,
    pub held: Vec<Key>,
    /// Those of `parked` that want a unique value which another row has.
    pub collided: BTreeSet<Key>,
}

impl<'w> Writer<'w> {
    pub fn new(index: usize, yields: bool, at: &'w dyn Fn(&Key) -> i64, others: &'w mut Others<'w>) -> Writer<'w> {
        let (parked, held, collided) = (Vec::new(), Vec::new(), BTreeSet::new());
        Writer { index, yields, deadline: None, at, others, written: 0, parked, held, collided }
    }

    /// Writes rows in batches; one that the store refuses is found by halving, and parked.
    pub fn write<S: Session>(&mut self, store: &mut Store<S>, rows: &[(&Key, &str)]) -> Result<()> {
        in_batches(rows, |(_, row)| row.len()).into_iter().try_for_each(|batch| self.write_batch(store, batch))
    }

    /// Writes rows in batches, without savepoints: one that the store refuses is an error that ends the transaction.
    pub fn write_all<S: Session>(&mut self, store: &mut Store<S>, rows: &[(&Key, &str)]) -> Result<()> {
        for batch in in_batches(rows, |(_, row)| row.len()) {
            let rows: Vec<&str> = batch.iter().map(|(_, row)| *row).collect();
            self.written += store.upsert(self.index, &rows)?;
        }
        Ok(())
    }

    fn write_batch<S: Session>(&mut self, store: &mut Store<S>, batch: &[(&Key, &str)]) -> Result<()> {
        let rows: Vec<&str> = batch.iter().map(|(_, row)| *row).collect();
        let late = self.hurry(store)?;
        store.session.savepoint()?;
        let error = match store.upsert(self.index, &rows) {
            Ok(written) => {
                self.written += written;
                return store.session.release();
            }
            Err(e) => e,
        };
        let rejected = error.is_rejected_row() || error.is_undefined_name();
        if !(rejected || error.is_contention() && self.yields) {
            return Err(error);
        }
        store.session.rollback_to()?;
        if error.is_undefined_name() && !rows.is_empty() {
            // Fails in the same way if the fault is the statement's.
            store.session.execute(&store.tables[self.index].upsert(), &[Some("{}")])?;
        }
        if error.is_unique_violation() && self.replace(store, batch)? {
            return Ok(());
        }
        match batch {
            _ if error.is_contention() && (batch.len() == 1 || late) => {
                self.held.extend(batch.iter().map(|(key, _)| (*key).clone()));
            }
            [(key, row)] => self.park(key, row, &error),
            _ => {
                let (a, b) = batch.split_at(batch.len() / 2);
                self.write_batch(store, a)?;
                self.write_batch(store, b)?;
            }
        }
        Ok(())
    }

    /// Lets the next lock wait for half of the time that is left, so that there is some left for those that come after it. True when
    /// there is none.
    fn hurry<S: Session>(&self, store: &mut Store<S>) -> Result<bool> {
        const SHORTEST: Duration = Duration::from_millis(5);
        let Some(deadline) = self.deadline else { return Ok(false) };
        let left = deadline.saturating_duration_since(Instant::now());
        store.session.set_lock_timeout((left / 2).max(SHORTEST))?;
        Ok(left <= SHORTEST)
    }

    fn park(&mut self, key: &Key, row: &str, error: &Error) {
        if error.is_unique_violation() {
            self.collided.insert(key.clone());
        }
        self.parked.push(Owed {
            key: key.clone(),
            at: (self.at)(key),
            error: Some(error.to_string()),
            image: Some(row.to_string()),
        });
    }

    /// Unique values move between rows: takes out the rows whose values others want and which get new ones themselves, and writes all of
    /// them anew. False, and nothing done, if that does not help.
    fn replace<S: Session>(&mut self, store: &mut Store<S>, batch: &[(&Key, &str)]) -> Result<bool> {
        let mut all: BTreeMap<Key, Option<String>> =
            batch.iter().map(|(k, row)| ((*k).clone(), Some((*row).to_string()))).collect();
        let mut new: Vec<String> = batch.iter().map(|(_, row)| (*row).to_string()).collect();
        let mut displaced = BTreeSet::new();
        while !new.is_empty() {
            let rows: Vec<&str> = new.iter().map(String::as_str).collect();
            let keys: BTreeSet<Key> =
                store.in_the_way(self.index, &rows, false)?.into_iter().map(|(_, other)| other).collect();
            let unknown: Vec<Key> = keys.iter().filter(|k| !all.contains_key(*k)).cloned().collect();
            let others = if unknown.is_empty() { BTreeMap::new() } else { (self.others)(&unknown)? };
            new = others.values().flatten().cloned().collect();
            all.extend(others);
            displaced.extend(keys.into_iter().filter(|k| all.contains_key(k)));
        }
        if displaced.is_empty() {
            return Ok(false);
        }
        store.session.savepoint()?;
        match store.replace(self.index, &all, &displaced) {
            Ok(written) => {
                self.written += written;
                store.session.release().map(|()| true)
            }
            Err(e) if e.is_rejected_row() || (e.is_contention() && self.yields) => {
                store.session.rollback_to().map(|()| false)
            }
            Err(e) => Err(e),
        }
    }
}

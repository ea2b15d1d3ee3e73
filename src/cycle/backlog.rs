//! What a destination has not seen of a source: read into memory up to a limit, a batch at a time beyond it, or put off.
//!
//! The memory of a cycle does not depend on how much has changed. One direction goes through a long log with a cursor, within one
//! snapshot and one transaction of the destination. In both directions at once, and towards first, what is more than a cycle takes is owed first: its keys
//! wait beside the watermark that covers them, and the cycles that follow take them in turn, so that no client meets a cycle that
//! holds a million rows.

use std::collections::{BTreeMap, BTreeSet};

use super::appetite::SCOPES;
use crate::divergence;
use crate::error::{Error, Result};
use crate::fault;
use crate::store::{BATCH, Changes, Key, Micros, Owed, OwedCount, Session, Snapshot, Store, Watermark};

/// The changes of one direction: the log's since the watermark that `destination` keeps, and what is owed to it.
pub struct Incoming {
    pub changes: Vec<Changes>,
    /// The log has more than is in `changes`, where only what is owed is, then.
    pub more: bool,
    /// What was owed before this cycle.
    pub owed: OwedCount,
    /// What is owed and left for other cycles.
    pub left: usize,
    /// The watermark.
    pub since: Snapshot,
}

/// Changed keys of one table, a batch of them, with the times of their last changes.
pub type Page = BTreeMap<Key, Micros>;

/// What takes the pages of one table.
pub type EachPage<'e, A, B> = dyn FnMut(&mut Store<A>, &mut Store<B>, &Page) -> Result<()> + 'e;

/// Whose keys stand for a whole table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whole {
    Source,
    Destination,
}

/// Reads what `destination` has not seen of `source` yet, in the transactions that both are in: at most `limit` scopes of the log, and
/// `turns` of what is owed.
///
/// # Errors
/// `Error::Lost` when the source has lost changes that the watermark covers.
pub fn incoming<A: Session, B: Session>(
    source: &mut Store<A>,
    destination: &mut Store<B>,
    retry_parked: bool,
    limit: usize,
    turns: usize,
) -> Result<Incoming> {
    let watermark = destination.watermark()?.ok_or_else(|| Error::internal("no watermark"))?;
    let counter = source.counter()?;
    if counter < watermark.counter {
        let detail = divergence::lower_counter(source.side(), counter, watermark.counter);
        return Err(Error::Lost { side: source.side(), detail });
    }
    let logged = source.changes(&watermark.snapshot, limit)?;
    let (mut changes, owed) = (logged.changes, destination.owed_count()?);
    let mut left = owed.waiting;
    if turns > 0 && (owed.waiting > 0 || retry_parked && owed.parked > 0) {
        let (picked, waiting) = destination.pick_owed(turns, retry_parked)?;
        left = left.saturating_sub(waiting);
        for (table, picked) in changes.iter_mut().zip(picked) {
            picked.keys.into_iter().for_each(|(key, at)| table.add(key, at));
        }
    }
    Ok(Incoming { changes, more: logged.more, owed, left, since: watermark.snapshot })
}

impl Incoming {
    pub fn is_empty(&self) -> bool {
        !self.more && self.changes.iter().all(Changes::is_empty)
    }

    /// Too much for a cycle that holds its rows in memory: a long log, or a whole table. Whatever such a cycle applies, the watermark stays.
    pub fn is_too_much(&self) -> bool {
        self.more || self.changes.iter().any(|c| c.whole.is_some())
    }

    /// In memory.
    pub fn scopes(&self) -> usize {
        self.changes.iter().map(|c| c.keys.len()).sum()
    }

    pub fn log_rows(&self) -> i64 {
        self.changes.iter().map(|c| c.log_rows).sum()
    }

    /// The oldest change in memory.
    pub fn oldest(&self) -> Option<Micros> {
        self.changes.iter().filter_map(Changes::oldest).min()
    }

    /// Hands over the changed keys of a table, a batch at a time, to be worked on in the transactions that both stores are in. For a
    /// whole table these are all the keys of one of them.
    pub fn each_page<A: Session, B: Session>(
        &self,
        index: usize,
        whole: Whole,
        source: &mut Store<A>,
        destination: &mut Store<B>,
        each: &mut EachPage<A, B>,
    ) -> Result<()> {
        match self.changes[index].whole {
            Some(at) => each_of_table(index, at, whole, source, destination, each),
            None => self.each_of_scopes(index, source, destination, each),
        }
    }

    fn each_of_scopes<A: Session, B: Session>(
        &self,
        index: usize,
        source: &mut Store<A>,
        destination: &mut Store<B>,
        each: &mut EachPage<A, B>,
    ) -> Result<()> {
        let keys: Vec<(&Key, &Micros)> = self.changes[index].keys.iter().collect();
        for page in keys.chunks(BATCH) {
            each(source, destination, &page.iter().map(|(k, at)| ((*k).clone(), **at)).collect())?;
        }
        if self.more {
            source.open_changes(index, &self.since)?;
            loop {
                let page: Page = source.more_changes()?.into_iter().collect();
                if page.is_empty() {
                    break;
                }
                each(source, destination, &page)?;
            }
        }
        Ok(())
    }

    /// Leaves to other cycles what is not in memory. The watermark has to stay.
    pub fn leave_unread(&mut self) {
        self.more = false;
        self.changes.iter_mut().for_each(|c| c.whole = None);
    }

    /// The times of what is in memory, as the part of the log has them that has not been read.
    pub fn complete<A: Session>(&mut self, source: &mut Store<A>) -> Result<()> {
        if !self.is_too_much() {
            return Ok(());
        }
        for i in 0..self.changes.len() {
            let keys: Vec<Key> = self.changes[i].keys.keys().cloned().collect();
            let unread = self.unread_among(source, i, &keys.iter().collect::<Vec<_>>())?;
            unread.into_iter().for_each(|(key, at)| self.changes[i].add(key, at));
        }
        Ok(())
    }

    /// Those of `keys` that have been changed, as far as that has not been read.
    fn unread_among<A: Session>(&self, source: &mut Store<A>, index: usize, keys: &[&Key]) -> Result<Page> {
        let mut found = Page::new();
        if self.more {
            for keys in keys.chunks(BATCH) {
                found.extend(source.changes_among(index, keys, &self.since)?);
            }
        }
        if let Some(at) = self.changes[index].whole {
            for key in keys {
                let last = found.entry((*key).clone()).or_insert(at);
                *last = at.max(*last);
            }
        }
        Ok(found)
    }

    /// Takes twice as many scopes of what is owed into the cycle, although it is not their turn.
    pub fn take_more<B: Session>(&mut self, destination: &mut Store<B>) -> Result<()> {
        let (picked, _) = destination.pick_owed(2 * self.scopes(), false)?;
        for (table, picked) in self.changes.iter_mut().zip(picked) {
            picked.keys.into_iter().for_each(|(key, at)| table.add(key, at));
        }
        Ok(())
    }

    /// Which of a table's keys are among the changes?
    pub fn changed_among<A: Session>(
        &self,
        source: &mut Store<A>,
        index: usize,
        keys: &[&Key],
    ) -> Result<BTreeSet<Key>> {
        let changes = &self.changes[index];
        let mut found = match self.more {
            true => source.changed_since(index, keys, &self.since)?,
            false => BTreeSet::new(),
        };
        let known = keys.iter().filter(|k| changes.whole.is_some() || changes.keys.contains_key(**k));
        found.extend(known.map(|k| (*k).clone()));
        Ok(found)
    }

    /// Takes scopes into the cycle that have not been read, or that are owed although it is not their turn. False if there was none that it
    /// had not.
    pub fn wake<A: Session, B: Session>(
        &mut self,
        source: &mut Store<A>,
        destination: &mut Store<B>,
        index: usize,
        keys: &[&Key],
    ) -> Result<bool> {
        let unknown: Vec<&Key> = keys.iter().copied().filter(|k| !self.changes[index].keys.contains_key(*k)).collect();
        if unknown.is_empty() {
            return Ok(false);
        }
        let unread = self.unread_among(source, index, &unknown)?;
        let owed = if self.owed.is_zero() { Page::new() } else { destination.owed_among(index, &unknown)? };
        let any = !unread.is_empty() || !owed.is_empty();
        unread.into_iter().chain(owed).for_each(|(key, at)| self.changes[index].add(key, at));
        Ok(any)
    }
}

fn each_of_table<A: Session, B: Session>(
    index: usize,
    at: Micros,
    whole: Whole,
    source: &mut Store<A>,
    destination: &mut Store<B>,
    each: &mut EachPage<A, B>,
) -> Result<()> {
    let mut last: Option<Key> = None;
    loop {
        let keys = match whole {
            Whole::Source => source.chunk_keys(index, last.as_deref(), None)?,
            Whole::Destination => destination.chunk_keys(index, last.as_deref(), None)?,
        };
        let Some(end) = keys.last() else { return Ok(()) };
        last = Some(end.clone());
        each(source, destination, &keys.into_iter().map(|k| (k, at)).collect())?;
    }
}

/// Owes to `destination` all that it has not seen of `source`, and sets the watermark over it: a cycle that applies nothing. Of a
/// whole table, each row of either store. Transactions of its own on both stores; returns how many scopes it was.
pub fn put_off<A: Session, B: Session>(source: &mut Store<A>, destination: &mut Store<B>) -> Result<usize> {
    let seen = source.begin_read()?;
    source.check_capture()?;
    destination.begin_write()?;
    let incoming = incoming(source, destination, false, SCOPES, 0)?;
    let mut scopes = 0;
    let mut owe = |index: usize, destination: &mut Store<B>, page: &Page| {
        scopes += page.len();
        let owed: Vec<Owed> = page.iter().map(|(key, at)| Owed::waiting(key.clone(), *at)).collect();
        destination.owe(index, &owed)
    };
    for i in 0..incoming.changes.len() {
        if let Some(at) = incoming.changes[i].whole {
            for whole in [Whole::Source, Whole::Destination] {
                each_of_table(i, at, whole, source, destination, &mut |_, to, page| owe(i, to, page))?;
            }
        }
        incoming.each_of_scopes(i, source, destination, &mut |_, to, page| owe(i, to, page))?;
    }
    source.end_read()?;
    let counter = source.flush()?;
    destination.set_watermark(&Watermark { snapshot: seen, counter })?;
    fault::point("cycle:put-off")?;
    destination.session.commit()?;
    Ok(scopes)
}

/// A scope that is owed to one store, or not read, and changes on that store takes part in the decision at once, whether it is its turn or not, parked or
/// not: or its image would be overwritten unseen.
pub fn wake_both<A: Session, B: Session>(
    first: &mut Store<A>,
    second: &mut Store<B>,
    forward: &mut Incoming,
    backward: &mut Incoming,
) -> Result<()> {
    fn keys(keys: &BTreeMap<Key, Micros>) -> Vec<&Key> {
        keys.keys().collect()
    }
    for i in 0..forward.changes.len() {
        forward.wake(first, second, i, &keys(&backward.changes[i].keys))?;
        backward.wake(second, first, i, &keys(&forward.changes[i].keys))?;
    }
    Ok(())
}

//! Rows into a store where clients write as well: deletes, upserts, what they need and what needs them, and the second look at the log.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use super::backlog::Incoming;
use super::write::Writer;
use crate::error::Result;
use crate::fault;
use crate::mapping::constraint::Reference;
use crate::store::{BATCH, Derived, Key, Owed, OwedCount, Session, Snapshot, Store, in_batches};

/// How long a write that gives way may wait for clients, all its locks together: well below the deadlock_timeout of 1 s of a client that
/// waits for one of ours meanwhile.
const GIVE_WAY: Duration = Duration::from_millis(400);

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
    pub deletes: BTreeSet<Key>,
    /// Rows for which a rule's expression failed: parked.
    pub refused: BTreeMap<Key, String>,
    /// Of the upserts, as text.
    pub bytes: usize,
}

impl Rows {
    pub fn has(&self, key: &Key) -> bool {
        self.upserts.contains_key(key) || self.deletes.contains(key) || self.refused.contains_key(key)
    }
}

/// The keys of one table that a write leaves out: they stay owed.
#[derive(Debug, Default, Clone)]
pub struct Aside {
    /// A client has them, or something that they depend on; the next cycle takes them.
    pub held: BTreeSet<Key>,
    /// The store refuses them, with the reason: parked.
    pub refused: BTreeMap<Key, String>,
}

impl Aside {
    pub fn none(tables: usize) -> Vec<Aside> {
        vec![Aside::default(); tables]
    }

    fn has(&self, key: &Key) -> bool {
        self.held.contains(key) || self.refused.contains_key(key)
    }
}

/// Keys with their rows.
type Upserts<'a> = Vec<(&'a Key, &'a str)>;

/// What a store's part of a plan came to.
pub struct Written {
    pub rows: u64,
    /// Rows that it has parked.
    pub parked: usize,
    /// What is owed to the store now.
    pub owed: OwedCount,
    /// A client was faster, or a constraint is in the way: roll back and write again; the keys have been set aside.
    pub again: bool,
}

impl Written {
    /// For the last cycle of a direction: what a client's change has held up would be left behind for good.
    pub fn is_not_the_last(&self) -> bool {
        self.again || self.owed.waiting > 0
    }
}

/// One direction's rows on their way into a store, in the caller's transaction.
pub struct Application<'a, S: Session> {
    pub store: &'a mut Store<S>,
    pub rows: &'a [Rows],
    pub incoming: &'a Incoming,
    /// The snapshot of this store that the rows were decided on.
    pub seen: &'a Snapshot,
    pub aside: &'a mut [Aside],
}

impl<'a, S: Session> Application<'a, S> {
    /// Deletes (children first), upserts (parents first), then looks at constraints and at the log again. `also_owed`: keys that the
    /// other store left out of the same plan.
    pub fn run(&mut self, also_owed: &[Aside], contended: Contended) -> Result<Written> {
        let mut written = Written { rows: 0, parked: 0, owed: OwedCount::default(), again: false };
        let deadline = (contended == Contended::Skip).then(|| Instant::now() + GIVE_WAY);
        match contended {
            Contended::Skip => self.lock_rows()?,
            Contended::Wait => self.await_rows()?,
        }
        self.keep_parents()?;
        for i in (0..self.rows.len()).rev() {
            let (_, deletes) = self.left(i);
            for keys in deletes.chunks(BATCH) {
                written.rows += self.store.delete(i, keys)?;
            }
        }
        let mut parked: Vec<Vec<Owed>> = Vec::new();
        for i in 0..self.rows.len() {
            let (rows, owed) = self.upsert(i, deadline)?;
            written.rows += rows;
            parked.push(owed);
        }
        if deadline.is_some() {
            // From here on we lock nothing that clients have.
            self.store.session.set_lock_timeout(GIVE_WAY / 2)?;
        }
        written.again = self.look_at_constraints()? | self.look_again()?;
        if written.again {
            return Ok(written);
        }
        for (i, parked) in parked.into_iter().enumerate() {
            let mut owed = self.owed(i, also_owed.get(i));
            written.parked += parked.len() + self.rows[i].refused.len() + self.aside[i].refused.len();
            owed.extend(parked);
            if !self.incoming.owed.is_zero() {
                let settled: Vec<&Key> = self.incoming.changes[i].keys.keys().collect();
                self.store.clear_owed(i, Some(&settled))?;
            }
            self.store.owe(i, &owed)?;
        }
        written.owed = self.store.owed_count()?;
        Ok(written)
    }

    /// What is left of table `i` to write: upserts and deletes.
    fn left(&self, i: usize) -> (Upserts<'a>, Vec<&'a Key>) {
        let (rows, aside) = (&self.rows[i], &self.aside[i]);
        let upserts = rows.upserts.iter().filter(|(k, _)| !aside.has(k));
        (upserts.map(|(k, row)| (k, row.as_str())).collect(), rows.deletes.iter().filter(|k| !aside.has(k)).collect())
    }

    fn at(&self, i: usize, key: &Key) -> i64 {
        self.incoming.changes[i].at(key)
    }

    /// Locks the rows that are there, and sets those aside that somebody holds.
    fn lock_rows(&mut self) -> Result<()> {
        for i in 0..self.rows.len() {
            let (upserts, deletes) = self.left(i);
            let strength = if self.is_referred_to_by_value(i) { "UPDATE" } else { "NO KEY UPDATE" };
            let held = self.store.lock_rows(i, &keys_of(&upserts), strength)?;
            let held_too = self.store.lock_rows(i, &deletes, "UPDATE")?;
            self.aside[i].held.extend(held.into_iter().chain(held_too));
        }
        Ok(())
    }

    /// Waits for the rows to which children may refer no more afterwards: a client that holds one may have just inserted a child of it.
    fn await_rows(&mut self) -> Result<()> {
        for i in 0..self.rows.len() {
            let (upserts, mut keys) = self.left(i);
            if self.is_referred_to_by_value(i) {
                keys.extend(keys_of(&upserts));
            }
            for keys in keys.chunks(BATCH) {
                self.store.await_rows(i, keys)?;
            }
        }
        Ok(())
    }

    /// Does a foreign key refer to columns of table `i` that an upsert may change?
    fn is_referred_to_by_value(&self, i: usize) -> bool {
        self.store.constraints.children_of(i).iter().any(|r| !r.is_to_key(&self.store.tables[i]))
    }

    /// Sets the deletion of a parent aside to which a row refers that this plan does not know: a client has just inserted it, or only
    /// this store has the foreign key. Nobody can add one later: the parents are locked.
    fn keep_parents(&mut self) -> Result<()> {
        for i in (0..self.rows.len()).rev() {
            for reference in self.store.constraints.children_of(i) {
                let (upserts, deletes) = self.left(i);
                let mut found = Vec::new();
                for deletes in deletes.chunks(BATCH) {
                    found.extend(self.store.children(&reference, deletes)?);
                }
                found.extend(self.store.children_left(&reference, &rows_of(&upserts))?);
                for (parent, child) in found {
                    let known = |child: usize, key: &Key| self.rows[child].has(key) && !self.aside[child].has(key);
                    let child = reference.child_index.zip(child);
                    if child.as_ref().is_some_and(|(c, key)| known(*c, key)) {
                        continue;
                    }
                    let held = match &child {
                        Some((c, key)) => self.is_held(*c, key)?,
                        None => false,
                    };
                    self.set_aside(i, parent, held, || reference.still_referred());
                }
            }
        }
        Ok(())
    }

    /// Will `key` be decided by a later cycle?
    fn is_held(&mut self, i: usize, key: &Key) -> Result<bool> {
        if self.aside[i].held.contains(key) || !self.store.changed_since(i, &[key], self.seen)?.is_empty() {
            return Ok(true);
        }
        let other = self.incoming.left > 0 && !self.incoming.changes[i].keys.contains_key(key);
        Ok(other && !self.store.waiting_among(i, &[key])?.is_empty())
    }

    fn set_aside(&mut self, i: usize, key: Key, held: bool, reason: impl Fn() -> String) {
        if held {
            self.aside[i].held.insert(key);
        } else if !self.aside[i].held.contains(&key) {
            self.aside[i].refused.insert(key, reason());
        }
    }

    fn upsert(&mut self, i: usize, deadline: Option<Instant>) -> Result<(u64, Vec<Owed>)> {
        let (upserts, _) = self.left(i);
        let (rows, incoming, aside) = (self.rows, self.incoming, self.aside[i].clone());
        let at = |key: &Key| incoming.changes[i].at(key);
        // Rows of this very plan may have what another of them wants.
        let mut others = |keys: &[Key]| {
            let of = |key: &Key| rows[i].upserts.get(key).map(|row| (key.clone(), Some(row.clone())));
            Ok(keys.iter().filter(|k| !aside.has(k)).filter_map(of).collect())
        };
        let mut writer = Writer::new(i, deadline.is_some(), &at, &mut others);
        writer.deadline = deadline;
        writer.write(self.store, &upserts)?;
        let (written, mut parked, held, collided) = (writer.written, writer.parked, writer.held, writer.collided);
        self.aside[i].held.extend(held);
        // A value that is taken by a row which a client has just written comes up in the next cycle, as a conflict.
        for (key, row) in upserts.into_iter().filter(|(k, _)| collided.contains(*k)) {
            for (_, other) in self.store.in_the_way(i, &[row], false)? {
                if self.is_held(i, &other)? {
                    parked.retain(|o| o.key != *key);
                    self.aside[i].held.insert(key.clone());
                }
            }
        }
        Ok((written, parked))
    }

    /// What replica mode does not check: sets rows aside that have no parent, or repeat the value of a deferrable constraint.
    fn look_at_constraints(&mut self) -> Result<bool> {
        let mut found = false;
        for i in 0..self.rows.len() {
            let (upserts, _) = self.left(i);
            let keys = keys_of(&upserts);
            for reference in self.store.constraints.parents_of(i) {
                for keys in keys.chunks(BATCH) {
                    for orphan in self.store.orphans(&reference, keys)? {
                        let held = orphan.parent_is_there || self.is_parent_held(&reference, orphan.parent.as_ref())?;
                        self.set_aside(i, orphan.key, held, || reference.no_parent());
                        found = true;
                    }
                }
            }
            if !upserts.is_empty() && self.store.has_uniques(i, true) {
                for upserts in in_batches(&upserts, |(_, row)| row.len()) {
                    for (key, other) in self.store.in_the_way(i, &rows_of(upserts), true)? {
                        if !self.aside[i].has(&key) && !self.aside[i].has(&other) {
                            let held = self.is_held(i, &other)?;
                            self.set_aside(i, key, held, || format!("it repeats a unique value of the row {other}"));
                            found = true;
                        }
                    }
                }
            }
        }
        Ok(found)
    }

    fn is_parent_held(&mut self, reference: &Reference, parent: Option<&Key>) -> Result<bool> {
        match (reference.parent_index, parent) {
            (Some(table), Some(key)) => self.is_held(table, key),
            _ => Ok(false),
        }
    }

    fn look_again(&mut self) -> Result<bool> {
        let mut found = false;
        if fault::is_taken_out("no-look-again") {
            return Ok(false);
        }
        for i in 0..self.rows.len() {
            let (upserts, deletes) = self.left(i);
            let keys: Vec<&Key> = keys_of(&upserts).into_iter().chain(deletes).collect();
            let changed = self.store.changed_since(i, &keys, self.seen)?;
            found |= !changed.is_empty();
            self.aside[i].held.extend(changed);
        }
        Ok(found)
    }

    /// What of table `i` stays owed because it was set aside, here or on the other store.
    fn owed(&self, i: usize, also: Option<&Aside>) -> Vec<Owed> {
        let changes = &self.incoming.changes[i];
        let aside = &self.aside[i];
        let also = also.into_iter().flat_map(|a| &a.held).filter(|k| changes.keys.contains_key(*k));
        let held = aside.held.iter().chain(also);
        let mut owed: Vec<Owed> =
            held.map(|key| Owed { key: key.clone(), at: self.at(i, key), error: None, image: None }).collect();
        owed.extend(aside.refused.iter().filter(|(k, _)| !aside.held.contains(*k)).map(|(key, error)| Owed {
            key: key.clone(),
            at: self.at(i, key),
            error: Some(error.clone()),
            image: self.rows[i].upserts.get(key).cloned(),
        }));
        owed.extend(Derived::parked(&self.rows[i].refused, &|key| self.at(i, key)));
        owed
    }
}

fn rows_of<'a>(upserts: &[(&Key, &'a str)]) -> Vec<&'a str> {
    upserts.iter().map(|(_, row)| *row).collect()
}

fn keys_of<'a>(upserts: &[(&'a Key, &str)]) -> Vec<&'a Key> {
    upserts.iter().map(|(key, _)| *key).collect()
}

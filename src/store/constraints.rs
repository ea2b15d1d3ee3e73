//! A store asked for its unique values and foreign keys: what stands in the way of rows, what they need, what needs them.
//!
//! All in the caller's transaction. Only [`Store::orphans`] takes locks: the parents' rows, FOR KEY SHARE, as PostgreSQL's own check does.

use std::collections::{BTreeMap, BTreeSet};

use super::{Key, Session, Store};
use crate::error::Result;
use crate::mapping::constraint::Reference;
use crate::mapping::text::array_literal;

/// A row whose parent is not to be had.
#[derive(Debug)]
pub struct Orphan {
    pub key: Key,
    /// The parent's key, where the row tells it.
    pub parent: Option<Key>,
    /// It is there, but somebody holds it.
    pub parent_is_there: bool,
}

impl<S: Session> Store<S> {
    /// `(key of a row among rows, key of another row here)` that have the same unique value. `deferrable`: only of the
    /// constraints that replica mode does not check.
    pub fn in_the_way(&mut self, index: usize, rows: &[&str], deferrable: bool) -> Result<Vec<(Key, Key)>> {
        let mut found = Vec::new();
        let uniques = self.constraints.uniques.get(index).cloned().unwrap_or_default();
        for unique in uniques.iter().filter(|u| u.deferrable || !deferrable) {
            let sql = unique.in_the_way(&self.tables[index]);
            let rows = self.session.query(&sql, &[Some(&array_literal(rows))])?;
            found.extend(rows.into_iter().filter_map(|r| {
                let mut r = r.into_iter();
                Some((r.next()??, r.next()??))
            }));
        }
        Ok(found)
    }

    pub fn has_uniques(&self, index: usize, deferrable: bool) -> bool {
        self.constraints.uniques.get(index).is_some_and(|u| u.iter().any(|u| u.deferrable || !deferrable))
    }

    /// `(key of a parent, key of a child that refers to it)`; None for a child outside the migration.
    pub fn children(&mut self, reference: &Reference, parents: &[&Key]) -> Result<Vec<(Key, Option<Key>)>> {
        let (Some(parent), false) = (reference.parent_index, parents.is_empty()) else { return Ok(Vec::new()) };
        let sql = reference.children(&self.tables[parent], reference.child_index.map(|i| &self.tables[i]));
        self.pairs(&sql, &array_literal(parents))
    }

    /// The same for parents that `rows` overwrite, where none of them has any more what the child refers to.
    pub fn children_left(&mut self, reference: &Reference, rows: &[&str]) -> Result<Vec<(Key, Option<Key>)>> {
        let Some(parent) =
            reference.parent_index.filter(|p| !rows.is_empty() && !reference.is_to_key(&self.tables[*p]))
        else {
            return Ok(Vec::new());
        };
        let sql = reference.children_left(&self.tables[parent], reference.child_index.map(|i| &self.tables[i]));
        self.pairs(&sql, &array_literal(rows))
    }

    fn pairs(&mut self, sql: &str, param: &str) -> Result<Vec<(Key, Option<Key>)>> {
        let rows = self.session.query(sql, &[Some(param)])?;
        Ok(rows
            .into_iter()
            .filter_map(|r| {
                let mut r = r.into_iter();
                Some((r.next()??, r.next().flatten()))
            })
            .collect())
    }

    /// Locks the parents of the rows `children`; returns those whose parent could not be locked.
    pub fn orphans(&mut self, reference: &Reference, children: &[&Key]) -> Result<Vec<Orphan>> {
        let (Some(child), false) = (reference.child_index, children.is_empty()) else { return Ok(Vec::new()) };
        let keys = array_literal(children);
        let parent = reference.parent_index.map(|i| &self.tables[i]);
        let (lock, look) =
            (reference.lock_parents(&self.tables[child], parent), reference.parents(&self.tables[child], parent));
        let locked: BTreeSet<Key> =
            self.session.query(&lock, &[Some(&keys)])?.into_iter().filter_map(|mut r| r.pop().flatten()).collect();
        let mut orphans = Vec::new();
        for row in self.session.query(&look, &[Some(&keys)])? {
            if let [Some(key), parent, there] = &row[..]
                && !locked.contains(key)
            {
                let parent_is_there = there.as_deref() == Some("t");
                orphans.push(Orphan { key: key.clone(), parent: parent.clone(), parent_is_there });
            }
        }
        Ok(orphans)
    }

    /// Queries for the keys of all rows of a table that violate what replica mode does not check, as far as the other store has not the same.
    pub fn violations(&self, index: usize) -> Vec<String> {
        let references = self.constraints.parents_of(index).into_iter().filter(|r| !r.mirrored);
        let dangling = references.map(|r| r.dangling(&self.tables[index], r.parent_index.map(|p| &self.tables[p])));
        let uniques = self.constraints.uniques.get(index).into_iter().flatten().filter(|u| u.deferrable);
        let repeated = uniques.map(|u| u.repeated(&self.tables[index]));
        dangling.chain(repeated).collect()
    }

    /// Writes `rows`, of which the `displaced` are deleted before, so that their unique values are free; None: the row is to go.
    /// Columns that nothing maps to keep their values.
    pub fn replace(
        &mut self,
        index: usize,
        rows: &BTreeMap<Key, Option<String>>,
        displaced: &BTreeSet<Key>,
    ) -> Result<u64> {
        let keys: Vec<&Key> = displaced.iter().collect();
        let unmapped = match self.tables[index].unmapped() {
            Some(sql) => self.by_key(&sql, &keys)?,
            None => BTreeMap::new(),
        };
        self.delete(index, &keys)?;
        let (again, others): (Vec<_>, Vec<_>) = rows.iter().partition(|(k, _)| unmapped.contains_key(*k));
        let text =
            |rows: Vec<(&Key, &Option<String>)>| array_literal(rows.into_iter().filter_map(|(_, r)| r.as_deref()));
        let mut written = 0;
        if !again.is_empty() {
            let sql = self.tables[index].insert_again();
            let kept = array_literal(unmapped.values());
            written += self.session.execute(&sql, &[Some(&text(again)), Some(&kept)])?;
        }
        let sql = self.tables[index].upsert();
        Ok(written + self.session.execute(&sql, &[Some(&text(others))])?)
    }
}

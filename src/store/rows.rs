//! The rows of a store: derived, looked for, locked, written and deleted, in batches of bounded number and size.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;

use super::{Key, Micros, Owed, Session, Store};
use crate::error::{Error, Result, Side};
use crate::mapping::text::array_literal;

/// Rows, or keys, of one statement at most.
pub const BATCH: usize = 1000;
/// Rows to ask a store for at first, as long as nobody knows how large they are.
pub(super) const UNKNOWN: usize = 32;
/// Bytes of rows, as text, after which a batch is full.
const BATCH_BYTES: usize = 1 << 20;

/// Rows in the second shape, and the keys for which an expression failed, with its error.
#[derive(Debug, Default)]
pub struct Derived {
    pub rows: BTreeMap<Key, String>,
    pub refused: BTreeMap<Key, String>,
    /// Of the rows, as text.
    pub bytes: usize,
    /// There may be more: the rows were as large as they might be.
    pub full: bool,
}

impl Derived {
    pub fn list(&self) -> Vec<(&Key, &str)> {
        self.rows.iter().map(|(k, row)| (k, row.as_str())).collect()
    }

    /// What to park for the rows that could not be derived.
    pub fn parked(refused: &BTreeMap<Key, String>, at: &dyn Fn(&Key) -> Micros) -> Vec<Owed> {
        let owed = |(key, error): (&Key, &String)| Owed {
            key: key.clone(),
            at: at(key),
            error: Some(error.clone()),
            image: None,
        };
        refused.iter().map(owed).collect()
    }

    fn add(&mut self, other: Derived) {
        self.rows.extend(other.rows);
        self.refused.extend(other.refused);
        self.bytes += other.bytes;
        self.full = other.full;
    }
}

/// Splits `items` so that no part has more than [`BATCH`] of them, nor goes on once it is full; `size` in bytes.
pub fn in_batches<T>(items: &[T], size: impl Fn(&T) -> usize) -> Vec<&[T]> {
    let (mut parts, mut begin, mut bytes) = (Vec::new(), 0, 0);
    for (i, item) in items.iter().enumerate() {
        bytes += size(item);
        if bytes >= BATCH_BYTES || i + 1 - begin == BATCH || i + 1 == items.len() {
            parts.push(&items[begin..=i]);
            (begin, bytes) = (i + 1, 0);
        }
    }
    parts
}

impl<S: Session> Store<S> {
    /// Rows in the second shape, by key.
    ///
    /// A row for which a rule's expression fails is found by halving; the others are derived all the same.
    pub fn derive(&mut self, index: usize, keys: &[&Key]) -> Result<Derived> {
        self.derive_up_to(index, keys, usize::MAX)
    }

    /// The same, but no more once the rows have `limit` bytes.
    pub fn derive_up_to(&mut self, index: usize, keys: &[&Key], limit: usize) -> Result<Derived> {
        if keys.is_empty() {
            return Ok(Derived::default());
        }
        if self.side() == Side::Second {
            // Rules are evaluated on first; here rows are read as they are.
            return self.read_rows(index, keys, limit);
        }
        self.session.savepoint()?;
        let error = match self.read_rows(index, keys, limit) {
            Ok(rows) => {
                self.session.release()?;
                return Ok(rows);
            }
            Err(e) if e.is_rejected_row() || e.is_undefined_name() => e,
            Err(e) => return Err(e),
        };
        self.session.rollback_to()?;
        if error.is_undefined_name() {
            // Fails in the same way if the fault is the rule's.
            self.read_rows(index, &[], limit)?;
        }
        if let [key] = keys {
            return Ok(Derived {
                refused: BTreeMap::from([((*key).clone(), error.to_string())]),
                ..Derived::default()
            });
        }
        let (a, b) = keys.split_at(keys.len() / 2);
        let mut derived = self.derive_up_to(index, a, limit)?;
        if !derived.full {
            derived.add(self.derive_up_to(index, b, limit - derived.bytes)?);
        }
        Ok(derived)
    }

    /// As few are asked for at a time as their size bids: what comes of a statement after `limit` is thrown away, and no answer should take long.
    fn read_rows(&mut self, index: usize, keys: &[&Key], limit: usize) -> Result<Derived> {
        let sql = self.tables[index].derive();
        let mut derived = Derived::default();
        let mut left = keys;
        loop {
            let (asked, rest) = left.split_at(self.pace.min(left.len()));
            let (mut rows, mut bytes) = (0, 0);
            self.session.stream(&sql, &[Some(&array_literal(asked))], &mut |row| {
                let [Some(key), Some(row)] = row else { return Err(Error::internal("malformed row")) };
                (rows, bytes) = (rows + 1, bytes + row.len());
                derived.rows.insert(text(key)?, text(row)?);
                derived.full = derived.bytes + bytes >= limit;
                Ok(if derived.full { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
            })?;
            derived.bytes += bytes;
            if bytes >= BATCH_BYTES {
                self.pace = (rows * BATCH_BYTES / bytes).clamp(1, BATCH);
            } else if bytes < BATCH_BYTES / 2 && asked.len() == self.pace {
                self.pace = (self.pace * 2).min(BATCH);
            }
            left = rest;
            if derived.full || left.is_empty() {
                return Ok(derived);
            }
        }
    }

    /// Derives the rows of `keys` and hands them over in batches.
    pub fn derive_in_batches(
        &mut self,
        index: usize,
        keys: &[&Key],
        each: &mut dyn FnMut(&mut Self, &Derived) -> Result<()>,
    ) -> Result<()> {
        let mut left = keys.to_vec();
        while !left.is_empty() {
            let rest = left.split_off(BATCH.min(left.len()));
            let derived = self.derive_up_to(index, &left, BATCH_BYTES)?;
            each(self, &derived)?;
            if derived.full {
                left.retain(|k| !derived.rows.contains_key(*k) && !derived.refused.contains_key(*k));
            } else {
                left.clear();
            }
            left.extend(rest);
        }
        Ok(())
    }

    /// Which of `keys` have a row in the second shape?
    pub fn derivable(&mut self, index: usize, keys: &[&Key]) -> Result<BTreeSet<Key>> {
        let sql = self.tables[index].derivable();
        Ok(self.keys(&sql, &[Some(&array_literal(keys))])?.into_iter().collect())
    }

    /// The next keys of a chunk of the copy, in their order: after `after`, up to `last`.
    pub fn chunk_keys(&mut self, index: usize, after: Option<&str>, last: Option<&str>) -> Result<Vec<Key>> {
        let sql = self.tables[index].chunk_keys();
        self.keys(&sql, &[after, last, Some(&BATCH.to_string())])
    }

    /// Those of `keys` that are there.
    pub fn present(&mut self, index: usize, keys: &[&Key]) -> Result<Vec<Key>> {
        let sql = self.tables[index].present();
        self.keys(&sql, &[Some(&array_literal(keys))])
    }

    fn keys(&mut self, sql: &str, params: &[Option<&str>]) -> Result<Vec<Key>> {
        Ok(self.session.query(sql, params)?.into_iter().filter_map(|mut r| r.pop().flatten()).collect())
    }

    /// Rows as they stand here, as JSON, by key.
    pub fn images(&mut self, index: usize, keys: &[&Key]) -> Result<BTreeMap<Key, String>> {
        if keys.is_empty() {
            return Ok(BTreeMap::new());
        }
        self.session.savepoint()?;
        match self.by_key(&self.tables[index].images("to_jsonb(t)"), keys) {
            Ok(images) => self.session.release().map(|()| images),
            // jsonb does not take every value (a NUL in json): then the row's text is the image.
            Err(e) if e.is_rejected_row() => {
                self.session.rollback_to()?;
                self.by_key(&self.tables[index].images("to_jsonb(t::text)"), keys)
            }
            Err(e) => Err(e),
        }
    }

    pub(super) fn by_key(&mut self, sql: &str, keys: &[&Key]) -> Result<BTreeMap<Key, String>> {
        let mut rows = BTreeMap::new();
        for row in self.session.query(sql, &[Some(&array_literal(keys))])? {
            let mut row = row.into_iter();
            if let (Some(Some(key)), Some(Some(value))) = (row.next(), row.next()) {
                rows.insert(key, value);
            }
        }
        Ok(rows)
    }

    /// Locks those of `keys` that are there and that nobody holds; returns the ones that somebody holds.
    pub fn lock_rows(&mut self, index: usize, keys: &[&Key], strength: &str) -> Result<Vec<Key>> {
        if keys.is_empty() {
            return Ok(Vec::new());
        }
        let text = array_literal(keys);
        let locked: BTreeSet<Key> = self
            .session
            .query(&self.tables[index].lock_rows(&format!("{strength} OF t SKIP LOCKED")), &[Some(&text)])?
            .into_iter()
            .filter_map(|mut r| r.pop().flatten())
            .collect();
        Ok(self.present(index, keys)?.into_iter().filter(|k| !locked.contains(k)).collect())
    }

    /// Locks those of `keys` that are there, to delete them, and waits for whoever holds one.
    pub fn await_rows(&mut self, index: usize, keys: &[&Key]) -> Result<()> {
        let sql = self.tables[index].lock_rows("UPDATE OF t");
        self.session.query(&sql, &[Some(&array_literal(keys))]).map(drop)
    }

    /// Writes rows (in the second shape). Returns how many differed from what was there.
    pub fn upsert(&mut self, index: usize, rows: &[&str]) -> Result<u64> {
        if rows.is_empty() {
            return Ok(0);
        }
        let text = array_literal(rows);
        self.session.execute(&self.tables[index].upsert(), &[Some(&text)])
    }

    pub fn delete(&mut self, index: usize, keys: &[&Key]) -> Result<u64> {
        if keys.is_empty() {
            return Ok(0);
        }
        let text = array_literal(keys);
        self.session.execute(&self.tables[index].delete(), &[Some(&text)])
    }
}

/// What a stream hands over, as text.
pub fn text(bytes: &[u8]) -> Result<String> {
    String::from_utf8(bytes.to_vec()).map_err(|_| Error::internal("a value is not UTF-8"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_ends_when_it_is_full() {
        let parts = |sizes: &[usize]| in_batches(sizes, |s| *s).into_iter().map(<[usize]>::len).collect::<Vec<_>>();
        assert!(parts(&[]).is_empty());
        assert_eq!(parts(&[1; 2001]), [1000, 1000, 1]);
        assert_eq!(parts(&[BATCH_BYTES, 1, BATCH_BYTES, BATCH_BYTES, 5]), [1, 2, 1, 1]);
    }
}

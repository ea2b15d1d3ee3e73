//! Scopes inside a watermark that are not applied: kept beside it, picked in turn, parked where the store refuses them.

use std::collections::{BTreeMap, BTreeSet};

use super::{BATCH, Changes, Key, Micros, Session, Store, parse};
use crate::error::{Error, Result};
use crate::mapping::text::{array_literal, nullable_array_literal};

/// A scope inside a watermark that is not applied.
#[derive(Debug, Clone)]
pub struct Owed {
    pub key: Key,
    pub at: Micros,
    /// The target's refusal, for a parked row; None for one that waits for its turn, or for a client.
    pub error: Option<String>,
    pub image: Option<String>,
}

impl Owed {
    pub fn waiting(key: Key, at: Micros) -> Owed {
        Owed { key, at, error: None, image: None }
    }
}

/// A row that a store refuses, without its image.
#[derive(Debug)]
pub struct Parked {
    pub index: usize,
    pub key: Key,
    pub error: String,
    /// MD5 of its image.
    pub digest: Option<String>,
}

/// How much is owed to a store.
#[derive(Debug, Clone, Copy, Default)]
pub struct OwedCount {
    pub waiting: usize,
    pub parked: usize,
}

impl OwedCount {
    pub fn is_zero(self) -> bool {
        self.waiting + self.parked == 0
    }
}

/// Enough scopes not to count them at every cycle.
pub const MANY: usize = 50_000;

const MICROS: &str = "(extract(epoch FROM at) * 1000000)::bigint";

impl<S: Session> Store<S> {
    /// Of those that wait, no more than [`MANY`] are counted.
    pub fn owed_count(&mut self) -> Result<OwedCount> {
        let sql = format!(
            "SELECT (SELECT count(*) FROM (SELECT FROM {0} WHERE error IS NULL LIMIT {MANY}) AS waiting), \
             (SELECT count(*) FROM {0} WHERE error IS NOT NULL)",
            self.objects.owed()
        );
        let rows = self.session.admin_query(&sql, &[])?;
        match rows.first().map(Vec::as_slice) {
            Some([Some(waiting), Some(parked)]) => Ok(OwedCount { waiting: parse(waiting)?, parked: parse(parked)? }),
            _ => Err(Error::internal("malformed count")),
        }
    }

    /// All that wait.
    pub fn waiting(&mut self) -> Result<usize> {
        let sql = format!("SELECT count(*) FROM {} WHERE error IS NULL", self.objects.owed());
        parse(self.session.admin_query(&sql, &[])?[0][0].as_deref().unwrap_or("0"))
    }

    /// The scopes whose turn it is, by table: those that have waited longest; and how many of them wait. `parked`: parked rows as well.
    pub fn pick_owed(&mut self, limit: usize, parked: bool) -> Result<(Vec<Changes>, usize)> {
        let which = if parked { "" } else { "WHERE error IS NULL " };
        let sql = format!(
            "SELECT source, key::text, {MICROS}, error IS NULL FROM {} {which}ORDER BY turn LIMIT {limit}",
            self.objects.owed()
        );
        let (mut picked, mut waiting) = (vec![Changes::default(); self.tables.len()], 0);
        for row in self.session.admin_query(&sql, &[])? {
            let [Some(source), Some(key), Some(at), Some(waits)] = &row[..] else {
                return Err(Error::internal("malformed owed row"));
            };
            waiting += usize::from(waits == "t");
            let table = picked.get_mut(parse::<usize>(source)?);
            table.ok_or_else(|| Error::internal("unknown table owed"))?.add(key.clone(), parse(at)?);
        }
        Ok((picked, waiting))
    }

    /// Those of `keys` that are owed, parked ones too.
    pub fn owed_among(&mut self, index: usize, keys: &[&Key]) -> Result<BTreeMap<Key, Micros>> {
        self.owed_where(index, keys, "")
    }

    /// Those of `keys` that are owed and not parked.
    pub fn waiting_among(&mut self, index: usize, keys: &[&Key]) -> Result<BTreeMap<Key, Micros>> {
        self.owed_where(index, keys, " AND error IS NULL")
    }

    fn owed_where(&mut self, index: usize, keys: &[&Key], condition: &str) -> Result<BTreeMap<Key, Micros>> {
        let sql = format!("SELECT key::text, {MICROS} FROM {} WHERE {OF_KEYS}{condition}", self.objects.owed());
        let rows = self.session.admin_query(&sql, &[Some(&index.to_string()), Some(&array_literal(keys))])?;
        rows.iter()
            .map(|row| match &row[..] {
                [Some(key), Some(at)] => Ok((key.clone(), parse(at)?)),
                _ => Err(Error::internal("malformed owed row")),
            })
            .collect()
    }

    /// Those of `keys` that are parked.
    pub fn parked_among(&mut self, index: usize, keys: &[&Key]) -> Result<BTreeSet<Key>> {
        Ok(self.owed_where(index, keys, " AND error IS NOT NULL")?.into_keys().collect())
    }

    /// Why this store refuses a row; None for one that is not parked.
    pub fn refusal(&mut self, index: usize, key: &Key) -> Result<Option<String>> {
        self.of_owed("error", index, key)
    }

    /// The row that this store refuses, as text in the second shape.
    pub fn refused_image(&mut self, index: usize, key: &Key) -> Result<Option<String>> {
        self.of_owed("image", index, key)
    }

    fn of_owed(&mut self, column: &str, index: usize, key: &Key) -> Result<Option<String>> {
        let sql = format!("SELECT {column} FROM {} WHERE {OF_KEYS}", self.objects.owed());
        let rows = self.session.admin_query(&sql, &[Some(&index.to_string()), Some(&array_literal([key]))])?;
        Ok(rows.into_iter().next().and_then(|mut r| r.pop().flatten()))
    }

    /// The next parked rows after `(table, key)`, in their order.
    pub fn parked_after(&mut self, after: &(usize, Key)) -> Result<Vec<Parked>> {
        let sql = format!(
            "SELECT source, key::text, error, md5(image) FROM {} WHERE error IS NOT NULL \
             AND (source, key) > ($1::text::int, $2::text::text[]) ORDER BY source, key LIMIT {BATCH}",
            self.objects.owed()
        );
        let rows = self.session.admin_query(&sql, &[Some(&after.0.to_string()), Some(&after.1)])?;
        rows.into_iter()
            .map(|row| match &row[..] {
                [Some(index), Some(key), Some(error), digest] => {
                    Ok(Parked { index: parse(index)?, key: key.clone(), error: error.clone(), digest: digest.clone() })
                }
                _ => Err(Error::internal("malformed owed row")),
            })
            .collect()
    }

    /// Nothing is owed any more: of these keys, or of the whole table.
    pub fn clear_owed(&mut self, index: usize, keys: Option<&[&Key]>) -> Result<()> {
        let (table, source) = (self.objects.owed(), index.to_string());
        match keys {
            Some([]) => Ok(0),
            Some(keys) => {
                let sql = format!("DELETE FROM {table} WHERE {OF_KEYS}");
                self.session.admin_execute(&sql, &[Some(&source), Some(&array_literal(keys))])
            }
            None => self
                .session
                .admin_execute(&format!("DELETE FROM {table} WHERE source = $1::text::int"), &[Some(&source)]),
        }
        .map(drop)
    }

    /// Owes scopes; one that waits already keeps its place in the queue.
    pub fn owe(&mut self, index: usize, owed: &[Owed]) -> Result<()> {
        for owed in super::in_batches(owed, |o| o.key.len() + o.image.as_ref().map_or(0, String::len)) {
            let sql = format!(
                "INSERT INTO {} AS o (source, key, at, error, image) SELECT $1::text::int, k::text[], to_timestamp(a::numeric / 1000000), e, i \
                 FROM unnest($2::text[], $3::text[], $4::text[], $5::text[]) AS u(k, a, e, i) ON CONFLICT (source, key) DO UPDATE \
                 SET at = greatest(o.at, EXCLUDED.at), error = EXCLUDED.error, image = EXCLUDED.image, \
                 turn = CASE WHEN o.error IS NULL AND EXCLUDED.error IS NULL THEN o.turn ELSE EXCLUDED.turn END",
                self.objects.owed()
            );
            let params = [
                index.to_string(),
                array_literal(owed.iter().map(|o| &o.key)),
                array_literal(owed.iter().map(|o| o.at.to_string())),
                nullable_array_literal(owed.iter().map(|o| o.error.as_deref())),
                nullable_array_literal(owed.iter().map(|o| o.image.as_deref())),
            ];
            self.session.admin_execute(&sql, &params.each_ref().map(|p| Some(p.as_str())))?;
        }
        Ok(())
    }

    /// Owes the rows of the second store whose keys `query` gives there, unless they are owed already. Returns how many it was.
    pub fn owe_result(&mut self, index: usize, query: &str, at: Micros) -> Result<u64> {
        let sql = format!(
            "INSERT INTO {} (source, key, at) SELECT DISTINCT $1::text::int, q.k::text[], to_timestamp($2::text::numeric / 1000000) \
             FROM ({query}) AS q(k) ON CONFLICT DO NOTHING",
            self.objects.owed()
        );
        self.session.execute(&sql, &[Some(&index.to_string()), Some(&at.to_string())])
    }
}

const OF_KEYS: &str = "source = $1::text::int AND key = ANY (SELECT r::text[] FROM unnest($2::text[]) AS r)";

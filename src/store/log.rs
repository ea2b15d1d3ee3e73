//! The change log of a store: read since a watermark, looked at again, emptied in rings.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::{BATCH, Changes, Isolation, Key, Micros, Row, Session, Snapshot, Store, parse};
use crate::error::{Error, Result};
use crate::mapping::sql::LOG_RING;
use crate::mapping::text::array_literal;

/// PgQ's batch rule, `xid >= xmax OR xid = ANY (xip)`, both halves of which an index serves, for what is not covered by `$1` and `$2`; that
/// the row is visible to the transaction's snapshot is the other half.
const SINCE: &str = "(xid >= $1::text::xid8 OR xid = ANY ($2::text::xid8[]))";
const MICROS: &str = "(extract(epoch FROM max(at)) * 1000000)::bigint";

/// The changes of a store since a watermark.
#[derive(Debug)]
pub struct Logged {
    /// By table. Where not all was read, only the whole-table scopes are complete.
    pub changes: Vec<Changes>,
    /// There are more scopes than were asked for.
    pub more: bool,
}

impl<S: Session> Store<S> {
    /// What was changed here and is not covered by `since`, unless that is more than `limit` scopes.
    pub fn changes(&mut self, since: &Snapshot, limit: usize) -> Result<Logged> {
        let sql = format!(
            "SELECT source, key::text, {MICROS}, count(*) FROM {} WHERE {SINCE} GROUP BY source, key LIMIT {}",
            self.objects.log(),
            limit + 1
        );
        let xip = since.xip();
        let params = [Some(since.xmax()), Some(xip.as_str())];
        let mut rows = self.session.admin_query(&sql, &params)?;
        let more = rows.len() > limit;
        if more {
            let whole = format!(
                "SELECT source, NULL, {MICROS}, count(*) FROM {} WHERE {SINCE} AND key IS NULL GROUP BY source",
                self.objects.log()
            );
            rows = self.session.admin_query(&whole, &params)?;
        }
        let mut changes = vec![Changes::default(); self.tables.len()];
        for row in rows {
            let [Some(source), key, Some(at), Some(count)] = &row[..] else {
                return Err(Error::internal("malformed log row"));
            };
            let table: &mut Changes =
                changes.get_mut(parse::<usize>(source)?).ok_or_else(|| Error::internal("unknown table in the log"))?;
            table.log_rows += parse::<i64>(count)?;
            let at = parse(at)?;
            match key {
                Some(key) => table.add(key.clone(), at),
                None => table.whole = table.whole.max(Some(at)),
            }
        }
        Ok(Logged { changes, more })
    }

    /// Begins to read the scopes of one table that are not covered by `since`; [`Store::more_changes`] goes on. One table at a time.
    pub fn open_changes(&mut self, index: usize, since: &Snapshot) -> Result<()> {
        let sql = format!(
            "DECLARE crossover_changes NO SCROLL CURSOR FOR SELECT key::text, {MICROS} FROM {} \
             WHERE {SINCE} AND source = $3::text::int AND key IS NOT NULL GROUP BY key ORDER BY key",
            self.objects.log()
        );
        let (xip, source) = (since.xip(), index.to_string());
        self.session.admin_execute(&sql, &[Some(since.xmax()), Some(&xip), Some(&source)]).map(drop)
    }

    /// The next scopes, with the time of their last change; none, and the reading is over, after the last one.
    pub fn more_changes(&mut self) -> Result<Vec<(Key, Micros)>> {
        let rows = self.session.admin_query(&format!("FETCH {BATCH} FROM crossover_changes"), &[])?;
        if rows.is_empty() {
            self.session.admin_batch("CLOSE crossover_changes")?;
        }
        rows.into_iter().map(of_scope).collect()
    }

    /// Those of `keys` that have been changed here, with the times of their last changes, as far as `since` does not cover that.
    pub fn changes_among(&mut self, index: usize, keys: &[&Key], since: &Snapshot) -> Result<BTreeMap<Key, Micros>> {
        let sql = format!(
            "SELECT key::text, {MICROS} FROM {} WHERE {SINCE} AND source = $3::text::int AND key::text = ANY ($4::text[]) GROUP BY key",
            self.objects.log()
        );
        let (xip, source, text) = (since.xip(), index.to_string(), array_literal(keys));
        let rows = self.session.admin_query(&sql, &[Some(since.xmax()), Some(&xip), Some(&source), Some(&text)])?;
        rows.into_iter().map(of_scope).collect()
    }

    /// Which of `keys` have been changed here by transactions that `seen` does not show? To look again, with a snapshot of its own, after
    /// the rows were written: whoever comes later waits for our row locks.
    pub fn changed_since(&mut self, index: usize, keys: &[&Key], seen: &Snapshot) -> Result<BTreeSet<Key>> {
        if keys.is_empty() {
            return Ok(BTreeSet::new());
        }
        let sql = format!(
            "SELECT DISTINCT key::text FROM {} WHERE {SINCE} AND source = $3::text::int AND (key IS NULL OR key::text = ANY ($4::text[]))",
            self.objects.log()
        );
        let (xip, source, text) = (seen.xip(), index.to_string(), array_literal(keys));
        let rows = self.session.admin_query(&sql, &[Some(seen.xmax()), Some(&xip), Some(&source), Some(&text)])?;
        if rows.iter().any(|r| r[0].is_none()) {
            return Ok(keys.iter().map(|k| (*k).clone()).collect());
        }
        Ok(rows.into_iter().filter_map(|mut r| r.pop().flatten()).collect())
    }

    /// Log bytes on disk.
    pub fn log_bytes(&mut self) -> Result<i64> {
        let rings: Vec<String> = (0..LOG_RING).map(|i| self.objects.log_ring(i).to_string()).collect();
        let sql = "SELECT sum(pg_total_relation_size(r::regclass))::bigint FROM unnest($1::text[]) AS r";
        let text = self.session.admin_query(sql, &[Some(&array_literal(&rings))])?;
        parse(text.first().and_then(|r| r[0].as_deref()).unwrap_or("0"))
    }

    /// Empties the log tables of the ring in which everything is consumed and older than `retention`: ACCESS EXCLUSIVE
    /// NOWAIT, *then* a look with a new snapshot, then TRUNCATE. A transaction of its own for each.
    pub fn rotate_log(&mut self, consumed: &Snapshot, retention: Duration) -> Result<()> {
        for ring in 0..LOG_RING {
            let rel = self.objects.log_ring(ring);
            let (xip, seconds) = (consumed.xip(), retention.as_secs().to_string());
            let cold = format!(
                "SELECT count(*) FILTER (WHERE at > clock_timestamp() - make_interval(secs => $3::text::float8)) = 0 \
                 AND count(*) FILTER (WHERE xid >= $1::text::xid8 OR xid = ANY ($2::text::xid8[])) = 0 AND count(*) > 0 FROM {rel}"
            );
            self.session.begin(Isolation::ReadCommitted, &[])?;
            let params = [Some(consumed.xmax()), Some(xip.as_str()), Some(seconds.as_str())];
            let attempt = (|| -> Result<()> {
                // A cheap look at the newest row first: most of the time there is nothing to do.
                let due = format!(
                    "SELECT coalesce((SELECT at < clock_timestamp() - make_interval(secs => $1::text::float8) FROM {rel} ORDER BY xid DESC LIMIT 1), false)"
                );
                if self.session.admin_query(&due, &[Some(&seconds)])?[0][0].as_deref() != Some("t") {
                    return Ok(());
                }
                self.session.admin_batch(&format!("LOCK TABLE {rel} IN ACCESS EXCLUSIVE MODE NOWAIT"))?;
                if self.session.admin_query(&cold, &params)?[0][0].as_deref() == Some("t") {
                    let last = format!("SELECT xid::text FROM {rel} ORDER BY xid DESC LIMIT 1");
                    let last: u64 = parse(self.session.admin_query(&last, &[])?[0][0].as_deref().unwrap_or("0"))?;
                    self.remember_cut(&consumed.up_to(last))?;
                    self.session.admin_batch(&format!("TRUNCATE {rel}"))?;
                }
                Ok(())
            })();
            match attempt {
                Ok(()) => self.session.commit()?,
                Err(e) => {
                    self.session.rollback();
                    if !e.is_contention() {
                        return Err(e);
                    }
                }
            }
        }
        Ok(())
    }

    /// What may be missing in the log: changes that are replicated, by the transactions that made them. None: nothing.
    pub fn cut(&mut self) -> Result<Option<Snapshot>> {
        let rows = self.session.admin_query(&format!("SELECT cut::text FROM {}", self.objects.counter()), &[])?;
        Ok(rows.into_iter().next().and_then(|mut r| r.pop().flatten()).map(Snapshot::new))
    }

    /// Remembers, in the transaction that empties a part of the log, what was in it: a watermark that does not cover it is too old.
    pub fn remember_cut(&mut self, gone: &Snapshot) -> Result<()> {
        let cut = self.cut()?.map_or_else(|| gone.clone(), |before| before.or(gone));
        let sql = format!("UPDATE {} SET cut = $1::text::pg_snapshot", self.objects.counter());
        self.session.admin_execute(&sql, &[Some(cut.as_str())]).map(drop)
    }
}

fn of_scope(row: Row) -> Result<(Key, Micros)> {
    match &row[..] {
        [Some(key), Some(at)] => Ok((key.clone(), parse(at)?)),
        _ => Err(Error::internal("malformed log row")),
    }
}

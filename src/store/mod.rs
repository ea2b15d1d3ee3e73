//! What replication needs of a store.
//!
//! [`Session`] speaks SQL in transactions: [`local::LocalSession`] through SPI, [`postgres::RemoteSession`] over libpq.
//! [`Store`] is the protocol's view of it: a consistent snapshot, the changes since a watermark, rows derived for a
//! scope, a batch applied, the watermark, the counter, the locks and the fence. One template serves both stores.

pub mod capture;
pub mod constraints;
pub mod libpq;
pub mod local;
pub mod postgres;
pub mod snapshot;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

pub use libpq::Row;
pub use snapshot::Snapshot;

use crate::error::{Error, Result, Side};
use crate::mapping::constraint::Constraints;
use crate::mapping::sql::{Objects, StoreTable};
use crate::mapping::text::array_literal;

/// The isolation of a replicator's transaction: it reads a snapshot, or it writes and looks again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isolation {
    RepeatableRead,
    ReadCommitted,
}

/// SQL in transactions, on one server. Parameters and results are text.
pub trait Session {
    fn side(&self) -> Side;
    fn query(&mut self, sql: &str, params: &[Option<&str>]) -> Result<Vec<Row>>;
    fn execute(&mut self, sql: &str, params: &[Option<&str>]) -> Result<u64>;
    /// Several statements, no parameters, no rows.
    fn batch(&mut self, sql: &str) -> Result<()>;
    /// As [`Session::query`], on what belongs to the extension rather than to the migration's owner.
    fn admin_query(&mut self, sql: &str, params: &[Option<&str>]) -> Result<Vec<Row>>;
    fn admin_execute(&mut self, sql: &str, params: &[Option<&str>]) -> Result<u64>;
    fn admin_batch(&mut self, sql: &str) -> Result<()>;
    /// For the rest of the transaction: ordinary triggers do not fire (as in logical replication), and this session is
    /// the first to find a deadlock. Where the role may not, triggers fire in the mapping's order.
    fn become_replica(&mut self) -> Result<()>;
    /// Begins a transaction; its snapshot is taken by the first statement after `lock` (ACCESS SHARE on these).
    fn begin(&mut self, isolation: Isolation, lock: &[String]) -> Result<()>;
    fn commit(&mut self) -> Result<()>;
    /// Ends the transaction if there is one. Never fails: what cannot be rolled back is disconnected.
    fn rollback(&mut self);
    fn savepoint(&mut self) -> Result<()>;
    fn release(&mut self) -> Result<()>;
    fn rollback_to(&mut self) -> Result<()>;
    /// Bounds every wait on a lock in this transaction.
    fn set_lock_timeout(&mut self, timeout: Duration) -> Result<()>;
    /// Bounds everything that is done on this session until it is set again.
    fn set_deadline(&mut self, deadline: Option<Instant>);
    /// Makes sure that all that its snapshots have shown is on disk, and returns the counter that proves it.
    fn flush(&mut self, counter: &str) -> Result<i64>;
}

/// The watermark of a store, kept on the other one.
#[derive(Debug, Clone)]
pub struct Watermark {
    pub snapshot: Snapshot,
    pub counter: i64,
}

/// A key's text (an array literal), the same on both stores.
pub type Key = String;

/// When a scope was changed last, in microseconds since 1970 by its own server's clock.
pub type Micros = i64;

/// The changes of one table since a watermark, or what is owed of it.
#[derive(Debug, Clone, Default)]
pub struct Changes {
    pub keys: BTreeMap<Key, Micros>,
    /// TRUNCATE and the like: the scope that overlaps every scope.
    pub whole: Option<Micros>,
    /// Log rows read.
    pub log_rows: i64,
}

impl Changes {
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty() && self.whole.is_none()
    }

    pub fn oldest(&self) -> Option<Micros> {
        self.keys.values().copied().chain(self.whole).min()
    }

    /// When this row was changed last; 0 if it was not.
    pub fn at(&self, key: &Key) -> Micros {
        self.keys.get(key).copied().or(self.whole).unwrap_or(0)
    }

    pub fn add(&mut self, key: Key, at: Micros) {
        let entry = self.keys.entry(key).or_insert(at);
        *entry = (*entry).max(at);
    }
}

/// A scope inside a watermark that is not applied.
#[derive(Debug, Clone)]
pub struct Owed {
    pub key: Key,
    pub at: Micros,
    /// The target's refusal, for a parked row; None for one that a client holds.
    pub error: Option<String>,
    pub image: Option<String>,
}

/// Rows in the second shape, and the keys for which an expression failed, with its error.
#[derive(Debug, Default)]
pub struct Derived {
    pub rows: BTreeMap<Key, String>,
    pub refused: BTreeMap<Key, String>,
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
}

/// One store of a migration.
pub struct Store<S: Session> {
    pub session: S,
    pub objects: Objects,
    pub tables: Vec<StoreTable>,
    pub constraints: Constraints,
}

impl<S: Session> Store<S> {
    pub fn new(session: S, objects: Objects) -> Store<S> {
        Store { session, objects, tables: Vec::new(), constraints: Constraints::default() }
    }

    pub fn side(&self) -> Side {
        self.session.side()
    }

    pub fn table(&self, index: usize) -> &StoreTable {
        &self.tables[index]
    }

    /// Begins the reading transaction: ACCESS SHARE on the sources, *then* the snapshot, so that it cannot straddle a
    /// TRUNCATE. Holds its snapshot until [`Store::end_read`].
    pub fn begin_read(&mut self) -> Result<Snapshot> {
        let lock: Vec<String> = self.tables.iter().map(|t| t.rel.to_string()).collect();
        self.session.begin(Isolation::RepeatableRead, &lock)?;
        self.snapshot()
    }

    pub fn end_read(&mut self) -> Result<()> {
        self.session.commit()
    }

    pub fn snapshot(&mut self) -> Result<Snapshot> {
        let text = self.one("SELECT pg_current_snapshot()::text", &[])?;
        Ok(Snapshot::new(text.ok_or_else(|| Error::internal("no snapshot"))?))
    }

    /// The watermark that this store keeps of the other one; None before the migration has set it.
    pub fn watermark(&mut self) -> Result<Option<Watermark>> {
        let rows =
            self.session.admin_query(&format!("SELECT watermark::text, counter FROM {}", self.objects.mark()), &[])?;
        let Some(row) = rows.into_iter().next() else { return Ok(None) };
        let [Some(snapshot), Some(counter)] = &row[..] else { return Err(Error::internal("malformed watermark")) };
        Ok(Some(Watermark { snapshot: Snapshot::new(snapshot), counter: parse(counter)? }))
    }

    /// Sets the watermark of the other store, in the transaction that writes the rows it speaks for.
    pub fn set_watermark(&mut self, mark: &Watermark) -> Result<()> {
        let params = [Some(mark.snapshot.as_str().to_string()), Some(mark.counter.to_string())];
        let params: Vec<Option<&str>> = params.iter().map(|p| p.as_deref()).collect();
        let table = self.objects.mark();
        let updated = self.session.admin_execute(
            &format!(
                "UPDATE {table} SET watermark = $1::text::pg_snapshot, counter = $2::text::bigint, at = clock_timestamp()"
            ),
            &params,
        )?;
        if updated == 0 {
            self.session.admin_execute(
                &format!("INSERT INTO {table} VALUES ($1::text::pg_snapshot, $2::text::bigint)"),
                &params,
            )?;
        }
        Ok(())
    }

    /// "Flush first": after this, everything that any snapshot of this store has shown survives a crash of it.
    pub fn flush(&mut self) -> Result<i64> {
        if crate::fault::is_taken_out("no-flush") {
            self.session.begin(Isolation::ReadCommitted, &[])?;
            let counter = self.counter();
            self.session.rollback();
            return counter;
        }
        let counter = self.objects.counter().to_string();
        self.session.flush(&counter)
    }

    pub fn counter(&mut self) -> Result<i64> {
        let sql = format!("SELECT n FROM {}", self.objects.counter());
        let rows = self.session.admin_query(&sql, &[])?;
        parse(rows.first().and_then(|r| r[0].as_deref()).unwrap_or("0"))
    }

    /// What was changed here and is not covered by `since`: PgQ's batch rule, `xid >= xmax OR xid = ANY (xip)`, both
    /// halves of which an index serves; that the row is visible to this transaction's snapshot is the other half.
    pub fn changes(&mut self, since: &Snapshot) -> Result<Vec<Changes>> {
        let sql = format!(
            "SELECT source, key::text, (extract(epoch FROM max(at)) * 1000000)::bigint, count(*) FROM {} \
             WHERE xid >= $1::text::xid8 OR xid = ANY ($2::text::xid8[]) GROUP BY source, key",
            self.objects.log()
        );
        let xip = since.xip();
        let rows = self.session.admin_query(&sql, &[Some(since.xmax()), Some(&xip)])?;
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
        Ok(changes)
    }

    /// What is owed to this store.
    pub fn owed(&mut self) -> Result<Vec<Vec<Owed>>> {
        let sql = format!(
            "SELECT source, key::text, (extract(epoch FROM at) * 1000000)::bigint, error, image FROM {}",
            self.objects.owed()
        );
        let mut owed = vec![Vec::new(); self.tables.len()];
        for row in self.session.admin_query(&sql, &[])? {
            let [Some(source), Some(key), Some(at), error, image] = &row[..] else {
                return Err(Error::internal("malformed owed row"));
            };
            owed.get_mut(parse::<usize>(source)?).ok_or_else(|| Error::internal("unknown table owed"))?.push(Owed {
                key: key.clone(),
                at: parse(at)?,
                error: error.clone(),
                image: image.clone(),
            });
        }
        Ok(owed)
    }

    /// Replaces what is owed to this store: `settled` goes, `owed` comes.
    pub fn set_owed(&mut self, index: usize, settled: &[&Key], owed: &[Owed]) -> Result<()> {
        let table = self.objects.owed();
        let source = index.to_string();
        if !settled.is_empty() {
            let keys = array_literal(settled);
            self.session.admin_execute(
                &format!("DELETE FROM {table} WHERE source = $1::text::int AND key = ANY (SELECT r::text[] FROM unnest($2::text[]) AS r)"),
                &[Some(&source), Some(&keys)],
            )?;
        }
        for o in owed {
            self.session.admin_execute(
                &format!(
                    "INSERT INTO {table} AS o (source, key, at, error, image) VALUES ($1::text::int, $2::text[], \
                     to_timestamp($3::text::numeric / 1000000), $4::text, $5::text) ON CONFLICT (source, key) DO UPDATE \
                     SET at = greatest(o.at, EXCLUDED.at), error = EXCLUDED.error, image = EXCLUDED.image"
                ),
                &[Some(&source), Some(&o.key), Some(&o.at.to_string()), o.error.as_deref(), o.image.as_deref()],
            )?;
        }
        Ok(())
    }

    /// Rows in the second shape, by key. `keys` None: all.
    ///
    /// A row for which a rule's expression fails is found by halving; the others are derived all the same.
    pub fn derive(&mut self, index: usize, keys: Option<&[&Key]>) -> Result<Derived> {
        let sql = self.tables[index].derive(keys.is_none());
        if self.side() == Side::Second {
            // Rules are evaluated on first; here rows are read as they are.
            return Ok(Derived { rows: self.by_key(&sql, keys)?, refused: BTreeMap::new() });
        }
        self.session.savepoint()?;
        let error = match self.by_key(&sql, keys) {
            Ok(rows) => {
                self.session.release()?;
                return Ok(Derived { rows, refused: BTreeMap::new() });
            }
            Err(e) if e.is_rejected_row() || e.is_undefined_name() => e,
            Err(e) => return Err(e),
        };
        self.session.rollback_to()?;
        if error.is_undefined_name() {
            // Fails in the same way if the fault is the rule's.
            let without_rows = self.tables[index].derive(false);
            self.by_key(&without_rows, Some(&[]))?;
        }
        let all;
        let keys = match keys {
            Some([key]) => {
                let refused = BTreeMap::from([((*key).clone(), error.to_string())]);
                return Ok(Derived { rows: BTreeMap::new(), refused });
            }
            Some(keys) => keys.to_vec(),
            None => {
                all = self.present(index, None)?;
                all.iter().collect()
            }
        };
        let (a, b) = keys.split_at(keys.len() / 2);
        let (mut a, b) = (self.derive(index, Some(a))?, self.derive(index, Some(b))?);
        a.rows.extend(b.rows);
        a.refused.extend(b.refused);
        Ok(a)
    }

    /// The keys of a chunk of the copy.
    pub fn chunk_keys(&mut self, index: usize, after: Option<&str>, last: Option<&str>) -> Result<Vec<Key>> {
        let sql = self.tables[index].chunk_keys();
        Ok(self.session.query(&sql, &[after, last])?.into_iter().filter_map(|mut r| r.pop().flatten()).collect())
    }

    /// Rows as they stand here, as JSON, by key.
    pub fn images(&mut self, index: usize, keys: &[&Key]) -> Result<BTreeMap<Key, String>> {
        if keys.is_empty() {
            return Ok(BTreeMap::new());
        }
        self.session.savepoint()?;
        match self.by_key(&self.tables[index].images("to_jsonb(t)"), Some(keys)) {
            Ok(images) => self.session.release().map(|()| images),
            // jsonb does not take every value (a NUL in json): then the row's text is the image.
            Err(e) if e.is_rejected_row() => {
                self.session.rollback_to()?;
                self.by_key(&self.tables[index].images("to_jsonb(t::text)"), Some(keys))
            }
            Err(e) => Err(e),
        }
    }

    pub(super) fn by_key(&mut self, sql: &str, keys: Option<&[&Key]>) -> Result<BTreeMap<Key, String>> {
        let keys = keys.map(array_literal);
        let params: Vec<Option<&str>> = keys.iter().map(|k| Some(k.as_str())).collect();
        let mut rows = BTreeMap::new();
        for row in self.session.query(sql, &params)? {
            let mut row = row.into_iter();
            if let (Some(Some(key)), Some(Some(value))) = (row.next(), row.next()) {
                rows.insert(key, value);
            }
        }
        Ok(rows)
    }

    /// The keys that are there. `keys` None: all.
    pub fn present(&mut self, index: usize, keys: Option<&[&Key]>) -> Result<Vec<Key>> {
        let keys_text = keys.map(array_literal);
        let params: Vec<Option<&str>> = keys_text.iter().map(|k| Some(k.as_str())).collect();
        let sql = self.tables[index].present(keys.is_none());
        Ok(self.session.query(&sql, &params)?.into_iter().filter_map(|mut r| r.pop().flatten()).collect())
    }

    /// Begins a transaction that writes as the replicator: triggers of this migration let it pass, ordinary ones do not fire.
    pub fn begin_write(&mut self) -> Result<()> {
        self.session.begin(Isolation::ReadCommitted, &[])?;
        self.mark_origin()
    }

    /// Marks the current transaction as the replicator's.
    pub fn mark_origin(&mut self) -> Result<()> {
        self.session.admin_execute(
            &format!("INSERT INTO {} VALUES (pg_current_xact_id()) ON CONFLICT DO NOTHING", self.objects.origin()),
            &[],
        )?;
        self.session.become_replica()
    }

    /// Locks those of `keys` that are there and that nobody holds; returns the ones that somebody holds.
    pub fn lock_rows(&mut self, index: usize, keys: &[&Key], strength: &str) -> Result<Vec<Key>> {
        if keys.is_empty() {
            return Ok(Vec::new());
        }
        let text = array_literal(keys);
        let locked: std::collections::BTreeSet<Key> = self
            .session
            .query(&self.tables[index].lock_rows(strength), &[Some(&text)])?
            .into_iter()
            .filter_map(|mut r| r.pop().flatten())
            .collect();
        Ok(self.present(index, Some(keys))?.into_iter().filter(|k| !locked.contains(k)).collect())
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

    /// Look again: which of `keys` have been changed here by transactions that `seen` does not show? With a snapshot
    /// of its own, after the rows were written: whoever comes later waits for our row locks.
    pub fn changed_since(&mut self, index: usize, keys: &[&Key], seen: &Snapshot) -> Result<Vec<Key>> {
        if keys.is_empty() {
            return Ok(Vec::new());
        }
        let sql = format!(
            "SELECT DISTINCT key::text FROM {} WHERE (xid >= $1::text::xid8 OR xid = ANY ($2::text::xid8[])) \
             AND source = $3::text::int AND (key IS NULL OR key::text = ANY ($4::text[]))",
            self.objects.log()
        );
        let (xip, source, text) = (seen.xip(), index.to_string(), array_literal(keys));
        let rows = self.session.admin_query(&sql, &[Some(seen.xmax()), Some(&xip), Some(&source), Some(&text)])?;
        if rows.iter().any(|r| r[0].is_none()) {
            return Ok(keys.iter().map(|k| (*k).clone()).collect());
        }
        Ok(rows.into_iter().filter_map(|mut r| r.pop().flatten()).collect())
    }

    /// Removes the marks of transactions that have ended.
    pub fn forget_origins(&mut self) -> Result<()> {
        let sql = format!("DELETE FROM {} WHERE xid < pg_snapshot_xmin(pg_current_snapshot())", self.objects.origin());
        self.session.begin(Isolation::ReadCommitted, &[])?;
        let result = self.session.admin_execute(&sql, &[]).and_then(|_| self.session.commit());
        if result.is_err() {
            self.session.rollback();
        }
        result
    }

    /// Log bytes on disk.
    pub fn log_bytes(&mut self) -> Result<i64> {
        let rings: Vec<String> =
            (0..crate::mapping::sql::LOG_RING).map(|i| self.objects.log_ring(i).to_string()).collect();
        let sql = "SELECT sum(pg_total_relation_size(r::regclass))::bigint FROM unnest($1::text[]) AS r";
        let text = self.session.admin_query(sql, &[Some(&array_literal(&rings))])?;
        parse(text.first().and_then(|r| r[0].as_deref()).unwrap_or("0"))
    }

    /// Empties the log tables of the ring in which everything is consumed and older than `retention`: ACCESS EXCLUSIVE
    /// NOWAIT, *then* a look with a new snapshot, then TRUNCATE. A transaction of its own for each.
    pub fn rotate_log(&mut self, consumed: &Snapshot, retention: Duration) -> Result<()> {
        for ring in 0..crate::mapping::sql::LOG_RING {
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

    pub fn one(&mut self, sql: &str, params: &[Option<&str>]) -> Result<Option<String>> {
        Ok(self.session.query(sql, params)?.into_iter().next().and_then(|mut r| r.pop().flatten()))
    }
}

pub fn parse<T: std::str::FromStr>(text: &str) -> Result<T> {
    text.parse().map_err(|_| Error::internal(format!("unexpected value \"{text}\"")))
}

//! What replication needs of a store.
//!
//! [`Session`] speaks SQL in transactions: [`local::LocalSession`] through SPI, [`postgres::RemoteSession`] over libpq.
//! [`Store`] is the protocol's view of it: a consistent snapshot, the changes since a watermark, rows derived for a
//! scope, a batch applied, the watermark, the counter, the locks and the fence. One template serves both stores.

pub mod capture;
pub mod constraints;
pub mod libpq;
pub mod local;
mod log;
mod owed;
pub mod postgres;
mod rows;
pub mod snapshot;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

pub use libpq::{Each, Row};
pub use owed::{MANY, Owed, OwedCount};
pub use rows::{BATCH, Derived, in_batches, text};
pub use snapshot::Snapshot;

use crate::error::{Error, Result, Side};
use crate::mapping::constraint::Constraints;
use crate::mapping::sql::{Objects, StoreTable};

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
    /// As [`Session::query`], but hands the rows over one by one, as they come: no more than one of them is in memory.
    fn stream(&mut self, sql: &str, params: &[Option<&str>], each: &mut Each) -> Result<()>;
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

    /// Of those whose time is known.
    pub fn oldest(&self) -> Option<Micros> {
        self.keys.values().copied().chain(self.whole).filter(|at| *at > 0).min()
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

/// One store of a migration.
pub struct Store<S: Session> {
    pub session: S,
    pub objects: Objects,
    pub tables: Vec<StoreTable>,
    pub constraints: Constraints,
    /// How many rows to ask for at a time, as their size allows.
    pace: usize,
}

impl<S: Session> Store<S> {
    pub fn new(session: S, objects: Objects) -> Store<S> {
        Store { session, objects, tables: Vec::new(), constraints: Constraints::default(), pace: rows::UNKNOWN }
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

    pub fn one(&mut self, sql: &str, params: &[Option<&str>]) -> Result<Option<String>> {
        Ok(self.session.query(sql, params)?.into_iter().next().and_then(|mut r| r.pop().flatten()))
    }
}

pub fn parse<T: std::str::FromStr>(text: &str) -> Result<T> {
    text.parse().map_err(|_| Error::internal(format!("unexpected value \"{text}\"")))
}

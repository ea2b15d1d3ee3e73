//! The first store's session: SPI, in transactions of our own. For background workers only.
//!
//! Owns the transaction state of the process: nothing else in a worker may start or end a transaction. Statements run
//! as the migration's owner (the worker's session user); the `admin_` ones as the extension's owner.

mod determinism;
mod receiver;

use std::ffi::{CStr, CString};
use std::panic::AssertUnwindSafe;
use std::time::{Duration, Instant};

use pgrx::pg_sys;
use pgrx::prelude::*;

use super::{Each, Isolation, Row, Session, parse};
use crate::error::{Error, Result, ServerError, Side, unpack};

/// What a subtransaction must put back.
struct Savepoint {
    memory: pg_sys::MemoryContext,
    owner: pg_sys::ResourceOwner,
}

pub struct LocalSession {
    /// The owner of schema `crossover`.
    admin: pg_sys::Oid,
    in_transaction: bool,
    savepoints: Vec<Savepoint>,
    /// Relations that a lock attempt waited for in vain, the last one first.
    stubborn: Vec<u32>,
}

/// Restores the user id; also on an error, where the transaction's end would do it.
struct AsUser {
    user: pg_sys::Oid,
    context: i32,
}

impl AsUser {
    /// `SECURITY_LOCAL_USERID_CHANGE` keeps the statement from changing the role any further.
    fn switch(to: pg_sys::Oid) -> AsUser {
        let (mut user, mut context) = (pg_sys::InvalidOid, 0);
        // SAFETY: both functions only read and write this process's user id.
        unsafe {
            pg_sys::GetUserIdAndSecContext(&mut user, &mut context);
            pg_sys::SetUserIdAndSecContext(to, context | pg_sys::SECURITY_LOCAL_USERID_CHANGE as i32);
        }
        AsUser { user, context }
    }
}

impl Drop for AsUser {
    fn drop(&mut self) {
        // SAFETY: assigns two static variables of this process; cannot fail.
        unsafe { pg_sys::SetUserIdAndSecContext(self.user, self.context) }
    }
}

/// A search_path in which nobody can plant an operator or function, for statements that run with more rights than their caller has.
struct PinnedPath(i32);

impl PinnedPath {
    fn new() -> PinnedPath {
        // SAFETY: opens a nest level of settings and saves search_path in it; an error's abort closes it.
        unsafe {
            let level = pg_sys::NewGUCNestLevel();
            pg_sys::set_config_option(
                c"search_path".as_ptr(),
                c"pg_catalog, pg_temp".as_ptr(),
                pg_sys::GucContext::PGC_USERSET,
                pg_sys::GucSource::PGC_S_SESSION,
                pg_sys::GucAction::GUC_ACTION_SAVE,
                true,
                0,
                false,
            );
            PinnedPath(level)
        }
    }

    /// Not on drop: while an error unwinds, the abort does it.
    fn restore(self) {
        // SAFETY: closes the level that `new` opened.
        unsafe { pg_sys::AtEOXact_GUC(true, self.0) }
    }
}

/// Runs `f` and turns a PostgreSQL ERROR raised in it into an [`Error`]. The transaction (or subtransaction) it happened
/// in must then be rolled back by the caller.
pub fn catch<T>(f: impl FnOnce() -> T) -> Result<T> {
    // SAFETY: the global holds the current context; it is put back because an error leaves another one current.
    let memory = unsafe { pg_sys::CurrentMemoryContext };
    let result = PgTryBuilder::new(AssertUnwindSafe(|| Ok(f())))
        .catch_others(|caught| Err(convert(caught)))
        .catch_rust_panic(|caught| Err(convert(caught)))
        .execute();
    if result.is_err() {
        // SAFETY: the context was current before and outlives this call.
        unsafe { pg_sys::MemoryContextSwitchTo(memory) };
    }
    result
}

fn convert(caught: pg_sys::panic::CaughtError) -> Error {
    use pg_sys::panic::CaughtError;
    match &caught {
        CaughtError::PostgresError(report) | CaughtError::ErrorReport(report) => Error::Server {
            side: Side::First,
            error: ServerError {
                sqlstate: unpack(report.sql_error_code()),
                message: report.message().to_string(),
                detail: report.detail().map(str::to_string),
                hint: report.hint().map(str::to_string),
            },
        },
        CaughtError::RustPanic { ereport, .. } => Error::Internal(ereport.message().to_string()),
    }
}

/// An SPI connection for one statement; it is finished at once, its result copied out before.
fn with_spi<T>(f: impl FnOnce() -> T) -> T {
    // SAFETY: SPI_connect and SPI_finish pair up; after an error the (sub)transaction's abort cleans up instead.
    unsafe {
        pg_sys::SPI_connect();
        let result = f();
        pg_sys::SPI_finish();
        result
    }
}

struct Arguments {
    types: Vec<pg_sys::Oid>,
    values: Vec<pg_sys::Datum>,
    nulls: Vec<std::ffi::c_char>,
}

impl Arguments {
    fn new(params: &[Option<&str>]) -> Arguments {
        let mut arguments = Arguments { types: Vec::new(), values: Vec::new(), nulls: Vec::new() };
        for param in params {
            arguments.types.push(pg_sys::TEXTOID);
            arguments.nulls.push(if param.is_some() { b' ' } else { b'n' } as std::ffi::c_char);
            arguments.values.push(match param {
                // SAFETY: copies `len` bytes of a valid str into the current memory context.
                Some(text) => unsafe {
                    pg_sys::Datum::from(pg_sys::cstring_to_text_with_len(text.as_ptr().cast(), text.len() as i32))
                },
                None => pg_sys::Datum::from(0),
            });
        }
        arguments
    }
}

fn c_sql(sql: &str) -> CString {
    // A NUL can only come from a bug in the templates: names and values cannot hold one.
    CString::new(sql).unwrap_or_else(|_| error!("statement contains a NUL byte"))
}

fn run(sql: &str, params: &[Option<&str>]) -> u64 {
    let source = c_sql(sql);
    let mut a = Arguments::new(params);
    // SAFETY: SPI is connected; the arrays have as many elements as `nargs` says and live across the call.
    let code = unsafe {
        pg_sys::SPI_execute_with_args(
            source.as_ptr(),
            a.types.len() as i32,
            a.types.as_mut_ptr(),
            a.values.as_mut_ptr(),
            a.nulls.as_ptr(),
            false,
            0,
        )
    };
    if code < 0 {
        error!("SPI failed with {code} for: {sql}");
    }
    // SAFETY: set by the call above.
    unsafe { pg_sys::SPI_processed }
}

/// The rows of SPI's current result, by each type's output function.
fn rows() -> Vec<Row> {
    // SAFETY: SPI_tuptable is null or the result of the last statement, valid until SPI_finish; SPI_getvalue returns
    // null or a NUL-terminated string in the current context.
    unsafe {
        let table = pg_sys::SPI_tuptable;
        if table.is_null() {
            return Vec::new();
        }
        let desc = (*table).tupdesc;
        (0..pg_sys::SPI_processed as usize)
            .map(|i| {
                let tuple = *(*table).vals.add(i);
                (1..=(*desc).natts)
                    .map(|n| {
                        let value = pg_sys::SPI_getvalue(tuple, desc, n);
                        (!value.is_null()).then(|| {
                            let text = CStr::from_ptr(value).to_string_lossy().into_owned();
                            pg_sys::pfree(value.cast());
                            text
                        })
                    })
                    .collect()
            })
            .collect()
    }
}

impl LocalSession {
    /// # Errors
    /// When the extension is not installed in this database.
    pub fn new() -> Result<LocalSession> {
        let mut session = LocalSession {
            admin: pg_sys::InvalidOid,
            in_transaction: false,
            savepoints: Vec::new(),
            stubborn: Vec::new(),
        };
        session.pin_settings()?;
        session.begin(Isolation::ReadCommitted, &[])?;
        let owner =
            session.query("SELECT nspowner::int8 FROM pg_catalog.pg_namespace WHERE nspname = 'crossover'", &[]);
        session.rollback();
        match owner?.first() {
            Some(row) => session.admin = pg_sys::Oid::from(parse::<u32>(row[0].as_deref().unwrap_or("0"))?),
            None => return Err(Error::NotInstalled),
        }
        // Whoever is in a deadlock with this process, DROP EXTENSION for one, it is this process that finds it.
        session.begin(Isolation::ReadCommitted, &[])?;
        session.admin_batch("SET deadlock_timeout = '30ms'")?;
        session.commit()?;
        Ok(session)
    }

    /// Pins the settings that a value's text depends on, for the life of the process; and the role, which ALTER ROLE ... SET role changes.
    fn pin_settings(&mut self) -> Result<()> {
        let settings: String = crate::mapping::sql::session_settings()
            .iter()
            .map(|(name, value)| crate::mapping::sql::set_statement(name, value) + ";\n")
            .collect();
        self.begin(Isolation::ReadCommitted, &[])?;
        self.batch(&format!("SET ROLE NONE;\n{settings}"))?;
        self.commit()
    }

    pub fn in_transaction(&self) -> bool {
        self.in_transaction
    }

    /// One read in a transaction of its own.
    pub fn read(&mut self, sql: &str, params: &[Option<&str>]) -> Result<Vec<Row>> {
        self.begin(Isolation::ReadCommitted, &[])?;
        let rows = self.admin_query(sql, params);
        self.rollback();
        rows
    }

    /// One write in a transaction of its own.
    pub fn write(&mut self, sql: &str, params: &[Option<&str>]) -> Result<u64> {
        self.begin(Isolation::ReadCommitted, &[])?;
        let result = self.admin_execute(sql, params).and_then(|n| self.commit().map(|()| n));
        if result.is_err() {
            self.rollback();
        }
        result
    }

    /// Locks relations of this server in `mode`, each wait bounded by what is left of `deadline`; held until the transaction
    /// ends. LOCK TABLE will not do: it also locks what a view reads.
    ///
    /// The order is the given one, but a relation that could not be had comes first the next time: clients that lock the same
    /// tables in another order would otherwise meet every attempt half-way, for ever. The session's short deadlock_timeout makes this
    /// process the one that finds a deadlock, and has a blocking autovacuum cancelled.
    pub fn lock_relations(&mut self, oids: &[u32], mode: i32, deadline: Instant) -> Result<()> {
        let mut order = oids.to_vec();
        order.sort_by_key(|oid| self.stubborn.iter().position(|s| s == oid).unwrap_or(usize::MAX));
        for oid in order {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::LockNotAvailable);
            }
            self.set_lock_timeout(left)?;
            if let Err(e) = self.lock_tree(oid, mode, deadline) {
                self.stubborn.retain(|s| *s != oid);
                self.stubborn.insert(0, oid);
                return Err(e);
            }
        }
        self.set_lock_timeout(Duration::ZERO)
    }

    /// Locks a relation and then its partitions: a lock on the parent does not keep out who names a partition. None can come
    /// or go once the parent is locked.
    fn lock_tree(&mut self, oid: u32, mode: i32, deadline: Instant) -> Result<()> {
        // SAFETY: in a transaction; the lock manager releases the lock at its end.
        let lock = |oid: u32| catch(|| unsafe { pg_sys::LockRelationOid(pg_sys::Oid::from(oid), mode) });
        lock(oid)?;
        let mut parents = vec![oid];
        let mut bound = None;
        while let Some(parent) = parents.pop() {
            let sql = "SELECT h.inhrelid::int8, c.relkind = 'p' FROM pg_inherits h JOIN pg_class c ON c.oid = h.inhrelid \
                       WHERE h.inhparent = $1::text::oid ORDER BY h.inhrelid";
            for row in self.admin_query(sql, &[Some(&parent.to_string())])? {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err(Error::LockNotAvailable);
                }
                // A statement for each of thousands of partitions would take longer than the locks.
                if bound.is_none_or(|b| left + Duration::from_millis(5) < b) {
                    self.set_lock_timeout(left)?;
                    bound = Some(left);
                }
                let child: u32 = parse(row[0].as_deref().unwrap_or("0"))?;
                lock(child)?;
                if row[1].as_deref() == Some("t") {
                    parents.push(child);
                }
            }
        }
        Ok(())
    }

    fn guarded<T>(&mut self, admin: bool, f: impl FnOnce() -> T) -> Result<T> {
        if !self.in_transaction {
            return Err(Error::internal("no transaction"));
        }
        let admin = admin.then(|| AsUser::switch(self.admin));
        let result = catch(|| {
            let path = admin.is_some().then(PinnedPath::new);
            let result = with_spi(f);
            if let Some(path) = path {
                path.restore();
            }
            result
        });
        drop(admin);
        result
    }
}

impl Session for LocalSession {
    fn side(&self) -> Side {
        Side::First
    }

    fn query(&mut self, sql: &str, params: &[Option<&str>]) -> Result<Vec<Row>> {
        self.guarded(false, || {
            run(sql, params);
            rows()
        })
    }

    fn execute(&mut self, sql: &str, params: &[Option<&str>]) -> Result<u64> {
        self.guarded(false, || run(sql, params))
    }

    fn stream(&mut self, sql: &str, params: &[Option<&str>], each: &mut Each) -> Result<()> {
        self.guarded(false, || receiver::stream(sql, params, each))?
    }

    fn batch(&mut self, sql: &str) -> Result<()> {
        self.guarded(false, || run(sql, &[])).map(drop)
    }

    fn admin_query(&mut self, sql: &str, params: &[Option<&str>]) -> Result<Vec<Row>> {
        self.guarded(true, || {
            run(sql, params);
            rows()
        })
    }

    fn admin_execute(&mut self, sql: &str, params: &[Option<&str>]) -> Result<u64> {
        self.guarded(true, || run(sql, params))
    }

    fn admin_batch(&mut self, sql: &str) -> Result<()> {
        self.guarded(true, || run(sql, &[])).map(drop)
    }

    fn become_replica(&mut self) -> Result<()> {
        self.admin_batch("SET LOCAL session_replication_role = replica")
    }

    fn begin(&mut self, isolation: Isolation, lock: &[String]) -> Result<()> {
        if self.in_transaction {
            return Err(Error::internal("a transaction is in progress"));
        }
        self.in_transaction = true;
        let result = catch(|| {
            // SAFETY: the process is outside a transaction, as `in_transaction` says. The isolation is set before the
            // first snapshot; the locks are taken before it, too.
            unsafe {
                pg_sys::SetCurrentStatementStartTimestamp();
                pg_sys::StartTransactionCommand();
                pg_sys::XactReadOnly = false;
                pg_sys::XactIsoLevel = match isolation {
                    Isolation::RepeatableRead => pg_sys::XACT_REPEATABLE_READ,
                    Isolation::ReadCommitted => pg_sys::XACT_READ_COMMITTED,
                } as i32;
                if !lock.is_empty() {
                    let sql = format!("LOCK TABLE {} IN ACCESS SHARE MODE", lock.join(", "));
                    with_spi(|| run(&sql, &[]));
                }
                // Detoasting and output functions want an active snapshot beneath SPI's own.
                pg_sys::PushActiveSnapshot(pg_sys::GetTransactionSnapshot());
            }
        });
        if result.is_err() {
            self.rollback();
        }
        result
    }

    fn commit(&mut self) -> Result<()> {
        let result = catch(|| {
            // SAFETY: pairs with `begin`.
            unsafe {
                if pg_sys::ActiveSnapshotSet() {
                    pg_sys::PopActiveSnapshot();
                }
                pg_sys::CommitTransactionCommand();
            }
        });
        match result {
            Ok(()) => {
                self.in_transaction = false;
                Ok(())
            }
            Err(e) => {
                self.rollback();
                Err(e)
            }
        }
    }

    fn rollback(&mut self) {
        if !self.in_transaction {
            return;
        }
        self.savepoints.clear();
        self.in_transaction = false;
        // SAFETY: aborts whatever of the transaction is there, subtransactions included; this is what PostgreSQL's own
        // main loops do after an error.
        let _ = catch(|| unsafe { pg_sys::AbortOutOfAnyTransaction() });
    }

    fn savepoint(&mut self) -> Result<()> {
        // SAFETY: plain reads of globals, then a subtransaction that `release` or `rollback_to` ends.
        let savepoint =
            unsafe { Savepoint { memory: pg_sys::CurrentMemoryContext, owner: pg_sys::CurrentResourceOwner } };
        // SAFETY: as above.
        catch(|| unsafe {
            pg_sys::BeginInternalSubTransaction(std::ptr::null());
            pg_sys::MemoryContextSwitchTo(savepoint.memory);
        })?;
        self.savepoints.push(savepoint);
        Ok(())
    }

    fn release(&mut self) -> Result<()> {
        let Some(savepoint) = self.savepoints.pop() else { return Err(Error::internal("no savepoint")) };
        // SAFETY: ends the subtransaction begun last and puts back what it found.
        catch(|| unsafe {
            pg_sys::ReleaseCurrentSubTransaction();
            pg_sys::MemoryContextSwitchTo(savepoint.memory);
            pg_sys::CurrentResourceOwner = savepoint.owner;
        })
    }

    fn rollback_to(&mut self) -> Result<()> {
        let Some(savepoint) = self.savepoints.pop() else { return Err(Error::internal("no savepoint")) };
        // SAFETY: as in `release`.
        catch(|| unsafe {
            pg_sys::RollbackAndReleaseCurrentSubTransaction();
            pg_sys::MemoryContextSwitchTo(savepoint.memory);
            pg_sys::CurrentResourceOwner = savepoint.owner;
        })
    }

    fn set_lock_timeout(&mut self, timeout: Duration) -> Result<()> {
        self.admin_batch(&format!("SET LOCAL lock_timeout = {}", millis(timeout)))
    }

    fn set_deadline(&mut self, _deadline: Option<Instant>) {}

    fn flush(&mut self, counter: &str) -> Result<i64> {
        if self.in_transaction {
            // The transaction that holds the switch's locks cannot commit a counter; its WAL can be flushed all the same.
            // SAFETY: flushes what has been inserted so far; wal_segment_size is set at the server's start.
            catch(|| unsafe {
                let end = end_of_wal(pg_sys::GetXLogInsertRecPtr(), pg_sys::wal_segment_size as u64);
                pg_sys::XLogFlush(end);
            })?;
            let rows = self.admin_query(&format!("SELECT n FROM {counter}"), &[])?;
            return parse(rows.first().and_then(|r| r[0].as_deref()).unwrap_or("0"));
        }
        self.begin(Isolation::ReadCommitted, &[])?;
        let result = self.admin_query(&format!("UPDATE {counter} SET n = n + 1 RETURNING n"), &[]);
        match result {
            Ok(rows) => {
                self.commit()?;
                parse(rows.first().and_then(|r| r[0].as_deref()).unwrap_or("0"))
            }
            Err(e) => {
                self.rollback();
                Err(e)
            }
        }
    }
}

/// Where the WAL ends that has been inserted, given where the next record will begin: past a page's header, if a page has just been filled,
/// which is further than anybody can flush.
fn end_of_wal(next: u64, segment: u64) -> u64 {
    // SizeOfXLogShortPHD, and SizeOfXLogLongPHD on the first page of a segment.
    const HEADERS: (u64, u64) = (24, 40);
    let page = u64::from(pg_sys::XLOG_BLCKSZ);
    let header = if next % segment < page { HEADERS.1 } else { HEADERS.0 };
    if next % page == header { next - header } else { next }
}

/// Whole milliseconds for a setting; at least one unless it is zero (which turns a timeout off).
pub fn millis(duration: Duration) -> u128 {
    if duration.is_zero() { 0 } else { duration.as_millis().max(1) }
}

/// A read of the extension's tables from a caller's backend, with the latest snapshot (the transaction's own may be older than
/// the answer that is waited for). As the extension's owner.
pub fn look(sql: &str) -> Result<Vec<Row>> {
    catch(|| {
        // SAFETY: in the caller's transaction; the snapshot is popped again, or by the abort. The owner is the namespace's.
        unsafe {
            let namespace = pg_sys::get_namespace_oid(c"crossover".as_ptr(), false);
            let tuple = pg_sys::SearchSysCache1(
                pg_sys::SysCacheIdentifier::NAMESPACEOID as i32,
                pg_sys::Datum::from(namespace),
            );
            let data = (*tuple).t_data;
            let form = data.cast::<u8>().add((*data).t_hoff as usize).cast::<pg_sys::FormData_pg_namespace>();
            let owner = (*form).nspowner;
            pg_sys::ReleaseSysCache(tuple);
            let user = AsUser::switch(owner);
            let path = PinnedPath::new();
            pg_sys::PushActiveSnapshot(pg_sys::GetLatestSnapshot());
            let found = with_spi(|| {
                let source = c_sql(sql);
                pg_sys::SPI_execute(source.as_ptr(), true, 0);
                rows()
            });
            pg_sys::PopActiveSnapshot();
            path.restore();
            drop(user);
            found
        }
    })
}

#[cfg(test)]
mod tests {
    use super::end_of_wal;

    #[test]
    fn the_wal_ends_before_the_header_of_an_empty_page() {
        const SEGMENT: u64 = 16 << 20;
        assert_eq!(end_of_wal(0x0F33_8018, SEGMENT), 0x0F33_8000);
        assert_eq!(end_of_wal(0x0F00_0028, SEGMENT), 0x0F00_0000);
        for position in [0x0F33_8017, 0x0F33_8019, 0x0F33_8028, 0x0F33_9FF0, 0x0F00_0029] {
            assert_eq!(end_of_wal(position, SEGMENT), position);
        }
    }
}

//! A libpq connection that a backend or background worker can wait on.
//!
//! libpq's own blocking calls would make the process deaf to cancel, shutdown and the death of the
//! postmaster, so every wait here is one of PostgreSQL's (`WaitLatchOrSocket`), as in libpqwalreceiver.
//! This file owns the raw `pq-sys` pointers and knows nothing of migrations; no other file touches them.
//!
//! An interrupt that PostgreSQL raises leaves a wait as a panic that unwinds through these frames. All that
//! libpq allocates is therefore held by guards whose `Drop` calls libpq only, never PostgreSQL.

mod cancel;
mod copy;
mod library;
mod result;

use std::ffi::{CString, c_char, c_int, c_long, c_void};
use std::ops::ControlFlow;
use std::ptr::{self, NonNull};
use std::time::{Duration, Instant};

use pgrx::pg_sys;
use pq_sys::{ConnStatusType, ExecStatusType, PGTransactionStatusType, PGconn, PostgresPollingStatusType};

use self::result::{ServerResult, c_string, connection_error, text};
use crate::error::{Error, Result};

pub use self::library::{SendQuery, known_keywords, own_send_query};

/// One row, in the server's text format; `None` is NULL.
pub type Row = Vec<Option<String>>;

/// What takes the rows of a stream, in the server's text format, and says whether more are wanted.
pub type Each<'e> = dyn FnMut(&[Option<&[u8]>]) -> Result<ControlFlow<()>> + 'e;

/// What the server sees where neither the caller nor the environment names an application.
const APPLICATION_NAME: &str = "pg_crossover";

/// What the connection is in the middle of.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Idle,
    /// A statement was sent. Seen by a new call only if an interrupt cut the last one off.
    Busy,
    /// Rows are being sent; this many bytes since the last flush.
    CopyIn(usize),
    Broken,
}

/// A connection to the second server. Not `Send`: it waits on the latch of the process.
pub struct Connection {
    conn: NonNull<PGconn>,
    deadline: Option<Instant>,
    phase: Phase,
}

impl Connection {
    /// Connects with `options`, libpq's keywords and values.
    ///
    /// With `must_use_password` the options have to carry a password and the server has to ask for it: a
    /// role that is no superuser must not borrow the rights of the server's own operating system user. The
    /// option `connect_timeout`, which libpq heeds only when it blocks, shortens `deadline`. Looking up a
    /// host name is the one step that cannot be interrupted.
    ///
    /// # Errors
    /// `RemoteConnection` with libpq's message, `RemoteTimeout`, `PasswordRequired`.
    pub fn connect(options: &[(String, String)], must_use_password: bool, deadline: Option<Instant>) -> Result<Self> {
        let option = |name: &str| options.iter().rev().find(|(keyword, _)| keyword == name).map(|(_, v)| v.as_str());
        if must_use_password && option("password").is_none_or(str::is_empty) {
            return Err(Error::PasswordRequired { unused: false });
        }
        let mut names = vec![c_string("fallback_application_name")?];
        let mut values = vec![c_string(APPLICATION_NAME)?];
        for (name, value) in options {
            names.push(c_string(name)?);
            values.push(c_string(value)?);
        }
        let (names, values) = (pointers(&names), pointers(&values));
        cancel::prepare();
        // SAFETY: both arrays end in NULL and point to strings that outlive the call, which copies them.
        let conn = unsafe { pq_sys::PQconnectStartParams(names.as_ptr(), values.as_ptr(), 0) };
        let conn = NonNull::new(conn).ok_or_else(|| connection_error("out of memory"))?;
        cancel::remember(conn);
        let patience = option("connect_timeout").and_then(|t| t.parse().ok()).filter(|t| *t > 0);
        let limit = patience.map(|seconds| Instant::now() + Duration::from_secs(seconds));
        let first_deadline = deadline.into_iter().chain(limit).min();

        let mut this = Connection { conn, deadline: first_deadline, phase: Phase::Busy };
        this.establish()?;
        // SAFETY: the connection is open.
        if must_use_password && unsafe { pq_sys::PQconnectionUsedPassword(this.raw()) } == 0 {
            return Err(Error::PasswordRequired { unused: true });
        }
        this.deadline = deadline;
        this.phase = Phase::Idle;
        Ok(this)
    }

    /// Drives the connection attempt to its end.
    fn establish(&mut self) -> Result<()> {
        // SAFETY: the connection is live, and the processor ignores both of its arguments.
        unsafe { pq_sys::PQsetNoticeProcessor(self.raw(), Some(ignore_notice), ptr::null_mut()) };
        let mut events = pg_sys::WL_SOCKET_WRITEABLE;
        loop {
            if self.status() == ConnStatusType::CONNECTION_BAD {
                return Err(self.lost());
            }
            self.wait(events)?;
            // SAFETY: the socket is ready as libpq asked for.
            events = match unsafe { pq_sys::PQconnectPoll(self.raw()) } {
                PostgresPollingStatusType::PGRES_POLLING_OK => break,
                PostgresPollingStatusType::PGRES_POLLING_FAILED => return Err(self.lost()),
                PostgresPollingStatusType::PGRES_POLLING_READING => pg_sys::WL_SOCKET_READABLE,
                _ => pg_sys::WL_SOCKET_WRITEABLE,
            };
        }
        // SAFETY: the connection is open.
        match unsafe { pq_sys::PQsetnonblocking(self.raw(), 1) } {
            0 => Ok(()),
            _ => Err(self.lost()),
        }
    }

    /// Sets when every later call must have its answer.
    ///
    /// A call that has not by then sends a cancel request (which may take up to half a second more), leaves
    /// the connection broken and returns `RemoteTimeout`.
    pub fn set_deadline(&mut self, deadline: Option<Instant>) {
        self.deadline = deadline;
    }

    /// Runs one statement and returns its rows. Parameters are text; the server infers their types.
    ///
    /// # Errors
    /// `Server` as the second server reports it; `RemoteConnection`, `RemoteTimeout`: the connection is broken.
    pub fn query(&mut self, sql: &str, params: &[Option<&str>]) -> Result<Vec<Row>> {
        self.send(sql, params)?;
        self.finish()?.map_or_else(|| Ok(Vec::new()), |result| result.rows())
    }

    /// Runs one statement and returns how many rows it touched. Errors as [`Connection::query`].
    pub fn execute(&mut self, sql: &str, params: &[Option<&str>]) -> Result<u64> {
        self.send(sql, params)?;
        Ok(self.finish()?.map_or(0, |result| result.rows_affected()))
    }

    /// Runs one statement and hands its rows over one by one, as they come, so that no more than one is in memory. After `Break`, and
    /// after an error of `each`, the others are received and forgotten. Errors as [`Connection::query`].
    pub fn stream(&mut self, sql: &str, params: &[Option<&str>], each: &mut Each) -> Result<()> {
        self.send(sql, params)?;
        // SAFETY: the connection is live; a statement has just been sent, and nothing of its result is read.
        unsafe { pq_sys::PQsetSingleRowMode(self.raw()) };
        let mut stopped = None;
        self.collect_rows(&mut |row| {
            if stopped.is_none() {
                match row.with_bytes(0, |values| each(values)) {
                    Ok(ControlFlow::Continue(())) => {}
                    Ok(ControlFlow::Break(())) => stopped = Some(Ok(())),
                    Err(e) => stopped = Some(Err(e)),
                }
            }
        })?;
        stopped.unwrap_or(Ok(()))
    }

    /// Runs several statements, separated by semicolons, whose rows do not matter. Errors as [`Connection::query`].
    pub fn batch(&mut self, sql: &str) -> Result<()> {
        let sql = c_string(sql)?;
        self.begin()?;
        // SAFETY: the connection is live, and the function is the linked libpq's own.
        if unsafe { own_send_query()(self.raw(), sql.as_ptr()) } == 0 {
            return Err(self.lost());
        }
        self.finish().map(drop)
    }

    /// Whether a transaction block is open, be it an aborted one.
    pub fn in_transaction(&self) -> bool {
        // SAFETY: the connection is live.
        let status = unsafe { pq_sys::PQtransactionStatus(self.raw()) };
        !matches!(status, PGTransactionStatusType::PQTRANS_IDLE | PGTransactionStatusType::PQTRANS_UNKNOWN)
    }

    /// Whether no further statement can run on it: it was lost, timed out, or was cut off by an interrupt.
    pub fn is_broken(&self) -> bool {
        matches!(self.phase, Phase::Broken | Phase::Busy) || self.status() != ConnStatusType::CONNECTION_OK
    }

    /// Asks the server to cancel what runs on this connection; whether the request was delivered. Takes half a
    /// second at most.
    pub fn cancel(&self) -> bool {
        // SAFETY: the connection is live.
        unsafe { cancel::cancel(self.raw()) }
    }

    /// For a connection that is given up; only once, as it may take its time.
    fn cancel_active(&self) {
        cancel::forget(self.conn);
        // SAFETY: the connection is live.
        if unsafe { cancel::is_active(self.raw()) } {
            self.cancel();
        }
    }

    fn raw(&self) -> *mut PGconn {
        self.conn.as_ptr()
    }

    fn status(&self) -> ConnStatusType {
        // SAFETY: the connection is live.
        unsafe { pq_sys::PQstatus(self.raw()) }
    }

    fn begin(&mut self) -> Result<()> {
        if self.phase != Phase::Idle {
            return Err(out_of_turn());
        }
        self.phase = Phase::Busy;
        Ok(())
    }

    fn send(&mut self, sql: &str, params: &[Option<&str>]) -> Result<()> {
        let sql = c_string(sql)?;
        let texts = params.iter().map(|p| p.map(c_string).transpose()).collect::<Result<Vec<_>>>()?;
        let values: Vec<_> = texts.iter().map(|t| t.as_ref().map_or(ptr::null(), |t| t.as_ptr())).collect();
        self.begin()?;
        // SAFETY: `values` holds as many pointers as announced, NULL or to strings that outlive the call; without
        // types, lengths and formats all are text of a type that the server infers.
        let sent = unsafe {
            pq_sys::PQsendQueryParams(
                self.raw(),
                sql.as_ptr(),
                values.len() as c_int,
                ptr::null(),
                values.as_ptr(),
                ptr::null(),
                ptr::null(),
                0,
            )
        };
        if sent == 0 { Err(self.lost()) } else { Ok(()) }
    }

    /// The last result of what was sent; a COPY has no place here.
    fn finish(&mut self) -> Result<Option<ServerResult>> {
        let result = self.collect()?;
        match result.as_ref().map(ServerResult::status) {
            Some(ExecStatusType::PGRES_COPY_IN | ExecStatusType::PGRES_COPY_OUT | ExecStatusType::PGRES_COPY_BOTH) => {
                self.phase = Phase::Broken;
                Err(Error::internal("unexpected COPY on a connection to the second server"))
            }
            _ => Ok(result),
        }
    }

    /// Waits for all results of what was sent, and returns the last one, or the first error.
    fn collect(&mut self) -> Result<Option<ServerResult>> {
        self.collect_rows(&mut |_| {})
    }

    /// The same; rows that come one by one go to `each`.
    fn collect_rows(&mut self, each: &mut dyn FnMut(&ServerResult)) -> Result<Option<ServerResult>> {
        self.flush()?;
        let mut last = None;
        let mut error = None;
        loop {
            // SAFETY: the connection is live.
            while unsafe { pq_sys::PQisBusy(self.raw()) } != 0 {
                self.wait(pg_sys::WL_SOCKET_READABLE)?;
                if let Err(lost) = self.consume() {
                    // The server's last words say more than that it hung up.
                    return Err(error.unwrap_or(lost));
                }
            }
            // SAFETY: the connection is live and the result complete, so that this does not block.
            let Some(result) = (unsafe { ServerResult::next(self.raw()) }) else { break };
            match result.status() {
                ExecStatusType::PGRES_FATAL_ERROR | ExecStatusType::PGRES_BAD_RESPONSE => {
                    error.get_or_insert_with(|| result.error());
                }
                ExecStatusType::PGRES_COPY_IN | ExecStatusType::PGRES_COPY_OUT | ExecStatusType::PGRES_COPY_BOTH => {
                    return Ok(Some(result));
                }
                ExecStatusType::PGRES_SINGLE_TUPLE => each(&result),
                _ => last = Some(result),
            }
        }
        self.phase = if self.status() == ConnStatusType::CONNECTION_OK { Phase::Idle } else { Phase::Broken };
        error.map_or(Ok(last), Err)
    }

    /// Calls a function of libpq until it no longer says that its buffer is full.
    fn retry(&mut self, mut call: impl FnMut(*mut PGconn) -> c_int) -> Result<()> {
        loop {
            match call(self.raw()) {
                1 => return Ok(()),
                0 => self.wait_to_send()?,
                _ => return Err(self.lost()),
            }
        }
    }

    fn flush(&mut self) -> Result<()> {
        pgrx::check_for_interrupts!();
        loop {
            // SAFETY: the connection is live.
            match unsafe { pq_sys::PQflush(self.raw()) } {
                0 => return Ok(()),
                1 => self.wait_to_send()?,
                _ => return Err(self.lost()),
            }
        }
    }

    /// Waits until more can be sent, reading meanwhile: a server that itself waits to be read would not.
    fn wait_to_send(&mut self) -> Result<()> {
        let ready = self.wait(pg_sys::WL_SOCKET_READABLE | pg_sys::WL_SOCKET_WRITEABLE)?;
        if ready & pg_sys::WL_SOCKET_READABLE != 0 { self.consume() } else { Ok(()) }
    }

    fn consume(&mut self) -> Result<()> {
        // SAFETY: the connection is live.
        if unsafe { pq_sys::PQconsumeInput(self.raw()) } == 0 { Err(self.lost()) } else { Ok(()) }
    }

    /// Waits for `events` of the socket, the deadline or an interrupt; returns the events that came.
    ///
    /// Takes the latch's signal away: whoever waits on it for another reason must look at that reason again.
    fn wait(&mut self, events: u32) -> Result<u32> {
        loop {
            let mut wanted = pg_sys::WL_LATCH_SET | pg_sys::WL_EXIT_ON_PM_DEATH | events;
            let mut timeout: c_long = -1;
            if let Some(deadline) = self.deadline {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err(self.timed_out());
                }
                wanted |= pg_sys::WL_TIMEOUT;
                timeout = left.as_millis().saturating_add(1).min(i32::MAX as u128) as c_long;
            }
            // SAFETY: the connection is live.
            let socket = unsafe { pq_sys::PQsocket(self.raw()) };
            if socket < 0 {
                return Err(self.lost());
            }
            // SAFETY: every backend and every worker that is connected to a database owns its latch.
            let ready = unsafe {
                let latch = pg_sys::MyLatch;
                let wanted = wanted as c_int;
                let ready = pg_sys::WaitLatchOrSocket(latch, wanted, socket, timeout, pg_sys::PG_WAIT_EXTENSION) as u32;
                if ready & pg_sys::WL_LATCH_SET != 0 {
                    pg_sys::ResetLatch(latch);
                }
                ready
            };
            pgrx::check_for_interrupts!();
            if ready & events != 0 {
                return Ok(ready & events);
            }
        }
    }

    fn timed_out(&mut self) -> Error {
        self.cancel_active();
        self.phase = Phase::Broken;
        Error::RemoteTimeout
    }

    fn lost(&mut self) -> Error {
        self.phase = Phase::Broken;
        // SAFETY: the connection is live, and its message a string that stays until the next call.
        connection_error(unsafe { text(pq_sys::PQerrorMessage(self.raw())) }.as_deref().unwrap_or("connection lost"))
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // Otherwise what runs there keeps its locks until it next writes to a socket that nobody reads.
        if self.phase != Phase::Broken {
            self.cancel_active();
        }
        cancel::forget(self.conn);
        // SAFETY: nobody uses the connection after this.
        unsafe { pq_sys::PQfinish(self.raw()) };
    }
}

/// Notices of the second server are nobody's business here; libpq would print them to the server's log.
unsafe extern "C" fn ignore_notice(_: *mut c_void, _: *const c_char) {}

fn out_of_turn() -> Error {
    connection_error("the connection is in the middle of another statement, or lost")
}

/// Pointers to `strings`, ended by NULL.
fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings.iter().map(|s| s.as_ptr()).chain([ptr::null()]).collect()
}

//! Cancel requests that cannot hang their sender.
//!
//! `PQcancel` connects anew and blocks until the server has hung up: for ever if that is stopped or cut off. So
//! it runs on a thread of its own, which touches nothing but its handle and takes no signals. The sender waits
//! for it a little and then leaves it behind. Cancelling calls nothing of PostgreSQL's, so a destructor may do it.
//!
//! When PostgreSQL ends a process (`pg_terminate_backend`, shutdown) it runs no destructors. Connections are
//! therefore known here, and what still runs on them is cancelled as the process exits.

use std::cell::{Cell, RefCell};
use std::ffi::{c_char, c_int};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use pgrx::pg_sys;
use pq_sys::{PGTransactionStatusType, PGcancel, PGconn};

/// How long a cancel request may keep its caller.
const CANCEL_PATIENCE: Duration = Duration::from_millis(500);
/// How often the caller looks whether it is to be interrupted.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// And how long all those together that are sent as the process exits.
const EXIT_PATIENCE: Duration = Duration::from_millis(300);
/// Cancel requests of this process that a silent server may keep hanging; past it none is sent.
const MAX_PENDING_CANCELS: usize = 8;

thread_local! {
    /// The connections of this process.
    static OPEN: RefCell<Vec<NonNull<PGconn>>> = const { RefCell::new(Vec::new()) };
    /// Whether PostgreSQL was told to call [`at_exit`].
    static REGISTERED: Cell<bool> = const { Cell::new(false) };
}

/// Has PostgreSQL call [`at_exit`] in this process. Comes before the first connection, as it can fail.
pub(super) fn prepare() {
    if !REGISTERED.get() {
        // SAFETY: the function stays, as PostgreSQL never unloads a module.
        unsafe { pg_sys::before_shmem_exit(Some(at_exit), pg_sys::Datum::from(0)) };
        REGISTERED.set(true);
    }
}

/// Remembers a connection until [`forget`].
pub(super) fn remember(conn: NonNull<PGconn>) {
    OPEN.with_borrow_mut(|open| open.push(conn));
}

/// Forgets a connection, which is about to be closed.
pub(super) fn forget(conn: NonNull<PGconn>) {
    OPEN.with_borrow_mut(|open| open.retain(|other| *other != conn));
}

/// Whether a statement runs on `conn`.
///
/// # Safety
/// `conn` is a live connection.
pub(super) unsafe fn is_active(conn: *mut PGconn) -> bool {
    // SAFETY: as the caller vouches.
    unsafe { pq_sys::PQtransactionStatus(conn) == PGTransactionStatusType::PQTRANS_ACTIVE }
}

#[pgrx::pg_guard]
unsafe extern "C-unwind" fn at_exit(_code: c_int, _arg: pg_sys::Datum) {
    let until = Instant::now() + EXIT_PATIENCE;
    // SAFETY: a connection is forgotten before it is closed.
    let active = |conn: &NonNull<PGconn>| unsafe { is_active(conn.as_ptr()) };
    // SAFETY: as above.
    let sent: Vec<_> =
        OPEN.take().into_iter().filter(active).filter_map(|conn| unsafe { begin(conn.as_ptr()) }).collect();
    for answer in sent {
        let _ = answer.recv_timeout(until.saturating_duration_since(Instant::now()));
    }
}

/// Asks the server to cancel what runs on `conn`; whether the request was delivered within half a second. Does not wait any longer when this
/// process itself is to be interrupted.
///
/// # Safety
/// `conn` is a live connection.
pub(super) unsafe fn cancel(conn: *mut PGconn) -> bool {
    // SAFETY: as the caller vouches.
    let Some(answer) = (unsafe { begin(conn) }) else { return false };
    let until = Instant::now() + CANCEL_PATIENCE;
    loop {
        match answer.recv_timeout(LOOK_EVERY) {
            Ok(delivered) => return delivered,
            Err(RecvTimeoutError::Disconnected) => return false,
            Err(RecvTimeoutError::Timeout) if Instant::now() >= until || is_interrupted() => return false,
            Err(RecvTimeoutError::Timeout) => {}
        }
    }
}

fn is_interrupted() -> bool {
    // SAFETY: a flag of this process that signal handlers set; no more than a look at it.
    unsafe { (&raw const pg_sys::InterruptPending).read_volatile() != 0 }
}

/// Sends a cancel request for what runs on `conn`, and does not wait.
///
/// # Safety
/// `conn` is a live connection.
unsafe fn begin(conn: *mut PGconn) -> Option<Receiver<bool>> {
    // SAFETY: as the caller vouches; the handle is ours.
    NonNull::new(unsafe { pq_sys::PQgetCancel(conn) }).and_then(|handle| CancelHandle(handle).send())
}

/// What libpq needs to cancel a statement, apart from the connection itself.
struct CancelHandle(NonNull<PGcancel>);

// SAFETY: the handle is a copy of address and key that shares nothing with the connection; libpq documents that
// it may be used on another thread.
unsafe impl Send for CancelHandle {}

impl CancelHandle {
    /// Sends the request from a thread, which says in the end whether it was delivered.
    fn send(self) -> Option<Receiver<bool>> {
        static PENDING: AtomicUsize = AtomicUsize::new(0);
        if PENDING.fetch_add(1, Ordering::Relaxed) >= MAX_PENDING_CANCELS {
            PENDING.fetch_sub(1, Ordering::Relaxed);
            return None;
        }
        let (done, answer) = mpsc::sync_channel(1);
        let request = move || {
            let sent = self.deliver();
            PENDING.fetch_sub(1, Ordering::Relaxed);
            // The caller may have stopped waiting.
            let _ = done.send(sent);
        };
        let thread = without_signals(|| std::thread::Builder::new().name("cancel".into()).spawn(request));
        if thread.is_err() {
            PENDING.fetch_sub(1, Ordering::Relaxed);
        }
        thread.is_ok().then_some(answer)
    }

    fn deliver(&self) -> bool {
        let mut message = [0 as c_char; 256];
        // SAFETY: the handle is live and the buffer as long as said.
        unsafe { pq_sys::PQcancel(self.0.as_ptr(), message.as_mut_ptr(), message.len() as c_int) != 0 }
    }
}

impl Drop for CancelHandle {
    fn drop(&mut self) {
        // SAFETY: nobody uses the handle after this.
        unsafe { pq_sys::PQfreeCancel(self.0.as_ptr()) };
    }
}

/// Runs `start` with all signals blocked: a thread inherits the mask, and PostgreSQL's handlers must run on
/// the thread that PostgreSQL knows.
fn without_signals<T>(start: impl FnOnce() -> T) -> T {
    // SAFETY: both masks are initialised by the calls; the old one is restored before anyone else runs here.
    unsafe {
        let (mut all, mut before): (libc::sigset_t, libc::sigset_t) = (std::mem::zeroed(), std::mem::zeroed());
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut before);
        let result = start();
        libc::pthread_sigmask(libc::SIG_SETMASK, &before, ptr::null_mut());
        result
    }
}

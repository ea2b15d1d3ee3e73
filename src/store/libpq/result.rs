//! What a server answered: the rows, the count or the error of one result, and text in and out of libpq.

use std::ffi::{CStr, CString, c_char, c_int};
use std::ptr::NonNull;

use pq_sys::{ExecStatusType, PGconn, PGresult};

use super::Row;
use crate::error::{Error, Result, ServerError, Side};

/// A result, cleared with its guard.
pub(super) struct ServerResult(NonNull<PGresult>);

impl ServerResult {
    /// The next result of what was sent to `conn`; `None` after the last one. Blocks while one is incomplete.
    ///
    /// # Safety
    /// `conn` is a live connection.
    pub(super) unsafe fn next(conn: *mut PGconn) -> Option<Self> {
        // SAFETY: as the caller vouches; the result is ours.
        NonNull::new(unsafe { pq_sys::PQgetResult(conn) }).map(ServerResult)
    }

    fn raw(&self) -> *mut PGresult {
        self.0.as_ptr()
    }

    pub(super) fn status(&self) -> ExecStatusType {
        // SAFETY: the result is live.
        unsafe { pq_sys::PQresultStatus(self.raw()) }
    }

    pub(super) fn rows(&self) -> Result<Vec<Row>> {
        // SAFETY: the result is live.
        let rows = unsafe { pq_sys::PQntuples(self.raw()) };
        (0..rows)
            .map(|row| self.with_bytes(row, |values| values.iter().map(|v| v.map(utf8).transpose()).collect()))
            .collect()
    }

    /// Passes the values of a row, which exists, to `f`.
    pub(super) fn with_bytes<T>(&self, row: c_int, f: impl FnOnce(&[Option<&[u8]>]) -> T) -> T {
        // SAFETY: the result is live.
        let columns = unsafe { pq_sys::PQnfields(self.raw()) };
        // SAFETY: row and column exist; a value is as long as said and stays as long as the result.
        let value = |column: c_int| unsafe {
            (pq_sys::PQgetisnull(self.raw(), row, column) == 0).then(|| {
                let length = pq_sys::PQgetlength(self.raw(), row, column) as usize;
                std::slice::from_raw_parts(pq_sys::PQgetvalue(self.raw(), row, column).cast::<u8>(), length)
            })
        };
        f(&(0..columns).map(value).collect::<Vec<_>>())
    }

    pub(super) fn rows_affected(&self) -> u64 {
        // SAFETY: the result is live; the answer is a number in digits, or empty.
        unsafe { text(pq_sys::PQcmdTuples(self.raw())) }.and_then(|n| n.parse().ok()).unwrap_or(0)
    }

    /// The error that this result reports; without a SQLSTATE it is libpq's own, about the connection.
    pub(super) fn error(&self) -> Error {
        // SAFETY: the result is live; a field is NULL or a string that stays as long as the result.
        let field = |code: u8| unsafe { text(pq_sys::PQresultErrorField(self.raw(), c_int::from(code))) };
        let Some(sqlstate) = field(pq_sys::PG_DIAG_SQLSTATE) else {
            // SAFETY: as above.
            let message = unsafe { text(pq_sys::PQresultErrorMessage(self.raw())) };
            return connection_error(message.as_deref().unwrap_or("connection lost"));
        };
        let error = ServerError {
            sqlstate,
            message: field(pq_sys::PG_DIAG_MESSAGE_PRIMARY).unwrap_or_default(),
            detail: field(pq_sys::PG_DIAG_MESSAGE_DETAIL),
            hint: field(pq_sys::PG_DIAG_MESSAGE_HINT),
        };
        Error::Server { side: Side::Second, error }
    }
}

impl Drop for ServerResult {
    fn drop(&mut self) {
        // SAFETY: nobody uses the result after this.
        unsafe { pq_sys::PQclear(self.raw()) };
    }
}

/// A database in SQL_ASCII sends what it has, whatever the client asked for.
fn utf8(bytes: &[u8]) -> Result<String> {
    String::from_utf8(bytes.to_vec()).map_err(|_| bad_text("a value of the second server is not UTF-8"))
}

pub(super) fn connection_error(message: &str) -> Error {
    Error::RemoteConnection { message: message.trim_end().to_string() }
}

pub(super) fn bad_text(message: &str) -> Error {
    let error = ServerError { sqlstate: "22021".into(), message: message.into(), detail: None, hint: None };
    Error::Server { side: Side::Second, error }
}

pub(super) fn c_string(text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| bad_text("text for the second server contains a null character"))
}

/// A copy of a C string; `None` for NULL.
///
/// # Safety
/// `s` is NULL or points to a string that is valid during the call.
pub(super) unsafe fn text(s: *const c_char) -> Option<String> {
    // SAFETY: as the caller vouches.
    (!s.is_null()).then(|| unsafe { CStr::from_ptr(s) }.to_string_lossy().into_owned())
}

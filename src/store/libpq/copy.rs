//! Rows in bulk: COPY towards the second server, no faster than it takes them.

use std::ffi::c_int;
use std::ptr;

use pq_sys::ExecStatusType;

use super::result::c_string;
use super::{Connection, Phase, out_of_turn};
use crate::error::{Error, Result};

/// Bytes handed to libpq between two looks at whether the server takes them.
const COPY_WINDOW: usize = 64 * 1024;

impl Connection {
    /// Begins `COPY ... FROM STDIN`; rows follow by [`Connection::copy_data`]. Errors as [`Connection::query`].
    pub fn copy_in(&mut self, sql: &str) -> Result<()> {
        self.send(sql, &[])?;
        match self.collect()? {
            Some(result) if result.status() == ExecStatusType::PGRES_COPY_IN => {
                self.phase = Phase::CopyIn(0);
                Ok(())
            }
            _ => Err(Error::internal("the statement is no COPY FROM STDIN")),
        }
    }

    /// Sends bytes of a copy, waiting as the server takes them. A row that the server refuses is reported by
    /// [`Connection::copy_end`].
    pub fn copy_data(&mut self, data: &[u8]) -> Result<()> {
        for piece in data.chunks(COPY_WINDOW) {
            let Phase::CopyIn(unflushed) = self.phase else { return Err(out_of_turn()) };
            // SAFETY: `piece` is valid for its length, which fits, and libpq copies it.
            self.retry(|conn| unsafe { pq_sys::PQputCopyData(conn, piece.as_ptr().cast(), piece.len() as c_int) })?;
            self.phase = Phase::CopyIn(unflushed + piece.len());
            if unflushed + piece.len() >= COPY_WINDOW {
                self.flush()?;
                self.phase = Phase::CopyIn(0);
            }
        }
        Ok(())
    }

    /// Ends a copy and returns the number of rows; with `error` the server is told to forget them, and 0 is returned.
    ///
    /// # Errors
    /// As [`Connection::query`]; the server's verdict on any row of the copy comes here.
    pub fn copy_end(&mut self, error: Option<&str>) -> Result<u64> {
        let Phase::CopyIn(_) = self.phase else { return Err(out_of_turn()) };
        let reason = error.map(c_string).transpose()?;
        let reason = reason.as_ref().map_or(ptr::null(), |r| r.as_ptr());
        // SAFETY: `reason` is NULL or a string that outlives the calls.
        self.retry(|conn| unsafe { pq_sys::PQputCopyEnd(conn, reason) })?;
        self.phase = Phase::Busy;
        match self.finish() {
            Err(Error::Server { error: refused, .. }) if error.is_some() && refused.sqlstate == "57014" => Ok(0),
            Err(error) => Err(error),
            Ok(result) => Ok(result.map_or(0, |r| r.rows_affected())),
        }
    }
}

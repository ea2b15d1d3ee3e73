//! Whether anybody still waits for a request.
//!
//! A function that waits for its answer holds an advisory lock, which PostgreSQL takes away when the function is cancelled (its transaction
//! aborts) or its process ends, however that comes about. So whoever carries a request out can tell, without a message that might not be
//! sent, that it is not wanted any more. Between two attempts it then stops; an attempt itself is never cut off.

use std::sync::atomic::{AtomicU32, Ordering};

use pgrx::pg_sys;
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::store::local::catch;

/// In the last field of the lock's tag: a value that pg_advisory_lock() never uses.
const KIND: u16 = 0x7064;

/// One call of a function that waits.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Caller {
    pub pid: i32,
    /// Which of the calls of that process.
    pub call: u32,
}

impl Caller {
    /// This process begins to wait, until [`Caller::leave`] or the end of its (sub)transaction.
    pub fn here() -> Caller {
        static CALLS: AtomicU32 = AtomicU32::new(0);
        // SAFETY: this process's pid; a lock of the transaction that is open here, which nobody else can hold.
        unsafe {
            let caller = Caller { pid: pg_sys::MyProcPid, call: CALLS.fetch_add(1, Ordering::Relaxed) };
            pg_sys::LockAcquire(&caller.tag(), pg_sys::ExclusiveLock as i32, false, true);
            caller
        }
    }

    /// It has its answer.
    pub fn leave(self) {
        // SAFETY: the lock that `here` took.
        unsafe { pg_sys::LockRelease(&self.tag(), pg_sys::ExclusiveLock as i32, false) };
    }

    /// From another process. In the open transaction, or in one of its own.
    pub fn is_waiting(self) -> Result<bool> {
        // SAFETY: a session lock, which needs a transaction only to be taken in, is given back at once.
        catch(|| unsafe {
            let outside = !pg_sys::IsTransactionState();
            if outside {
                pg_sys::StartTransactionCommand();
            }
            let tag = self.tag();
            let taken = pg_sys::LockAcquire(&tag, pg_sys::ShareLock as i32, true, true);
            let waiting = taken == pg_sys::LockAcquireResult::LOCKACQUIRE_NOT_AVAIL;
            if !waiting {
                pg_sys::LockRelease(&tag, pg_sys::ShareLock as i32, true);
            }
            if outside {
                pg_sys::CommitTransactionCommand();
            }
            waiting
        })
    }

    fn tag(self) -> pg_sys::LOCKTAG {
        pg_sys::LOCKTAG {
            // SAFETY: set when the process connected.
            locktag_field1: unsafe { pg_sys::MyDatabaseId }.to_u32(),
            locktag_field2: self.pid as u32,
            locktag_field3: self.call,
            locktag_field4: KIND,
            locktag_type: pg_sys::LockTagType::LOCKTAG_ADVISORY as u8,
            locktag_lockmethodid: pg_sys::USER_LOCKMETHOD as u8,
        }
    }
}

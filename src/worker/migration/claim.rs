//! One worker for each migration: the lock by which it serves it, and others see that it does.

use pgrx::pg_sys;

use super::my_database;
use crate::error::Result;
use crate::store::local::catch;

/// Only one worker serves a migration, however many were started (the postmaster restarts one, the launcher's scout starts one).
///
/// An advisory lock of the session: an ordinary one would go with the first transaction that aborts. Its last field is one that
/// pg_advisory_lock() never uses, so nobody else can take it.
pub(super) fn claim(id: i32) -> Result<bool> {
    // SAFETY: a session lock of this database; released when the process ends.
    catch(|| unsafe {
        pg_sys::StartTransactionCommand();
        let result = pg_sys::LockAcquire(&claim_tag(id), pg_sys::ExclusiveLock as i32, true, true);
        pg_sys::CommitTransactionCommand();
        result != pg_sys::LockAcquireResult::LOCKACQUIRE_NOT_AVAIL
    })
}

/// Whether a worker serves this migration; it may come or go the next moment.
pub fn has_worker(id: i32) -> Result<bool> {
    // SAFETY: a lock of the transaction, given back with it.
    catch(|| unsafe {
        pg_sys::StartTransactionCommand();
        let result = pg_sys::LockAcquire(&claim_tag(id), pg_sys::ShareLock as i32, false, true);
        pg_sys::CommitTransactionCommand();
        result == pg_sys::LockAcquireResult::LOCKACQUIRE_NOT_AVAIL
    })
}

fn claim_tag(id: i32) -> pg_sys::LOCKTAG {
    const KIND: u16 = 0x7063;
    pg_sys::LOCKTAG {
        locktag_field1: my_database().to_u32(),
        locktag_field2: 0,
        locktag_field3: id as u32,
        locktag_field4: KIND,
        locktag_type: pg_sys::LockTagType::LOCKTAG_ADVISORY as u8,
        locktag_lockmethodid: pg_sys::USER_LOCKMETHOD as u8,
    }
}

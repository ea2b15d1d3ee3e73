//! What a scout tells the launcher: the migrations of its database that need a worker. The launcher is connected to no database, and a scout
//! has gone by the time that a slot is free.

use pgrx::pg_sys;

use super::Assignment;

/// Migrations that fit in. A server with more of them than it can have workers gets the others at the launcher's next look.
const ROOM: usize = 1000;
const ENTRY: usize = 8;
const HEADER: usize = 8;

/// A dynamic shared memory segment: how many, plus one (zero: no report yet), then owner and id of each.
pub struct Roster(*mut pg_sys::dsm_segment);

impl Roster {
    pub fn create() -> Roster {
        // SAFETY: the segment is as long as what is written into it; nobody else knows it yet.
        unsafe {
            let segment = pg_sys::dsm_create(HEADER + ROOM * ENTRY, 0);
            pg_sys::dsm_segment_address(segment).cast::<u64>().write(0);
            Roster(segment)
        }
    }

    pub fn handle(&self) -> u32 {
        // SAFETY: the segment is mapped while this value lives.
        unsafe { pg_sys::dsm_segment_handle(self.0) }
    }

    pub fn attach(handle: u32) -> Option<Roster> {
        // SAFETY: null when the launcher is gone.
        let segment = unsafe { pg_sys::dsm_attach(handle) };
        (!segment.is_null()).then_some(Roster(segment))
    }

    /// Reports `(owner, id)` of each migration.
    pub fn report(&self, migrations: &[(u32, i32)]) {
        let listed = &migrations[..migrations.len().min(ROOM)];
        // SAFETY: within the segment, which is aligned to a page; the number is written last, and read after the scout has ended.
        unsafe {
            let base = pg_sys::dsm_segment_address(self.0).cast::<u8>();
            for (i, (owner, id)) in listed.iter().enumerate() {
                let entry = base.add(HEADER + i * ENTRY).cast::<u32>();
                entry.write(*owner);
                entry.add(1).write(*id as u32);
            }
            std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
            base.cast::<u64>().write_volatile(listed.len() as u64 + 1);
        }
    }

    /// The report, once the scout has ended; None when it ended without one.
    pub fn read(self, database: pg_sys::Oid) -> Option<Vec<Assignment>> {
        // SAFETY: as in `report`; nobody uses the address after the segment is given back.
        unsafe {
            let base = pg_sys::dsm_segment_address(self.0).cast::<u8>();
            let count = base.cast::<u64>().read_volatile();
            std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
            let listed = count.checked_sub(1).map(|n| {
                (0..(n as usize).min(ROOM))
                    .map(|i| {
                        let entry = base.add(HEADER + i * ENTRY).cast::<u32>();
                        Assignment { database, role: pg_sys::Oid::from(entry.read()), number: entry.add(1).read() }
                    })
                    .collect()
            });
            pg_sys::dsm_detach(self.0);
            listed
        }
    }
}

//! Background workers: a launcher for the cluster, a scout for each database at its start, one worker for each migration,
//! copy workers, and short-lived clerks that file a caller's request outside the caller's transaction.

pub mod clerk;
pub mod copier;
mod gone;
pub mod launcher;
pub mod migration;
mod roster;

use std::ffi::{CStr, CString, c_char, c_int};

use pgrx::pg_sys;

use crate::error::{Error, Result};

/// What a worker is told at its start; it travels in `bgw_extra`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Assignment {
    pub database: pg_sys::Oid,
    pub role: pg_sys::Oid,
    /// A migration's id, or the handle of a clerk's or scout's memory segment.
    pub number: u32,
}

/// How a kind of worker is registered.
struct Kind {
    /// Also its `backend_type` in pg_stat_activity.
    kind: &'static str,
    function: &'static str,
    /// Seconds after which the postmaster starts it again when it exits with an error, or the cluster restarts after a crash.
    restart: Option<i32>,
}

/// The application_name of a worker is this, then the name of its migration.
pub const APPLICATION: &str = "pg_crossover";
/// `backend_type` of the workers that stay in their database; a scout or a clerk is gone in a moment.
pub const LASTING: [&str; 2] = [MIGRATION.kind, COPY.kind];

const LAUNCHER: Kind = Kind { kind: "pg_crossover launcher", function: "crossover_launcher_main", restart: Some(5) };
const SCOUT: Kind = Kind { kind: "pg_crossover scout", function: "crossover_scout_main", restart: None };
const MIGRATION: Kind = Kind { kind: "pg_crossover migration", function: "crossover_migration_main", restart: Some(1) };
const COPY: Kind = Kind { kind: "pg_crossover copy", function: "crossover_copy_main", restart: None };
const CLERK: Kind = Kind { kind: "pg_crossover clerk", function: "crossover_clerk_main", restart: None };

fn fill(target: &mut [c_char], text: &str) {
    for (slot, byte) in target.iter_mut().zip(text.bytes().take(pg_sys::BGW_MAXLEN as usize - 1)) {
        *slot = byte as c_char;
    }
}

fn describe(kind: &Kind, assignment: Assignment, notify: bool) -> pg_sys::BackgroundWorker {
    // SAFETY: all-zero is a valid value of this plain C struct.
    let mut worker: pg_sys::BackgroundWorker = unsafe { std::mem::zeroed() };
    fill(
        &mut worker.bgw_name,
        &match kind.kind {
            "pg_crossover migration" => format!("pg_crossover migration {}", assignment.number),
            other => other.to_string(),
        },
    );
    fill(&mut worker.bgw_type, kind.kind);
    fill(&mut worker.bgw_library_name, "pg_crossover");
    fill(&mut worker.bgw_function_name, kind.function);
    worker.bgw_flags = (pg_sys::BGWORKER_SHMEM_ACCESS | pg_sys::BGWORKER_BACKEND_DATABASE_CONNECTION) as i32;
    worker.bgw_start_time = pg_sys::BgWorkerStartTime::BgWorkerStart_RecoveryFinished;
    worker.bgw_restart_time = kind.restart.unwrap_or(pg_sys::BGW_NEVER_RESTART);
    for (slot, byte) in worker.bgw_extra.iter_mut().zip(pack(assignment)) {
        *slot = byte as c_char;
    }
    // SAFETY: MyProcPid is this process's pid.
    worker.bgw_notify_pid = if notify { unsafe { pg_sys::MyProcPid } } else { 0 };
    worker
}

fn pack(a: Assignment) -> [u8; 12] {
    let mut bytes = [0; 12];
    bytes[0..4].copy_from_slice(&a.database.to_u32().to_ne_bytes());
    bytes[4..8].copy_from_slice(&a.role.to_u32().to_ne_bytes());
    bytes[8..12].copy_from_slice(&a.number.to_ne_bytes());
    bytes
}

/// What this worker was told.
fn assignment() -> Assignment {
    // SAFETY: MyBgworkerEntry is set in every background worker; bgw_extra is at least 12 bytes long.
    let extra = unsafe { (*pg_sys::MyBgworkerEntry).bgw_extra };
    let word =
        |i: usize| u32::from_ne_bytes([extra[i] as u8, extra[i + 1] as u8, extra[i + 2] as u8, extra[i + 3] as u8]);
    Assignment { database: pg_sys::Oid::from(word(0)), role: pg_sys::Oid::from(word(4)), number: word(8) }
}

/// Registers the launcher; from `_PG_init`, while the postmaster preloads.
pub fn register_launcher() {
    let nothing = Assignment { database: pg_sys::InvalidOid, role: pg_sys::InvalidOid, number: 0 };
    let mut worker = describe(&LAUNCHER, nothing, false);
    // SAFETY: called while shared_preload_libraries are processed; the struct is copied.
    unsafe { pg_sys::RegisterBackgroundWorker(&mut worker) }
}

/// A worker that was started.
pub struct Handle(*mut pg_sys::BackgroundWorkerHandle);

impl Handle {
    /// The pid while it runs; None before and after.
    pub fn has_stopped(&self) -> bool {
        let mut pid = 0;
        // SAFETY: the handle came from RegisterDynamicBackgroundWorker and is not freed while this value lives.
        unsafe { pg_sys::GetBackgroundWorkerPid(self.0, &mut pid) == pg_sys::BgwHandleStatus::BGWH_STOPPED }
    }
}

fn start(kind: &Kind, assignment: Assignment) -> Result<Handle> {
    let mut worker = describe(kind, assignment, true);
    let mut handle = std::ptr::null_mut();
    // SAFETY: the struct is copied into shared memory; the handle is allocated in a context that outlives the transaction.
    let started = unsafe {
        let old = pg_sys::MemoryContextSwitchTo(pg_sys::TopMemoryContext);
        let started = pg_sys::RegisterDynamicBackgroundWorker(&mut worker, &mut handle);
        pg_sys::MemoryContextSwitchTo(old);
        started
    };
    if started { Ok(Handle(handle)) } else { Err(Error::NoWorkerSlot { limit: max_worker_processes() }) }
}

pub fn start_scout(database: pg_sys::Oid, roster: u32) -> Result<Handle> {
    start(&SCOUT, Assignment { database, role: pg_sys::InvalidOid, number: roster })
}

/// `migration`: its database, its owner, its id.
pub fn start_migration(migration: Assignment) -> Result<Handle> {
    start(&MIGRATION, migration)
}

/// The setting: slots for all background workers of the server.
pub fn max_worker_processes() -> i32 {
    // SAFETY: a setting that does not change while the server runs.
    unsafe { pg_sys::max_worker_processes }
}

pub fn start_copy(database: pg_sys::Oid, owner: pg_sys::Oid, id: i32) -> Result<Handle> {
    start(&COPY, Assignment { database, role: owner, number: id as u32 })
}

pub fn start_clerk(database: pg_sys::Oid, segment: u32) -> Result<Handle> {
    start(&CLERK, Assignment { database, role: pg_sys::InvalidOid, number: segment })
}

// PostgreSQL's own signal handlers, as function pointers (pgrx wraps them in guards, which a signal handler must not have).
unsafe extern "C-unwind" {
    fn die(signal: c_int);
    fn SignalHandlerForConfigReload(signal: c_int);
}

#[cfg(not(feature = "pg18"))]
use pg_sys::pqsignal as install;
#[cfg(feature = "pg18")]
use pg_sys::pqsignal_be as install;

/// An owner without LOGIN can have a worker, where PostgreSQL allows that (BGWORKER_BYPASS_ROLELOGINCHECK).
const BYPASS_LOGIN: u32 = if crate::owner::NEEDS_LOGIN { 0 } else { 2 };

/// Signals and the database connection of a worker. `die` lets a wait or a long statement be ended at once.
fn connect(assignment: Assignment) {
    // SAFETY: the first thing that a background worker does; the handlers are PostgreSQL's own.
    unsafe {
        install(pg_sys::SIGTERM as i32, Some(die));
        install(pg_sys::SIGHUP as i32, Some(SignalHandlerForConfigReload));
        pg_sys::BackgroundWorkerUnblockSignals();
        gone::watch(true);
        pg_sys::BackgroundWorkerInitializeConnectionByOid(assignment.database, assignment.role, BYPASS_LOGIN);
        gone::watch(false);
    }
}

/// Shows whose worker this is, as its application_name.
fn show_name(migration: &str) {
    let Ok(name) = CString::new(format!("{APPLICATION} {migration}")) else { return };
    // SAFETY: sets a setting of this process, outside a transaction; the name is copied.
    unsafe {
        pg_sys::SetConfigOption(
            c"application_name".as_ptr(),
            name.as_ptr(),
            pg_sys::GucContext::PGC_USERSET,
            pg_sys::GucSource::PGC_S_SESSION,
        );
    }
}

/// Reads the configuration again after SIGHUP.
fn reload_configuration() {
    // SAFETY: the flag is set by the signal handler; ProcessConfigFile is what PostgreSQL's own loops call.
    unsafe {
        if pg_sys::ConfigReloadPending != 0 {
            pg_sys::ConfigReloadPending = 0;
            pg_sys::ProcessConfigFile(pg_sys::GucContext::PGC_SIGHUP);
        }
    }
}

fn exit(code: i32) -> ! {
    // SAFETY: ends this process in PostgreSQL's way.
    unsafe { pg_sys::proc_exit(code) };
    #[allow(unreachable_code)]
    {
        unreachable!("proc_exit does not return")
    }
}

/// This database's oid.
pub fn my_database() -> pg_sys::Oid {
    // SAFETY: set when the process connected.
    unsafe { pg_sys::MyDatabaseId }
}

/// Is the library preloaded, that is: is there a launcher?
pub fn is_preloaded() -> bool {
    // SAFETY: reads a setting's value, a NUL-terminated string or null.
    unsafe {
        let list = pg_sys::shared_preload_libraries_string;
        !list.is_null()
            && CStr::from_ptr(list)
                .to_string_lossy()
                .split(',')
                .any(|l| l.trim().trim_matches('"').ends_with("pg_crossover"))
    }
}

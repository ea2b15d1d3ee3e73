//! Isolation of clients on the second store: remote transactions of a READ COMMITTED client are READ COMMITTED.
//!
//! postgres_fdw opens every remote transaction REPEATABLE READ, so that a client that never met a serialization
//! failure on its tables would meet one on every hot row once they have moved. The wrapper has no option for
//! it. But a preloaded library comes before libpq in the loader's search for symbols, so the function
//! [`PQsendQuery`] that this file exports is the one that postgres_fdw calls. It passes everything through
//! unchanged, except for one statement of one kind of transaction to the server of a migration.
//!
//! The price: as with any READ COMMITTED transaction, two statements may see two snapshots, and so may the two
//! remote scans of one statement. `crossover.remote_isolation = 'repeatable read'` turns it off for a session.
//!
//! This file must work whatever else is loaded: it decides with catalog reads alone (no SPI, no subtransaction,
//! no other user) and passes on what it is not sure of. A server that is given by `service` alone is not recognised.

mod target;

use std::cell::RefCell;
use std::ffi::{CStr, OsStr, c_char, c_int, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use pgrx::pg_sys;
use pq_sys::PGconn;

use self::target::{Endpoint, Target};
use crate::store::libpq::{SendQuery, own_send_query};

/// What postgres_fdw begins a remote transaction with, unless the local one is SERIALIZABLE.
const REPEATABLE_READ: &CStr = c"START TRANSACTION ISOLATION LEVEL REPEATABLE READ";
const READ_COMMITTED: &CStr = c"START TRANSACTION ISOLATION LEVEL READ COMMITTED";

/// Modules of the server's own that link its libpq, in the order in which they are asked for it.
const LIBPQ_USERS: [&str; 3] = ["postgres_fdw", "libpqwalreceiver", "dblink"];

type Accessor = unsafe extern "C-unwind" fn(*const PGconn) -> *const c_char;

/// Whether [`init`] ran; a library that is loaded later than postgres_fdw is not asked in any case.
static PRELOADED: AtomicBool = AtomicBool::new(false);
/// Counts the changes after which [`SERVERS`] has to be read again.
static CHANGES: AtomicU64 = AtomicU64::new(0);

/// The servers that the migrations of this database use.
struct Servers {
    /// The table that they were read from; none while the extension is not installed.
    table: pg_sys::Oid,
    /// [`CHANGES`] when they were read.
    changes: u64,
    targets: Vec<Target>,
}

thread_local! {
    static SERVERS: RefCell<Servers> =
        const { RefCell::new(Servers { table: pg_sys::InvalidOid, changes: 0, targets: Vec::new() }) };
}

/// Makes the function effective; only from `_PG_init` of a preloaded library.
///
/// Warns when another preloaded library has brought libpq in before, whose `PQsendQuery` then is found first.
pub fn init() {
    PRELOADED.store(true, Ordering::Relaxed);
    // SAFETY: both callbacks only count. Any change of a relation makes the servers stale, as a migration
    // changes relations after its row is committed; reading them again costs less than one message to the server.
    unsafe {
        pg_sys::CacheRegisterRelcacheCallback(Some(relation_changed), pg_sys::Datum::from(0));
        let servers = pg_sys::SysCacheIdentifier::FOREIGNSERVEROID as c_int;
        pg_sys::CacheRegisterSyscacheCallback(servers, Some(server_changed), pg_sys::Datum::from(0));
    }
    if !is_effective() {
        let message = "crossover.remote_isolation has no effect: another library has loaded libpq before pg_crossover";
        pg_sys::panic::ErrorReport::new(pgrx::PgSqlErrorCode::ERRCODE_WARNING, message, "pg_crossover")
            .set_hint("List pg_crossover first in shared_preload_libraries.")
            .report(pgrx::PgLogLevel::WARNING);
    }
}

/// Whether postgres_fdw, loaded after this library, calls the function of this file.
pub fn is_effective() -> bool {
    // SAFETY: a look-up without effects.
    let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"PQsendQuery".as_ptr()) };
    PRELOADED.load(Ordering::Relaxed) && is_in_this_library(found)
}

/// Whether `address` is in this library. (The address of an exported function would not tell: the loader gives
/// us, too, the function that comes first.)
fn is_in_this_library(address: *const c_void) -> bool {
    let library_of = |address: *const c_void| {
        // SAFETY: a look-up that fills `info` where it finds the address, and takes any.
        unsafe {
            let mut info: libc::Dl_info = std::mem::zeroed();
            (libc::dladdr(address, &mut info) != 0).then_some(info.dli_fbase)
        }
    };
    let here = library_of((&raw const PRELOADED).cast());
    here.is_some() && here == library_of(address)
}

/// libpq's `PQsendQuery`, with the one change that this file is about.
///
/// # Safety
/// As for libpq's: `conn` is NULL or a connection, `query` NULL or a string. Called by C code on the main thread.
// Not in a test binary: libpq itself would call it there, and nothing of a server could be left out at link time.
#[cfg_attr(not(test), unsafe(no_mangle))]
#[cfg_attr(test, allow(dead_code))]
#[allow(non_snake_case)]
pub unsafe extern "C-unwind" fn PQsendQuery(conn: *mut PGconn, query: *const c_char) -> c_int {
    let mut query = query;
    // SAFETY: as the caller vouches.
    if !query.is_null() && !conn.is_null() && unsafe { CStr::from_ptr(query) } == REPEATABLE_READ {
        // SAFETY: a PostgreSQL error leaves this frame as it would leave postgres_fdw's wait for the answer; there
        // is nothing here to destroy. Rust's panics become errors before C sees them.
        if unsafe { pg_sys::panic::pgrx_extern_c_guard(|| wants_read_committed(conn)) } {
            query = READ_COMMITTED.as_ptr();
        }
    }
    // SAFETY: the function has this type, and comes from the library that made `conn`.
    unsafe { real_send_query()(conn, query) }
}

/// Whether a transaction that begins on `conn` is to be READ COMMITTED.
///
/// May take ACCESS SHARE on `crossover.migration` for the time of a read, never waits for it. What can be foreseen
/// to fail says no. An error of the catalog read itself is not swallowed: without a subtransaction that
/// would leave its locks and pins behind.
fn wants_read_committed(conn: *mut PGconn) -> bool {
    // SAFETY: plain variables of the process, and a look at its transaction state.
    let applies = unsafe {
        PRELOADED.load(Ordering::Relaxed)
            && pg_sys::MyDatabaseId != pg_sys::InvalidOid
            && pg_sys::IsTransactionState()
            && pg_sys::XactIsoLevel < pg_sys::XACT_REPEATABLE_READ as c_int
    };
    applies && crate::settings::remote_isolation_matches() && leads_to_migration(conn)
}

fn leads_to_migration(conn: *mut PGconn) -> bool {
    let Some(library) = server_library() else { return false };
    refresh_servers();
    SERVERS.with_borrow(|servers| {
        if servers.targets.is_empty() {
            return false;
        }
        // SAFETY: the functions come from the library that made `conn`, and their strings stay as long as it.
        let part = |function: Accessor| unsafe {
            let text = function(conn);
            if text.is_null() { "" } else { CStr::from_ptr(text).to_str().unwrap_or_default() }
        };
        let end = Endpoint {
            host: part(library.host),
            hostaddr: part(library.hostaddr),
            port: part(library.port),
            dbname: part(library.dbname),
            user: part(library.user),
        };
        servers.targets.iter().any(|server| server.is_reached_by(&end, pg_sys::DEF_PGPORT as u16))
    })
}

/// Reads the servers of this database's migrations if they may have changed.
fn refresh_servers() {
    // SAFETY: look-ups in the system caches, inside a transaction.
    let table = unsafe {
        match pg_sys::get_namespace_oid(c"crossover".as_ptr(), true) {
            pg_sys::InvalidOid => pg_sys::InvalidOid,
            schema => pg_sys::get_relname_relid(c"migration".as_ptr(), schema),
        }
    };
    let changes = CHANGES.load(Ordering::Relaxed);
    if SERVERS.with_borrow(|known| known.table == table && known.changes == changes) {
        return;
    }
    let servers = if table == pg_sys::InvalidOid {
        Some(Servers { table, changes, targets: Vec::new() })
    } else {
        // SAFETY: inside a transaction.
        unsafe { read_servers(table) }
    };
    if let Some(servers) = servers {
        SERVERS.set(servers);
    }
}

/// The servers in `table`; `None` when it is locked, so that it cannot be read now.
///
/// Reads as PostgreSQL reads its catalogs: the latest committed rows, whoever the user is, without privileges.
/// The names of schema and table prove nothing, so the table must belong to this extension.
///
/// # Safety
/// Inside a transaction.
unsafe fn read_servers(table: pg_sys::Oid) -> Option<Servers> {
    const LOCK: pg_sys::LOCKMODE = pg_sys::AccessShareLock as pg_sys::LOCKMODE;
    // SAFETY: the lock is taken before the relation is opened, and all is given back in reverse order; an error
    // in between ends the transaction, which gives it back as well. Pointers live in the memory context made here.
    unsafe {
        if !pg_sys::ConditionalLockRelationOid(table, LOCK) {
            return None;
        }
        // With the lock came the news of all changes before it.
        let mut servers = Servers { table, changes: CHANGES.load(Ordering::Relaxed), targets: Vec::new() };
        let relation = pg_sys::try_table_open(table, pg_sys::NoLock as pg_sys::LOCKMODE);
        if relation.is_null() {
            pg_sys::UnlockRelationOid(table, LOCK);
            return Some(servers);
        }
        let context = pg_sys::AllocSetContextCreateInternal(
            pg_sys::CurrentMemoryContext,
            c"crossover servers".as_ptr(),
            pg_sys::ALLOCSET_SMALL_MINSIZE as usize,
            pg_sys::ALLOCSET_SMALL_INITSIZE as usize,
            pg_sys::ALLOCSET_SMALL_MAXSIZE as usize,
        );
        let before = pg_sys::MemoryContextSwitchTo(context);
        if is_ours(relation) {
            servers.targets = scan(relation);
        }
        pg_sys::MemoryContextSwitchTo(before);
        pg_sys::MemoryContextDelete(context);
        pg_sys::table_close(relation, LOCK);
        Some(servers)
    }
}

/// # Safety
/// `relation` is open.
unsafe fn is_ours(relation: pg_sys::Relation) -> bool {
    // SAFETY: as the caller vouches; the name is NULL or a string in the current memory context.
    unsafe {
        let plain = (*(*relation).rd_rel).relkind as u8 == pg_sys::RELKIND_RELATION;
        let extension = pg_sys::getExtensionOfObject(pg_sys::RelationRelationId, (*relation).rd_id);
        let name = pg_sys::get_extension_name(extension);
        plain && !name.is_null() && CStr::from_ptr(name).to_bytes() == env!("CARGO_PKG_NAME").as_bytes()
    }
}

/// # Safety
/// `relation` is open and locked, a plain table; the current memory context is the caller's to throw away.
unsafe fn scan(relation: pg_sys::Relation) -> Vec<Target> {
    let mut servers = Vec::new();
    // SAFETY: columns are looked up by name and their types checked or asked for before a value is read.
    unsafe {
        let table = (*relation).rd_id;
        let server_column = pg_sys::get_attnum(table, c"server_id".as_ptr());
        let state_column = pg_sys::get_attnum(table, c"state".as_ptr());
        if server_column <= 0 || state_column <= 0 || pg_sys::get_atttype(table, server_column) != pg_sys::OIDOID {
            return servers;
        }
        let (mut output, mut is_varlena) = (pg_sys::InvalidOid, false);
        pg_sys::getTypeOutputInfo(pg_sys::get_atttype(table, state_column), &mut output, &mut is_varlena);

        let rows = pg_sys::systable_beginscan(
            relation,
            pg_sys::InvalidOid,
            false,
            std::ptr::null_mut(),
            0,
            std::ptr::null_mut(),
        );
        loop {
            let row = pg_sys::systable_getnext(rows);
            if row.is_null() {
                break;
            }
            let (mut no_server, mut no_state) = (false, false);
            let columns = (*relation).rd_att;
            let server = pg_sys::heap_getattr(row, c_int::from(server_column), columns, &mut no_server);
            let state = pg_sys::heap_getattr(row, c_int::from(state_column), columns, &mut no_state);
            if no_server || no_state || CStr::from_ptr(pg_sys::OidOutputFunctionCall(output, state)) == c"cancelled" {
                continue;
            }
            servers.extend(target(pg_sys::Oid::from(server.value() as u32)));
        }
        pg_sys::systable_endscan(rows);
    }
    servers
}

/// # Safety
/// Inside a transaction; the current memory context is the caller's to throw away.
unsafe fn target(server: pg_sys::Oid) -> Option<Target> {
    // SAFETY: the server is NULL or lives, with its options, in the current memory context.
    let options: Vec<(String, String)> = unsafe {
        let server = pg_sys::GetForeignServerExtended(server, pg_sys::FSV_MISSING_OK as pg_sys::bits16);
        let text = |s: *const c_char| CStr::from_ptr(s).to_string_lossy().into_owned();
        let options = pgrx::PgList::<pg_sys::DefElem>::from_pg(server.as_ref()?.options);
        options.iter_ptr().map(|option| (text((*option).defname), text(pg_sys::defGetString(option)))).collect()
    };
    let option = |name: &str| options.iter().find(|(n, _)| n == name).map(|(_, value)| value.clone());
    Some(Target::new(option, |variable| std::env::var(variable).ok()))
}

#[pgrx::pg_guard]
unsafe extern "C-unwind" fn relation_changed(_arg: pg_sys::Datum, _relation: pg_sys::Oid) {
    CHANGES.fetch_add(1, Ordering::Relaxed);
}

#[pgrx::pg_guard]
unsafe extern "C-unwind" fn server_changed(_arg: pg_sys::Datum, _cache: c_int, _hash: u32) {
    CHANGES.fetch_add(1, Ordering::Relaxed);
}

/// The functions of the libpq that the server's own modules use.
struct Library {
    send_query: SendQuery,
    host: Accessor,
    hostaddr: Accessor,
    port: Accessor,
    dbname: Accessor,
    user: Accessor,
}

/// The function that the caller would have called without us.
fn real_send_query() -> SendQuery {
    server_library().map_or_else(own_send_query, |library| library.send_query)
}

/// The libpq of postgres_fdw, or of another of the server's modules; `None` while none is loaded.
///
/// It need not be the libpq that we link, which is what a search by name alone (`RTLD_NEXT`) would find.
fn server_library() -> Option<&'static Library> {
    static FOUND: OnceLock<Library> = OnceLock::new();
    if let Some(found) = FOUND.get() {
        return Some(found);
    }
    let library = LIBPQ_USERS.iter().find_map(|module| find_library(module))?;
    Some(FOUND.get_or_init(|| library))
}

fn find_library(module: &str) -> Option<Library> {
    // SAFETY: a string of the server's, set when it starts; PostgreSQL never unloads a module, so the functions
    // stay; they have the types by which they are called.
    unsafe {
        let directory = CStr::from_ptr((&raw const pg_sys::pkglib_path).cast::<c_char>());
        let suffix = OsStr::from_bytes(pg_sys::DLSUFFIX.to_bytes());
        let mut path = PathBuf::from(OsStr::from_bytes(directory.to_bytes())).join(module).into_os_string();
        path.push(suffix);
        let path = std::ffi::CString::new(path.as_bytes()).ok()?;
        let handle = libc::dlopen(path.as_ptr(), libc::RTLD_NOLOAD | libc::RTLD_LAZY);
        if handle.is_null() {
            return None;
        }
        let function = |name: &CStr| Some(libc::dlsym(handle, name.as_ptr())).filter(|found| !found.is_null());
        let accessor = |name: &CStr| function(name).map(|f| std::mem::transmute::<*mut c_void, Accessor>(f));
        let send_query = function(c"PQsendQuery").filter(|found| !is_in_this_library(*found))?;
        Some(Library {
            send_query: std::mem::transmute::<*mut c_void, SendQuery>(send_query),
            host: accessor(c"PQhost")?,
            hostaddr: accessor(c"PQhostaddr")?,
            port: accessor(c"PQport")?,
            dbname: accessor(c"PQdb")?,
            user: accessor(c"PQuser")?,
        })
    }
}

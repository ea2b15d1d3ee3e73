//! Where a statement on a managed view goes.
//!
//! UPDATE and DELETE on a managed view that writes through INSTEAD OF triggers run over its write twin: the same view, ending
//! in FOR UPDATE, so that what the statement computes it computes from the current, locked row. Privileges stay those on the managed view:
//! it remains in the range table for the sake of their check, and nobody needs any on the twin. The twin is found by its
//! reserved name in the view's own schema; it must belong to the same owner, have the same columns and call the same trigger
//! function, or somebody who may create views could catch other people's writes, or worse. No catalog of ours is read, and a
//! statement that is not an UPDATE or DELETE on a view costs one comparison.

use pgrx::prelude::*;
use pgrx::{PgRelation, pg_sys};

use crate::check::WRITE_SUFFIX;
use crate::mapping::ident::Ident;

static mut PREVIOUS: pg_sys::post_parse_analyze_hook_type = None;

/// Installs the hook; from `_PG_init`, while the postmaster preloads.
pub fn init() {
    // SAFETY: the process is single-threaded and loads libraries now.
    unsafe {
        PREVIOUS = pg_sys::post_parse_analyze_hook;
        pg_sys::post_parse_analyze_hook = Some(post_parse_analyze);
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn post_parse_analyze(
    pstate: *mut pg_sys::ParseState,
    query: *mut pg_sys::Query,
    jstate: *mut pg_sys::JumbleState,
) {
    // SAFETY: PostgreSQL passes a valid query tree; the previous hook gets what we got.
    unsafe {
        redirect(query);
        if let Some(previous) = PREVIOUS {
            pg_sys::ffi::pg_guard_ffi_boundary(|| previous(pstate, query, jstate));
        }
    }
}

/// Redirects a query and what it contains that can write: EXPLAIN's query, and WITH.
///
/// # Safety
/// `query` is a valid, analyzed query tree that nobody else reads meanwhile.
unsafe fn redirect(query: *mut pg_sys::Query) {
    // SAFETY: node tags are checked before casts; lists are walked in place.
    unsafe {
        match (*query).commandType {
            pg_sys::CmdType::CMD_UPDATE | pg_sys::CmdType::CMD_DELETE => redirect_target(query),
            pg_sys::CmdType::CMD_UTILITY => {
                let statement = (*query).utilityStmt;
                if !statement.is_null() && (*statement).type_ == pg_sys::NodeTag::T_ExplainStmt {
                    let explained = (*statement.cast::<pg_sys::ExplainStmt>()).query;
                    if !explained.is_null() && (*explained).type_ == pg_sys::NodeTag::T_Query {
                        redirect(explained.cast());
                    }
                }
                return;
            }
            _ => {}
        }
        if (*query).hasModifyingCTE {
            for cte in pgrx::PgList::<pg_sys::CommonTableExpr>::from_pg((*query).cteList).iter_ptr() {
                let inner = (*cte).ctequery;
                if !inner.is_null() && (*inner).type_ == pg_sys::NodeTag::T_Query {
                    redirect(inner.cast());
                }
            }
        }
    }
}

/// # Safety
/// As [`redirect`].
unsafe fn redirect_target(query: *mut pg_sys::Query) {
    // SAFETY: resultRelation is the 1-based index of an entry of the range table.
    unsafe {
        let entries = pgrx::PgList::<pg_sys::RangeTblEntry>::from_pg((*query).rtable);
        let Some(entry) = entries.get_ptr((*query).resultRelation as usize - 1) else { return };
        if (*entry).relkind as u8 != pg_sys::RELKIND_VIEW {
            return;
        }
        let Some(twin) = write_twin((*entry).relid) else { return };
        pg_sys::LockRelationOid(twin, (*entry).rellockmode);
        // An entry that nothing refers to is checked, and otherwise ignored, as PostgreSQL's own rewriter has it.
        let checked = pg_sys::copyObjectImpl(entry.cast());
        #[cfg(feature = "pg15")]
        {
            (*entry).requiredPerms = 0;
        }
        #[cfg(not(feature = "pg15"))]
        {
            let infos = pgrx::PgList::<pg_sys::RTEPermissionInfo>::from_pg((*query).rteperminfos);
            let index = ((*entry).perminfoindex as usize).checked_sub(1);
            let Some(info) = index.and_then(|i| infos.get_ptr(i)) else { return };
            let unchecked = pg_sys::copyObjectImpl(info.cast()).cast::<pg_sys::RTEPermissionInfo>();
            (*unchecked).relid = twin;
            (*unchecked).requiredPerms = 0;
            (*query).rteperminfos = pg_sys::lappend((*query).rteperminfos, unchecked.cast());
            (*entry).perminfoindex = (*(*query).rteperminfos).length as pg_sys::Index;
        }
        (*entry).relid = twin;
        (*query).rtable = pg_sys::lappend((*query).rtable, checked);
    }
}

/// The write twin of a view, if it has one.
///
/// By its reserved name first, which is cheap. Then both views must belong to one owner, have the same columns (the plan is made for
/// the one and runs on the other), and call one function from their triggers.
fn write_twin(view: pg_sys::Oid) -> Option<pg_sys::Oid> {
    // SAFETY: syscache look-ups; get_rel_name returns null or a NUL-terminated string in the current context.
    let twin = unsafe {
        let name = pg_sys::get_rel_name(view);
        if name.is_null() {
            return None;
        }
        let twin = Ident::new(std::ffi::CStr::from_ptr(name).to_str().ok()?).with_suffix(WRITE_SUFFIX);
        let twin = std::ffi::CString::new(twin.as_str()).ok()?;
        let oid = pg_sys::get_relname_relid(twin.as_ptr(), pg_sys::get_rel_namespace(view));
        if oid == pg_sys::InvalidOid || pg_sys::get_rel_relkind(oid) as u8 != pg_sys::RELKIND_VIEW {
            return None;
        }
        oid
    };
    let lock = pg_sys::AccessShareLock as pg_sys::LOCKMODE;
    // SAFETY: both were just looked up; the view is locked by its statement, and opening the twin fails if it is gone.
    let (a, b) = unsafe { (PgRelation::with_lock(view, lock), PgRelation::with_lock(twin, lock)) };
    // SAFETY: rd_rel of an open relation.
    let one_owner = unsafe { (*a.rd_rel).relowner == (*b.rd_rel).relowner };
    let function = write_function(&a)?;
    (one_owner && write_function(&b) == Some(function) && same_columns(&a, &b)).then_some(twin)
}

/// The function of a view's trigger `crossover_write`.
fn write_function(view: &PgRelation) -> Option<pg_sys::Oid> {
    // SAFETY: trigdesc of an open relation is null or describes `numtriggers` triggers with NUL-terminated names.
    unsafe {
        let triggers = view.trigdesc;
        if triggers.is_null() {
            return None;
        }
        (0..(*triggers).numtriggers as usize)
            .map(|i| &*(*triggers).triggers.add(i))
            .find(|t| std::ffi::CStr::from_ptr(t.tgname) == c"crossover_write")
            .map(|t| t.tgfoid)
    }
}

fn same_columns(a: &PgRelation, b: &PgRelation) -> bool {
    let (a, b) = (a.tuple_desc(), b.tuple_desc());
    a.len() == b.len()
        && a.iter().zip(b.iter()).all(|(x, y)| {
            x.attname.data == y.attname.data
                && x.atttypid == y.atttypid
                && x.atttypmod == y.atttypmod
                && x.attcollation == y.attcollation
                && x.attisdropped == y.attisdropped
        })
}

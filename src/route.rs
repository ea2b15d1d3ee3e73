//! Where a statement on a managed view goes.
//!
//! UPDATE and DELETE on a managed view that writes through INSTEAD OF triggers run over its write twin: the same view, ending
//! in FOR UPDATE, so that what the statement computes it computes from the current, locked row. The twin is found by its
//! reserved name in the view's own schema; it must belong to the same owner, or somebody who may create views there could
//! catch other people's writes. No catalog of ours is read, and a statement that is not an UPDATE or DELETE costs one comparison.

use pgrx::pg_sys;
use pgrx::prelude::*;

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
        #[cfg(any(feature = "pg16", feature = "pg17", feature = "pg18"))]
        {
            let infos = pgrx::PgList::<pg_sys::RTEPermissionInfo>::from_pg((*query).rteperminfos);
            if let Some(info) = ((*entry).perminfoindex as usize).checked_sub(1).and_then(|i| infos.get_ptr(i)) {
                (*info).relid = twin;
            }
        }
        (*entry).relid = twin;
    }
}

/// The write twin of a view, if it has one.
fn write_twin(view: pg_sys::Oid) -> Option<pg_sys::Oid> {
    // SAFETY: syscache look-ups; get_rel_name returns null or a NUL-terminated string in the current context.
    unsafe {
        let name = pg_sys::get_rel_name(view);
        if name.is_null() {
            return None;
        }
        let twin = Ident::new(std::ffi::CStr::from_ptr(name).to_str().ok()?).with_suffix(WRITE_SUFFIX);
        let twin = std::ffi::CString::new(twin.as_str()).ok()?;
        let oid = pg_sys::get_relname_relid(twin.as_ptr(), pg_sys::get_rel_namespace(view));
        (oid != pg_sys::InvalidOid
            && pg_sys::get_rel_relkind(oid) as u8 == pg_sys::RELKIND_VIEW
            && owner(oid)? == owner(view)?)
        .then_some(oid)
    }
}

fn owner(relation: pg_sys::Oid) -> Option<pg_sys::Oid> {
    // SAFETY: the tuple is read before it is released.
    unsafe {
        let tuple = pg_sys::SearchSysCache1(pg_sys::SysCacheIdentifier::RELOID as i32, pg_sys::Datum::from(relation));
        if tuple.is_null() {
            return None;
        }
        let data = (*tuple).t_data;
        let form = data.cast::<u8>().add((*data).t_hoff as usize).cast::<pg_sys::FormData_pg_class>();
        let owner = (*form).relowner;
        pg_sys::ReleaseSysCache(tuple);
        Some(owner)
    }
}

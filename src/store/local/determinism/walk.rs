//! The walk over an analysed expression: collects what it evaluates, and judges nothing.

use std::ffi::{CStr, c_void};

use pgrx::PgList;
use pgrx::pg_sys;
use pgrx::prelude::*;

use super::super::c_sql;

/// Something that is evaluated.
#[derive(Debug)]
pub(super) enum Use {
    /// A function or an aggregate. `literal`: the text of an argument that is a constant.
    Function {
        oid: u32,
        arguments: Vec<u32>,
        literal: Option<String>,
    },
    /// A conversion by the types' output and input functions. `location`: where the column is that is converted, or -1.
    Cast {
        from: u32,
        to: u32,
        location: i32,
    },
    /// A constant of a type whose input depends on settings: it may be written in a way that does not.
    Literal {
        type_oid: u32,
        location: i32,
    },
    /// CURRENT_TIMESTAMP and the like.
    Session(&'static str),
    Sequence,
    /// JSON constructors that PostgreSQL itself calls mutable.
    #[cfg_attr(feature = "pg15", allow(dead_code))]
    Json,
    /// A table, in a subquery.
    Table(u32),
    /// An aggregate, a window function or a set of rows where one value was meant.
    Rows(&'static str),
}

/// What the walk carries along.
struct Walk {
    depth: usize,
    uses: Vec<Use>,
}

/// What `SELECT <one expression> FROM <one table>` evaluates; it is parsed and analysed. SPI is connected.
pub(super) fn collect(sql: &str) -> Vec<Use> {
    let source = c_sql(sql);
    // SAFETY: SPI is connected; the plan and its query trees live until SPI_finish, and are only read.
    unsafe {
        let plan = pg_sys::SPI_prepare(source.as_ptr(), 0, std::ptr::null_mut());
        if plan.is_null() {
            error!("could not prepare: {sql}");
        }
        let sources = PgList::<pg_sys::CachedPlanSource>::from_pg(pg_sys::SPI_plan_get_plan_sources(plan));
        let queries: Vec<*mut pg_sys::Query> = sources
            .iter_ptr()
            .flat_map(|s| PgList::<pg_sys::Query>::from_pg((*s).query_list).iter_ptr().collect::<Vec<_>>())
            .collect();
        // What was meant as one expression must not be more than that.
        let query = match queries[..] {
            [query]
                if (*query).commandType == pg_sys::CmdType::CMD_SELECT
                    && (*query).setOperations.is_null()
                    && PgList::<pg_sys::TargetEntry>::from_pg((*query).targetList).len() == 1
                    && PgList::<pg_sys::RangeTblEntry>::from_pg((*query).rtable).len() == 1 =>
            {
                query
            }
            _ => {
                pgrx::ereport!(ERROR, pgrx::PgSqlErrorCode::ERRCODE_SYNTAX_ERROR, "it is more than one expression");
            }
        };
        let mut walk = Walk { depth: 0, uses: Vec::new() };
        for (is, what) in [
            ((*query).hasAggs, "an aggregate"),
            ((*query).hasWindowFuncs, "a window function"),
            ((*query).hasTargetSRFs, "a function that returns a set"),
        ] {
            if is {
                walk.uses.push(Use::Rows(what));
            }
        }
        pg_sys::query_tree_walker(query, Some(visit), (&raw mut walk).cast(), pg_sys::QTW_EXAMINE_RTES_BEFORE as i32);
        walk.uses
    }
}

/// Notes what one node evaluates, and goes on below it.
#[pg_guard]
unsafe extern "C-unwind" fn visit(node: *mut pg_sys::Node, context: *mut c_void) -> bool {
    if node.is_null() {
        return false;
    }
    // SAFETY: the walker passes valid nodes, whose tag says what they are, and the context that `collect` gave.
    unsafe {
        let walk = &mut *context.cast::<Walk>();
        note(node, walk);
        if (*node).type_ == pg_sys::NodeTag::T_Query {
            walk.depth += 1;
            pg_sys::query_tree_walker(node.cast(), Some(visit), context, pg_sys::QTW_EXAMINE_RTES_BEFORE as i32);
            (*context.cast::<Walk>()).depth -= 1;
            return false;
        }
        if (*node).type_ == pg_sys::NodeTag::T_RangeTblEntry {
            // What it contains is walked besides.
            return false;
        }
        pg_sys::expression_tree_walker(node, Some(visit), context)
    }
}

/// # Safety
/// `node` is a valid node of an analysed query.
unsafe fn note(node: *mut pg_sys::Node, walk: &mut Walk) {
    use pg_sys::NodeTag;
    // SAFETY: the caller's promise, and the tag.
    unsafe {
        let found = match (*node).type_ {
            NodeTag::T_FuncExpr => {
                let e = node.cast::<pg_sys::FuncExpr>();
                call((*e).funcid, (*e).args)
            }
            NodeTag::T_OpExpr | NodeTag::T_DistinctExpr | NodeTag::T_NullIfExpr => {
                let e = node.cast::<pg_sys::OpExpr>();
                call(function_of((*e).opno, (*e).opfuncid), (*e).args)
            }
            NodeTag::T_ScalarArrayOpExpr => {
                let e = node.cast::<pg_sys::ScalarArrayOpExpr>();
                call(function_of((*e).opno, (*e).opfuncid), (*e).args)
            }
            NodeTag::T_RowCompareExpr => {
                let e = node.cast::<pg_sys::RowCompareExpr>();
                let operators = PgList::<pg_sys::Oid>::from_pg((*e).opnos);
                for operator in operators.iter_oid() {
                    let oid = function_of(operator, pg_sys::InvalidOid);
                    walk.uses.push(call(oid, std::ptr::null_mut()));
                }
                return;
            }
            NodeTag::T_Aggref => {
                let e = node.cast::<pg_sys::Aggref>();
                let arguments =
                    PgList::<pg_sys::Oid>::from_pg((*e).aggargtypes).iter_oid().map(|o| o.to_u32()).collect();
                Use::Function { oid: (*e).aggfnoid.to_u32(), arguments, literal: None }
            }
            NodeTag::T_WindowFunc => {
                let e = node.cast::<pg_sys::WindowFunc>();
                call((*e).winfnoid, (*e).args)
            }
            NodeTag::T_CoerceViaIO => {
                let e = node.cast::<pg_sys::CoerceViaIO>();
                let from: *mut pg_sys::Node = (*e).arg.cast();
                let is_column = (*from).type_ == NodeTag::T_Var;
                Use::Cast {
                    from: pg_sys::exprType(from).to_u32(),
                    to: (*e).resulttype.to_u32(),
                    location: if is_column { pg_sys::exprLocation(from) } else { -1 },
                }
            }
            NodeTag::T_Const => {
                let e = node.cast::<pg_sys::Const>();
                if (*e).constisnull {
                    return;
                }
                Use::Literal { type_oid: (*e).consttype.to_u32(), location: (*e).location }
            }
            NodeTag::T_SQLValueFunction => Use::Session(value_function((*node.cast::<pg_sys::SQLValueFunction>()).op)),
            NodeTag::T_NextValueExpr => Use::Sequence,
            #[cfg(any(feature = "pg16", feature = "pg17", feature = "pg18"))]
            NodeTag::T_JsonConstructorExpr if pg_sys::contain_mutable_functions(node) => Use::Json,
            #[cfg(any(feature = "pg17", feature = "pg18"))]
            NodeTag::T_JsonExpr if pg_sys::contain_mutable_functions(node) => Use::Json,
            NodeTag::T_RangeTblEntry if walk.depth > 0 => {
                let e = node.cast::<pg_sys::RangeTblEntry>();
                if (*e).rtekind != pg_sys::RTEKind::RTE_RELATION {
                    return;
                }
                Use::Table((*e).relid.to_u32())
            }
            _ => return,
        };
        walk.uses.push(found);
    }
}

/// # Safety
/// `arguments` is a list of expressions, or null.
unsafe fn call(function: pg_sys::Oid, arguments: *mut pg_sys::List) -> Use {
    // SAFETY: the caller's promise; a constant of type text is a text.
    unsafe {
        let (mut types, mut literal) = (Vec::new(), None);
        for node in PgList::<pg_sys::Node>::from_pg(arguments).iter_ptr() {
            match (*node).type_ {
                // The types of an anonymous row are its fields'.
                pg_sys::NodeTag::T_RowExpr => {
                    let fields = PgList::<pg_sys::Node>::from_pg((*node.cast::<pg_sys::RowExpr>()).args);
                    types.extend(fields.iter_ptr().map(|field| pg_sys::exprType(field).to_u32()));
                    continue;
                }
                pg_sys::NodeTag::T_Const => {
                    let constant = node.cast::<pg_sys::Const>();
                    if (*constant).consttype == pg_sys::TEXTOID && !(*constant).constisnull {
                        let text = pg_sys::text_to_cstring((*constant).constvalue.cast_mut_ptr());
                        literal = Some(CStr::from_ptr(text).to_string_lossy().into_owned());
                    }
                }
                _ => {}
            }
            types.push(pg_sys::exprType(node).to_u32());
        }
        Use::Function { oid: function.to_u32(), arguments: types, literal }
    }
}

/// The function behind an operator.
///
/// # Safety
/// In a transaction.
unsafe fn function_of(operator: pg_sys::Oid, function: pg_sys::Oid) -> pg_sys::Oid {
    // SAFETY: a catalog look-up in the caller's transaction.
    if function == pg_sys::InvalidOid { unsafe { pg_sys::get_opcode(operator) } } else { function }
}

fn value_function(op: pg_sys::SQLValueFunctionOp::Type) -> &'static str {
    use pg_sys::SQLValueFunctionOp as Op;
    match op {
        Op::SVFOP_CURRENT_DATE => "CURRENT_DATE",
        Op::SVFOP_CURRENT_TIME | Op::SVFOP_CURRENT_TIME_N => "CURRENT_TIME",
        Op::SVFOP_CURRENT_TIMESTAMP | Op::SVFOP_CURRENT_TIMESTAMP_N => "CURRENT_TIMESTAMP",
        Op::SVFOP_LOCALTIME | Op::SVFOP_LOCALTIME_N => "LOCALTIME",
        Op::SVFOP_LOCALTIMESTAMP | Op::SVFOP_LOCALTIMESTAMP_N => "LOCALTIMESTAMP",
        Op::SVFOP_CURRENT_ROLE => "CURRENT_ROLE",
        Op::SVFOP_CURRENT_USER => "CURRENT_USER",
        Op::SVFOP_USER => "USER",
        Op::SVFOP_SESSION_USER => "SESSION_USER",
        Op::SVFOP_CURRENT_CATALOG => "CURRENT_CATALOG",
        Op::SVFOP_CURRENT_SCHEMA => "CURRENT_SCHEMA",
        _ => "a value of the session",
    }
}

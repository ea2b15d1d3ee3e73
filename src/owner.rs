//! The role that owns a migration: may it have a worker, and may it do all that the migration will need on either server?
//!
//! Everything is looked at before anything is touched: a privilege that is missing must not be found by the first switch.

use std::collections::BTreeSet;

use pgrx::pg_sys;
use serde::{Deserialize, Serialize};

use crate::catalog::Migration;
use crate::error::{Error, Problem, Result};
use crate::mapping::ident::{Ident, RelName};
use crate::mapping::model::NamedTable;
use crate::mapping::text::array_literal;
use crate::store::local::LocalSession;
use crate::store::{Row, Session};

/// What a start tells its caller beside that it has begun.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Warning {
    pub message: String,
    pub detail: String,
    pub hint: String,
}

/// From PostgreSQL 17 on a worker may run as a role without LOGIN.
pub const NEEDS_LOGIN: bool = cfg!(any(feature = "pg15", feature = "pg16"));

/// What to ask of role `owner`; [`may_connect`] reads the answer.
pub fn query(owner: u32) -> String {
    format!(
        "SELECT pg_catalog.quote_ident(r.rolname), r.rolcanlogin, pg_catalog.has_database_privilege(r.oid, d.oid, 'CONNECT'), pg_catalog.quote_ident(d.datname) \
           FROM pg_catalog.pg_database d LEFT JOIN pg_catalog.pg_roles r ON r.oid = {owner} WHERE d.datname = pg_catalog.current_database()"
    )
}

/// Can a worker connect as this role?
///
/// # Errors
/// `Error::OwnerIsGone`, `Error::OwnerCannotConnect`.
pub fn may_connect(owner: u32, answer: &[Row]) -> Result<()> {
    let field = |i: usize| answer.first().and_then(|row| row[i].as_deref());
    let Some(role) = field(0) else { return Err(Error::OwnerIsGone { oid: owner }) };
    if NEEDS_LOGIN && field(1) != Some("t") {
        return Err(Error::OwnerCannotConnect {
            message: format!("role {role} is not permitted to log in"),
            hint: format!("ALTER ROLE {role} LOGIN;"),
        });
    }
    if field(2) != Some("t") {
        let database = field(3).unwrap_or_default();
        return Err(Error::OwnerCannotConnect {
            message: format!("role {role} has no CONNECT privilege for database {database}"),
            hint: format!("GRANT CONNECT ON DATABASE {database} TO {role};"),
        });
    }
    Ok(())
}

/// The role that this process connected as.
pub fn of_this_process() -> u32 {
    // SAFETY: reads the session's user, set when the process connected.
    unsafe { pg_sys::GetSessionUserId() }.to_u32()
}

/// What the owner may not do here and will have to: the takeover renames tables and makes views in their schemas.
pub fn on_first(session: &mut LocalSession, migration: &Migration, named: &[NamedTable]) -> Result<Vec<Problem>> {
    if migration.owner_is_superuser {
        return Ok(Vec::new());
    }
    let role = &migration.owner_name;
    let made_in = schemas(named.iter().map(|n| &n.first).chain(named.iter().filter_map(|n| n.second_view.as_ref())));
    let read_in = schemas(
        named.iter().flat_map(|n| [&n.first, &n.second]).chain(named.iter().filter_map(|n| n.second_view.as_ref())),
    );
    let mut problems = Vec::new();
    for (names, privilege) in [(&read_in, "USAGE"), (&made_in, "CREATE")] {
        for schema in lacking(session, names, privilege)? {
            problems.push(
                Problem::new(format!("schema {schema}"), format!("{role} has no {privilege} privilege"))
                    .hint(format!("GRANT {privilege} ON SCHEMA {schema} TO {role};")),
            );
        }
    }
    Ok(problems)
}

fn schemas<'a>(rels: impl Iterator<Item = &'a RelName>) -> Vec<Ident> {
    rels.map(|rel| rel.schema.clone()).collect::<BTreeSet<_>>().into_iter().collect()
}

/// Of these schemas, those in which the session's role has not got `privilege`.
fn lacking<S: Session>(session: &mut S, schemas: &[Ident], privilege: &str) -> Result<Vec<Ident>> {
    let names = array_literal(schemas.iter().map(Ident::as_str));
    let rows = session.query(
        "SELECT n.nspname::text FROM pg_namespace n WHERE n.nspname = ANY ($1::text[]) AND NOT has_schema_privilege(n.oid, $2::text) ORDER BY 1",
        &[Some(&names), Some(privilege)],
    )?;
    Ok(rows.into_iter().filter_map(|mut r| r.pop().flatten()).map(Ident::new).collect())
}

/// What the role of the user mapping may not do on the second server.
pub fn on_second<S: Session>(session: &mut S, peer: &Ident, tables: &[&RelName]) -> Result<Vec<Problem>> {
    let told = session.query(
        "SELECT quote_ident(current_user), quote_ident(current_database()), to_regnamespace($1::text) IS NOT NULL, \
                has_database_privilege(current_database(), 'CREATE')",
        &[Some(&peer.to_string())],
    )?;
    let field = |i: usize| told[0][i].as_deref().unwrap_or("");
    let (role, database, peer_is_there, may_create) = (field(0), field(1), field(2) == "t", field(3) == "t");
    let mut problems = Vec::new();
    if peer_is_there {
        for privilege in ["USAGE", "CREATE"] {
            for schema in lacking(session, std::slice::from_ref(peer), privilege)? {
                problems.push(
                    Problem::new(
                        format!("schema {schema} on the second server"),
                        format!("{role} has no {privilege} privilege"),
                    )
                    .hint(format!(
                        "Another role's migration has made it. There: GRANT USAGE, CREATE ON SCHEMA {schema} TO {role};"
                    )),
                );
            }
        }
    } else if !may_create {
        problems.push(
            Problem::new(
                format!("database {database} on the second server"),
                format!("{role} has no CREATE privilege"),
            )
            .hint(format!("There: GRANT CREATE ON DATABASE {database} TO {role};")),
        );
    }
    for schema in lacking(session, &schemas(tables.iter().copied()), "USAGE")? {
        problems.push(
            Problem::new(format!("schema {schema} on the second server"), format!("{role} has no USAGE privilege"))
                .hint(format!("There: GRANT USAGE ON SCHEMA {schema} TO {role};")),
        );
    }
    for table in tables {
        let owners = session.query(
            "SELECT quote_ident(pg_get_userbyid(c.relowner)) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
             WHERE n.nspname = $1::text AND c.relname = $2::text AND NOT pg_has_role(c.relowner, 'USAGE')",
            &[Some(table.schema.as_str()), Some(table.name.as_str())],
        )?;
        for owner in owners.iter().filter_map(|r| r[0].as_deref()) {
            problems.push(
                Problem::new(format!("{table} on the second server"), format!("{role} is not its owner"))
                    .hint(format!("Triggers are put on it. There: ALTER TABLE {table} OWNER TO {role}; or let that be a member of {owner}")),
            );
        }
    }
    Ok(problems)
}

/// What the role of the user mapping can do without on the second server, and what that costs.
pub fn warning_on_second<S: Session>(session: &mut S) -> Result<Option<Warning>> {
    let told = session.query(
        "SELECT quote_ident(current_user), string_agg(p, ', ' ORDER BY p DESC) \
           FROM unnest(ARRAY['session_replication_role', 'deadlock_timeout']) AS p WHERE NOT has_parameter_privilege(p, 'SET')",
        &[],
    )?;
    let [Some(role), Some(parameters)] = &told[0][..] else { return Ok(None) };
    Ok(Some(Warning {
        message: format!("role {role} may not set {parameters} on the second server"),
        detail: "Ordinary triggers and foreign keys of the second tables fire for replicated rows, and a client there may be the one that \
                 finds a deadlock with replication."
            .into(),
        hint: format!("There, as a superuser: GRANT SET ON PARAMETER {parameters} TO {role};"),
    }))
}

/// Roles that may make functions and operators where the names in expressions are looked up: in the schemas of the first tables, and in public.
pub fn warnings_on_first(
    session: &mut LocalSession,
    migration: &Migration,
    named: &[NamedTable],
) -> Result<Vec<Warning>> {
    let names = array_literal(schemas(named.iter().map(|n| &n.first)).iter().map(Ident::as_str).chain(["public"]));
    let rows = session.query(
        "SELECT quote_ident(n.nspname), string_agg(DISTINCT CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(r.rolname) END, ', ') \
           FROM pg_namespace n, aclexplode(n.nspacl) AS a LEFT JOIN pg_roles r ON r.oid = a.grantee \
          WHERE n.nspname = ANY ($1::text[]) AND a.privilege_type = 'CREATE' AND a.grantee NOT IN (n.nspowner, $2::text::oid) \
            AND r.rolsuper IS NOT TRUE GROUP BY n.nspname ORDER BY 1",
        &[Some(&names), Some(&migration.owner.to_string())],
    )?;
    let warnings = rows.into_iter().filter_map(|mut row| {
        let (roles, schema) = (row.pop()??, row.pop()??);
        Some(Warning {
            message: format!("other roles may create functions in schema {schema}: {roles}"),
            detail: "The expressions of the mapping look their functions and operators up there, and run them with the rights of the tables' owner."
                .into(),
            hint: format!("REVOKE CREATE ON SCHEMA {schema} FROM {roles};"),
        })
    });
    Ok(warnings.collect())
}

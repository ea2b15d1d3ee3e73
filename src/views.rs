//! Managed views: the takeover of the tables' names and its undoing, and which store a view reaches.
//!
//! All of it is DDL in the transaction of the switch (or set-up, or cancel) that calls it, which holds ACCESS EXCLUSIVE on
//! what is replaced here. It runs as the migration's owner.

use std::collections::{BTreeMap, BTreeSet};

use crate::catalog::Migration;
use crate::check::search_path;
use crate::context::Context;
use crate::error::{Error, Result};
use crate::mapping::ident::{Ident, RelName, quote_literal};
use crate::mapping::rule::Pair;
use crate::mapping::text::array_literal;
use crate::mapping::view::{self, Grant, Managed};
use crate::settings;
use crate::store::local::LocalSession;
use crate::store::{Session, parse};

/// Puts a managed view under each table's name; the tables get their reserved names, out of reach of other roles.
pub fn take_over(ctx: &mut Context) -> Result<()> {
    let Context { migration, pairs, first, first_tables, .. } = ctx;
    let session = &mut first.session;
    for (pair, (oid, _)) in pairs.iter().zip(first_tables.iter()) {
        let managed = Managed::new(pair);
        session.batch(&search_path(&pair.first.rel))?;
        let grants = grants_of(session, *oid)?;
        save_grants(session, migration, pair, "grants", grants.as_deref())?;
        let owner = owner_of(session, *oid)?;
        let mut sql = format!("ALTER TABLE {} RENAME TO {};\n", managed.view, managed.first.name);
        if let Some(grants) = &grants {
            sql += &view::set_grants(&managed.first, &owner, None, grants);
        }
        sql += &format!("CREATE VIEW {} AS {};\n", managed.view, view::over_first(pair, &managed));
        sql += &view::defaults(pair, &managed.view);
        sql += &format!("ALTER VIEW {} OWNER TO {owner};\n", managed.view);
        session.batch(&sql)?;
        lend_foreign_table(session, migration, pair, &owner)?;
        let comments = comments(session, *oid, &managed.view)?;
        session.batch(&comments)?;
        grant_like(session, &managed.view, grants.as_deref())?;
    }
    session.batch("SET LOCAL search_path = pg_catalog, pg_temp")?;
    migration.taken_over = true;
    let names = pairs.iter().map(|p| Managed::new(p).first).collect();
    ctx.rename_first(names);
    Ok(())
}

/// Gives the tables their names back and drops the views. Grants that were changed on a view meanwhile move with the name; where none was, the
/// table gets its own again, in their old order.
pub fn give_back(ctx: &mut Context) -> Result<()> {
    let grants = saved_grants(ctx, "grants")?;
    let Context { migration, pairs, first, .. } = ctx;
    let session = &mut first.session;
    for (pair, before) in pairs.iter().zip(grants) {
        let managed = Managed::new(pair);
        let owner = oid_of(session, &managed.view).and_then(|oid| owner_of(session, oid))?;
        let now = oid_of(session, &managed.view).and_then(|oid| grants_of(session, oid))?.unwrap_or_default();
        let unchanged = match &before {
            Some(before) => before.iter().collect::<BTreeSet<_>>() == now.iter().collect(),
            None => now.iter().all(|g| g.column.is_none() && g.grantee.as_deref() == Some(owner.as_str())),
        };
        let grants = if unchanged { before } else { Some(now) };
        let drop_triggers =
            if has_triggers(session, &managed)? { view::drop_triggers(&managed) } else { String::new() };
        session.batch(&format!(
            "{drop_triggers}DROP VIEW {};\nALTER TABLE {} RENAME TO {};\n",
            managed.view, managed.first, managed.view.name
        ))?;
        if let Some(grants) = grants {
            grant_like(session, &managed.view, Some(&grants))?;
        }
    }
    take_foreign_tables_back(session, migration)?;
    migration.taken_over = false;
    let names = pairs.iter().map(|p| p.first.rel.clone()).collect();
    ctx.rename_first(names);
    Ok(())
}

/// Points the managed views at the first store.
pub fn point_at_first(ctx: &mut Context) -> Result<()> {
    let session = &mut ctx.first.session;
    for pair in &ctx.pairs {
        let managed = Managed::new(pair);
        let drop_triggers =
            if has_triggers(session, &managed)? { view::drop_triggers(&managed) } else { String::new() };
        session.batch(&format!(
            "{drop_triggers}CREATE OR REPLACE VIEW {} AS {};\n",
            managed.view,
            view::over_first(pair, &managed)
        ))?;
    }
    Ok(())
}

/// Does the managed view write through triggers now? Where it does not, what has the name of their function is somebody else's.
fn has_triggers(session: &mut LocalSession, managed: &Managed) -> Result<bool> {
    let rows = session.query(
        "SELECT FROM pg_trigger WHERE tgrelid = to_regclass($1::text) AND tgname = 'crossover_write'",
        &[Some(&managed.view.to_string())],
    )?;
    Ok(!rows.is_empty())
}

/// Points the managed views at the second store, through the backward rules.
pub fn point_at_second(ctx: &mut Context) -> Result<()> {
    let Context { migration, pairs, first, .. } = ctx;
    let session = &mut first.session;
    for pair in pairs.iter() {
        let managed = Managed::new(pair);
        let owner = oid_of(session, &managed.view).and_then(|oid| owner_of(session, oid))?;
        // Somebody may have taken it away meanwhile: better no switch than one to a view that nobody can read.
        lend_foreign_table(session, migration, pair, &owner)?;
        session.batch(&search_path(&pair.first.rel))?;
        session.batch(&format!("CREATE OR REPLACE VIEW {} AS {};\n", managed.view, view::over_second(pair)))?;
        if view::needs_triggers(pair) {
            session.batch(&view::create_write_twin(pair, &managed))?;
            session.batch(&view::create_triggers(pair, &managed))?;
            own_like(session, &managed.write, &managed.view)?;
            // Its expressions are looked up in the table's schema, so it must not have more rights than the table's owner.
            session.batch(&format!("ALTER FUNCTION {}() OWNER TO {owner}", managed.write))?;
            grant_like(session, &managed.write, None)?;
        }
    }
    session.batch("SET LOCAL search_path = pg_catalog, pg_temp")
}

/// Exposes the views of the second shape: makes them with the managed views' grants, or grants again what was granted on them.
pub fn expose_second_shape(ctx: &mut Context) -> Result<()> {
    let before = saved_grants(ctx, "second_grants")?;
    let Context { migration, pairs, first, .. } = ctx;
    let session = &mut first.session;
    for (pair, before) in pairs.iter().zip(before) {
        let Some(name) = &pair.second_view else { continue };
        let owner = oid_of(session, &pair.first.rel).and_then(|oid| owner_of(session, oid))?;
        lend_foreign_table(session, migration, pair, &owner)?;
        if crate::catalog::describe(session, name)?.is_none() {
            session.batch(&format!(
                "CREATE VIEW {name} AS {};\n{}",
                view::second_shape(pair),
                view::second_defaults(pair, name)
            ))?;
            own_like(session, name, &pair.first.rel)?;
        }
        let grants = match before {
            Some(before) => {
                let mut grants = to_present_roles(session, before)?;
                // What was granted while it was hidden is not forgotten either.
                let since = oid_of(session, name).and_then(|oid| grants_of(session, oid))?.unwrap_or_default();
                grants.extend(since.into_iter().filter(|g| !grants.contains(g)).collect::<Vec<_>>());
                grants
            }
            None => {
                let managed = oid_of(session, &pair.first.rel).and_then(|oid| grants_of(session, oid))?;
                // Privileges on single columns of the first shape say nothing about the second one's.
                managed.unwrap_or_default().into_iter().filter(|g| g.column.is_none()).collect()
            }
        };
        grant_like(session, name, Some(&grants))?;
    }
    Ok(())
}

/// Takes the views of the second shape out of reach of the application roles.
pub fn hide_second_shape(ctx: &mut Context) -> Result<()> {
    let Context { migration, pairs, first, .. } = ctx;
    let session = &mut first.session;
    for pair in pairs.iter() {
        let Some(name) = &pair.second_view else { continue };
        if crate::catalog::describe(session, name)?.is_some() {
            let grants = oid_of(session, name).and_then(|oid| grants_of(session, oid))?;
            save_grants(session, migration, pair, "second_grants", grants.as_deref())?;
            grant_like(session, name, None)?;
        }
    }
    Ok(())
}

/// Drops the views of the second shape (cancel).
pub fn drop_second_shape(ctx: &mut Context) -> Result<()> {
    let session = &mut ctx.first.session;
    for name in ctx.pairs.iter().filter_map(|p| p.second_view.as_ref()) {
        session.batch(&format!("DROP VIEW IF EXISTS {name}"))?;
    }
    Ok(())
}

/// The managed views, their write twins, and the views of the second shape that are there, by oid, in the order in which
/// a switch locks them.
pub fn view_oids(ctx: &mut Context, managed: bool, second_shape: bool) -> Result<Vec<u32>> {
    let mut names = Vec::new();
    for pair in &ctx.pairs {
        let m = Managed::new(pair);
        if managed {
            names.extend([m.view, m.write]);
        }
        if second_shape {
            names.extend(pair.second_view.clone());
        }
    }
    let names = array_literal(names.iter().map(RelName::to_string));
    let rows = ctx.first.session.query(
        "SELECT to_regclass(n)::oid::int8 FROM unnest($1::text[]) WITH ORDINALITY AS u(n, i) WHERE to_regclass(n) IS NOT NULL ORDER BY i",
        &[Some(&names)],
    )?;
    rows.iter().filter_map(|r| r[0].as_deref()).map(parse).collect()
}

/// Of each table, what [`save_grants`] kept in a column of `crossover.migrated_table`.
fn saved_grants(ctx: &mut Context, column: &str) -> Result<Vec<Option<Vec<Grant>>>> {
    let rows = ctx.first.session.admin_query(
        &format!("SELECT coalesce({column}, 'null') FROM crossover.migrated_table WHERE migration_id = $1::text::int ORDER BY index"),
        &[Some(&ctx.migration.id.to_string())],
    )?;
    rows.iter()
        .map(|r| serde_json::from_str(r[0].as_deref().unwrap_or("null")).map_err(|e| Error::internal(e.to_string())))
        .collect()
}

fn save_grants(
    session: &mut LocalSession,
    migration: &Migration,
    pair: &Pair,
    column: &str,
    grants: Option<&[Grant]>,
) -> Result<()> {
    let saved = serde_json::to_string(&grants).map_err(|e| Error::internal(e.to_string()))?;
    session
        .admin_execute(
            &format!("UPDATE crossover.migrated_table SET {column} = $3::text WHERE migration_id = $1::text::int AND index = $2::text::int"),
            &[Some(&migration.id.to_string()), Some(&pair.index.to_string()), Some(&saved)],
        )
        .map(drop)
}

/// With the names that the roles have now, and without those to roles that have been dropped since: another one of that name is another role.
fn to_present_roles(session: &mut LocalSession, grants: Vec<Grant>) -> Result<Vec<Grant>> {
    let oids = array_literal(grants.iter().map(|g| g.role.to_string()));
    let rows = session
        .query("SELECT oid::int8, rolname::text FROM pg_roles WHERE oid = ANY ($1::text::oid[])", &[Some(&oids)])?;
    let mut names = BTreeMap::new();
    for row in rows {
        names.insert(parse::<u32>(row[0].as_deref().unwrap_or(""))?, row[1].clone());
    }
    Ok(grants
        .into_iter()
        .filter_map(|grant| match grant.role {
            0 => Some(grant),
            role => names.get(&role).map(|name| Grant { grantee: name.clone(), ..grant }),
        })
        .collect())
}

fn oid_of(session: &mut LocalSession, rel: &RelName) -> Result<u32> {
    let rows = session.query("SELECT $1::text::regclass::oid::int8", &[Some(&rel.to_string())])?;
    parse(rows[0][0].as_deref().unwrap_or("0"))
}

/// The privileges on a relation in the order of its ACL; None where it has the built-in default (the owner's alone).
fn grants_of(session: &mut LocalSession, oid: u32) -> Result<Option<Vec<Grant>>> {
    let rows = session.query(
        "SELECT CASE WHEN a.grantee <> 0 THEN pg_get_userbyid(a.grantee)::text END, a.privilege_type, a.is_grantable, a.col, a.grantee::int8 FROM ( \
            SELECT e.*, NULL::text AS col, 0 AS attnum FROM pg_class c, aclexplode(c.relacl) WITH ORDINALITY e(grantor, grantee, privilege_type, is_grantable, n) WHERE c.oid = $1::text::oid \
            UNION ALL SELECT e.*, a.attname::text, a.attnum FROM pg_attribute a, aclexplode(a.attacl) WITH ORDINALITY e(grantor, grantee, privilege_type, is_grantable, n) WHERE a.attrelid = $1::text::oid AND NOT a.attisdropped \
         ) AS a ORDER BY a.attnum, a.n",
        &[Some(&oid.to_string())],
    )?;
    if rows.is_empty() {
        let default = session
            .query("SELECT relacl IS NULL FROM pg_class WHERE oid = $1::text::oid", &[Some(&oid.to_string())])?;
        if default.first().and_then(|r| r[0].as_deref()) == Some("t") {
            return Ok(None);
        }
    }
    let grants = rows.into_iter().map(|r| {
        Ok(Grant {
            role: parse(r[4].as_deref().unwrap_or(""))?,
            grantee: r[0].clone(),
            privilege: r[1].clone().unwrap_or_default(),
            grantable: r[2].as_deref() == Some("t"),
            column: r[3].clone(),
        })
    });
    grants.collect::<Result<_>>().map(Some)
}

fn own_like(session: &mut LocalSession, view: &RelName, like: &RelName) -> Result<()> {
    let oid = oid_of(session, like)?;
    let owner = owner_of(session, oid)?;
    session.batch(&format!("ALTER VIEW {view} OWNER TO {owner}"))
}

fn owner_of(session: &mut LocalSession, oid: u32) -> Result<Ident> {
    let sql = "SELECT pg_get_userbyid(relowner)::text FROM pg_class WHERE oid = $1::text::oid";
    let rows = session.query(sql, &[Some(&oid.to_string())])?;
    Ok(Ident::new(rows.first().and_then(|r| r[0].clone()).unwrap_or_default()))
}

/// The managed view and its trigger function belong to the table's owner, who has to reach the foreign table through them. What
/// that role lacks is granted, and remembered as the statements that take it back.
fn lend_foreign_table(session: &mut LocalSession, migration: &Migration, pair: &Pair, owner: &Ident) -> Result<()> {
    let (table, schema) = (&pair.second.rel, &pair.second.rel.schema);
    let may = session.query(
        "SELECT bool_and(has_table_privilege($1::text::name, $2::text::oid, p)), has_schema_privilege($1::text::name, $3::text, 'USAGE') \
         FROM unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) AS p",
        &[Some(owner.as_str()), Some(&pair.second.oid.to_string()), Some(schema.as_str())],
    )?;
    let mut lent = Vec::new();
    if may[0][0].as_deref() != Some("t") {
        session.batch(&format!("GRANT SELECT, INSERT, UPDATE, DELETE ON {table} TO {owner}"))?;
        lent.push("TABLE");
    }
    if may[0][1].as_deref() != Some("t") {
        session.batch(&format!("GRANT USAGE ON SCHEMA {schema} TO {owner}"))?;
        lent.push("SCHEMA");
    }
    for kind in lent {
        session.admin_execute(
            "UPDATE crossover.migrated_table SET take_back = coalesce(take_back, '[]') || jsonb_build_object('kind', $3::text, 'role', r.oid::int8, \
                    'object', CASE $3::text WHEN 'TABLE' THEN c.oid::int8 ELSE c.relnamespace::int8 END) \
               FROM pg_roles r, pg_class c WHERE migration_id = $1::text::int AND index = $2::text::int AND r.rolname = $4::text::name AND c.oid = $5::text::oid",
            &[
                Some(&migration.id.to_string()),
                Some(&pair.index.to_string()),
                Some(kind),
                Some(owner.as_str()),
                Some(&pair.second.oid.to_string()),
            ],
        )?;
    }
    Ok(())
}

/// Takes back what [`lend_foreign_table`] granted, from the roles and on the objects that are still there, whatever they are called now.
fn take_foreign_tables_back(session: &mut LocalSession, migration: &Migration) -> Result<()> {
    let lent = session.admin_query(
        "SELECT CASE l ->> 'kind' WHEN 'TABLE' THEN 'REVOKE SELECT, INSERT, UPDATE, DELETE ON ' ELSE 'REVOKE USAGE ON SCHEMA ' END \
             || coalesce(c.oid::regclass::text, n.oid::regnamespace::text) || ' FROM ' || quote_ident(r.rolname) \
           FROM crossover.migrated_table t, jsonb_array_elements(t.take_back) WITH ORDINALITY AS u(l, i) JOIN pg_roles r ON r.oid = (l ->> 'role')::oid \
           LEFT JOIN pg_class c ON l ->> 'kind' = 'TABLE' AND c.oid = (l ->> 'object')::oid \
           LEFT JOIN pg_namespace n ON l ->> 'kind' = 'SCHEMA' AND n.oid = (l ->> 'object')::oid \
          WHERE t.migration_id = $1::text::int AND (c.oid IS NOT NULL OR n.oid IS NOT NULL) ORDER BY t.index, i",
        &[Some(&migration.id.to_string())],
    )?;
    lent.iter().filter_map(|row| row[0].as_deref()).try_for_each(|sql| session.batch(sql))
}

/// Makes the privileges on a view exactly these.
fn grant_like(session: &mut LocalSession, rel: &RelName, grants: Option<&[Grant]>) -> Result<()> {
    let oid = oid_of(session, rel)?;
    // Default privileges may have given a new view to roles that could not reach the table.
    let held = grants_of(session, oid)?.unwrap_or_default();
    let owner = owner_of(session, oid)?;
    session.batch(&view::set_grants(rel, &owner, grants, &held))
}

/// The table's comments, for the view.
fn comments(session: &mut LocalSession, oid: u32, view: &RelName) -> Result<String> {
    let rows = session.query(
        "SELECT a.attname::text, d.description FROM pg_description d LEFT JOIN pg_attribute a ON a.attrelid = d.objoid AND a.attnum = d.objsubid AND d.objsubid > 0 \
         WHERE d.classoid = 'pg_class'::regclass AND d.objoid = $1::text::oid ORDER BY d.objsubid",
        &[Some(&oid.to_string())],
    )?;
    let mut sql = String::from("SELECT;\n");
    for row in rows {
        let text = quote_literal(row[1].as_deref().unwrap_or(""));
        sql += &match &row[0] {
            None => format!("COMMENT ON VIEW {view} IS {text};\n"),
            Some(column) => format!("COMMENT ON COLUMN {view}.{} IS {text};\n", Ident::new(column.clone())),
        };
    }
    Ok(sql)
}

/// The rules as views that an operator can look at, one for each direction. The owner makes them: they hold the owner's SQL.
pub fn create_rule_views(
    session: &mut LocalSession,
    pairs: &[Pair],
    migration: &Migration,
    objects: &crate::mapping::sql::Objects,
) -> Result<()> {
    let may_create = |session: &mut LocalSession, verb: &str, word: &str| {
        if migration.owner_is_superuser {
            return Ok(());
        }
        // One at a time: of two transactions that change the schema's privileges, the second would fail. By a lock that is given up after
        // the change is announced: who has a row's lock may still have its old version in its cache.
        session.set_lock_timeout(settings::lock_attempt())?;
        session.admin_batch("LOCK TABLE crossover.migration IN SHARE UPDATE EXCLUSIVE MODE")?;
        session.set_lock_timeout(std::time::Duration::ZERO)?;
        session.admin_batch(&format!(
            "{verb} USAGE, CREATE ON SCHEMA {} {word} {}",
            objects.schema(),
            migration.owner_name
        ))
    };
    may_create(session, "GRANT", "TO")?;
    for pair in pairs {
        session.batch(&search_path(&pair.first.rel))?;
        for (direction, rules, target, source) in [
            ("forward", &pair.forward, &pair.second, &pair.first.rel),
            ("backward", &pair.backward, &pair.first, &pair.second.rel),
        ] {
            let name = objects.rule_view(direction, pair.index);
            session.batch(&crate::mapping::sql::create_rule_view(&name, rules, target, source))?;
            // Default privileges would show a store that is not exposed.
            grant_like(session, &name, None)?;
            session.batch(&format!(
                "COMMENT ON VIEW {name} IS {}",
                quote_literal(&format!("migration {}: the {direction} rule of {}", migration.name, pair.first.rel))
            ))?;
        }
    }
    may_create(session, "REVOKE", "FROM")?;
    session.batch("SET LOCAL search_path = pg_catalog, pg_temp")
}

pub fn drop_rule_views(
    session: &mut LocalSession,
    tables: usize,
    objects: &crate::mapping::sql::Objects,
) -> Result<()> {
    for i in 0..tables {
        for direction in ["forward", "backward"] {
            session.admin_batch(&format!("DROP VIEW IF EXISTS {}", objects.rule_view(direction, i)))?;
        }
    }
    Ok(())
}

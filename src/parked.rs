//! Rows that a store refuses, as `migration_conflicts` shows them.
//!
//! The truth is in the tables of owed scopes, beside the watermarks; what is here is a view of it that lags by half a second at most.

use std::collections::{BTreeMap, BTreeSet};

use crate::context::Context;
use crate::error::{Error, Result, Side};
use crate::mapping::text::{array_literal, nullable_array_literal};
use crate::store::local::LocalSession;
use crate::store::{BATCH, Isolation, Key, Session};

/// Entries for rows that were refused, and not yet taken, when they were looked at last.
const UNRESOLVED: &str = "name = $1::text AND kind = 'parked' AND resolved_at IS NULL";

/// Are any listed that may have gone in since? A transaction of its own.
pub fn are_listed(ctx: &mut Context) -> bool {
    let name = ctx.migration.name.clone();
    let sql = format!("SELECT EXISTS (SELECT FROM crossover.conflict WHERE {UNRESOLVED})");
    let rows = ctx.first.session.read(&sql, &[Some(&name)]);
    rows.is_ok_and(|r| r[0][0].as_deref() == Some("t"))
}

/// Lists what the stores refuse now, and since when a row that one of them refused is in. Transactions of its own.
pub fn list(ctx: &mut Context) -> Result<()> {
    if ctx.stores().is_err() {
        return Ok(());
    }
    ctx.first.session.begin(Isolation::ReadCommitted, &[])?;
    let result = resolve_listed(ctx)
        .and_then(|()| list_side(ctx, Side::Second))
        .and_then(|()| list_side(ctx, Side::First))
        .and_then(|()| ctx.first.session.commit());
    if result.is_err() {
        ctx.first.session.rollback();
    }
    result
}

/// The places of the tables in the mapping, by the names that entries have.
fn places(ctx: &Context) -> BTreeMap<String, usize> {
    ctx.pairs.iter().enumerate().map(|(i, p)| (p.first.rel.to_string(), i)).collect()
}

/// Entries whose rows are not parked any more.
fn resolve_listed(ctx: &mut Context) -> Result<()> {
    let (name, places) = (ctx.migration.name.clone(), places(ctx));
    let mut last = "0".to_string();
    loop {
        let sql = format!(
            "SELECT id, table_name, key, refused_by FROM crossover.conflict WHERE {UNRESOLVED} AND id > $2::text::bigint ORDER BY id LIMIT {BATCH}"
        );
        let rows = ctx.first.session.admin_query(&sql, &[Some(&name), Some(&last)])?;
        let mut listed: BTreeMap<(Side, usize), Vec<(Key, String)>> = BTreeMap::new();
        for row in rows {
            let [Some(id), Some(table), Some(key), Some(refused_by)] = &row[..] else {
                return Err(Error::internal("malformed conflict"));
            };
            last.clone_from(id);
            let side = if refused_by == "first" { Side::First } else { Side::Second };
            let place = *places.get(table).ok_or_else(|| Error::internal("unknown table in a conflict"))?;
            listed.entry((side, place)).or_default().push((key.clone(), id.clone()));
        }
        if listed.is_empty() {
            return Ok(());
        }
        let mut gone: Vec<String> = Vec::new();
        let (first, second) = ctx.stores()?;
        for ((side, index), entries) in listed {
            let keys: Vec<&Key> = entries.iter().map(|(key, _)| key).collect();
            let parked: BTreeSet<Key> = match side {
                Side::First => first.parked_among(index, &keys)?,
                Side::Second => second.parked_among(index, &keys)?,
            };
            gone.extend(entries.into_iter().filter(|(key, _)| !parked.contains(key)).map(|(_, id)| id));
        }
        first.session.admin_execute(
            "UPDATE crossover.conflict SET resolved_at = clock_timestamp() WHERE id = ANY ($1::text[]::bigint[])",
            &[Some(&array_literal(&gone))],
        )?;
    }
}

/// Entries for what one store refuses.
fn list_side(ctx: &mut Context, side: Side) -> Result<()> {
    let (name, names) = (ctx.migration.name.clone(), places(ctx));
    let names: BTreeMap<usize, String> = names.into_iter().map(|(name, i)| (i, name)).collect();
    let (first, second) = ctx.stores()?;
    let mut after = (0, "{}".to_string());
    loop {
        let parked = match side {
            Side::First => first.parked_after(&after)?,
            Side::Second => second.parked_after(&after)?,
        };
        let Some(last) = parked.last() else { return Ok(()) };
        after = (last.index, last.key.clone());
        // Most are listed as they are.
        let table = |i: &usize| names.get(i).map_or("", String::as_str);
        let new = first.session.admin_query(
            &format!(
                "SELECT u.n - 1 FROM unnest($2::text[], $3::text[], $4::text[], $5::text[]) WITH ORDINALITY AS u(t, k, e, d, n) \
                 WHERE NOT EXISTS (SELECT FROM crossover.conflict WHERE {UNRESOLVED} AND table_name = u.t AND key = u.k AND refused_by = $6::text \
                   AND error = u.e AND md5(first_image #>> '{{}}') IS NOT DISTINCT FROM u.d)"
            ),
            &[
                Some(&name),
                Some(&array_literal(parked.iter().map(|p| table(&p.index)))),
                Some(&array_literal(parked.iter().map(|p| &p.key))),
                Some(&array_literal(parked.iter().map(|p| &p.error))),
                Some(&nullable_array_literal(parked.iter().map(|p| p.digest.as_deref()))),
                Some(&side.to_string()),
            ],
        )?;
        for row in new {
            let place: usize = crate::store::parse(row[0].as_deref().unwrap_or(""))?;
            let p = parked.get(place).ok_or_else(|| Error::internal("malformed place"))?;
            let image = match side {
                Side::First => first.refused_image(p.index, &p.key)?,
                Side::Second => second.refused_image(p.index, &p.key)?,
            };
            let refused_by = side.to_string();
            let params = [&name, table(&p.index), &p.key, &refused_by, &p.error].map(Some);
            write(&mut first.session, &params, image.as_deref())?;
        }
    }
}

/// Makes the entry of a row what it is to be. `params`: migration, table, key, who refuses it, why.
fn write(session: &mut LocalSession, params: &[Option<&str>; 5], image: Option<&str>) -> Result<()> {
    const ENTRY: &str = "name = $1::text AND table_name = $2::text AND key = $3::text AND refused_by = $4::text AND kind = 'parked' AND resolved_at IS NULL";
    let params: Vec<Option<&str>> = params.iter().copied().chain([image]).collect();
    let updated = session.admin_execute(
        &format!("UPDATE crossover.conflict SET error = $5::text, first_image = to_jsonb($6::text) WHERE {ENTRY}"),
        &params,
    )?;
    if updated == 0 {
        session.admin_execute(
            "INSERT INTO crossover.conflict (name, table_name, key, kind, refused_by, error, first_image) \
             VALUES ($1::text, $2::text, $3::text, 'parked', $4::text, $5::text, to_jsonb($6::text))",
            &params,
        )?;
    }
    Ok(())
}

//! Rows that a store refuses, as `migration_conflicts` shows them.
//!
//! The truth is in the tables of owed scopes, beside the watermarks; what is here is a view of it that lags by half a second at most.

use crate::context::Context;
use crate::error::{Result, Side};
use crate::mapping::text::array_literal;
use crate::store::{Isolation, Owed, Session, Store};

/// A parked row: the name of its first table, the store that refuses it, and what is owed.
struct Parked {
    table: String,
    refused_by: Side,
    owed: Owed,
}

fn parked_in<S: Session>(store: &mut Store<S>, names: &[String]) -> Result<Vec<Parked>> {
    let refused_by = store.side();
    let owed = store.owed()?.into_iter().zip(names);
    Ok(owed
        .flat_map(|(owed, table)| owed.into_iter().map(move |owed| Parked { table: table.clone(), refused_by, owed }))
        .filter(|p| p.owed.error.is_some())
        .collect())
}

/// Are any listed that may have gone in since? A transaction of its own.
pub fn are_listed(ctx: &mut Context) -> bool {
    let name = ctx.migration.name.clone();
    let rows = ctx.first.session.read(
        "SELECT EXISTS (SELECT FROM crossover.conflict WHERE name = $1::text AND kind = 'parked' AND resolved_at IS NULL)",
        &[Some(&name)],
    );
    rows.is_ok_and(|r| r[0][0].as_deref() == Some("t"))
}

/// Lists what the stores refuse now, and since when a row that one of them refused is in. Transactions of its own.
pub fn list(ctx: &mut Context) -> Result<()> {
    let names: Vec<String> = ctx.pairs.iter().map(|p| p.first.rel.to_string()).collect();
    let name = ctx.migration.name.clone();
    let Ok((first, second)) = ctx.stores() else { return Ok(()) };
    let mut parked = parked_in(second, &names)?;
    first.session.begin(Isolation::ReadCommitted, &[])?;
    let result = (|| {
        parked.extend(parked_in(first, &names)?);
        let still = array_literal(parked.iter().map(|p| format!("{} {} {}", p.refused_by, p.table, p.owed.key)));
        first.session.admin_execute(
            "UPDATE crossover.conflict SET resolved_at = clock_timestamp() WHERE name = $1::text AND kind = 'parked' AND resolved_at IS NULL \
             AND concat_ws(' ', refused_by, table_name, key) <> ALL ($2::text[])",
            &[Some(&name), Some(&still)],
        )?;
        for p in &parked {
            let refused_by = p.refused_by.to_string();
            let params = [
                Some(name.as_str()),
                Some(&p.table),
                Some(&p.owed.key),
                Some(&refused_by),
                p.owed.error.as_deref(),
                p.owed.image.as_deref(),
            ];
            first.session.admin_execute(
                "UPDATE crossover.conflict SET error = $5::text, first_image = to_jsonb($6::text) \
                 WHERE name = $1::text AND table_name = $2::text AND key = $3::text AND refused_by = $4::text AND kind = 'parked' AND resolved_at IS NULL \
                   AND (error, first_image) IS DISTINCT FROM ($5::text, to_jsonb($6::text))",
                &params,
            )?;
            first.session.admin_execute(
                "INSERT INTO crossover.conflict (name, table_name, key, kind, refused_by, error, first_image) \
                 SELECT $1::text, $2::text, $3::text, 'parked', $4::text, $5::text, to_jsonb($6::text) \
                 WHERE NOT EXISTS (SELECT FROM crossover.conflict WHERE name = $1::text AND table_name = $2::text AND key = $3::text \
                   AND refused_by = $4::text AND kind = 'parked' AND resolved_at IS NULL)",
                &params,
            )?;
        }
        first.session.commit()
    })();
    if result.is_err() {
        first.session.rollback();
    }
    result
}

//! Statistics for the second store's tables, on either server, before it is exposed for the first time: autovacuum has not come to the new
//! tables yet, and never does foreign ones.

use crate::context::{Context, SecondStore};
use crate::copy::PATIENCE;
use crate::error::Result;
use crate::settings;
use crate::store::local::LocalSession;
use crate::store::{Isolation, Session, parse};

/// Bytes of rows that the analysis of a foreign table may take to this process. postgres_fdw fetches whole rows, large values too, and keeps
/// the sample in memory.
const SAMPLE: i64 = 16 << 20;
/// Rows that ANALYZE samples for each unit of default_statistics_target (std_typanalyze in PostgreSQL's analyze.c).
const ROWS_PER_UNIT: i64 = 300;

/// Analyzes all tables of the second store there, and the foreign tables here. Transactions of its own, a table each.
pub fn refresh(ctx: &mut Context) -> Result<()> {
    ctx.patiently(PATIENCE, analyze)
}

fn analyze(ctx: &mut Context) -> Result<()> {
    let names: Vec<String> = ctx.pairs.iter().map(|p| p.second.rel.to_string()).collect();
    let (first, second) = ctx.stores()?;
    for (i, name) in names.iter().enumerate() {
        analyze_there(second, i)?;
        let width = width(second, i)?;
        match SAMPLE / ROWS_PER_UNIT / width.max(1) {
            0 => pgrx::log!(
                "foreign table {name} is not analyzed: a sample of its rows, of {width} bytes on the average, would take too much memory"
            ),
            most => analyze_here(&mut first.session, name, most)?,
        }
    }
    Ok(())
}

/// An autovacuum that has the lock goes; for whoever else has it nobody waits.
fn analyze_there(second: &mut SecondStore, index: usize) -> Result<()> {
    let sql = format!("ANALYZE {}", second.tables[index].rel);
    let session = &mut second.session;
    session.begin(Isolation::ReadCommitted, &[])?;
    let analyzed = (session.become_replica())
        .and_then(|()| session.set_lock_timeout(settings::lock_attempt()))
        .and_then(|()| session.batch(&sql))
        .and_then(|()| session.commit());
    if let Err(e) = analyzed {
        session.rollback();
        if !e.is_contention() {
            return Err(e);
        }
    }
    Ok(())
}

/// About how long a row is, as text: of a hundred rows in some of the table's pages.
fn width(second: &mut SecondStore, index: usize) -> Result<i64> {
    let rel = &second.tables[index].rel;
    let pages = "SELECT pg_relation_size($1::text::regclass) / current_setting('block_size')::int";
    let pages: i64 = parse(second.one(pages, &[Some(&rel.to_string())])?.as_deref().unwrap_or("0"))?;
    #[allow(clippy::cast_precision_loss)]
    let percent = (100.0 * 100.0 / pages.max(1) as f64).min(100.0);
    let sql = format!(
        "SELECT coalesce(avg(octet_length(r)), 0)::bigint FROM (SELECT ROW(t.*)::text AS r FROM {} AS t TABLESAMPLE SYSTEM ({percent}) LIMIT 100) AS sample",
        second.tables[index].rel
    );
    parse(second.one(&sql, &[])?.as_deref().unwrap_or("0"))
}

/// With a statistics target of at most `most`.
fn analyze_here(session: &mut LocalSession, name: &str, most: i64) -> Result<()> {
    session.begin(Isolation::ReadCommitted, &[])?;
    let sql = format!(
        "SELECT set_config('default_statistics_target', least(current_setting('default_statistics_target')::bigint, {most})::text, true)"
    );
    let analyzed = session
        .query(&sql, &[])
        .and_then(|_| session.batch(&format!("ANALYZE {name}")))
        .and_then(|()| session.commit());
    if analyzed.is_err() {
        session.rollback();
    }
    analyzed
}

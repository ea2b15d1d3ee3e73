//! The start of a migration: check, install on the second server, install capture here. And the removal of it all.
//!
//! Every step can be repeated: after a crash set-up begins anew with what is left of the last try removed.

use std::time::{Duration, Instant};

use crate::catalog::{self, Move};
use crate::check::{self, Checked};
use crate::context::Context;
use crate::error::{Error, Problem, Result};
use crate::fault;
use crate::lock::{self, Patience};
use crate::mapping::model::Target;
use crate::mapping::text::array_literal;
use crate::owner;
use crate::peer;
use crate::settings;
use crate::state::Phase;
use crate::store::{Isolation, Session, Store, Watermark, parse};
use crate::views;

/// Checks everything, installs replication on both servers, and leaves the migration in phase `copying`.
///
/// # Errors
/// `Error::Mapping` with all that is wrong; `Error::LockTimeout` when the first tables' writers could not be waited for.
/// The caller removes what was installed.
pub fn run(ctx: &mut Context, patience: Patience, who: &str, caller_pid: i32) -> Result<()> {
    check_all(ctx, patience, caller_pid)?;
    warn(ctx)?;
    ctx.installing = true;
    remove_second(ctx, true)?;
    remove_first(ctx)?;
    let (truncate, fence) = (ctx.migration.options.target == Target::Truncate, ctx.migration.options.fence);
    install_second(ctx, truncate, fence)?;
    fault::point("start:peer")?;
    install_first(ctx, patience, who, caller_pid)?;
    fault::point("start:capture")?;
    ensure_watermark(ctx)?;
    fault::point("start:ready")
}

/// What whoever starts it should know, though it works.
fn warn(ctx: &mut Context) -> Result<()> {
    let named = ctx.named_tables()?;
    let session = &mut ctx.first.session;
    session.begin(Isolation::ReadCommitted, &[])?;
    let found = owner::warnings_on_first(session, &ctx.migration, &named);
    session.rollback();
    ctx.warnings = found?;
    let found = owner::warning_on_second(&mut ctx.stores()?.1.session)?;
    ctx.warnings.extend(found);
    Ok(())
}

fn check_all(ctx: &mut Context, patience: Patience, caller_pid: i32) -> Result<()> {
    let problems = loop {
        match describe(ctx, patience) {
            // Even a look at the tables waits for whoever has locked them altogether.
            Err(e) if e.is_contention() => {
                let error = locked_out(ctx, patience, caller_pid)?;
                if patience.is_over() || error.is_caller_in_the_way() {
                    return Err(error);
                }
                patience.pause()?;
            }
            result => break result?,
        }
    };
    if problems.is_empty() { Ok(()) } else { Err(Error::Mapping { name: ctx.migration.name.clone(), problems }) }
}

/// The error for tables that cannot be looked at, with who has locked them.
fn locked_out(ctx: &mut Context, patience: Patience, caller_pid: i32) -> Result<Error> {
    ctx.rollback_all();
    let names = array_literal(ctx.named_tables()?.iter().flat_map(|n| [n.first.to_string(), n.second.to_string()]));
    let session = &mut ctx.first.session;
    session.begin(Isolation::ReadCommitted, &[])?;
    let found = session
        .query(
            "SELECT to_regclass(n)::oid::int8 FROM unnest($1::text[]) AS n WHERE to_regclass(n) IS NOT NULL",
            &[Some(&names)],
        )
        .and_then(|rows| rows.iter().map(|r| parse(r[0].as_deref().unwrap_or(""))).collect::<Result<Vec<u32>>>())
        .and_then(|oids| lock::in_the_way(session, &oids, "first", caller_pid, false));
    session.rollback();
    Ok(lock::timed_out(&ctx.migration.name, &patience, found?))
}

/// Describes the tables of both servers, compiles the rules, and says what is wrong. Only where nothing is are the tables set.
///
/// # Errors
/// Those of the connection; contention when a table is locked for as long as one attempt may last.
pub fn describe(ctx: &mut Context, patience: Patience) -> Result<Vec<Problem>> {
    let named = ctx.named_tables()?;
    let session = &mut ctx.first.session;
    session.begin(Isolation::ReadCommitted, &[])?;
    let checked = session
        .set_lock_timeout(patience.attempt().saturating_duration_since(Instant::now()).max(Duration::from_millis(1)))
        .and_then(|()| owner::on_first(session, &ctx.migration, &named))
        .and_then(|lacking| {
            // Without its schema a table cannot even be looked at.
            if lacking.is_empty() {
                check::first_server(session, &ctx.migration, &named)
            } else {
                Ok((Checked::default(), lacking))
            }
        });
    session.rollback();
    let (checked, mut problems) = checked?;
    ctx.migration.server_id = checked.server_id;
    if checked.server_id == 0 {
        return Ok(problems);
    }
    match ctx.connect() {
        Ok(()) => {
            let second = ctx.second.as_mut().ok_or_else(|| Error::internal("not connected"))?;
            second.session.set_deadline(Some(patience.deadline));
            let there: Vec<_> = checked.pairs.iter().map(|p| &p.second.remote).collect();
            let lacking = owner::on_second(&mut second.session, second.objects.schema(), &there)?;
            if !lacking.is_empty() {
                problems.extend(lacking);
                second.session.set_deadline(None);
                return Ok(problems);
            }
            let (tables, found) = check::second_server(&mut second.session, &ctx.migration, &checked.pairs)?;
            second.session.set_deadline(None);
            problems.extend(found);
            if checked.pairs.len() == named.len() && tables.len() == named.len() {
                ctx.set_tables(checked.pairs, checked.first_tables, tables);
            }
        }
        Err(e) if problems.is_empty() => return Err(e),
        Err(e) => problems.push(Problem::new("second server", e.to_string())),
    }
    Ok(problems)
}

/// Installs replication on the second server, in a transaction of its own.
pub fn install_second(ctx: &mut Context, truncate: bool, fence: bool) -> Result<()> {
    let (_, second) = ctx.stores()?;
    let objects = second.objects.clone();
    second.session.set_deadline(Some(Instant::now() + Duration::from_secs(30)));
    peer::begin_in_schema(&mut second.session, objects.schema())?;
    second.session.batch(&objects.install(settings::log_rotation()))?;
    second.install_capture()?;
    if truncate {
        let rels: Vec<String> = second.tables.iter().map(|t| t.rel.to_string()).collect();
        second.session.batch(&format!("TRUNCATE {}", rels.join(", ")))?;
    }
    if fence {
        second.set_fence(true)?;
    }
    second.session.commit()?;
    second.session.set_deadline(None);
    Ok(())
}

fn install_first(ctx: &mut Context, patience: Patience, who: &str, caller_pid: i32) -> Result<()> {
    let oids: Vec<u32> = ctx.first_tables.iter().map(|(oid, _)| *oid).collect();
    let takeover = check::takes_over_at_start(&ctx.migration);
    let mode = if takeover { pgrx::pg_sys::AccessExclusiveLock } else { pgrx::pg_sys::ShareRowExclusiveLock };
    loop {
        let before = (ctx.migration.clone(), ctx.first_tables.clone());
        ctx.first.session.begin(Isolation::ReadCommitted, &[])?;
        // The lock waits for writers that were there before the triggers: whatever they wrote is in every later snapshot.
        let locked = ctx.first.session.lock_relations(&oids, mode as i32, patience.attempt());
        match locked.and_then(|()| install_first_locked(ctx, who)) {
            Ok(()) => return ctx.first.session.commit(),
            Err(e) if e.is_contention() => {
                ctx.first.session.rollback();
                ctx.migration = before.0;
                ctx.rename_first(before.1.into_iter().map(|(_, rel)| rel).collect());
                ctx.first.session.begin(Isolation::ReadCommitted, &[])?;
                let holders = lock::in_the_way(&mut ctx.first.session, &oids, "first", caller_pid, takeover);
                ctx.first.session.rollback();
                let error = lock::timed_out(&ctx.migration.name, &patience, holders?);
                if patience.is_over() || error.is_caller_in_the_way() {
                    return Err(error);
                }
                patience.pause()?;
            }
            Err(e) => {
                ctx.first.session.rollback();
                return Err(e);
            }
        }
    }
}

fn install_first_locked(ctx: &mut Context, who: &str) -> Result<()> {
    let Context { migration, pairs, first, first_tables, .. } = ctx;
    let objects = first.objects.clone();
    first.session.admin_batch(&objects.install(settings::log_rotation()))?;
    views::create_rule_views(&mut first.session, pairs, migration, &objects)?;
    first.install_capture()?;
    for (pair, (oid, _)) in pairs.iter().zip(first_tables.iter()) {
        first.session.admin_execute(
            "INSERT INTO crossover.migrated_table (migration_id, index, first_table, table_name, rows_estimated) \
             SELECT $1::text::int, $2::text::int, $3::text::oid, $4::text, coalesce(sum(greatest(reltuples, 0)), 0)::bigint FROM pg_class \
             WHERE oid = $3::text::oid AND relkind = 'r' OR oid IN (SELECT relid FROM pg_partition_tree($3::text::oid::regclass) WHERE isleaf)",
            &[
                Some(&migration.id.to_string()),
                Some(&pair.index.to_string()),
                Some(&oid.to_string()),
                Some(&pair.first.rel.to_string()),
            ],
        )?;
    }
    migration.phase = Phase::Copying;
    let (name, state) = (migration.name.clone(), migration.state);
    if check::takes_over_at_start(migration) {
        views::take_over(ctx)?;
    }
    ctx.migration.store(&mut ctx.first.session)?;
    catalog::record_history(&mut ctx.first.session, &Move::new(&name, who, None, state))
}

/// The watermarks that the copy starts from: snapshots taken after capture was there. Harmless when they are set.
pub fn ensure_watermark(ctx: &mut Context) -> Result<()> {
    let (first, second) = ctx.stores()?;
    if second.watermark()?.is_none() {
        let snapshot = begin_snapshot(first)?;
        let counter = first.flush()?;
        second.session.begin(Isolation::ReadCommitted, &[])?;
        second.set_watermark(&Watermark { snapshot, counter })?;
        second.session.commit()?;
    }
    fault::point("start:watermark")?;
    first.session.begin(Isolation::ReadCommitted, &[])?;
    if first.watermark()?.is_none() {
        let snapshot = begin_snapshot(second)?;
        let counter = second.flush()?;
        first.set_watermark(&Watermark { snapshot, counter })?;
    }
    first.session.commit()
}

fn begin_snapshot<S: Session>(store: &mut Store<S>) -> Result<crate::store::Snapshot> {
    store.session.begin(Isolation::ReadCommitted, &[])?;
    let snapshot = store.snapshot()?;
    store.session.commit()?;
    Ok(snapshot)
}

/// Removes what the migration has on the second server; the rows stay. A transaction for each table, so that clients that
/// lock the tables in another order are never in the way of more than one; then one for the rest. Repeatable.
pub fn remove_second(ctx: &mut Context, keep_schema: bool) -> Result<()> {
    ctx.connect()?;
    // The mapping's: after a crash in `finishing` the first tables may be gone, and nothing is known of either.
    let tables = ctx.named_tables()?.len();
    let (_, second) = ctx.stores()?;
    for sql in second.drop_triggers()? {
        in_transaction(&mut second.session, |session| session.batch(&sql))?;
    }
    fault::point("cleanup:triggers")?;
    let sql = second.objects.uninstall(tables);
    let schema = second.objects.schema().clone();
    in_transaction(&mut second.session, |session| {
        session.batch(&sql)?;
        if keep_schema { Ok(()) } else { peer::drop_if_empty(session, &schema) }
    })
}

/// Runs `work` in a transaction that waits for a lock no longer than an attempt of a switch does.
fn in_transaction<S: Session>(session: &mut S, work: impl FnOnce(&mut S) -> Result<()>) -> Result<()> {
    session.begin(Isolation::ReadCommitted, &[])?;
    let result = session
        .set_lock_timeout(settings::lock_attempt())
        .and_then(|()| session.become_replica())
        .and_then(|()| work(session))
        .and_then(|()| session.commit());
    if result.is_err() {
        session.rollback();
    }
    result
}

/// Has set-up installed capture here?
pub fn is_captured(ctx: &mut Context) -> Result<bool> {
    let rows = ctx.first.session.read(
        "SELECT EXISTS (SELECT FROM crossover.migrated_table WHERE migration_id = $1::text::int)",
        &[Some(&ctx.migration.id.to_string())],
    )?;
    Ok(rows[0][0].as_deref() == Some("t"))
}

/// Removes what the migration has here, in a transaction of its own (set-up and its undoing).
pub fn remove_first(ctx: &mut Context) -> Result<()> {
    ctx.first.session.begin(Isolation::ReadCommitted, &[])?;
    let result = remove_first_locked(ctx).and_then(|()| ctx.first.session.commit());
    if result.is_err() {
        ctx.first.session.rollback();
    }
    result
}

/// Removes triggers, logs and rule views here, in the caller's transaction.
pub fn remove_first_locked(ctx: &mut Context) -> Result<()> {
    // The mapping's: of tables that were dropped, rule views may be left.
    let tables = ctx.named_tables()?.len();
    let Context { first, migration, .. } = ctx;
    for sql in first.drop_triggers()? {
        first.session.admin_batch(&sql)?;
    }
    views::drop_rule_views(&mut first.session, tables, &first.objects)?;
    let sql = first.objects.uninstall(tables);
    first.session.admin_batch(&sql)?;
    let id = migration.id.to_string();
    first.session.admin_execute("DELETE FROM crossover.chunk WHERE migration_id = $1::text::int", &[Some(&id)])?;
    if migration.phase == Phase::SettingUp {
        first
            .session
            .admin_execute("DELETE FROM crossover.migrated_table WHERE migration_id = $1::text::int", &[Some(&id)])?;
    }
    Ok(())
}

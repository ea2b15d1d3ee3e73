//! Has a server come back from before a point that had been replicated: restored, or promoted without its last commits?
//!
//! A look on each new connection, for the second server's sake, and at the start of the worker, for the first's; within a connection
//! neither can happen. What cannot be proved to be whole is phase `diverged`, which is kept in the catalog: nothing is replicated, logs are
//! kept, and no store is newly exposed, until an operator decides ([`crate::reconcile`], [`crate::resync`]) or the proof holds again,
//! because it was the wrong server.

use std::time::{Duration, Instant};

use crate::catalog::{self, Divergence, Migration, Move};
use crate::context::Context;
use crate::error::{Error, Result, Side};
use crate::mapping::text::array_literal;
use crate::settings;
use crate::state::{Phase, State};
use crate::store::{Isolation, Session, Snapshot, Store, Watermark, parse};

/// How often a diverged migration is looked at again.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// How far a store is, and how far it knows the other to be.
#[derive(Debug, Clone, Default)]
struct Standing {
    mark: Option<Watermark>,
    counter: i64,
    cut: Option<Snapshot>,
}

/// What each store says of the copy.
#[derive(Debug, Clone, Copy, Default)]
struct Copied {
    /// Chunks that first knows to be on the second store, and those of them that are there.
    known: i64,
    there: i64,
    /// The second store has one that first has not handed out.
    unknown: bool,
}

impl Divergence {
    pub fn error(&self, migration: &Migration) -> Error {
        Error::Diverged { name: migration.name.clone(), state: migration.state, detail: self.detail.clone() }
    }
}

/// Looks once per connection; anything that replicates calls it before it reads a watermark. Transactions of its own on both stores.
///
/// # Errors
/// `Error::Diverged`, and then it is written down.
pub fn guard(ctx: &mut Context) -> Result<()> {
    if let Some(diverged) = &ctx.migration.diverged {
        return Err(diverged.error(&ctx.migration));
    }
    if ctx.verified {
        return Ok(());
    }
    if let Some(found) = look(ctx)? {
        return Err(record(ctx, found)?);
    }
    mend_fence(ctx)?;
    ctx.verified = true;
    Ok(())
}

/// Makes `Error::Lost`, which a cycle has met, the phase and the error that it is.
pub fn met(ctx: &mut Context, error: Error) -> Error {
    match error {
        Error::Lost { side, detail } => record(ctx, Divergence { lost: side, detail }).unwrap_or_else(|e| e),
        e => e,
    }
}

/// A diverged migration's turn: is it still? An operator who began to reconcile the stores is not waited for.
pub fn stay(ctx: &mut Context, looked_at: &mut Instant) -> Result<()> {
    if looked_at.elapsed() < LOOK_EVERY {
        return Ok(());
    }
    *looked_at = Instant::now();
    ctx.connect()?;
    match look(ctx)? {
        Some(_) => Ok(()),
        None => {
            pgrx::log!("the stores of migration \"{}\" have not diverged after all", ctx.migration.name);
            store(ctx, None)
        }
    }
}

fn record(ctx: &mut Context, found: Divergence) -> Result<Error> {
    ctx.rollback_all();
    let error = found.error(&ctx.migration);
    pgrx::warning!("the stores of migration \"{}\" have diverged: {}", ctx.migration.name, found.detail);
    store(ctx, Some(found))?;
    Ok(error)
}

fn store(ctx: &mut Context, diverged: Option<Divergence>) -> Result<()> {
    let before = std::mem::replace(&mut ctx.migration.diverged, diverged);
    let Context { migration, first, .. } = ctx;
    first.session.begin(Isolation::ReadCommitted, &[])?;
    let result = migration
        .store(&mut first.session)
        .and_then(|()| {
            let reason = match &migration.diverged {
                Some(d) => format!("diverged: {}", d.detail),
                None => "not diverged after all".into(),
            };
            let owner = migration.owner_name.as_str().to_string();
            let made = Move {
                reason: Some(&reason),
                ..Move::new(&migration.name, &owner, Some(migration.state), migration.state)
            };
            catalog::record_history(&mut first.session, &made)
        })
        .and_then(|()| first.session.commit());
    if result.is_err() {
        first.session.rollback();
        migration.diverged = before;
    }
    result
}

fn look(ctx: &mut Context) -> Result<Option<Divergence>> {
    let phase = ctx.migration.phase;
    let id = ctx.migration.id.to_string();
    let (first, second) = ctx.stores()?;
    if !is_installed(second)? {
        return Ok(Some(Divergence {
            lost: Side::Second,
            detail: "The second server holds nothing of this migration: it is another one, or was restored from before the start.".into(),
        }));
    }
    let theirs = standing(second)?;
    let furthest = format!("SELECT source, max(chunk) FROM {} GROUP BY source", second.objects.chunk());
    let furthest = second.session.query(&furthest, &[])?;
    first.session.begin(Isolation::ReadCommitted, &[])?;
    let ours = (|| {
        let ours = standing(first)?;
        let handed_out = first.session.admin_query(
            "SELECT index, last_chunk FROM crossover.migrated_table WHERE migration_id = $1::text::int",
            &[Some(&id)],
        )?;
        let under_way = first.session.admin_query(
            "SELECT index || ' ' || chunk FROM crossover.chunk WHERE migration_id = $1::text::int",
            &[Some(&id)],
        )?;
        Ok((ours, handed_out, under_way))
    })();
    first.session.rollback();
    let (ours, handed_out, under_way) = ours?;
    let pairs = |rows: &[crate::store::Row]| -> Result<Vec<(i64, i64)>> {
        let number = |v: &Option<String>| parse::<i64>(v.as_deref().unwrap_or("0"));
        rows.iter().map(|r| Ok((number(&r[0])?, number(&r[1])?))).collect()
    };
    let (handed_out, furthest) = (pairs(&handed_out)?, pairs(&furthest)?);
    let unknown = furthest.iter().any(|(i, chunk)| !handed_out.iter().any(|(j, last)| i == j && chunk <= last));
    let sources = array_literal(handed_out.iter().map(|(i, _)| i.to_string()));
    let lasts = array_literal(handed_out.iter().map(|(_, last)| last.to_string()));
    let busy = array_literal(under_way.iter().map(|r| r[0].clone().unwrap_or_default()));
    let there = format!(
        "SELECT count(*) FROM {} c JOIN unnest($1::text[]::int[], $2::text[]::bigint[]) AS h(source, last) ON c.source = h.source AND c.chunk <= h.last \
         WHERE c.source || ' ' || c.chunk <> ALL ($3::text[])",
        second.objects.chunk()
    );
    let there = second.one(&there, &[Some(&sources), Some(&lasts), Some(&busy)])?;
    let copied = Copied {
        known: handed_out.iter().map(|(_, last)| last).sum::<i64>() - under_way.len() as i64,
        there: parse(there.as_deref().unwrap_or("0"))?,
        unknown,
    };
    Ok(judge(phase == Phase::Copying, &ours, &theirs, copied))
}

/// Is what the migration keeps on this store there?
pub fn is_installed<S: Session>(store: &mut Store<S>) -> Result<bool> {
    let names =
        [store.objects.mark().to_string(), store.objects.counter().to_string(), store.objects.log().to_string()];
    let sql = "SELECT bool_and(to_regclass(n) IS NOT NULL)::text FROM unnest($1::text[]) AS n";
    Ok(store.one(sql, &[Some(&array_literal(names))])?.as_deref() == Some("true"))
}

fn standing<S: Session>(store: &mut Store<S>) -> Result<Standing> {
    Ok(Standing { mark: store.watermark()?, counter: store.counter()?, cut: store.cut()? })
}

/// What has been lost, if anything. Pure.
fn judge(copying: bool, first: &Standing, second: &Standing, copied: Copied) -> Option<Divergence> {
    direction(Side::First, first, Side::Second, second, copying)
        .or_else(|| direction(Side::Second, second, Side::First, first, copying))
        .or_else(|| {
            (copied.there < copied.known).then(|| Divergence {
                lost: Side::Second,
                detail: format!(
                    "The second store has {} of the {} parts of the copy that were committed there.",
                    copied.there, copied.known
                ),
            })
        })
        .or_else(|| {
            copied.unknown.then(|| Divergence {
                lost: Side::First,
                detail: "The second store has parts of the copy that the first server has never handed out.".into(),
            })
        })
}

fn direction(source: Side, from: &Standing, destination: Side, to: &Standing, copying: bool) -> Option<Divergence> {
    let lost = |lost: Side, detail: String| Some(Divergence { lost, detail });
    let Some(mark) = &to.mark else {
        // The copy sets the first one.
        return if copying { None } else { lost(destination, format!("The {destination} store has no watermark.")) };
    };
    if from.counter < mark.counter {
        return lost(source, lower_counter(source, from.counter, mark.counter));
    }
    match &from.cut {
        Some(cut) if !mark.snapshot.covers(cut) => lost(
            destination,
            format!(
                "The {destination} store has changes of the {source} store up to a point before those that the change log still has: it has \
                 lost commits."
            ),
        ),
        _ => None,
    }
}

/// A source that is not as far as its destination knows it to be.
pub fn lower_counter(source: Side, counter: i64, known: i64) -> String {
    format!(
        "The {source} store stands at counter {counter}, but changes up to counter {known} have been replicated from it: it has lost commits."
    )
}

/// The second store's fence is as its server last committed it, which may be as it was before the last switch.
fn mend_fence(ctx: &mut Context) -> Result<()> {
    let (state, phase, wanted) = (ctx.migration.state, ctx.migration.phase, ctx.migration.options.fence);
    if phase != Phase::Replicating {
        return Ok(());
    }
    let (_, second) = ctx.stores()?;
    let fenced = second.fences()?;
    match state {
        State::First if wanted && fenced.contains(&false) => ctx.set_phase(Phase::FencePending),
        State::Both | State::Second if fenced.contains(&true) => {
            second.session.begin(Isolation::ReadCommitted, &[])?;
            second.session.become_replica()?;
            second.session.set_lock_timeout(settings::lock_attempt())?;
            second.set_fence(false)?;
            second.session.commit()
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn standing(mark: (&str, i64), counter: i64, cut: Option<&str>) -> Standing {
        let mark = Some(Watermark { snapshot: Snapshot::new(mark.0), counter: mark.1 });
        Standing { mark, counter, cut: cut.map(Snapshot::new) }
    }

    fn lost(first: &Standing, second: &Standing) -> Option<Side> {
        judge(false, first, second, Copied::default()).map(|d| d.lost)
    }

    #[test]
    fn whoever_is_behind_what_the_other_knows_has_lost() {
        let first = standing(("100:100:", 4), 7, Some("50:50:"));
        let second = standing(("60:60:", 7), 4, Some("90:90:"));
        assert_eq!(lost(&first, &second), None);
        assert_eq!(lost(&Standing { counter: 6, ..first.clone() }, &second), Some(Side::First));
        assert_eq!(lost(&first, &Standing { counter: 3, ..second.clone() }), Some(Side::Second));
        assert_eq!(lost(&first, &standing(("49:49:", 5), 4, None)), Some(Side::Second));
        assert_eq!(lost(&standing(("95:100:95", 4), 7, None), &second), None);
        assert_eq!(lost(&standing(("80:100:80", 4), 7, None), &second), Some(Side::First));
        assert_eq!(lost(&first, &Standing { mark: None, ..second.clone() }), Some(Side::Second));
    }

    #[test]
    fn parts_of_the_copy_count() {
        let (first, second) = (standing(("9:9:", 0), 1, None), standing(("9:9:", 1), 0, None));
        let judged =
            |known, there, unknown| judge(true, &first, &second, Copied { known, there, unknown }).map(|d| d.lost);
        assert_eq!(judged(3, 3, false), None);
        assert_eq!(judged(3, 2, false), Some(Side::Second));
        assert_eq!(judged(3, 3, true), Some(Side::First));
    }
}

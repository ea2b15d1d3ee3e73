//! One run of replication: read the change logs, derive the rows anew, decide, apply, look again.
//!
//! While one store only is exposed the other has no clients, and a cycle streams its batches through
//! ([`one_way`]); while both are, one cycle serves both directions ([`two_way`]). The switch composes the same steps
//! under its locks. A watermark commits with the rows that it speaks for, after its source has been flushed.

pub mod apply;
pub mod plan;
pub mod write;

use std::collections::BTreeMap;
use std::time::Duration;

use self::apply::{Aside, Contended, batches, missing, settle};
use self::plan::Plan;
use self::write::{BATCH, Writer};
use crate::catalog::Migration;
use crate::context::{Context, FirstStore, SecondStore};
use crate::divergence;
use crate::error::{Error, Result, Side};
use crate::fault;
use crate::mapping::model::Policy;
use crate::mapping::rule::Pair;
use crate::state::Phase;
use crate::store::postgres::PATIENCE;
use crate::store::{Changes, Derived, Isolation, Key, Owed, Session, Store, Watermark};

/// A write in `both` yields to a client after this long at one lock, well below PostgreSQL's deadlock_timeout of 1 s.
const YIELD_AFTER: Duration = Duration::from_millis(200);
/// Where no client may notice the second server, a transaction on first ends after this long without an answer of it.
pub const STALL: Duration = Duration::from_secs(5);

/// What a cycle did.
#[derive(Debug, Clone, Copy, Default)]
pub struct Outcome {
    /// Changed scopes read.
    pub scopes: usize,
    /// Rows written or deleted.
    pub rows: u64,
    /// Scopes that a client held; they come again.
    pub contended: usize,
    /// Rows that a target refuses, all in all.
    pub parked: usize,
    /// The oldest change that this cycle has read.
    pub oldest: Option<i64>,
}

/// Which directions are replicated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Directions {
    pub forward: bool,
    pub backward: bool,
}

impl Directions {
    pub const BOTH: Directions = Directions { forward: true, backward: true };

    pub fn of(migration: &Migration) -> Directions {
        match migration.phase {
            Phase::FencePending | Phase::Reconciling => return Directions::BOTH,
            Phase::CatchingUp => return Directions { forward: true, backward: false },
            _ => {}
        }
        Directions { forward: migration.state.replicates_forward(), backward: migration.state.replicates_backward() }
    }
}

/// Runs one cycle, in transactions of its own on both stores. `retry_parked`: try the parked rows again, too.
///
/// # Errors
/// Whatever a server reports; nothing is half done, and the next cycle repeats what is missing.
pub fn run(ctx: &mut Context, retry_parked: bool) -> Result<Outcome> {
    ctx.connect()?;
    divergence::guard(ctx)?;
    ctx.refresh_constraints()?;
    let directions = Directions::of(&ctx.migration);
    let name = ctx.migration.name.clone();
    // Rows that one server has lost are no wish of a client's.
    let reconciling = ctx.migration.phase == Phase::Reconciling;
    let policy = if reconciling { Policy::Latest } else { ctx.migration.options.conflicts };
    let fence = ctx.migration.options.fence;
    let Context { pairs, first, second, .. } = ctx;
    let second = second.as_mut().ok_or_else(|| Error::internal("not connected"))?;
    second.session.set_patience(if directions.backward { PATIENCE } else { STALL });
    let once = |first: &mut FirstStore, second: &mut SecondStore| match directions {
        Directions { forward: true, backward: true } => two_way(&name, policy, pairs, first, second, retry_parked),
        Directions { forward: true, .. } => one_way(first, second, retry_parked),
        Directions { backward: true, .. } => one_way(second, first, retry_parked),
        _ => Ok(Outcome::default()),
    };
    let mut result = once(first, second);
    if matches!(result, Err(Error::CaptureChanged)) {
        first.session.rollback();
        second.session.rollback();
        result = first
            .renew_capture(directions.forward, !directions.forward)
            .and_then(|()| fault::point("capture:renewed"))
            .and_then(|()| second.renew_capture(directions.backward, fence && !directions.backward))
            .and_then(|()| once(first, second));
    }
    result.map_err(|e| {
        ctx.rollback_all();
        match e {
            Error::NotCaptured { detail, .. } => Error::NotCaptured { name, detail },
            e => divergence::met(ctx, e),
        }
    })
}

/// What a cycle does for the capture of its sources, while the copy runs and there are no cycles. A transaction of its own.
///
/// # Errors
/// As [`Store::check_capture`]; a client that is in the way is none.
pub fn look_after_capture(ctx: &mut Context) -> Result<()> {
    ctx.first.session.begin(Isolation::ReadCommitted, &[])?;
    let result = ctx.first.check_capture();
    ctx.first.session.rollback();
    match result {
        Err(Error::CaptureChanged) => match ctx.first.renew_capture(true, false) {
            Err(e) if e.is_contention() => Ok(()),
            other => other,
        },
        Err(Error::NotCaptured { detail, .. }) => Err(Error::NotCaptured { name: ctx.migration.name.clone(), detail }),
        other => other,
    }
}

/// The changes of one direction: the log's since the watermark that `destination` keeps, and what is owed to it.
pub struct Incoming {
    pub changes: Vec<Changes>,
    pub owed: Vec<Vec<Owed>>,
}

impl Incoming {
    fn is_empty(&self) -> bool {
        self.changes.iter().all(Changes::is_empty)
    }

    fn scopes(&self) -> usize {
        self.changes.iter().map(|c| c.keys.len() + usize::from(c.whole.is_some())).sum()
    }

    /// A parked row whose other side has changed takes part in the decision at once, or its image would be overwritten unseen.
    fn wake_parked(&mut self, opposite: &Incoming) {
        for ((changes, owed), other) in self.changes.iter_mut().zip(&self.owed).zip(&opposite.changes) {
            for o in owed.iter().filter(|o| o.error.is_some()) {
                if other.whole.is_some() || other.keys.contains_key(&o.key) {
                    changes.add(o.key.clone(), o.at);
                }
            }
        }
    }

    pub fn log_rows(&self) -> i64 {
        self.changes.iter().map(|c| c.log_rows).sum()
    }

    fn parked(&self) -> usize {
        self.owed.iter().flatten().filter(|o| o.error.is_some()).count()
    }
}

/// Reads what `destination` has not seen of `source` yet, in the transactions that both are in.
///
/// # Errors
/// `Error::Lost` when the source has lost changes that the watermark covers.
pub fn incoming<A: Session, B: Session>(
    source: &mut Store<A>,
    destination: &mut Store<B>,
    retry_parked: bool,
) -> Result<Incoming> {
    let watermark = destination.watermark()?.ok_or_else(|| Error::internal("no watermark"))?;
    let owed = destination.owed()?;
    let counter = source.counter()?;
    if counter < watermark.counter {
        let detail = divergence::lower_counter(source.side(), counter, watermark.counter);
        return Err(Error::Lost { side: source.side(), detail });
    }
    let mut changes = source.changes(&watermark.snapshot)?;
    for (table, owed) in changes.iter_mut().zip(&owed) {
        for o in owed.iter().filter(|o| o.error.is_none() || retry_parked) {
            table.add(o.key.clone(), o.at);
        }
    }
    Ok(Incoming { changes, owed })
}

/// One direction; the destination is fenced, so nobody else writes there.
fn one_way<A: Session, B: Session>(
    source: &mut Store<A>,
    destination: &mut Store<B>,
    retry_parked: bool,
) -> Result<Outcome> {
    let capture = source.side();
    let seen = source.begin_read()?;
    source.check_capture()?;
    destination.session.begin(Isolation::ReadCommitted, &[])?;
    destination.check_idle_capture()?;
    let incoming = incoming(source, destination, retry_parked)?;
    let mut outcome = Outcome { parked: incoming.parked(), ..Outcome::default() };
    if incoming.is_empty() {
        destination.session.rollback();
        source.end_read()?;
        return Ok(outcome);
    }
    destination.mark_origin()?;
    outcome.scopes = incoming.scopes();
    outcome.oldest = incoming.changes.iter().filter_map(Changes::oldest).min();
    fault::point("cycle:read")?;
    let mut owed: Vec<Vec<Owed>> = vec![Vec::new(); incoming.changes.len()];
    // Deletes first, children before parents: a unique value may have moved to another key.
    for (i, changes) in incoming.changes.iter().enumerate().rev() {
        for keys in batches(changes) {
            let keys = keys.as_deref();
            let derived = source.derive(i, keys)?;
            let mut gone = missing(destination, i, keys, &derived)?;
            keep_parents(destination, &incoming, i, &mut gone, &mut owed[i])?;
            for gone in gone.iter().collect::<Vec<_>>().chunks(BATCH) {
                outcome.rows += destination.delete(i, gone)?;
            }
        }
    }
    for (i, changes) in incoming.changes.iter().enumerate() {
        let at = |key: &Key| changes.at(key);
        for keys in batches(changes) {
            let derived = source.derive(i, keys.as_deref())?;
            // Nobody else writes here: whatever row is in the way, the source knows what it is to be.
            let mut others = |keys: &[Key]| {
                let derived = source.derive(i, Some(&keys.iter().collect::<Vec<_>>()))?;
                let known = keys.iter().filter(|k| !derived.refused.contains_key(*k));
                Ok(known.map(|k| (k.clone(), derived.rows.get(k).cloned())).collect())
            };
            let mut writer = Writer::new(i, false, &at, &mut others);
            writer.write(destination, &derived.list())?;
            outcome.rows += writer.written;
            owed[i].extend(writer.parked);
            owed[i].extend(Derived::parked(&derived.refused, &at));
        }
    }
    for (i, changes) in incoming.changes.iter().enumerate() {
        refuse_violations(source, destination, i, changes, &mut owed[i])?;
    }
    for (i, changes) in incoming.changes.iter().enumerate() {
        let settled: Vec<Key> = changes.keys.keys().cloned().collect();
        settle(destination, i, &incoming.owed[i], changes, &settled, &owed[i])?;
    }
    let parked: usize = owed.iter().map(Vec::len).sum();
    source.end_read()?;
    let counter = source.flush()?;
    fault::point("cycle:flushed")?;
    destination.set_watermark(&Watermark { snapshot: seen, counter })?;
    fault::point(if capture == Side::First { "cycle:second-written" } else { "cycle:first-written" })?;
    destination.session.commit()?;
    fault::point(if capture == Side::First { "cycle:second-committed" } else { "cycle:first-committed" })?;
    outcome.parked = parked + incoming.owed.iter().flatten().filter(|o| o.error.is_some() && !retry_parked).count();
    Ok(outcome)
}

/// A parent that is to go while a row of the destination refers to it, by a foreign key that the source has not: its deletion is refused.
fn keep_parents<S: Session>(
    destination: &mut Store<S>,
    incoming: &Incoming,
    index: usize,
    gone: &mut Vec<Key>,
    owed: &mut Vec<Owed>,
) -> Result<()> {
    for reference in destination.constraints.children_of(index).into_iter().filter(|r| !r.mirrored) {
        for keys in gone.clone().iter().collect::<Vec<_>>().chunks(BATCH) {
            for (parent, child) in destination.children(&reference, keys)? {
                let changes = reference.child_index.map(|c| &incoming.changes[c]);
                // A child that changes as well is looked at afterwards.
                let changes_too = child.zip(changes).is_some_and(|(k, c)| c.whole.is_some() || c.keys.contains_key(&k));
                if !changes_too && gone.contains(&parent) {
                    gone.retain(|k| *k != parent);
                    let at = incoming.changes[index].at(&parent);
                    owed.push(Owed { key: parent, at, error: Some(reference.still_referred()), image: None });
                }
            }
        }
    }
    Ok(())
}

/// Replica mode checks no foreign keys and no deferrable constraints: rows that violate one which the source has not are taken out
/// again, and parked.
fn refuse_violations<A: Session, B: Session>(
    source: &mut Store<A>,
    destination: &mut Store<B>,
    index: usize,
    changes: &Changes,
    owed: &mut Vec<Owed>,
) -> Result<()> {
    let references: Vec<_> = destination.constraints.parents_of(index).into_iter().filter(|r| !r.mirrored).collect();
    if references.is_empty() && !destination.has_uniques(index, true) {
        return Ok(());
    }
    for keys in batches(changes) {
        let mut bad: BTreeMap<Key, String> = BTreeMap::new();
        let derived = source.derive(index, keys.as_deref())?;
        for batch in derived.list().chunks(BATCH) {
            let (keys, rows): (Vec<&Key>, Vec<&str>) = batch.iter().copied().unzip();
            for reference in &references {
                for orphan in destination.orphans(reference, &keys)? {
                    bad.insert(orphan.key, reference.no_parent());
                }
            }
            for (key, other) in destination.in_the_way(index, &rows, true)? {
                if !bad.contains_key(&other) {
                    bad.insert(key, format!("it repeats a unique value of the row {other}"));
                }
            }
        }
        destination.delete(index, &bad.keys().collect::<Vec<_>>())?;
        owed.retain(|o| !bad.contains_key(&o.key));
        owed.extend(bad.into_iter().map(|(key, error)| Owed {
            at: changes.at(&key),
            error: Some(error),
            image: derived.rows.get(&key).cloned(),
            key,
        }));
    }
    Ok(())
}

/// Both directions: first commits first, with the conflicts; then second.
fn two_way(
    name: &str,
    policy: Policy,
    pairs: &[Pair],
    first: &mut FirstStore,
    second: &mut SecondStore,
    retry_parked: bool,
) -> Result<Outcome> {
    let s1 = first.begin_read()?;
    let s2 = second.begin_read()?;
    first.check_capture()?;
    second.check_capture()?;
    let mut forward = incoming(first, second, retry_parked)?;
    let mut backward = incoming(second, first, retry_parked)?;
    forward.wake_parked(&backward);
    backward.wake_parked(&forward);
    let parked = forward.parked() + backward.parked();
    if forward.is_empty() && backward.is_empty() {
        second.end_read()?;
        first.end_read()?;
        return Ok(Outcome { parked, ..Outcome::default() });
    }
    let plan = Plan::make(policy, pairs, first, second, forward, backward)?;
    second.end_read()?;
    first.end_read()?;
    fault::point("cycle:read")?;
    let mut outcome = Outcome { scopes: plan.scopes(), oldest: plan.oldest(), ..Outcome::default() };
    let counter2 = if plan.writes_first() { Some(second.flush()?) } else { None };
    fault::point("cycle:flushed")?;

    // What first owes to itself is, in a conflict, owed to second as well: the next cycle must see both changes.
    let mut aside = Aside::none(pairs.len());
    let counter1;
    loop {
        first.begin_write()?;
        first.session.set_lock_timeout(YIELD_AFTER)?;
        let written = plan.write_first(first, pairs, name, &s1, &mut aside, Contended::Skip, Some(Side::First))?;
        outcome.rows += written.rows;
        if written.again {
            first.session.rollback();
            continue;
        }
        if let Some(counter) = counter2 {
            first.set_watermark(&Watermark { snapshot: s2.clone(), counter })?;
        }
        fault::point("cycle:first-written")?;
        counter1 = bump(first)?;
        first.session.commit()?;
        outcome.parked += written.parked;
        break;
    }
    fault::point("cycle:first-committed")?;
    outcome.contended += aside.iter().map(|a| a.held.len()).sum::<usize>();
    if plan.writes_second() {
        let mut aside2 = Aside::none(pairs.len());
        loop {
            second.begin_write()?;
            second.session.set_lock_timeout(YIELD_AFTER)?;
            let written = plan.write_second(second, &s2, &aside, &mut aside2, Contended::Skip)?;
            outcome.rows += written.rows;
            if written.again {
                second.session.rollback();
                continue;
            }
            second.set_watermark(&Watermark { snapshot: s1.clone(), counter: counter1 })?;
            fault::point("cycle:second-written")?;
            second.session.commit()?;
            outcome.parked += written.parked;
            break;
        }
        outcome.contended += aside2.iter().map(|a| a.held.len()).sum::<usize>();
        fault::point("cycle:second-committed")?;
    }
    Ok(outcome)
}

/// Increments first's counter in the transaction that is about to commit: its commit is what flushes.
pub fn bump(first: &mut FirstStore) -> Result<i64> {
    let sql = format!("UPDATE {} SET n = n + 1 RETURNING n", first.objects.counter());
    let rows = first.session.admin_query(&sql, &[])?;
    crate::store::parse(rows.first().and_then(|r| r[0].as_deref()).unwrap_or("0"))
}

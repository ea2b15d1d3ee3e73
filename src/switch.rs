//! The switch between states, run by the worker: probe, lock writers out, drain, commit in the order that loses nothing.
//!
//! T1 is the first store's transaction, T2 the second's. Locks: managed views, write twins and views of
//! the second shape first (ACCESS EXCLUSIVE: their definitions and grants change), then the tables of the store that is
//! about to lose its writers (EXCLUSIVE), in the mapping's order. On any failure before the first commit nothing has changed.

use std::time::{Duration, Instant};

use pgrx::pg_sys;

use crate::catalog::{self, Move};
use crate::context::{Context, FirstStore, SecondStore};
use crate::cycle::appetite::MOST_AT_LAST;
use crate::cycle::apply::{Aside, Contended, Written};
use crate::cycle::backlog::{incoming, wake_both};
use crate::cycle::plan::Plan;
use crate::cycle::{self, two_way};
use crate::divergence;
use crate::error::{Error, InTheWay, Result, Side};
use crate::fault;
use crate::lock::{self, Patience};
use crate::mapping::model::Policy;
use crate::mapping::rule::Pair;
use crate::settings;
use crate::state::{Phase, State};
use crate::statistics;
use crate::store::{Isolation, Session, Store, Watermark, parse};
use crate::views;

/// Scopes that a last cycle may have to apply while clients wait, however long it takes.
const SMALL_BACKLOG: usize = 500;
/// Rounds of the last cycle that give way to clients of the store that stays exposed.
const ROUNDS: usize = 20;

/// Who asked, why (where nobody did), and how long it may take.
#[derive(Debug, Clone)]
pub struct Order {
    pub who: String,
    pub caller_pid: i32,
    pub patience: Patience,
    pub reason: Option<&'static str>,
}

impl Order {
    /// What the worker does by itself.
    pub fn by_worker(ctx: &Context, patience: Duration) -> Order {
        Order {
            who: ctx.migration.owner_name.as_str().to_string(),
            caller_pid: 0,
            patience: Patience::until(Instant::now() + patience),
            reason: None,
        }
    }
}

/// What a move did to its clients.
#[derive(Debug, Clone, Copy, Default)]
pub struct Pause {
    pub began: Option<Instant>,
    pub drained: i64,
}

impl Pause {
    fn ms(&self) -> Option<f64> {
        self.began.map(|b| b.elapsed().as_secs_f64() * 1000.0)
    }
}

/// Moves the migration to another state that it may move to, with both stores there.
///
/// # Errors
/// `Error::Backlog`, `Error::Parked`, `Error::LockTimeout` when that cannot be done now. The state has not changed then.
pub fn switch(ctx: &mut Context, to: State, order: &Order) -> Result<()> {
    probe(ctx, order, to)?;
    fault::point("switch:begin")?;
    match (ctx.migration.state, to) {
        (State::First, State::Both) => open_second(ctx, order),
        _ => attempts(ctx, order, to),
    }
}

/// Finishes what a crash between the two commits of a switch towards `first` has left: second is drained and fenced.
pub fn fence_pending(ctx: &mut Context, order: &Order) -> Result<()> {
    attempts(ctx, order, State::First)
}

/// Waits until a last cycle would not be long. Refuses a switch whose backlog cannot drain in time, or that would expose a store for which a row is parked.
fn probe(ctx: &mut Context, order: &Order, to: State) -> Result<()> {
    loop {
        let began = Instant::now();
        let outcome = cycle::run(ctx, true)?;
        let took = began.elapsed();
        let newly_exposes = matches!(
            (ctx.migration.state, to),
            (State::First, State::Both) | (State::Both, State::Second) | (State::Second, State::Both)
        );
        let refused = newly_exposes && outcome.parked > 0;
        // What is owed may be what a parked row lacks.
        if refused && (outcome.left == 0 || order.patience.is_over()) {
            return Err(Error::Parked { name: ctx.migration.name.clone(), count: outcome.parked as i64 });
        }
        let drains = outcome.scopes <= SMALL_BACKLOG || took < settings::max_pause() / 4;
        if !refused && outcome.left <= SMALL_BACKLOG && drains {
            return Ok(());
        }
        if order.patience.is_over() {
            return Err(Error::Backlog {
                name: ctx.migration.name.clone(),
                detail: format!(
                    "After {} ms a cycle still had {} changed rows to replicate.",
                    order.patience.waited_ms(),
                    outcome.scopes.max(outcome.left)
                ),
            });
        }
        lock::wait_latch(Duration::ZERO);
        order.patience.check()?;
    }
}

/// Tries until it works or the time is over; replication goes on in between.
fn attempts(ctx: &mut Context, order: &Order, to: State) -> Result<()> {
    let before = (ctx.migration.clone(), ctx.first_tables.clone());
    loop {
        let result = attempt(ctx, order, to);
        let Err(e) = result else { return Ok(()) };
        ctx.rollback_all();
        if ctx.migration.state != before.0.state && ctx.reload()? && ctx.migration.state == to {
            // First has committed: the move is made. What may be missing is the fence, and the worker sees to that.
            return Ok(());
        }
        ctx.migration = before.0.clone();
        ctx.rename_first(before.1.iter().map(|(_, rel)| rel.clone()).collect());
        if !e.is_contention() && !matches!(e, Error::RemoteTimeout) {
            return Err(divergence::met(ctx, e));
        }
        let error = blocked(ctx, order, to, false)?;
        if order.patience.is_over() || error.is_caller_in_the_way() {
            return Err(error);
        }
        show_waiting(ctx, error.detail().as_deref())?;
        order.patience.pause()?;
        drain(ctx, order)?;
    }
}

/// Between two attempts: cycles until the backlog is small again. One may take a part of it only.
fn drain(ctx: &mut Context, order: &Order) -> Result<()> {
    loop {
        match cycle::run(ctx, false) {
            Ok(outcome) if outcome.scopes.max(outcome.left) <= SMALL_BACKLOG || order.patience.is_over() => {
                return Ok(());
            }
            Ok(_) => {
                lock::wait_latch(Duration::ZERO);
                order.patience.check()?;
            }
            Err(e) if e.is_contention() => return Ok(()),
            Err(e) => return Err(e),
        }
    }
}

fn attempt(ctx: &mut Context, order: &Order, to: State) -> Result<()> {
    match to {
        State::Second => towards_second(ctx, order),
        _ => towards_first(ctx, order, to),
    }
}

/// The error that names who is in the way.
fn blocked(ctx: &mut Context, order: &Order, to: State, readers: bool) -> Result<Error> {
    let name = ctx.migration.name.clone();
    let mut oids: Vec<u32> = ctx.first_tables.iter().map(|(oid, _)| *oid).collect();
    ctx.first.session.begin(Isolation::ReadCommitted, &[])?;
    let found = (|| {
        oids.extend(views::view_oids(ctx, true, true)?);
        lock::in_the_way(&mut ctx.first.session, &oids, "first", order.caller_pid, readers)
    })();
    ctx.first.session.rollback();
    let mut all = found?;
    if to != State::Second
        && let Ok(()) = ctx.connect()
    {
        let (_, second) = ctx.stores()?;
        let names = crate::mapping::text::array_literal(second.tables.iter().map(|t| t.rel.to_string()));
        let rows =
            second.session.query("SELECT n::regclass::oid::int8 FROM unnest($1::text[]) AS n", &[Some(&names)])?;
        let oids: Vec<u32> = rows.iter().filter_map(|r| r[0].as_deref()?.parse().ok()).collect();
        let InTheWay { holders, .. } = lock::in_the_way(&mut second.session, &oids, "second", 0, false)?;
        all.holders.extend(holders);
    }
    Ok(lock::timed_out(&name, &order.patience, all))
}

/// What an order waits for, in `migration_status`.
pub fn show_waiting(ctx: &mut Context, text: Option<&str>) -> Result<()> {
    let id = ctx.migration.id.to_string();
    let sql = "UPDATE crossover.activity SET waiting_for = $2::text WHERE migration_id = $1::text::int";
    ctx.first.session.write(sql, &[Some(&id), text]).map(drop)
}

/// Opens T1 and takes its locks: views, then (if first is to lose its writers) the tables.
pub fn lock_first(
    ctx: &mut Context,
    deadline: Instant,
    managed: bool,
    second_shape: bool,
    tables: Option<u32>,
) -> Result<()> {
    ctx.first.session.begin(Isolation::ReadCommitted, &[])?;
    let mut views = Vec::new();
    if ctx.migration.taken_over || second_shape {
        views = views::view_oids(ctx, managed && ctx.migration.taken_over, second_shape)?;
    }
    ctx.first.session.lock_relations(&views, pg_sys::AccessExclusiveLock as i32, deadline)?;
    if let Some(mode) = tables {
        let mut oids: Vec<u32> = ctx.first_tables.iter().map(|(oid, _)| *oid).collect();
        if oids.is_empty() {
            oids = first_tables_left(ctx)?;
        }
        ctx.first.session.lock_relations(&oids, mode as i32, deadline)?;
    }
    Ok(())
}

/// Of a migration whose tables are not loaded, as one of them has been dropped, those that are there.
fn first_tables_left(ctx: &mut Context) -> Result<Vec<u32>> {
    let rows = ctx.first.session.admin_query(
        "SELECT c.oid::int8 FROM crossover.migrated_table t JOIN pg_class c ON c.oid = t.first_table WHERE t.migration_id = $1::text::int ORDER BY t.index",
        &[Some(&ctx.migration.id.to_string())],
    )?;
    rows.iter().filter_map(|r| r[0].as_deref()).map(parse).collect()
}

/// No lock wait inside the pause; and the pause is bounded, network included.
fn bound_pause(ctx: &mut Context, pause: &mut Pause) -> Result<Instant> {
    let began = *pause.began.get_or_insert_with(Instant::now);
    let end = began + settings::max_pause();
    let (first, second) = ctx.stores()?;
    first.session.set_lock_timeout(settings::lock_attempt())?;
    second.session.set_deadline(Some(end));
    Ok(end)
}

/// What a last cycle is going to write: all that is left of the direction that ends with the writers of `ending`, or it has to wait for other
/// cycles. Of the other direction, whose writers go on, what has to do with it; the rest is for the cycles that come.
fn last_plan(
    policy: Policy,
    pairs: &[Pair],
    first: &mut FirstStore,
    second: &mut SecondStore,
    ending: Side,
) -> Result<Plan> {
    let mut forward = incoming(first, second, true, MOST_AT_LAST, MOST_AT_LAST)?;
    let mut backward = incoming(second, first, true, MOST_AT_LAST, MOST_AT_LAST)?;
    let last = if ending == Side::First { &forward } else { &backward };
    if last.is_too_much() || last.left > 0 {
        return Err(Error::LockNotAvailable);
    }
    forward.complete(first)?;
    backward.complete(second)?;
    wake_both(first, second, &mut forward, &mut backward)?;
    let plan = Plan::make(policy, pairs, first, second, forward, backward, usize::MAX)?;
    plan.ok_or_else(|| Error::internal("a plan without a limit"))
}

/// Writes the second half of a last cycle under the locks, leaving out what a constraint of that store refuses: it is parked.
fn settle<S: Session>(
    store: &mut Store<S>,
    tables: usize,
    write: impl Fn(&mut Store<S>, &mut [Aside]) -> Result<Written>,
) -> Result<()> {
    let mut aside = Aside::none(tables);
    for _ in 0..ROUNDS {
        store.session.savepoint()?;
        if !write(store, &mut aside)?.again {
            return store.session.release();
        }
        store.session.rollback_to()?;
    }
    Err(Error::LockNotAvailable)
}

/// `both` to `second`: first loses its writers. Second commits first: its rows must be there when first lets the clients go.
fn towards_second(ctx: &mut Context, order: &Order) -> Result<()> {
    ctx.connect()?;
    ctx.refresh_constraints()?;
    let mut pause = Pause { began: Some(Instant::now()), drained: 0 };
    lock_first(ctx, order.patience.attempt(), true, false, Some(pg_sys::ExclusiveLock))?;
    let end = bound_pause(ctx, &mut pause)?;
    fault::point("switch:locked")?;
    let name = ctx.migration.name.clone();
    let Context { pairs, first, second, migration, .. } = &mut *ctx;
    let second = second.as_mut().ok_or_else(|| Error::internal("not connected"))?;
    first.mark_origin()?;
    let policy = migration.options.conflicts;
    let mut aside = Aside::none(pairs.len());
    let mut rounds = 0;
    let (plan, s1, s2) = loop {
        rounds += 1;
        if rounds > ROUNDS || Instant::now() >= end {
            return Err(Error::LockNotAvailable);
        }
        let s2 = second.begin_read()?;
        first.check_capture()?;
        second.check_capture()?;
        let s1 = first.snapshot()?;
        let plan = last_plan(policy, pairs, first, second, Side::First)?;
        second.end_read()?;
        let counter1 = first.flush()?;
        second.begin_write()?;
        second.session.set_lock_timeout(settings::lock_attempt())?;
        aside.iter_mut().for_each(|a| a.held.clear());
        let written = plan.write_second(second, &s2, &[], &mut aside, Contended::Wait)?;
        if written.is_not_the_last() {
            second.session.rollback();
            continue;
        }
        if written.parked > 0 {
            return Err(Error::Parked { name, count: written.parked as i64 });
        }
        plan.record_on_second(second)?;
        second.set_watermark(&Watermark { snapshot: s1.clone(), counter: counter1 })?;
        break (plan, s1, s2);
    };
    fault::point("switch:drained")?;
    second.session.commit()?;
    fault::point("switch:second-committed")?;
    let counter2 = second.flush()?;
    settle(first, pairs.len(), |first, aside| {
        plan.write_first(first, pairs, &name, &s1, aside, Contended::Wait, None)
    })?;
    if !plan.incoming_backward.is_too_much() {
        first.set_watermark(&Watermark { snapshot: s2, counter: counter2 })?;
    }
    pause.drained = plan.log_rows();
    first.set_fence(true)?;
    views::point_at_second(ctx)?;
    fault::point("switch:moved")?;
    commit_state(ctx, order, State::Second, Phase::Replicating, &pause)?;
    fault::point("switch:first-committed")
}

/// `both` to `first`, `second` to `both`, and the fence that a crash has left pending. Second's writers wait; first commits first
/// (rows, conflicts, watermark, state) while second's transaction still holds its lock; then second commits its rows and its fence.
fn towards_first(ctx: &mut Context, order: &Order, to: State) -> Result<()> {
    ctx.connect()?;
    ctx.refresh_constraints()?;
    let from = ctx.migration.state;
    let fence_only = from == to;
    let opens_first = from == State::Second;
    let mut pause = Pause { began: Some(Instant::now()), drained: 0 };
    let tables = opens_first.then_some(pg_sys::ShareRowExclusiveLock);
    let deadline = order.patience.attempt();
    lock_first(ctx, deadline, opens_first, !fence_only, tables)?;
    let end = bound_pause(ctx, &mut pause)?;
    lock_second(ctx, deadline)?;
    fault::point("switch:locked")?;

    let Context { pairs, first, second, migration, .. } = &mut *ctx;
    let second = second.as_mut().ok_or_else(|| Error::internal("not connected"))?;
    first.mark_origin()?;
    let policy = migration.options.conflicts;
    let mut aside = Aside::none(pairs.len());
    let mut rounds = 0;
    let (plan, s1, s2) = loop {
        rounds += 1;
        if rounds > ROUNDS || Instant::now() >= end {
            return Err(Error::LockNotAvailable);
        }
        let s1 = first.snapshot()?;
        let s2 = second.snapshot()?;
        first.check_capture()?;
        second.check_capture()?;
        let plan = last_plan(policy, pairs, first, second, Side::Second)?;
        let counter2 = second.flush()?;
        first.session.savepoint()?;
        aside.iter_mut().for_each(|a| a.held.clear());
        let written =
            plan.write_first(first, pairs, &migration.name, &s1, &mut aside, Contended::Wait, Some(Side::First))?;
        if written.is_not_the_last() {
            first.session.rollback_to()?;
            continue;
        }
        first.session.release()?;
        if opens_first && written.parked > 0 {
            return Err(Error::Parked { name: migration.name.clone(), count: written.parked as i64 });
        }
        first.set_watermark(&Watermark { snapshot: s2.clone(), counter: counter2 })?;
        break (plan, s1, s2);
    };
    fault::point("switch:drained")?;
    pause.drained = plan.log_rows();
    let counter1 = two_way::bump(first)?;
    let phase = if to == State::First && migration.options.fence { Phase::FencePending } else { Phase::Replicating };
    if opens_first {
        first.set_fence(false)?;
        views::point_at_first(ctx)?;
    } else if !fence_only {
        views::hide_second_shape(ctx)?;
    }
    fault::point("switch:moved")?;
    commit_state(ctx, order, to, phase, &pause)?;
    fault::point("switch:first-committed")?;

    let fence = ctx.migration.options.fence;
    let (_, second) = ctx.stores()?;
    second.mark_origin()?;
    let tables = second.tables.len();
    settle(second, tables, |second, aside| plan.write_second(second, &s2, &[], aside, Contended::Wait))?;
    if !plan.incoming_forward.is_too_much() {
        second.set_watermark(&Watermark { snapshot: s1, counter: counter1 })?;
    }
    if to == State::First && fence {
        second.set_fence(true)?;
    }
    second.session.commit()?;
    second.session.set_deadline(None);
    fault::point("switch:second-committed")?;
    if phase == Phase::FencePending {
        ctx.set_phase(Phase::Replicating)?;
    }
    Ok(())
}

/// Opens T2 and locks the writers of the second store out; a table that could not be had comes first the next time.
fn lock_second(ctx: &mut Context, deadline: Instant) -> Result<()> {
    let Context { second, stubborn_second, .. } = ctx;
    let second = second.as_mut().ok_or_else(|| Error::internal("not connected"))?;
    second.session.begin(Isolation::ReadCommitted, &[])?;
    second.session.become_replica()?;
    let mut order: Vec<usize> = (0..second.tables.len()).collect();
    order.sort_by_key(|i| stubborn_second.iter().position(|s| s == i).unwrap_or(usize::MAX));
    for i in order {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Error::LockNotAvailable);
        }
        second.session.set_lock_timeout(left)?;
        let sql = format!("LOCK TABLE {} IN EXCLUSIVE MODE", second.tables[i].rel);
        if let Err(e) = second.session.batch(&sql) {
            stubborn_second.retain(|s| *s != i);
            stubborn_second.insert(0, i);
            return Err(e);
        }
    }
    second.session.set_lock_timeout(settings::lock_attempt())
}

/// `first` to `both`: nothing to drain. The fence goes before the state changes, under the name *fence pending*, so that a crash
/// in between is followed by fencing it again.
fn open_second(ctx: &mut Context, order: &Order) -> Result<()> {
    statistics::refresh(ctx)?;
    ctx.set_phase(Phase::FencePending)?;
    let lowered = lower_fence(ctx, order);
    if matches!(lowered, Err(Error::LockTimeout { .. } | Error::Withdrawn)) {
        // It has been up all the time.
        ctx.set_phase(Phase::Replicating)?;
        return lowered;
    }
    let result = lowered.and_then(|()| show_second(ctx, order));
    if result.is_err() && ctx.migration.state == State::First {
        // Close it again now if we can; the worker keeps trying if we cannot.
        ctx.rollback_all();
        let again = Order { patience: Patience::until(Instant::now() + Duration::from_secs(1)), ..order.clone() };
        let _ = fence_pending(ctx, &again);
    }
    result
}

/// Tries to let clients write to the second store.
///
/// # Errors
/// `Error::LockTimeout` and `Error::Withdrawn` when nothing has been done.
fn lower_fence(ctx: &mut Context, order: &Order) -> Result<()> {
    fault::point("switch:opening")?;
    loop {
        let opened = (|| {
            let (_, second) = ctx.stores()?;
            second.session.begin(Isolation::ReadCommitted, &[])?;
            second.session.become_replica()?;
            second.session.set_lock_timeout(settings::lock_attempt())?;
            second.set_fence(false)?;
            second.session.commit()
        })();
        match opened {
            Ok(()) => return fault::point("switch:second-committed"),
            Err(e) if e.is_contention() => {
                ctx.rollback_all();
                let error = blocked(ctx, order, State::Both, false)?;
                if order.patience.is_over() {
                    return Err(error);
                }
                show_waiting(ctx, error.detail().as_deref())?;
                order.patience.pause()?;
                ctx.connect()?;
            }
            Err(e) => return Err(e),
        }
    }
}

fn show_second(ctx: &mut Context, order: &Order) -> Result<()> {
    let taken_over = ctx.migration.taken_over;
    in_attempts(ctx, order, !taken_over, |ctx| {
        let pause = Pause { began: Some(Instant::now()), drained: 0 };
        let tables = (!taken_over).then_some(pg_sys::AccessExclusiveLock);
        lock_first(ctx, order.patience.attempt(), false, true, tables)?;
        fault::point("switch:locked")?;
        if !taken_over {
            views::take_over(ctx)?;
        }
        views::expose_second_shape(ctx)?;
        fault::point("switch:moved")?;
        commit_state(ctx, order, State::Both, Phase::Replicating, &pause)
    })?;
    fault::point("switch:first-committed")
}

/// Tries one transaction of the first store, which takes its own locks, until it works or the time is over.
pub fn in_attempts(
    ctx: &mut Context,
    order: &Order,
    readers: bool,
    work: impl Fn(&mut Context) -> Result<()>,
) -> Result<()> {
    let before = (ctx.migration.clone(), ctx.first_tables.clone());
    loop {
        let Err(e) = work(ctx) else { return Ok(()) };
        ctx.rollback_all();
        ctx.migration = before.0.clone();
        ctx.rename_first(before.1.iter().map(|(_, rel)| rel.clone()).collect());
        if !e.is_contention() {
            return Err(e);
        }
        let error = blocked(ctx, order, State::Second, readers)?;
        if order.patience.is_over() || error.is_caller_in_the_way() {
            return Err(error);
        }
        show_waiting(ctx, error.detail().as_deref())?;
        order.patience.pause()?;
    }
}

/// State, phase and history in T1, and its commit.
pub fn commit_state(ctx: &mut Context, order: &Order, to: State, phase: Phase, pause: &Pause) -> Result<()> {
    let from = ctx.migration.state;
    ctx.migration.state = to;
    ctx.migration.phase = phase;
    let Context { migration, first, .. } = ctx;
    migration.store(&mut first.session)?;
    if from != to || order.reason.is_some() {
        let made = Move {
            pause_ms: pause.ms(),
            drained: pause.began.map(|_| pause.drained),
            reason: order.reason,
            ..Move::new(&migration.name, &order.who, Some(from), to)
        };
        catalog::record_history(&mut first.session, &made)?;
    }
    first.session.commit()
}

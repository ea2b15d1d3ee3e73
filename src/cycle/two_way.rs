//! Both directions in one cycle, while both stores have clients: first commits first, with the conflicts; then second.

use std::time::{Duration, Instant};

use super::Outcome;
use super::appetite::Appetite;
use super::apply::{Aside, Contended};
use super::backlog::{incoming, put_off, wake_both};
use super::plan::Plan;
use crate::context::{FirstStore, SecondStore};
use crate::error::{Result, Side};
use crate::fault;
use crate::mapping::model::Policy;
use crate::mapping::rule::Pair;
use crate::store::{Session, Watermark};

/// A write in `both` yields to a client after this long at one lock, well below PostgreSQL's deadlock_timeout of 1 s.
const YIELD_AFTER: Duration = Duration::from_millis(200);

pub fn run(
    name: &str,
    policy: Policy,
    pairs: &[Pair],
    first: &mut FirstStore,
    second: &mut SecondStore,
    retry_parked: bool,
    appetite: &mut Appetite,
) -> Result<Outcome> {
    let s1 = first.begin_read()?;
    let s2 = second.begin_read()?;
    first.check_capture()?;
    second.check_capture()?;
    let mut forward = incoming(first, second, retry_parked, appetite.scopes(), appetite.scopes())?;
    let mut backward = incoming(second, first, retry_parked, appetite.scopes(), appetite.scopes())?;
    // After a cycle that has put off comes one that applies what is owed, however much is changed meanwhile.
    let has_put_off = std::mem::replace(&mut appetite.has_put_off, false);
    let nothing_owed = forward.scopes() + backward.scopes() == 0;
    if (forward.is_too_much() || backward.is_too_much()) && (nothing_owed || !has_put_off) {
        appetite.has_put_off = true;
        second.end_read()?;
        first.end_read()?;
        let mut scopes = 0;
        if forward.is_too_much() {
            scopes += put_off(first, second)?;
        }
        if backward.is_too_much() {
            scopes += put_off(second, first)?;
        }
        // Where no row was there, the other direction has still to be looked at.
        let scopes = scopes.max(1);
        return Ok(Outcome { scopes, left: scopes, ..Outcome::default() });
    }
    forward.complete(first)?;
    backward.complete(second)?;
    wake_both(first, second, &mut forward, &mut backward)?;
    let parked = forward.owed.parked + backward.owed.parked;
    if forward.is_empty() && backward.is_empty() {
        second.end_read()?;
        first.end_read()?;
        return Ok(Outcome { parked, ..Outcome::default() });
    }
    let scopes = forward.scopes() + backward.scopes();
    let before = [backward.owed, forward.owed];
    let unread = [&forward, &backward].into_iter().filter(|i| i.is_too_much()).count();
    let Some(plan) = Plan::make(policy, pairs, first, second, forward, backward, appetite.room())? else {
        second.end_read()?;
        first.end_read()?;
        appetite.shrink(scopes);
        return Ok(Outcome { scopes, left: scopes, parked, ..Outcome::default() });
    };
    second.end_read()?;
    first.end_read()?;
    fault::point("cycle:read")?;
    let mut outcome = Outcome { scopes: plan.scopes(), oldest: plan.oldest(), ..Outcome::default() };
    let counter2 = if plan.writes_first() { Some(second.flush()?) } else { None };
    fault::point("cycle:flushed")?;

    // What first owes to itself is, in a conflict, owed to second as well: the next cycle must see both changes.
    let mut aside = Aside::none(pairs.len());
    let counter1;
    let mut owed = before;
    let mut slowest = Duration::ZERO;
    loop {
        let began = Instant::now();
        first.begin_write()?;
        first.session.set_lock_timeout(YIELD_AFTER)?;
        let written = plan.write_first(first, pairs, name, &s1, &mut aside, Contended::Skip, Some(Side::First))?;
        outcome.rows += written.rows;
        if written.again {
            first.session.rollback();
            continue;
        }
        owed[0] = written.owed;
        if let Some(counter) = counter2.filter(|_| !plan.incoming_backward.is_too_much()) {
            first.set_watermark(&Watermark { snapshot: s2.clone(), counter })?;
        }
        fault::point("cycle:first-written")?;
        counter1 = bump(first)?;
        first.session.commit()?;
        slowest = slowest.max(began.elapsed());
        break;
    }
    fault::point("cycle:first-committed")?;
    outcome.contended += aside.iter().map(|a| a.held.len()).sum::<usize>();
    if plan.writes_second() {
        let mut aside2 = Aside::none(pairs.len());
        loop {
            let began = Instant::now();
            second.begin_write()?;
            second.session.set_lock_timeout(YIELD_AFTER)?;
            let written = plan.write_second(second, &s2, &aside, &mut aside2, Contended::Skip)?;
            outcome.rows += written.rows;
            if written.again {
                second.session.rollback();
                continue;
            }
            owed[1] = written.owed;
            if !plan.incoming_forward.is_too_much() {
                second.set_watermark(&Watermark { snapshot: s1.clone(), counter: counter1 })?;
            }
            fault::point("cycle:second-written")?;
            second.session.commit()?;
            slowest = slowest.max(began.elapsed());
            break;
        }
        outcome.contended += aside2.iter().map(|a| a.held.len()).sum::<usize>();
        fault::point("cycle:second-committed")?;
    }
    outcome.parked = owed.iter().map(|o| o.parked).sum();
    outcome.left = owed.iter().map(|o| o.waiting).sum::<usize>() + unread;
    appetite.adapt(slowest, scopes, plan.bytes());
    Ok(outcome)
}

/// Increments first's counter in the transaction that is about to commit: its commit is what flushes.
pub fn bump(first: &mut FirstStore) -> Result<i64> {
    let sql = format!("UPDATE {} SET n = n + 1 RETURNING n", first.objects.counter());
    let rows = first.session.admin_query(&sql, &[])?;
    crate::store::parse(rows.first().and_then(|r| r[0].as_deref()).unwrap_or("0"))
}

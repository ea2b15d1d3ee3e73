//! One direction: the destination is fenced, so nobody else writes there.
//!
//! Towards second, a cycle streams through all that has changed, however much, within one snapshot of the source and one transaction of the
//! destination, for whoever reads there (G2). Nobody reads in first while it is not exposed: much is put off, and applied in parts.

use std::collections::BTreeMap;

use super::Outcome;
use super::appetite::SCOPES;
use super::backlog::{Incoming, Page, Whole, incoming, put_off};
use super::write::Writer;
use crate::error::{Result, Side};
use crate::fault;
use crate::store::{Derived, Isolation, Key, Owed, Session, Store, Watermark};

/// How rows are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Care {
    /// Without savepoints: a row that is refused ends the cycle. A savepoint costs a round trip, and memory until its transaction ends.
    None,
    /// A row that is refused is found and parked.
    Savepoints,
}

/// Runs a cycle, in transactions of its own on both stores.
pub fn run<A: Session, B: Session>(
    source: &mut Store<A>,
    destination: &mut Store<B>,
    retry_parked: bool,
) -> Result<Outcome> {
    match run_with(source, destination, retry_parked, Care::None) {
        Err(e) if e.is_rejected_row() || e.is_undefined_name() => {
            source.session.rollback();
            destination.session.rollback();
            run_with(source, destination, retry_parked, Care::Savepoints)
        }
        other => other,
    }
}

fn run_with<A: Session, B: Session>(
    source: &mut Store<A>,
    destination: &mut Store<B>,
    retry_parked: bool,
    care: Care,
) -> Result<Outcome> {
    let capture = source.side();
    let seen = source.begin_read()?;
    source.check_capture()?;
    destination.session.begin(Isolation::ReadCommitted, &[])?;
    destination.check_idle_capture()?;
    let mut incoming = incoming(source, destination, retry_parked, SCOPES, SCOPES)?;
    if incoming.is_empty() {
        destination.session.rollback();
        source.end_read()?;
        return Ok(Outcome { parked: incoming.owed.parked, ..Outcome::default() });
    }
    let in_parts = incoming.is_too_much() && destination.side() == Side::First;
    if in_parts && incoming.owed.waiting == 0 {
        destination.session.rollback();
        source.end_read()?;
        let scopes = put_off(source, destination)?;
        return Ok(Outcome { scopes, left: scopes, parked: incoming.owed.parked, ..Outcome::default() });
    }
    if in_parts {
        // What was put off before comes first, however much is changed meanwhile.
        incoming.leave_unread();
    }
    // What has been refused will be, as a rule.
    let care = if retry_parked && incoming.owed.parked > 0 { Care::Savepoints } else { care };
    destination.mark_origin()?;
    let mut outcome = Outcome::default();
    fault::point("cycle:read")?;
    // Deletes first, children before parents: a unique value may have moved to another key.
    for i in (0..incoming.changes.len()).rev() {
        if incoming.changes[i].whole.is_some() {
            destination.clear_owed(i, None)?;
        }
        incoming.each_page(i, Whole::Destination, source, destination, &mut |source, destination, page| {
            outcome.rows += delete(source, destination, &incoming, i, page)?;
            Ok(())
        })?;
    }
    let mut oldest = incoming.oldest();
    for i in 0..incoming.changes.len() {
        incoming.each_page(i, Whole::Source, source, destination, &mut |source, destination, page| {
            outcome.scopes += page.len();
            oldest = oldest.into_iter().chain(page.values().copied()).min();
            outcome.rows += upsert(source, destination, i, page, care)?;
            Ok(())
        })?;
    }
    for i in 0..incoming.changes.len() {
        let unknown_to_source = destination.constraints.parents_of(i).iter().any(|r| !r.mirrored);
        if unknown_to_source || destination.has_uniques(i, true) {
            incoming.each_page(i, Whole::Source, source, destination, &mut |source, destination, page| {
                refuse_violations(source, destination, i, page)
            })?;
        }
    }
    outcome.oldest = oldest;
    // A table that was emptied has no rows to count.
    outcome.scopes += incoming.changes.iter().filter(|c| c.whole.is_some()).count();
    source.end_read()?;
    let counter = source.flush()?;
    fault::point("cycle:flushed")?;
    if !in_parts {
        destination.set_watermark(&Watermark { snapshot: seen, counter })?;
    }
    let owed = destination.owed_count()?;
    (outcome.parked, outcome.left) = (owed.parked, owed.waiting + usize::from(in_parts));
    fault::point(if capture == Side::First { "cycle:second-written" } else { "cycle:first-written" })?;
    destination.session.commit()?;
    fault::point(if capture == Side::First { "cycle:second-committed" } else { "cycle:first-committed" })?;
    Ok(outcome)
}

/// Deletes those rows of a page that the source does not derive any more. Nothing of the page is owed from here on, but what is parked.
fn delete<A: Session, B: Session>(
    source: &mut Store<A>,
    destination: &mut Store<B>,
    incoming: &Incoming,
    index: usize,
    page: &Page,
) -> Result<u64> {
    let keys: Vec<&Key> = page.keys().collect();
    if !incoming.owed.is_zero() {
        destination.clear_owed(index, Some(&keys))?;
    }
    let there = source.derivable(index, &keys)?;
    let mut gone: Vec<&Key> = keys.into_iter().filter(|k| !there.contains(*k)).collect();
    let kept = keep_parents(source, destination, incoming, index, &mut gone)?;
    let kept: Vec<Owed> = kept.into_iter().map(|(key, error)| parked(key, page, error, None)).collect();
    destination.owe(index, &kept)?;
    destination.delete(index, &gone)
}

fn parked(key: Key, page: &Page, error: String, image: Option<String>) -> Owed {
    Owed { at: page.get(&key).copied().unwrap_or(0), key, error: Some(error), image }
}

/// Derives the rows of a page and writes them.
fn upsert<A: Session, B: Session>(
    source: &mut Store<A>,
    destination: &mut Store<B>,
    index: usize,
    page: &Page,
    care: Care,
) -> Result<u64> {
    let at = |key: &Key| page.get(key).copied().unwrap_or(0);
    let mut rows = 0;
    source.derive_in_batches(index, &page.keys().collect::<Vec<_>>(), &mut |source, derived| {
        // Nobody else writes here: whatever row is in the way, the source knows what it is to be.
        let mut others = |keys: &[Key]| {
            let derived = source.derive(index, &keys.iter().collect::<Vec<_>>())?;
            let known = keys.iter().filter(|k| !derived.refused.contains_key(*k));
            Ok(known.map(|k| (k.clone(), derived.rows.get(k).cloned())).collect())
        };
        let mut writer = Writer::new(index, false, &at, &mut others);
        match care {
            Care::None => writer.write_all(destination, &derived.list())?,
            Care::Savepoints => writer.write(destination, &derived.list())?,
        }
        let (written, mut owed) = (writer.written, writer.parked);
        rows += written;
        owed.extend(Derived::parked(&derived.refused, &at));
        destination.owe(index, &owed)
    })?;
    Ok(rows)
}

/// A parent that is to go while a row of the destination refers to it, by a foreign key that the source has not: its deletion is refused.
/// Takes such parents out of `gone`, and returns them with the reason.
fn keep_parents<A: Session, B: Session>(
    source: &mut Store<A>,
    destination: &mut Store<B>,
    incoming: &Incoming,
    index: usize,
    gone: &mut Vec<&Key>,
) -> Result<BTreeMap<Key, String>> {
    let mut kept = BTreeMap::new();
    for reference in destination.constraints.children_of(index).into_iter().filter(|r| !r.mirrored) {
        let found = destination.children(&reference, gone)?;
        let changed = match reference.child_index {
            Some(table) => {
                let children: Vec<&Key> = found.iter().filter_map(|(_, child)| child.as_ref()).collect();
                incoming.changed_among(source, table, &children)?
            }
            None => Default::default(),
        };
        // A child that changes as well is looked at afterwards.
        let stay = found.into_iter().filter(|(_, child)| child.as_ref().is_none_or(|k| !changed.contains(k)));
        kept.extend(stay.map(|(parent, _)| (parent, reference.still_referred())));
        gone.retain(|k| !kept.contains_key(*k));
    }
    Ok(kept)
}

/// Replica mode checks no foreign keys and no deferrable constraints: rows that violate one which the source has not are taken out
/// again, and parked.
fn refuse_violations<A: Session, B: Session>(
    source: &mut Store<A>,
    destination: &mut Store<B>,
    index: usize,
    page: &Page,
) -> Result<()> {
    let references: Vec<_> = destination.constraints.parents_of(index).into_iter().filter(|r| !r.mirrored).collect();
    source.derive_in_batches(index, &page.keys().collect::<Vec<_>>(), &mut |_, derived| {
        let mut bad: BTreeMap<Key, String> = BTreeMap::new();
        let (keys, rows): (Vec<&Key>, Vec<&str>) = derived.list().into_iter().unzip();
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
        destination.delete(index, &bad.keys().collect::<Vec<_>>())?;
        let owed: Vec<Owed> = bad
            .into_iter()
            .map(|(key, error)| parked(key.clone(), page, error, derived.rows.get(&key).cloned()))
            .collect();
        destination.owe(index, &owed)
    })
}

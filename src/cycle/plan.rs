//! What a cycle in both directions is going to write: decided from one snapshot of each store, written to each in turn.

use std::collections::{BTreeMap, BTreeSet};

use super::apply::{Application, Aside, Contended, Rows, Written};
use super::backlog::{Incoming, wake_both};
use crate::conflict::{Node, decide};
use crate::context::{FirstStore, SecondStore};
use crate::error::{Result, Side};
use crate::mapping::model::Policy;
use crate::mapping::rule::Pair;
use crate::store::{BATCH, Key, Session, Snapshot, Store, in_batches};

/// Rows of a chain, each in the way of the one before, that come into a plan one by one. It may be as long as what is owed: then that comes
/// in twice as much at a time.
const LINKS: usize = 8;

struct ConflictRow {
    key: Key,
    kept: Side,
    first_image: Option<String>,
    second_image: Option<String>,
}

/// What a cycle in both directions is going to write, read from one snapshot of each store.
pub struct Plan {
    forward: Vec<Rows>,
    backward: Vec<Rows>,
    conflicts: Vec<Vec<ConflictRow>>,
    pub incoming_forward: Incoming,
    pub incoming_backward: Incoming,
}

impl Plan {
    /// Reads the rows and decides, in the transactions that both stores are in. None if the rows of a direction have more than `room` bytes.
    #[allow(clippy::too_many_arguments)]
    pub fn make(
        policy: Policy,
        pairs: &[Pair],
        first: &mut FirstStore,
        second: &mut SecondStore,
        mut forward: Incoming,
        mut backward: Incoming,
        room: usize,
    ) -> Result<Option<Plan>> {
        let mut links: BTreeSet<(Node, Node)> = BTreeSet::new();
        // Rows that nobody has changed and that are in the way all the same: derived anew with the others.
        let mut stale: [BTreeSet<Node>; 2] = Default::default();
        let mut rounds = 0;
        loop {
            let mut decisions = decide(policy, &forward.changes, &backward.changes, &links);
            for (table, key) in &stale[0] {
                decisions[*table].take_along(key, Side::First);
            }
            for (table, key) in &stale[1] {
                decisions[*table].take_along(key, Side::Second);
            }
            let forward_keys = decisions.iter().map(|d| &d.forward);
            let Some(rows_forward) = rows_of(first, forward_keys, room)? else { return Ok(None) };
            let backward_keys = decisions.iter().map(|d| &d.backward);
            let Some(rows_backward) = rows_of(second, backward_keys, room)? else { return Ok(None) };
            let (mut news, mut woken) = (false, false);
            for (mine, other) in collisions(second, &rows_forward)? {
                // What of the other row is owed, in either direction, is decided with it.
                woken |= forward.wake(first, second, other.0, &[&other.1])?;
                woken |= backward.wake(second, first, other.0, &[&other.1])?;
                news |= join(&mut links, &mut stale[0], mine, other, &backward, &rows_backward);
            }
            for (mine, other) in collisions(first, &rows_backward)? {
                woken |= forward.wake(first, second, other.0, &[&other.1])?;
                woken |= backward.wake(second, first, other.0, &[&other.1])?;
                news |= join(&mut links, &mut stale[1], mine, other, &forward, &rows_forward);
            }
            rounds += usize::from(woken);
            if woken && rounds.is_multiple_of(LINKS) {
                forward.take_more(second)?;
                backward.take_more(first)?;
                wake_both(first, second, &mut forward, &mut backward)?;
            }
            if news || woken {
                continue;
            }
            let (mut conflicts, mut left) = (Vec::new(), room);
            for (i, decision) in decisions.iter().enumerate() {
                let Some(rows) = conflict_rows(first, second, i, &decision.conflicts, &mut left)? else {
                    return Ok(None);
                };
                conflicts.push(rows);
            }
            debug_assert_eq!(pairs.len(), decisions.len());
            return Ok(Some(Plan {
                forward: rows_forward,
                backward: rows_backward,
                conflicts,
                incoming_forward: forward,
                incoming_backward: backward,
            }));
        }
    }

    /// Of the rows of the direction that has more.
    pub fn bytes(&self) -> usize {
        let of = |rows: &[Rows]| rows.iter().map(|r| r.bytes).sum::<usize>();
        of(&self.forward).max(of(&self.backward))
    }

    pub fn scopes(&self) -> usize {
        self.incoming_forward.scopes() + self.incoming_backward.scopes()
    }

    pub fn log_rows(&self) -> i64 {
        self.incoming_forward.log_rows() + self.incoming_backward.log_rows()
    }

    pub fn oldest(&self) -> Option<i64> {
        self.incoming_forward.oldest().into_iter().chain(self.incoming_backward.oldest()).min()
    }

    /// Is there anything for the first store: rows, conflicts, or a watermark to advance?
    pub fn writes_first(&self) -> bool {
        !self.incoming_backward.is_empty()
    }

    pub fn writes_second(&self) -> bool {
        !self.incoming_forward.is_empty()
    }

    /// Applies the backward rows in first's transaction, records the conflicts (if `record` says that first commits
    /// first), looks again.
    #[allow(clippy::too_many_arguments)]
    pub fn write_first(
        &self,
        first: &mut FirstStore,
        pairs: &[Pair],
        name: &str,
        seen: &Snapshot,
        aside: &mut [Aside],
        contended: Contended,
        record: Option<Side>,
    ) -> Result<Written> {
        let (rows, incoming) = (&self.backward, &self.incoming_backward);
        let written = Application { store: first, rows, incoming, seen, aside }.run(&[], contended)?;
        if !written.again && record == Some(Side::First) {
            for (i, conflicts) in self.conflicts.iter().enumerate() {
                for c in conflicts.iter().filter(|c| !aside[i].held.contains(&c.key)) {
                    record_conflict(&mut first.session, name, &pairs[i].first.rel.to_string(), c)?;
                }
            }
        }
        Ok(written)
    }

    /// Applies the forward rows in second's transaction and looks again. `left_on_first`: conflicts whose decision was
    /// put off; they stay owed here as well.
    pub fn write_second(
        &self,
        second: &mut SecondStore,
        seen: &Snapshot,
        left_on_first: &[Aside],
        aside: &mut [Aside],
        contended: Contended,
    ) -> Result<Written> {
        let (rows, incoming) = (&self.forward, &self.incoming_forward);
        Application { store: second, rows, incoming, seen, aside }.run(left_on_first, contended)
    }

    /// Keeps the conflicts on second, which commits first in a switch towards `second`, until they are brought home.
    pub fn record_on_second(&self, second: &mut SecondStore) -> Result<()> {
        let sql = format!(
            "INSERT INTO {} (source, key, kept, first_image, second_image) VALUES ($1::text::int, $2::text[], $3::text, $4::text::jsonb, $5::text::jsonb)",
            second.objects.conflict()
        );
        for (i, conflicts) in self.conflicts.iter().enumerate() {
            for c in conflicts {
                let (source, kept) = (i.to_string(), c.kept.to_string());
                second.session.execute(
                    &sql,
                    &[Some(&source), Some(&c.key), Some(&kept), c.first_image.as_deref(), c.second_image.as_deref()],
                )?;
            }
        }
        Ok(())
    }
}

fn record_conflict<S: Session>(session: &mut S, name: &str, table: &str, c: &ConflictRow) -> Result<()> {
    session
        .admin_execute(
            "INSERT INTO crossover.conflict (name, table_name, key, kind, kept, first_image, second_image) \
             VALUES ($1::text, $2::text, $3::text, 'conflict', $4::text, $5::text::jsonb, $6::text::jsonb)",
            &[
                Some(name),
                Some(table),
                Some(&c.key),
                Some(&c.kept.to_string()),
                c.first_image.as_deref(),
                c.second_image.as_deref(),
            ],
        )
        .map(drop)
}

/// The rows of all tables that one direction writes; None if they have more than `room` bytes.
fn rows_of<'k, S: Session>(
    source: &mut Store<S>,
    keys: impl Iterator<Item = &'k BTreeSet<Key>>,
    mut room: usize,
) -> Result<Option<Vec<Rows>>> {
    let mut all = Vec::new();
    for (i, keys) in keys.enumerate() {
        let derived = source.derive_up_to(i, &keys.iter().collect::<Vec<_>>(), room)?;
        if derived.full {
            return Ok(None);
        }
        room -= derived.bytes;
        let is_there = |k: &&Key| derived.rows.contains_key(*k) || derived.refused.contains_key(*k);
        let deletes = keys.iter().filter(|k| !is_there(k)).cloned().collect();
        all.push(Rows { upserts: derived.rows, deletes, refused: derived.refused, bytes: derived.bytes });
    }
    Ok(Some(all))
}

/// Rows that cannot stand beside what `rows` make of a store: `(row of ours, row of the store's)`. A row that wants a unique value of
/// another one; a parent that goes while a child refers to it.
fn collisions<S: Session>(store: &mut Store<S>, rows: &[Rows]) -> Result<Vec<(Node, Node)>> {
    let mut found = Vec::new();
    for (i, table) in rows.iter().enumerate() {
        let upserts: Vec<&str> = table.upserts.values().map(String::as_str).collect();
        if store.has_uniques(i, false) {
            for upserts in in_batches(&upserts, |row| row.len()) {
                let pairs = store.in_the_way(i, upserts, false)?;
                found.extend(pairs.into_iter().map(|(mine, other)| ((i, mine), (i, other))));
            }
        }
        let deletes: Vec<&Key> = table.deletes.iter().collect();
        for reference in store.constraints.children_of(i) {
            let Some(child_table) = reference.child_index else { continue };
            let mut pairs = Vec::new();
            for deletes in deletes.chunks(BATCH) {
                pairs.extend(store.children(&reference, deletes)?);
            }
            pairs.extend(store.children_left(&reference, &upserts)?);
            let nodes = pairs.into_iter().filter_map(|(parent, child)| Some(((i, parent), (child_table, child?))));
            found.extend(nodes);
        }
    }
    found.retain(|(_, (table, key))| !rows[*table].has(key));
    Ok(found)
}

/// Takes a collision into the decision: with a row that was changed over there, or that goes the opposite way with others, it is a conflict;
/// one that nobody has changed there is what the other store says of it. False if that was known.
fn join(
    links: &mut BTreeSet<(Node, Node)>,
    stale: &mut BTreeSet<Node>,
    mine: Node,
    other: Node,
    opposite: &Incoming,
    opposite_rows: &[Rows],
) -> bool {
    let (table, key) = &other;
    if opposite.changes[*table].keys.contains_key(key) || opposite_rows[*table].has(key) {
        links.insert((mine, other))
    } else {
        stale.insert(other)
    }
}

/// Both images of each conflict; none is recorded where both stores derive the same row. None if they leave no room.
fn conflict_rows(
    first: &mut FirstStore,
    second: &mut SecondStore,
    index: usize,
    conflicts: &BTreeMap<Key, Side>,
    room: &mut usize,
) -> Result<Option<Vec<ConflictRow>>> {
    if conflicts.is_empty() {
        return Ok(Some(Vec::new()));
    }
    let keys: Vec<&Key> = conflicts.keys().collect();
    let derived = first.derive_up_to(index, &keys, *room)?;
    let stored = second.derive_up_to(index, &keys, *room)?;
    if derived.full || stored.full {
        return Ok(None);
    }
    *room -= derived.bytes.max(stored.bytes);
    let differing: Vec<&Key> = keys.into_iter().filter(|k| derived.rows.get(*k) != stored.rows.get(*k)).collect();
    let (mut a, mut b) = (first.images(index, &differing)?, second.images(index, &differing)?);
    Ok(Some(
        conflicts
            .iter()
            .filter(|(k, _)| differing.contains(k))
            .map(|(key, kept)| ConflictRow {
                key: key.clone(),
                kept: *kept,
                first_image: a.remove(key),
                second_image: b.remove(key),
            })
            .collect(),
    ))
}

//! What a cycle in both directions is going to write: decided from one snapshot of each store, written to each in turn.

use std::collections::{BTreeMap, BTreeSet};

use super::Incoming;
use super::apply::{Application, Aside, Contended, Rows, Written, missing};
use super::write::BATCH;
use crate::conflict::{Node, Scope, decide};
use crate::context::{FirstStore, SecondStore};
use crate::error::{Result, Side};
use crate::mapping::model::Policy;
use crate::mapping::rule::Pair;
use crate::store::{Changes, Key, Session, Snapshot, Store};

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
    /// Reads the rows and decides, in the transactions that both stores are in.
    pub fn make(
        policy: Policy,
        pairs: &[Pair],
        first: &mut FirstStore,
        second: &mut SecondStore,
        mut forward: Incoming,
        mut backward: Incoming,
    ) -> Result<Plan> {
        let mut links: BTreeSet<(Node, Node)> = BTreeSet::new();
        // Rows that nobody has changed and that are in the way all the same: derived anew with the others.
        let mut stale: [BTreeSet<Node>; 2] = Default::default();
        loop {
            let mut decisions = decide(policy, &forward.changes, &backward.changes, &links);
            for (table, key) in &stale[0] {
                decisions[*table].take_along(key, Side::First);
            }
            for (table, key) in &stale[1] {
                decisions[*table].take_along(key, Side::Second);
            }
            let (mut rows_forward, mut rows_backward) = (Vec::new(), Vec::new());
            for (i, decision) in decisions.iter().enumerate() {
                rows_forward.push(rows_of(first, second, i, &decision.forward)?);
                rows_backward.push(rows_of(second, first, i, &decision.backward)?);
            }
            let mut news = false;
            for (mine, other) in collisions(second, &rows_forward)? {
                news |= join(&mut links, &mut stale[0], mine, other, &mut backward, &rows_backward);
            }
            for (mine, other) in collisions(first, &rows_backward)? {
                news |= join(&mut links, &mut stale[1], mine, other, &mut forward, &rows_forward);
            }
            if news {
                continue;
            }
            let mut conflicts = Vec::new();
            for (i, decision) in decisions.iter().enumerate() {
                conflicts.push(conflict_rows(first, second, i, &decision.conflicts)?);
            }
            debug_assert_eq!(pairs.len(), decisions.len());
            return Ok(Plan {
                forward: rows_forward,
                backward: rows_backward,
                conflicts,
                incoming_forward: forward,
                incoming_backward: backward,
            });
        }
    }

    pub fn scopes(&self) -> usize {
        self.incoming_forward.scopes() + self.incoming_backward.scopes()
    }

    pub fn log_rows(&self) -> i64 {
        self.incoming_forward.log_rows() + self.incoming_backward.log_rows()
    }

    pub fn oldest(&self) -> Option<i64> {
        let all = self.incoming_forward.changes.iter().chain(&self.incoming_backward.changes);
        all.filter_map(Changes::oldest).min()
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

fn rows_of<A: Session, B: Session>(
    source: &mut Store<A>,
    destination: &mut Store<B>,
    index: usize,
    scope: &Scope,
) -> Result<Rows> {
    if scope.is_empty() {
        return Ok(Rows::default());
    }
    let keys: Option<Vec<&Key>> = match scope {
        Scope::Keys(keys) => Some(keys.iter().collect()),
        Scope::Whole => None,
    };
    let derived = source.derive(index, keys.as_deref())?;
    let deletes = missing(destination, index, keys.as_deref(), &derived)?.into_iter().collect();
    Ok(Rows { upserts: derived.rows, deletes, refused: derived.refused })
}

/// Rows that cannot stand beside what `rows` make of a store: `(row of ours, row of the store's)`. A row that wants a unique value of
/// another one; a parent that goes while a child refers to it.
fn collisions<S: Session>(store: &mut Store<S>, rows: &[Rows]) -> Result<Vec<(Node, Node)>> {
    let mut found = Vec::new();
    for (i, table) in rows.iter().enumerate() {
        let upserts: Vec<&str> = table.upserts.values().map(String::as_str).collect();
        if store.has_uniques(i, false) {
            for upserts in upserts.chunks(BATCH) {
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
            for upserts in upserts.chunks(BATCH) {
                pairs.extend(store.children_left(&reference, upserts)?);
            }
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
    opposite: &mut Incoming,
    opposite_rows: &[Rows],
) -> bool {
    let (table, key) = &other;
    if let Some(owed) = opposite.owed[*table].iter().find(|o| o.key == *key) {
        opposite.changes[*table].add(key.clone(), owed.at);
    }
    let changes = &opposite.changes[*table];
    if changes.whole.is_some() || changes.keys.contains_key(key) || opposite_rows[*table].has(key) {
        links.insert((mine, other))
    } else {
        stale.insert(other)
    }
}

/// Both images of each conflict; none is recorded where both stores derive the same row.
fn conflict_rows(
    first: &mut FirstStore,
    second: &mut SecondStore,
    index: usize,
    conflicts: &BTreeMap<Key, Side>,
) -> Result<Vec<ConflictRow>> {
    if conflicts.is_empty() {
        return Ok(Vec::new());
    }
    let keys: Vec<&Key> = conflicts.keys().collect();
    let (derived, stored) = (first.derive(index, Some(&keys))?.rows, second.derive(index, Some(&keys))?.rows);
    let differing: Vec<&Key> = keys.into_iter().filter(|k| derived.get(*k) != stored.get(*k)).collect();
    let (mut a, mut b) = (first.images(index, &differing)?, second.images(index, &differing)?);
    Ok(conflicts
        .iter()
        .filter(|(k, _)| differing.contains(k))
        .map(|(key, kept)| ConflictRow {
            key: key.clone(),
            kept: *kept,
            first_image: a.remove(key),
            second_image: b.remove(key),
        })
        .collect())
}

//! What a cycle in both directions is going to write: decided from one snapshot of each store, written to each in turn.

use super::Incoming;
use super::apply::{Contended, Rows, Written, apply, missing};
use crate::conflict::{Decision, Scope, decide};
use crate::context::{FirstStore, SecondStore};
use crate::error::{Result, Side};
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
        pairs: &[Pair],
        first: &mut FirstStore,
        second: &mut SecondStore,
        incoming_forward: Incoming,
        incoming_backward: Incoming,
    ) -> Result<Plan> {
        let mut plan = Plan {
            forward: Vec::new(),
            backward: Vec::new(),
            conflicts: Vec::new(),
            incoming_forward,
            incoming_backward,
        };
        for i in 0..pairs.len() {
            let Decision { forward, backward, conflicts } =
                decide(&plan.incoming_forward.changes[i], &plan.incoming_backward.changes[i]);
            plan.forward.push(rows_of(first, second, i, &forward)?);
            plan.backward.push(rows_of(second, first, i, &backward)?);
            plan.conflicts.push(conflict_rows(first, second, i, &conflicts)?);
        }
        Ok(plan)
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
        skip: &mut [Vec<Key>],
        contended: Contended,
        record: Option<Side>,
    ) -> Result<Written> {
        let written = apply(first, &self.backward, &self.incoming_backward, seen, &[], skip, contended)?;
        if !written.looked_again && record == Some(Side::First) {
            for (i, conflicts) in self.conflicts.iter().enumerate() {
                for c in conflicts.iter().filter(|c| !skip[i].contains(&c.key)) {
                    record_conflict(&mut first.session, name, &pairs[i].first.rel.to_string(), c)?;
                }
            }
        }
        Ok(written)
    }

    /// Applies the forward rows in second's transaction and looks again. `owed_to_first`: conflicts whose decision was
    /// put off; they stay owed here as well.
    pub fn write_second(
        &self,
        second: &mut SecondStore,
        seen: &Snapshot,
        owed_to_first: &[Vec<Key>],
        skip: &mut [Vec<Key>],
        contended: Contended,
    ) -> Result<Written> {
        apply(second, &self.forward, &self.incoming_forward, seen, owed_to_first, skip, contended)
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
    let deletes = missing(destination, index, keys.as_deref(), &derived)?;
    Ok(Rows { upserts: derived.rows, deletes, refused: derived.refused })
}

/// Both images of each conflict; none is recorded where both stores derive the same row.
fn conflict_rows(
    first: &mut FirstStore,
    second: &mut SecondStore,
    index: usize,
    conflicts: &[(Key, Side)],
) -> Result<Vec<ConflictRow>> {
    if conflicts.is_empty() {
        return Ok(Vec::new());
    }
    let keys: Vec<&Key> = conflicts.iter().map(|(k, _)| k).collect();
    let (derived, stored) = (first.derive(index, Some(&keys))?.rows, second.derive(index, Some(&keys))?.rows);
    let differing: Vec<&Key> = keys.into_iter().filter(|k| derived.get(*k) != stored.get(*k)).collect();
    let (mut a, mut b) = (first.images(index, &differing)?, second.images(index, &differing)?);
    Ok(conflicts
        .iter()
        .filter(|(k, _)| differing.contains(&k))
        .map(|(key, kept)| ConflictRow {
            key: key.clone(),
            kept: *kept,
            first_image: a.remove(key),
            second_image: b.remove(key),
        })
        .collect())
}

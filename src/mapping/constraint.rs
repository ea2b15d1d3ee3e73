//! Unique values and foreign keys beside the key: what stands in the way of a row, what a row needs, what needs it. Pure.
//!
//! The replicator's writes run in replica mode, which checks neither foreign keys nor deferrable constraints, and a row may
//! want the unique value of another one that is about to give it up. So both are asked for.

use super::ident::{Ident, RelName, parse_ident};
use super::sql::{StoreTable, key_text};

/// A unique index other than the key's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unique {
    /// Columns or expressions over the table's columns, as SQL.
    pub expressions: Vec<String>,
    pub predicate: Option<String>,
    pub nulls_not_distinct: bool,
    /// A deferrable constraint: not checked in replica mode.
    pub deferrable: bool,
}

/// A foreign key, one end of which at least is in the migration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    pub name: String,
    pub child: RelName,
    pub parent: RelName,
    /// Their places in the mapping; None for a table outside the migration.
    pub child_index: Option<usize>,
    pub parent_index: Option<usize>,
    /// Child's and parent's columns.
    pub columns: Vec<(Ident, Ident)>,
    /// The other store has the same: what comes from there keeps it by itself, unless both change at a time.
    pub mirrored: bool,
}

/// The constraints of a store's tables.
#[derive(Debug, Clone, Default)]
pub struct Constraints {
    /// By table of the mapping.
    pub uniques: Vec<Vec<Unique>>,
    pub references: Vec<Reference>,
}

impl Constraints {
    /// Foreign keys of table `child`.
    pub fn parents_of(&self, child: usize) -> Vec<Reference> {
        self.references.iter().filter(|r| r.child_index == Some(child)).cloned().collect()
    }

    /// Foreign keys to table `parent`.
    pub fn children_of(&self, parent: usize) -> Vec<Reference> {
        self.references.iter().filter(|r| r.parent_index == Some(parent)).cloned().collect()
    }

    /// Marks the foreign keys that `other` has as well: `names` translates a column of table `index` to the other store's.
    pub fn mark_mirrored(&mut self, other: &Constraints, names: impl Fn(usize, &Ident) -> Option<Ident>) {
        for reference in &mut self.references {
            let (Some(child), Some(parent)) = (reference.child_index, reference.parent_index) else { continue };
            let translated: Option<Vec<(Ident, Ident)>> =
                reference.columns.iter().map(|(c, p)| Some((names(child, c)?, names(parent, p)?))).collect();
            let Some(mut translated) = translated else { continue };
            translated.sort();
            reference.mirrored = other.references.iter().any(|o| {
                let mut columns = o.columns.clone();
                columns.sort();
                (o.child_index, o.parent_index) == (Some(child), Some(parent)) && columns == translated
            });
        }
    }
}

impl Unique {
    /// Is it the index of these columns, and nothing else?
    pub fn is_over(&self, key: &[Ident]) -> bool {
        let columns: Option<Vec<Ident>> = self.expressions.iter().map(|e| parse_ident(e)).collect();
        self.predicate.is_none() && columns.is_some_and(|c| c.len() == key.len() && key.iter().all(|k| c.contains(k)))
    }

    /// The keys of rows that have the same value as another one.
    pub fn repeated(&self, table: &StoreTable) -> String {
        let predicate = self.predicate.as_ref().map_or(String::new(), |p| format!(" WHERE {p}"));
        let values = self.expressions.iter().map(|e| format!("({e})")).collect::<Vec<_>>().join(", ");
        let distinct = if self.nulls_not_distinct { "true".into() } else { format!("num_nulls({values}) = 0") };
        format!(
            "SELECT crossover_key FROM (SELECT {key} AS crossover_key, {distinct} AND count(*) OVER (PARTITION BY {values}) > 1 AS crossover_more \
             FROM {rel} AS {name}{predicate}) AS crossover_t WHERE crossover_more",
            key = key_text(&table.rel.name.to_string(), &table.key),
            rel = table.rel,
            name = table.rel.name,
        )
    }

    /// `(key of a row in $1, key of another row here)` where both have the same value. `$1`: rows in the second shape.
    pub fn in_the_way(&self, table: &StoreTable) -> String {
        let values = |alias: &str| {
            let list: Vec<String> =
                self.expressions.iter().enumerate().map(|(i, e)| format!("({e}) AS {alias}{i}")).collect();
            list.join(", ")
        };
        let predicate = self.predicate.as_ref().map_or(String::new(), |p| format!(" WHERE {p}"));
        let equals = if self.nulls_not_distinct { "IS NOT DISTINCT FROM" } else { "=" };
        let on: Vec<String> = (0..self.expressions.len())
            .map(|i| format!("crossover_i.crossover_a{i} {equals} crossover_t.crossover_b{i}"))
            .collect();
        let name = &table.rel.name;
        format!(
            "SELECT DISTINCT crossover_i.crossover_key, crossover_t.crossover_key FROM \
             (SELECT {key} AS crossover_key, {incoming_values} FROM ({incoming}) AS {name}{predicate}) AS crossover_i JOIN \
             (SELECT {key} AS crossover_key, {values} FROM {rel} AS {name}{predicate}) AS crossover_t ON {on} \
             WHERE crossover_i.crossover_key <> crossover_t.crossover_key",
            key = key_text(&name.to_string(), &table.key),
            incoming = table.incoming,
            incoming_values = values("crossover_a"),
            values = values("crossover_b"),
            rel = table.rel,
            on = on.join(" AND "),
        )
    }
}

impl Reference {
    /// Why a parent cannot go.
    pub fn still_referred(&self) -> String {
        format!("foreign key \"{}\" of {} still refers to the row", self.name, self.child)
    }

    /// Why a child cannot come.
    pub fn no_parent(&self) -> String {
        format!("foreign key \"{}\" refers to a row that is not in {}", self.name, self.parent)
    }

    /// Does the parent's key hold all that is referred to? Then an update by key never takes it away.
    pub fn is_to_key(&self, parent: &StoreTable) -> bool {
        self.columns.iter().all(|(_, p)| parent.key.iter().any(|(k, _)| k == p))
    }

    /// The key text of a parent, given a child's columns, where that is its whole key.
    fn parent_key(&self, parent: &StoreTable, child: &str) -> Option<String> {
        let columns: Option<Vec<String>> = parent
            .key
            .iter()
            .map(|(k, _)| self.columns.iter().find(|(_, p)| p == k).map(|(c, _)| format!("{child}.{c}::text")))
            .collect();
        Some(format!("ARRAY[{}]::text", columns?.join(", ")))
    }

    /// `item` for each pair of columns: its number, the child's, the parent's.
    fn each(&self, separator: &str, item: impl Fn(usize, &Ident, &Ident) -> String) -> String {
        let items = self.columns.iter().enumerate().map(|(i, (child, parent))| item(i, child, parent));
        items.collect::<Vec<_>>().join(separator)
    }

    /// `(key of a parent, key of a child that refers to it, or NULL for a child outside)` for the parents in `$1`.
    pub fn children(&self, parent: &StoreTable, child: Option<&StoreTable>) -> String {
        let (from, _) = parent.keyed(&parent.rel, "crossover_p", &parent.key);
        format!(
            "SELECT DISTINCT crossover_q.crossover_key, {child_key} FROM (SELECT {key} AS crossover_key, {values} {from}) AS crossover_q \
             JOIN {child} AS crossover_c ON {on}",
            child_key = child_key(child),
            key = key_text("crossover_p", &parent.key),
            values = self.each(", ", |i, _, p| format!("crossover_p.{p} AS crossover_v{i}")),
            child = child.map_or(&self.child, |c| &c.rel),
            on = self.each(" AND ", |i, c, _| format!("crossover_c.{c} = crossover_q.crossover_v{i}")),
        )
    }

    /// As [`Reference::children`] for parents that the rows in `$1` (second shape) overwrite, where no such row has any more what the
    /// child refers to.
    pub fn children_left(&self, parent: &StoreTable, child: Option<&StoreTable>) -> String {
        let same_key = parent.key.iter().map(|(k, _)| format!("crossover_p.{k} = crossover_i.{k}"));
        let refers = |alias: &str| self.each(" AND ", |_, c, p| format!("crossover_c.{c} = {alias}.{p}"));
        format!(
            "WITH crossover_i AS MATERIALIZED ({incoming}) SELECT DISTINCT {key}, {child_key} FROM crossover_i JOIN {parent} AS crossover_p ON {same_key} \
             JOIN {child} AS crossover_c ON {refers} WHERE NOT EXISTS (SELECT FROM crossover_i AS crossover_n WHERE {stays})",
            incoming = parent.incoming,
            key = key_text("crossover_p", &parent.key),
            child_key = child_key(child),
            parent = parent.rel,
            same_key = same_key.collect::<Vec<_>>().join(" AND "),
            child = child.map_or(&self.child, |c| &c.rel),
            refers = refers("crossover_p"),
            stays = refers("crossover_n"),
        )
    }

    /// `(key of a child in $1, its parent's key where the child's columns tell it, whether the parent is there)` for those that refer to one.
    pub fn parents(&self, child: &StoreTable, parent: Option<&StoreTable>) -> String {
        let parent_key = parent.and_then(|p| self.parent_key(p, "crossover_c")).unwrap_or_else(|| "NULL".into());
        format!(
            "SELECT crossover_q.crossover_key, crossover_q.crossover_parent, EXISTS (SELECT FROM {parent} AS crossover_p WHERE {on}) \
             FROM ({referring}) AS crossover_q WHERE {there}",
            parent = parent.map_or(&self.parent, |p| &p.rel),
            on = self.parent_of_row(),
            referring = self.referring(child, &parent_key),
            there = self.each(" AND ", |i, _, _| format!("crossover_q.crossover_v{i} IS NOT NULL")),
        )
    }

    /// Locks the parents of the children in `$1`, as PostgreSQL's own check does; returns the children whose parent is locked now.
    pub fn lock_parents(&self, child: &StoreTable, parent: Option<&StoreTable>) -> String {
        format!(
            "SELECT crossover_q.crossover_key FROM ({referring}) AS crossover_q JOIN {parent} AS crossover_p ON {on} \
             FOR KEY SHARE OF crossover_p SKIP LOCKED",
            referring = self.referring(child, "NULL"),
            parent = parent.map_or(&self.parent, |p| &p.rel),
            on = self.parent_of_row(),
        )
    }

    /// The keys of all children that have no parent.
    pub fn dangling(&self, child: &StoreTable, parent: Option<&StoreTable>) -> String {
        format!(
            "SELECT {key} FROM {child} AS crossover_c WHERE {there} AND NOT EXISTS (SELECT FROM {parent} AS crossover_p WHERE {on})",
            key = key_text("crossover_c", &child.key),
            child = child.rel,
            there = self.each(" AND ", |_, c, _| format!("crossover_c.{c} IS NOT NULL")),
            parent = parent.map_or(&self.parent, |p| &p.rel),
            on = self.each(" AND ", |_, c, p| format!("crossover_p.{p} = crossover_c.{c}")),
        )
    }

    fn parent_of_row(&self) -> String {
        self.each(" AND ", |i, _, p| format!("crossover_p.{p} = crossover_q.crossover_v{i}"))
    }

    fn referring(&self, child: &StoreTable, parent_key: &str) -> String {
        let (from, _) = child.keyed(&child.rel, "crossover_c", &child.key);
        format!(
            "SELECT {key} AS crossover_key, {parent_key} AS crossover_parent, {values} {from}",
            key = key_text("crossover_c", &child.key),
            values = self.each(", ", |i, c, _| format!("crossover_c.{c} AS crossover_v{i}")),
        )
    }
}

fn child_key(child: Option<&StoreTable>) -> String {
    child.map_or_else(|| "NULL".to_string(), |c| key_text("crossover_c", &c.key))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Side;
    use crate::mapping::rule::tests::customer;
    use crate::mapping::sql::Objects;

    fn unique(expressions: &[&str]) -> Unique {
        Unique {
            expressions: expressions.iter().map(|e| e.to_string()).collect(),
            predicate: None,
            nulls_not_distinct: false,
            deferrable: false,
        }
    }

    #[test]
    fn the_key_is_told_from_other_unique_values() {
        let key = [Ident::new("id"), Ident::new("Part")];
        assert!(unique(&["\"Part\"", "id"]).is_over(&key));
        assert!(!unique(&["id"]).is_over(&key));
        assert!(!unique(&["id", "lower(part)"]).is_over(&key));
    }

    #[test]
    fn what_is_in_the_way_is_compared_as_the_index_does() {
        let pair = customer().unwrap();
        let table = StoreTable::first(&pair, &Objects::new(Side::First, "ab12"), &pair.first.rel);
        let mut index = unique(&["lower(first_name)"]);
        index.predicate = Some("balance_cents > 0".into());
        let sql = index.in_the_way(&table);
        assert!(
            sql.contains("(lower(first_name)) AS crossover_a0") && sql.contains("WHERE balance_cents > 0"),
            "{sql}"
        );
    }

    #[test]
    fn a_foreign_key_is_mirrored_by_its_columns() {
        let reference = |child: &str, parent: &str| Reference {
            name: "fk".into(),
            child: RelName::new("s", "c"),
            parent: RelName::new("s", "p"),
            child_index: Some(1),
            parent_index: Some(0),
            columns: vec![(Ident::new(child), Ident::new(parent))],
            mirrored: false,
        };
        let mut first = Constraints { uniques: vec![], references: vec![reference("customer", "id")] };
        let second = Constraints { uniques: vec![], references: vec![reference("client", "client_id")] };
        let names = |_: usize, c: &Ident| match c.as_str() {
            "customer" => Some(Ident::new("client")),
            "id" => Some(Ident::new("client_id")),
            _ => None,
        };
        first.mark_mirrored(&second, names);
        assert!(first.references[0].mirrored);
        first.mark_mirrored(&Constraints::default(), names);
        assert!(!first.references[0].mirrored);
    }
}

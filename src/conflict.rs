//! Which changes of the two stores conflict, and which side wins. Pure.
//!
//! One to one, the unit of decision is the row. Rows that cannot stand beside each other (one unique value twice, a child
//! without its parent) are linked and decided together. A whole-table scope has become its rows before it comes here.

use std::collections::{BTreeMap, BTreeSet};

use crate::error::Side;
use crate::mapping::model::Policy;
use crate::store::{Changes, Key, Micros};

/// What one table's cycle does.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Decision {
    /// The rows that go to second.
    pub forward: BTreeSet<Key>,
    /// The rows that go to first.
    pub backward: BTreeSet<Key>,
    /// Keys changed on both stores, or linked to such; the winner is the same for a row in `forward` (first) or `backward` (second).
    pub conflicts: BTreeMap<Key, Side>,
}

impl Decision {
    /// `side`'s row is written as well, unless the other's is.
    pub fn take_along(&mut self, key: &Key, side: Side) {
        let (to, other) = self.to(side);
        if !other.contains(key) {
            to.insert(key.clone());
        }
    }

    /// `side`'s row stands.
    fn give(&mut self, key: &Key, side: Side) {
        let (to, from) = self.to(side);
        from.remove(key);
        to.insert(key.clone());
        self.conflicts.insert(key.clone(), side);
    }

    /// The rows that go the way of `side`'s, and the others.
    fn to(&mut self, side: Side) -> (&mut BTreeSet<Key>, &mut BTreeSet<Key>) {
        match side {
            Side::First => (&mut self.forward, &mut self.backward),
            Side::Second => (&mut self.backward, &mut self.forward),
        }
    }
}

/// A row: the place of its table in the mapping, and its key.
pub type Node = (usize, Key);

fn winner(policy: Policy, first: Option<Micros>, second: Option<Micros>) -> Side {
    match (policy, first, second) {
        (_, None, Some(_)) => Side::Second,
        (_, _, None) => Side::First,
        (Policy::Latest, Some(first), Some(second)) if second > first => Side::Second,
        (Policy::Latest | Policy::First, ..) => Side::First,
        (Policy::Second, ..) => Side::Second,
    }
}

/// Decides for all tables: `first` is what changed there since second's watermark of it, `second` the reverse. `links` join
/// rows that cannot be decided apart.
pub fn decide(policy: Policy, first: &[Changes], second: &[Changes], links: &BTreeSet<(Node, Node)>) -> Vec<Decision> {
    let mut decisions: Vec<Decision> = first.iter().zip(second).map(|(a, b)| decide_table(policy, a, b)).collect();
    for component in components(links) {
        let latest = |changes: &[Changes]| {
            component.iter().filter_map(|(table, key)| changes[*table].keys.get(key).copied()).max()
        };
        let side = winner(policy, latest(first), latest(second));
        for (table, key) in &component {
            decisions[*table].give(key, side);
        }
    }
    decisions
}

/// The connected components of `links`.
fn components(links: &BTreeSet<(Node, Node)>) -> Vec<BTreeSet<Node>> {
    let mut found: Vec<BTreeSet<Node>> = Vec::new();
    for (a, b) in links {
        let (mut joined, apart): (Vec<_>, Vec<_>) = found.into_iter().partition(|c| c.contains(a) || c.contains(b));
        let mut component: BTreeSet<Node> = joined.drain(..).flatten().collect();
        component.extend([a.clone(), b.clone()]);
        found = apart;
        found.push(component);
    }
    found
}

fn decide_table(policy: Policy, first: &Changes, second: &Changes) -> Decision {
    let mut decision = Decision::default();
    for (key, at) in &first.keys {
        match second.keys.get(key) {
            None => {
                decision.forward.insert(key.clone());
            }
            Some(other) => decision.give(key, winner(policy, Some(*at), Some(*other))),
        }
    }
    decision.backward.extend(second.keys.keys().filter(|k| !first.keys.contains_key(*k)).cloned());
    decision
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn changes(keys: &[(&str, i64)]) -> Changes {
        Changes { keys: keys.iter().map(|(k, at)| (k.to_string(), *at)).collect(), whole: None, log_rows: 0 }
    }

    fn keys(names: &[&str]) -> BTreeSet<Key> {
        names.iter().map(|k| k.to_string()).collect()
    }

    fn one(policy: Policy, first: &Changes, second: &Changes) -> Decision {
        decide(policy, std::slice::from_ref(first), std::slice::from_ref(second), &BTreeSet::new()).remove(0)
    }

    fn node(table: usize, key: &str) -> Node {
        (table, key.to_string())
    }

    #[test]
    fn the_later_change_wins() {
        let (a, b) = (changes(&[("{1}", 5), ("{2}", 9), ("{3}", 1)]), changes(&[("{1}", 6), ("{2}", 8), ("{4}", 1)]));
        let d = one(Policy::Latest, &a, &b);
        assert_eq!(d.conflicts, [("{1}".to_string(), Side::Second), ("{2}".to_string(), Side::First)].into());
        assert_eq!(d.forward, keys(&["{2}", "{3}"]));
        assert_eq!(d.backward, keys(&["{1}", "{4}"]));
    }

    #[test]
    fn a_policy_may_name_the_winner() {
        let (a, b) = (changes(&[("{1}", 5), ("{3}", 1)]), changes(&[("{1}", 6), ("{4}", 1)]));
        assert_eq!(one(Policy::First, &a, &b).forward, keys(&["{1}", "{3}"]));
        assert_eq!(one(Policy::Second, &b, &a).forward, keys(&["{4}"]));
    }

    #[test]
    fn linked_rows_go_one_way() {
        // First deletes the parent {1} of table 0; second inserts a child {7} of table 1, and a grandchild {8} of it.
        let first = [changes(&[("{1}", 5)]), changes(&[])];
        let second = [changes(&[("{2}", 5)]), changes(&[("{7}", 6), ("{8}", 7)])];
        let links = [(node(0, "{1}"), node(1, "{7}")), (node(1, "{7}"), node(1, "{8}"))].into();
        let d = decide(Policy::Latest, &first, &second, &links);
        assert_eq!((&d[0].forward, &d[0].backward), (&keys(&[]), &keys(&["{1}", "{2}"])));
        assert_eq!((&d[1].forward, &d[1].backward), (&keys(&[]), &keys(&["{7}", "{8}"])));
        let d = decide(Policy::First, &first, &second, &links);
        assert_eq!((&d[0].forward, &d[0].backward), (&keys(&["{1}"]), &keys(&["{2}"])));
        assert_eq!((&d[1].forward, &d[1].backward), (&keys(&["{7}", "{8}"]), &keys(&[])));
        assert_eq!(d[1].conflicts.len(), 2);
    }

    proptest! {
        /// Every changed key goes exactly one way, and is a conflict exactly if both stores changed it.
        #[test]
        fn each_key_goes_one_way(a in prop::collection::btree_map("[a-e]", 0i64..9, 0..5), b in prop::collection::btree_map("[a-e]", 0i64..9, 0..5)) {
            let first = Changes { keys: a.clone(), whole: None, log_rows: 0 };
            let second = Changes { keys: b.clone(), whole: None, log_rows: 0 };
            for policy in [Policy::Latest, Policy::First, Policy::Second] {
                let d = one(policy, &first, &second);
                let (f, w) = (&d.forward, &d.backward);
                for key in a.keys().chain(b.keys()) {
                    prop_assert!(f.contains(key) != w.contains(key));
                    prop_assert_eq!(d.conflicts.contains_key(key), a.contains_key(key) && b.contains_key(key));
                }
            }
        }

        /// Linked rows share their winner, whatever the changes.
        #[test]
        fn components_have_one_winner(
            a in prop::collection::btree_map("[a-e]", 0i64..9, 1..5), b in prop::collection::btree_map("[a-e]", 0i64..9, 1..5),
            pairs in prop::collection::vec(("[a-e]", "[a-e]"), 0..5),
        ) {
            let first = [Changes { keys: a, whole: None, log_rows: 0 }];
            let second = [Changes { keys: b, whole: None, log_rows: 0 }];
            let links: BTreeSet<(Node, Node)> = pairs.iter().map(|(x, y)| (node(0, x), node(0, y))).collect();
            let d = decide(Policy::Latest, &first, &second, &links).remove(0);
            let (f, w) = (&d.forward, &d.backward);
            for (x, y) in &pairs {
                prop_assert_eq!(f.contains(x), f.contains(y));
                prop_assert_eq!(w.contains(x), w.contains(y));
                prop_assert!(f.contains(x) != w.contains(x));
            }
        }
    }
}

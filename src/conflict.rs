//! Which changes of the two stores conflict, and which side wins. Pure.
//!
//! One to one, the unit of decision is the row; a whole-table scope overlaps every row of its table.

use std::collections::BTreeSet;

use crate::error::Side;
use crate::store::{Changes, Key, Micros};

/// The rows that one direction writes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Scope {
    Keys(BTreeSet<Key>),
    Whole,
}

impl Scope {
    pub fn is_empty(&self) -> bool {
        matches!(self, Scope::Keys(keys) if keys.is_empty())
    }

    fn none() -> Scope {
        Scope::Keys(BTreeSet::new())
    }
}

/// What one table's cycle does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    pub forward: Scope,
    pub backward: Scope,
    /// Keys changed on both stores; the winner is the same for a row in `forward` (first) or `backward` (second).
    pub conflicts: Vec<(Key, Side)>,
}

/// Policy `latest`: the change that its own server's clock puts later; first, when both say the same.
fn winner(first: Micros, second: Micros) -> Side {
    if second > first { Side::Second } else { Side::First }
}

/// Decides for one table: `first` is what changed there since second's watermark of it, `second` the reverse.
pub fn decide(first: &Changes, second: &Changes) -> Decision {
    if first.whole.is_some() || second.whole.is_some() {
        return decide_whole(first, second);
    }
    let mut decision = Decision { forward: Scope::none(), backward: Scope::none(), conflicts: Vec::new() };
    let mut forward = BTreeSet::new();
    let mut backward = BTreeSet::new();
    for (key, at) in &first.keys {
        match second.keys.get(key) {
            None => {
                forward.insert(key.clone());
            }
            Some(other) => {
                let side = winner(*at, *other);
                match side {
                    Side::First => forward.insert(key.clone()),
                    Side::Second => backward.insert(key.clone()),
                };
                decision.conflicts.push((key.clone(), side));
            }
        }
    }
    backward.extend(second.keys.keys().filter(|k| !first.keys.contains_key(*k)).cloned());
    decision.forward = Scope::Keys(forward);
    decision.backward = Scope::Keys(backward);
    decision
}

/// All changes of the table are one component: one side's whole table stands.
fn decide_whole(first: &Changes, second: &Changes) -> Decision {
    let latest = |c: &Changes| c.keys.values().copied().chain(c.whole).max().unwrap_or(Micros::MIN);
    let side = match (first.is_empty(), second.is_empty()) {
        (false, true) => Side::First,
        (true, false) => Side::Second,
        _ => winner(latest(first), latest(second)),
    };
    let conflicts = if first.is_empty() || second.is_empty() {
        Vec::new()
    } else {
        let keys: BTreeSet<&Key> = first.keys.keys().chain(second.keys.keys()).collect();
        keys.into_iter().map(|k| (k.clone(), side)).collect()
    };
    match side {
        Side::First => Decision { forward: Scope::Whole, backward: Scope::none(), conflicts },
        Side::Second => Decision { forward: Scope::none(), backward: Scope::Whole, conflicts },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn changes(keys: &[(&str, i64)]) -> Changes {
        Changes { keys: keys.iter().map(|(k, at)| (k.to_string(), *at)).collect(), whole: None, log_rows: 0 }
    }

    #[test]
    fn the_later_change_wins() {
        let d =
            decide(&changes(&[("{1}", 5), ("{2}", 9), ("{3}", 1)]), &changes(&[("{1}", 6), ("{2}", 8), ("{4}", 1)]));
        assert_eq!(d.conflicts, [("{1}".to_string(), Side::Second), ("{2}".to_string(), Side::First)]);
        assert_eq!(d.forward, Scope::Keys(["{2}", "{3}"].map(String::from).into()));
        assert_eq!(d.backward, Scope::Keys(["{1}", "{4}"].map(String::from).into()));
    }

    #[test]
    fn a_whole_table_overlaps_every_row() {
        let first = Changes { whole: Some(10), ..Changes::default() };
        let d = decide(&first, &Changes::default());
        assert_eq!((d.forward, d.conflicts.len()), (Scope::Whole, 0));
        let d = decide(&first, &changes(&[("{1}", 11)]));
        assert_eq!((d.backward, d.conflicts.len()), (Scope::Whole, 1));
        let d = decide(&first, &changes(&[("{1}", 9)]));
        assert_eq!((d.forward, d.conflicts.len()), (Scope::Whole, 1));
    }

    proptest! {
        /// Every changed key goes exactly one way, and is a conflict exactly if both stores changed it.
        #[test]
        fn each_key_goes_one_way(a in prop::collection::btree_map("[a-e]", 0i64..9, 0..5), b in prop::collection::btree_map("[a-e]", 0i64..9, 0..5)) {
            let first = Changes { keys: a.clone(), whole: None, log_rows: 0 };
            let second = Changes { keys: b.clone(), whole: None, log_rows: 0 };
            let d = decide(&first, &second);
            let (Scope::Keys(f), Scope::Keys(w)) = (&d.forward, &d.backward) else { panic!("whole") };
            for key in a.keys().chain(b.keys()) {
                prop_assert!(f.contains(key) != w.contains(key));
                prop_assert_eq!(d.conflicts.iter().any(|(k, _)| k == key), a.contains_key(key) && b.contains_key(key));
            }
        }
    }
}

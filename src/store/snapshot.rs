//! A `pg_snapshot` as a set of transactions: which ones it shows, and what two of them have to do with each other. Pure.

use std::collections::BTreeSet;

/// A `pg_snapshot`: `xmin:xmax:xip,...`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot(String);

impl Snapshot {
    /// As PostgreSQL writes it.
    pub fn new(text: impl Into<String>) -> Snapshot {
        Snapshot(text.into())
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    pub fn xmax(&self) -> &str {
        self.0.split(':').nth(1).unwrap_or("3")
    }

    /// The transactions in progress, as an array literal.
    pub fn xip(&self) -> String {
        format!("{{{}}}", self.0.split(':').nth(2).unwrap_or(""))
    }

    fn parts(&self) -> (u64, BTreeSet<u64>) {
        let xip = self.0.split(':').nth(2).unwrap_or("");
        (self.xmax().parse().unwrap_or(3), xip.split(',').filter_map(|x| x.parse().ok()).collect())
    }

    fn from_parts(xmax: u64, xip: BTreeSet<u64>) -> Snapshot {
        let list: Vec<String> = xip.iter().map(u64::to_string).collect();
        Snapshot(format!("{}:{xmax}:{}", xip.first().unwrap_or(&xmax), list.join(",")))
    }

    /// Does it show every transaction that `other` shows?
    pub fn covers(&self, other: &Snapshot) -> bool {
        let ((xmax, xip), (other_xmax, other_xip)) = (self.parts(), other.parts());
        let hidden = |x: &u64| *x >= other_xmax || other_xip.contains(x);
        (xmax..other_xmax).all(|x| other_xip.contains(&x)) && xip.iter().all(hidden)
    }

    /// What it shows of the transactions up to `last`.
    pub fn up_to(&self, last: u64) -> Snapshot {
        let (xmax, mut xip) = self.parts();
        let xmax = xmax.min(last + 1);
        xip.retain(|x| *x < xmax);
        Snapshot::from_parts(xmax, xip)
    }

    /// What either of the two shows.
    pub fn or(&self, other: &Snapshot) -> Snapshot {
        let ((a_max, a), (b_max, b)) = (self.parts(), other.parts());
        let hidden = |x: &u64, xmax: u64, xip: &BTreeSet<u64>| *x >= xmax || xip.contains(x);
        let both = a.union(&b).copied().filter(|x| hidden(x, a_max, &a) && hidden(x, b_max, &b)).collect();
        Snapshot::from_parts(a_max.max(b_max), both)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn shows(snapshot: &Snapshot, x: u64) -> bool {
        let (xmax, xip) = snapshot.parts();
        x < xmax && !xip.contains(&x)
    }

    fn any_snapshot() -> impl Strategy<Value = Snapshot> {
        (3u64..12, proptest::collection::btree_set(3u64..12, 0..4)).prop_map(|(xmax, mut xip)| {
            xip.retain(|x| *x < xmax);
            Snapshot::from_parts(xmax, xip)
        })
    }

    #[test]
    fn text_as_postgresql_writes_it() {
        assert_eq!(Snapshot::new("5:9:5,7").up_to(6).as_str(), "5:7:5");
        assert_eq!(Snapshot::new("9:9:").or(&Snapshot::new("5:7:5")).as_str(), "9:9:");
        assert!(Snapshot::new("9:9:").covers(&Snapshot::new("5:9:5")));
        assert!(!Snapshot::new("5:9:5").covers(&Snapshot::new("9:9:")));
    }

    proptest! {
        #[test]
        fn they_are_sets(a in any_snapshot(), b in any_snapshot(), last in 3u64..14) {
            let (either, part) = (a.or(&b), a.up_to(last));
            for x in 0..20 {
                prop_assert_eq!(shows(&either, x), shows(&a, x) || shows(&b, x), "{} in {:?}", x, either);
                prop_assert_eq!(shows(&part, x), shows(&a, x) && x <= last);
            }
            prop_assert_eq!(a.covers(&b), (0..20).all(|x| shows(&a, x) || !shows(&b, x)));
        }
    }
}

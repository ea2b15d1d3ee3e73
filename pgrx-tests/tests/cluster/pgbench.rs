//! Unmodified pgbench does not notice that its tables move to another server, another structure, and back.

use pgrx_tests::bank::{self, Sums};
use pgrx_tests::pgbench::Report;
use pgrx_tests::{Migration, Pair, Pgbench, Witness};

const SCALE: u32 = 10;

/// Through every state, back, and through every state again.
const SWITCHES: [&str; 6] = ["both", "second", "both", "first", "both", "second"];

fn assert_unhurt(report: &Report) {
    println!("{report:?}");
    assert_eq!(report.failed, 0, "transactions failed");
    assert!(report.processed > 100, "pgbench got hardly anything done: {report:?}");
}

fn start_pgbench(pair: &Pair, mode: &str) -> Pgbench {
    Pgbench::start(&pair.first, &["-c", "4", "-j", "2", "-M", mode])
}

/// Through every state and back, then `end`, with pgbench running all the time.
fn through_all_states(mode: &str) {
    let pair = Pair::new();
    bank::create(&pair, SCALE);
    let witness = (Witness::of(&pair.first), Witness::of(&pair.second));
    let mut pgbench = start_pgbench(&pair, mode);
    let migration = Migration::start(&pair, "bank", &bank::mapping());
    migration.until_state("first");
    for state in SWITCHES {
        pgbench.until_done(400);
        migration.set_state(state);
    }
    pgbench.until_done(400);
    assert_unhurt(&pgbench.stop());

    migration.settle();
    let (first, second) = (Sums::first(&pair, "__first"), Sums::second(&pair));
    first.assert_agree("first");
    assert_eq!(first, second);
    let history: Vec<_> = migration.history().iter().map(|row| row["to_state"].clone()).collect();
    assert!(history.ends_with(&SWITCHES.map(Into::into)), "{history:?}");

    // finish under load: the first tables stay as of a moment between two transactions, the second store goes on.
    let mut pgbench = start_pgbench(&pair, mode);
    pgbench.until_done(400);
    migration.finish();
    pgbench.until_done(400);
    assert_unhurt(&pgbench.stop());
    Sums::first(&pair, "__first").assert_agree("first");
    Sums::second(&pair).assert_agree("second");
    assert_ne!(Sums::second(&pair), second, "pgbench goes on in the second store");
    witness.0.testify();
    witness.1.testify();
}

#[test]
fn simple_queries() {
    through_all_states("simple");
}

#[test]
fn extended_queries() {
    through_all_states("extended");
}

#[test]
fn prepared_queries() {
    through_all_states("prepared");
}

#[test]
fn prepared_queries_and_back_to_cancelled() {
    let pair = Pair::new();
    bank::create(&pair, SCALE);
    let witness = (Witness::of(&pair.first), Witness::of(&pair.second));
    let mut pgbench = start_pgbench(&pair, "prepared");
    let migration = Migration::start(&pair, "bank", &bank::mapping());
    migration.until_state("first");
    for state in ["both", "second", "both", "first"] {
        pgbench.until_done(400);
        migration.set_state(state);
    }
    assert_unhurt(&pgbench.stop());
    migration.settle();
    assert_eq!(Sums::first(&pair, "__first"), Sums::second(&pair));

    let mut pgbench = start_pgbench(&pair, "prepared");
    pgbench.until_done(400);
    migration.cancel();
    pgbench.until_done(400);
    assert_unhurt(&pgbench.stop());
    Sums::first(&pair, "").assert_agree("first");
    Sums::second(&pair).assert_agree("second");
    witness.0.testify();
    witness.1.testify();
}

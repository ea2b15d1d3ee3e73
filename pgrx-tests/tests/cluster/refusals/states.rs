//! Moves that a state does not allow.

use pgrx_tests::{Migration, Pair, Witness, market};
use serde_json::json;

use super::{Bench, Expected, literal, start_as};

/// What may be done in each state, by which function, and where it leads.
const ALLOWED: &[(&str, &[(&str, &str)])] = &[
    ("copying", &[("cancel", "cancelled")]),
    ("first", &[("set_state", "both"), ("cancel", "cancelled"), ("set_state", "copying")]),
    ("both", &[("set_state", "first"), ("set_state", "second")]),
    ("second", &[("set_state", "both"), ("finish", "finished")]),
    ("finished", &[]),
    ("cancelled", &[]),
];

/// Every forbidden move of the state that the migration is in, and the one that is none.
fn refuses_what_is_not_allowed(bench: &Bench, name: &str) {
    let migration = Migration::named(&bench.pair, name);
    let state = migration.state();
    let (_, allowed) = ALLOWED.iter().find(|(s, _)| *s == state).expect("a state");
    let name_sql = literal(name);
    let calls: Vec<String> = allowed
        .iter()
        .map(|(function, to)| match *function {
            "set_state" => format!("SELECT migration_set_state({name_sql}, '{to}');"),
            end => format!("SELECT migration_{end}({name_sql});"),
        })
        .collect();
    let by_itself = if state == "copying" { "it goes to first by itself when the copy is complete, and " } else { "" };
    let hint = if calls.is_empty() {
        format!("A migration that is {state} has ended; migration_start begins another one.")
    } else {
        format!("From {state} {by_itself}these are allowed: {}", calls.join(" "))
    };
    bench.set_up();
    let refuses = |call: &str, message: &str, hint: &str| {
        let message = format!("migration \"{name}\" cannot {message}");
        let what = format!("{state}: {call}");
        bench.refuses(&what, &format!("SELECT migration_{call}"), &Expected::new("55000", &message, "", hint));
    };
    for (to, _) in ALLOWED {
        if *to != state && !allowed.contains(&("set_state", to)) {
            refuses(&format!("set_state({name_sql}, '{to}')"), &format!("go from {state} to {to}"), &hint);
        }
    }
    for (end, to, from) in [
        ("finish", "finished", "A migration is finished from second. "),
        ("cancel", "cancelled", "A migration is cancelled from copying or first. "),
    ] {
        if *to != state && !allowed.contains(&(end, to)) {
            let hint = if calls.is_empty() { hint.clone() } else { format!("{from}{hint}") };
            refuses(&format!("{end}({name_sql})"), &format!("be {to} in state {state}"), &hint);
        }
    }
    if calls.is_empty() {
        for (call, word) in [("pause", "paused"), ("resume", "resumed")] {
            refuses(&format!("{call}({name_sql})"), &format!("be {word} in state {state}"), &hint);
        }
    }
    migration.set_state(&state);
    assert_eq!(migration.state(), state);
}

#[test]
fn states() {
    let pair = Pair::with(&["autovacuum = off"], &["autovacuum = off"]);
    market::create(&pair, 2000);
    let witness = Witness::of(&pair.first);
    let mut bench = Bench::new(pair);
    bench.is_live = true;
    let slow = json!({"copy_rate": 20, "chunk_rows": 10});
    // Names that have to be quoted in a hint.
    let (back, on) = ("it's", "the \"second\" one");
    let migration = Migration::start_with(&bench.pair, back, &market::mapping(), &slow);
    bench.changing = &["crossover.migrated_table", "market.client", "market.sale"];
    refuses_what_is_not_allowed(&bench, back);
    assert_eq!(migration.state(), "copying", "the copy was meant to last");
    migration.cancel();
    bench.changing = &[];
    refuses_what_is_not_allowed(&bench, back);

    bench.pair.second.sql("TRUNCATE market.client, market.sale");
    let migration = Migration::start(&bench.pair, on, &market::mapping());
    migration.until_state("first");
    migration.wait();
    refuses_what_is_not_allowed(&bench, on);

    // Paused, it moves nowhere. A pause of what is paused changes nothing.
    migration.call("pause");
    migration.call("pause");
    bench.set_up();
    let hint = format!("SELECT migration_resume({});", literal(on));
    for (call, cannot) in [
        (format!("migration_set_state({}, 'both')", literal(on)), "change its state"),
        (format!("migration_wait({})", literal(on)), "catch up"),
    ] {
        let message = format!("migration \"{on}\" is paused and cannot {cannot}");
        bench.refuses(&call, &format!("SELECT {call}"), &Expected::new("55000", &message, "", &hint));
    }
    migration.call("resume");
    migration.call("resume");

    bench.set_up();
    let forced = format!("SELECT migration_set_state({}, 'both', force => true)", literal(on));
    let message = "force is not supported yet for a move to another state";
    bench.refuses(
        "force",
        &forced,
        &Expected::new("22023", message, "", "Bring the second server back and call without force."),
    );
    for state in ["both", "second"] {
        migration.set_state(state);
        refuses_what_is_not_allowed(&bench, on);
    }
    bench.set_up();
    let taken = start_as(on, &market::mapping().to_string(), "{}");
    let taken_hint = "Choose another name, or end the other migration with migration_finish or migration_cancel.";
    bench.refuses(
        "a name that is taken",
        &taken,
        &Expected::new("42710", &format!("migration \"{on}\" already exists"), "", taken_hint),
    );
    migration.finish();
    refuses_what_is_not_allowed(&bench, on);
    witness.testify();
}

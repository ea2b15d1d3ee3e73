//! What is owed is never forgotten by a switch.

use std::thread;

use pgrx_tests::cluster::explain;
use pgrx_tests::wait::{SOON, until};
use pgrx_tests::{Migration, Pair};
use serde_json::json;

/// A migration of one table into `pile` on the second server, in `both`.
fn in_both<'a>(pair: &'a Pair, name: &str, columns: &str, second_columns: &str, fill: &str) -> Migration<'a> {
    pair.first.sql(&format!("CREATE TABLE {name} (id integer PRIMARY KEY, {columns}); {fill}"));
    pair.second_store("pile", &format!("CREATE TABLE {name} (id integer PRIMARY KEY, {second_columns})"));
    let mapping = json!({"tables": [{"first": format!("public.{name}"), "second": format!("pile.{name}"), "second_view": format!("public.{name}_2")}]});
    let migration = Migration::start(pair, name, &mapping);
    migration.until_state("first");
    migration.set_state("both");
    migration.settle();
    migration
}

fn assert_equal(pair: &Pair, name: &str) {
    let rows = |table: &str| format!("SELECT md5(string_agg(t::text, ';' ORDER BY id)) FROM {table} AS t");
    let (first, second) = (rows(&format!("{name}__first")), rows(&format!("pile.{name}")));
    assert_eq!(pair.first.text(&first), pair.second.text(&second), "the stores of {name} differ");
}

/// Moves to `first`, and does `work` when the last cycle, which has locked `table` on the second server, waits for a client of the first.
fn at_the_last_cycle(
    pair: &Pair,
    migration: &Migration,
    table: &str,
    work: impl FnOnce(),
) -> Result<String, postgres::Error> {
    let locked =
        format!("SELECT 1 FROM pg_locks WHERE relation = '{table}'::regclass AND mode = 'ExclusiveLock' AND granted");
    let waits = format!(
        "SELECT 1 FROM pg_locks WHERE pid = {} AND locktype = 'transactionid' AND NOT granted",
        migration.worker()
    );
    thread::scope(|scope| {
        let switch = scope.spawn(|| migration.try_set_state("first", SOON));
        until("the last cycle waits for the client", SOON, || {
            pair.second.text(&locked).is_some() && pair.first.text(&waits).is_some()
        });
        work();
        switch.join().expect("no panic")
    })
}

/// A value that a client of the store which stays has just taken: the row of the other store is owed, and the switch has to wait for that.
#[test]
fn a_switch_leaves_no_row_behind_that_met_a_client() {
    let pair = Pair::with(&["crossover.lock_attempt = '1s'"], &[]);
    let migration = in_both(&pair, "person", "mail text UNIQUE", "mail text UNIQUE", "");
    let mut client = pair.first.connect();
    for round in 1..=3 {
        let (ours, theirs, mail) = (round * 10, round * 10 + 1, format!("m{round}"));
        client.batch_execute(&format!("BEGIN; INSERT INTO person VALUES ({ours}, '{mail}')")).expect("an insert");
        pair.second.sql(&format!("INSERT INTO pile.person VALUES ({theirs}, '{mail}')"));
        let switched = at_the_last_cycle(&pair, &migration, "pile.person", || {
            client.batch_execute("COMMIT").expect("a commit");
        });
        switched.unwrap_or_else(|e| panic!("{}", explain(&e)));
        migration.settle();
        assert_equal(&pair, "person");
        let images: String = migration.conflicts().iter().map(ToString::to_string).collect();
        for id in [ours, theirs] {
            let there = pair.first.text(&format!("SELECT 1 FROM person__first WHERE id = {id}")).is_some();
            assert!(there || images.contains(&format!("\"id\":{id},")), "{id} is lost; conflicts: {images}");
        }
        migration.set_state("both");
    }
}

/// A parent that goes with the last cycle, while a client of the store that stays is just giving it a child.
#[test]
fn a_switch_leaves_no_child_behind() {
    let pair = Pair::with(&["crossover.lock_attempt = '1s'"], &[]);
    let tables = "CREATE TABLE elder (id integer PRIMARY KEY); CREATE TABLE younger (id integer PRIMARY KEY, of integer REFERENCES elder)";
    pair.first.sql(&format!("{tables}; INSERT INTO elder SELECT generate_series(1, 3)"));
    pair.second_store("pile", tables);
    let table = |name: &str| json!({"first": format!("public.{name}"), "second": format!("pile.{name}"), "second_view": format!("public.{name}_2")});
    let migration = Migration::start(&pair, "family", &json!({"tables": [table("elder"), table("younger")]}));
    migration.until_state("first");
    migration.set_state("both");
    migration.settle();
    let mut client = pair.first.connect();
    for id in 1..=3 {
        client.batch_execute(&format!("BEGIN; INSERT INTO younger VALUES ({id}, {id})")).expect("an insert");
        pair.second.sql(&format!("DELETE FROM pile.elder WHERE id = {id}"));
        let switched = at_the_last_cycle(&pair, &migration, "pile.elder", || {
            client.batch_execute("COMMIT").expect("a commit");
        });
        switched.unwrap_or_else(|e| panic!("{}", explain(&e)));
        migration.settle();
        let dangling =
            "SELECT 1 FROM younger__first AS y WHERE NOT EXISTS (SELECT FROM elder__first AS e WHERE e.id = y.of)";
        assert_eq!(pair.first.text(dangling), None, "child {id} has no parent");
        assert_equal(&pair, "elder");
        assert_equal(&pair, "younger");
        migration.set_state("both");
    }
}

//! What is owed is never forgotten: not by a switch, not by a wait, not under a load that does not end, not where rows wait for each other.

use std::thread;

use pgrx_tests::cluster::explain;
use pgrx_tests::wait::{LONG, SOON, until};
use pgrx_tests::{Load, Migration, Pair, process};
use postgres::Client;
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
    let locked = format!(
        "SELECT 1 FROM pg_locks WHERE relation = '{table}'::regclass AND mode = 'ExclusiveLock' AND granted LIMIT 1"
    );
    let waits = format!(
        "SELECT 1 FROM pg_locks WHERE pid = {} AND locktype = 'transactionid' AND NOT granted LIMIT 1",
        migration.worker()
    );
    let (mut first, mut second) = (pair.first.connect(), pair.second.connect());
    let holds = |client: &mut Client, query: &str| client.query_opt(query, &[]).expect("an answer").is_some();
    thread::scope(|scope| {
        let switch = scope.spawn(|| migration.try_set_state("first", LONG));
        until("the last cycle waits for the client", LONG, || holds(&mut second, &locked) && holds(&mut first, &waits));
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

/// With the last cycle goes what children of a parent refer to, by `change`, while a client of the store that stays is just giving it one.
fn no_child_is_left_behind(refers_to: &str, change: impl Fn(i32) -> String) {
    let pair = Pair::with(&["crossover.lock_attempt = '1s'"], &[]);
    let tables = format!(
        "CREATE TABLE elder (id integer PRIMARY KEY, code integer UNIQUE); CREATE TABLE younger (id integer PRIMARY KEY, of integer REFERENCES elder ({refers_to}))"
    );
    pair.first.sql(&format!("{tables}; INSERT INTO elder SELECT i, i FROM generate_series(1, 3) AS i"));
    pair.second_store("pile", &tables);
    let table = |name: &str| json!({"first": format!("public.{name}"), "second": format!("pile.{name}"), "second_view": format!("public.{name}_2")});
    let migration = Migration::start(&pair, "family", &json!({"tables": [table("elder"), table("younger")]}));
    migration.until_state("first");
    migration.set_state("both");
    migration.settle();
    let mut client = pair.first.connect();
    for id in 1..=3 {
        client.batch_execute(&format!("BEGIN; INSERT INTO younger VALUES ({id}, {id})")).expect("an insert");
        pair.second.sql(&change(id));
        let switched = at_the_last_cycle(&pair, &migration, "pile.elder", || {
            client.batch_execute("COMMIT").expect("a commit");
        });
        switched.unwrap_or_else(|e| panic!("{}", explain(&e)));
        migration.settle();
        let dangling = format!(
            "SELECT 1 FROM younger__first AS y WHERE NOT EXISTS (SELECT FROM elder__first AS e WHERE e.{refers_to} = y.of)"
        );
        assert_eq!(pair.first.text(&dangling), None, "child {id} has no parent");
        assert_equal(&pair, "elder");
        assert_equal(&pair, "younger");
        migration.set_state("both");
    }
}

#[test]
fn a_switch_leaves_no_child_of_a_deleted_parent_behind() {
    no_child_is_left_behind("id", |id| format!("DELETE FROM pile.elder WHERE id = {id}"));
}

#[test]
fn a_switch_leaves_no_child_of_another_value_behind() {
    no_child_is_left_behind("code", |id| format!("UPDATE pile.elder SET code = code + 100 WHERE id = {id}"));
}

/// A cycle that takes little at a time, because rows were large, gets through what is owed however much is changed meanwhile.
#[test]
fn replication_goes_on_under_load_after_large_rows() {
    let pair = Pair::new();
    let fill = "INSERT INTO heap SELECT i, 0, NULL FROM generate_series(1, 3000) AS i";
    let migration = in_both(&pair, "heap", "n integer, body text", "n integer, body text", fill);
    let load = Load::start(&pair.first.config("app"), 4, |client, round, connection| {
        let from = 1000 + client as u64 * 500 + round * 50 % 500;
        connection.execute(&format!("UPDATE heap SET n = n + 1 WHERE id BETWEEN {from} AND {from} + 49"), &[]).map(drop)
    });
    pair.first.sql(
        "UPDATE heap SET body = (SELECT string_agg(md5(id || ' ' || j), '') FROM generate_series(1, 131072) AS j) WHERE id <= 12",
    );
    pair.second.sql("UPDATE pile.heap SET n = -1 WHERE id = 20");
    let there = "SELECT 1 FROM pile.heap WHERE id = 12 AND length(body) > 4000000";
    until("large rows have been replicated", LONG, || pair.second.text(there).is_some());
    let back = "SELECT 1 FROM heap__first WHERE id = 20 AND n = -1";
    until("a row has come back", LONG, || pair.first.text(back).is_some());
    load.stop().assert_clean("under load");
    migration.settle();
    assert_equal(&pair, "heap");
}

/// Transactions on the second store, each of more rows than a cycle takes at a time, without an end: what comes between them arrives.
#[test]
fn large_transactions_in_second_keep_nothing_from_arriving() {
    let pair = Pair::new();
    let fill = "INSERT INTO heap SELECT i, 0 FROM generate_series(1, 15000) AS i; ANALYZE heap";
    let migration = in_both(&pair, "heap", "n integer", "n integer", fill);
    migration.set_state("second");
    let load = Load::start(&pair.second.config("app"), 1, |_, _, connection| {
        connection.execute("UPDATE pile.heap SET n = n + 1 WHERE id > 10", &[]).map(drop)
    });
    for id in 1..=3 {
        pair.second.sql(&format!("UPDATE pile.heap SET n = -1 WHERE id = {id}"));
        let back = format!("SELECT 1 FROM heap__first WHERE id = {id} AND n = -1");
        until("a row has come back", LONG, || pair.first.text(&back).is_some());
    }
    load.stop().assert_clean("in second");
    migration.set_state("both");
    migration.settle();
    assert_equal(&pair, "heap");
    assert!(migration.conflicts().is_empty());
}

/// Values that move along a chain of more rows than a cycle takes.
#[test]
fn unique_values_move_along_a_long_chain() {
    let pair = Pair::new();
    let column = "pos integer UNIQUE DEFERRABLE";
    let fill = "INSERT INTO line SELECT i, i FROM generate_series(1, 20000) AS i; ANALYZE line";
    let migration = in_both(&pair, "line", column, column, fill);
    pair.first.sql("UPDATE line SET pos = pos + 1");
    migration.try_wait(LONG).unwrap_or_else(|e| panic!("{}", explain(&e)));
    assert_equal(&pair, "line");
    pair.second.sql("UPDATE pile.line SET pos = 40000 - pos");
    migration.try_wait(LONG).unwrap_or_else(|e| panic!("{}", explain(&e)));
    assert_equal(&pair, "line");
    assert!(migration.conflicts().is_empty());
}

/// A table without rows is truncated: there is nothing to owe, and the other direction has still to be looked at.
#[test]
fn a_wait_sees_both_directions() {
    let pair = Pair::new();
    pair.first.sql("CREATE TABLE empty (id integer PRIMARY KEY); CREATE TABLE filled (id integer PRIMARY KEY)");
    pair.second_store(
        "pile",
        "CREATE TABLE empty (id integer PRIMARY KEY); CREATE TABLE filled (id integer PRIMARY KEY)",
    );
    let table = |name: &str| json!({"first": format!("public.{name}"), "second": format!("pile.{name}"), "second_view": format!("public.{name}_2")});
    let migration = Migration::start(&pair, "two", &json!({"tables": [table("empty"), table("filled")]}));
    migration.until_state("first");
    migration.set_state("both");
    for round in 1..=5 {
        let worker = migration.worker();
        let locks = format!("SELECT 1 FROM pg_locks WHERE pid = {worker} AND locktype = 'relation'");
        until("the worker is held between two cycles", SOON, || {
            process::signal(worker, process::STOP);
            until("the worker is held", SOON, || process::is_stopped(worker));
            let between = pair.first.text(&locks).is_none();
            between || !process::signal(worker, process::CONTINUE)
        });
        pair.first.sql("TRUNCATE empty__first");
        pair.second.sql(&format!("INSERT INTO pile.filled VALUES ({round})"));
        thread::scope(|scope| {
            let waiting = scope.spawn(|| migration.try_wait(LONG));
            let filed = "SELECT 1 FROM crossover.request WHERE kind = 'wait' AND status = 'queued'";
            until("the wait is filed", SOON, || pair.first.text(filed).is_some());
            process::signal(worker, process::CONTINUE);
            waiting.join().expect("no panic").unwrap_or_else(|e| panic!("{}", explain(&e)));
        });
        assert_equal(&pair, "filled");
    }
}

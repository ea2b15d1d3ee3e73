//! A running autovacuum does not keep a switch, nor a start or an end, from its locks: they have it cancelled, as any client would.
//! A vacuum that somebody has ordered goes on, and is named.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use pgrx_tests::cluster::explain;
use pgrx_tests::migration::waited;
use pgrx_tests::wait::{SOON, until};
use pgrx_tests::{Cluster, Migration, Pair, Witness};
use serde_json::{Value, json};

/// Long enough for every attempt at a lock, short against a vacuum, which takes minutes.
const TIMEOUT: Duration = Duration::from_secs(10);

/// One page of a table after the other, with rests: as it is on a table of terabytes.
const SLOW: &str = "WITH (autovacuum_vacuum_threshold = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_insert_threshold = -1,
    autovacuum_vacuum_cost_delay = 100, autovacuum_vacuum_cost_limit = 1)";

const TABLES: [&str; 2] = ["heap", "pile"];

fn create(pair: &Pair) -> Value {
    for table in TABLES {
        let columns = "(id integer PRIMARY KEY, n integer NOT NULL, body text)";
        pair.first.sql(&format!(
            "CREATE TABLE {table} {columns} {SLOW};
             INSERT INTO {table} SELECT i, 0, repeat('x', 200) FROM generate_series(1, 20000) AS i;
             UPDATE {table} SET n = 1"
        ));
    }
    let columns = "(id integer PRIMARY KEY, n integer NOT NULL, body text)";
    pair.second_store("slow", &TABLES.map(|table| format!("CREATE TABLE {table} {columns} {SLOW};")).concat());
    let table = |table: &str| json!({"first": format!("public.{table}"), "second": format!("slow.{table}"), "second_view": format!("public.new_{table}")});
    json!({"tables": TABLES.map(table)})
}

/// Waits until an autovacuum worker holds its lock on each table of the migration.
fn until_vacuumed(cluster: &Cluster, suffix: &str, schema: &str) {
    let tables = TABLES.map(|table| format!("'{schema}.{table}{suffix}'::regclass")).join(", ");
    let query = format!(
        "SELECT count(*) FROM pg_stat_progress_vacuum v JOIN pg_stat_activity a USING (pid) JOIN pg_locks l USING (pid)
          WHERE a.backend_type = 'autovacuum worker' AND v.relid IN ({tables}) AND l.relation = v.relid
            AND l.mode = 'ShareUpdateExclusiveLock' AND l.granted"
    );
    until(&format!("autovacuum is at work on cluster {}", cluster.name()), SOON, || {
        cluster.text(&query).as_deref() == Some("2")
    });
}

/// How many autovacuums were cancelled.
fn cancelled(cluster: &Cluster) -> usize {
    fs::read_to_string(cluster.log_path()).expect("the log").matches("canceling autovacuum task").count()
}

/// Goes to `to` while autovacuum is at work on both servers, which is cancelled on those that the step locks.
fn step(pair: &Pair, suffix: &str, what: &str, hit: [bool; 2], go: impl FnOnce()) {
    until_vacuumed(&pair.first, suffix, "public");
    until_vacuumed(&pair.second, "", "slow");
    let before = [&pair.first, &pair.second].map(cancelled);
    go();
    for (i, cluster) in [&pair.first, &pair.second].into_iter().enumerate() {
        let more = cancelled(cluster) - before[i];
        println!("{what}: {more} autovacuums cancelled on {}", cluster.name());
        assert!(!hit[i] || more > 0, "{what}: no autovacuum was in the way on cluster {}", cluster.name());
    }
}

fn pair() -> Pair {
    // A worker for each table, and more for the catalogs.
    let settings = ["autovacuum_naptime = '1s'", "autovacuum_max_workers = 5"];
    Pair::with(&settings, &settings)
}

/// A migration in `first`, with dead rows in both stores.
fn started(pair: &Pair) -> Migration<'_> {
    let mapping = create(pair);
    until_vacuumed(&pair.first, "", "public");
    let before = cancelled(&pair.first);
    let migration = Migration::start(pair, "slow", &mapping);
    assert!(cancelled(&pair.first) > before, "no autovacuum was in the way of the start");
    migration.until_state("first");
    // On the second server there is nothing to vacuum yet.
    for table in TABLES {
        pair.first.sql(&format!("UPDATE {table} SET n = 2"));
    }
    migration.settle();
    migration
}

/// Switches, and shows how long the step took.
fn switch(migration: &Migration, to: &str) {
    let began = Instant::now();
    let state = migration.try_set_state(to, TIMEOUT);
    println!("to {to}: {:?}", began.elapsed());
    match state {
        Ok(state) => assert_eq!(state, to),
        Err(e) => panic!("to {to}: {}", explain(&e)),
    }
}

#[test]
fn on_the_way_to_finished() {
    let pair = pair();
    let witness = (Witness::of(&pair.first), Witness::of(&pair.second));
    let migration = started(&pair);
    step(&pair, "", "to both", [true, true], || switch(&migration, "both"));
    step(&pair, "__first", "to second", [true, false], || switch(&migration, "second"));
    step(&pair, "__first", "finish", [true, true], || migration.finish());
    witness.0.testify();
    witness.1.testify();
}

#[test]
fn on_the_way_back_to_cancelled() {
    let pair = pair();
    let witness = (Witness::of(&pair.first), Witness::of(&pair.second));
    let migration = started(&pair);
    migration.walk(&["both", "second"]);
    step(&pair, "__first", "to both", [true, true], || switch(&migration, "both"));
    step(&pair, "__first", "to first", [false, true], || switch(&migration, "first"));
    step(&pair, "__first", "cancel", [true, true], || migration.cancel());
    witness.0.testify();
    witness.1.testify();
}

#[test]
fn a_vacuum_that_somebody_has_ordered() {
    let pair = Pair::with(&["autovacuum = off"], &["autovacuum = off"]);
    let mapping = create(&pair);
    let migration = Migration::start(&pair, "slow", &mapping);
    migration.until_state("first");
    pair.first.sql("UPDATE heap SET n = 2");
    migration.settle();
    for (cluster, table, to) in [(&pair.second, "slow.heap", "both"), (&pair.first, "heap__first", "second")] {
        let mut client = cluster.connect();
        client.batch_execute("SET vacuum_cost_delay = '100ms'; SET vacuum_cost_limit = 1").expect("settings");
        let pid: i32 = client.query_one("SELECT pg_backend_pid()", &[]).expect("a pid").get(0);
        let vacuum = format!("VACUUM {table}");
        thread::scope(|scope| {
            let vacuum = scope.spawn(|| client.batch_execute(&vacuum));
            let at_work = format!("SELECT count(*) FROM pg_stat_progress_vacuum WHERE pid = {pid}");
            until("the vacuum is at work", SOON, || cluster.text(&at_work).as_deref() == Some("1"));
            let (from, timeout) = (migration.state(), Duration::from_secs(5));
            let error = migration.try_set_state(to, timeout).expect_err("a vacuum is in the way");
            let text = explain(&error);
            let waited = waited(&error);
            assert!(waited < timeout + Duration::from_secs(2), "to {to}: it took {waited:?}");
            assert!(
                text.starts_with("55P03") && text.contains(&format!("pid {pid} on the {} server", cluster.name())),
                "{text}"
            );
            // Not for long: the second store may be opened, and is closed again.
            migration.until_status("is as it was", |s| s.state() == from && s.phase() == "replicating");
            cluster.sql(&format!("SELECT pg_cancel_backend({pid})"));
            vacuum.join().expect("the client").expect_err("it was cancelled, by us and not before");
        });
        migration.set_state(to);
    }
    migration.walk(&["both", "first"]);
    migration.cancel();
}

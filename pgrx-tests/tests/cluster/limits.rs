//! The limits that an operator sets hold, from both sides.

use std::time::Duration;

use pgrx_tests::wait::{LONG, SOON, Stopwatch, until};
use pgrx_tests::{Migration, Pair, Witness, process};
use serde_json::{Value, json};

/// `rows` rows of a number and a text.
fn create(pair: &Pair, rows: u32) -> Value {
    pair.first.sql(&format!(
        "CREATE TABLE heap (id integer PRIMARY KEY, n integer NOT NULL DEFAULT 0, body text);
         INSERT INTO heap SELECT i, 0, 'body ' || i FROM generate_series(1, {rows}) AS i; ANALYZE heap"
    ));
    pair.second_store("pile", "CREATE TABLE heap (id integer PRIMARY KEY, n integer NOT NULL, body text)");
    json!({"tables": [{"first": "public.heap", "second": "pile.heap"}]})
}

/// Rows that a rule is slow to derive.
fn slow(mapping: &Value) -> Value {
    let mut mapping = mapping.clone();
    mapping["tables"][0]["forward"] = json!({"body": "left(repeat(md5(repeat(body, 20000)), 2), 40)"});
    mapping["tables"][0]["backward"] = json!({"body": "body"});
    mapping
}

/// Rows to copy at a rate: for longer than all windows of that many seconds take.
const ROWS: i64 = 60_000;
const WINDOWS: usize = 4;
const WINDOW: f64 = 1.5;

#[test]
fn copy_rate_holds_within_a_tenth() {
    let pair = Pair::new();
    let mapping = create(&pair, ROWS as u32);
    for (name, rate, workers) in [("one", 3000_i64, 1), ("four", 6000, 4)] {
        let options = json!({"copy_rate": rate, "copy_workers": workers, "target": "truncate"});
        let migration = Migration::start_with(&pair, name, &mapping, &options);
        let mut client = pair.first.connect();
        // Both figures are of one moment: the view's, and the server's clock.
        let mut look = || -> (i64, f64) {
            let query = "SELECT rows_copied::bigint, extract(epoch FROM clock_timestamp())::float8 FROM migration_progress WHERE name = $1";
            let row = client.query_one(query, &[&name]).expect("the progress");
            (row.get(0), row.get(1))
        };
        until("the copy has begun", SOON, || look().0 > rate / 5);
        // Not even for a while more than that; all in all as much, but for the time in which the machine stood still: a copy does not make
        // up for what it has lost.
        let mut ratios = Vec::new();
        let watch = Stopwatch::start();
        let (mut rows, mut at) = look();
        let (rows_before, began) = (rows, at);
        for _ in 0..WINDOWS {
            let (mut more, mut later) = (rows, at);
            until("it has gone on for a while", SOON, || {
                (more, later) = look();
                later > at + WINDOW
            });
            assert!(more < ROWS, "the copy was meant to last");
            #[allow(clippy::cast_precision_loss)]
            ratios.push((more - rows) as f64 / ((later - at) * rate as f64));
            (rows, at) = (more, later);
        }
        #[allow(clippy::cast_precision_loss)]
        let all = (rows - rows_before) as f64 / ((at - began - watch.stalled().as_secs_f64()) * rate as f64);
        println!("{workers} workers: {ratios:.3?} of the rate, {all:.3} in all");
        assert!(ratios.iter().all(|r| *r <= 1.1), "{workers} workers: {ratios:.3?} of the rate");
        assert!(all >= 0.9, "{workers} workers: {all:.3} of the rate, in {WINDOWS} windows {ratios:.3?}");
        migration.cancel();
    }
}

/// Asserts that nothing of ours holds a snapshot or a transaction on either server, nor copies.
fn assert_at_rest(pair: &Pair) {
    let busy = "SELECT coalesce(string_agg(concat_ws(' ', backend_type, application_name, state, backend_xmin, query), '; '), '') FROM pg_stat_activity \
                WHERE (backend_type LIKE 'pg_crossover%' OR application_name LIKE 'pg_crossover%') AND backend_type <> 'pg_crossover launcher' \
                  AND (backend_xmin IS NOT NULL OR backend_xid IS NOT NULL OR state LIKE '%in transaction%' OR backend_type = 'pg_crossover copy')";
    // The worker reads its requests now and then.
    until("the first server is at rest", SOON, || pair.first.text(busy).as_deref() == Some(""));
    // A backend there notices that its client has gone when it has the processor again.
    until("the second server is at rest", SOON, || pair.second.text(busy).as_deref() == Some(""));
}

/// Asserts that a pause takes less than a second, from the server's receipt of the call to its answer.
fn pause(pair: &Pair, migration: &Migration) {
    let mut client = pair.first.connect();
    let query =
        "SELECT migration_pause($1)::text, extract(epoch FROM clock_timestamp() - statement_timestamp())::float8";
    let query = client.prepare(query).expect("a statement");
    let watch = Stopwatch::start();
    let row = client.query_one(&query, &[&migration.name()]).expect("a pause");
    let (stalled, took) = (watch.stalled(), Duration::from_secs_f64(row.get(1)));
    println!("paused in {took:?}, of which the machine stood still for {stalled:?}");
    assert!(took.saturating_sub(stalled) < Duration::from_secs(1), "migration_pause took {took:?}");
}

#[test]
fn a_pause_stops_a_copy_and_a_cycle_within_a_second() {
    let pair = Pair::new();
    let witness = Witness::of(&pair.first);
    let mapping = slow(&create(&pair, 30_000));
    let migration =
        Migration::start_with(&pair, "slow", &mapping, &json!({"chunk_rows": 1_000_000, "copy_workers": 2}));
    let copying =
        "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'pg_crossover copy' AND backend_xmin IS NOT NULL";
    until("a chunk is being copied", SOON, || pair.first.text(copying).as_deref() != Some("0"));
    pause(&pair, &migration);
    assert_at_rest(&pair);
    assert_eq!(migration.state(), "copying");
    pair.first.sql("DELETE FROM heap WHERE id > 4000; UPDATE heap SET n = 1");
    migration.call("resume");
    migration.until_state("first");
    // A cycle over many rows.
    pair.first.sql("UPDATE heap SET n = 2");
    let cycling = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'pg_crossover migration' AND backend_xmin IS NOT NULL";
    until("a cycle is at work", SOON, || pair.first.text(cycling).as_deref() != Some("0"));
    pause(&pair, &migration);
    assert_at_rest(&pair);
    migration.call("resume");
    migration.settle();
    assert_equal(&pair);
    // The second server does not answer.
    pair.second.pause();
    pair.first.sql("UPDATE heap SET n = 3");
    until("the worker waits for the second server", SOON, || pair.first.text(cycling).as_deref() != Some("0"));
    pause(&pair, &migration);
    until("no snapshot is held", SOON, || pair.first.text(cycling).as_deref() == Some("0"));
    pair.second.resume();
    migration.call("resume");
    migration.try_wait(LONG).expect("it goes on");
    assert_equal(&pair);
    // The cancel that goes with a pause may come while that is being served already.
    let error_before = migration.status().text("last_error");
    pair.first.fault("request:taken stop");
    std::thread::scope(|scope| {
        scope.spawn(|| migration.call("pause"));
        let worker = migration.worker();
        until("the pause is being served", SOON, || process::is_stopped(worker));
        pair.first.sql(&format!("SELECT pg_cancel_backend({worker})"));
        process::signal(worker, process::CONTINUE);
    });
    assert_eq!(migration.status().text("last_error"), error_before);
    migration.call("resume");
    // A DBA's cancel of the worker does no harm either.
    let worker = migration.worker();
    pair.first.sql(&format!("UPDATE heap SET n = 4; SELECT pg_cancel_backend({worker})"));
    migration.settle();
    assert_eq!(migration.worker(), worker);
    assert_equal(&pair);
    migration.cancel();
    witness.testify();
}

fn assert_equal(pair: &Pair) {
    let first = "SELECT count(*) || ' ' || sum(n) || ' ' || min(n) FROM heap";
    assert_eq!(
        pair.first.text(first),
        pair.second.text("SELECT count(*) || ' ' || sum(n) || ' ' || min(n) FROM pile.heap")
    );
}

//! The change logs: their limit and what happens past it, and their rotation.

use std::time::Duration;

use pgrx_tests::cluster::Stop;
use pgrx_tests::journal::{self, Journal};
use pgrx_tests::wait::{LONG, SOON, until};
use pgrx_tests::{Load, Migration, Pair, Status, Witness};
use serde_json::{Value, json};

/// What a client may wait for on a busy machine while capture is dropped or put back.
const UNHURT: Duration = Duration::from_secs(1);

fn create(pair: &Pair, rows: u32) -> Value {
    journal::create(pair, 100);
    pair.first.sql(&format!(
        "CREATE TABLE heap (id integer PRIMARY KEY, n integer NOT NULL DEFAULT 0, body text);
         INSERT INTO heap SELECT i, 0, 'body ' || i FROM generate_series(1, {rows}) AS i; ANALYZE heap"
    ));
    pair.second_store("pile", "CREATE TABLE heap (id integer PRIMARY KEY, n integer NOT NULL, body text)");
    json!({"tables": [{"first": "public.heap", "second": "pile.heap"}, journal::mapping()]})
}

fn assert_equal(pair: &Pair, first: &str) {
    let rows = |table: &str| {
        format!("SELECT count(*) || ' ' || sum(n) || ' ' || sum(hashtext(concat(id, n, body))) FROM {table}")
    };
    assert_eq!(pair.first.text(&rows(first)), pair.second.text(&rows("pile.heap")));
}

fn limit(pair: &Pair, size: &str) {
    pair.first.configure(&[&format!("crossover.max_log_size = '{size}'")]);
    pair.first.reload();
}

/// The percentage of the limit that the status warns of; None without a warning.
fn warned(status: &Status) -> Option<i64> {
    let hint = status.text("hint");
    hint.split("have reached ").nth(1)?.split(' ').next()?.parse().ok()
}

/// Bytes of the first store's change log.
fn log_size(pair: &Pair) -> Option<i64> {
    let size = "SELECT sum(pg_total_relation_size(c.oid))::bigint FROM pg_class c JOIN pg_inherits ON inhrelid = c.oid \
                WHERE relnamespace = 'crossover'::regnamespace AND relname ^@ 'log_' AND relkind = 'r'";
    pair.first.text(size)?.parse().ok()
}

/// One log row for each row of the heap, again and again.
fn write_until(pair: &Pair, store: &str, what: &str, mut condition: impl FnMut() -> bool) {
    let cluster = if store == "heap" { &pair.first } else { &pair.second };
    until(what, LONG, || {
        cluster.sql(&format!("UPDATE {store} SET n = n + 1"));
        condition()
    });
}

#[test]
fn past_the_limit_capture_is_dropped_and_all_is_copied_again() {
    let pair = Pair::new();
    let witness = Witness::of(&pair.first);
    let mapping = create(&pair, 2000);
    let migration = Migration::start(&pair, "heap", &mapping);
    migration.until_state("first");
    limit(&pair, "4MB");
    for taken_over in [false, true] {
        let heap = if taken_over { "heap__first" } else { "heap" };
        let journal = Journal::start(&pair, 2, if taken_over { "under the view" } else { "on the table" });
        // On this side of the limit nothing happens: it is a warning at most.
        pair.second.stop(Stop::Fast);
        let mut seen = Vec::new();
        write_until(&pair, "heap", "the limit is passed", || {
            // It looks once a second; however busy the machine is, not everything comes between two looks.
            let size = log_size(&pair);
            until("the worker has looked", SOON, || {
                let status = migration.status();
                status.state() == "copying" || status.0["log_bytes"].as_i64() >= size
            });
            let status = migration.status();
            if let Some(percent) = warned(&status).filter(|p| *p < 100) {
                assert!(percent >= 50, "a warning at {percent} %");
                assert_eq!(status.state(), "first");
                seen.push(percent);
            }
            migration.state() == "copying"
        });
        assert!(!seen.is_empty(), "no warning before the limit was passed");
        let status = migration.status();
        assert_eq!(status.phase(), "capture dropped");
        assert!(status.text("hint").starts_with("No change is captured"), "{status:?}");
        let reason = migration.history().last().expect("a history")["reason"].clone();
        assert_eq!(reason, "the change log passed crossover.max_log_size");
        // The log stays empty from now on, and changes need not be found by it.
        journal.take().assert_unhurt("while capture was dropped", UNHURT);
        pair.first.sql("DELETE FROM heap WHERE id % 3 = 0; UPDATE heap SET id = id + 100000 WHERE id % 3 = 1");
        let log =
            "SELECT sum(pg_relation_size(c.oid))::text FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace
                   WHERE nspname = 'crossover' AND relname ~ '^log_.*_[0-9]$'";
        assert_eq!(pair.first.text(log).as_deref(), Some("0"));
        // Calls have an answer.
        let refused = migration.try_set_state("both", SOON).expect_err("a move from copying");
        assert!(format!("{refused:?}").contains("copying"), "{refused:?}");
        pair.first.sql("INSERT INTO heap SELECT i, 7, 'new' FROM generate_series(200001, 200700) AS i");
        pair.second.start();
        migration.until_state("first");
        journal.take().assert_unhurt("while capture was put back", UNHURT);
        let acked = journal.stop();
        migration.settle();
        assert_equal(&pair, heap);
        journal::check(&pair, if taken_over { "journal__first" } else { "journal" }, &acked);
        println!("warned at {:?} to {:?} %, then copied again", seen.first(), seen.last());
        migration.walk(&["both", "second", "both", "first"]);
        pair.first.sql(
            "UPDATE heap SET id = id - 100000 WHERE id BETWEEN 100000 AND 199999; DELETE FROM heap WHERE id > 200000",
        );
        migration.settle();
    }
    migration.cancel();
    witness.testify();
}

#[test]
fn a_copy_that_its_log_outgrows_begins_anew_with_every_worker_gone() {
    let pair = Pair::new();
    let mut mapping = create(&pair, 20_000);
    mapping["tables"][0]["forward"] = json!({"body": "left(repeat(md5(repeat(body, 2000)), 2), 40)"});
    mapping["tables"][0]["backward"] = json!({"body": "body"});
    let migration = Migration::start_with(
        &pair,
        "heap",
        &mapping,
        &json!({"chunk_rows": 500, "copy_workers": 3, "copy_rate": 4000}),
    );
    let journal = Journal::start(&pair, 2, "meanwhile");
    until("the copy is under way", SOON, || {
        pair.first.text("SELECT sum(rows_copied) > 2000 FROM migration_progress").as_deref() == Some("t")
    });
    limit(&pair, "1MB");
    write_until(&pair, "heap", "capture is dropped", || migration.history().len() > 1);
    limit(&pair, "1GB");
    pair.first.sql("DELETE FROM heap WHERE id % 2 = 0");
    migration.until_state("first");
    let acked = journal.stop();
    migration.settle();
    let derived = "SELECT count(*) || ' ' || sum(n) || ' ' || sum(hashtext(concat(id, n, left(repeat(md5(repeat(body, 2000)), 2), 40)))) FROM heap";
    let rows = "SELECT count(*) || ' ' || sum(n) || ' ' || sum(hashtext(concat(id, n, body))) FROM pile.heap";
    assert_eq!(pair.first.text(derived), pair.second.text(rows));
    journal::check(&pair, "journal", &acked);
    // An operator may ask for it.
    pair.second.sql("SET session_replication_role = replica; ALTER TABLE pile.heap DISABLE TRIGGER ALL; DELETE FROM pile.heap WHERE id < 900");
    assert_eq!(migration.try_set_state("copying", SOON).expect("a copy from the beginning"), "copying");
    migration.until_state("first");
    migration.settle();
    assert_eq!(pair.first.text(derived), pair.second.text(rows));
    migration.cancel();
}

#[test]
fn other_states_keep_the_log_and_warn() {
    let pair = Pair::new();
    let mapping = create(&pair, 2000);
    let migration = Migration::start(&pair, "heap", &mapping);
    migration.until_state("first");
    limit(&pair, "2MB");
    migration.set_state("both");
    for (state, store) in [("both", "heap"), ("second", "pile.heap")] {
        if migration.state() != state {
            migration.set_state(state);
        }
        migration.call("pause");
        write_until(&pair, store, "the log is past its limit", || {
            warned(&migration.status()).is_some_and(|p| p > 100)
                || {
                    // Nothing can be read of the second server's log while the migration is paused.
                    state == "second" && pair.second.text("SELECT sum(pg_table_size(c.oid)) > 3000000 FROM pg_class c WHERE relname ~ '^log_.*_[0-9]$'").as_deref() == Some("t")
                }
        });
        assert_eq!(migration.state(), state);
        if state == "both" {
            assert!(migration.status().text("hint").contains("kept in this state"), "{:?}", migration.status());
        }
        migration.call("resume");
        migration.settle();
        assert_eq!(migration.state(), state);
        assert_equal(&pair, "heap__first");
    }
    migration.walk(&["both", "first"]);
    migration.cancel();
}

#[test]
fn logs_rotate_while_snapshots_and_writers_stay_open() {
    let pair = Pair::with(&["crossover.log_rotation = 1s", "crossover.log_retention = 1s"], &[]);
    let mapping = create(&pair, 5000);
    let migration = Migration::start(&pair, "heap", &mapping);
    migration.until_state("first");
    let (mut reader, mut writer, mut far) = (pair.first.connect(), pair.first.connect(), pair.second.connect());
    for snapshot in [&mut reader, &mut far] {
        snapshot
            .batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM pg_class")
            .expect("a snapshot");
    }
    writer.batch_execute("BEGIN; UPDATE journal SET token = token WHERE id = 1").expect("a writer");
    let busy = Load::start(&pair.first.config("app"), 1, |_, round, connection| {
        connection.execute("UPDATE heap SET n = n + 1 WHERE id % 10 = $1 % 10", &[&((round % 10) as i32)]).map(drop)
    });
    let leaves = "SELECT c.relname || ' ' || pg_relation_size(c.oid) FROM pg_class c WHERE relname ~ '^log_.*_[0-9]$' ORDER BY 1";
    let sizes = || -> Vec<i64> {
        let size = |leaf: String| leaf.split(' ').nth(1).and_then(|s| s.parse().ok()).expect("a size");
        pair.first.list(leaves).into_iter().map(size).collect()
    };
    // Each table of the ring but the one that the open writer has written to is emptied, and filled again.
    let mut largest = vec![0; sizes().len()];
    let mut emptied = vec![0; largest.len()];
    until("all but one table of the ring have been emptied", LONG, || {
        for (i, size) in sizes().into_iter().enumerate() {
            if size == 0 && largest[i] > 100_000 {
                emptied[i] += 1;
                largest[i] = 0;
            }
            largest[i] = largest[i].max(size);
        }
        emptied.iter().filter(|n| **n > 0).count() >= emptied.len() - 1
    });
    println!("emptied: {emptied:?}");
    let tally = busy.stop();
    tally.assert_clean("while logs rotated");
    writer.batch_execute("COMMIT").expect("the writer to commit");
    migration.settle();
    assert_equal(&pair, "heap");
    for snapshot in [&mut reader, &mut far] {
        snapshot.batch_execute("COMMIT").expect("the snapshot to end");
    }
    migration.cancel();
}

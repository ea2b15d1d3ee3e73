//! A server that comes back: restarted, crashed, switched over to a standby, promoted without its last commits, restored from a backup.
//! What can be proved to be whole goes on by itself; the rest is `diverged`, with a way out.

use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Duration;

use pgrx_tests::cluster::{Stop, explain};
use pgrx_tests::tokens;
use pgrx_tests::wait::{SOON, for_a, until};
use pgrx_tests::{Cluster, Load, Migration, Pair, Replica, Status, process};
use serde_json::json;

fn started(pair: &Pair) -> Migration<'_> {
    tokens::create(pair);
    pair.first.sql("INSERT INTO trail SELECT n, 'old;' FROM generate_series(1, 1000) AS n");
    let migration = Migration::start(pair, "rail", &json!({"tables": [tokens::mapping()]}));
    migration.until_state("first");
    migration.settle();
    migration
}

/// Rows of the first store. `table` is its name there: the managed view reaches another store in `second`.
fn first_rows(pair: &Pair, table: &str) -> Vec<String> {
    pair.first.list(&format!("SELECT id || ' ' || trail FROM {table} ORDER BY id"))
}

fn second_rows(pair: &Pair) -> Vec<String> {
    pair.second.list("SELECT ident || ' ' || substr(path, 2, length(path) - 2) FROM rail.path ORDER BY ident")
}

#[track_caller]
fn assert_equal_stores(pair: &Pair, migration: &Migration, table: &str) {
    migration.settle();
    let (a, b) = (first_rows(pair, table), second_rows(pair));
    let only = |a: &[String], b: &[String]| a.iter().filter(|r| !b.contains(r)).take(5).cloned().collect::<Vec<_>>();
    assert!(a == b, "only in first: {:?}, only in second: {:?}", only(&a, &b), only(&b, &a));
}

fn has(rows: &[String], id: i32) -> bool {
    rows.iter().any(|r| r.starts_with(&format!("{id} ")))
}

fn write_first(pair: &Pair, id: i32) {
    pair.first.sql(&format!("INSERT INTO trail VALUES ({id}, 'first {id};')"));
}

fn write_second(pair: &Pair, id: i32) {
    pair.second.sql(&format!("INSERT INTO rail.path VALUES ({id}, '<second {id};>')"));
}

fn until_in_first(pair: &Pair, table: &str, id: i32) {
    until(&format!("row {id} is in the first store"), SOON, || has(&first_rows(pair, table), id));
}

fn until_in_second(pair: &Pair, id: i32) {
    until(&format!("row {id} is in the second store"), SOON, || has(&second_rows(pair), id));
}

/// Puts `replica` in the place of a server.
fn fail_over(server: &Cluster, replica: &mut Replica, how: Stop) {
    server.stop(how);
    replica.take_over(server);
}

fn divergences(migration: &Migration) -> usize {
    let of = |h: &serde_json::Value| h["reason"].as_str().is_some_and(|r| r.starts_with("diverged"));
    migration.history().iter().filter(|h| of(h)).count()
}

/// Waits for the phase, and sees that it lasts over a restart of the worker and that nothing is newly exposed.
fn assert_diverged(pair: &Pair, migration: &Migration, refused: &str, says: &str) -> Status {
    migration.until_status("is diverged", |s| s.phase() == "diverged");
    let worker = migration.worker();
    pair.first.sql(&format!("SELECT pg_terminate_backend({worker})"));
    until("another worker serves it", SOON, || {
        migration.try_status().and_then(|s| s.worker()).is_some_and(|w| w != worker)
    });
    let state = migration.state();
    let error = migration.try_set_state(refused, SOON).expect_err("a switch of a diverged migration");
    let text = explain(&error);
    assert!(text.starts_with("55000 the stores of migration \"rail\" have diverged"), "{text}");
    assert!(text.contains(says) && text.contains(&format!("'{state}', force => true")), "{text}");
    let error = explain(&migration.try_wait(SOON).expect_err("a wait of a diverged migration"));
    assert!(error.starts_with("55000"), "{error}");
    let status = migration.status();
    assert_eq!((status.state(), status.phase()), (state, "diverged".to_owned()), "{}", status.0);
    assert!(status.text("hint").contains(says), "{}", status.0);
    status
}

/// The way out: compares all rows.
fn assert_reconciled(migration: &Migration) {
    let state = migration.state();
    migration.force_state(&state);
    migration.until_status("replicates again", |s| s.phase() == "replicating");
    let history = migration.history();
    assert!(history.iter().any(|h| h["forced"] == true && h["to_state"] == state.as_str()), "{history:#?}");
}

#[test]
fn clean_switchovers_and_restarts_go_on_without_a_word() {
    let pair = Pair::new();
    let migration = started(&pair);
    let mut new_second = Replica::standby(&pair.second);
    write_first(&pair, 2001);
    until_in_second(&pair, 2001);
    fail_over(&pair.second, &mut new_second, Stop::Fast);
    write_first(&pair, 2002);
    assert_equal_stores(&pair, &migration, "trail");

    migration.set_state("both");
    let mut new_first = Replica::standby(&pair.first);
    write_second(&pair, 2003);
    until_in_first(&pair, "trail__first", 2003);
    fail_over(&pair.first, &mut new_first, Stop::Fast);
    write_first(&pair, 2004);
    write_second(&pair, 2005);
    assert_equal_stores(&pair, &migration, "trail__first");

    migration.set_state("second");
    let mut newer_second = Replica::standby(new_second.cluster());
    write_first(&pair, 2006);
    fail_over(new_second.cluster(), &mut newer_second, Stop::Fast);
    write_first(&pair, 2007);
    new_first.cluster().restart(Stop::Fast);
    write_first(&pair, 2008);
    newer_second.cluster().restart(Stop::Fast);
    assert_equal_stores(&pair, &migration, "trail__first");
    assert_eq!(divergences(&migration), 0, "{:#?}", migration.history());
    assert!(migration.conflicts().is_empty(), "{:#?}", migration.conflicts());
    migration.finish();
}

#[test]
fn a_standby_of_the_second_server_promoted_without_its_last_commits() {
    let pair = Pair::new();
    pair.expect_crashes();
    let migration = started(&pair);
    // In `first` the log of the first store has what is missing.
    let mut new = Replica::standby(&pair.second);
    new.cut_off();
    write_first(&pair, 2001);
    until_in_second(&pair, 2001);
    fail_over(&pair.second, &mut new, Stop::Immediate);
    assert_equal_stores(&pair, &migration, "trail");
    assert!(has(&second_rows(&pair), 2001));
    assert_eq!(divergences(&migration), 0, "{:#?}", migration.history());

    // In `both` nobody but the first store has what was written on the second.
    migration.set_state("both");
    let mut newer = Replica::standby(new.cluster());
    newer.cut_off();
    write_second(&pair, 2002);
    until_in_first(&pair, "trail__first", 2002);
    fail_over(new.cluster(), &mut newer, Stop::Immediate);
    assert_diverged(&pair, &migration, "second", "The second store stands at counter");
    write_second(&pair, 2003);
    write_first(&pair, 2004);
    pair.second.sql("UPDATE rail.path SET path = '<later;>' WHERE ident = 1");
    assert_reconciled(&migration);
    assert_equal_stores(&pair, &migration, "trail__first");
    let rows = second_rows(&pair);
    assert!([2002, 2003, 2004].iter().all(|id| has(&rows, *id)) && rows.contains(&"1 later;".to_owned()), "{rows:?}");

    // In `second`, too.
    migration.set_state("second");
    let mut newest = Replica::standby(newer.cluster());
    newest.cut_off();
    write_first(&pair, 2005);
    until_in_first(&pair, "trail__first", 2005);
    fail_over(newer.cluster(), &mut newest, Stop::Immediate);
    assert_diverged(&pair, &migration, "both", "The second store stands at counter");
    write_first(&pair, 2006);
    assert_reconciled(&migration);
    assert_equal_stores(&pair, &migration, "trail__first");
    let rows = second_rows(&pair);
    assert!(has(&rows, 2005) && has(&rows, 2006), "{rows:?}");
    migration.finish();
}

#[test]
fn a_standby_of_the_first_server_promoted_without_its_last_commits() {
    let pair = Pair::new();
    pair.expect_crashes();
    let migration = started(&pair);
    let mut new = Replica::standby(&pair.first);
    new.cut_off();
    write_first(&pair, 2001);
    pair.first.sql("UPDATE trail SET trail = 'lost;' WHERE id = 1");
    until("the update has arrived", SOON, || second_rows(&pair).contains(&"1 lost;".to_owned()));
    fail_over(&pair.first, &mut new, Stop::Immediate);
    assert_diverged(&pair, &migration, "both", "The first store stands at counter");
    // Transaction ids are used again; none of these may be taken for one that has been replicated.
    (2002..2022).for_each(|id| write_first(&pair, id));
    pair.first.sql("UPDATE trail SET trail = 'later;' WHERE id = 2");
    assert_reconciled(&migration);
    assert_equal_stores(&pair, &migration, "trail");
    let rows = first_rows(&pair, "trail");
    assert!(has(&rows, 2001) && (2002..2022).all(|id| has(&rows, id)), "{rows:?}");
    assert!(rows.contains(&"1 lost;".to_owned()) && rows.contains(&"2 later;".to_owned()), "{rows:?}");

    // The same, and the other way out: the first store is right, and is copied again.
    let mut newer = Replica::standby(new.cluster());
    newer.cut_off();
    write_first(&pair, 3001);
    until_in_second(&pair, 3001);
    fail_over(new.cluster(), &mut newer, Stop::Immediate);
    assert_diverged(&pair, &migration, "both", "The first store stands at counter");
    (3002..3022).for_each(|id| write_first(&pair, id));
    migration.try_set_state("copying", SOON).unwrap_or_else(|e| panic!("{}", explain(&e)));
    migration.until_status("is in first again", |s| s.state() == "first" && s.phase() == "replicating");
    assert_equal_stores(&pair, &migration, "trail");
    assert!(!has(&second_rows(&pair), 3001) && has(&second_rows(&pair), 3021));
    migration.walk(&["both", "first"]);
    migration.cancel();
}

#[test]
fn the_second_server_restored_from_an_older_backup() {
    let pair = Pair::with(&["crossover.log_retention = '60s'", "crossover.log_rotation = '1s'"], &[]);
    pair.expect_crashes();
    let migration = started(&pair);
    let tag = pair.first.text("SELECT tag FROM crossover.migration").expect("a tag");
    let cut = format!("SELECT cut FROM crossover.counter_{tag}");

    // The log still has all that came after the backup.
    migration.call("pause");
    let mut restored = Replica::backup(&pair.second);
    write_first(&pair, 2001);
    migration.call("resume");
    until_in_second(&pair, 2001);
    fail_over(&pair.second, &mut restored, Stop::Immediate);
    assert_equal_stores(&pair, &migration, "trail");
    assert_eq!(divergences(&migration), 0, "{:#?}", migration.history());

    // It has been emptied since.
    pair.first.configure(&["crossover.log_retention = '2s'"]);
    pair.first.reload();
    let mut older = Replica::backup(restored.cluster());
    let before = pair.first.text(&cut);
    write_first(&pair, 2002);
    until_in_second(&pair, 2002);
    until("the log is cut", SOON, || pair.first.text(&cut) != before);
    fail_over(restored.cluster(), &mut older, Stop::Immediate);
    assert_diverged(&pair, &migration, "both", "up to a point before those that the change log still has");
    write_first(&pair, 2003);
    migration.try_set_state("copying", SOON).unwrap_or_else(|e| panic!("{}", explain(&e)));
    migration.until_status("is in first again", |s| s.state() == "first" && s.phase() == "replicating");
    assert_equal_stores(&pair, &migration, "trail");
    assert!(has(&second_rows(&pair), 2002));

    // Another server altogether, or one from before the start.
    pair.second.sql("DROP SCHEMA crossover_peer CASCADE; DELETE FROM rail.path WHERE ident = 5");
    let worker = migration.worker();
    pair.first.sql(&format!("SELECT pg_terminate_backend({worker})"));
    assert_diverged(&pair, &migration, "both", "holds nothing of this migration");
    assert_reconciled(&migration);
    assert_equal_stores(&pair, &migration, "trail");
    assert!(has(&second_rows(&pair), 5));
    let error = pair.second.connect().batch_execute("DELETE FROM rail.path").expect_err("the fence is up");
    assert_eq!(error.code().map(|c| c.code()), Some("25006"));
    migration.cancel();
}

/// Clients on either server whose commits do not wait for the disk, each with rows of its own.
fn unsafe_clients(pair: &Pair, first: bool, second: bool) -> Vec<Load> {
    static NEXT: AtomicI32 = AtomicI32::new(10_000);
    let insert = |config: postgres::Config, table: &'static str, value: &'static str| {
        Load::start(&config, 2, move |_, _, client| {
            let id = NEXT.fetch_add(1, Ordering::Relaxed);
            let sql = format!("SET synchronous_commit = off; INSERT INTO {table} VALUES ({id}, {value})");
            // A crash is what this is about.
            let _ = client.batch_execute(&sql);
            Ok(())
        })
    };
    let mut clients = Vec::new();
    if first {
        clients.push(insert(pair.first.config("app"), "trail", "'first;'"));
    }
    if second {
        clients.push(insert(pair.second.config("app"), "rail.path", "'<second;>'"));
    }
    clients
}

#[test]
fn crashes_under_clients_whose_commits_do_not_wait() {
    let settings = ["wal_writer_delay = '10s'", "wal_writer_flush_after = '1GB'", "autovacuum = off"];
    let pair = Pair::with(&settings, &settings);
    pair.expect_crashes();
    let migration = started(&pair);
    for state in ["first", "both", "second"] {
        if state != "first" {
            migration.set_state(state);
        }
        let table = if state == "first" { "trail" } else { "trail__first" };
        for crashing in [&pair.first, &pair.second, &pair.first] {
            let clients = unsafe_clients(&pair, state != "second", state != "first");
            for_a(Duration::from_millis(700));
            crashing.restart(Stop::Immediate);
            for load in &clients {
                load.until_done(20);
            }
            drop(clients);
            assert_equal_stores(&pair, &migration, table);
        }
    }
    assert_eq!(divergences(&migration), 0, "{:#?}", migration.history());
    migration.finish();
}

/// The right server is put back: nothing has to be decided.
#[test]
fn the_wrong_server_for_a_while() {
    let pair = Pair::new();
    pair.expect_crashes();
    let migration = started(&pair);
    migration.set_state("both");
    let mut wrong = Replica::backup(&pair.second);
    write_second(&pair, 2001);
    until_in_first(&pair, "trail__first", 2001);
    fail_over(&pair.second, &mut wrong, Stop::Fast);
    assert_diverged(&pair, &migration, "second", "The second store stands at counter");
    wrong.cluster().stop(Stop::Fast);
    pair.second.start();
    migration.until_status("replicates again", |s| s.phase() == "replicating");
    write_second(&pair, 2002);
    assert_equal_stores(&pair, &migration, "trail__first");
    let worker = migration.worker();
    assert!(process::is_alive(worker));
    migration.walk(&["second"]);
    migration.finish();
}

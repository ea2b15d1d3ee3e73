//! Servers on which migrations cannot run, or not yet: no worker slot, the library not preloaded or of another version, a standby, read-only
//! defaults. Every call says what is wrong and what to do, the status shows it, and all goes on by itself once it is mended.

use std::thread::{self, JoinHandle};
use std::time::Duration;

use pgrx_tests::cluster::{Stop, explain};
use pgrx_tests::wait::{SOON, for_a, until, until_some};
use pgrx_tests::{Cluster, Migration, Pair, market, process};
use serde_json::json;

/// Every function that works on a migration, and `migration_start`.
fn calls() -> Vec<String> {
    let mapping = market::mapping();
    vec![
        format!("migration_start('other', '{mapping}')"),
        "migration_wait('market')".into(),
        "migration_set_state('market', 'both')".into(),
        "migration_pause('market')".into(),
        "migration_resume('market')".into(),
        "migration_finish('market')".into(),
        "migration_cancel('market')".into(),
    ]
}

/// Asserts that each call fails with this SQLSTATE, and that the message and hint of each contain these words.
fn all_refuse(cluster: &Cluster, code: &str, words: &[&str]) {
    let mut client = cluster.connect();
    for call in calls() {
        refuses(&mut client, &call, code, words);
    }
}

fn refuses(client: &mut postgres::Client, call: &str, code: &str, words: &[&str]) {
    let error = client.batch_execute(&format!("SELECT {call}")).expect_err("it cannot be done here");
    let text = explain(&error);
    assert_eq!(error.code().map(|c| c.code()), Some(code), "{call}: {text}");
    assert!(error.as_db_error().is_some_and(|e| e.hint().is_some()), "no hint: {text}");
    words.iter().for_each(|word| assert!(text.contains(word), "{call}: {word} is not in: {text}"));
}

fn hint_contains<'a>(words: &'a [&str]) -> impl Fn(&pgrx_tests::Status) -> bool + 'a {
    |status| words.iter().all(|word| status.text("hint").contains(word))
}

fn replicates(pair: &Pair, migration: &Migration, cents: i64) {
    pair.first.sql(&format!("UPDATE customer SET cents = {cents} WHERE id = 3"));
    migration.settle();
    assert_eq!(market::cents_in_second(pair, 3), cents);
}

/// A parallel query that takes one of the server's worker slots.
struct Thief {
    leader: i32,
    query: JoinHandle<()>,
}

impl Thief {
    fn start(pair: &Pair) -> Self {
        let mut client = pair.first.connect();
        let leader: i32 = client.query_one("SELECT pg_backend_pid()", &[]).expect("a pid").get(0);
        let query = thread::spawn(move || {
            let force = "DO $$ BEGIN PERFORM set_config(name, 'on', false) FROM pg_settings
                         WHERE name IN ('force_parallel_mode', 'debug_parallel_query'); END $$";
            client.batch_execute(force).expect("a setting");
            client.batch_execute("SELECT pg_sleep(100)").expect_err("it is cancelled");
        });
        let taken = format!(
            "SELECT count(*) FROM pg_stat_activity WHERE leader_pid = {leader} AND backend_type = 'parallel worker'"
        );
        until("a slot is taken", SOON, || pair.first.text(&taken).as_deref() == Some("1"));
        Self { leader, query }
    }

    fn give_back(self, pair: &Pair) {
        pair.first.sql(&format!("SELECT pg_cancel_backend({})", self.leader));
        self.query.join().expect("the query");
    }
}

#[test]
fn without_a_free_worker_slot() {
    // PostgreSQL's logical replication launcher and ours have one each.
    let pair = Pair::with(&["max_worker_processes = 4"], &[]);
    market::create(&pair, 3000);
    let words = ["max_worker_processes", "all 4"];
    let start = format!(
        "migration_start('market', '{}', '{}')",
        market::mapping(),
        json!({"copy_rate": 200, "chunk_rows": 100})
    );
    // Scouts that the launcher sends out at the start need slots, too. When it has none left to send, it sleeps.
    let launcher = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'pg_crossover launcher'";
    let launcher: i32 = until_some("the launcher runs", SOON, || pair.first.text(launcher)?.parse().ok());
    until("the launcher has nothing left to do", SOON, || {
        let naps = process::naps(launcher);
        for_a(Duration::from_millis(1500));
        naps.is_some() && process::naps(launcher) == naps
    });
    let (one, two) = (Thief::start(&pair), Thief::start(&pair));
    refuses(&mut pair.first.connect(), &start, "53000", &words);
    // A slot for whoever files the request, and none for the migration.
    one.give_back(&pair);
    refuses(&mut pair.first.connect(), &start, "53000", &words);
    assert_eq!(pair.first.text("SELECT count(*) FROM migration_status").as_deref(), Some("0"));
    two.give_back(&pair);
    pair.first.sql(&format!("SELECT {start}"));
    let migration = Migration::named(&pair, "market");

    // The copy loses its slot to somebody else, and goes on when it is free again.
    let copier = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'pg_crossover copy'";
    let pid: i32 = until_some("a copy worker runs", SOON, || pair.first.text(copier)?.parse().ok());
    // The worker starts no other before the slot is taken, which is free when the postmaster has noted the end.
    let worker = migration.worker();
    process::signal(worker, process::STOP);
    pair.first.sql(&format!("SELECT pg_terminate_backend({pid})"));
    let end = format!("(PID {pid}) exited with exit code 1");
    until("it has gone", SOON, || pair.first.log_lines().iter().any(|line| line.text.ends_with(&end)));
    let thief = Thief::start(&pair);
    process::signal(worker, process::CONTINUE);
    let status = migration.until_status("says that it has no slot", hint_contains(&["max_worker_processes"]));
    assert!(status.text("last_error").contains("no background worker"), "{}", status.0);
    assert!(status.text("waiting_for").contains("max_worker_processes"), "{}", status.0);
    thief.give_back(&pair);
    pair.first.sql("UPDATE crossover.migration SET options = '{}'");
    migration.until_state("first");
    let status = migration.until_status("is content again", |status| status.text("hint").is_empty());
    assert_eq!(status.text("waiting_for"), "");

    migration.cancel();
}

#[test]
fn with_more_migrations_than_slots() {
    let pair = Pair::new();
    market::create(&pair, 10);
    let databases = ["one", "two"];
    databases.iter().for_each(|database| pair.copy_database(database));
    let migrations = databases.map(|database| Migration::named_in(&pair, database, database));
    for migration in &migrations {
        migration.try_start(&market::mapping(), &json!({})).unwrap_or_else(|e| panic!("{}", explain(&e)));
        migration.until_state("first");
    }
    // PostgreSQL's logical replication launcher has one, our launcher another, the migrations what is left.
    pair.first.configure(&["max_worker_processes = 3"]);
    pair.first.restart(Stop::Fast);
    let waits = hint_contains(&["max_worker_processes", "all 3"]);
    let waiting = until_some("one of them waits for a slot", SOON, || {
        let runs: Vec<bool> = migrations.iter().map(|m| m.status().worker().is_some()).collect();
        let waiting = runs.iter().position(|runs| !runs).filter(|_| runs.contains(&true))?;
        waits(&migrations[waiting].status()).then_some(waiting)
    });
    // Its clients go on, and what they do is kept.
    let mut client = pair.first.connect_to(databases[waiting]);
    client.batch_execute("UPDATE customer SET cents = 5 WHERE id = 3").expect("an update");
    refuses(&mut client, &format!("migration_wait('{}')", databases[waiting]), "53000", &["max_worker_processes"]);
    drop(client);
    let drop = format!("DROP DATABASE {} WITH (FORCE)", databases[1 - waiting]);
    pair.first.connect_to("postgres").batch_execute(&drop).expect("a slot");
    migrations[waiting]
        .until_status("has its worker", |status| status.worker().is_some() && status.text("hint").is_empty());
    let arrived = "SELECT balance::text FROM market.client WHERE client_no = 3";
    let mut second = pair.second.connect_to(databases[waiting]);
    until("the change arrives", SOON, || second.query_one(arrived, &[]).is_ok_and(|r| r.get::<_, &str>(0) == "0.05"));
}

#[test]
fn without_the_library() {
    let pair = Pair::new();
    market::create(&pair, 10);
    let migration = market::started(&pair);
    pair.first.configure(&["shared_preload_libraries = ''"]);
    pair.first.restart(Stop::Fast);
    let words = ["shared_preload_libraries"];
    all_refuse(&pair.first, "55000", &words);
    migration.until_status("says that the library is missing", hint_contains(&words));
    // Nobody replicates; the change is captured all the same.
    pair.first.sql("UPDATE customer SET cents = 70 WHERE id = 3");
    assert_eq!(migration.state(), "first");
    pair.first.configure(&["shared_preload_libraries = 'pg_crossover'"]);
    pair.first.restart(Stop::Fast);
    migration.settle();
    assert_eq!(market::cents_in_second(&pair, 3), 70);
    migration.walk(&["both", "first"]);
    migration.cancel();
}

#[test]
fn with_another_version() {
    let pair = Pair::new();
    market::create(&pair, 10);
    let migration = market::started(&pair);
    let ours =
        pair.first.text("SELECT extversion FROM pg_extension WHERE extname = 'pg_crossover'").expect("a version");
    let become_version = |version: &str| {
        pair.first.sql(&format!("UPDATE pg_extension SET extversion = '{version}' WHERE extname = 'pg_crossover'"));
    };
    for (version, remedy) in [("0.0.1", "ALTER EXTENSION pg_crossover UPDATE"), ("99.0", "restart the server")] {
        let worker = migration.worker();
        become_version(version);
        all_refuse(&pair.first, "55000", &[version, &ours, remedy]);
        let status = migration.until_status("names the remedy", hint_contains(&[remedy]));
        assert!(status.text("last_error").contains(version), "{}", status.0);
        assert_eq!(status.worker(), Some(worker), "the worker did not wait");
        pair.first.sql("UPDATE customer SET cents = 1 WHERE id = 3");
        become_version(&ours);
        replicates(&pair, &migration, 71);
        assert_eq!(migration.worker(), worker);
        // As it is after the new library was installed: the server comes up with objects of another version.
        become_version(version);
        pair.first.restart(Stop::Fast);
        migration
            .until_status("names the remedy", |status| hint_contains(&[remedy])(status) && status.worker().is_some());
        all_refuse(&pair.first, "55000", &[version, &ours, remedy]);
        become_version(&ours);
        replicates(&pair, &migration, 72);
        migration.until_status("is content again", |status| status.text("hint").is_empty());
    }
    migration.cancel();
}

#[test]
fn a_dropped_extension_leaves_no_worker() {
    let pair = Pair::new();
    market::create(&pair, 10);
    let migration = market::started(&pair);
    let worker = migration.worker();
    let error = pair.first.connect().batch_execute("DROP EXTENSION pg_crossover").expect_err("in use");
    assert_eq!(error.code().map(|c| c.code()), Some("2BP01"), "{}", explain(&error));
    pair.first.sql("DROP EXTENSION pg_crossover CASCADE; UPDATE customer SET cents = 1");
    until("the worker has gone", SOON, || !process::is_alive(worker));
    let log = || std::fs::read_to_string(pair.first.log_path()).unwrap_or_default();
    until("its successor ends for good", SOON, || log().contains("LOG:  extension pg_crossover is not installed"));
    let workers = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'pg_crossover migration'";
    until("no worker runs", SOON, || pair.first.text(workers).as_deref() == Some("0"));
}

#[test]
fn on_a_standby_and_after_its_promotion() {
    let pair = Pair::new();
    market::create(&pair, 10);
    let migration = market::started(&pair);
    migration.walk(&["both"]);
    let standby = pair.first.standby("standby");
    all_refuse(&standby, "25006", &["standby", "primary"]);
    let seen = "SELECT concat_ws(' ', name, state, phase, hint, worker_pid) FROM migration_status";
    let status = standby.text(seen).expect("a status");
    assert!(status.starts_with("market both replicating") && status.contains("standby"), "{status}");
    for view in ["migration_progress", "migration_conflicts", "migration_history"] {
        standby.text(&format!("SELECT count(*) FROM {view}"));
    }
    let workers = "SELECT count(*) FROM pg_stat_activity WHERE backend_type LIKE 'pg_crossover%'";
    assert_eq!(standby.text(workers).as_deref(), Some("0"));
    assert_eq!(standby.text("SELECT count(*) FROM customer").as_deref(), Some("10"));

    pair.first.sql("UPDATE customer SET cents = 50 WHERE id = 5");
    pair.first.stop(Stop::Fast);
    standby.promote();
    let worker = "SELECT worker_pid FROM migration_status WHERE hint IS NULL";
    until("a worker runs there", SOON, || standby.text(worker).is_some());
    standby.sql("UPDATE customer SET cents = 60 WHERE id = 6; UPDATE client SET balance = 0.70 WHERE client_no = 7");
    standby.sql("SELECT migration_wait('market', '1 min')");
    assert_eq!((market::cents_in_second(&pair, 5), market::cents_in_second(&pair, 6)), (50, 60));
    assert_eq!(standby.text("SELECT cents FROM customer WHERE id = 7").as_deref(), Some("70"));
    standby.sql("SELECT migration_set_state('market', 'first')");
    standby.sql("SELECT migration_cancel('market')");
}

#[test]
fn with_read_only_defaults() {
    let pair = Pair::new();
    market::create(&pair, 10);
    let read_only = |on: bool| {
        let value = if on { "on" } else { "off" };
        for cluster in [&pair.first, &pair.second] {
            cluster.sql(&format!(
                "SET TRANSACTION READ WRITE; ALTER ROLE postgres SET default_transaction_read_only = {value};
                 ALTER DATABASE app SET default_transaction_read_only = {value}"
            ));
            cluster.configure(&[&format!("default_transaction_read_only = {value}")]);
            cluster.reload();
            let shown = || cluster.text("SHOW default_transaction_read_only").as_deref() == Some(value);
            until("it is in force", SOON, shown);
        }
    };
    read_only(true);
    let mut client = pair.first.connect();
    let start = calls().remove(0);
    refuses(&mut client, &start, "25006", &["migration_start()", "READ WRITE"]);
    // Whoever may write can migrate: the workers say for themselves that they do, on either server.
    client.batch_execute("SET default_transaction_read_only = off").expect("a setting");
    let market = format!("SELECT migration_start('market', '{}')", market::mapping());
    client.batch_execute(&market).unwrap_or_else(|e| panic!("{}", explain(&e)));
    let migration = Migration::named(&pair, "market");
    migration.until_state("first");
    let mut reader = pair.first.connect();
    for call in calls().iter().filter(|call| !call.starts_with("migration_wait")) {
        refuses(&mut reader, call, "25006", &["read-only transaction", "READ WRITE"]);
    }
    for (n, state) in ["first", "both", "second", "both", "first"].into_iter().enumerate() {
        let switch = format!("SELECT migration_set_state('market', '{state}')");
        client.batch_execute(&switch).unwrap_or_else(|e| panic!("to {state}: {}", explain(&e)));
        if state != "second" {
            client.batch_execute(&format!("UPDATE customer SET cents = {n} WHERE id = 3")).expect("an update");
        }
        if n > 0 {
            let remote =
                format!("SET TRANSACTION READ WRITE; UPDATE market.client SET balance = {n} WHERE client_no = 4");
            if matches!(state, "both" | "second") {
                pair.second.sql(&remote);
            }
        }
        // Waiting changes nothing, and is for everybody.
        migration.settle();
        if state != "second" {
            assert_eq!(market::cents_in_second(&pair, 3), n as i64);
        }
    }
    assert_eq!(market::cents_in_first(&pair, "customer", 4), 300);
    client.batch_execute("SELECT migration_cancel('market')").unwrap_or_else(|e| panic!("{}", explain(&e)));
}

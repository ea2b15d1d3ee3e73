//! In `copying` and `first` no client notices that the second server is away; when it is back, all goes on.

use std::time::Duration;

use pgrx_tests::cluster::{Stop, explain};
use pgrx_tests::journal::{self, Journal};
use pgrx_tests::schema::assert_same_dump;
use pgrx_tests::wait::{LONG, SOON, for_a, until};
use pgrx_tests::{Load, Migration, Pair, Wire, Witness, market, process};
use serde_json::{Value, json};

/// What a client of the first store may wait for on a busy machine, whatever the second server does.
const UNHURT: Duration = Duration::from_millis(500);

/// How long the second server is away: longer than any timeout that a worker may have.
const AWAY: Duration = Duration::from_secs(8);

/// Clients that update, insert, delete and read, each with its own rows.
fn clients(pair: &Pair, prefix: &'static str) -> Load {
    Load::start(&pair.first.config("app"), 3, move |client, round, connection| {
        let id = (client * 100 + (round % 100) as usize + 1) as i32;
        let mut transaction = connection.transaction()?;
        transaction.execute(&format!("UPDATE {prefix}customer SET cents = cents + 1 WHERE id = $1"), &[&id])?;
        transaction.execute(&format!("INSERT INTO {prefix}purchase (customer_id, cents) VALUES ($1, 5)"), &[&id])?;
        transaction.query(&format!("SELECT * FROM {prefix}purchase WHERE customer_id = $1"), &[&id])?;
        if round.is_multiple_of(4) {
            transaction.execute(&format!("DELETE FROM {prefix}purchase WHERE customer_id = $1"), &[&id])?;
        }
        transaction.commit()
    })
}

/// The clients of the migrated tables, and as many that do the same to tables outside of the migration: what holds up both is the machine.
struct Clients {
    migrated: Load,
    outside: Load,
}

impl Clients {
    fn start(pair: &Pair) -> Self {
        pair.first.sql(
            "CREATE TABLE control_customer AS SELECT * FROM customer; ALTER TABLE control_customer ADD PRIMARY KEY (id);
             CREATE TABLE control_purchase (LIKE purchase INCLUDING ALL)",
        );
        Self { migrated: clients(pair, ""), outside: clients(pair, "control_") }
    }

    fn assert_unhurt(&self, when: &str) {
        let (outside, migrated) = (self.outside.take(), self.migrated.take());
        for (which, tally) in [("outside", &outside), ("migrated", &migrated)] {
            println!("{when}: {} transactions {which}, the slowest took {:?}", tally.done, tally.slowest);
        }
        outside.assert_clean(when);
        migrated.assert_unhurt(when, UNHURT.max(outside.slowest + UNHURT));
    }

    fn stop(self) {
        self.outside.stop();
        self.migrated.stop();
    }
}

/// Asserts that nobody has kept a transaction, or a snapshot, open on the first server for as long as the second was away.
fn assert_no_old_transaction(pair: &Pair, when: &str) {
    let old = pair.first.list(&format!(
        "SELECT concat_ws(' ', backend_type, pid, clock_timestamp() - xact_start, 'xmin', backend_xmin, query) FROM pg_stat_activity
         WHERE backend_type NOT LIKE 'autovacuum%' AND clock_timestamp() - xact_start >= interval '{} milliseconds'",
        AWAY.as_millis()
    ));
    assert_eq!(old, [""; 0], "a snapshot is held {when}");
}

fn mapping() -> Value {
    let mut mapping = market::mapping();
    mapping["tables"].as_array_mut().expect("tables").push(journal::mapping());
    mapping
}

/// `options.chunk_rows` makes the copy last as long as the test needs.
fn start<'a>(pair: &'a Pair, old: u32, options: &Value) -> Migration<'a> {
    market::create(pair, 1000);
    journal::create(pair, old);
    Migration::start_with(pair, "market", &mapping(), options)
}

/// Entries of the journal before the copy. At this rate they keep it busy for a while, and both outages have to begin within that.
const OLD: u32 = 30_000;
const RATE: u32 = 1000;
const CHUNK: u32 = 50;

/// Asserts that the copy was in the midst of the journal when the second server went away.
fn amid_the_copy(migration: &Migration, pair: &Pair) -> i64 {
    let copied = entries_copied(migration, pair);
    assert!(
        copied > 0 && copied < i64::from(OLD),
        "the copy was meant to be under way, not at {copied} of {OLD} entries"
    );
    assert_eq!(migration.state(), "copying");
    copied
}

/// Entries of the journal copied so far.
fn entries_copied(migration: &Migration, pair: &Pair) -> i64 {
    let query = format!(
        "SELECT rows_copied FROM migration_progress WHERE name = '{}' AND table_name::text LIKE '%journal%'",
        migration.name()
    );
    pair.first.text(&query).and_then(|text| text.parse().ok()).unwrap_or(0)
}

#[test]
fn while_copying() {
    let pair = Pair::new();
    let witness = Witness::of(&pair.first);
    let migration = start(&pair, OLD, &json!({"chunk_rows": CHUNK, "copy_workers": 1, "copy_rate": RATE}));
    let (load, journal) = (Clients::start(&pair), Journal::start(&pair, 1, "new"));
    until("the copy has come to the journal", SOON, || entries_copied(&migration, &pair) > 0);
    load.assert_unhurt("before the outage");
    pair.second.stop(Stop::Immediate);
    for_a(AWAY);
    let copied = amid_the_copy(&migration, &pair);
    assert!(!migration.status().text("last_error").is_empty(), "the status does not say what is wrong");
    load.assert_unhurt("with the second server stopped");
    assert_no_old_transaction(&pair, "over the outage");
    pair.second.start();

    // There, but deaf, while a chunk is on its way.
    until("the copy goes on", LONG, || entries_copied(&migration, &pair) > copied);
    let mut other = pair.second.connect();
    other.batch_execute("BEGIN; LOCK TABLE ledger.entry IN SHARE ROW EXCLUSIVE MODE").expect("a lock");
    until("a chunk is on its way", SOON, || {
        let waiting = "SELECT count(*) > 0 FROM pg_stat_activity
                       WHERE application_name LIKE 'pg_crossover%' AND wait_event_type = 'Lock'";
        pair.second.text(waiting).as_deref() == Some("t")
    });
    pair.second.pause();
    for_a(AWAY);
    amid_the_copy(&migration, &pair);
    load.assert_unhurt("with the second server hanging");
    assert_no_old_transaction(&pair, "over the hang");
    pair.second.resume();
    other.batch_execute("ROLLBACK").expect("a rollback");
    pair.first.sql("UPDATE crossover.migration SET options = '{}'");
    migration.until_state("first");
    load.assert_unhurt("after the outage");
    load.stop();
    let acked = journal.stop();
    migration.settle();
    market::assert_equal(&pair, "");
    journal::check(&pair, "journal", &acked);
    migration.walk(&["both", "second"]);
    migration.finish();
    witness.testify();
}

#[test]
fn while_replicating() {
    let pair = Pair::new();
    let witness = Witness::of(&pair.first);
    let migration = start(&pair, 100, &json!({}));
    migration.until_state("first");
    let (load, journal) = (Clients::start(&pair), Journal::start(&pair, 1, "new"));
    load.migrated.until_done(100);
    load.assert_unhurt("before the outage");
    pair.second.stop(Stop::Immediate);
    for_a(AWAY);
    assert_eq!(migration.state(), "first");
    assert!(!migration.status().text("last_error").is_empty(), "the status does not say what is wrong");
    load.assert_unhurt("with the second server stopped");
    assert_no_old_transaction(&pair, "over the outage");
    // A switch that needs the second server says so and changes nothing.
    migration.try_set_state("both", Duration::from_secs(3)).expect_err("the second server is away");
    assert_eq!(migration.state(), "first");
    // And a wait says how long it was.
    let error = explain(&migration.try_wait(Duration::from_secs(2)).expect_err("the second server is away"));
    assert!(error.starts_with("57014") && !error.contains("within 0 ms"), "{error}");
    load.assert_unhurt("with a switch asked for in vain");
    pair.second.start();
    migration.settle();

    pair.second.pause();
    for_a(AWAY);
    load.assert_unhurt("with the second server hanging");
    assert_no_old_transaction(&pair, "over the hang");
    migration.try_set_state("both", Duration::from_secs(3)).expect_err("the second server hangs");
    assert_eq!(migration.state(), "first");
    load.assert_unhurt("with a switch asked for in vain, again");
    pair.second.resume();
    load.migrated.until_done(100);
    load.stop();
    let acked = journal.stop();
    migration.settle();
    market::assert_equal(&pair, "");
    journal::check(&pair, "journal", &acked);

    // The first server restarts: so does everything that belongs to the migration.
    migration.set_state("both");
    drop(witness);
    for how in [Stop::Fast, Stop::Immediate] {
        pair.first.restart(how);
        pair.first.sql("UPDATE customer SET cents = cents + 1 WHERE id = 7");
        pair.second.sql("UPDATE market.client SET balance = balance + 1 WHERE client_no = 8");
        migration.settle();
        market::assert_equal(&pair, "__first");
    }
    migration.set_state("first");
    migration.cancel();
}

/// The analysis of the new tables may take its time, and nothing else after it.
#[test]
fn cut_off_as_the_copy_ends() {
    let pair = Pair::new();
    market::create(&pair, 10);
    let wire = Wire::between(&pair);
    pair.first.fault("copy:caught-up stop");
    let migration = Migration::start(&pair, "market", &market::mapping());
    let worker = migration.worker();
    until("the worker is about to enter `first`", LONG, || process::is_stopped(worker));
    wire.cut();
    process::signal(worker, process::CONTINUE);
    migration.until_status("misses its second server", |status| !status.text("last_error").is_empty());
    assert_eq!(migration.state(), "first");
    wire.mend();
    pair.first.sql("UPDATE customer SET cents = 5 WHERE id = 3");
    migration.settle();
    assert_eq!(market::cents_in_second(&pair, 3), 5);
    migration.cancel();
}

#[test]
fn a_cancel_is_made_all_the_same() {
    for force in [false, true] {
        let pair = Pair::new();
        market::create(&pair, 10);
        let before = (pair.first.pg_dump_schema("app"), pair.second.pg_dump_schema("app"));
        let migration = market::started(&pair);
        migration.walk(&["both", "first"]);
        pair.second.stop(Stop::Fast);
        let called = std::time::Instant::now();
        let cancel = format!("SELECT migration_cancel('market', '5 s', force => {force})::text");
        let answer = pair.first.connect().query_one(&cancel, &[]);
        if force {
            assert_eq!(answer.expect("a cancel").get::<_, String>(0), "cancelled");
        } else {
            let error = answer.expect_err("the second server is away");
            assert!(called.elapsed() >= Duration::from_secs(5), "{:?}", called.elapsed());
            assert_eq!(error.code().map(|c| c.code()), Some("08001"), "{}", explain(&error));
            let message =
                "migration \"market\" is cancelled, but what it has on the second server could not be removed";
            assert!(explain(&error).contains(message), "{}", explain(&error));
        }
        let status = migration.status();
        assert_eq!((status.state(), status.phase()), ("cancelled".into(), "finishing".into()));
        assert_same_dump("the first server", &before.0, &pair.first.pg_dump_schema("app"));
        pair.second.start();
        migration.until_status("is done", |s| s.phase() == "done");
        assert_same_dump("the second server", &before.1, &pair.second.pg_dump_schema("app"));
    }
}

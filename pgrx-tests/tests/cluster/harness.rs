//! The harness itself, on plain PostgreSQL: two clusters, postgres_fdw, pgbench, crashes. Needs no extension.

use std::time::Duration;

use pgrx_tests::cluster::Stop;
use pgrx_tests::load::Load;
use pgrx_tests::wait::{SOON, until};
use pgrx_tests::{Pair, Pgbench, Witness, bank, journal, process, tokens};

#[test]
fn a_pair_is_connected_and_stays_on_its_ports() {
    let pair = Pair::plain();
    pair.second_store("rail", "CREATE TABLE path (ident integer PRIMARY KEY, path text NOT NULL)");
    pair.first.sql("INSERT INTO rail.path VALUES (1, 'one')");
    pair.second.restart(Stop::Immediate);
    assert_eq!(pair.second.text("SELECT path FROM rail.path").as_deref(), Some("one"));
    assert_eq!(pair.first.psql("SELECT path FROM rail.path").trim(), "one");
    assert_eq!(pair.second.pg_dump_schema("app"), pair.second.pg_dump_schema("app"));
    pair.first.restart(Stop::Fast);
    assert_eq!(pair.first.list("SELECT g FROM generate_series(1, 3) AS g"), ["1", "2", "3"]);
}

#[test]
fn a_paused_server_hangs_and_goes_on() {
    let pair = Pair::plain();
    pair.second_store("rail", "CREATE TABLE path (ident integer PRIMARY KEY, path text NOT NULL)");
    let witness = Witness::of(&pair.second);
    let load = Load::start(&pair.first.config("app"), 2, |_, _, client| client.batch_execute("SELECT FROM rail.path"));
    load.until_done(10);
    pair.second.pause();
    load.take();
    pair.first.sql("SELECT 1");
    pair.second.resume();
    load.until_done(10);
    load.stop().assert_unhurt("after the pause", SOON);
    witness.testify();
}

#[test]
fn a_crash_is_found_in_the_log() {
    let pair = Pair::plain();
    let mut client = pair.first.connect();
    let pid: i32 = client.query_one("SELECT pg_backend_pid()", &[]).expect("a pid").get(0);
    assert!(process::signal(pid, process::KILL));
    until("the server has restarted its backends", SOON, || client.simple_query("SELECT 1").is_err());
    pair.first.connect_soon();
    until("the crash is in the log", SOON, || pair.findings().contains("was terminated by signal 9"));
    pair.expect_crashes();
}

#[test]
fn pgbench_is_ended_in_order() {
    let pair = Pair::plain();
    bank::create(&pair, 1);
    let witness = Witness::of(&pair.first);
    let mut pgbench = Pgbench::start(&pair.first, &["-c", "2", "-j", "2", "-M", "prepared"]);
    pgbench.until_done(500);
    let report = pgbench.stop();
    assert!(
        report.processed > 0 && report.failed == 0 && report.tps > 1.0 && report.slowest > Duration::ZERO,
        "{report:?}"
    );
    bank::Sums::first(&pair, "").assert_agree("first");
    // The comparison of both stores, on rows moved by hand.
    pair.first.sql(
        "INSERT INTO bank.branch SELECT bid, bbalance / 100.0, filler FROM pgbench_branches;
         INSERT INTO bank.teller SELECT tid, bid, tbalance::bigint * 10, filler FROM pgbench_tellers;
         INSERT INTO bank.account SELECT aid, bid, abalance / 100.0, filler FROM pgbench_accounts;
         INSERT INTO bank.movement SELECT id, tid, bid, aid, delta / 100.0, mtime AT TIME ZONE 'UTC', filler FROM pgbench_history;",
    );
    assert_eq!(bank::Sums::first(&pair, ""), bank::Sums::second(&pair));
    pair.second.sql("UPDATE bank.account SET balance = balance + 0.01 WHERE account_no = 7");
    assert_ne!(bank::Sums::first(&pair, ""), bank::Sums::second(&pair));
    witness.testify();
}

#[test]
fn the_journal_is_compared() {
    let pair = Pair::plain();
    journal::create(&pair, 100);
    let writers = journal::Journal::start(&pair, 2, "new");
    writers.until_acked(20);
    let acked = writers.stop();
    pair.first.sql(
        "INSERT INTO ledger.entry SELECT id, upper(left(token, 1)) || substr(token, 2), extract(epoch FROM at) * 1000000 FROM journal",
    );
    journal::check(&pair, "journal", &acked);
    pair.second.sql("DELETE FROM ledger.entry WHERE entry_no = 50");
    assert!(std::panic::catch_unwind(|| journal::check(&pair, "journal", &acked)).is_err());
}

#[test]
fn the_token_clients_work_through_a_crash() {
    let pair = Pair::plain();
    pair.expect_crashes();
    tokens::create(&pair);
    let clients = tokens::Tokens::start(&[tokens::Door::first(&pair), tokens::Door::second(&pair)], tokens::seed());
    clients.until_acked(20);
    pair.first.restart(Stop::Immediate);
    clients.until_acked(20);
    drop(clients);
    assert_ne!(pair.first.text("SELECT count(*) FROM trail").as_deref(), Some("0"));
}

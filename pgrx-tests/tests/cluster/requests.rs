//! A request is answered or carried out also where it comes at the moment that its worker ends.

use std::thread;
use std::time::Duration;

use pgrx_tests::cluster::{Stop, explain};
use pgrx_tests::migration::set_state;
use pgrx_tests::wait::{SOON, for_a, until, until_some};
use pgrx_tests::{Migration, Pair, market, process};

/// The process that is held besides those of `others`.
fn another_held(pair: &Pair, others: &[i32]) -> i32 {
    until_some("a process is held", SOON, || {
        let children = process::children(pair.first.postmaster()?);
        children.into_iter().find(|(pid, state)| *state == 'T' && !others.contains(pid)).map(|(pid, _)| pid)
    })
}

/// Holds the worker before it notes that all is cleaned up, and lets it go on while a clerk has read that it is not, and is about to
/// file its caller's request.
fn file_as_it_ends(pair: &Pair, migration: &Migration) {
    let worker = another_held(pair, &[]);
    pair.first.fault("clerk:filing stop");
    thread::scope(|threads| {
        let late = threads.spawn(|| migration.try_wait(SOON));
        let clerk = another_held(pair, &[worker]);
        process::signal(worker, process::CONTINUE);
        until("the worker has ended, or waits for the clerk", SOON, || {
            let waits = format!("SELECT wait_event_type = 'Lock' FROM pg_stat_activity WHERE pid = {worker}");
            !process::is_alive(worker) || pair.first.text(&waits).as_deref() == Some("t")
        });
        process::signal(clerk, process::CONTINUE);
        let state = late.join().expect("the caller").unwrap_or_else(|e| panic!("{}", explain(&e)));
        assert_eq!(state, "cancelled");
    });
    until("the worker has ended", SOON, || !process::is_alive(worker));
    migration.until_status("has ended", |status| status.phase() == "done");
    assert_eq!(pair.first.list("SELECT kind FROM crossover.request WHERE status IN ('queued', 'running')"), [""; 0]);
}

#[test]
fn filed_while_the_last_one_is_answered() {
    let pair = Pair::new();
    market::create(&pair, 10);
    let migration = market::started(&pair);
    pair.first.fault("cleanup:peer stop");
    thread::scope(|threads| {
        let first = threads.spawn(|| migration.try_end("cancel"));
        file_as_it_ends(&pair, &migration);
        let state = first.join().expect("the operator").unwrap_or_else(|e| panic!("{}", explain(&e)));
        assert_eq!(state, "cancelled");
    });
}

#[test]
fn filed_while_the_second_server_is_cleaned_up() {
    let pair = Pair::new();
    market::create(&pair, 10);
    let migration = market::started(&pair);
    // Nobody waits for the end any more: it goes on by itself.
    pair.second.stop(Stop::Fast);
    pair.first
        .connect()
        .batch_execute("SELECT migration_cancel('market', '1 s')")
        .expect_err("the second server is away");
    assert_eq!(migration.status().phase(), "finishing");
    pair.first.fault("cleanup:peer stop");
    pair.second.start();
    file_as_it_ends(&pair, &migration);
}

/// The postmaster has begun a fast shutdown, and has told one process of it, the operator's, but not the worker yet.
#[test]
fn a_shutdown_is_no_withdrawal() {
    let pair = Pair::new();
    market::create(&pair, 10);
    let migration = market::started(&pair);
    let mut writer = pair.first.connect();
    writer.batch_execute("BEGIN; UPDATE customer SET cents = cents + 1 WHERE id = 1").expect("an update");
    let mut operator = pair.first.connect();
    let pid: i32 = operator.query_one("SELECT pg_backend_pid()", &[]).expect("a pid").get(0);
    let worker = migration.worker();
    thread::scope(|threads| {
        let waiting = threads.spawn(|| set_state(&mut operator, "market", "both", Duration::from_secs(60)));
        migration.until_status("is switching", |status| status.phase() == "switching");
        let mut witness = pair.first.connect();
        // What the postmaster writes before it sends the first signal.
        pair.first.set_status("stopping");
        assert!(process::signal(pid, libc::SIGTERM));
        waiting.join().expect("the operator").expect_err("it was shut down");
        // Time for the worker to see that nobody waits for it: it looks ten times a second.
        for_a(Duration::from_secs(1));
        let status: String = witness
            .query_one("SELECT status FROM crossover.request ORDER BY id DESC LIMIT 1", &[])
            .expect("a request")
            .get(0);
        assert_eq!(status, "running", "the request of an operator whom a shutdown has ended");
        assert!(process::is_alive(worker));
        pair.first.restart(Stop::Fast);
    });
    drop(writer);
    migration.until_state("both");
    migration.walk(&["first"]);
    migration.cancel();
}

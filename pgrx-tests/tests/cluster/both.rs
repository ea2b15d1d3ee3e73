//! Writes to the same rows on both stores converge, and none is lost: not to the other store, not to a dead worker, not to a crash.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use pgrx_tests::cluster::explain;
use pgrx_tests::tokens::{self, Door, Summary, Tokens};
use pgrx_tests::wait::{LONG, SOON, Stopwatch, for_a, until};
use pgrx_tests::writers::Generation;
use pgrx_tests::{Migration, Pair, Witness, market, process};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::json;

fn started(pair: &Pair) -> Migration<'_> {
    tokens::create(pair);
    let migration = Migration::start(pair, "rail", &json!({"tables": [tokens::mapping()]}));
    migration.until_state("first");
    migration
}

/// Three clients of the first shape, one of the second shape's view, two on the second server itself.
fn doors(pair: &Pair) -> [Door; 6] {
    let (first, second) = (Door::first(pair), Door::second(pair));
    [first.clone(), second.clone(), first.clone(), second, first, Door::second_view(pair)]
}

/// How the worker may die.
#[derive(Clone, Copy, PartialEq)]
enum Death {
    /// `pg_terminate_backend`.
    Terminated,
    /// That mostly, and `kill -9` now and then, which takes every connection of the first server with it.
    KilledToo,
}

/// Lets the worker die again and again until `stop`; how often it did.
fn reaper(pair: &Pair, migration: &Migration, death: Death, seed: u64, stop: &AtomicBool) -> usize {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut deaths = 0;
    while !stop.load(Ordering::Relaxed) {
        for_a(Duration::from_millis(rng.random_range(20..400)));
        let Some(worker) = migration.try_status().and_then(|status| status.worker()) else {
            continue;
        };
        if death == Death::KilledToo && rng.random_bool(0.1) {
            deaths += usize::from(process::signal(worker, process::KILL));
        } else if let Ok(mut client) = pair.first.try_connect() {
            deaths += usize::from(client.execute("SELECT pg_terminate_backend($1)", &[&worker]).is_ok());
        }
    }
    deaths
}

/// One round of the token check in `both`: clients on all doors for `period`, with a dying worker; then rest, then the check.
fn token_round(
    pair: &Pair,
    migration: &Migration,
    death: Death,
    seed: u64,
    (period, least): (Duration, usize),
) -> Result<Summary, String> {
    let clients = Tokens::start(&doors(pair), seed);
    let stop = AtomicBool::new(false);
    let deaths = thread::scope(|scope| {
        let reaper = scope.spawn(|| reaper(pair, migration, death, seed, &stop));
        for_a(period);
        clients.until_acked_in_all(least);
        stop.store(true, Ordering::Relaxed);
        reaper.join().expect("the reaper")
    });
    let ledger = clients.stop();
    migration.settle();
    let summary = ledger.check(pair, migration, "trail__first")?;
    println!("{summary:?}, the worker died {deaths} times");
    Ok(summary)
}

/// `CROSSOVER_BREAK=no-look-again` takes that safeguard out: then this test has to fail.
#[test]
fn no_token_is_lost_with_the_worker_killed_at_random() {
    let pair = Pair::new();
    pair.expect_crashes();
    let migration = started(&pair);
    if let Ok(safeguard) = std::env::var("CROSSOVER_BREAK") {
        pair.first.break_protocol(&safeguard);
    }
    migration.set_state("both");
    let seed = tokens::seed();
    let summary = token_round(&pair, &migration, Death::KilledToo, seed, (Duration::from_secs(20), 501))
        .unwrap_or_else(|wrong| panic!("{wrong}"));
    assert!(summary.tokens > 500 && summary.conflicts > 0, "hardly anything happened: {summary:?}");

    // On to the end: the last clients write through the managed views alone.
    migration.set_state("second");
    let clients = Tokens::start(&[Door::first(&pair), Door::first(&pair), Door::second_view(&pair)], seed + 1);
    clients.until_acked(100);
    let ledger = clients.stop();
    migration.finish();
    ledger.check(&pair, &migration, "trail__first").unwrap_or_else(|wrong| panic!("{wrong}"));
}

#[test]
fn no_token_is_lost_on_the_way_back() {
    let pair = Pair::new();
    let witness = (Witness::of(&pair.first), Witness::of(&pair.second));
    let migration = started(&pair);
    migration.set_state("both");
    let seed = tokens::seed();
    token_round(&pair, &migration, Death::Terminated, seed, (Duration::from_secs(8), 0))
        .unwrap_or_else(|wrong| panic!("{wrong}"));
    migration.set_state("first");
    let clients = Tokens::start(&[Door::first(&pair), Door::first(&pair)], seed + 1);
    clients.until_acked(100);
    let ledger = clients.stop();
    migration.settle();
    ledger.check(&pair, &migration, "trail__first").unwrap_or_else(|wrong| panic!("{wrong}"));
    migration.cancel();
    witness.0.testify();
    witness.1.testify();
}

/// Both stores' rows and both images of all conflicts, as one text to search for tokens.
fn everything(pair: &Pair, migration: &Migration) -> String {
    let mut text = pair.first.list("SELECT trail FROM trail__first").join("\n");
    text += &pair.second.list("SELECT path FROM rail.path").join("\n");
    text + &migration.conflicts().iter().map(ToString::to_string).collect::<String>()
}

/// A client changes a row on the second store just after a cycle has read it and before the cycle writes it.
fn overtaken_by_a_client(safeguard_taken_out: Option<&str>) -> Result<(), String> {
    let pair = Pair::new();
    let migration = started(&pair);
    pair.first.sql("INSERT INTO trail VALUES (1, 'start;')");
    migration.set_state("both");
    migration.settle();
    if let Some(safeguard) = safeguard_taken_out {
        pair.first.break_protocol(safeguard);
    }
    for round in 0..5 {
        let (worker, a, b) = (migration.worker(), format!("a{round};"), format!("b{round};"));
        process::signal(worker, process::STOP);
        until("the worker is held", SOON, || process::is_stopped(worker));
        pair.first.sql(&format!("UPDATE trail SET trail = trail || '{a}' WHERE id = 1"));
        pair.first.fault("cycle:read stop");
        process::signal(worker, process::CONTINUE);
        until("a cycle has read the change", SOON, || !pair.first.fault_is_armed() && process::is_stopped(worker));
        pair.second.sql(&format!("UPDATE rail.path SET path = left(path, -1) || '{b}>' WHERE ident = 1"));
        process::signal(worker, process::CONTINUE);
        migration.settle();
        let all = everything(&pair, &migration);
        for token in [a, b] {
            if !all.contains(&token) {
                return Err(format!("{token} is lost in round {round}"));
            }
        }
    }
    let rows = (
        pair.first.text("SELECT trail FROM trail__first"),
        pair.second.text("SELECT substr(path, 2, length(path) - 2) FROM rail.path"),
    );
    if rows.0 == rows.1 { Ok(()) } else { Err(format!("the stores differ: {rows:?}")) }
}

#[test]
fn a_client_that_overtakes_a_cycle_loses_nothing() {
    overtaken_by_a_client(None).unwrap_or_else(|wrong| panic!("{wrong}"));
}

#[test]
fn without_the_look_again_an_overtaking_client_loses_its_write() {
    println!("{}", overtaken_by_a_client(Some("no-look-again")).expect_err("the look again is not needed"));
}

/// Clients that commit asynchronously on the first server, which crashes as soon as the second store shows what they wrote.
fn unflushed_commits(safeguard_taken_out: Option<&str>) -> Result<(), String> {
    // What a commit leaves in memory stays there, unless somebody flushes it on purpose.
    let settings =
        ["wal_writer_delay = '10s'", "wal_writer_flush_after = '1GB'", "wal_buffers = '64MB'", "autovacuum = off"];
    let pair = Pair::with(&settings, &[]);
    pair.expect_crashes();
    let migration = started(&pair);
    migration.settle();
    if let Some(safeguard) = safeguard_taken_out {
        pair.first.break_protocol(safeguard);
    }
    // What is not flushed need not be lost every time.
    let rounds = if safeguard_taken_out.is_some() { 50 } else { 5 };
    for round in 0..rounds {
        let mut client = pair.first.connect_soon();
        let mut victim = pair.first.connect_soon();
        let pid: i32 = victim.query_one("SELECT pg_backend_pid()", &[]).expect("a pid").get(0);
        let insert =
            format!("SET synchronous_commit = off; INSERT INTO trail VALUES ({}, 'round {round};')", 100 + round);
        let mut second = pair.second.connect();
        client.batch_execute(&insert).expect("an insert");
        let arrived = format!("SELECT FROM rail.path WHERE ident = {}", 100 + round);
        until("the row is in the second store", SOON, || second.query_opt(&arrived, &[]).expect("an answer").is_some());
        // The victim's connection ends before the postmaster knows, and until then it lets others in, only to throw them out.
        let old = Generation::of(&pair.first);
        process::signal(pid, process::KILL);
        old.until_replaced(&pair.first);
        // The transaction ids that a lost commit leaves free are used again.
        for row in after_the_crash(round) {
            pair.first.sql(&row);
        }
        migration.settle();
        let first = pair.first.list("SELECT id FROM trail ORDER BY id");
        let second = pair.second.list("SELECT ident FROM rail.path ORDER BY ident");
        if first != second {
            let (a, b): (BTreeSet<_>, BTreeSet<_>) = (first.into_iter().collect(), second.into_iter().collect());
            return Err(format!(
                "in round {round} the stores differ in the rows {:?}",
                a.symmetric_difference(&b).collect::<Vec<_>>()
            ));
        }
    }
    migration.cancel();
    Ok(())
}

/// Twenty transactions of one row each.
fn after_the_crash(round: i32) -> impl Iterator<Item = String> {
    (1..=20).map(move |n| format!("INSERT INTO trail VALUES ({}, 'after the crash;')", 1000 + round * 20 + n))
}

#[test]
fn a_crash_of_the_source_leaves_no_unflushed_commit_in_the_watermark() {
    unflushed_commits(None).unwrap_or_else(|wrong| panic!("{wrong}"));
}

#[test]
fn without_the_flush_a_crash_of_the_source_makes_the_stores_differ() {
    println!("{}", unflushed_commits(Some("no-flush")).expect_err("the flush is not needed"));
}

/// `clients` clients add 100 cents to one customer `times` times each, over lost connections never.
fn count_up(pair: &Pair, clients: usize, times: usize) {
    thread::scope(|scope| {
        for _ in 0..clients {
            scope.spawn(|| {
                let mut client = pair.first.connect();
                let add = client.prepare("UPDATE customer SET cents = cents + 100 WHERE id = 1").expect("a statement");
                for _ in 0..times {
                    let count = client.execute(&add, &[]).unwrap_or_else(|e| panic!("{}", explain(&e)));
                    assert_eq!(count, 1);
                }
            });
        }
    });
}

#[test]
fn counters_behind_expressions_lose_no_addition() {
    let pair = Pair::new();
    market::create(&pair, 100);
    let witness = (Witness::of(&pair.first), Witness::of(&pair.second));
    let migration = market::started(&pair);
    migration.walk(&["both", "second"]);
    count_up(&pair, 4, 100);
    assert_eq!(market::cents_in_second(&pair, 1), 40_000);
    migration.settle();
    assert_eq!(market::cents_in_first(&pair, "customer__first", 1), 40_000);

    // The same while the store changes under them.
    thread::scope(|scope| {
        let counting = scope.spawn(|| count_up(&pair, 4, 400));
        let began = Stopwatch::start();
        while !counting.is_finished() {
            assert!(began.elapsed() < LONG, "the counters do not get on");
            migration.walk(&["both", "second"]);
        }
    });
    migration.settle();
    assert_eq!(market::cents_in_second(&pair, 1), 200_000);
    assert_eq!(market::cents_in_first(&pair, "customer__first", 1), 200_000);
    assert!(migration.conflicts().is_empty(), "{:#?}", migration.conflicts());
    migration.finish();
    count_up(&pair, 4, 25);
    assert_eq!(market::cents_in_second(&pair, 1), 210_000);
    witness.0.testify();
    witness.1.testify();
}

/// A switch that a dying worker interrupts may fail, or may have happened; asked for again, it happens.
#[test]
fn switches_go_on_while_the_worker_dies() {
    let pair = Pair::new();
    let migration = started(&pair);
    let seed = tokens::seed();
    let clients = Tokens::start(&[Door::first(&pair), Door::first(&pair)], seed);
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let reaper = scope.spawn(|| reaper(&pair, &migration, Death::Terminated, seed, &stop));
        for to in ["both", "second", "both", "first", "both", "second"] {
            clients.until_acked(20);
            let switch = || migration.try_set_state(to, SOON).is_ok() || migration.state() == to;
            until(&format!("the migration is {to}"), LONG, switch);
        }
        stop.store(true, Ordering::Relaxed);
        println!("the worker died {} times", reaper.join().expect("the reaper"));
    });
    let ledger = clients.stop();
    migration.settle();
    ledger.check(&pair, &migration, "trail__first").unwrap_or_else(|wrong| panic!("{wrong}"));
    migration.finish();
}

//! Every process of both servers is killed with -9, in every state and on the way between them, and the servers are stopped immediately,
//! under writers: the migration goes on by itself, nothing is lost or doubled, and no object, connection or lock is left behind.

use std::collections::BTreeMap;
use std::thread;

use pgrx_tests::cluster::{Cluster, Stop, explain};
use pgrx_tests::wait::{SOON, until, until_some};
use pgrx_tests::writers::{
    self, Generation, NAME, Untouched, WRITER, Writers, any_end, at_rest, held_process, until_replicated,
};
use pgrx_tests::{Migration, Pair, process};
use postgres::Client;
use serde_json::json;

/// Entries that are copied, and how many of them a second: the copy outlasts all that is killed during it.
const OLD: u32 = 20_000;
const RATE: u32 = 100;

/// The processes that a server must have, or the test would kill less than it says.
const OF_ANY_SERVER: &[&str] = &[
    "postmaster",
    "checkpointer",
    "background writer",
    "walwriter",
    "autovacuum launcher",
    "logical replication launcher",
];
const OF_THE_FIRST: &[&str] = &["pg_crossover launcher", "pg_crossover migration", "client", "client in a transaction"];
const OF_THE_SECOND: &[&str] = &["the replicator's backend"];

/// What there is to kill on a server, by what it does; one process of each kind.
fn processes(cluster: &Cluster) -> BTreeMap<String, i32> {
    // Connections of the test itself come and go: they are no clients.
    let query = format!(
        "SELECT kind || ' ' || max(pid) FROM (
            SELECT pid, CASE WHEN backend_type <> 'client backend' THEN backend_type
                             WHEN application_name LIKE 'pg_crossover%' THEN 'the replicator''s backend'
                             WHEN application_name = 'postgres_fdw' THEN 'backend of a foreign table'
                             WHEN application_name = 'in the middle' THEN 'client in a transaction'
                             WHEN application_name = '{WRITER}' THEN 'client' END
              FROM pg_stat_activity
             WHERE pid <> pg_backend_pid() AND backend_type NOT IN ('autovacuum worker', 'pg_crossover clerk', 'pg_crossover scout')) AS p(pid, kind)
        WHERE kind IS NOT NULL GROUP BY kind"
    );
    let mut found = BTreeMap::new();
    for line in cluster.list(&query) {
        let (kind, pid) = line.rsplit_once(' ').expect("a kind and a pid");
        found.insert(kind.to_owned(), pid.parse().expect("a pid"));
    }
    found.insert("postmaster".into(), cluster.postmaster().expect("a running server"));
    found
}

/// Kills one process, lets `held` go on, and sees to it that the server is there again: only a postmaster has to be started.
fn kill(cluster: &Cluster, kind: &str, held: Option<i32>) {
    // One that ends by itself a moment before is not the one.
    let (pid, old) = until_some(&format!("cluster {} has a {kind}", cluster.name()), SOON, || {
        let pid = processes(cluster).remove(kind)?;
        if kind == "postmaster" {
            // What it starts between a look at its children and its end would be of no generation.
            process::signal(pid, process::STOP);
            until("the postmaster is stopped", SOON, || process::is_stopped(pid));
        }
        let old = Generation::of(cluster);
        process::signal(pid, process::KILL).then_some((pid, old))
    });
    if let Some(held) = held {
        process::signal(held, process::CONTINUE);
    }
    if kind == "postmaster" {
        // Whoever is left ends by itself.
        until("the postmaster is gone", SOON, || !process::is_alive(pid));
        old.until_gone(cluster);
        cluster.start_after_kill();
    }
    old.until_replaced(cluster);
}

/// A client in the middle of a transaction that never ends: in the first shape, and in the second where it is exposed.
fn in_the_middle(pair: &Pair, state: &str, number: usize) -> Client {
    let begin = |client: &mut Client| {
        let mut sql = format!(
            "SET application_name = 'in the middle'; BEGIN; INSERT INTO journal (token) VALUES ('never {number}')"
        );
        if matches!(state, "both" | "second") {
            sql += &format!("; INSERT INTO path VALUES ({}, '<never>')", 1000 + number);
        }
        client.batch_execute(&sql)
    };
    until_some("a client is in the middle of a transaction", SOON, || {
        let mut client = pair.first.try_connect().ok()?;
        begin(&mut client).ok().map(|()| client)
    })
}

/// Strikes while writers work and a client is in the middle of a transaction, and waits until all goes on.
fn strike(pair: &Pair, migration: &Migration, writers: &Writers, number: usize, blow: impl FnOnce()) {
    let state = migration.state();
    let client = in_the_middle(pair, &state, number);
    let before = rows_copied(pair);
    blow();
    drop(client);
    writers.until_busy();
    assert_eq!(migration.state(), state);
    match state.as_str() {
        "copying" => until("the copy goes on", SOON, || rows_copied(pair) > before),
        _ => until_replicated(pair, &state),
    }
}

/// Kills every process of both servers, and stops each server and both of them immediately, in the state that the migration is in.
fn kill_all(pair: &Pair, migration: &Migration, writers: &Writers) {
    let state = migration.state();
    let mut number = 0;
    for (cluster, of_this_server) in [(&pair.first, OF_THE_FIRST), (&pair.second, OF_THE_SECOND)] {
        let client = in_the_middle(pair, &state, number);
        let mut kinds: Vec<String> = processes(cluster).into_keys().collect();
        drop(client);
        kinds.extend(OF_ANY_SERVER.iter().chain(of_this_server).map(|kind| (*kind).to_owned()));
        match (state.as_str(), cluster.name()) {
            ("copying", "first") => kinds.push("pg_crossover copy".into()),
            ("both" | "second", "second") => kinds.push("backend of a foreign table".into()),
            _ => {}
        }
        kinds.sort();
        kinds.dedup();
        for kind in kinds {
            println!("{state}, {} server, {kind}", cluster.name());
            number += 1;
            strike(pair, migration, writers, number, || kill(cluster, &kind, None));
        }
    }
    for servers in [&[&pair.first][..], &[&pair.second], &[&pair.first, &pair.second]] {
        println!("{state}, immediate stop of {:?}", servers.iter().map(|server| server.name()).collect::<Vec<_>>());
        number += 1;
        strike(pair, migration, writers, number, || {
            servers.iter().for_each(|server| server.stop(Stop::Immediate));
            servers.iter().for_each(|server| server.start());
        });
    }
    let never = "SELECT word FROM ledger.entry WHERE word LIKE 'Never%' UNION ALL SELECT path FROM rail.path WHERE path = '<never>'";
    assert_eq!(pair.second.list(never), [""; 0], "a transaction that never committed");
}

fn rows_copied(pair: &Pair) -> i64 {
    let query = "SELECT sum(rows_copied)::bigint FROM crossover.migrated_table";
    until_some("the copy's progress", SOON, || {
        pair.first.try_connect().ok()?.query_one(query, &[]).ok()?.get::<_, Option<i64>>(0)
    })
}

/// After the clients have gone: the replicator has its connections, and nobody else has one, or a lock.
fn assert_nothing_left(pair: &Pair) {
    let query = "SELECT concat_ws(' ', pid, application_name, state, query) FROM pg_stat_activity
                  WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() AND application_name NOT LIKE 'pg_crossover%'";
    until("no client's connection is left on the second server", SOON, || pair.second.list(query).is_empty());
    // One that works, one that flushes.
    let ours = "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'pg_crossover%'";
    until("no replicator's connection is left on the second server", SOON, || pair.second.list(ours).len() <= 2);
    writers::assert_no_lock_left(pair);
}

#[test]
fn while_first_is_in_use() {
    let pair = writers::pair(OLD);
    let before = Untouched::of(&pair);
    let writers = Writers::start(&pair);
    let options = json!({"chunk_rows": 50, "copy_workers": 2, "copy_rate": RATE});
    let migration = Migration::start_with(&pair, NAME, &writers::mapping(), &options);
    kill_all(&pair, &migration, &writers);
    pair.first.sql("UPDATE crossover.migration SET options = '{\"chunk_rows\": 1000}'");
    migration.until_state("first");
    kill_all(&pair, &migration, &writers);
    writers.check(&pair, &migration, "");
    assert_nothing_left(&pair);
    migration.cancel();
    before.assert_again(&pair);
}

#[test]
fn while_second_is_in_use() {
    let pair = writers::pair(500);
    let before = Untouched::of(&pair);
    let migration = Migration::start_with(&pair, NAME, &writers::mapping(), &json!({}));
    migration.until_state("first");
    for state in ["both", "second"] {
        migration.set_state(state);
        let writers = Writers::start_in(&pair, state);
        kill_all(&pair, &migration, &writers);
        writers.check(&pair, &migration, "__first");
        assert_nothing_left(&pair);
    }
    migration.walk(&["both", "first"]);
    migration.cancel();
    before.assert_again(&pair);
}

/// Whom to kill on the way from one state to another: the server's place, and the kind.
const ON_THE_WAY: &[(&str, &str)] = &[
    ("first", "postmaster"),
    ("first", "checkpointer"),
    ("first", "pg_crossover migration"),
    ("first", "client"),
    ("second", "postmaster"),
    ("second", "walwriter"),
    ("second", "the replicator's backend"),
];

/// Holds the worker at `point` of what `call` asks for, and kills one process meanwhile.
fn kill_at(pair: &Pair, point: &str, (server, kind): (&str, &str), call: impl FnOnce() + Send) {
    pair.first.fault(&format!("{point} stop"));
    thread::scope(|scope| {
        let operator = scope.spawn(call);
        let held = until_some("the worker is held", SOON, || held_process(&pair.first));
        if server == "first" {
            kill(&pair.first, kind, Some(held));
        } else {
            kill(&pair.second, kind, None);
            process::signal(held, process::CONTINUE);
        }
        operator.join().expect("the operator");
    });
}

#[test]
fn on_the_way() {
    let pair = writers::pair(500);
    let before = Untouched::of(&pair);
    let migration = Migration::start_with(&pair, NAME, &writers::mapping(), &json!({}));
    migration.until_state("first");
    let writers = Writers::start(&pair);
    for victim in ON_THE_WAY {
        for to in ["both", "second", "both", "first"] {
            let from = migration.state();
            let what = format!("{from} to {to}, {} server, {}", victim.0, victim.1);
            kill_at(&pair, "switch:moved", *victim, || any_end(&what, migration.try_set_state(to, SOON)));
            let state = at_rest(&pair, &what);
            assert!(state == from || state == to, "{what}: between {from} and {to} it is {state}");
            if state == from {
                migration.set_state(to);
            }
            writers.until_busy();
            until_replicated(&pair, to);
        }
    }
    writers.check(&pair, &migration, "__first");
    assert_nothing_left(&pair);
    migration.cancel();
    before.assert_again(&pair);
}

#[test]
fn at_the_end() {
    let pair = writers::pair(200);
    for (i, victim) in ON_THE_WAY.iter().enumerate() {
        for verb in ["cancel", "finish"] {
            let point = ["end:moved", "cleanup:triggers"][i % 2];
            let what = format!("{verb}, {point}, {} server, {}", victim.0, victim.1);
            let before = Untouched::of(&pair);
            let writers = Writers::start(&pair);
            let migration = Migration::start_with(&pair, NAME, &writers::mapping(), &json!({}));
            migration.until_state("first");
            migration.walk(if verb == "finish" { &["both", "second"] } else { &["both", "first"] });
            kill_at(&pair, point, *victim, || any_end(&what, migration.try_end(verb)));
            let status =
                migration.until_status("has ended, or not", |s| matches!(s.phase().as_str(), "done" | "replicating"));
            if status.phase() == "replicating" {
                migration.try_end(verb).unwrap_or_else(|e| panic!("{what}, again: {}", explain(&e)));
            }
            writers.until_busy();
            if verb == "finish" {
                writers.check_second(&pair);
                before.assert_second_again(&pair);
                writers::begin_anew(&pair);
            } else {
                writers.check_first(&pair);
                before.assert_again(&pair);
                pair.second.sql("TRUNCATE rail.path, ledger.entry");
            }
        }
    }
}

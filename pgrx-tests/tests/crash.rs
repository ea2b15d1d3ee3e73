//! `kill -9` at every named step, under writers: the migration goes on by itself, and nothing is lost, doubled or half done.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use pgrx_tests::cluster::explain;
use pgrx_tests::journal::{self, Journal};
use pgrx_tests::migration::{is_disconnect, set_state};
use pgrx_tests::schema::{assert_same_dump, traces};
use pgrx_tests::tokens::{self, Door, Tokens};
use pgrx_tests::wait::{SOON, until, until_some};
use pgrx_tests::{Migration, Pair, process};
use serde_json::{Value, json};

/// Entries that are there before, enough for a copy of several chunks.
const OLD: u32 = 5_000;

fn pair() -> Pair {
    let pair = Pair::new();
    pair.expect_crashes();
    tokens::create(&pair);
    journal::create(&pair, OLD);
    pair
}

fn mapping() -> Value {
    json!({"tables": [tokens::mapping(), journal::mapping()]})
}

fn options() -> Value {
    json!({"chunk_rows": 500, "copy_workers": 2})
}

/// Clients on the first shape, and more doors where they are open; they come back after a crash.
struct Writers {
    tokens: Tokens,
    journal: Journal,
}

static WRITERS: AtomicUsize = AtomicUsize::new(0);

impl Writers {
    fn start(pair: &Pair, more: &[Door]) -> Self {
        let mut doors = vec![Door::first(pair), Door::first(pair)];
        doors.extend_from_slice(more);
        let seed = tokens::seed();
        // Two of them may start within the second that the seed is made of; their entries must not look the same.
        let number = WRITERS.fetch_add(1, Ordering::Relaxed);
        Self {
            tokens: Tokens::start(&doors, seed),
            journal: Journal::start(pair, 1, &format!("writer {seed}.{number}")),
        }
    }

    /// Waits until all of them have got something done since now.
    fn until_busy(&self) {
        self.tokens.until_acked(10);
        self.journal.until_acked(10);
    }

    /// Ends them, and compares both stores with each other and with what they were told. `suffix` as in [`tokens::Stopped::check`].
    fn check(self, pair: &Pair, migration: &Migration, suffix: &str) {
        let (ledger, acked) = (self.tokens.stop(), self.journal.stop());
        migration.settle();
        let summary = ledger.check(pair, migration, &format!("trail{suffix}"));
        println!("{:?}", summary.unwrap_or_else(|wrong| panic!("{wrong}")));
        journal::check(pair, &format!("journal{suffix}"), &acked);
    }
}

/// Waits until the armed fault has struck and the server accepts connections again.
fn struck(pair: &Pair, point: &str) {
    until(&format!("a process reaches {point}"), SOON, || !pair.first.fault_is_armed());
    pair.first.connect_soon();
}

#[test]
fn start_and_copy() {
    let pair = pair();
    let before = (pair.first.pg_dump_schema("app"), pair.second.pg_dump_schema("app"));
    for point in ["start:capture", "start:peer", "start:ready", "copy:claimed", "copy:sent", "copy:committed"] {
        println!("{point}");
        let migration = Migration::named(&pair, "rail");
        let writers = Writers::start(&pair, &[]);
        pair.first.fault(&format!("{point} kill"));
        match migration.try_start(&mapping(), &options()) {
            Ok(_) => {}
            Err(e) if is_disconnect(&e) => {}
            Err(e) => panic!("{point}: {}", explain(&e)),
        }
        struck(&pair, point);
        // The old state (nothing was started, nothing is left) or the new one (it goes on by itself).
        // The fault is taken before it strikes: the server may be going down just now, and no answer is not "none".
        let state: String = until_some("the server says the state", SOON, || {
            let query = "SELECT state::text FROM migration_status WHERE name = 'rail'";
            let row = pair.first.try_connect().ok()?.query_opt(query, &[]).ok()?;
            Some(row.map_or_else(|| "none".into(), |row| row.get(0)))
        });
        match state.as_str() {
            "none" | "cancelled" => {
                assert!(traces(&pair.first).is_empty() && traces(&pair.second).is_empty(), "{point}: half a start");
                migration
                    .try_start(&mapping(), &options())
                    .unwrap_or_else(|e| panic!("{point}, again: {}", explain(&e)));
            }
            "copying" | "first" => {}
            other => panic!("{point}: the state is {other}"),
        }
        migration.until_state("first");
        writers.until_busy();
        writers.check(&pair, &migration, "");
        migration.cancel();
        assert_same_dump("the first database", &before.0, &pair.first.pg_dump_schema("app"));
        assert_same_dump("the second database", &before.1, &pair.second.pg_dump_schema("app"));
        pair.second.sql("TRUNCATE rail.path, ledger.entry");
    }
}

#[test]
fn cycles() {
    let pair = pair();
    let migration = Migration::start_with(&pair, "rail", &mapping(), &options());
    migration.until_state("first");
    let writers = Writers::start(&pair, &[]);
    for point in ["cycle:read", "cycle:flushed", "cycle:second-written", "cycle:second-committed"] {
        for action in ["kill", "error"] {
            println!("first, {point} {action}");
            pair.first.fault(&format!("{point} {action}"));
            struck(&pair, point);
            writers.until_busy();
        }
    }
    writers.check(&pair, &migration, "");

    migration.set_state("both");
    let writers = Writers::start(&pair, &[Door::second(&pair), Door::second_view(&pair)]);
    for point in [
        "cycle:read",
        "cycle:flushed",
        "cycle:first-written",
        "cycle:first-committed",
        "cycle:second-written",
        "cycle:second-committed",
    ] {
        for action in ["kill", "error"] {
            println!("both, {point} {action}");
            pair.first.fault(&format!("{point} {action}"));
            struck(&pair, point);
            writers.until_busy();
        }
    }
    writers.check(&pair, &migration, "__first");

    migration.set_state("second");
    let writers = Writers::start(&pair, &[Door::second_view(&pair)]);
    for point in ["cycle:read", "cycle:flushed", "cycle:first-written", "cycle:first-committed"] {
        println!("second, {point} kill");
        pair.first.fault(&format!("{point} kill"));
        struck(&pair, point);
        writers.until_busy();
    }
    writers.check(&pair, &migration, "__first");
    migration.finish();
}

/// The phases of a migration that has nothing half done.
fn is_at_rest(phase: &str) -> bool {
    !matches!(phase, "switching" | "fence pending" | "setting up" | "finishing" | "cancelling")
}

/// Asks for `to` with a fault armed, or whatever `disturb` does instead, then insists on `to`.
fn arrive(pair: &Pair, migration: &Migration, from: &str, to: &str, what: &str) {
    let status = migration.until_status("is at rest again", |status| is_at_rest(&status.phase()));
    let state = status.state();
    assert!(state == from || state == to, "{what}: between {from} and {to} it is {state}");
    if state == from {
        migration.set_state(to);
    }
    assert!(!pair.first.fault_is_armed(), "{what}: the fault is still armed");
}

#[test]
fn switches() {
    let pair = pair();
    let migration = Migration::start_with(&pair, "rail", &mapping(), &options());
    migration.until_state("first");
    let writers = Writers::start(&pair, &[]);
    let points =
        ["switch:begin", "switch:locked", "switch:drained", "switch:first-committed", "switch:second-committed"];
    let mut reached = BTreeSet::new();
    for point in points {
        for to in ["both", "second", "both", "first"] {
            let from = migration.state();
            let what = format!("{from} to {to}, {point}");
            pair.first.fault(&format!("{point} kill"));
            match migration.try_set_state(to, SOON) {
                // This direction does not pass the point, or dies there after its answer.
                Ok(_) => println!("{what}: it answered"),
                Err(e) if is_disconnect(&e) => println!("{what}: it died"),
                Err(e) => panic!("{what}: {}", explain(&e)),
            }
            if !pair.first.disarm() {
                reached.insert(point);
            }
            arrive(&pair, &migration, &from, to, &what);
            writers.until_busy();
        }
    }
    assert_eq!(reached.len(), points.len(), "no switch passes some of the points: {reached:?}");
    writers.check(&pair, &migration, "__first");
    migration.walk(&["both", "second"]);
    migration.finish();
}

/// How the backend that waits for a switch may go.
#[derive(Debug, Clone, Copy)]
enum Gone {
    /// The operator's Ctrl-C.
    Cancelled,
    /// `pg_terminate_backend`.
    Terminated,
    /// `kill -9`, and with it every connection of the server.
    Killed,
}

#[test]
fn the_backend_that_waits_for_a_switch() {
    let pair = pair();
    let migration = Migration::start_with(&pair, "rail", &mapping(), &options());
    migration.until_state("first");
    pair.first.sql("INSERT INTO trail VALUES (99, '0.0.0;')");
    let writers = Writers::start(&pair, &[]);
    for gone in [Gone::Cancelled, Gone::Terminated, Gone::Killed] {
        for to in ["both", "second", "both", "first"] {
            let from = migration.state();
            let what = format!("{from} to {to}, waiting backend {gone:?}");
            println!("{what}");
            let mut in_the_way = pair.first.connect_soon();
            let mut transaction = in_the_way.transaction().expect("a transaction");
            // A switch to `first` takes writers from the second store only.
            let write = match to {
                "first" => "UPDATE path SET path = path || '0.0.0;' WHERE ident = 99",
                _ => "UPDATE trail SET trail = trail || '0.0.0;' WHERE id = 99",
            };
            transaction.execute(write, &[]).expect("an update");
            let mut operator = pair.first.connect();
            let pid: i32 = operator.query_one("SELECT pg_backend_pid()", &[]).expect("a pid").get(0);
            thread::scope(|scope| {
                let waiting = scope.spawn(|| set_state(&mut operator, migration.name(), to, Duration::from_secs(60)));
                migration.until_status("is switching", |status| status.phase() == "switching");
                match gone {
                    Gone::Cancelled => pair.first.sql(&format!("SELECT pg_cancel_backend({pid})")),
                    Gone::Terminated => pair.first.sql(&format!("SELECT pg_terminate_backend({pid})")),
                    Gone::Killed => assert!(process::signal(pid, process::KILL)),
                }
                waiting.join().expect("the operator").expect_err("the operator is gone");
            });
            // The writer in the way is done now; whether the switch has been given up is the extension's to decide.
            match (gone, transaction.commit()) {
                (Gone::Killed, _) => {}
                (_, result) => result.unwrap_or_else(|e| panic!("{what}: {}", explain(&e))),
            }
            arrive(&pair, &migration, &from, to, &what);
            writers.until_busy();
        }
    }
    writers.check(&pair, &migration, "__first");
    migration.cancel();
}

#[test]
fn finish_and_cancel() {
    let pair = pair();
    let before = (pair.first.pg_dump_schema("app"), pair.second.pg_dump_schema("app"));
    let end = |verb: &str, state: &str| {
        let migration = Migration::named(&pair, "rail");
        let point = format!("{verb}:committed");
        pair.first.fault(&format!("{point} kill"));
        match migration.try_end(verb) {
            Ok(_) => {}
            Err(e) if is_disconnect(&e) => {}
            Err(e) => panic!("{point}: {}", explain(&e)),
        }
        struck(&pair, &point);
        migration.until_status(&format!("is {state} and done"), |s| s.state() == state && s.phase() == "done");
    };
    for path in [&[] as &[&str], &["both", "first"]] {
        let migration = Migration::start_with(&pair, "rail", &mapping(), &options());
        migration.until_state("first");
        migration.walk(path);
        end("cancel", "cancelled");
        assert_same_dump("the first database", &before.0, &pair.first.pg_dump_schema("app"));
        assert_same_dump("the second database", &before.1, &pair.second.pg_dump_schema("app"));
        pair.second.sql("TRUNCATE rail.path, ledger.entry");
    }
    let migration = Migration::start_with(&pair, "rail", &mapping(), &options());
    migration.until_state("first");
    let writers = Writers::start(&pair, &[]);
    migration.walk(&["both", "second"]);
    writers.check(&pair, &migration, "__first");
    end("finish", "finished");
    assert_eq!(traces(&pair.first), [""; 0]);
    assert_same_dump("the second database", &before.1, &pair.second.pg_dump_schema("app"));
}

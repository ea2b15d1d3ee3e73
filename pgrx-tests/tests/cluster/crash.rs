//! A crash at every named step, in every state that has it, under writers: the migration goes on by itself, and nothing is lost, doubled
//! or half done. At each step the process itself is killed (and with it the first server), or the second server, or the step fails.

use std::collections::BTreeSet;
use std::thread;
use std::time::Duration;

use pgrx_tests::cluster::{Stop, explain};
use pgrx_tests::migration::set_state;
use pgrx_tests::schema::traces;
use pgrx_tests::tokens;
use pgrx_tests::wait::{LONG, SOON, until, until_some};
use pgrx_tests::writers::{
    self, Generation, NAME, Untouched, Writers, any_end, at_rest, held_process, until_replicated,
};
use pgrx_tests::{Migration, Pair, process};
use serde_json::json;

/// Which steps are passed where: what each of the tests below goes through, point by point.
mod steps {
    pub const START: &[&str] = &[
        "clerk:begun",
        "clerk:filing",
        "clerk:filed",
        "request:taken",
        "cleanup:triggers",
        "start:peer",
        "start:capture",
        "start:watermark",
        "start:ready",
        "request:answering",
    ];
    pub const UNDO: &[&str] = &["undo:first", "undo:second"];
    pub const COPY: &[&str] = &["copy:claimed", "copy:sent", "copy:committed"];
    pub const END_OF_COPY: &[&str] = &["copy:complete", "copy:caught-up"];
    pub const COPY_AGAIN: &[&str] = &["resync:dropped", "resync:emptied", "resync:begun"];
    pub const FIRST: &[&str] = &[
        "cycle:read",
        "cycle:flushed",
        "cycle:second-written",
        "cycle:second-committed",
        "rotate:first",
        "capture:renewed",
    ];
    pub const BOTH: &[&str] = &[
        "cycle:read",
        "cycle:flushed",
        "cycle:first-written",
        "cycle:first-committed",
        "cycle:second-written",
        "cycle:second-committed",
        "cycle:put-off",
        "rotate:first",
        "capture:renewed",
    ];
    pub const SECOND: &[&str] = &[
        "cycle:read",
        "cycle:flushed",
        "cycle:first-written",
        "cycle:first-committed",
        "cycle:put-off",
        "rotate:first",
        "capture:renewed",
    ];
    pub const OPEN: &[&str] = &[
        "switch:begin",
        "switch:opening",
        "switch:second-committed",
        "switch:locked",
        "switch:moved",
        "switch:first-committed",
    ];
    pub const MOVE: &[&str] = &[
        "switch:begin",
        "switch:locked",
        "switch:drained",
        "switch:second-committed",
        "switch:moved",
        "switch:first-committed",
    ];
    pub const CONFLICT: &[&str] = &["conflict:copied"];
    pub const REQUEST: &[&str] = &["clerk:begun", "clerk:filing", "clerk:filed", "request:taken", "request:answering"];
    pub const CANCEL: &[&str] =
        &["end:moved", "cancel:committed", "cleanup:triggers", "cleanup:peer", "request:answering"];
    pub const FINISH: &[&str] =
        &["end:moved", "finish:committed", "cleanup:triggers", "cleanup:peer", "request:answering"];
    pub const RESTART: &[&str] = &["scout:begun"];
    pub const RECONCILE: &[&str] = &["reconcile:first", "reconcile:second"];

    pub const ALL: &[&[&str]] = &[
        START,
        UNDO,
        COPY,
        END_OF_COPY,
        COPY_AGAIN,
        FIRST,
        BOTH,
        SECOND,
        OPEN,
        MOVE,
        CONFLICT,
        REQUEST,
        CANCEL,
        FINISH,
        RESTART,
        RECONCILE,
    ];
}

#[test]
fn no_step_is_forgotten() {
    let source = include_str!("../../../src/fault.rs");
    let list =
        source.split_once("POINTS: &[&str] = &[").and_then(|(_, rest)| rest.split_once("];")).expect("the list").0;
    let named: BTreeSet<&str> = list.split('"').skip(1).step_by(2).collect();
    let tested: BTreeSet<&str> = steps::ALL.iter().copied().flatten().copied().collect();
    assert_eq!(named, tested, "the steps that the source names, and those that the tests go through");
}

/// What happens at a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Blow {
    /// The process that comes to it is killed with -9; PostgreSQL then throws everybody out and recovers.
    Kill,
    /// The process is held while the second server is stopped at once, and started again.
    SecondServer,
    /// The step fails.
    Error,
}

const BLOWS: [Blow; 3] = [Blow::Kill, Blow::SecondServer, Blow::Error];

impl Blow {
    /// Strikes the next process that comes to `point`, which `provoke` sees to. What that returns does not count, but its panics do.
    fn strike(self, pair: &Pair, point: &str, provoke: impl FnOnce() + Send) {
        let verb = match self {
            Blow::Kill => "kill",
            Blow::SecondServer => "stop",
            Blow::Error => "error",
        };
        let old = Generation::of(&pair.first);
        pair.first.fault(&format!("{point} {verb}"));
        thread::scope(|scope| {
            let provoked = scope.spawn(provoke);
            until(&format!("a process comes to {point}"), LONG, || !pair.first.fault_is_armed());
            match self {
                Blow::Kill => old.until_replaced(&pair.first),
                Blow::SecondServer => {
                    let held = until_some("it is held", SOON, || held_process(&pair.first));
                    pair.second.restart(Stop::Immediate);
                    process::signal(held, process::CONTINUE);
                }
                Blow::Error => {}
            }
            provoked.join().unwrap_or_else(|_| panic!("{point} {self:?}"));
        });
    }
}

#[test]
fn starts() {
    let pair = writers::pair(1000);
    let before = Untouched::of(&pair);
    let writers = Writers::start(&pair);
    let migration = Migration::named(&pair, NAME);
    let mut options = json!({"chunk_rows": 500, "copy_workers": 2});
    for (i, point) in steps::START.iter().enumerate() {
        for (j, blow) in BLOWS.into_iter().enumerate() {
            options["takeover"] = if (i + j) % 2 == 0 { "start" } else { "both" }.into();
            let what = format!("start, {point} {blow:?}, takeover {}", options["takeover"]);
            blow.strike(&pair, point, || any_end(&what, migration.try_start(&writers::mapping(), &options)));
            // The old state (nothing was started, nothing is left) or the new one (it goes on by itself).
            match at_rest(&pair, &what).as_str() {
                "none" | "cancelled" => {
                    assert_eq!((traces(&pair.first), traces(&pair.second)), (vec![], vec![]), "{what}")
                }
                "copying" | "first" => migration.cancel(),
                other => panic!("{what}: the state is {other}"),
            }
            pair.second.sql("TRUNCATE rail.path, ledger.entry");
        }
    }
    for point in steps::UNDO {
        for blow in BLOWS {
            let what = format!("start in vain, {point} {blow:?}");
            let mut in_the_way = pair.first.connect_soon();
            let mut transaction = in_the_way.transaction().expect("a transaction");
            transaction.batch_execute("INSERT INTO trail VALUES (99, '')").expect("an insert");
            blow.strike(&pair, point, || {
                let call = "SELECT migration_start($1, $2::jsonb, $3::jsonb, '5 seconds')::text";
                let mut client = pair.first.connect_soon();
                let result = client.query_one(call, &[&NAME, &writers::mapping(), &options]);
                any_end(&what, result.map(|row| row.get(0)));
            });
            assert!(matches!(at_rest(&pair, &what).as_str(), "none" | "cancelled"), "{what}: it has started");
            assert_eq!((traces(&pair.first), traces(&pair.second)), (vec![], vec![]), "{what}");
        }
    }
    migration.try_start(&writers::mapping(), &options).unwrap_or_else(|e| panic!("{}", explain(&e)));
    migration.until_state("first");
    writers.until_busy();
    writers.check(&pair, &migration, "");
    migration.cancel();
    before.assert_again(&pair);
}

#[test]
fn copies() {
    let pair = writers::pair(5000);
    let before = Untouched::of(&pair);
    let writers = Writers::start(&pair);
    let migration = Migration::named(&pair, NAME);
    // It is not complete before it may be, however long the blows take: more than two minutes at this rate.
    let options = json!({"chunk_rows": 50, "copy_workers": 2, "copy_rate": 40});
    migration.try_start(&writers::mapping(), &options).unwrap_or_else(|e| panic!("{}", explain(&e)));
    for blow in BLOWS {
        for point in steps::COPY {
            println!("copying, {point} {blow:?}");
            blow.strike(&pair, point, || {});
            assert_eq!(migration.state(), "copying");
            writers.until_busy();
        }
    }
    requests(&pair, &migration);
    assert_eq!(migration.state(), "copying");
    pair.first.sql("UPDATE crossover.migration SET options = '{\"chunk_rows\": 500, \"copy_workers\": 2}'");
    let mut ends = steps::END_OF_COPY.iter().flat_map(|point| BLOWS.map(|blow| (point, blow)));
    let (point, blow) = ends.next().expect("an end");
    println!("copying, {point} {blow:?}");
    blow.strike(&pair, point, || {});
    migration.until_state("first");
    until_replicated(&pair, "first");
    // From here on it copies again and again.
    for (point, blow) in ends.chain(steps::COPY_AGAIN.iter().flat_map(|point| BLOWS.map(|blow| (point, blow)))) {
        let what = format!("copying again, {point} {blow:?}");
        blow.strike(&pair, point, || any_end(&what, migration.try_set_state("copying", SOON)));
        migration.until_state("first");
        until_replicated(&pair, "first");
        writers.until_busy();
    }
    writers.check(&pair, &migration, "");
    migration.cancel();
    before.assert_again(&pair);
}

/// Strikes at the steps of a request, whatever it is, in the present state.
fn requests(pair: &Pair, migration: &Migration) {
    for point in steps::REQUEST {
        println!("{}, {point}", migration.state());
        Blow::Kill.strike(pair, point, || {
            let mut client = pair.first.connect_soon();
            let result = client.query_one("SELECT migration_pause($1)::text", &[&NAME]);
            any_end("pause", result.map(|row| row.get(0)));
        });
        migration.call("resume");
    }
}

/// A trigger that was off for a while, although nobody wrote meanwhile: capture is renewed.
fn off_and_on(table: &str) -> String {
    let trigger = "crossover_capture_delete";
    format!("ALTER TABLE {table} DISABLE TRIGGER {trigger}; ALTER TABLE {table} ENABLE ALWAYS TRIGGER {trigger}")
}

#[test]
fn cycles() {
    let pair = writers::pair(500);
    let before = Untouched::of(&pair);
    let migration = Migration::start_with(&pair, NAME, &writers::mapping(), &json!({}));
    migration.until_state("first");
    for (state, points) in [("first", steps::FIRST), ("both", steps::BOTH), ("second", steps::SECOND)] {
        migration.set_state(state);
        let writers = Writers::start_in(&pair, state);
        for point in points {
            for blow in BLOWS {
                println!("{state}, {point} {blow:?}");
                blow.strike(&pair, point, || match *point {
                    // It rotates at its start, then every ten seconds.
                    "rotate:first" => pair.first.sql(&format!("SELECT pg_terminate_backend({})", migration.worker())),
                    "capture:renewed" if state == "first" => pair.first.sql(&off_and_on("journal")),
                    // All rows of the table are to be compared then, too.
                    "capture:renewed" | "cycle:put-off" => pair.second.sql(&off_and_on("ledger.entry")),
                    _ => {}
                });
                writers.until_busy();
                until_replicated(&pair, state);
            }
        }
        requests(&pair, &migration);
        for point in steps::RESTART {
            for blow in BLOWS {
                // After an error it takes ten seconds, in each state the same.
                if blow == Blow::Error && state != "second" {
                    continue;
                }
                println!("{state}, {point} {blow:?}");
                // Armed while the server is down: a scout of before would take the fault, and PostgreSQL 15 and 18 hang when a fast
                // shutdown is requested between the reinitialization after a crash and the start of redo.
                pair.first.stop(Stop::Fast);
                blow.strike(&pair, point, || pair.first.start());
                writers.until_busy();
                until_replicated(&pair, state);
            }
        }
        writers.check(&pair, &migration, if state == "first" { "" } else { "__first" });
    }
    migration.walk(&["both", "first"]);
    migration.cancel();
    before.assert_again(&pair);
}

/// Moves the migration to `to`, with a blow at `point` on the way; whether it came to that point.
fn strike_a_switch(pair: &Pair, migration: &Migration, to: &str, point: &str, blow: Blow) {
    let from = migration.state();
    let what = format!("{from} to {to}, {point} {blow:?}");
    blow.strike(pair, point, || any_end(&what, migration.try_set_state(to, SOON)));
    let state = at_rest(pair, &what);
    assert!(state == from || state == to, "{what}: between {from} and {to} it is {state}");
    if state == from {
        migration.set_state(to);
    }
}

fn switches(blows: &[Blow]) {
    let pair = writers::pair(500);
    let before = Untouched::of(&pair);
    let migration = Migration::start_with(&pair, NAME, &writers::mapping(), &json!({}));
    migration.until_state("first");
    let writers = Writers::start(&pair);
    for blow in blows {
        for (open, point) in steps::OPEN.iter().zip(steps::MOVE) {
            for (to, point) in [("both", open), ("second", point), ("both", point), ("first", point)] {
                strike_a_switch(&pair, &migration, to, point, *blow);
                writers.until_busy();
                until_replicated(&pair, to);
            }
        }
    }
    writers.check(&pair, &migration, "__first");
    migration.cancel();
    before.assert_again(&pair);
}

#[test]
fn switches_killed() {
    switches(&[Blow::Kill]);
}

#[test]
fn switches_without_the_second_server() {
    switches(&[Blow::SecondServer, Blow::Error]);
}

/// Makes the migration diverge, as a source that has lost the commits which its counter stood for would.
fn diverge(pair: &Pair, migration: &Migration, state: &str) {
    let tag = pair.first.text("SELECT tag FROM crossover.migration").expect("a tag");
    until("the migration has diverged", SOON, || {
        // A cycle that was on its way sets the mark once more.
        match state {
            "second" => pair.first.sql(&format!("UPDATE crossover.mark_{tag} SET counter = counter + 1000000")),
            _ => pair.second.sql(&format!("UPDATE crossover_peer.mark_{tag} SET counter = counter + 1000000")),
        }
        migration.status().phase() == "diverged"
    });
}

#[test]
fn reconciliations() {
    let pair = writers::pair(200);
    let before = Untouched::of(&pair);
    let migration = Migration::start_with(&pair, NAME, &writers::mapping(), &json!({}));
    migration.until_state("first");
    for state in ["first", "both", "second"] {
        migration.set_state(state);
        let writers = Writers::start_in(&pair, state);
        for point in steps::RECONCILE {
            for blow in BLOWS {
                let what = format!("{state}, {point} {blow:?}");
                println!("{what}");
                diverge(&pair, &migration, state);
                writers.until_busy();
                blow.strike(&pair, point, || {
                    let call = "SELECT migration_set_state($1, $2::text::migration_state, force => true)::text";
                    let mut client = pair.first.connect();
                    any_end(&what, client.query_one(call, &[&NAME, &state]).map(|row| row.get(0)));
                });
                migration.until_status("replicates again", |s| s.phase() == "replicating");
                assert_eq!(migration.state(), state, "{what}");
                writers.until_busy();
                until_replicated(&pair, state);
            }
        }
        writers.check(&pair, &migration, if state == "first" { "" } else { "__first" });
    }
    migration.walk(&["both", "first"]);
    migration.cancel();
    before.assert_again(&pair);
}

#[test]
fn conflicts_of_a_switch() {
    let pair = writers::pair(500);
    let migration = Migration::start_with(&pair, NAME, &writers::mapping(), &json!({}));
    migration.until_state("first");
    pair.first.sql("INSERT INTO trail VALUES (99, '')");
    let mut tokens = 0;
    for point in steps::CONFLICT {
        for blow in BLOWS {
            migration.set_state("both");
            // Both stores change a row between the last cycle and the switch's locks: the switch records the conflict on second.
            pair.first.fault("switch:begin stop");
            thread::scope(|scope| {
                let operator = scope.spawn(|| migration.try_set_state("second", SOON));
                let held = until_some("the switch is held", SOON, || held_process(&pair.first));
                tokens += 1;
                pair.first.sql(&format!("UPDATE trail SET trail = 'first {tokens}' WHERE id = 99"));
                pair.second.sql(&format!("UPDATE rail.path SET path = '<second {tokens}>' WHERE ident = 99"));
                blow.strike(&pair, point, || {
                    process::signal(held, process::CONTINUE);
                });
                any_end("second", operator.join().expect("the operator"));
            });
            migration.settle();
            let images = |c: &serde_json::Value| format!("{} {}", c["first_image"], c["second_image"]);
            let ours = |c: &serde_json::Value| {
                images(c).contains(&format!("first {tokens}")) && images(c).contains(&format!("second {tokens}"))
            };
            until(&format!("the conflict is known, {point} {blow:?}"), SOON, || migration.conflicts().iter().any(ours));
            assert_eq!(migration.conflicts().iter().filter(|c| ours(c)).count(), 1, "{point} {blow:?}");
            assert_eq!(at_rest(&pair, "the switch"), "second");
        }
    }
    migration.finish();
}

/// A migration that has gone through the states of `path`.
fn arrived<'a>(pair: &'a Pair, path: &[&str]) -> Migration<'a> {
    let migration = Migration::start_with(pair, NAME, &writers::mapping(), &json!({}));
    migration.until_state("first");
    migration.walk(path);
    migration
}

/// Ends the migration by `call`, with a blow at `point` on the way.
fn strike_an_end(pair: &Pair, migration: &Migration, point: &str, blow: Blow, call: &str) {
    let what = format!("{call}, {point} {blow:?}");
    let end = || pair.first.connect_soon().query_one(call, &[&NAME]).map(|row| row.get::<_, String>(0));
    blow.strike(pair, point, || any_end(&what, end()));
    let state = migration
        .until_status("has ended, or not", |status| status.phase() == "done" || status.phase() == "replicating");
    if state.phase() != "done" {
        // The old state: nothing has changed, and it can be ended.
        end().unwrap_or_else(|e| panic!("{what}, again: {}", explain(&e)));
    }
    migration.until_status(&format!("has ended ({what})"), |status| status.phase() == "done");
}

#[test]
fn cancels() {
    let pair = writers::pair(200);
    let before = Untouched::of(&pair);
    let writers = Writers::start(&pair);
    for (i, point) in steps::CANCEL.iter().enumerate() {
        for (j, blow) in BLOWS.into_iter().enumerate() {
            // Before and after it was taken over, in turn.
            let path: &[&str] = if (i + j) % 2 == 0 { &["both", "first"] } else { &[] };
            strike_an_end(&pair, &arrived(&pair, path), point, blow, "SELECT migration_cancel($1)::text");
            writers.until_busy();
            before.assert_no_trace(&pair);
            pair.second.sql("TRUNCATE rail.path, ledger.entry");
        }
    }
    writers.check_first(&pair);
    before.assert_again(&pair);
}

#[test]
fn finishes() {
    let pair = writers::pair(200);
    for point in steps::FINISH {
        for blow in BLOWS {
            let before = Untouched::of(&pair);
            let writers = Writers::start(&pair);
            let migration = arrived(&pair, &["both", "second"]);
            strike_an_end(&pair, &migration, point, blow, "SELECT migration_finish($1)::text");
            writers.until_busy();
            writers.check_second(&pair);
            before.assert_second_again(&pair);
            writers::begin_anew(&pair);
        }
    }
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
    let pair = writers::pair(500);
    let migration = Migration::start_with(&pair, NAME, &writers::mapping(), &json!({}));
    migration.until_state("first");
    pair.first.sql("INSERT INTO trail VALUES (99, '')");
    let writers = Writers::start(&pair);
    for gone in [Gone::Cancelled, Gone::Terminated, Gone::Killed] {
        for to in ["both", "second", "both", "first"] {
            let from = migration.state();
            let what = format!("{from} to {to}, waiting backend {gone:?}");
            println!("{what}");
            let mut in_the_way = pair.first.connect_soon();
            let mut transaction = in_the_way.transaction().expect("a transaction");
            // From the second time on, a switch between `first` and `both` waits for users of the second shape only.
            if pair.first.text("SELECT to_regclass('path')::text").is_some() {
                transaction.query("SELECT FROM path", &[]).expect("a look at the second shape");
            }
            let write = match to {
                "first" => "UPDATE path SET path = path || 'x' WHERE ident = 99",
                _ => "UPDATE trail SET trail = trail || 'x' WHERE id = 99",
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
            let state = at_rest(&pair, &what);
            assert!(state == from || state == to, "{what}: between {from} and {to} it is {state}");
            if state == from {
                migration.set_state(to);
            }
            writers.until_busy();
        }
    }
    writers.check(&pair, &migration, "__first");
    migration.cancel();
}

#[test]
fn finishes_that_drop_the_first_tables() {
    let pair = Pair::new();
    pair.expect_crashes();
    tokens::create(&pair);
    for point in steps::FINISH {
        pair.first.sql("INSERT INTO trail VALUES (1, 'one')");
        let before = Untouched::of(&pair);
        let migration = Migration::start(&pair, NAME, &json!({"tables": [tokens::mapping()]}));
        migration.until_state("first");
        migration.walk(&["both", "second"]);
        let call = "SELECT migration_finish($1, drop_first => true)::text";
        strike_an_end(&pair, &migration, point, Blow::Kill, call);
        before.assert_second_again(&pair);
        assert_eq!(pair.first.list("SELECT relname FROM pg_class WHERE relname = 'trail__first'"), [""; 0]);
        assert_eq!(pair.first.text("SELECT trail FROM trail").as_deref(), Some("one"));
        pair.second.sql("TRUNCATE rail.path");
        pair.first.sql(
            "DROP VIEW path, trail, trail__write; DROP FUNCTION trail__write;
             CREATE TABLE trail (id integer PRIMARY KEY, trail text NOT NULL)",
        );
    }
}

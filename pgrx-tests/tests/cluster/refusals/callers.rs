//! Callers that are in their own way, in each other's, or on the wrong server.

use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use pgrx_tests::cluster::Stop;
use pgrx_tests::wait::{SOON, until};
use pgrx_tests::{Migration, Pair, Witness, market};
use postgres::Error;
use serde_json::json;

use super::{CALLS, Expected, bench, one, start};

#[test]
fn odd_callers() {
    let mut bench = bench();
    let witness = Witness::of(&bench.pair.first);
    let begin = |transaction: &str| {
        let mut client = bench.pair.first.connect();
        client.batch_execute(transaction).expect("a transaction");
        client
    };
    let patient = |call: &str| call.replace(", '{}')", ", '{}', '100 s')");
    let all = start(&one("s1.t", "f2.t", &json!({})));

    let read_only = |function: &str| {
        let hint =
            "Call it in a transaction that is READ WRITE; see default_transaction_read_only for what new ones are.";
        Expected::new("25006", &format!("cannot execute {function}() in a read-only transaction"), "", hint)
    };
    bench.refuses_on(&mut begin("BEGIN READ ONLY"), "read only", &all, &read_only("migration_start"));
    bench.refuses_on(
        &mut begin("SET default_transaction_read_only = on"),
        "read only by default",
        &all,
        &read_only("migration_start"),
    );

    // Locks of the caller's own. The error comes at once: they would still be there at the end of the timeout.
    let own = "The state has not changed. Locks of the transaction that calls are in the way: commit it, and call outside of it.";
    let detail = "In the way:\npid … (the session that called) on the first server, application \"\", role postgres, active, transaction open for … s, …";
    let locked = |name: &str| {
        Expected::new(
            "55P03",
            &format!("could not lock out the writers of migration \"{name}\" within … ms"),
            detail,
            own,
        )
    };
    let soon = |what: &str, refused: &mut dyn FnMut()| {
        let began = Instant::now();
        refused();
        assert!(began.elapsed() < Duration::from_secs(60), "{what}: it has waited for itself");
    };
    for transaction in [
        "BEGIN; UPDATE s1.t SET amount = 3",
        "BEGIN; LOCK TABLE s1.t IN ROW EXCLUSIVE MODE",
        "BEGIN; LOCK TABLE s1.t IN EXCLUSIVE MODE",
        "BEGIN; LOCK TABLE s1.t IN ACCESS EXCLUSIVE MODE",
        "BEGIN; TRUNCATE s1.t",
        "BEGIN; ALTER TABLE s1.t ADD more integer",
    ] {
        let mut client = begin(transaction);
        // The observer would wait for the lock as well.
        let error = client.batch_execute(&patient(&all));
        client.batch_execute("ROLLBACK").expect("a rollback");
        let error = error.expect_err(transaction);
        locked("refused").check(transaction, &error);
        bench.is_as_before(transaction);
    }
    // A reader is in nobody's way.
    let mut client = begin("BEGIN; SELECT FROM s1.t");
    client.batch_execute(&patient(&all.replace("refused", "reader"))).expect("a start");
    client.batch_execute("COMMIT").expect("a commit");
    let migration = Migration::named(&bench.pair, "reader");
    migration.until_state("first");
    migration.wait();
    bench.is_live = true;
    bench.set_up();
    let to = |state: &str| format!("SELECT migration_set_state('reader', '{state}', '100 s')");
    // But of the takeover, and of what follows.
    soon("takeover", &mut || {
        bench.refuses_on(&mut begin("BEGIN; SELECT FROM s1.t"), "takeover", &to("both"), &locked("reader"))
    });
    soon("cancel", &mut || {
        bench.refuses_on(
            &mut begin("BEGIN; SELECT FROM s1.t"),
            "cancel",
            "SELECT migration_cancel('reader', '100 s')",
            &locked("reader"),
        );
    });
    migration.set_state("both");
    bench.set_up();
    soon("second", &mut || {
        bench.refuses_on(&mut begin("BEGIN; SELECT FROM s1.t"), "second", &to("second"), &locked("reader"))
    });
    migration.set_state("second");
    bench.set_up();
    soon("finish", &mut || {
        bench.refuses_on(
            &mut begin("BEGIN; SELECT FROM s1.t"),
            "finish",
            "SELECT migration_finish('reader', '100 s')",
            &locked("reader"),
        );
    });
    migration.walk(&["both", "first"]);
    migration.cancel();

    bench.set_up();
    let standby = bench.pair.first.standby("standby");
    let message = "migrations cannot be controlled on a standby";
    for call in CALLS.iter().map(|call| format!("SELECT {call}")).chain([all.clone()]) {
        bench.refuses_on(
            &mut standby.connect(),
            &format!("standby: {call}"),
            &call,
            &Expected::new("25006", message, "", "Call this on the primary server."),
        );
    }
    standby.stop(Stop::Immediate);
    witness.testify();
}

/// Starts of one name, or of one table, at once: one of them wins.
#[test]
fn two_starts_at_once() {
    let pair = Pair::new();
    market::create(&pair, 10);
    pair.first.sql("CREATE TABLE other (id bigint PRIMARY KEY)");
    pair.second_store("others", "CREATE TABLE other (id bigint PRIMARY KEY)");
    let witness = Witness::of(&pair.first);
    let (ours, others) = (market::mapping(), one("public.other", "others.other", &json!({})));
    for round in 0..8 {
        let barrier = Barrier::new(2);
        let results: Vec<Result<String, Error>> = thread::scope(|scope| {
            let threads = [&ours, &others].map(|mapping| {
                scope.spawn(|| {
                    barrier.wait();
                    Migration::named(&pair, "twin").try_start(mapping, &json!({"target": "truncate"}))
                })
            });
            threads.into_iter().map(|t| t.join().expect("a thread")).collect()
        });
        let errors: Vec<&Error> = results.iter().filter_map(|r| r.as_ref().err()).collect();
        let [error] = errors[..] else { panic!("round {round}: {results:?}") };
        Expected::new(
            "42710",
            "migration \"twin\" already exists",
            "",
            "Choose another name, or end the other migration with migration_finish or migration_cancel.",
        )
        .check(&format!("round {round}"), error);
        let migration = Migration::named(&pair, "twin");
        migration.until_state("first");
        migration.cancel();
    }
    witness.testify();
}

/// Moves of one migration are served one after the other, and each is judged by the state that it finds.
#[test]
fn two_moves_at_once() {
    let pair = Pair::new();
    market::create(&pair, 10);
    let witness = Witness::of(&pair.first);
    let migration = market::started(&pair);
    let mut writer = pair.first.connect();
    writer.batch_execute("BEGIN; UPDATE customer SET cents = 1 WHERE id = 1").expect("a writer");
    let queued = |n: usize| {
        let waiting = "SELECT count(*) FROM crossover.request WHERE status IN ('queued', 'running')";
        until("the requests are there", SOON, || pair.first.text(waiting) == Some(n.to_string()));
    };
    thread::scope(|scope| {
        let both = scope.spawn(|| migration.try_set_state("both", SOON));
        queued(1);
        // Allowed in first, which it is when it is called, and not in both.
        let copying = scope.spawn(|| migration.try_set_state("copying", SOON));
        queued(2);
        let again = scope.spawn(|| migration.try_set_state("both", SOON));
        queued(3);
        let second = scope.spawn(|| migration.try_set_state("second", SOON));
        queued(4);
        writer.batch_execute("COMMIT").expect("a commit");
        assert_eq!(both.join().expect("a thread").expect("the first move"), "both");
        let error = copying.join().expect("a thread").expect_err("a move from both");
        let hint = "From both these are allowed: SELECT migration_set_state('market', 'first'); SELECT migration_set_state('market', 'second');";
        Expected::new("55000", "migration \"market\" cannot go from both to copying", "", hint)
            .check("copying", &error);
        assert_eq!(again.join().expect("a thread").expect("no move"), "both");
        assert_eq!(second.join().expect("a thread").expect("the next move"), "second");
    });
    assert_eq!(migration.state(), "second");
    migration.walk(&["both", "first"]);
    migration.cancel();
    witness.testify();
}

//! A switch waits for open writers, for nobody longer than it may, and lets every blocked statement go on to the new store.

use std::thread;
use std::time::Duration;

use pgrx_tests::cluster::explain;
use pgrx_tests::migration::waited;
use pgrx_tests::wait::{SOON, Stopwatch, for_a, until};
use pgrx_tests::{Load, Migration, Pair, Witness, market, process};
use postgres::{Client, NoTls, Transaction};

/// `crossover.lock_attempt`, the longest that an attempt may hold clients up.
const LOCK_ATTEMPT: Duration = Duration::from_millis(200);
/// `crossover.max_pause`, the longest that a switch that succeeds may.
const MAX_PAUSE: Duration = Duration::from_secs(2);
/// What the processors of a busy machine may add.
const SLACK: Duration = Duration::from_millis(400);

const RING: [&str; 4] = ["both", "second", "both", "first"];

/// Clients that raise the first rows through the managed view, one cent a time, each its own rows.
fn raising(pair: &Pair) -> Load {
    Load::start(&pair.first.config("app"), 3, |client, round, connection| {
        let id = (client * 100 + (round % 100) as usize + 1) as i32;
        connection.execute("UPDATE customer SET cents = cents + 1 WHERE id = $1", &[&id]).map(drop)
    })
}

fn backend(client: &mut Client) -> i32 {
    client.query_one("SELECT pg_backend_pid()", &[]).expect("a pid").get(0)
}

/// Asserts that the last switch held clients up no longer than it may, as it measured that itself; `watch` is from before it.
fn assert_short_pause(migration: &Migration, watch: &Stopwatch) {
    let stalled = watch.stalled();
    let history = migration.history();
    let last = history.last().expect("a row");
    let pause = Duration::from_secs_f64(last["pause_ms"].as_f64().expect("the length of the pause") / 1000.0);
    assert!(pause.saturating_sub(stalled) <= MAX_PAUSE, "{last}, the machine stood still for {stalled:?}");
}

/// A connection that an operator recognises.
fn slowpoke(pair: &Pair) -> Client {
    pair.first.config("app").application_name("slowpoke").connect(NoTls).expect("a connection")
}

/// The same through the view of the second shape, with other rows.
fn raising_the_second_shape(pair: &Pair) -> Load {
    Load::start(&pair.first.config("app"), 2, |client, round, connection| {
        let id = (client * 100 + (round % 100) as usize + 501) as i32;
        connection.execute("UPDATE client SET balance = balance + 0.01 WHERE client_no = $1", &[&id]).map(drop)
    })
}

/// Opens a transaction that has raised the customer 999 by one cent, in the store that loses its writers in a switch to `to`: in
/// `both` the first shape reaches the first store and the second shape the second.
fn open_writer<'a>(client: &'a mut Client, to: &str) -> Transaction<'a> {
    let raise = match to {
        "first" => "UPDATE client SET balance = balance + 0.01 WHERE client_no = 999",
        _ => "UPDATE customer SET cents = cents + 1 WHERE id = 999",
    };
    let mut transaction = client.transaction().expect("a transaction");
    assert_eq!(transaction.execute(raise, &[]).expect("an update"), 1);
    transaction
}

#[test]
fn an_open_writer_holds_up_the_switch_and_nobody_else() {
    let pair = Pair::new();
    market::create(&pair, 1000);
    let witness = (Witness::of(&pair.first), Witness::of(&pair.second));
    let migration = market::started(&pair);
    let load = raising(&pair);
    let mut raised = 0;
    for to in RING {
        let (from, history) = (migration.state(), migration.history().len());
        let mut client = slowpoke(&pair);
        let pid = backend(&mut client);

        // It does not end in time.
        let writer = open_writer(&mut client, to);
        // The clients that the switch would take from their store, where they are not the first shape's.
        let second_shape = (to == "first").then(|| raising_the_second_shape(&pair));
        let timeout = Duration::from_secs(3);
        load.take();
        let began = Stopwatch::start();
        let error = migration.try_set_state(to, timeout).expect_err("an open writer is in the way");
        let took = began.elapsed();
        let text = explain(&error);
        println!("{from} to {to}: given up after {took:?}");
        let waited = waited(&error);
        assert!(waited <= timeout + MAX_PAUSE, "{from} to {to}: the switch took {waited:?}");
        let detail = error.as_db_error().and_then(|e| e.detail()).unwrap_or_default();
        assert!(detail.contains(&pid.to_string()), "{from} to {to}: the pid {pid} is not named: {text}");
        assert!(detail.contains("slowpoke"), "{from} to {to}: the application is not named: {text}");
        assert_eq!(migration.state(), from, "a switch that failed has changed the state");
        assert_eq!(migration.history().len(), history, "a switch that failed is in the history");
        let when = format!("while a switch from {from} to {to} was held up");
        load.take().assert_unhurt(&when, LOCK_ATTEMPT + SLACK);
        if let Some(second_shape) = second_shape {
            second_shape.stop().assert_unhurt(&format!("in the second shape, {when}"), LOCK_ATTEMPT + SLACK);
        }
        writer.commit().expect("a commit");

        // It ends in time: what it wrote is in the new store.
        let writer = open_writer(&mut client, to);
        let watch = Stopwatch::start();
        thread::scope(|scope| {
            let switch = scope.spawn(|| migration.set_state(to));
            migration.until_status("waits for the writer", |s| {
                s.phase() == "switching" && s.text("waiting_for").contains(&pid.to_string())
            });
            writer.commit().expect("a commit");
            switch.join().expect("the switch");
        });
        raised += 2;
        assert_short_pause(&migration, &watch);
        load.take().assert_unhurt(&format!("during the switch from {from} to {to}"), MAX_PAUSE + SLACK);
        if to == "second" {
            assert_eq!(market::cents_in_second(&pair, 999), raised, "in the second store, at once");
        } else if to == "first" {
            assert_eq!(market::cents_in_first(&pair, "customer", 999), raised, "in the first store, at once");
        }
        migration.settle();
        assert_eq!(market::cents_in_second(&pair, 999), raised);
        assert_eq!(market::cents_in_first(&pair, "customer__first", 999), raised);
        println!("{from} to {to}: {}", migration.history().last().expect("a row")["pause_ms"]);
    }
    migration.walk(&["both", "second"]);
    load.stop().assert_clean("at the end");
    migration.settle();
    market::assert_equal(&pair, "__first");
    migration.finish();
    witness.0.testify();
    witness.1.testify();
}

#[test]
fn a_prepared_transaction_in_the_way_is_named() {
    let pair = Pair::new();
    market::create(&pair, 10);
    let migration = market::started(&pair);
    pair.first.psql("BEGIN; UPDATE customer SET cents = 5 WHERE id = 1; PREPARE TRANSACTION 'left behind'");
    let error =
        migration.try_set_state("both", Duration::from_secs(5)).expect_err("a prepared transaction is in the way");
    assert!(explain(&error).contains("left behind"), "{}", explain(&error));
    assert_eq!(migration.state(), "first");
    pair.first.sql("COMMIT PREPARED 'left behind'");
    migration.set_state("both");
    migration.settle();
    assert_eq!(market::cents_in_second(&pair, 1), 5);
    migration.walk(&["first"]);
    migration.cancel();
    market::assert_equal(&pair, "");
}

/// What a client may be doing when the switch takes its locks.
#[derive(Debug, Clone, Copy)]
enum Blocked {
    /// Its statement is new to the server.
    Parsing,
    /// Its statement was prepared, and has run, before.
    Planning,
}

/// Runs `to` and stops the worker at `point` while `meanwhile` runs, which has to wait for something that is blocked itself.
fn held_at<T>(pair: &Pair, migration: &Migration, point: &str, to: &str, meanwhile: impl FnOnce(&dyn Fn()) -> T) -> T {
    let worker = migration.worker();
    pair.first.fault(&format!("{point} stop"));
    thread::scope(|scope| {
        let switch = scope.spawn(|| migration.set_state(to));
        until(&format!("the worker stops at {point}"), SOON, || {
            !pair.first.fault_is_armed() && process::is_stopped(worker)
        });
        let go_on = || {
            process::signal(worker, process::CONTINUE);
        };
        let result = meanwhile(&go_on);
        switch.join().expect("the switch");
        result
    })
}

/// Whether a backend of the first server, or any client of the second (for a row there), waits for a lock.
fn waits_for_a_lock(pair: &Pair, pid: i32) -> bool {
    let first = format!("SELECT wait_event_type = 'Lock' FROM pg_stat_activity WHERE pid = {pid}");
    let second = "SELECT bool_or(wait_event_type = 'Lock') FROM pg_stat_activity WHERE backend_type = 'client backend'";
    pair.first.text(&first).as_deref() == Some("t") || pair.second.text(second).as_deref() == Some("t")
}

const RAISE: &str = "UPDATE customer SET cents = cents + 7 WHERE id = $1 RETURNING cents";
const ADD: &str = "INSERT INTO customer (name) VALUES ($1) RETURNING id";

#[test]
fn a_statement_blocked_by_the_switch_succeeds_on_the_new_store() {
    let pair = Pair::with(&["crossover.max_pause = '120s'"], &[]);
    market::create(&pair, 100);
    let witness = (Witness::of(&pair.first), Witness::of(&pair.second));
    let migration = market::started(&pair);
    let mut expected = 0;
    let mut names = 0;
    for (blocked, ring) in [(Blocked::Parsing, RING), (Blocked::Planning, RING)] {
        for to in ring {
            // Between `first` and `both` the first shape stays on the first store, and only the second shape comes and goes: nothing
            // of the first shape is held, once the table has been taken over.
            let taken_over =
                pair.first.text("SELECT to_regclass('customer__first') IS NOT NULL").as_deref() == Some("t");
            let stays = to == "first" || (migration.state() == "first" && taken_over);
            let mut clients = [pair.first.connect(), pair.first.connect()];
            for client in &mut clients {
                // Longer than a switch may hold it, shorter than the switch waits for the worker.
                client.batch_execute("SET lock_timeout = '60s'").expect("a setting");
            }
            let pids = clients.each_mut().map(backend);
            let statements = match blocked {
                Blocked::Parsing => None,
                Blocked::Planning => {
                    let raise = clients[0].prepare(RAISE).expect("to be prepared");
                    let add = clients[1].prepare(ADD).expect("to be prepared");
                    clients[0].query_one(&raise, &[&1]).expect("an update");
                    clients[1].query_one(&add, &[&"prepared before"]).expect("an insert");
                    expected += 7;
                    Some((raise, add))
                }
            };
            names += 1;
            let name = format!("blocked {names}");
            let raise = |client: &mut Client| match &statements {
                Some((raise, _)) => client.query_one(raise, &[&1]),
                None => client.query_one(RAISE, &[&1]),
            };
            let add = |client: &mut Client| match &statements {
                Some((_, add)) => client.query_one(add, &[&name]),
                None => client.query_one(ADD, &[&name]),
            };
            let (raised, added) = held_at(&pair, &migration, "switch:locked", to, |go_on| {
                let [raiser, adder] = &mut clients;
                if stays {
                    let through = (raise(raiser), add(adder));
                    go_on();
                    return through;
                }
                thread::scope(|scope| {
                    let (raising, adding) = (scope.spawn(|| raise(raiser)), scope.spawn(|| add(adder)));
                    for pid in pids {
                        until(&format!("a client ({blocked:?}) is blocked"), SOON, || {
                            waits_for_a_lock(&pair, pid) || raising.is_finished() || adding.is_finished()
                        });
                    }
                    let held = !raising.is_finished() && !adding.is_finished();
                    go_on();
                    assert!(held, "{blocked:?}, to {to}: not held by the switch");
                    (raising.join().expect("a client"), adding.join().expect("a client"))
                })
            });
            let row = |result: Result<postgres::Row, postgres::Error>| {
                result.unwrap_or_else(|e| panic!("{blocked:?}, to {to}: {}", explain(&e)))
            };
            let (cents, id): (i64, i32) = (row(raised).get(0), row(added).get(0));
            expected += 7;
            assert_eq!(cents, expected, "{blocked:?}, to {to}: RETURNING gives what was stored");
            let there = match to {
                "second" => market::cents_in_second(&pair, 1),
                _ => market::cents_in_first(&pair, "customer__first", 1),
            };
            assert_eq!(there, expected, "{blocked:?}, to {to}: not in the new store at once");
            let found = match to {
                "second" => pair.second.text(&format!("SELECT full_name FROM market.client WHERE client_no = {id}")),
                _ => pair.first.text(&format!("SELECT name FROM customer__first WHERE id = {id}")),
            };
            assert_eq!(
                found.as_deref(),
                Some(name.as_str()),
                "{blocked:?}, to {to}: the new row is not in the new store"
            );
            migration.settle();
            market::assert_equal(&pair, "__first");
        }
    }
    migration.cancel();
    market::assert_equal(&pair, "");
    witness.0.testify();
    witness.1.testify();
}

#[test]
fn a_statement_blocked_on_a_row_of_the_last_cycle_goes_on_from_the_new_row() {
    let pair = Pair::with(&["crossover.max_pause = '20s'"], &[]);
    market::create(&pair, 100);
    let witness = (Witness::of(&pair.first), Witness::of(&pair.second));
    let migration = market::started(&pair);
    migration.set_state("both");
    // Towards each store, a client of its shape waits for a row that the switch's last cycle brings there.
    let old = "UPDATE customer SET cents = cents + 1 WHERE id = 5";
    let new = "UPDATE client SET balance = balance + 1 WHERE client_no = 5";
    for (path, busy, waiting) in [(["second", "both"], old, new), (["first", "both"], new, old)] {
        let before = market::cents_in_first(&pair, "customer__first", 5);
        let mut client = pair.first.connect();
        let pid = backend(&mut client);
        let load = Load::start(&pair.first.config("app"), 1, move |_, _, connection| {
            connection.execute(busy, &[]).map(|n| assert_eq!(n, 1, "rows"))
        });
        load.until_done(5);
        let to = path[0];
        held_at(&pair, &migration, "switch:drained", to, |go_on| {
            thread::scope(|scope| {
                let waiting = scope.spawn(|| client.execute(waiting, &[]));
                until("the client is blocked or through", SOON, || {
                    waits_for_a_lock(&pair, pid) || waiting.is_finished()
                });
                go_on();
                let count = waiting.join().expect("the client").unwrap_or_else(|e| panic!("to {to}: {}", explain(&e)));
                assert_eq!(count, 1);
            });
        });
        let tally = load.stop();
        if to == "second" {
            tally.assert_clean("in a switch to second");
        } else {
            assert!(tally.done > 0, "the view of the second shape is gone by now, but it was there");
        }
        migration.settle();
        market::assert_equal(&pair, "__first");
        let after = market::cents_in_first(&pair, "customer__first", 5);
        let (one, many) = if to == "second" { (100, 1) } else { (1, 100) };
        if migration.conflicts().is_empty() {
            assert_eq!(
                after,
                before + one + many * i64::try_from(tally.done).expect("few"),
                "an addition was lost, to {to}"
            );
        }
        migration.set_state(path[1]);
    }
    migration.set_state("first");
    migration.cancel();
    witness.0.testify();
    witness.1.testify();
}

#[test]
fn no_deadlock_reaches_a_client() {
    let pair = Pair::new();
    market::create(&pair, 1000);
    let witness = (Witness::of(&pair.first), Witness::of(&pair.second));
    let migration = market::started(&pair);
    // Transactions over both tables in either order, readers that become writers, each client on its own rows.
    let load = Load::start(&pair.first.config("app"), 4, |client, round, connection| {
        let id = (client * 100 + (round % 100) as usize + 1) as i32;
        let customer = "UPDATE customer SET cents = cents + 1 WHERE id = $1";
        let purchase = "UPDATE purchase SET cents = cents + 1 WHERE customer_id = $1";
        let read = "SELECT sum(cents)::bigint FROM customer WHERE id BETWEEN $1 AND $1 + 5";
        let (before, after) =
            if (round + client as u64).is_multiple_of(2) { (customer, purchase) } else { (purchase, customer) };
        let mut transaction = connection.transaction()?;
        if round.is_multiple_of(3) {
            transaction.query_one(read, &[&id])?;
        }
        transaction.execute(before, &[&id])?;
        transaction.execute(after, &[&id])?;
        if round.is_multiple_of(5) {
            let query = "INSERT INTO purchase (customer_id, cents) VALUES ($1, 1) RETURNING id";
            let new: i64 = transaction.query_one(query, &[&id])?.get(0);
            transaction.execute("DELETE FROM purchase WHERE id = $1", &[&new])?;
        }
        transaction.commit()
    });
    for to in RING.into_iter().chain(RING).chain(["both", "second"]) {
        load.until_done(100);
        let watch = Stopwatch::start();
        migration.set_state(to);
        assert_short_pause(&migration, &watch);
        for_a(LOCK_ATTEMPT);
        load.take().assert_unhurt(&format!("around the switch to {to}"), MAX_PAUSE + SLACK);
    }
    migration.finish();
    load.until_done(100);
    load.stop().assert_clean("after the finish");
    witness.0.testify();
    witness.1.testify();
}

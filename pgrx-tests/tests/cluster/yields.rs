//! The replicator gives way: whatever clients of either store do in `both`, none of them is chosen as the victim of a deadlock with it, gets
//! a serialization error, or waits for it for longer than about a second.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pgrx_tests::cluster::explain;
use pgrx_tests::load::Tally;
use pgrx_tests::tokens::seed;
use pgrx_tests::wait::{LONG, Stopwatch, for_a, until};
use pgrx_tests::{Cluster, Load, Migration, Pair, Witness};
use postgres::{Client, Error};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};

/// Seven tables in the mapping's order, and the table that each refers to.
const TABLES: [(&str, Option<usize>); 7] = [
    ("region", None),
    ("customer", Some(0)),
    ("product", Some(0)),
    ("orders", Some(1)),
    ("line", Some(3)),
    ("payment", Some(3)),
    ("note", Some(1)),
];
/// The order in which clients of each server take their tables: the same for all of them, so that they do not deadlock among
/// themselves, and another one on each server, and another than the mapping's.
const ORDER_ON_FIRST: [usize; 7] = [5, 3, 6, 1, 4, 0, 2];
const ORDER_ON_SECOND: [usize; 7] = [2, 4, 0, 6, 5, 1, 3];
/// Rows that everybody changes all the time.
const HOT: i32 = 4;
/// Rows that come and go, and to which nothing refers.
const FLEETING: std::ops::Range<i32> = 11..15;
/// Parents that come and go, with all that refers to them.
const DOOMED: std::ops::Range<i32> = 21..25;
/// How long the replicator may hold up a statement: "about a second", on a busy machine.
const LIMIT: Duration = Duration::from_millis(1400);

/// The tables in a schema, hot rows in each. `key` and `parent` are the columns' names.
fn definition(prefix: &str, key: &str, parent: &str) -> String {
    let mut sql = String::new();
    for (name, refers_to) in TABLES {
        let foreign_key = match refers_to {
            Some(to) => format!("REFERENCES {prefix}{} ON DELETE CASCADE", TABLES[to].0),
            None => String::new(),
        };
        let _ = write!(
            sql,
            "CREATE TABLE {prefix}{name} ({key} integer PRIMARY KEY, {parent} integer {foreign_key}, n bigint NOT NULL DEFAULT 0, code text UNIQUE);
             CREATE INDEX ON {prefix}{name} ({parent});"
        );
    }
    sql
}

fn create(pair: &Pair) -> Value {
    pair.first.sql(&definition("", "id", "parent"));
    pair.second_store("hot", &definition("", "no", "elder"));
    for (name, refers_to) in TABLES {
        let parent = if refers_to.is_some() { "i" } else { "NULL" };
        pair.first.sql(&format!("INSERT INTO {name} SELECT i, {parent} FROM generate_series(1, {HOT}) AS i"));
    }
    let table = |(name, _): &(&str, Option<usize>)| {
        json!({"first": format!("public.{name}"), "second": format!("hot.{name}"), "second_view": format!("public.new_{name}"),
               "forward": {"no": "id", "elder": "parent", "n": "n * 10", "code": "'c' || code"},
               "backward": {"n": "n / 10", "code": "substr(code, 2)"}})
    };
    json!({"tables": TABLES.iter().map(table).collect::<Vec<_>>()})
}

/// Where clients connect, and how they name things there.
#[derive(Clone, Copy)]
struct Door {
    prefix: &'static str,
    key: &'static str,
    parent: &'static str,
    order: [usize; 7],
    /// What the store adds to count by one.
    one: i64,
    /// A plain table or a view of one: it takes ON CONFLICT.
    plain: bool,
    /// Keys that no other door inserts.
    from: i32,
}

const FIRST: Door =
    Door { prefix: "", key: "id", parent: "parent", order: ORDER_ON_FIRST, one: 1, plain: true, from: 1_000_000 };
/// The second server's own tables.
const SECOND: Door =
    Door { prefix: "hot.", key: "no", parent: "elder", order: ORDER_ON_SECOND, one: 10, plain: true, from: 2_000_000 };
/// The view of the second shape on the first server.
const SECOND_VIEW: Door = Door { prefix: "new_", plain: false, from: 3_000_000, ..SECOND };

/// What clients may not see, and the longest that each kind of statement took.
#[derive(Default)]
struct Book {
    slowest: BTreeMap<&'static str, Duration>,
    /// Transactions that a client's own server refused for what another client did: a parent that is gone.
    refused: usize,
}

/// Runs one statement and notes how long it took.
fn timed(
    book: &Mutex<Book>,
    what: &'static str,
    client: &mut impl postgres::GenericClient,
    sql: &str,
) -> Result<u64, Error> {
    let began = Stopwatch::start();
    let result = client.execute(sql, &[]);
    let took = began.elapsed();
    let mut book = book.lock().unwrap_or_else(PoisonError::into_inner);
    let slowest = book.slowest.entry(what).or_default();
    *slowest = took.max(*slowest);
    result
}

/// One transaction of a client.
fn work(door: &Door, rng: &mut StdRng, id: i32, book: &Mutex<Book>, client: &mut Client) -> Result<(), Error> {
    let Door { prefix, key, parent, one, .. } = *door;
    if door.plain && rng.random_ratio(1, 8) {
        // A parent goes with its children, or is there again: a transaction of its own.
        let (table, doomed) = (TABLES[rng.random_range(0..2)].0, rng.random_range(DOOMED));
        let elder = if table == "region" { "NULL".into() } else { rng.random_range(1..=HOT).to_string() };
        let gone = timed(book, "delete", client, &format!("DELETE FROM {prefix}{table} WHERE {key} = {doomed}"))?;
        if gone == 0 {
            let insert = format!(
                "INSERT INTO {prefix}{table} ({key}, {parent}) VALUES ({doomed}, {elder}) ON CONFLICT DO NOTHING"
            );
            timed(book, "insert", client, &insert)?;
        }
        return Ok(());
    }
    let mut transaction = client.transaction()?;
    for t in door.order {
        let (table, refers_to) = TABLES[t];
        for hot in 1..=HOT {
            if rng.random_ratio(1, 6) {
                let update = format!("UPDATE {prefix}{table} SET n = n + {one} WHERE {key} = {hot}");
                assert_eq!(timed(book, "update", &mut transaction, &update)?, 1, "hot rows");
            }
        }
        for fleeting in FLEETING {
            if !door.plain || !rng.random_ratio(1, 20) {
                continue;
            }
            let elder = refers_to.map_or_else(|| "NULL".into(), |_| rng.random_range(1..=HOT).to_string());
            if rng.random_bool(0.4) {
                let delete = format!("DELETE FROM {prefix}{table} WHERE {key} = {fleeting}");
                timed(book, "delete", &mut transaction, &delete)?;
            } else {
                let insert = format!(
                    "INSERT INTO {prefix}{table} AS t ({key}, {parent}, n) VALUES ({fleeting}, {elder}, {one}) ON CONFLICT ({key}) DO UPDATE SET n = t.n + {one}"
                );
                timed(book, "insert", &mut transaction, &insert)?;
            }
        }
    }
    if rng.random_ratio(1, 4) {
        // A child of a parent that may be about to go, in the end: whoever deletes the parent waits for nobody but such as this.
        let t = rng.random_range(1..TABLES.len());
        if let (table, Some(to @ 0..=1)) = TABLES[t] {
            let (elders, elder) = (TABLES[to].0, rng.random_range(DOOMED));
            let insert = format!(
                "INSERT INTO {prefix}{table} ({key}, {parent}, n) SELECT {id}, {key}, 0 FROM {prefix}{elders} WHERE {key} = {elder}"
            );
            timed(book, "insert", &mut transaction, &insert)?;
        }
    }
    transaction.commit()
}

/// Clients at one door; their errors are whatever PostgreSQL alone would not have raised.
fn clients(cluster: &Cluster, door: Door, count: usize, seed: u64, book: &Arc<Mutex<Book>>) -> Load {
    let book = Arc::clone(book);
    Load::start(&cluster.config("app"), count, move |number, round, client| {
        let (n, r) = (i32::try_from(number).expect("few"), i32::try_from(round).expect("few"));
        let mut rng =
            StdRng::seed_from_u64(seed ^ (u64::from(door.from.unsigned_abs()) << 32) ^ ((number as u64) << 28) ^ round);
        match work(&door, &mut rng, door.from + n * 100_000 + r, &book, client) {
            Err(e) if e.code().is_some_and(|c| c.code() == "23503") => {
                book.lock().unwrap_or_else(PoisonError::into_inner).refused += 1;
                Ok(())
            }
            other => other,
        }
    })
}

/// Both stores, at rest, hold the same rows, and no child without its parent.
fn assert_whole(pair: &Pair, suffix: &str) {
    for (name, refers_to) in TABLES {
        let first =
            format!("SELECT concat_ws('|', id, parent, n, coalesce(code, '-')) FROM {name}{suffix} ORDER BY id");
        let second = format!(
            "SELECT concat_ws('|', no, elder, n / 10, coalesce(substr(code, 2), '-')) FROM hot.{name} ORDER BY no"
        );
        assert_eq!(pair.first.list(&first), pair.second.list(&second), "the stores differ in {name}");
        let Some(to) = refers_to else { continue };
        let orphans = format!(
            "SELECT no FROM hot.{name} c WHERE elder IS NOT NULL AND NOT EXISTS (SELECT FROM hot.{} p WHERE p.no = c.elder)",
            TABLES[to].0
        );
        assert_eq!(pair.second.list(&orphans), [""; 0], "children without parents in {name}");
    }
}

/// Asserts that clients got on, without an error, and were not held up.
fn assert_unhurt(what: &str, tally: &Tally, book: &Mutex<Book>) {
    let mut book = book.lock().unwrap_or_else(PoisonError::into_inner);
    println!("{what}: {} transactions, {} refused, {:?}", tally.done, book.refused, book.slowest);
    tally.assert_clean(what);
    for (statement, took) in std::mem::take(&mut book.slowest) {
        assert!(took < LIMIT, "{what}: an {statement} took {took:?}");
    }
}

/// A migration in `both`, with clients at all three doors for a while.
fn hot<'a>(pair: &'a Pair, period: Duration) -> (Migration<'a>, [Load; 3]) {
    let migration = Migration::start(pair, "hot", &create(pair));
    migration.until_state("first");
    migration.set_state("both");
    let seed = seed();
    let start = |cluster, door, count| {
        let book = Arc::default();
        (clients(cluster, door, count, seed, &book), book)
    };
    let loads = [start(&pair.first, FIRST, 2), start(&pair.second, SECOND, 2), start(&pair.first, SECOND_VIEW, 1)];
    for_a(period);
    for (what, (load, book)) in ["on first", "on second", "at the view of the second shape"].iter().zip(&loads) {
        assert_unhurt(what, &load.take(), book);
    }
    (migration, loads.map(|(load, _)| load))
}

#[test]
fn hot_rows_in_seven_tables_on_the_way_to_second() {
    let pair = Pair::new();
    let witness = (Witness::of(&pair.first), Witness::of(&pair.second));
    let (migration, loads) = hot(&pair, Duration::from_secs(8));
    let [first, second, view] = loads;
    // On second they would take their rows in another order than its own clients, who go on.
    first.stop().assert_clean("before the switch");
    migration.set_state("second");
    second.until_done(50);
    second.stop().assert_clean("in a switch to second");
    view.stop().assert_clean("in a switch to second");
    migration.settle();
    assert_whole(&pair, "__first");
    assert_parked_none(&migration);
    migration.finish();
    witness.0.testify();
    witness.1.testify();
}

#[test]
fn hot_rows_in_seven_tables_on_the_way_back() {
    let pair = Pair::new();
    let witness = (Witness::of(&pair.first), Witness::of(&pair.second));
    let (migration, loads) = hot(&pair, Duration::from_secs(8));
    let [first, second, view] = loads;
    second.stop().assert_clean("before the switch");
    view.stop().assert_clean("before the switch");
    migration.set_state("first");
    first.until_done(50);
    first.stop().assert_clean("in a switch to first");
    migration.settle();
    assert_whole(&pair, "__first");
    assert_parked_none(&migration);
    migration.cancel();
    witness.0.testify();
    witness.1.testify();
}

fn assert_parked_none(migration: &Migration) {
    let conflicts = migration.conflicts();
    println!("{} conflicts", conflicts.len());
    let parked: Vec<_> = conflicts.iter().filter(|c| c["kind"] == "parked" && c["resolved_at"].is_null()).collect();
    assert!(parked.is_empty(), "{parked:?}");
    assert!(!conflicts.is_empty(), "the clients did not get in each other's way");
}

/// Whether a backend waits for a lock.
fn waits(cluster: &Cluster, pid: i32) -> bool {
    let query = format!("SELECT wait_event_type = 'Lock' FROM pg_stat_activity WHERE pid = {pid}");
    cluster.text(&query).as_deref() == Some("t")
}

/// A client holds rows that the replicator is to insert, many of them in every table, and then wants rows that the replicator has
/// changed in the same transaction. However often the replicator tries, it lets go of all of them before the client's patience ends.
fn many_rows_in_the_way(pair: &Pair, migration: &Migration, first: bool) {
    const IN_THE_WAY: std::ops::Range<i32> = 100..132;
    let (here, there) = if first { (&FIRST, &SECOND) } else { (&SECOND, &FIRST) };
    let (source, destination) = if first { (&pair.first, &pair.second) } else { (&pair.second, &pair.first) };
    migration.settle();
    let mut client = destination.connect();
    let pid: i32 = client.query_one("SELECT pg_backend_pid()", &[]).expect("a pid").get(0);
    let insert = |door: &Door, t: usize| {
        let (table, refers_to) = TABLES[t];
        let elder = if refers_to.is_some() { "1" } else { "NULL" };
        let Door { prefix, key, parent, .. } = door;
        format!(
            "INSERT INTO {prefix}{table} ({key}, {parent}) SELECT i, {elder} FROM generate_series({}, {}) AS i",
            IN_THE_WAY.start, IN_THE_WAY.end
        )
    };
    let update = |door: &Door, t: usize, row: i32| {
        let Door { prefix, key, one, .. } = door;
        format!("UPDATE {prefix}{} SET n = n + {one} WHERE {key} = {row}", TABLES[t].0)
    };
    let run = |client: &mut Client, sql: &str| {
        let began = Stopwatch::start();
        client.batch_execute(sql).unwrap_or_else(|e| panic!("{}\n{sql}", explain(&e)));
        began.elapsed()
    };
    let mut transaction = String::from("BEGIN;");
    for t in 0..TABLES.len() {
        transaction += &format!("{};", insert(there, t));
    }
    run(&mut client, &transaction);
    let mut source = source.connect();
    let mut transaction = String::from("BEGIN;");
    for t in 0..TABLES.len() {
        for row in 2..=HOT {
            transaction += &format!("{};", update(here, t, row));
        }
        transaction += &format!("{};", insert(here, t));
    }
    transaction += "COMMIT";
    run(&mut source, &transaction);
    // Into the arms of a cycle that has locked its rows and waits for ours, if it does.
    let replicator = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND (backend_type LIKE 'pg_crossover%' OR application_name LIKE 'pg_crossover%')";
    let mut met = 0;
    // It may let go a moment before: then with other rows of the same tables.
    for row in 2..=HOT {
        for (t, (table, _)) in TABLES.into_iter().enumerate() {
            until("the replicator waits for the client", LONG, || destination.text(replicator).as_deref() != Some("0"));
            let took = run(&mut client, &update(there, t, row));
            met += usize::from(took > Duration::from_millis(10));
            println!("{table}: {took:?}");
            assert!(took < LIMIT, "an update of {table} waited {took:?}");
        }
        if met > 0 {
            break;
        }
    }
    assert!(!waits(destination, pid));
    run(&mut client, "COMMIT");
    assert!(met > 0, "the client did not meet the replicator");
    migration.settle();
    assert_whole(pair, "__first");
}

#[test]
fn many_rows_in_the_way_of_one_cycle() {
    let pair = Pair::new();
    let migration = Migration::start(&pair, "hot", &create(&pair));
    migration.until_state("first");
    migration.set_state("both");
    many_rows_in_the_way(&pair, &migration, true);
    for (table, _) in TABLES {
        pair.first.sql(&format!("DELETE FROM {table} WHERE id >= 100"));
    }
    many_rows_in_the_way(&pair, &migration, false);
    let is_parked = |c: &Value| c["kind"] == "parked" && c["resolved_at"].is_null();
    until("nothing is parked", LONG, || !migration.conflicts().iter().any(is_parked));
    migration.walk(&["second", "both", "first"]);
    migration.cancel();
}

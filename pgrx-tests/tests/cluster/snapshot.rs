//! In `first`, whoever reads the second store on its own server sees whole transactions of the first, however many rows are on their way (G2).

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pgrx_tests::wait::{LONG, until};
use pgrx_tests::{Cluster, Load, Migration, Pair};
use postgres::{Client, Error, IsolationLevel};
use serde_json::{Value, json};

/// Rows of both tables together: twenty of the replicator's batches.
const ROWS: i64 = 20_000;
/// Rows that go from one table into the other, one a transaction, before they are used up.
const MOVERS: i64 = 3000;

/// Two tables of which every row bears the same stamp, and whose amounts have the sum 0. The second store has each of them in other
/// units, and they have no order: neither is the parent of the other.
fn create(pair: &Pair) -> Value {
    pair.first.sql(&format!(
        "CREATE TABLE west (id integer PRIMARY KEY, stamp integer NOT NULL, n integer NOT NULL DEFAULT 0);
         CREATE TABLE east (id integer PRIMARY KEY, stamp integer NOT NULL, n integer NOT NULL DEFAULT 0);
         INSERT INTO west SELECT i, 0 FROM generate_series(1, {half}) AS i;
         INSERT INTO east SELECT i, 0 FROM generate_series({half} + 1, {ROWS}) AS i;
         ANALYZE west, east",
        half = ROWS / 2
    ));
    pair.second_store(
        "world",
        "CREATE TABLE west (id integer PRIMARY KEY, stamp text NOT NULL, tenths bigint NOT NULL);
         CREATE TABLE east (id integer PRIMARY KEY, stamp text NOT NULL, tenths bigint NOT NULL)",
    );
    let table = |name: &str| {
        json!({"first": format!("public.{name}"), "second": format!("world.{name}"),
               "forward": {"stamp": "'s' || stamp", "tenths": "n::bigint * 10"},
               "backward": {"stamp": "substr(stamp, 2)::integer", "n": "(tenths / 10)::integer"}})
    };
    json!({"tables": [table("west"), table("east")]})
}

/// One transaction that gives all rows of both tables the next stamp; every third time all rows of one table are new.
fn stamp(round: u64) -> &'static str {
    if round % 3 == 2 {
        "BEGIN; LOCK TABLE west; CREATE TEMP TABLE was ON COMMIT DROP AS SELECT * FROM west; TRUNCATE west;
         INSERT INTO west SELECT id, stamp + 1, n FROM was; UPDATE east SET stamp = stamp + 1; COMMIT"
    } else {
        "BEGIN; UPDATE west SET stamp = stamp + 1; UPDATE east SET stamp = stamp + 1; COMMIT"
    }
}

/// Small transactions over both tables, west first as [`stamp`] does: an amount goes from a row of one to a row of the other, or a row itself.
fn transfers(cluster: &Cluster) -> Load {
    Load::start(&cluster.config("app"), 2, |client, round, connection| {
        let number = i64::try_from(round).expect("a round") * 2 + i64::try_from(client).expect("a client");
        // By itself: with two rows of one table in a transaction, these clients and the stamps would lock each other out.
        if number < MOVERS {
            let mut transaction = connection.transaction()?;
            // Below the rows that amounts are taken from.
            let id = i32::try_from(number + 1).expect("a key");
            let gone = transaction.query_opt("DELETE FROM west WHERE id = $1 RETURNING stamp, n", &[&id])?;
            // Clients of an earlier call have been here before.
            if let Some(row) = gone {
                let (stamp, n): (i32, i32) = (row.get(0), row.get(1));
                transaction.execute("INSERT INTO east VALUES ($1, $2, $3)", &[&id, &stamp, &n])?;
            }
            transaction.commit()?;
        }
        let mut transaction = connection.transaction()?;
        let row = |from: i64| i32::try_from(from + number % 5000 + 1).expect("a key");
        let here = transaction.execute("UPDATE west SET n = n - 3 WHERE id = $1", &[&row(ROWS / 2 - 5000)])?;
        let there = transaction.execute("UPDATE east SET n = n + 3 WHERE id = $1", &[&row(ROWS / 2)])?;
        assert_eq!((here, there), (1, 1), "rows of transfer {number}");
        transaction.commit()
    })
}

/// What readers saw: the stamps, and every view of the store that no transaction has left behind.
#[derive(Default)]
struct Seen {
    stamps: BTreeSet<String>,
    torn: Vec<String>,
}

/// Readers of the second store, on its own server: half of them ask one statement, half of them one statement a table, in one
/// REPEATABLE READ transaction.
struct Readers {
    load: Load,
    seen: Arc<Mutex<Seen>>,
}

impl Readers {
    fn start(pair: &Pair) -> Self {
        let seen = Arc::new(Mutex::new(Seen::default()));
        let book = Arc::clone(&seen);
        let load = Load::start(&pair.second.config("app"), 2, move |client, _, connection| {
            let (rows, sum, stamps) = if client == 0 { one_statement(connection)? } else { one_snapshot(connection)? };
            let mut seen = book.lock().unwrap_or_else(PoisonError::into_inner);
            if (rows, sum, stamps.len()) != (ROWS, 0, 1) && seen.torn.len() < 10 {
                seen.torn.push(format!("reader {client}: {rows} rows, sum {sum}, stamps {stamps:?}"));
            }
            seen.stamps.extend(stamps);
            Ok(())
        });
        Self { load, seen }
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until they have seen `count` stamps.
    fn until_seen(&self, count: usize) {
        until("readers have seen more stamps", LONG, || self.seen().stamps.len() >= count);
    }

    /// Ends them.
    fn assert_whole(self, when: &str) {
        let Self { load, seen } = self;
        load.stop().assert_clean(when);
        let seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
        println!("{when}: {} stamps", seen.stamps.len());
        assert!(seen.torn.is_empty(), "{when}, readers have seen parts of transactions: {:#?}", seen.torn);
    }
}

/// Rows, sum and stamps of both tables.
type Sight = (i64, i64, BTreeSet<String>);

fn one_statement(connection: &mut Client) -> Result<Sight, Error> {
    let row = connection.query_one(
        "SELECT count(*), sum(tenths)::bigint, array_agg(DISTINCT stamp)
           FROM (SELECT tenths, stamp FROM world.east UNION ALL SELECT tenths, stamp FROM world.west) AS both_tables",
        &[],
    )?;
    Ok((row.get(0), row.get(1), row.get::<_, Vec<String>>(2).into_iter().collect()))
}

fn one_snapshot(connection: &mut Client) -> Result<Sight, Error> {
    let mut transaction =
        connection.build_transaction().isolation_level(IsolationLevel::RepeatableRead).read_only(true).start()?;
    let mut sight = (0, 0, BTreeSet::new());
    for table in ["east", "west"] {
        let query = format!("SELECT count(*), sum(tenths)::bigint, array_agg(DISTINCT stamp) FROM world.{table}");
        let row = transaction.query_one(&query, &[])?;
        sight.0 += row.get::<_, i64>(0);
        sight.1 += row.get::<_, i64>(1);
        sight.2.extend(row.get::<_, Vec<String>>(2));
    }
    transaction.commit()?;
    Ok(sight)
}

/// Asserts that both stores, at rest, hold the same.
fn assert_equal(pair: &Pair, suffix: &str) {
    for table in ["west", "east"] {
        let row =
            |stamp: &str, n: &str| format!("SELECT md5(string_agg(concat_ws(' ', id, {stamp}, {n}), ',' ORDER BY id))");
        let first = pair.first.text(&format!("{} FROM {table}{suffix}", row("stamp", "n")));
        let second = pair.second.text(&format!("{} FROM world.{table}", row("substr(stamp, 2)", "tenths / 10")));
        assert!(first.is_some() && first == second, "the stores differ in {table}");
    }
}

/// A stamp that the second store shows now.
fn newest(pair: &Pair) -> String {
    pair.second.text("SELECT 's' || max(substr(stamp, 2)::integer) FROM world.west").expect("a stamp")
}

#[test]
fn a_backlog_of_many_batches_arrives_whole() {
    let pair = Pair::new();
    let migration = Migration::start(&pair, "world", &create(&pair));
    migration.until_state("first");
    let readers = Readers::start(&pair);
    for round in 0..4 {
        migration.call("pause");
        let before = newest(&pair);
        let transfers = transfers(&pair.first);
        for i in 0..=round % 2 {
            pair.first.sql(stamp(round + i));
        }
        transfers.until_done(200);
        transfers.stop().assert_clean("on the first store");
        assert_eq!(newest(&pair), before, "replication was to pause");
        migration.call("resume");
        migration.settle();
        let after = newest(&pair);
        until("readers have seen the new stamp", LONG, || readers.seen().stamps.contains(&after));
    }
    readers.assert_whole("as backlogs are applied");
    assert_equal(&pair, "");
    migration.walk(&["both", "second"]);
    pair.second.sql("UPDATE world.west SET stamp = 's99'; UPDATE world.east SET stamp = 's99'");
    migration.settle();
    assert_equal(&pair, "__first");
    migration.finish();
}

#[test]
fn under_writers_that_never_stop_all_arrives_whole() {
    let pair = Pair::new();
    let migration = Migration::start_with(&pair, "world", &create(&pair), &json!({"chunk_rows": 500}));
    // They begin while the copy runs: what it leaves is a backlog over all rows.
    let transfers = transfers(&pair.first);
    let stamps =
        Load::start(&pair.first.config("app"), 1, |_, round, connection| connection.batch_execute(stamp(round)));
    migration.until_state("first");
    let readers = Readers::start(&pair);
    readers.until_seen(6);
    readers.assert_whole("from the copy on");
    stamps.stop().assert_clean("on the first store");
    // What `both` leaves behind is no state of one store; once `first` is reached again it is.
    migration.walk(&["both", "first"]);
    let stamps = Load::start(&pair.first.config("app"), 1, |_, _, connection| connection.batch_execute(stamp(0)));
    let readers = Readers::start(&pair);
    readers.until_seen(4);
    readers.assert_whole("once it is `first` again");
    transfers.stop().assert_clean("on the first store");
    stamps.stop().assert_clean("on the first store");
    migration.settle();
    assert_equal(&pair, "__first");
    migration.cancel();
}

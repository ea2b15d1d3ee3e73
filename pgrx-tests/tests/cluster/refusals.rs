//! Wrong input, row by row: the call, its SQLSTATE, message, detail and hint; and after every row the proof that nothing was changed on
//! either server. An ellipsis in what is expected stands for anything.

mod callers;
mod expressions;
mod form;
mod names;
mod roles;
mod states;
mod tables;

use std::cell::RefCell;

use pgrx_tests::cluster::explain;
use pgrx_tests::fingerprint::{Fingerprint, observer};
use pgrx_tests::wait::{SOON, until_or};
use pgrx_tests::{Pair, schema};
use postgres::{Client, Error};
use serde_json::{Value, json};

const ONE_PROBLEM: &str = "the mapping of migration \"refused\" has 1 problem";
const NOTHING: &str = "Nothing was changed. Correct the mapping and call migration_start again.";

/// What may be called on a migration that there is.
const CALLS: [&str; 7] = [
    "migration_wait('market')",
    "migration_set_state('market', 'both')",
    "migration_pause('market')",
    "migration_resume('market')",
    "migration_finish('market')",
    "migration_cancel('market')",
    "migration_set_state('market', 'first', force => true)",
];

/// Both servers, and how to see that they are as they were.
struct Bench {
    pair: Pair,
    observers: RefCell<[Client; 2]>,
    /// A migration runs: its worker is no leftover.
    is_live: bool,
    /// What goes on changing, whatever is refused.
    changing: &'static [&'static str],
    /// What has to be the same after every call, until [`Bench::set_up`] says that the test itself has changed something.
    before: RefCell<Option<Vec<Fingerprint>>>,
}

impl Bench {
    fn new(pair: Pair) -> Self {
        let observers = RefCell::new([observer(&pair.first), observer(&pair.second)]);
        Self { pair, observers, is_live: false, changing: &[], before: RefCell::default() }
    }

    fn fingerprints(&self) -> Vec<Fingerprint> {
        self.observers.borrow_mut().iter_mut().map(|client| Fingerprint::take(client, self.changing)).collect()
    }

    /// The servers as the test has set them up: nothing may change them from here on.
    fn set_up(&self) {
        *self.before.borrow_mut() = Some(self.fingerprints());
    }

    /// Waits until both servers are as they were set up, and no worker is left. What a start that failed has left goes at once, but
    /// after the answer.
    fn is_as_before(&self, what: &str) {
        let before = self.before.borrow();
        let before = before.as_ref().expect("what it was before");
        let difference = RefCell::default();
        let message = || format!("{what}: what has changed, or is left, is {}", difference.borrow());
        until_or(SOON, message, || {
            let mut found: String = before.iter().zip(&self.fingerprints()).map(|(a, b)| a.difference(b)).collect();
            if !self.is_live {
                self.observers
                    .borrow_mut()
                    .iter_mut()
                    .for_each(|client| found += &schema::workers_of(client).join(", "));
            }
            *difference.borrow_mut() = found;
            difference.borrow().is_empty()
        });
    }

    /// Makes a call on a connection, and checks how it is refused, and that both servers are as before.
    fn refuses_on(&self, client: &mut Client, name: &str, call: &str, expected: &Expected) {
        let Err(error) = client.batch_execute(call) else { panic!("{name}: {call} was not refused") };
        self.is_as_before(&format!("{name}, after {}", explain(&error)));
        expected.check(name, &error);
    }

    fn refuses(&self, name: &str, call: &str, expected: &Expected) {
        self.refuses_on(&mut self.pair.first.connect(), name, call, expected);
    }
}

/// How a call is refused. An empty text: there must be none.
struct Expected {
    code: &'static str,
    message: String,
    detail: String,
    hint: String,
}

impl Expected {
    fn new(code: &'static str, message: &str, detail: &str, hint: &str) -> Self {
        Self { code, message: message.into(), detail: detail.into(), hint: hint.into() }
    }

    /// The one problem of a mapping.
    fn problem(detail: &str, hint: &str) -> Self {
        Self::new("22023", ONE_PROBLEM, detail, hint)
    }

    fn check(&self, name: &str, error: &Error) {
        let text = explain(error);
        let Some(db) = error.as_db_error() else { panic!("{name}: {text}") };
        assert_eq!(db.code().code(), self.code, "{name}: {text}");
        for (what, expected, found) in [
            ("message", &self.message, Some(db.message())),
            ("detail", &self.detail, db.detail()),
            ("hint", &self.hint, db.hint()),
        ] {
            let found = found.unwrap_or_default();
            assert!(fits(expected, found), "{name}: the {what} is\n{found}\ninstead of\n{expected}\nin {text}");
        }
    }
}

/// Whether `text` is `pattern`, in which an ellipsis stands for anything.
fn fits(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('…');
    let Some(mut rest) = parts.next().and_then(|first| text.strip_prefix(first)) else { return false };
    let parts: Vec<&str> = parts.collect();
    let Some((last, between)) = parts.split_last() else { return rest.is_empty() };
    for part in between {
        let Some(at) = rest.find(part) else { return false };
        rest = &rest[at + part.len()..];
    }
    rest.ends_with(last)
}

fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

fn start(mapping: &Value) -> String {
    start_as("refused", &mapping.to_string(), "{}")
}

fn start_as(name: &str, mapping: &str, options: &str) -> String {
    format!("SELECT migration_start({}, {}, {})", literal(name), literal(mapping), literal(options))
}

/// The mapping of one table, with what `more` says besides.
fn one(first: &str, second: &str, more: &Value) -> Value {
    let mut table = json!({"first": first, "second": second});
    for (key, value) in more.as_object().expect("an object") {
        table[key] = value.clone();
    }
    json!({"tables": [table]})
}

/// A table that could be migrated, and all kinds of others.
fn bench() -> Bench {
    let pair = Pair::with(&["autovacuum = off"], &["autovacuum = off"]);
    pair.second_store(
        "f2",
        "CREATE TABLE t (id bigint PRIMARY KEY, label text NOT NULL, amount numeric(10,2));
         CREATE TABLE other (id text PRIMARY KEY, label text, amount numeric(10,2));
         CREATE TABLE filled (LIKE t INCLUDING ALL);
         INSERT INTO filled VALUES (1, 'there', 1);
         CREATE TABLE keyless (LIKE t);
         CREATE TABLE gone (LIKE t INCLUDING ALL);
         CREATE TABLE narrow (LIKE t INCLUDING ALL);
         CREATE UNLOGGED TABLE unlogged (LIKE t INCLUDING ALL);
         CREATE TABLE parent (LIKE t INCLUDING ALL);
         CREATE TABLE child () INHERITS (parent);
         CREATE TABLE parted (LIKE t INCLUDING ALL) PARTITION BY HASH (id);
         CREATE TABLE parted_1 PARTITION OF parted FOR VALUES WITH (MODULUS 1, REMAINDER 0);
         CREATE VIEW a_view AS SELECT * FROM t;
         CREATE TABLE derived (id bigint PRIMARY KEY, label text, amount numeric(10,2), twice numeric GENERATED ALWAYS AS (amount * 2) STORED);
         CREATE TABLE two (a bigint, b bigint, label text, PRIMARY KEY (a, b));
         CREATE TABLE v (id bigint PRIMARY KEY, v text);
         CREATE TABLE same (id bigint PRIMARY KEY, at text);
         CREATE TABLE decimal (id numeric PRIMARY KEY);
         CREATE TABLE real (id double precision PRIMARY KEY)",
    );
    pair.second.sql("DROP TABLE f2.gone; ALTER TABLE f2.narrow DROP COLUMN amount");
    pair.second.sql("CREATE DATABASE latin ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0");
    pair.first.sql(
        r#"CREATE SCHEMA s1;
        SET search_path = s1, public;
        CREATE TABLE t (id bigint PRIMARY KEY, label text NOT NULL, amount numeric(10,2));
        INSERT INTO t VALUES (1, 'one', 1), (2, 'two', 2);
        CREATE TABLE named (id bigint PRIMARY KEY, name text NOT NULL, cents bigint);
        CREATE TABLE "Order" (LIKE t INCLUDING ALL);
        CREATE TABLE keyless (LIKE t);
        CREATE TABLE nullable (id bigint UNIQUE, label text NOT NULL, amount numeric(10,2));
        CREATE TABLE partial (LIKE t);
        CREATE UNIQUE INDEX ON partial (id) WHERE id > 0;
        CREATE TABLE deferred (LIKE t, UNIQUE (id) DEFERRABLE);
        CREATE TABLE other (id bigint PRIMARY KEY, label text, amount numeric(10,2));
        CREATE UNLOGGED TABLE unlogged (LIKE t INCLUDING ALL);
        CREATE TABLE parent (LIKE t INCLUDING ALL);
        CREATE TABLE child () INHERITS (parent);
        CREATE TABLE parted (LIKE t INCLUDING ALL) PARTITION BY HASH (id);
        CREATE TABLE parted_1 PARTITION OF parted FOR VALUES WITH (MODULUS 1, REMAINDER 0);
        CREATE TABLE half (LIKE t INCLUDING ALL) PARTITION BY HASH (id);
        CREATE UNLOGGED TABLE half_1 PARTITION OF half FOR VALUES WITH (MODULUS 1, REMAINDER 0);
        CREATE TABLE secret (LIKE t INCLUDING ALL);
        ALTER TABLE secret ENABLE ROW LEVEL SECURITY;
        CREATE TABLE viewed (LIKE t INCLUDING ALL);
        CREATE VIEW a_view AS SELECT * FROM viewed;
        CREATE MATERIALIZED VIEW stored AS SELECT * FROM parted;
        CREATE SEQUENCE seq;
        CREATE TYPE composite AS (id bigint, label text, amount numeric(10,2));
        CREATE TABLE derived (LIKE t INCLUDING ALL, twice numeric GENERATED ALWAYS AS (amount * 2) STORED);
        CREATE TABLE reserved (LIKE t INCLUDING ALL);
        CREATE VIEW reserved__first AS SELECT 1 AS one;
        CREATE TABLE pointed (LIKE t INCLUDING ALL);
        CREATE TABLE pointing (id bigint PRIMARY KEY REFERENCES pointed);
        CREATE TABLE two (a bigint, b bigint, label text, PRIMARY KEY (a, b));
        CREATE TABLE decimal (id numeric PRIMARY KEY);
        CREATE TABLE real (id double precision PRIMARY KEY);
        CREATE TABLE same (id bigint PRIMARY KEY, at timestamptz);
        CREATE TYPE mood AS ENUM ('good', 'bad');
        CREATE TYPE settled AS (a integer, m mood);
        CREATE TYPE unsettled AS (a integer, at timestamptz);
        CREATE DOMAIN day AS date;
        CREATE TABLE e (id bigint PRIMARY KEY, t text, ts timestamp, tz timestamptz, d date, n numeric, f double precision, b bytea,
            cash money, iv interval, j jsonb, m mood, tags text[], moods mood[], days date[], s settled, u unsettled, r int4range, dr daterange, dom day);
        CREATE FUNCTION undeclared(text) RETURNS text LANGUAGE sql AS 'SELECT $1';
        CREATE FUNCTION declared_stable(timestamptz) RETURNS text LANGUAGE sql STABLE AS 'SELECT $1::text';
        CREATE FUNCTION pinned(timestamptz) RETURNS text LANGUAGE sql IMMUTABLE SET timezone = 'UTC' SET datestyle = 'ISO' AS 'SELECT $1::text';
        CREATE SERVER elsewhere FOREIGN DATA WRAPPER postgres_fdw OPTIONS (host '127.0.0.1', port '1');
        CREATE USER MAPPING FOR PUBLIC SERVER elsewhere OPTIONS (user 'postgres');
        CREATE FOREIGN TABLE f2.elsewhere (id bigint, label text NOT NULL, amount numeric(10,2)) SERVER elsewhere;
        CREATE FOREIGN DATA WRAPPER nothing;
        CREATE SERVER nothing FOREIGN DATA WRAPPER nothing;
        CREATE FOREIGN TABLE f2.nothing (id bigint, label text NOT NULL, amount numeric(10,2)) SERVER nothing;
        ALTER TABLE e ADD UNIQUE (n);
        CREATE FOREIGN TABLE f2.plain_derived (id bigint, label text, amount numeric(10,2), twice numeric) SERVER second_server OPTIONS (table_name 'derived')"#,
    );
    let bench = Bench::new(pair);
    bench.set_up();
    bench
}

#[test]
fn an_ellipsis_stands_for_anything() {
    assert!(fits("a…c…", "abcd") && fits("…", "") && fits("abc", "abc") && fits("a…a", "aba"));
    assert!(!fits("a…d…", "abc") && !fits("", "a") && !fits("ab", "abc") && !fits("a…b", "ac"));
}

//! Wrong input, row by row: the call, its SQLSTATE, message, detail and hint; and after every row the proof that nothing was changed on
//! either server. An ellipsis in what is expected stands for anything.

use std::cell::RefCell;
use std::fs;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use pgrx_tests::cluster::{Stop, explain};
use pgrx_tests::fingerprint::{Fingerprint, observer};
use pgrx_tests::pair::quoted;
use pgrx_tests::wait::{SOON, until, until_or};
use pgrx_tests::{Migration, Pair, Witness, market, schema};
use postgres::{Client, Error};
use serde_json::{Value, json};

const ONE_PROBLEM: &str = "the mapping of migration \"refused\" has 1 problem";
const NOTHING: &str = "Nothing was changed. Correct the mapping and call migration_start again.";
const SAME_VALUE: &str = "An expression must give the same value whenever it is evaluated.";
const ROW_ONLY: &str = "An expression must give the same value in every session, from the columns of its row only.";
const WRAP: &str = "Call it in a function of your own that pins the settings: CREATE FUNCTION ... IMMUTABLE SET timezone = 'UTC' SET datestyle = 'ISO' ...";

/// Both servers, and how to see that they are as they were.
struct Bench {
    pair: Pair,
    observers: RefCell<[Client; 2]>,
    /// A migration runs: its worker is no leftover.
    is_live: bool,
    /// What goes on changing, whatever is refused.
    changing: &'static [&'static str],
}

impl Bench {
    fn new(pair: Pair) -> Self {
        let observers = RefCell::new([observer(&pair.first), observer(&pair.second)]);
        Self { pair, observers, is_live: false, changing: &[] }
    }

    fn fingerprints(&self) -> Vec<Fingerprint> {
        self.observers.borrow_mut().iter_mut().map(|client| Fingerprint::take(client, self.changing)).collect()
    }

    /// Makes a call on a connection, and checks how it is refused, and that both servers are as before.
    fn refuses_on(&self, client: &mut Client, name: &str, call: &str, expected: &Expected) {
        let before = self.fingerprints();
        let Err(error) = client.batch_execute(call) else { panic!("{name}: {call} was not refused") };
        // What a start that failed has left goes at once, but after the answer.
        let difference = RefCell::default();
        let text = explain(&error);
        until_or(
            SOON,
            || format!("{name}: {} has changed, or a worker is left after {text}", difference.borrow()),
            || {
                let now = self.fingerprints();
                *difference.borrow_mut() = before.iter().zip(&now).map(|(a, b)| a.difference(b)).collect::<String>();
                before == now && (self.is_live || schema::workers(&self.pair).is_empty())
            },
        );
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
    Bench::new(pair)
}

#[test]
fn the_form_of_the_mapping() {
    let bench = bench();
    let witness = Witness::of(&bench.pair.first);
    let keys = "The keys that are allowed here: first, second, second_view, forward, backward, key.";
    let names = "Write it as in SQL: schema.table, in double quotes where it is not all in lower case.";
    let table = r#""first": "s1.t", "second": "f2.t""#;
    let long = "x".repeat(64);
    for (name, mapping, detail, hint) in [
        ("an array", "[]".to_owned(), "mapping: is an array, not an object", NOTHING),
        ("null", "null".into(), "mapping: is null, not an object", NOTHING),
        ("no tables", "{}".into(), "/tables: is missing", NOTHING),
        ("an object of tables", r#"{"tables": {}}"#.into(), "/tables: is an object, not an array", NOTHING),
        (
            "zero tables",
            r#"{"tables": []}"#.into(),
            "/tables: names no table",
            "Name at least one: {\"tables\": [{\"first\": \"public.a\", \"second\": \"remote.a\"}]}.",
        ),
        (
            "an unknown key",
            format!(r#"{{"tables": [{{{table}}}], "colour": 1}}"#),
            "/colour: is not a key that is known here",
            "The keys that are allowed here: tables.",
        ),
        (
            "a misspelt key",
            format!(r#"{{"tables": [{{{table}, "foreward": {{}}}}]}}"#),
            "/tables/0/foreward: is not a key that is known here",
            keys,
        ),
        (
            "a key to escape",
            format!(r#"{{"tables": [{{{table}, "a/b~": {{}}}}]}}"#),
            "/tables/0/a~1b~0: is not a key that is known here",
            keys,
        ),
        (
            "a table that is a string",
            r#"{"tables": ["s1.t"]}"#.into(),
            "/tables/0: is a string, not an object",
            NOTHING,
        ),
        ("no second table", r#"{"tables": [{"first": "s1.t"}]}"#.into(), "/tables/0/second: is missing", NOTHING),
        (
            "a number for a name",
            r#"{"tables": [{"first": 1, "second": "f2.t"}]}"#.into(),
            "/tables/0/first: is a number, not a string",
            NOTHING,
        ),
        (
            "expressions as a string",
            format!(r#"{{"tables": [{{{table}, "forward": "id"}}]}}"#),
            "/tables/0/forward: is a string, not an object",
            NOTHING,
        ),
        (
            "a number for an expression",
            format!(r#"{{"tables": [{{{table}, "forward": {{"label": 1}}}}]}}"#),
            "/tables/0/forward/label: is a number, not a string",
            "Write an SQL expression, as a JSON string.",
        ),
        (
            "an empty expression",
            format!(r#"{{"tables": [{{{table}, "backward": {{"label": " "}}}}]}}"#),
            "/tables/0/backward/label: is an empty string",
            "Write an SQL expression, as a JSON string.",
        ),
        (
            "a key that is no list",
            format!(r#"{{"tables": [{{{table}, "key": "id"}}]}}"#),
            "/tables/0/key: is a string, not an array",
            NOTHING,
        ),
        (
            "a number in the key",
            format!(r#"{{"tables": [{{{table}, "key": ["id", 2]}}]}}"#),
            "/tables/0/key/1: is a number, not a string",
            NOTHING,
        ),
        (
            "no schema",
            r#"{"tables": [{"first": "t", "second": "f2.t"}]}"#.into(),
            "/tables/0/first: t has no schema",
            names,
        ),
        (
            "three parts",
            r#"{"tables": [{"first": "s1.t", "second": "app.f2.t"}]}"#.into(),
            "/tables/0/second: app.f2.t is not a name of the form schema.table",
            names,
        ),
        (
            "no name at all",
            r#"{"tables": [{"first": "s1.\"", "second": "f2.t"}]}"#.into(),
            "/tables/0/first: s1.\" is not a valid name",
            names,
        ),
        (
            "a name of 64 bytes",
            format!(r#"{{"tables": [{{"first": "s1.{long}", "second": "f2.t"}}]}}"#),
            "/tables/0/first: the name \"xxx…xxx\" is longer than 63 bytes",
            names,
        ),
        (
            "a table twice",
            format!(r#"{{"tables": [{{{table}}}, {{"first": "s1.t", "second": "f2.other"}}]}}"#),
            "/tables/1/first: \"s1\".\"t\" is named twice",
            NOTHING,
        ),
        (
            "a view twice",
            format!(
                r#"{{"tables": [{{{table}, "second_view": "s1.w"}}, {{"first": "s1.other", "second": "f2.other", "second_view": "s1.w"}}]}}"#
            ),
            "/tables/1/second_view: \"s1\".\"w\" is named twice",
            NOTHING,
        ),
    ] {
        bench.refuses(name, &start_as("refused", &mapping, "{}"), &Expected::problem(detail, hint));
    }
    bench.refuses(
        "no JSON",
        "SELECT migration_start('refused', '{\"tables\"')",
        &Expected::new("22P02", "invalid input syntax for type json", "The input string ended unexpectedly.", ""),
    );
    bench.refuses(
        "three things at once",
        &start_as("refused", r#"{"tables": [{"first": "t", "second": "a.b.c", "forward": {"label": 1}}]}"#, "{}"),
        &Expected::new(
            "22023",
            "the mapping of migration \"refused\" has 3 problems",
            &format!("/tables/0/first: t has no schema ({names})\n/tables/0/second: a.b.c is not a name of the form schema.table ({names})\n/tables/0/forward/label: is a number, not a string (Write an SQL expression, as a JSON string.)"),
            NOTHING,
        ),
    );
    let correct = "Nothing was changed. Correct the options and call migration_start again.";
    for (name, options, detail, hint) in [
        (
            "an unknown option",
            r#"{"speed": "high"}"#,
            "/speed: is not a key that is known here",
            "The keys that are allowed here: conflicts, copy_workers, chunk_rows, copy_rate, fence, target, takeover, foreign_keys.",
        ),
        (
            "an option of another type",
            r#"{"copy_workers": "two"}"#,
            "/copy_workers: is a string, not an integer",
            correct,
        ),
        ("half a worker", r#"{"copy_workers": 0.5}"#, "/copy_workers: is a number, not an integer", correct),
        ("no worker", r#"{"copy_workers": 0}"#, "/copy_workers: is 0", "It can be between 1 and 32."),
        (
            "chunks without end",
            r#"{"chunk_rows": 1000001}"#,
            "/chunk_rows: is 1000001",
            "It can be between 1 and 1000000.",
        ),
        ("a negative rate", r#"{"copy_rate": -1}"#, "/copy_rate: is -1", "It can be between 1 and 1000000000 rows/s."),
        (
            "an unknown policy",
            r#"{"conflicts": "dice"}"#,
            "/conflicts: cannot be \"dice\"",
            "It can be \"latest\", \"first\", \"second\".",
        ),
        ("options as a list", "[1]", "options: is an array, not an object", correct),
    ] {
        let call = start_as("refused", &one("s1.t", "f2.t", &json!({})).to_string(), options);
        bench.refuses(
            name,
            &call,
            &Expected::new("22023", "the options of migration \"refused\" have a problem", detail, hint),
        );
    }
    witness.testify();
}

#[test]
fn tables_and_columns() {
    let bench = bench();
    let witness = Witness::of(&bench.pair.first);
    let none = json!({});
    let renamed = json!({"forward": {"label": "name", "amount": "cents / 100.0"}, "backward": {"cents": "(amount * 100)::bigint"}});
    let with = |more: &Value| {
        let mut all = renamed.clone();
        for (direction, columns) in more.as_object().expect("an object") {
            for (column, expression) in columns.as_object().expect("an object") {
                all[direction][column] = expression.clone();
            }
        }
        one("s1.named", "f2.t", &all)
    };
    let ordinary = "The first store is ordinary tables of this database, and partitioned ones.";
    let quoted_names = "Column names are written as the catalog holds them, without quotes and in the same case.";
    let rows: Vec<(&str, Value, &str, &str)> = vec![
        (
            "no first table",
            one("s1.nowhere", "f2.t", &none),
            "\"s1\".\"nowhere\": the table does not exist",
            "Names are folded to lower case unless they are in double quotes, as in SQL: public.\"Order\".",
        ),
        (
            "another case",
            one("s1.Order", "f2.t", &none),
            "\"s1\".\"order\": the table does not exist",
            "Names are folded to lower case unless they are in double quotes, as in SQL: public.\"Order\".",
        ),
        (
            "no foreign table",
            one("s1.t", "f2.nowhere", &none),
            "\"f2\".\"nowhere\": the foreign table does not exist",
            "Create it with CREATE FOREIGN TABLE or IMPORT FOREIGN SCHEMA.",
        ),
        (
            "a table on the second side",
            one("s1.t", "s1.other", &none),
            "\"s1\".\"other\": is not a foreign table",
            "Create one that stands for the table on the second server, with CREATE FOREIGN TABLE or IMPORT FOREIGN SCHEMA.",
        ),
        (
            "another wrapper",
            one("s1.t", "f2.nothing", &none),
            "\"f2\".\"nothing\": is not behind postgres_fdw",
            "Other wrappers are not supported yet.",
        ),
        (
            "no table behind the foreign one",
            one("s1.t", "f2.gone", &none),
            "\"f2\".\"gone\" on the second server: the table does not exist",
            "Create it there, or correct the foreign table's options.",
        ),
        (
            "a column less behind the foreign one",
            one("s1.t", "f2.narrow", &none),
            "\"f2\".\"narrow\" on the second server: has no column \"amount\"",
            "\"f2\".\"narrow\" says that \"amount\" is one: add it there, or correct the foreign table.",
        ),
        (
            "a view behind the foreign table",
            one("s1.t", "f2.a_view", &none),
            "\"f2\".\"a_view\" on the second server: is not a table\n…",
            NOTHING,
        ),
        (
            "a partitioned target",
            one("s1.t", "f2.parted", &none),
            "\"f2\".\"parted\" on the second server: is partitioned",
            "postgres_fdw cannot tell rows of different partitions apart when it updates them. An ordinary table can be a target.",
        ),
        (
            "an inheriting target",
            one("s1.t", "f2.parent", &none),
            "\"f2\".\"parent\" on the second server: other tables inherit from it",
            "Inheritance is not supported; declarative partitioning is.",
        ),
        (
            "an unlogged target",
            one("s1.t", "f2.unlogged", &none),
            "\"f2\".\"unlogged\" on the second server: is UNLOGGED: its rows would not survive a crash",
            "There: ALTER TABLE \"f2\".\"unlogged\" SET LOGGED;",
        ),
        (
            "a target with rows",
            one("s1.t", "f2.filled", &none),
            "\"f2\".\"filled\" on the second server: is not empty",
            "Empty it, or start with the option {\"target\": \"truncate\"}.",
        ),
        (
            "a target that derives a column",
            one("s1.other", "f2.plain_derived", &json!({"forward": {"twice": "amount * 2"}})),
            "\"f2\".\"derived\" on the second server: column \"twice\" is generated",
            "Its own server derives it: ALTER FOREIGN TABLE \"f2\".\"plain_derived\" DROP COLUMN \"twice\";",
        ),
        ("a view", one("s1.a_view", "f2.t", &none), "\"s1\".\"a_view\": is a view", "Name the table that it reads."),
        (
            "a materialized view",
            one("s1.stored", "f2.t", &none),
            "\"s1\".\"stored\": is a materialized view",
            "Name the table that it reads.",
        ),
        (
            "a foreign table",
            one("f2.other", "f2.t", &json!({"forward": {"id": "id::bigint"}, "backward": {"id": "id::text"}})),
            "\"f2\".\"other\": is a foreign table",
            ordinary,
        ),
        (
            "a sequence",
            one(
                "s1.seq",
                "f2.t",
                &json!({"forward": {"id": "last_value", "label": "''", "amount": "1"}, "backward": {"last_value": "id", "log_cnt": "1", "is_called": "true"}}),
            ),
            "\"s1\".\"seq\": is a sequence",
            ordinary,
        ),
        (
            "a table of PostgreSQL's own",
            one("pg_catalog.pg_language", "f2.t", &none),
            "…\"pg_catalog\".\"pg_language\": belongs to PostgreSQL or to the extension…",
            "…",
        ),
        (
            "a partition",
            one("s1.parted_1", "f2.t", &none),
            "\"s1\".\"parted_1\": is a partition or inherits from another table",
            "Migrate the partitioned table as a whole.",
        ),
        (
            "an unlogged partition",
            one("s1.half", "f2.t", &none),
            "\"s1\".\"half\": partition s1.half_1 is UNLOGGED or temporary: its rows would not survive a crash",
            "ALTER TABLE ... SET LOGGED, or detach it.",
        ),
        (
            "an inheritance parent",
            one("s1.parent", "f2.t", &none),
            "\"s1\".\"parent\": other tables inherit from it",
            "Inheritance is not supported; declarative partitioning is.",
        ),
        (
            "an unlogged table",
            one("s1.unlogged", "f2.t", &none),
            "\"s1\".\"unlogged\": is UNLOGGED: its rows would not survive a crash",
            "ALTER TABLE \"s1\".\"unlogged\" SET LOGGED;",
        ),
        (
            "row security",
            one("s1.secret", "f2.t", &none),
            "\"s1\".\"secret\": has row security",
            "The managed view could not carry its policies. Such tables are not supported.",
        ),
        (
            "a dependent view",
            one("s1.viewed", "f2.t", &none),
            "\"s1\".\"viewed\": view s1.a_view depends on it",
            "Dependent views are not supported yet.",
        ),
        (
            "a generated column",
            one("s1.derived", "f2.t", &none),
            "\"s1\".\"derived\".\"twice\": a generated column cannot be shown over the second store",
            "Not supported yet.",
        ),
        (
            "a reserved name",
            one("s1.reserved", "f2.t", &none),
            "\"s1\".\"reserved\": the name \"s1\".\"reserved__first\", which the takeover needs, is taken",
            "ALTER TABLE \"s1\".\"reserved__first\" RENAME TO ...;",
        ),
        (
            "a foreign key from outside",
            one("s1.pointed", "f2.t", &none),
            "\"s1\".\"pointed\": foreign key \"pointing_id_fkey\" on s1.pointing leaves the migration",
            "Migrate both tables together, or accept it with the option {\"foreign_keys\": true}.",
        ),
        (
            "a view's name that is taken",
            one("s1.t", "f2.t", &json!({"second_view": "s1.other"})),
            "\"s1\".\"other\": already exists",
            "The migration makes the view of the second shape itself: choose a name that is free, or drop what has it.",
        ),
        (
            "a view in no schema",
            one("s1.t", "f2.t", &json!({"second_view": "\"No\".w"})),
            "\"No\".\"w\": its schema does not exist",
            "CREATE SCHEMA \"No\";",
        ),
        (
            "a column that is not there",
            with(&json!({"forward": {"colour": "1"}})),
            "/tables/0/forward/colour: \"f2\".\"t\" has no column \"colour\"",
            quoted_names,
        ),
        (
            "a column to escape",
            with(&json!({"backward": {"a/b~c": "1"}})),
            "/tables/0/backward/a~1b~0c: \"s1\".\"named\" has no column \"a/b~c\"",
            quoted_names,
        ),
        (
            "a column in another case",
            with(&json!({"forward": {"Label": "name"}})),
            "/tables/0/forward/Label: \"f2\".\"t\" has no column \"Label\"",
            quoted_names,
        ),
        (
            "a generated column that is given",
            one("s1.other", "f2.derived", &json!({"forward": {"twice": "1"}})),
            "/tables/0/forward/twice: column \"twice\" of \"f2\".\"derived\" is generated",
            "Leave it out: its own server derives its values.",
        ),
        (
            "a column that nothing gives",
            one("s1.named", "f2.t", &json!({"forward": {"label": "name"}, "backward": {"cents": "1"}})),
            "\"f2\".\"t\".\"amount\": no expression gives this column",
            "Add it to /tables/0/forward.",
        ),
        (
            "a column that nothing gives back",
            one("s1.named", "f2.t", &json!({"forward": {"label": "upper(name)", "amount": "cents / 100.0"}})),
            "\"s1\".\"named\".\"name\": nothing maps back to this column, and it is NOT NULL without a default",
            "Add it to /tables/0/backward.",
        ),
        (
            "two servers",
            json!({"tables": [{"first": "s1.t", "second": "f2.t"}, {"first": "s1.other", "second": "f2.elsewhere", "backward": {"id": "id"}}]}),
            "mapping: the foreign tables lie on more than one server",
            "One migration leads to one server: start one for each.",
        ),
    ];
    for (name, mapping, detail, hint) in rows {
        let mut expected = Expected::problem(detail, hint);
        if hint == NOTHING || hint == "…" {
            expected.message = "the mapping of migration \"refused\" has …".into();
        }
        bench.refuses(name, &start(&mapping), &expected);
    }
    witness.testify();
}

#[test]
fn keys() {
    let bench = bench();
    let none = json!({});
    let exactly = "A key is exactly the columns of an immediate, non-partial unique index, and they are NOT NULL.";
    let add = |table: &str| {
        format!(
            "ALTER TABLE \"s1\".\"{table}\" ADD PRIMARY KEY (...); or name the columns of a unique index in the mapping's \"key\"."
        )
    };
    let plain = "Give it a column of its own in \"f2\".\"t\", by a plain reference in both directions.";
    let types = "Keys travel as text: use integers, text with a deterministic collation, uuid, dates, timestamps, numeric(p, s), bytea, enums or network addresses.";
    for (name, mapping, detail, hint) in [
        ("no key", one("s1.keyless", "f2.t", &none), "\"s1\".\"keyless\": has no primary key", add("keyless").as_str()),
        (
            "a unique column that may be NULL",
            one("s1.nullable", "f2.t", &none),
            "\"s1\".\"nullable\": has no primary key",
            &add("nullable"),
        ),
        (
            "a declared key that may be NULL",
            one("s1.nullable", "f2.t", &json!({"key": ["id"]})),
            "\"s1\".\"nullable\": no unique index makes (id) a key",
            exactly,
        ),
        (
            "a partial index",
            one("s1.partial", "f2.t", &json!({"key": ["id"]})),
            "\"s1\".\"partial\": no unique index makes (id) a key",
            exactly,
        ),
        (
            "a deferrable key",
            one("s1.deferred", "f2.t", &json!({"key": ["id"]})),
            "\"s1\".\"deferred\": no unique index makes (id) a key",
            exactly,
        ),
        (
            "a key of no column",
            one("s1.t", "f2.t", &json!({"key": []})),
            "\"s1\".\"t\": no unique index makes () a key",
            exactly,
        ),
        (
            "a key of one column twice",
            one("s1.t", "f2.t", &json!({"key": ["id", "id"]})),
            "\"s1\".\"t\": no unique index makes (id, id) a key",
            exactly,
        ),
        (
            "a part of the key",
            one("s1.two", "f2.two", &json!({"key": ["a"]})),
            "\"s1\".\"two\": no unique index makes (a) a key",
            exactly,
        ),
        (
            "a key that is computed",
            one("s1.t", "f2.t", &json!({"forward": {"id": "id + 1"}, "backward": {"id": "id - 1"}})),
            "\"s1\".\"t\".\"id\": a key column is not mapped by a plain reference",
            plain,
        ),
        (
            "a key of another type",
            one("s1.other", "f2.other", &none),
            "\"f2\".\"other\".\"id\": key column has type text, but \"id\" of the first table has type bigint",
            "Give it that type on both servers; here: ALTER FOREIGN TABLE \"f2\".\"other\" ALTER COLUMN \"id\" TYPE bigint;",
        ),
        (
            "a key that is none on the second server",
            one("s1.t", "f2.keyless", &none),
            "\"f2\".\"keyless\" on the second server: no unique index makes (\"id\") a key",
            "There: ALTER TABLE \"f2\".\"keyless\" ADD PRIMARY KEY (\"id\");",
        ),
        (
            "numbers without a scale",
            one("s1.decimal", "f2.decimal", &none),
            "\"s1\".\"decimal\".\"id\": a key column of type numeric has no fixed scale",
            "One number has several forms then (1, 1.0). Give the column a scale: numeric(p, s).",
        ),
        (
            "floating point",
            one("s1.real", "f2.real", &none),
            "\"s1\".\"real\".\"id\": a key column of type double precision can hold equal values of different text",
            types,
        ),
    ] {
        bench.refuses(name, &start(&mapping), &Expected::problem(detail, hint));
    }
}

#[test]
fn expressions() {
    let bench = bench();
    let witness = Witness::of(&bench.pair.first);
    let forward = |expression: &str| one("s1.e", "f2.v", &json!({"forward": {"v": expression}}));
    let one_value = "An expression gives one value for one row.";
    let zone = "Say in which time zone, and go on with that: column AT TIME ZONE 'UTC'.";
    let in_utc = |column: &str| format!("Write to_char({column} AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US').");
    let pin = |signature: &str| {
        format!(
            "If its result depends on nothing but its arguments and some settings, pin these: ALTER FUNCTION {signature} IMMUTABLE SET timezone = 'UTC' SET datestyle = 'ISO';"
        )
    };
    let functions = "No function matches the given name and argument types. You might need to add explicit type casts.";
    let operators = "No operator matches the given name and argument types. You might need to add explicit type casts.";
    let rows: Vec<(&str, &str, String)> = vec![
        // What does not parse, or does not fit.
        ("t ||", "is not valid: syntax error at or near \")\"", String::new()),
        ("nothing", "is not valid: column \"nothing\" does not exist", String::new()),
        ("nothing(t)", "is not valid: function nothing(text) does not exist", functions.into()),
        ("id + t", "is not valid: operator does not exist: bigint + text", operators.into()),
        ("t::nothing", "is not valid: type \"nothing\" does not exist", String::new()),
        ("id::timestamp", "is not valid: cannot cast type bigint to timestamp without time zone", String::new()),
        ("'x'::integer", "is not valid: invalid input syntax for type integer: \"x\"", String::new()),
        ("$1", "is not valid: there is no parameter $1", String::new()),
        // What is more than one value of one row.
        ("t AS v", "is not valid: syntax error at or near \"AS\"", String::new()),
        ("t) FROM s1.e --", "is not valid: …", String::new()),
        ("t) || (t", "is not valid: syntax error at or near \")\"", String::new()),
        ("t, t", "is not valid: it is more than one expression", String::new()),
        ("max(t)", "contains an aggregate", one_value.into()),
        ("row_number() OVER ()", "contains a window function", one_value.into()),
        ("unnest(tags)", "contains a function that returns a set", one_value.into()),
        ("(SELECT max(label) FROM s1.t)", "reads table s1.t", "An expression may use the columns of one row only: changes of other rows would not be noticed.".into()),
        // Volatile.
        ("t || random()", "is volatile: it calls random()", SAME_VALUE.into()),
        ("clock_timestamp()::text", "is volatile: it calls clock_timestamp()", SAME_VALUE.into()),
        ("nextval('s1.seq')", "is volatile: it calls nextval(regclass)", SAME_VALUE.into()),
        ("gen_random_uuid()", "is volatile: it calls gen_random_uuid()", SAME_VALUE.into()),
        ("undeclared(t)", "is volatile: it calls undeclared(text)", pin("s1.undeclared(text)")),
        ("now()::text || random()", "is volatile: it calls random()", SAME_VALUE.into()),
        // Of the session.
        ("now() > tz", "depends on the session: it calls now()", ROW_ONLY.into()),
        ("CURRENT_DATE > d", "depends on the session: it calls CURRENT_DATE", ROW_ONLY.into()),
        ("CURRENT_USER", "depends on the session: it calls CURRENT_USER", ROW_ONLY.into()),
        ("current_setting('TimeZone')", "depends on the session: it calls current_setting(text)", ROW_ONLY.into()),
        // Text by output functions that depend on settings.
        ("tz::text", "depends on the session: it casts timestamp with time zone to text", in_utc("tz")),
        ("(tz + iv)::text", "depends on the session: it casts timestamp with time zone to text", in_utc("column")),
        ("ts::text", "depends on the session: it casts timestamp without time zone to text", "Write to_char(ts, 'YYYY-MM-DD\"T\"HH24:MI:SS.US').".into()),
        ("d::text", "depends on the session: it casts date to text", "Write to_char(d::timestamp, 'YYYY-MM-DD').".into()),
        ("dom::text", "depends on the session: it casts day to text", "Write to_char(dom::timestamp, 'YYYY-MM-DD').".into()),
        ("iv::text", "depends on the session: it casts interval to text", WRAP.into()),
        ("cash::text", "depends on the session: it casts money to text", WRAP.into()),
        ("b::text", "depends on the session: it casts bytea to text", "Write encode(b, 'hex').".into()),
        ("days::text", "depends on the session: it casts date[] to text", "Write to_char(days::timestamp, 'YYYY-MM-DD').".into()),
        ("u::text", "depends on the session: it casts unsettled to text", in_utc("u")),
        ("dr::text", "depends on the session: it casts daterange to text", "…".into()),
        ("'s1.t'::regclass::text", "depends on the session: …", "…".into()),
        ("t || ts", "depends on the session: it calls textanycat(text,anynonarray) with a value of type timestamp without time zone", "Write to_char(column, 'YYYY-MM-DD\"T\"HH24:MI:SS.US').".into()),
        ("concat(t, ', ', tz)", "depends on the session: it calls concat(\"any\") with a value of type timestamp with time zone", in_utc("column")),
        ("format('%s', b)", "depends on the session: it calls format(text,\"any\") with a value of type bytea", "Write encode(column, 'hex').".into()),
        ("array_to_string(days, ',')", "depends on the session: it calls array_to_string(anyarray,text) with a value of type date", "Write to_char(column::timestamp, 'YYYY-MM-DD').".into()),
        ("to_jsonb(u)", "depends on the session: it calls to_jsonb(anyelement) with a value of type timestamp with time zone", in_utc("column")),
        ("to_jsonb(ROW(t, tz))", "depends on the session: it calls to_jsonb(anyelement) with a value of type timestamp with time zone", in_utc("column")),
        ("(SELECT jsonb_agg(iv))", "depends on the session: it calls jsonb_agg(anyelement) with a value of type interval", WRAP.into()),
        // Values by input functions that depend on settings.
        ("t::date = d", "depends on the session: it casts text to date", "Write to_date(column, 'YYYY-MM-DD').".into()),
        ("t::timestamptz = tz", "depends on the session: it casts text to timestamp with time zone", WRAP.into()),
        ("d > '01/02/2024'", "depends on the session: it reads '01/02/2024' as date", "Write it as in '2024-01-31'.".into()),
        ("ts > 'now'", "depends on the session: it reads 'now' as timestamp without time zone", "Write it as in '2024-01-31 12:00:00'.".into()),
        ("tz > '2024-01-31 12:00'", "depends on the session: it reads '2024-01-31 12:00' as timestamp with time zone", "Write it as in '2024-01-31 12:00:00+00'.".into()),
        // Time zones, locales and configurations.
        ("date_trunc('day', tz) = ts", "depends on the session: it calls …", "…".into()),
        ("extract(hour FROM tz)", "depends on the session: it calls extract(text,timestamp with time zone)", zone.into()),
        ("tz::date = d", "depends on the session: it calls date(timestamp with time zone)", zone.into()),
        ("d::timestamptz = tz", "depends on the session: it calls timestamptz(date)", "Say in which time zone: column::timestamp AT TIME ZONE 'UTC'.".into()),
        ("ts::timestamptz = tz", "depends on the session: it calls timestamptz(timestamp without time zone)", "Say in which time zone: column AT TIME ZONE 'UTC'.".into()),
        ("tz + iv = tz", "depends on the session: it calls timestamptz_pl_interval(timestamp with time zone,interval)", "Say in which time zone days are counted: (column AT TIME ZONE 'UTC' + ...) AT TIME ZONE 'UTC'.".into()),
        ("to_char(tz, 'YYYY')", "depends on the session: it calls to_char(timestamp with time zone,text)", "Say in which time zone: to_char(column AT TIME ZONE 'UTC', ...); of a date: to_char(column::timestamp, ...).".into()),
        ("to_char(ts, 'TMMonth')", "depends on the session: it calls to_char(timestamp without time zone,text)", "Write the format as a literal, without TM (names in the language of lc_time).".into()),
        ("to_char(ts, t)", "depends on the session: it calls to_char(timestamp without time zone,text)", "Write the format as a literal, without TM (names in the language of lc_time).".into()),
        ("to_char(n, '999D99')", "depends on the session: it calls to_char(numeric,text)", "…".into()),
        ("to_tsvector(t)", "depends on the session: it calls to_tsvector(text)", "Name the text search configuration: to_tsvector('english', ...).".into()),
        ("declared_stable(tz)", "depends on the session: it calls declared_stable(timestamp with time zone)", pin("s1.declared_stable(timestamp with time zone)")),
    ];
    for (expression, problem, hint) in rows {
        let detail = format!("/tables/0/forward/v: the expression {expression} {problem}");
        let hint = if hint.is_empty() { NOTHING } else { &hint };
        bench.refuses(expression, &start(&forward(expression)), &Expected::problem(&detail, hint));
    }
    let backward = one("s1.e", "f2.v", &json!({"forward": {"v": "t"}, "backward": {"d": "v::date"}}));
    bench.refuses(
        "backward",
        &start(&backward),
        &Expected::problem(
            "/tables/0/backward/d: the expression v::date depends on the session: it casts text to date",
            "Write to_date(column, 'YYYY-MM-DD').",
        ),
    );
    bench.refuses(
        "what the mapping leaves out",
        &start(&one("s1.same", "f2.same", &json!({"backward": {"at": "NULL"}}))),
        &Expected::problem("\"f2\".\"same\".\"at\": the expression \"at\" depends on the session: it casts timestamp with time zone to text", &in_utc("column")),
    );
    witness.testify();
}

/// What looks like the refused ones and is not, the remedies of the hints among them.
#[test]
fn expressions_that_every_session_evaluates_alike() {
    let bench = bench();
    let expressions = [
        "lower(t)",
        "id::text",
        "n::text",
        "f::text",
        "m::text",
        "tags::text",
        "moods::text",
        "s::text",
        "r::text",
        "j::text",
        "t || id",
        "t || m",
        "concat(t, n, m)",
        "concat_ws('-', t, id)",
        "format('%s-%s', t, id)",
        "quote_nullable(m)",
        "to_jsonb(tags)::text",
        "to_jsonb(s)::text",
        "jsonb_build_object('a', t, 'd', d, 'ts', ts)::text",
        "array_to_string(tags, ',')",
        "array_to_string(moods, ',')",
        "to_char(tz AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US')",
        "to_char(ts, 'YYYY-MM-DD\"T\"HH24:MI:SS.US')",
        "to_char(d::timestamp, 'YYYY-MM-DD')",
        "encode(b, 'hex')",
        "to_tsvector('english', t)::text",
        "pinned(tz)",
        "extract(epoch FROM tz)::text",
        "extract(hour FROM tz AT TIME ZONE 'UTC')::text",
        "((tz AT TIME ZONE 'UTC' + interval '1 day') AT TIME ZONE 'UTC' = tz)::text",
        "(tz > '2024-01-31 12:00:00+00')::text",
        "(d > '2024-01-31')::text",
        "(ts > DATE '2024-01-31')::text",
        "(ts > 'epoch')::text",
        "((tz AT TIME ZONE 'UTC')::date = to_date(t, 'YYYY-MM-DD'))::text",
        "(d::timestamp AT TIME ZONE 'UTC' = tz)::text",
        "(date_trunc('day', tz AT TIME ZONE 'UTC') = ts)::text",
        "to_char(n, 'FM999990.00')",
        "(SELECT string_agg(x, ',') FROM unnest(tags) AS x)",
        "(SELECT jsonb_agg(x) FROM unnest(tags) AS x)::text",
        "(t::s1.mood = m)::text",
        "CASE WHEN m = 'good' THEN t END",
    ];
    let columns: Vec<String> = (0..expressions.len()).map(|i| format!("c{i} text")).collect();
    bench.pair.second_store("many", &format!("CREATE TABLE v (id bigint PRIMARY KEY, {})", columns.join(", ")));
    bench.pair.first.sql(
        "INSERT INTO s1.e (id, ts, tz, d, n, m, tags) VALUES (1, '2024-01-31', '2024-01-31 12:00+00', '2024-01-31', 1.5, 'good', '{a,b}')",
    );
    let forward: Value = expressions
        .iter()
        .enumerate()
        .map(|(i, e)| (format!("c{i}"), Value::from(*e)))
        .collect::<serde_json::Map<_, _>>()
        .into();
    let mapping = json!({"tables": [{"first": "s1.e", "second": "many.v", "forward": forward}]});
    let migration = Migration::start(&bench.pair, "alike", &mapping);
    migration.until_state("first");
    migration.wait();
    let copied = bench.pair.second.text("SELECT c21 FROM many.v");
    assert_eq!(copied.as_deref(), Some("2024-01-31T12:00:00.000000"));
    migration.cancel();
}

const CALLS: [&str; 7] = [
    "migration_wait('market')",
    "migration_set_state('market', 'both')",
    "migration_pause('market')",
    "migration_resume('market')",
    "migration_finish('market')",
    "migration_cancel('market')",
    "migration_set_state('market', 'first', force => true)",
];

/// A connection that acts as a role.
fn as_role(pair: &Pair, role: &str) -> Client {
    let mut client = pair.first.connect();
    client.batch_execute(&format!("SET ROLE {role}")).expect("a role");
    client
}

#[test]
fn roles_and_connections() {
    let mut bench = bench();
    let witness = Witness::of(&bench.pair.first);
    let pair = &bench.pair;
    pair.first.sql(
        "CREATE ROLE nobody; CREATE ROLE mover;
         GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA public TO mover;
         GRANT USAGE ON SCHEMA s1, f2 TO mover; GRANT USAGE ON FOREIGN SERVER second_server TO mover;
         CREATE TABLE s1.moved (LIKE s1.t INCLUDING ALL); ALTER TABLE s1.moved OWNER TO mover; ALTER FOREIGN TABLE f2.t OWNER TO mover",
    );
    pair.second
        .sql("CREATE ROLE mover LOGIN PASSWORD 'right'; GRANT USAGE ON SCHEMA f2 TO mover; GRANT ALL ON f2.t TO mover");
    let ours = start(&one("s1.moved", "f2.t", &json!({})));
    let theirs = start(&one("s1.t", "f2.other", &json!({"backward": {"id": "id"}})));
    let superusers = start(&one("s1.t", "f2.t", &json!({})));

    // Who may call.
    let (mut nobody, mut mover) = (as_role(pair, "nobody"), as_role(pair, "mover"));
    bench.refuses_on(
        &mut nobody,
        "no EXECUTE",
        &ours,
        &Expected::new("42501", "permission denied for function migration_start", "", ""),
    );
    let mut expected = Expected::new(
        "42501",
        "the mapping of migration \"refused\" has …",
        "…\"s1\".\"t\": is not owned by \"mover\" (All tables of a migration belong to the role that starts it: SET ROLE to their owner.)…",
        NOTHING,
    );
    expected.code = "22023";
    bench.refuses_on(&mut mover, "others' tables, among other problems", &theirs, &expected);

    // How the second server is reached.
    let connection = |what: &str| format!("no connection to the second server: …{what}…");
    let check = "Check that the second server runs, and the options of the foreign server and the user mapping.";
    let change = |sql: &str| pair.first.sql(sql);
    change("DROP USER MAPPING FOR PUBLIC SERVER second_server");
    bench.refuses(
        "no user mapping",
        &superusers,
        &Expected::problem(
            "server \"second_server\": role \"postgres\" has no user mapping for it",
            "CREATE USER MAPPING FOR \"postgres\" SERVER \"second_server\" OPTIONS (user '...', password '...');",
        ),
    );
    change("CREATE USER MAPPING FOR postgres SERVER second_server OPTIONS (user 'postgres')");
    let other_owner = Expected::problem(
        "\"s1\".\"moved\": its owner \"mover\", as whom the managed view will be read, has no user mapping for server \"second_server\"",
        "CREATE USER MAPPING FOR \"mover\" SERVER \"second_server\" OPTIONS (user '...', password '...');",
    );
    bench.refuses("the owner has no user mapping", &ours, &other_owner);
    let needs = "A migration owned by a role that is not a superuser needs a password in the user mapping, and a second server that asks for it.";
    let required = "password is required to connect to the second server";
    change("CREATE USER MAPPING FOR mover SERVER second_server OPTIONS (user 'mover')");
    bench.refuses_on(
        &mut mover,
        "no password",
        &ours,
        &Expected::new("2F003", required, "The user mapping has no password.", needs),
    );
    change("ALTER USER MAPPING FOR mover SERVER second_server OPTIONS (ADD password 'right')");
    bench.refuses_on(
        &mut mover,
        "a password that is not used",
        &ours,
        &Expected::new("2F003", required, "The second server did not ask for the password of the user mapping.", needs),
    );

    let hba = pair.second.text("SHOW hba_file").expect("a file");
    let rules = fs::read_to_string(&hba).expect("pg_hba.conf");
    fs::write(&hba, format!("host all mover all scram-sha-256\n{rules}")).expect("pg_hba.conf");
    pair.second.reload();
    change("ALTER USER MAPPING FOR mover SERVER second_server OPTIONS (SET password 'wrong')");
    let asks = || format!("host=127.0.0.1 port={} user=mover dbname=app password=wrong", pair.second.port());
    until("the server asks for the password", SOON, || postgres::Client::connect(&asks(), postgres::NoTls).is_err());
    let wrong = Expected::new("08001", &connection("password authentication failed for user \"mover\""), "", check);
    bench.refuses_on(&mut mover, "a wrong password", &ours, &wrong);
    change("ALTER USER MAPPING FOR postgres SERVER second_server OPTIONS (SET user 'mover', ADD password 'wrong')");
    bench.refuses("a superuser's wrong password", &superusers, &wrong);
    change("ALTER USER MAPPING FOR postgres SERVER second_server OPTIONS (SET user 'nobody_there', DROP password)");
    bench.refuses(
        "a role that is not there",
        &superusers,
        &Expected::new("08001", &connection("role \"nobody_there\" does not exist"), "", check),
    );
    change(
        "ALTER USER MAPPING FOR postgres SERVER second_server OPTIONS (SET user 'postgres'); ALTER SERVER second_server OPTIONS (SET dbname 'nowhere')",
    );
    bench.refuses(
        "a database that is not there",
        &superusers,
        &Expected::new("08001", &connection("database \"nowhere\" does not exist"), "", check),
    );
    change("ALTER SERVER second_server OPTIONS (SET dbname 'latin')");
    bench.refuses("another encoding", &superusers, &Expected::new("22023", "the mapping of migration \"refused\" has 2 problems", "second server: the database's encoding is not UTF8 (Other encodings are not supported yet.)\n\"f2\".\"t\" on the second server: the table does not exist (…)", NOTHING));
    change("ALTER SERVER second_server OPTIONS (SET dbname 'app', SET port '1')");
    bench.refuses(
        "a server that is away",
        &superusers,
        &Expected::new("08001", &connection("Connection refused"), "", check),
    );
    change(&format!("ALTER SERVER second_server OPTIONS (SET port '{}')", pair.second.port()));
    change("ALTER TABLE s1.moved OWNER TO postgres");
    bench.refuses_on(
        &mut mover,
        "others' table",
        &start(&one("s1.moved", "f2.t", &json!({}))),
        &Expected::new("08001", "…", "…", "…"),
    );

    // Another one's migration.
    change("ALTER FOREIGN TABLE f2.t OWNER TO postgres; ALTER SERVER second_server OPTIONS (SET dbname 'app')");
    market::create(&bench.pair, 10);
    market::started(&bench.pair);
    bench.is_live = true;
    for call in CALLS {
        let call = format!("SELECT {call}");
        let owner = Expected::new("42501", "must be owner of migration \"market\"", "", "SET ROLE postgres;");
        bench.refuses_on(&mut mover, &call, &call, &owner);
    }
    witness.testify();
}

/// What may be done in each state, by which function, and where it leads.
const ALLOWED: &[(&str, &[(&str, &str)])] = &[
    ("copying", &[("cancel", "cancelled")]),
    ("first", &[("set_state", "both"), ("cancel", "cancelled"), ("set_state", "copying")]),
    ("both", &[("set_state", "first"), ("set_state", "second")]),
    ("second", &[("set_state", "both"), ("finish", "finished")]),
    ("finished", &[]),
    ("cancelled", &[]),
];

/// Every forbidden move of the state that the migration is in, and the one that is none.
fn refuses_what_is_not_allowed(bench: &Bench, name: &str) {
    let migration = Migration::named(&bench.pair, name);
    let state = migration.state();
    let (_, allowed) = ALLOWED.iter().find(|(s, _)| *s == state).expect("a state");
    let name_sql = literal(name);
    let calls: Vec<String> = allowed
        .iter()
        .map(|(function, to)| match *function {
            "set_state" => format!("SELECT migration_set_state({name_sql}, '{to}');"),
            end => format!("SELECT migration_{end}({name_sql});"),
        })
        .collect();
    let by_itself = if state == "copying" { "it goes to first by itself when the copy is complete, and " } else { "" };
    let hint = if calls.is_empty() {
        format!("A migration that is {state} has ended; migration_start begins another one.")
    } else {
        format!("From {state} {by_itself}these are allowed: {}", calls.join(" "))
    };
    let refuses = |call: &str, message: &str, hint: &str| {
        let message = format!("migration \"{name}\" cannot {message}");
        let what = format!("{state}: {call}");
        bench.refuses(&what, &format!("SELECT migration_{call}"), &Expected::new("55000", &message, "", hint));
    };
    for (to, _) in ALLOWED {
        if *to != state && !allowed.contains(&("set_state", to)) {
            refuses(&format!("set_state({name_sql}, '{to}')"), &format!("go from {state} to {to}"), &hint);
        }
    }
    for (end, to, from) in [
        ("finish", "finished", "A migration is finished from second. "),
        ("cancel", "cancelled", "A migration is cancelled from copying or first. "),
    ] {
        if *to != state && !allowed.contains(&(end, to)) {
            let hint = if calls.is_empty() { hint.clone() } else { format!("{from}{hint}") };
            refuses(&format!("{end}({name_sql})"), &format!("be {to} in state {state}"), &hint);
        }
    }
    if calls.is_empty() {
        for (call, word) in [("pause", "paused"), ("resume", "resumed")] {
            refuses(&format!("{call}({name_sql})"), &format!("be {word} in state {state}"), &hint);
        }
    }
    migration.set_state(&state);
    assert_eq!(migration.state(), state);
}

#[test]
fn states() {
    let pair = Pair::with(&["autovacuum = off"], &["autovacuum = off"]);
    market::create(&pair, 2000);
    let witness = Witness::of(&pair.first);
    let mut bench = Bench::new(pair);
    bench.is_live = true;
    let slow = json!({"copy_rate": 100, "chunk_rows": 10});
    // Names that have to be quoted in a hint.
    let (back, on) = ("it's", "the \"second\" one");
    let migration = Migration::start_with(&bench.pair, back, &market::mapping(), &slow);
    bench.changing = &["crossover.migrated_table", "market.client", "market.sale"];
    refuses_what_is_not_allowed(&bench, back);
    assert_eq!(migration.state(), "copying", "the copy was meant to last");
    migration.cancel();
    bench.changing = &[];
    refuses_what_is_not_allowed(&bench, back);

    bench.pair.second.sql("TRUNCATE market.client, market.sale");
    let migration = Migration::start(&bench.pair, on, &market::mapping());
    migration.until_state("first");
    migration.wait();
    refuses_what_is_not_allowed(&bench, on);

    // Paused, it moves nowhere. A pause of what is paused changes nothing.
    migration.call("pause");
    migration.call("pause");
    let hint = format!("SELECT migration_resume({});", literal(on));
    for (call, cannot) in [
        (format!("migration_set_state({}, 'both')", literal(on)), "change its state"),
        (format!("migration_wait({})", literal(on)), "catch up"),
    ] {
        let message = format!("migration \"{on}\" is paused and cannot {cannot}");
        bench.refuses(&call, &format!("SELECT {call}"), &Expected::new("55000", &message, "", &hint));
    }
    migration.call("resume");
    migration.call("resume");

    let forced = format!("SELECT migration_set_state({}, 'both', force => true)", literal(on));
    let message = "force is not supported yet for a move to another state";
    bench.refuses(
        "force",
        &forced,
        &Expected::new("22023", message, "", "Bring the second server back and call without force."),
    );
    for state in ["both", "second"] {
        migration.set_state(state);
        refuses_what_is_not_allowed(&bench, on);
    }
    let taken = start_as(on, &market::mapping().to_string(), "{}");
    let taken_hint = "Choose another name, or end the other migration with migration_finish or migration_cancel.";
    bench.refuses(
        "a name that is taken",
        &taken,
        &Expected::new("42710", &format!("migration \"{on}\" already exists"), "", taken_hint),
    );
    migration.finish();
    refuses_what_is_not_allowed(&bench, on);
    witness.testify();
}

#[test]
fn names_and_arguments() {
    let bench = bench();
    let witness = Witness::of(&bench.pair.first);
    let list = "SELECT name, state FROM migration_status lists the migrations of this database.";
    for name in ["nobody", "no\"body", "no'body", "   ", "", "näbødy"] {
        for call in ["wait({})", "set_state({}, 'both')", "pause({})", "resume({})", "finish({})", "cancel({})"] {
            let call = format!("SELECT migration_{}", call.replace("{}", &literal(name)));
            bench.refuses(
                &call,
                &call,
                &Expected::new("42704", &format!("migration \"{name}\" does not exist"), "", list),
            );
        }
    }
    let mapping = one("s1.t", "f2.t", &json!({})).to_string();
    let long = "x".repeat(64);
    for (name, expected) in [
        ("", Expected::new("22023", "the name of the migration is empty", "", "Choose a name of 1 to 63 bytes.")),
        ("   ", Expected::new("22023", "the name of the migration is empty", "", "Choose a name of 1 to 63 bytes.")),
        (
            long.as_str(),
            Expected::new(
                "42622",
                "the name of the migration is too long",
                "It has 64 bytes; a name can have 63.",
                "Choose a shorter one.",
            ),
        ),
        (
            &"é".repeat(32),
            Expected::new(
                "42622",
                "the name of the migration is too long",
                "It has 64 bytes; a name can have 63.",
                "Choose a shorter one.",
            ),
        ),
    ] {
        bench.refuses(&format!("a start of \"{name}\""), &start_as(name, &mapping, "{}"), &expected);
    }
    let positive = "For example: interval '30 seconds'.";
    for timeout in ["0", "-1 s", "0.0"] {
        let call = format!("SELECT migration_start('refused', {}, timeout => '{timeout}')", literal(&mapping));
        bench.refuses(timeout, &call, &Expected::new("22023", "the timeout must be positive", "", positive));
    }
    for timeout in ["1000000 years", "170000000 years"] {
        let call = format!("SELECT migration_start('refused', {}, timeout => '{timeout}')", literal(&mapping));
        bench.refuses(
            timeout,
            &call,
            &Expected::new("22023", "the timeout is too long", "", "It can be 10 years at most."),
        );
    }
    bench.refuses(
        "no state",
        "SELECT migration_set_state('nobody', 'sideways')",
        &Expected::new("22P02", "invalid input value for enum migration_state: \"sideways\"", "", ""),
    );
    bench.refuses(
        "no store",
        "SELECT migration_resolve(1, 'third')",
        &Expected::new("22023", "\"third\" is not a store", "", "keep is 'first' or 'second'."),
    );
    bench.refuses(
        "no conflict",
        "SELECT migration_resolve(1, 'first')",
        &Expected::new(
            "42704",
            "conflict 1 does not exist",
            "",
            "SELECT id, name, table_name, key, kind FROM migration_conflicts lists them.",
        ),
    );
    // Every function is strict.
    for call in [
        "migration_start(NULL, '{}')",
        "migration_start('refused', NULL)",
        "migration_set_state('nobody', NULL)",
        "migration_wait(NULL)",
    ] {
        assert_eq!(bench.pair.first.text(&format!("SELECT {call} IS NULL")).as_deref(), Some("t"), "{call}");
    }
    witness.testify();
}

/// Names that are allowed go through a whole life, those of tables, columns and views among them.
#[test]
fn names_that_are_allowed() {
    let pair = Pair::new();
    let witness = Witness::of(&pair.first);
    let names = [
        "it's \"quoted\"; --",
        "  two words\t",
        "Übergang – 移行 🚂",
        &"é".repeat(31),
        &"x".repeat(63),
        "back\\slash $1 %s {}",
        "select",
    ];
    for (i, name) in names.into_iter().enumerate() {
        let text: String = name.chars().filter(|c| *c != '\t').collect();
        let (table, view, column) = (quoted(&text), quoted(&format!("v{i}")), quoted(&text));
        pair.first.sql(&format!(
            "CREATE SCHEMA s{i}; CREATE TABLE s{i}.{table} (id bigint PRIMARY KEY, {column} text, \"n/~\" integer); INSERT INTO s{i}.{table} VALUES (1, 'one', 1)"
        ));
        pair.second_store(
            &format!("{i} {text}").chars().take(15).collect::<String>(),
            &format!("CREATE TABLE {table} (id bigint PRIMARY KEY, {column} text, tenths bigint)"),
        );
        let schema: String = format!("{i} {text}").chars().take(15).collect();
        let mapping = one(
            &format!("s{i}.{table}"),
            &format!("{}.{table}", quoted(&schema)),
            &json!({"second_view": format!("s{i}.{view}"), "forward": {"tenths": "\"n/~\" * 10::bigint"}, "backward": {"n/~": "(tenths / 10)::integer"}}),
        );
        let migration = Migration::start(&pair, name, &mapping);
        migration.until_state("first");
        migration.walk(&["both", "second"]);
        pair.first.sql(&format!("UPDATE s{i}.{table} SET {column} = 'two', \"n/~\" = 2"));
        let arrived = format!("SELECT {column} || tenths FROM {}.{table}", quoted(&schema));
        assert_eq!(pair.second.text(&arrived).as_deref(), Some("two20"), "{name}");
        if i % 2 == 0 {
            migration.finish();
        } else {
            migration.walk(&["both", "first"]);
            migration.cancel();
        }
        let stands = format!("SELECT {column} || \"n/~\" FROM s{i}.{table}");
        assert_eq!(pair.first.text(&stands).as_deref(), Some("two2"), "{name}");
    }
    witness.testify();
}

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
    let detail = "In the way:\npid … (the session that called) on the first server, application \"\", role postgres, active, transaction open for … s: …";
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
        bench.refuses_on(
            &mut begin("SELECT 1"),
            "afterwards",
            "SELECT 1/0",
            &Expected::new("22012", "division by zero", "", ""),
        );
        until("nothing of it is left", SOON, || schema::workers(&bench.pair).is_empty());
    }
    // A reader is in nobody's way.
    let mut client = begin("BEGIN; SELECT FROM s1.t");
    client.batch_execute(&patient(&all.replace("refused", "reader"))).expect("a start");
    client.batch_execute("COMMIT").expect("a commit");
    let migration = Migration::named(&bench.pair, "reader");
    migration.until_state("first");
    migration.wait();
    bench.is_live = true;
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
    soon("second", &mut || {
        bench.refuses_on(&mut begin("BEGIN; SELECT FROM s1.t"), "second", &to("second"), &locked("reader"))
    });
    migration.set_state("second");
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

#[test]
fn an_ellipsis_stands_for_anything() {
    assert!(fits("a…c…", "abcd") && fits("…", "") && fits("abc", "abc") && fits("a…a", "aba"));
    assert!(!fits("a…d…", "abc") && !fits("", "a") && !fits("ab", "abc") && !fits("a…b", "ac"));
}

//! Both stores exposed and changed at a time: one winner by policy, every losing image kept, no value twice and no child without its parent.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pgrx_tests::cluster::explain;
use pgrx_tests::tokens::seed;
use pgrx_tests::wait::for_a;
use pgrx_tests::wait::{SOON, until};
use pgrx_tests::{Load, Witness};
use pgrx_tests::{Migration, Pair};
use postgres::Client;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};

/// Parents with a unique value, and children, in a schema of their own on both servers; foreign keys and unique values on both.
fn family(pair: &Pair, schema: &str) -> Value {
    pair.first.sql(&format!(
        "CREATE SCHEMA {schema}_1; SET search_path = {schema}_1;
         CREATE TABLE parent (id integer PRIMARY KEY, email text UNIQUE, note text);
         CREATE TABLE child (id integer PRIMARY KEY, parent_id integer NOT NULL REFERENCES parent ON DELETE CASCADE, name text);
         INSERT INTO parent SELECT n, 'p' || n, 'note ' || n FROM generate_series(1, 20) AS n;
         INSERT INTO child SELECT n, n, 'c' || n FROM generate_series(1, 10) AS n"
    ));
    pair.second_store(
        schema,
        "CREATE TABLE elder (no integer PRIMARY KEY, mail text UNIQUE);
         CREATE TABLE younger (no integer PRIMARY KEY, elder_no integer NOT NULL REFERENCES elder ON DELETE CASCADE, name text)",
    );
    json!({"tables": [
        {"first": format!("{schema}_1.parent"), "second": format!("{schema}.elder"), "second_view": format!("{schema}_1.elder"),
         "forward": {"no": "id", "mail": "email"}},
        {"first": format!("{schema}_1.child"), "second": format!("{schema}.younger"), "second_view": format!("{schema}_1.younger"),
         "forward": {"no": "id", "elder_no": "parent_id"}},
    ]})
}

/// A migration of a family in `both`, and where its rows are.
struct Family<'a> {
    pair: &'a Pair,
    migration: Migration<'a>,
    schema: String,
}

impl<'a> Family<'a> {
    fn in_both(pair: &'a Pair, schema: &str, policy: &str) -> Self {
        let mapping = family(pair, schema);
        let migration = Migration::start_with(pair, schema, &mapping, &json!({"conflicts": policy}));
        migration.until_state("first");
        migration.set_state("both");
        Self { pair, migration, schema: schema.to_owned() }
    }

    /// Runs statements on both stores with no replication between, then lets it go on until nothing is left to do.
    fn at_once(&self, first: &str, second: &str) {
        self.migration.call("pause");
        let schema = &self.schema;
        self.pair.first.sql(&format!("SET search_path = {schema}_1; {first}"));
        self.pair.second.sql(&format!("SET search_path = {schema}; {second}"));
        self.migration.call("resume");
        self.migration.settle();
        self.assert_whole();
    }

    fn first(&self, query: &str) -> Vec<String> {
        self.pair.first.list(&query.replace("FROM ", &format!("FROM {}_1.", self.schema)))
    }

    /// Both stores hold the same, no value twice, no child without parent, nothing parked.
    fn assert_whole(&self) {
        let s = &self.schema;
        for (a, b) in [
            (
                format!("SELECT concat_ws('|', id, email) FROM {s}_1.parent__first ORDER BY id"),
                format!("SELECT concat_ws('|', no, mail) FROM {s}.elder ORDER BY no"),
            ),
            (
                format!("SELECT concat_ws('|', id, parent_id, name) FROM {s}_1.child__first ORDER BY id"),
                format!("SELECT concat_ws('|', no, elder_no, name) FROM {s}.younger ORDER BY no"),
            ),
        ] {
            assert_eq!(self.pair.first.list(&a), self.pair.second.list(&b), "{s}: the stores differ");
        }
        let orphans = format!(
            "SELECT id FROM {s}_1.child__first c WHERE NOT EXISTS (SELECT FROM {s}_1.parent__first p WHERE p.id = c.parent_id)"
        );
        assert_eq!(self.pair.first.list(&orphans), [""; 0], "{s}: children without parents");
        let twice = format!("SELECT email FROM {s}_1.parent__first GROUP BY 1 HAVING count(*) > 1");
        assert_eq!(self.pair.first.list(&twice), [""; 0], "{s}: a value is there twice");
        let parked: Vec<Value> = self
            .migration
            .conflicts()
            .into_iter()
            .filter(|c| c["kind"] == "parked" && c["resolved_at"].is_null())
            .collect();
        assert!(parked.is_empty(), "{s}: {parked:?}");
    }

    /// The images of the conflicts, all of them as one text.
    fn images(&self) -> String {
        self.migration.conflicts().iter().map(|c| format!("{c}\n")).collect()
    }

    fn end(self) {
        self.migration.walk(&["second", "both", "first"]);
        self.migration.cancel();
    }
}

#[test]
fn the_policy_names_the_winner() {
    let pair = Pair::new();
    for (policy, winner) in [("first", "on first"), ("second", "on second"), ("latest", "on second")] {
        let family = Family::in_both(&pair, &format!("p_{policy}"), policy);
        family.at_once(
            "UPDATE parent SET email = 'on first' WHERE id = 3",
            "UPDATE elder SET mail = 'on second' WHERE no = 3",
        );
        assert_eq!(family.first("SELECT email FROM parent WHERE id = 3"), [winner], "{policy}");
        let conflicts = family.migration.conflicts();
        assert_eq!(conflicts.len(), 1, "{policy}: {conflicts:?}");
        assert!(family.images().contains("on first") && family.images().contains("on second"), "{}", family.images());
        // A key changed on both: both new rows stand, and the old one is gone.
        family.at_once(
            "UPDATE parent SET id = 101 WHERE id = 15",
            "UPDATE elder SET no = 102, mail = 'other' WHERE no = 15",
        );
        assert_eq!(
            family.first("SELECT id FROM parent WHERE id IN (15, 101, 102) ORDER BY id"),
            ["101", "102"],
            "{policy}"
        );
        // Deleted here, changed there.
        family.at_once("DELETE FROM parent WHERE id = 16", "UPDATE elder SET mail = 'changed' WHERE no = 16");
        let left = family.first("SELECT email FROM parent WHERE id = 16");
        assert_eq!(left.is_empty(), policy == "first", "{policy}: {left:?}");
        assert!(family.images().contains("\"changed\""), "{}", family.images());
        family.end();
    }
}

#[test]
fn one_unique_value_on_both_stores_ends_as_a_conflict() {
    let pair = Pair::new();
    for (policy, winner) in [("first", "1001"), ("second", "2001"), ("latest", "2001")] {
        let family = Family::in_both(&pair, &format!("u_{policy}"), policy);
        family.at_once("INSERT INTO parent VALUES (1001, 'same')", "INSERT INTO elder VALUES (2001, 'same')");
        assert_eq!(family.first("SELECT id FROM parent WHERE email = 'same'"), [winner], "{policy}");
        let conflicts = family.migration.conflicts();
        assert_eq!(conflicts.len(), 2, "{policy}: {conflicts:?}");
        // The same with children of the loser: they go with it, or keep it from losing.
        family.at_once(
            "INSERT INTO parent VALUES (1002, 'again'); INSERT INTO child VALUES (1002, 1002, 'of first')",
            "INSERT INTO elder VALUES (2002, 'again'); INSERT INTO younger VALUES (2002, 2002, 'of second')",
        );
        assert!(family.images().contains("of first") || family.images().contains("of second"), "{}", family.images());
        // A value given up here, taken there, and taken here by a third.
        family.at_once(
            "UPDATE parent SET email = 'free' WHERE id = 5; UPDATE parent SET email = 'p5' WHERE id = 6",
            "UPDATE elder SET mail = 'free' WHERE no = 7",
        );
        family.end();
    }
}

#[test]
fn a_parent_deleted_here_and_a_child_inserted_there_end_as_a_conflict() {
    let pair = Pair::new();
    for policy in ["first", "second", "latest"] {
        let family = Family::in_both(&pair, &format!("k_{policy}"), policy);
        family.at_once("DELETE FROM parent WHERE id = 11", "INSERT INTO younger VALUES (111, 11, 'late child')");
        let there = family.first("SELECT id FROM parent WHERE id = 11").len();
        assert_eq!(there, usize::from(policy != "first"), "{policy}");
        assert!(family.images().contains("late child"), "{policy}: {}", family.images());
        // The other way round, with a child that changes its parent.
        family
            .at_once("UPDATE child SET parent_id = 12, name = 'moved' WHERE id = 1", "DELETE FROM elder WHERE no = 12");
        let there = family.first("SELECT id FROM parent WHERE id = 12").len();
        assert_eq!(there, usize::from(policy == "first"), "{policy}");
        assert!(family.images().contains("moved"), "{policy}: {}", family.images());
        // A cascade there over a child that is changed here.
        family.at_once("UPDATE child SET name = 'touched' WHERE id = 3", "DELETE FROM elder WHERE no = 3");
        assert!(family.images().contains("touched"), "{policy}: {}", family.images());
        family.end();
    }
}

#[test]
fn unique_values_swap_in_one_transaction() {
    let pair = Pair::new();
    pair.first.sql(
        "CREATE TABLE seat (id integer PRIMARY KEY, place integer NOT NULL, code text, note text,
             CONSTRAINT seat_place UNIQUE (place) DEFERRABLE INITIALLY IMMEDIATE);
         CREATE UNIQUE INDEX ON seat (lower(code)) WHERE code IS NOT NULL;
         INSERT INTO seat SELECT n, n, 'C' || n, 'note ' || n FROM generate_series(1, 3000) AS n",
    );
    pair.second_store("seats", "CREATE TABLE seat (id integer PRIMARY KEY, place integer NOT NULL UNIQUE, code text); CREATE UNIQUE INDEX ON seat (lower(code)) WHERE code IS NOT NULL");
    let mapping = json!({"tables": [{"first": "public.seat", "second": "seats.seat", "second_view": "public.seat2"}]});
    let migration = Migration::start(&pair, "seats", &mapping);
    migration.until_state("first");
    let equal = |table: &str| {
        migration.settle();
        let a = pair.first.list(&format!("SELECT concat_ws('|', id, place, code) FROM {table} ORDER BY id"));
        assert_eq!(a, pair.second.list("SELECT concat_ws('|', id, place, code) FROM seats.seat ORDER BY id"));
        assert_eq!(
            pair.first.text(&format!("SELECT count(*) FROM {table} WHERE note = 'note ' || id")).as_deref(),
            Some("3000")
        );
        assert!(migration.conflicts().is_empty(), "{:?}", migration.conflicts());
    };
    let here = "UPDATE seat SET place = CASE id WHEN 1 THEN 2 ELSE 1 END WHERE id IN (1, 2)";
    pair.first.sql(here);
    // Every row takes the place of the next one, over more than one batch.
    pair.first.sql("UPDATE seat SET place = place % 3000 + 1");
    pair.first.sql("UPDATE seat SET code = NULL WHERE id = 7; UPDATE seat SET code = 'c7' WHERE id = 8; UPDATE seat SET code = 'C8' WHERE id = 7");
    equal("seat");
    // The second store has no deferrable constraint: its clients swap in three steps.
    let there = |table: &str, a: i32, b: i32| {
        format!(
            "BEGIN; CREATE TEMP TABLE was ON COMMIT DROP AS SELECT id, place FROM {table} WHERE id IN ({a}, {b});
             UPDATE {table} SET place = -id WHERE id IN ({a}, {b});
             UPDATE {table} SET place = (SELECT place FROM was WHERE was.id <> {a}) WHERE id = {a};
             UPDATE {table} SET place = (SELECT place FROM was WHERE was.id <> {b}) WHERE id = {b}; COMMIT"
        )
    };
    migration.set_state("both");
    pair.first.sql("UPDATE seat SET place = CASE id WHEN 11 THEN (SELECT place FROM seat WHERE id = 12) ELSE (SELECT place FROM seat WHERE id = 11) END WHERE id IN (11, 12)");
    pair.second.sql(&there("seats.seat", 21, 22));
    pair.first.sql(&there("seat2", 23, 24));
    equal("seat__first");
    migration.set_state("second");
    pair.second.sql(&there("seats.seat", 31, 32));
    pair.first.sql(&there("seat", 33, 34));
    pair.first.sql(&there("seat2", 35, 36));
    equal("seat__first");
    migration.finish();
}

#[test]
fn a_row_that_something_outside_refers_to_is_not_deleted_under_it() {
    let pair = Pair::new();
    pair.first.sql(
        "CREATE TABLE item (id integer PRIMARY KEY); CREATE TABLE outside (item integer REFERENCES item);
         INSERT INTO item SELECT generate_series(1, 5); INSERT INTO outside VALUES (2)",
    );
    pair.second_store("items", "CREATE TABLE item (id integer PRIMARY KEY)");
    let mapping = json!({"tables": [{"first": "public.item", "second": "items.item"}]});
    let migration = Migration::start_with(&pair, "items", &mapping, &json!({"foreign_keys": true}));
    migration.until_state("first");
    migration.walk(&["both", "second"]);
    pair.second.sql("DELETE FROM items.item WHERE id IN (2, 3)");
    until("the deletion is refused", SOON, || migration.conflicts().iter().any(|c| c["kind"] == "parked"));
    assert_eq!(pair.first.list("SELECT id FROM item__first ORDER BY id"), ["1", "2", "4", "5"]);
    let error = migration.try_set_state("both", Duration::from_secs(5)).expect_err("a parked row");
    assert!(explain(&error).starts_with("55000"), "{}", explain(&error));
    pair.first.sql("DELETE FROM outside");
    migration.settle();
    assert_eq!(pair.first.list("SELECT id FROM item__first ORDER BY id"), ["1", "4", "5"]);
    migration.walk(&["both", "first"]);
    migration.cancel();
}

#[test]
fn keys_changed_on_both_stores_at_once() {
    let pair = Pair::new();
    for policy in ["first", "second", "latest"] {
        let family = Family::in_both(&pair, &format!("m_{policy}"), policy);
        let first_wins = policy == "first";
        let mail = |id: i32| family.first(&format!("SELECT email FROM parent WHERE id = {id}"));
        let kept = |image: &str| assert!(family.images().contains(image), "{policy}, {image}: {}", family.images());
        // Two rows take one key.
        family.at_once("UPDATE parent SET id = 201 WHERE id = 12", "UPDATE elder SET no = 201 WHERE no = 13");
        assert_eq!(mail(201), [if first_wins { "p12" } else { "p13" }], "{policy}");
        kept(if first_wins { "p13" } else { "p12" });
        assert_eq!((mail(12).len(), mail(13).len()), (0, 0), "{policy}");
        // One row takes one key on both, and another value on each.
        family.at_once(
            "UPDATE parent SET id = 202, email = 'moved here' WHERE id = 14",
            "UPDATE elder SET no = 202, mail = 'moved there' WHERE no = 14",
        );
        assert_eq!(mail(202), [if first_wins { "moved here" } else { "moved there" }], "{policy}");
        kept(if first_wins { "moved there" } else { "moved here" });
        assert!(mail(14).is_empty(), "{policy}");
        // A key is changed here, the value under the old one there; and the other way round.
        family.at_once(
            "UPDATE parent SET id = 203 WHERE id = 15",
            "UPDATE elder SET mail = 'stayed there' WHERE no = 15",
        );
        assert_eq!(mail(203), ["p15"], "{policy}");
        assert_eq!(mail(15).len(), usize::from(!first_wins), "{policy}");
        kept("stayed there");
        family.at_once(
            "UPDATE parent SET email = 'stayed here' WHERE id = 16",
            "UPDATE elder SET no = 204 WHERE no = 16",
        );
        assert_eq!(mail(204), ["p16"], "{policy}");
        assert_eq!(mail(16).len(), usize::from(first_wins), "{policy}");
        kept("stayed here");
        // A key that goes to and fro here, and is another row's there.
        family.at_once(
            "BEGIN; UPDATE parent SET id = -17 WHERE id = 17; UPDATE parent SET id = 17 WHERE id = 18; UPDATE parent SET id = 18 WHERE id = -17; COMMIT",
            "BEGIN; UPDATE elder SET no = 205 WHERE no = 18; UPDATE elder SET no = 18 WHERE no = 19; COMMIT",
        );
        for value in ["p17", "p18", "p19"] {
            let rows = family.first(&format!("SELECT id FROM parent WHERE email = '{value}'"));
            assert!(rows.len() == 1 || family.images().contains(value), "{policy}: {value} is lost");
        }
        // A parent and its child move to another key here, the child's name changes there, and another child comes.
        family.at_once(
            "BEGIN; INSERT INTO parent VALUES (208, 'p8 moved'); UPDATE child SET parent_id = 208 WHERE id = 8; DELETE FROM parent WHERE id = 8; COMMIT",
            "UPDATE younger SET name = 'renamed there' WHERE no = 8; INSERT INTO younger VALUES (308, 8, 'born there')",
        );
        kept("renamed there");
        let born = family.first("SELECT id FROM child WHERE name = 'born there'");
        assert!(!born.is_empty() || family.images().contains("born there"), "{policy}: a child is lost");
        // Unique values swap on both, in each case with another row's.
        let swap = |table: &str, key: &str, value: &str, (a, b): (i32, i32)| {
            format!(
                "BEGIN; UPDATE {table} SET {value} = 'nobody' WHERE {key} = {a}; UPDATE {table} SET {value} = 'p{a}' WHERE {key} = {b};
                 UPDATE {table} SET {value} = 'p{b}' WHERE {key} = {a}; COMMIT"
            )
        };
        family.at_once(&swap("parent", "id", "email", (5, 6)), &swap("elder", "no", "mail", (6, 7)));
        for value in ["p5", "p6", "p7"] {
            let rows = family.first(&format!("SELECT id FROM parent WHERE email = '{value}'"));
            assert!(rows.len() == 1 || family.images().contains(value), "{policy}: {value} is lost");
        }
        family.end();
    }
}

#[test]
fn foreign_keys_with_tables_outside_the_migration() {
    let pair = Pair::new();
    let tables = |schema: &str, outside: &str| {
        format!(
            "CREATE TABLE {schema}kind (name text PRIMARY KEY); INSERT INTO {schema}kind VALUES ('a'), ('b');
             CREATE TABLE {schema}item (id integer PRIMARY KEY, kind text REFERENCES {schema}kind ON DELETE CASCADE);
             CREATE TABLE {schema}plain (item integer REFERENCES {schema}item);
             CREATE TABLE {schema}cascading (item integer REFERENCES {schema}item ON DELETE CASCADE); {outside}"
        )
    };
    pair.first.sql(&tables("", "INSERT INTO item SELECT i, 'a' FROM generate_series(1, 20) AS i"));
    pair.second_store("items", &tables("", ""));
    let mapping = json!({"tables": [{"first": "public.item", "second": "items.item", "second_view": "public.item2"}]});
    let refused = Migration::named(&pair, "items").try_start(&mapping, &json!({})).expect_err("keys that leave");
    for key in ["plain_item_fkey", "cascading_item_fkey", "item_kind_fkey"] {
        assert!(explain(&refused).contains(key), "{}", explain(&refused));
    }
    let migration = Migration::start_with(&pair, "items", &mapping, &json!({"foreign_keys": true}));
    migration.until_state("first");
    let parked =
        || migration.conflicts().iter().filter(|c| c["kind"] == "parked" && c["resolved_at"].is_null()).count();
    // They are listed a moment after they have come or gone.
    let until_parked = |count: usize| until(&format!("{count} rows are parked"), SOON, || parked() == count);
    let there = |id: i32| pair.second.text(&format!("SELECT kind FROM items.item WHERE id = {id}"));
    let here = |id: i32| pair.first.text(&format!("SELECT kind FROM item__first WHERE id = {id}"));
    let dangling = |cluster: &pgrx_tests::Cluster, schema: &str, item: &str| {
        let query = format!(
            "SELECT count(*) FROM (SELECT item FROM {schema}.plain UNION ALL SELECT item FROM {schema}.cascading) AS o
              WHERE NOT EXISTS (SELECT FROM {schema}.{item} AS i WHERE i.id = o.item)"
        );
        assert_eq!(cluster.text(&query).as_deref(), Some("0"), "references that dangle in {schema}");
        let query = format!("SELECT count(*) FROM {schema}.{item} WHERE kind NOT IN (SELECT name FROM {schema}.kind)");
        assert_eq!(cluster.text(&query).as_deref(), Some("0"), "kinds that are not there in {schema}");
    };
    // Something on second refers to rows that go on first: deleted, or under another key from now on.
    pair.second.sql("INSERT INTO items.plain VALUES (1), (2); INSERT INTO items.cascading VALUES (3)");
    pair.first.sql("DELETE FROM item WHERE id IN (1, 3, 4); UPDATE item SET id = 102 WHERE id = 2");
    until_parked(3);
    until("the others have gone and come", SOON, || there(4).is_none() && there(102).is_some());
    assert_eq!((there(1).as_deref(), there(2).as_deref(), there(3).as_deref()), (Some("a"), Some("a"), Some("a")));
    dangling(&pair.second, "items", "item");
    // A kind that only first has.
    pair.first.sql("INSERT INTO kind VALUES ('c'); UPDATE item SET kind = 'c' WHERE id = 5; INSERT INTO item VALUES (21, 'c'), (22, 'b')");
    until_parked(5);
    until("the other has come", SOON, || there(22).is_some());
    assert!(there(21).is_none());
    dangling(&pair.second, "items", "item");
    let error = explain(&migration.try_set_state("both", Duration::from_secs(5)).expect_err("parked rows"));
    assert!(error.starts_with("55000"), "{error}");
    pair.second.sql("DELETE FROM items.plain; DELETE FROM items.cascading; INSERT INTO items.kind VALUES ('c')");
    migration.settle();
    until_parked(0);
    assert_eq!(
        pair.first.list("SELECT id || kind FROM item ORDER BY 1"),
        pair.second.list("SELECT id || kind FROM items.item ORDER BY 1")
    );
    migration.set_state("both");
    // The same the other way, and on both stores at once.
    pair.first.sql("INSERT INTO plain VALUES (10), (11); INSERT INTO cascading VALUES (12)");
    pair.second.sql("INSERT INTO items.kind VALUES ('d'); INSERT INTO items.plain VALUES (13)");
    pair.second.sql("DELETE FROM items.item WHERE id IN (10, 12, 14); UPDATE items.item SET id = 111 WHERE id = 11; INSERT INTO items.item VALUES (23, 'd')");
    pair.first.sql("DELETE FROM item WHERE id IN (13, 15)");
    until_parked(5);
    until("the others have gone and come", SOON, || here(14).is_none() && here(111).is_some() && there(15).is_none());
    assert!(
        here(10).is_some() && here(11).is_some() && here(12).is_some() && here(23).is_none() && there(13).is_some()
    );
    dangling(&pair.first, "public", "item__first");
    dangling(&pair.second, "items", "item");
    migration.try_set_state("second", Duration::from_secs(5)).expect_err("parked rows");
    pair.first.sql("DELETE FROM plain; DELETE FROM cascading; INSERT INTO kind VALUES ('d')");
    pair.second.sql("DELETE FROM items.plain");
    migration.settle();
    until_parked(0);
    migration.walk(&["second", "both", "first"]);
    assert_eq!(
        pair.first.list("SELECT id || kind FROM item ORDER BY 1"),
        pair.second.list("SELECT id || kind FROM items.item ORDER BY 1")
    );
    migration.cancel();
}

#[test]
fn rows_that_only_the_second_store_refuses_are_parked_by_the_copy_and_after_it() {
    let pair = Pair::new();
    pair.first.sql(
        "CREATE TABLE master (id integer PRIMARY KEY, code integer); CREATE TABLE detail (id integer PRIMARY KEY, master integer);
         INSERT INTO master VALUES (1, 1), (2, 2), (3, 2); INSERT INTO detail VALUES (1, 1), (2, 99), (3, NULL)",
    );
    pair.second_store(
        "strict",
        "CREATE TABLE master (id integer PRIMARY KEY, code integer UNIQUE DEFERRABLE);
         CREATE TABLE detail (id integer PRIMARY KEY, master integer REFERENCES master)",
    );
    let mapping = json!({"tables": [
        {"first": "public.master", "second": "strict.master"}, {"first": "public.detail", "second": "strict.detail"}]});
    let migration = Migration::start(&pair, "strict", &mapping);
    migration.until_state("first");
    let stored = || {
        let sql = "SELECT 'm' || id || '.' || code FROM strict.master UNION ALL SELECT 'd' || id FROM strict.detail ORDER BY 1";
        pair.second.list(sql)
    };
    // One of the two that share a value.
    assert!(
        matches!(stored().iter().map(String::as_str).collect::<Vec<_>>()[..], ["d1", "d3", "m1.1", "m2.2" | "m3.2"]),
        "{:?}",
        stored()
    );
    pair.first.sql("INSERT INTO detail VALUES (4, 77); INSERT INTO master VALUES (4, 1)");
    until("four rows are parked", SOON, || {
        migration.conflicts().iter().filter(|c| c["kind"] == "parked" && c["resolved_at"].is_null()).count() == 4
    });
    migration.try_set_state("both", Duration::from_secs(5)).expect_err("parked rows");
    pair.first.sql("INSERT INTO master VALUES (99, 9), (77, 7); UPDATE master SET code = id");
    migration.settle();
    assert_eq!(stored(), ["d1", "d2", "d3", "d4", "m1.1", "m2.2", "m3.3", "m4.4", "m77.77", "m99.99"]);
    migration.set_state("both");
    migration.walk(&["first"]);
    migration.cancel();
}

/// Tokens that clients were told are in, and tokens that they were told are gone.
type Ledger = Arc<Mutex<(BTreeSet<String>, BTreeSet<String>)>>;

/// One transaction of a client that gets in the way of others: few unique values, few parents, inserted and deleted on both stores.
fn collide(
    client: &mut Client,
    rng: &mut StdRng,
    tables: [&str; 2],
    token: &str,
    id: i32,
    ledger: &Ledger,
) -> Result<(), postgres::Error> {
    let [parent, child] = tables;
    let parent_id = if parent.ends_with("parent") { "parent_id" } else { "elder_no" };
    let (key, mail) = if parent.ends_with("parent") { ("id", "email") } else { ("no", "mail") };
    let value = format!("v{}", rng.random_range(0..12));
    let some_parent = format!("(SELECT {key} FROM {parent} ORDER BY random() LIMIT 1)");
    let done = match rng.random_range(0..4) {
        0 | 1 => client.query(&format!("INSERT INTO {parent} ({key}, {mail}, token) VALUES ({id}, '{value}', '{token}') RETURNING token"), &[]),
        2 => client.query(&format!("INSERT INTO {child} ({key}, {parent_id}, token) SELECT {id}, p, '{token}' FROM {some_parent} AS q(p) RETURNING token"), &[]),
        _ => {
            let table = if rng.random_bool(0.5) { parent } else { child };
            let gone = client.query(&format!("DELETE FROM {table} WHERE {key} = (SELECT {key} FROM {table} ORDER BY random() LIMIT 1) RETURNING token"), &[]);
            return allowed(gone).map(|rows| ledger.lock().unwrap().1.extend(rows.iter().map(|r| r.get::<_, String>(0))));
        }
    };
    allowed(done).map(|rows| ledger.lock().unwrap().0.extend(rows.iter().map(|r| r.get::<_, String>(0))))
}

/// What clients of one server do to each other is no error: a value that is taken, a parent that is gone or needed.
fn allowed(result: Result<Vec<postgres::Row>, postgres::Error>) -> Result<Vec<postgres::Row>, postgres::Error> {
    match result {
        Err(e) if e.code().is_some_and(|c| matches!(c.code(), "23505" | "23503")) => Ok(Vec::new()),
        other => other,
    }
}

#[test]
fn clients_that_collide_all_the_time_lose_nothing() {
    let pair = Pair::new();
    let witness = Witness::of(&pair.first);
    let tables = |parent: &str, key: &str, mail: &str, child: &str, parent_id: &str| {
        format!(
            "CREATE TABLE {parent} ({key} integer PRIMARY KEY, {mail} text UNIQUE, token text);
             CREATE TABLE {child} ({key} integer PRIMARY KEY, {parent_id} integer NOT NULL REFERENCES {parent}, token text)"
        )
    };
    pair.first.sql(&tables("parent", "id", "email", "child", "parent_id"));
    pair.second_store("c", &tables("elder", "no", "mail", "younger", "elder_no"));
    let mapping = json!({"tables": [
        {"first": "public.parent", "second": "c.elder", "forward": {"no": "id", "mail": "email"}},
        {"first": "public.child", "second": "c.younger", "forward": {"no": "id", "elder_no": "parent_id"}},
    ]});
    let migration = Migration::start(&pair, "collide", &mapping);
    migration.until_state("first");
    migration.set_state("both");
    let (ledger, seed): (Ledger, u64) = (Ledger::default(), seed());
    let load = |cluster: &pgrx_tests::Cluster, tables: [&'static str; 2], side: u64| {
        let ledger = Arc::clone(&ledger);
        Load::start(&cluster.config("app"), 2, move |number, round, client| {
            let mut rng = StdRng::seed_from_u64(seed ^ (side << 60) ^ ((number as u64) << 40) ^ round);
            let id = i32::try_from(side * 500_000_000 + number as u64 * 100_000_000 + round).expect("a key");
            collide(client, &mut rng, tables, &format!("t{side}.{number}.{round};"), id, &ledger)
        })
    };
    let first = load(&pair.first, ["public.parent", "public.child"], 0);
    let second = load(&pair.second, ["c.elder", "c.younger"], 1);
    for _ in 0..4 {
        // While replication pauses, much more collides.
        migration.call("pause");
        for_a(Duration::from_millis(700));
        first.until_done(20);
        second.until_done(20);
        migration.call("resume");
        for_a(Duration::from_millis(1300));
    }
    first.stop().assert_clean("on the first store");
    second.stop().assert_clean("on the second store");
    migration.settle();
    for (a, b) in [
        (
            "SELECT concat_ws('|', id, email, token) FROM parent__first ORDER BY id",
            "SELECT concat_ws('|', no, mail, token) FROM c.elder ORDER BY no",
        ),
        (
            "SELECT concat_ws('|', id, parent_id, token) FROM child__first ORDER BY id",
            "SELECT concat_ws('|', no, elder_no, token) FROM c.younger ORDER BY no",
        ),
    ] {
        assert_eq!(pair.first.list(a), pair.second.list(b), "the stores differ");
    }
    let count = |query: &str| pair.first.text(query).and_then(|n| n.parse::<i64>().ok()).expect("a number");
    assert_eq!(
        count(
            "SELECT count(*) FROM child__first c WHERE NOT EXISTS (SELECT FROM parent__first p WHERE p.id = c.parent_id)"
        ),
        0
    );
    assert_eq!(count("SELECT count(*) - count(DISTINCT email) FROM parent__first"), 0);
    let conflicts = migration.conflicts();
    assert!(conflicts.iter().all(|c| c["kind"] == "conflict" || !c["resolved_at"].is_null()), "rows are parked");
    assert!(conflicts.len() > 10, "only {} conflicts: the clients did not collide", conflicts.len());
    let images: String = conflicts.iter().map(|c| c.to_string()).collect();
    let present: BTreeSet<String> = pair
        .first
        .list("SELECT token FROM parent__first UNION ALL SELECT token FROM child__first")
        .into_iter()
        .collect();
    let ledger = ledger.lock().unwrap();
    let lost: Vec<&String> = ledger
        .0
        .iter()
        .filter(|t| !present.contains(*t) && !ledger.1.contains(*t) && !images.contains(t.as_str()))
        .collect();
    println!(
        "{} tokens in, {} deleted, {} conflicts, lost: {}",
        ledger.0.len(),
        ledger.1.len(),
        conflicts.len(),
        lost.len()
    );
    assert!(lost.is_empty(), "lost: {lost:?}");
    migration.walk(&["second", "both", "first"]);
    migration.cancel();
    witness.testify();
}

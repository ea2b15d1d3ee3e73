//! Partitioned tables: what is done to a partition itself is captured and fenced as what is done to the table.

use std::time::Duration;

use pgrx_tests::bank::{self, Sums};
use pgrx_tests::cluster::{Cluster, explain};
use pgrx_tests::schema::{assert_same_dump, traces};
use pgrx_tests::{Migration, Pair, Pgbench, Witness};
use serde_json::{Value, json};

/// By month, one month divided further.
fn create(pair: &Pair) {
    pair.first.sql(
        "CREATE TABLE reading (id bigint, day date, region text, value integer, PRIMARY KEY (id, day)) PARTITION BY RANGE (day);
         CREATE TABLE reading_jan PARTITION OF reading FOR VALUES FROM ('2024-01-01') TO ('2024-02-01');
         CREATE TABLE reading_feb PARTITION OF reading FOR VALUES FROM ('2024-02-01') TO ('2024-03-01') PARTITION BY HASH (id);
         CREATE TABLE reading_feb_0 PARTITION OF reading_feb FOR VALUES WITH (MODULUS 2, REMAINDER 0);
         -- Its columns stand in another order.
         CREATE TABLE reading_feb_1 (value integer, region text, day date NOT NULL, id bigint NOT NULL);
         ALTER TABLE reading_feb ATTACH PARTITION reading_feb_1 FOR VALUES WITH (MODULUS 2, REMAINDER 1);
         CREATE TABLE reading_rest PARTITION OF reading DEFAULT;
         INSERT INTO reading SELECT i, '2024-01-01'::date + i % 60, 'r' || i % 3, i FROM generate_series(1, 1000) i",
    );
    pair.second_store(
        "store",
        "CREATE TABLE measure (id bigint, day date, region text, tenths bigint, PRIMARY KEY (id, day))",
    );
    // IMPORT FOREIGN SCHEMA imports the parent only.
}

fn mapping() -> Value {
    json!({"tables": [{"first": "public.reading", "second": "store.measure", "second_view": "public.measure",
        "forward": {"tenths": "value::bigint * 10"}, "backward": {"value": "(tenths / 10)::integer"}}]})
}

fn started(pair: &Pair) -> Migration<'_> {
    let migration = Migration::start_with(pair, "reading", &mapping(), &json!({"chunk_rows": 150}));
    migration.until_state("first");
    migration
}

/// Both stores, each asked on its own server.
fn assert_equal(pair: &Pair, first: &str) {
    let rows = |columns: &str, from: &str| {
        format!("SELECT string_agg(concat_ws('|', {columns}), E'\\n' ORDER BY id, day) FROM {from}")
    };
    let a = pair.first.text(&rows("id, day, region, value", first)).unwrap_or_default();
    let b = pair.second.text(&rows("id, day, region, tenths / 10", "store.measure")).unwrap_or_default();
    if a != b {
        let only = |a: &str, b: &str| a.lines().filter(|l| !b.lines().any(|m| m == *l)).collect::<Vec<_>>().join(" ");
        panic!("the stores differ; only on first: {}; only on second: {}", only(&a, &b), only(&b, &a));
    }
}

fn refusal(cluster: &Cluster, statement: &str) -> String {
    cluster.connect().batch_execute(statement).map_or_else(|e| explain(&e), |()| panic!("not refused: {statement}"))
}

/// Statements that name a partition or the parent; `from` keeps the keys of several calls apart.
fn write_to_first(pair: &Pair, parent: &str, from: u32) {
    pair.first.sql(&format!(
        "INSERT INTO {parent} SELECT {from} + i, '2024-01-05'::date + i * 7, 'new', i FROM generate_series(1, 12) i;
         INSERT INTO reading_jan VALUES ({from} + 20, '2024-01-20', 'leaf', 20), ({from} + 21, '2024-01-21', 'leaf', 21);
         INSERT INTO reading_feb SELECT {from} + 30 + i, '2024-02-10', 'middle', i FROM generate_series(1, 6) i;
         UPDATE reading_jan SET value = value + 1 WHERE id % 7 = 0;
         UPDATE reading_feb_1 SET value = value + 1, id = id WHERE id % 5 = 0;
         UPDATE {parent} SET day = '2024-02-28' WHERE id = {from} + 20;           -- to another partition
         UPDATE {parent} SET id = id + 50 WHERE id BETWEEN {from} + 31 AND {from} + 32;
         DELETE FROM reading_rest WHERE id % 11 = 0;
         DELETE FROM {parent} WHERE id % 97 = 0;
         INSERT INTO {parent} VALUES ({from} + 21, '2024-01-21', 'twice', 1), ({from} + 22, '2024-01-21', 'once', 1)
             ON CONFLICT (id, day) DO UPDATE SET region = EXCLUDED.region, value = reading.value + 1;
         MERGE INTO {parent} AS r USING (VALUES ({from} + 1, 'merged'), ({from} + 99, 'merged')) AS s(id, region) ON r.id = s.id
             WHEN MATCHED THEN UPDATE SET region = s.region WHEN NOT MATCHED THEN INSERT VALUES (s.id, '2024-02-09', s.region, 9);
         BEGIN; SET LOCAL session_replication_role = replica; UPDATE reading_jan SET value = -value WHERE id % 13 = 0; COMMIT;"
    ).replace("reading.value", &format!("{parent}.value")));
    for table in [parent, "reading_jan", "reading_feb_0"] {
        let day = if table == "reading_feb_0" { "2024-02-11" } else { "2024-01-11" };
        let mut client = pair.first.connect();
        let mut copy = client.copy_in(&format!("COPY {table} (id, day, region, value) FROM STDIN")).expect("a copy");
        for i in 0..40_u32 {
            let id = from + 1000 + i * 3 + u32::try_from(table.len()).expect("short") * 1000;
            // Only what hashes into the partition may be copied into it.
            if table == "reading_feb_0"
                && pair
                    .first
                    .text(&format!("SELECT satisfies_hash_partition('reading_feb'::regclass, 2, 0, {id}::bigint)"))
                    .as_deref()
                    != Some("t")
            {
                continue;
            }
            std::io::Write::write_all(&mut copy, format!("{id}\t{day}\tcopied\t{i}\n").as_bytes()).expect("a row");
        }
        copy.finish().expect("the end of the copy");
    }
}

#[test]
fn partitions_written_directly_are_captured_and_fenced_in_each_state() {
    let pair = Pair::new();
    create(&pair);
    let dumps = || (pair.first.pg_dump_schema("app"), pair.second.pg_dump_schema("app"));
    let before = dumps();
    let migration = started(&pair);
    migration.settle();
    assert_equal(&pair, "reading");
    write_to_first(&pair, "reading", 10_000);
    migration.settle();
    assert_equal(&pair, "reading");
    for statement in [
        "INSERT INTO store.measure VALUES (1, now(), 'x', 1)",
        "UPDATE store.measure SET tenths = 0",
        "TRUNCATE store.measure",
        "DELETE FROM store.measure",
    ] {
        assert!(refusal(&pair.second, statement).starts_with("25006"), "{statement}");
    }
    pair.first.sql("TRUNCATE reading_feb");
    migration.settle();
    assert_equal(&pair, "reading");
    assert_eq!(
        pair.second
            .text("SELECT count(*) FROM store.measure WHERE day BETWEEN '2024-02-01' AND '2024-02-29'")
            .as_deref(),
        Some("0")
    );

    migration.set_state("both");
    write_to_first(&pair, "reading__first", 20_000);
    pair.first.sql("UPDATE reading SET region = 'view' WHERE id % 19 = 0; INSERT INTO reading VALUES (25000, '2024-02-12', 'view', 3)");
    migration.settle();
    assert_equal(&pair, "reading__first");
    pair.first.sql("UPDATE measure SET tenths = tenths + 10 WHERE id % 17 = 0; DELETE FROM measure WHERE id % 23 = 0; UPDATE measure SET day = day + 31 WHERE id = 25000");
    pair.second.sql(
        "UPDATE store.measure SET region = 'second' WHERE id % 3 = 0; DELETE FROM store.measure WHERE id % 29 = 0",
    );
    migration.settle();
    assert_equal(&pair, "reading__first");
    pair.second.sql("DELETE FROM store.measure WHERE id % 2 = 0");
    migration.settle();
    assert_equal(&pair, "reading__first");

    migration.set_state("second");
    for statement in [
        "UPDATE reading_jan SET value = 0",
        "TRUNCATE reading_feb_1",
        "DELETE FROM reading_feb",
        "INSERT INTO reading__first VALUES (1, '2030-01-01', 'x', 1)",
    ] {
        assert!(refusal(&pair.first, statement).starts_with("25006"), "{statement}");
    }
    pair.first
        .sql("CREATE TABLE reading_mar PARTITION OF reading__first FOR VALUES FROM ('2024-04-01') TO ('2024-05-01')");
    assert!(refusal(&pair.first, "INSERT INTO reading_mar VALUES (1, '2024-04-01', 'x', 1)").starts_with("25006"));
    pair.first.sql("UPDATE reading SET value = value + 1; INSERT INTO reading VALUES (26000, '2024-04-12', 'view', 3); DELETE FROM reading WHERE id % 31 = 0");
    pair.second.sql("UPDATE store.measure SET region = 'again' WHERE id % 2 = 1; UPDATE store.measure SET day = '2024-02-02' WHERE id BETWEEN 10000 AND 10100");
    migration.settle();
    assert_equal(&pair, "reading__first");
    pair.second.sql("TRUNCATE store.measure");
    migration.settle();
    assert_equal(&pair, "reading__first");
    migration.walk(&["both", "first"]);
    pair.first.sql("DROP TABLE reading_mar");
    migration.settle();
    assert_equal(&pair, "reading__first");
    assert_eq!(migration.conflicts(), Vec::<Value>::new());
    migration.cancel();
    let after = dumps();
    assert_same_dump("the first server", &before.0, &after.0);
    assert_same_dump("the second server", &before.1, &after.1);
    assert_eq!(traces(&pair.first), Vec::<String>::new());
    assert_eq!(traces(&pair.second), Vec::<String>::new());
}

#[test]
fn partitions_that_come_and_go_take_their_rows_with_them() {
    let pair = Pair::new();
    create(&pair);
    let migration = started(&pair);
    let check = |what: &str, parent: &str| {
        migration.settle();
        eprintln!("{what}");
        assert_equal(&pair, parent);
    };
    let steps = |parent: &str| {
        for (what, sql) in [
            ("a new partition", "CREATE TABLE reading_apr PARTITION OF @ FOR VALUES FROM ('2024-04-01') TO ('2024-05-01'); INSERT INTO reading_apr VALUES (1, '2024-04-01', 'a', 1), (2, '2024-04-02', 'b', 2)"),
            ("truncated at once", "TRUNCATE reading_apr; INSERT INTO reading_apr VALUES (3, '2024-04-03', 'c', 3)"),
            ("attached with rows", "CREATE TABLE reading_may (LIKE @ INCLUDING ALL); INSERT INTO reading_may SELECT i, '2024-05-02', 'may', i FROM generate_series(1, 50) i;
                 ALTER TABLE @ ATTACH PARTITION reading_may FOR VALUES FROM ('2024-05-01') TO ('2024-06-01'); UPDATE reading_may SET value = 0 WHERE id < 10; DELETE FROM reading_may WHERE id > 45"),
            ("detached", "ALTER TABLE @ DETACH PARTITION reading_may"),
            ("attached again, changed in between", "UPDATE reading_may SET value = 77; ALTER TABLE @ ATTACH PARTITION reading_may FOR VALUES FROM ('2024-05-01') TO ('2024-06-01')"),
            ("detached, changed and attached between two looks", "BEGIN; ALTER TABLE @ DETACH PARTITION reading_may; UPDATE reading_may SET value = 78; DELETE FROM reading_may WHERE id < 5;
                 ALTER TABLE @ ATTACH PARTITION reading_may FOR VALUES FROM ('2024-05-01') TO ('2024-06-01'); COMMIT"),
            ("the default detached", "ALTER TABLE @ DETACH PARTITION reading_rest"),
            ("dropped", "DROP TABLE reading_may, reading_apr"),
            ("a tree attached", "CREATE TABLE reading_jun (LIKE @ INCLUDING ALL) PARTITION BY HASH (id); CREATE TABLE reading_jun_0 PARTITION OF reading_jun FOR VALUES WITH (MODULUS 1, REMAINDER 0);
                 INSERT INTO reading_jun VALUES (1, '2024-06-01', 'a', 1), (2, '2024-06-01', 'b', 2); ALTER TABLE @ ATTACH PARTITION reading_jun FOR VALUES FROM ('2024-06-01') TO ('2024-07-01')"),
            ("written directly", "UPDATE reading_jun_0 SET value = 6 WHERE id = 1; DELETE FROM reading_jun WHERE id = 2"),
            ("truncated", "TRUNCATE reading_jun_0"),
            ("dropped, too", "DROP TABLE reading_jun"),
        ] {
            pair.first.sql(&sql.replace('@', parent));
            check(what, parent);
        }
        pair.first
            .connect()
            .batch_execute(&format!("ALTER TABLE {parent} DETACH PARTITION reading_jan CONCURRENTLY"))
            .expect("to detach");
        check("detached concurrently", parent);
        pair.first.sql("UPDATE reading_jan SET value = 5; TRUNCATE reading_rest");
        check("detached tables are nobody's", parent);
        let left = "SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'crossover%' AND tgrelid IN ('reading_jan'::regclass, 'reading_rest'::regclass)";
        assert_eq!(pair.first.text(left).as_deref(), Some("0"));
        pair.first.sql(&format!(
            "ALTER TABLE {parent} ATTACH PARTITION reading_jan FOR VALUES FROM ('2024-01-01') TO ('2024-02-01'); ALTER TABLE {parent} ATTACH PARTITION reading_rest DEFAULT"
        ));
        check("back again", parent);
    };
    steps("reading");
    pair.first.sql("ALTER TABLE reading_jan DISABLE TRIGGER crossover_capture_row");
    migration.until_status("names the trigger", |s| s.text("last_error").contains("reading_jan.crossover_capture_row"));
    pair.first
        .sql("UPDATE reading_jan SET value = 4; ALTER TABLE reading_jan ENABLE ALWAYS TRIGGER crossover_capture_row");
    check("on again", "reading");
    migration.set_state("both");
    steps("reading__first");
    // A partition that comes while first is not exposed is there for what second brings.
    migration.set_state("second");
    pair.first.sql("CREATE TABLE reading_may PARTITION OF reading__first FOR VALUES FROM ('2024-05-01') TO ('2024-06-01'); INSERT INTO reading VALUES (1, '2024-05-05', 'view', 5)");
    check("a partition that comes in second", "reading__first");
    assert_eq!(pair.first.text("SELECT count(*) FROM reading_may").as_deref(), Some("1"));
    migration.set_state("both");
    pair.first.sql("TRUNCATE reading_may; INSERT INTO reading_may VALUES (2, '2024-05-05', 'leaf', 5)");
    check("written in both", "reading__first");
    migration.set_state("second");
    migration.finish();
}

#[test]
fn a_switch_waits_for_the_writers_of_a_partition_and_names_them() {
    let pair = Pair::new();
    create(&pair);
    let mut writer = pair.first.connect();
    writer.batch_execute("BEGIN; INSERT INTO reading_feb_0 SELECT i, '2024-02-03', 'open', i FROM generate_series(5000, 5009) i WHERE satisfies_hash_partition('reading_feb'::regclass, 2, 0, i::bigint); PREPARE TRANSACTION 'leaf'").expect("prepared");
    let migration = Migration::named(&pair, "reading");
    let start = |timeout: &str| {
        pair.first.connect().query_one(
            &format!("SELECT migration_start('reading', $1::jsonb, '{{}}', '{timeout}')::text"),
            &[&mapping()],
        )
    };
    let error = explain(&start("5 s").expect_err("a prepared transaction"));
    assert!(error.starts_with("55P03") && error.contains("'leaf'"), "{error}");
    writer.batch_execute("COMMIT PREPARED 'leaf'").expect("committed");
    start("30 s").expect("to start");
    migration.until_state("first");
    assert_equal(&pair, "reading");
    migration.set_state("both");
    writer.batch_execute("BEGIN; UPDATE reading_jan SET value = value + 100").expect("an update");
    let error = migration.try_set_state("second", Duration::from_secs(5)).expect_err("a writer");
    assert!(explain(&error).starts_with("55P03") && explain(&error).contains("reading_jan"), "{}", explain(&error));
    writer.batch_execute("COMMIT").expect("a commit");
    migration.set_state("second");
    assert_equal(&pair, "reading__first");
    let mut writer = pair.second.connect();
    writer.batch_execute("BEGIN; UPDATE store.measure SET tenths = tenths + 100").expect("an update");
    let error = migration.try_set_state("both", Duration::from_secs(5)).expect_err("a writer");
    assert!(explain(&error).starts_with("55P03") && explain(&error).contains("measure"), "{}", explain(&error));
    writer.batch_execute("COMMIT").expect("a commit");
    migration.set_state("both");
    assert_equal(&pair, "reading__first");
    migration.walk(&["first"]);
    migration.cancel();
}

#[test]
fn what_cannot_be_captured_is_refused() {
    let pair = Pair::new();
    create(&pair);
    pair.first.sql(
        "CREATE TABLE parent (id bigint PRIMARY KEY); CREATE TABLE child () INHERITS (parent);
         CREATE TABLE loose (id bigint PRIMARY KEY) PARTITION BY RANGE (id); CREATE UNLOGGED TABLE loose_1 PARTITION OF loose DEFAULT",
    );
    pair.second_store("other", "CREATE TABLE plain (id bigint PRIMARY KEY)");
    for (table, message) in [
        ("parent", "other tables inherit from it"),
        ("child", "is a partition or inherits from another table"),
        ("reading_jan", "is a partition or inherits from another table"),
        ("loose", "partition public.loose_1 is UNLOGGED or temporary"),
    ] {
        let mapping = json!({"tables": [{"first": format!("public.{table}"), "second": "other.plain"}]});
        let error = Migration::named(&pair, "no").try_start(&mapping, &json!({})).expect_err(table);
        assert!(explain(&error).contains(message), "{table}: {}", explain(&error));
    }
    // An UPDATE through postgres_fdw would change rows of several partitions that have the same ctid.
    pair.second_store("parts", "CREATE TABLE parent (id bigint PRIMARY KEY) PARTITION BY HASH (id)");
    let mapping = json!({"tables": [{"first": "public.parent", "second": "parts.parent"}]});
    let error = Migration::named(&pair, "no").try_start(&mapping, &json!({})).expect_err("partitioned there");
    assert!(explain(&error).contains("on the second server: is partitioned"), "{}", explain(&error));
    pair.second.sql("CREATE TABLE parts.parent_0 PARTITION OF parts.parent FOR VALUES WITH (MODULUS 1, REMAINDER 0)");
    pair.first.sql("IMPORT FOREIGN SCHEMA parts LIMIT TO (parent_0) FROM SERVER second_server INTO parts");
    let mapping = json!({"tables": [{"first": "public.parent", "second": "parts.parent_0"}]});
    let error = Migration::named(&pair, "no").try_start(&mapping, &json!({})).expect_err("a partition there");
    assert!(explain(&error).contains("on the second server: is a partition"), "{}", explain(&error));
    // A child that comes later stops replication rather than lose its rows.
    pair.first.sql("DROP TABLE child");
    let mapping = json!({"tables": [{"first": "public.parent", "second": "other.plain"}]});
    let migration = Migration::start(&pair, "late", &mapping);
    migration.until_state("first");
    pair.first.sql("CREATE TABLE child () INHERITS (parent)");
    migration.until_status("names the child", |s| s.text("last_error").contains("public.child"));
    pair.first.sql("DROP TABLE child; INSERT INTO parent VALUES (7)");
    migration.settle();
    assert_eq!(pair.second.text("SELECT count(*) FROM other.plain").as_deref(), Some("1"));
    migration.cancel();
}

/// Makes a table of another that has its name, partitioned, with the same rows.
fn partition(cluster: &Cluster, table: &str, key: &str, by: &str, partitions: &[&str]) {
    let name = table.rsplit('.').next().expect("a name");
    let partitions: String = partitions
        .iter()
        .enumerate()
        .map(|(i, bounds)| format!("CREATE TABLE {table}_p{i} PARTITION OF {table} FOR VALUES {bounds};"))
        .collect();
    cluster.sql(&format!(
        "ALTER TABLE {table} RENAME TO {name}_old;
         CREATE TABLE {table} (LIKE {table}_old INCLUDING DEFAULTS, PRIMARY KEY ({key})) PARTITION BY {by};
         {partitions}
         INSERT INTO {table} SELECT * FROM {table}_old; DROP TABLE {table}_old CASCADE; ANALYZE {table}"
    ));
}

#[test]
fn pgbench_does_not_notice_that_partitioned_tables_move() {
    const HASH: [&str; 3] =
        ["WITH (MODULUS 3, REMAINDER 0)", "WITH (MODULUS 3, REMAINDER 1)", "WITH (MODULUS 3, REMAINDER 2)"];
    let pair = Pair::new();
    bank::create(&pair, 5);
    pair.first.sql("ALTER SEQUENCE pgbench_history_id_seq OWNED BY NONE");
    partition(&pair.first, "pgbench_accounts", "aid", "HASH (aid)", &HASH);
    partition(&pair.first, "pgbench_history", "id", "RANGE (id)", &["FROM (0) TO (500)", "FROM (500) TO (100000000)"]);
    let witness = (Witness::of(&pair.first), Witness::of(&pair.second));
    let mut pgbench = Pgbench::start(&pair.first, &["-c", "4", "-j", "2", "-M", "prepared"]);
    let migration = Migration::start(&pair, "bank", &bank::mapping());
    migration.until_state("first");
    for state in ["both", "second", "both", "first", "both", "second"] {
        pgbench.until_done(300);
        migration.set_state(state);
    }
    pgbench.until_done(300);
    let report = pgbench.stop();
    assert_eq!(report.failed, 0, "{report:?}");
    migration.settle();
    let first = Sums::first(&pair, "__first");
    first.assert_agree("first");
    assert_eq!(first, Sums::second(&pair));
    assert_eq!(migration.conflicts(), Vec::<Value>::new());
    migration.finish();
    witness.0.testify();
    witness.1.testify();
}

#[test]
fn foreign_keys_and_unique_values_of_partitioned_tables() {
    let pair = Pair::new();
    create(&pair);
    let note = |amount: &str, parent: &str| {
        format!(
            "CREATE TABLE note (id integer PRIMARY KEY, reading bigint, day date, {amount} text,
                 FOREIGN KEY (reading, day) REFERENCES {parent} ON DELETE CASCADE ON UPDATE CASCADE);
             INSERT INTO note SELECT row_number() OVER (), id, day, 'n' FROM {parent} WHERE id % 3 = 0;"
        )
    };
    pair.first.sql(&note("body", "reading"));
    pair.first.sql("DROP FOREIGN TABLE store.measure");
    pair.second.sql(
        "SET search_path = store; CREATE TABLE note (id integer PRIMARY KEY, reading bigint, day date, body text,
        FOREIGN KEY (reading, day) REFERENCES measure ON DELETE CASCADE ON UPDATE CASCADE)",
    );
    pair.first.sql("IMPORT FOREIGN SCHEMA store LIMIT TO (measure, note) FROM SERVER second_server INTO store");
    let mut mapping = mapping();
    mapping["tables"]
        .as_array_mut()
        .expect("tables")
        .push(json!({"first": "public.note", "second": "store.note", "second_view": "public.new_note"}));
    let migration = Migration::start(&pair, "reading", &mapping);
    migration.until_state("first");
    let check = |suffix: &str, what: &str| {
        migration.settle();
        assert_equal(&pair, &format!("reading{suffix}"));
        let rows = |from: &str| {
            format!("SELECT md5(string_agg(concat_ws('|', id, reading, day, body), ';' ORDER BY id)) FROM {from}")
        };
        assert_eq!(pair.first.text(&rows(&format!("note{suffix}"))), pair.second.text(&rows("store.note")), "{what}");
        let orphans = "SELECT count(*) FROM store.note n WHERE NOT EXISTS (SELECT FROM store.measure m WHERE (m.id, m.day) = (n.reading, n.day))";
        assert_eq!(pair.second.text(orphans).as_deref(), Some("0"), "{what}");
    };
    check("", "after the copy");
    pair.first.sql("DELETE FROM reading_jan WHERE id % 9 = 0; UPDATE reading SET id = id + 5000 WHERE id % 21 = 0; UPDATE reading SET day = day + 31 WHERE day < '2024-01-08' AND id % 5 = 0");
    check("", "cascades");
    pair.first.sql("TRUNCATE reading CASCADE");
    check("", "TRUNCATE CASCADE");
    pair.first.sql("INSERT INTO reading SELECT i, '2024-01-01'::date + i % 60, 'r' || i % 3, i FROM generate_series(1, 300) i; INSERT INTO note SELECT i, i, '2024-01-01'::date + i % 60, 'x' FROM generate_series(1, 100) i");
    check("", "again");
    migration.set_state("both");
    pair.first.sql("DELETE FROM reading WHERE id % 4 = 0");
    check("__first", "cascades on first in both");
    pair.second
        .sql("DELETE FROM store.measure WHERE id % 7 = 0; UPDATE store.measure SET id = id + 7000 WHERE id % 10 = 1");
    check("__first", "cascades on second in both");
    // A parent is deleted on one store while a child is inserted on the other.
    migration.call("pause");
    pair.first.sql("DELETE FROM reading WHERE id = 202");
    pair.first.sql("INSERT INTO new_note VALUES (9202, 202, '2024-01-01'::date + 202 % 60, 'orphan?')");
    migration.call("resume");
    check("__first", "a child without its parent");
    assert!(!migration.conflicts().is_empty());
    migration.walk(&["second"]);
    pair.first.sql("DELETE FROM reading WHERE id % 5 = 0; UPDATE reading SET id = id + 90000 WHERE id % 6 = 1");
    check("__first", "cascades on second");
    migration.walk(&["both", "first"]);
    migration.cancel();
}

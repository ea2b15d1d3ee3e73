//! Every kind of value and key arrives as it is: in the copy, in each direction and in each state, whatever settings clients and databases have.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use pgrx_tests::cluster::explain;
use pgrx_tests::{Migration, Pair};
use serde_json::{Value, json};

/// Settings under which values look different.
const ODD_SETTINGS: &str = "SET DateStyle = 'German'; SET IntervalStyle = 'sql_standard'; SET TimeZone = 'Asia/Kathmandu'; SET extra_float_digits = -15; \
                            SET bytea_output = 'escape'; SET search_path = public, pg_temp";

/// Values of a built-in type, as SQL literals without quotes or casts. None: no value of it can be typed in.
fn values(name: &str) -> Option<Vec<&'static str>> {
    Some(match name {
        "bool" => vec!["t", "f"],
        "bytea" => vec!["", r"\x00ff5c27", r"\xdeadbeef"],
        "char" => vec!["a", "", "\u{7f}"],
        "name" => vec!["", "we\"ird täble", "NULL"],
        "int8" => vec!["-9223372036854775808", "9223372036854775807"],
        "int2" => vec!["-32768", "32767"],
        "int4" => vec!["-2147483648", "2147483647"],
        "int2vector" | "oidvector" => vec!["", "1 2 3"],
        "oid" | "xid" | "cid" => vec!["0", "4294967295"],
        "xid8" => vec!["0", "18446744073709551615"],
        "tid" => vec!["(0,1)", "(4294967295,65535)"],
        "text" | "varchar" | "bpchar" | "refcursor" => {
            vec!["", "NULL", "\\N", "\\.", "{}", "a\tb\nc\r\u{1}\\", "'\"$1%s\u{1f600}e\u{301}", " both ends "]
        }
        "json" => vec!["{\"a\": 1,  \"a\": null}", "\"\\u0000\"", "[]"],
        "jsonb" => vec!["{\"a\": 1.10, \"b\": \"\\\"\"}", "null", "[1e400]"],
        "jsonpath" => vec!["$.a[*] ? (@ > 1)", "lax $"],
        "xml" => vec!["<a b=\"c\">&lt;</a>", "text only", ""],
        "point" => vec!["(0,-0)", "(1e300,NaN)", "(Infinity,1)"],
        "lseg" => vec!["[(0,0),(1,1.1)]"],
        "path" => vec!["[(0,0),(1,1)]", "((0,0),(1,1),(2,0))"],
        "box" => vec!["(1,1),(0,0)"],
        "polygon" => vec!["((0,0),(1,1),(2,0))"],
        "line" => vec!["{1,-1,0.1}"],
        "circle" => vec!["<(1,2),3.5>"],
        "float4" | "float8" => vec!["NaN", "Infinity", "-Infinity", "-0", "1e-37", "0.1", "3.4028235e+38"],
        "money" => vec!["$0.01", "-$1,234.56"],
        "macaddr" => vec!["08:00:2b:01:02:03"],
        "macaddr8" => vec!["08:00:2b:01:02:03:04:05"],
        "inet" => vec!["10.1.2.3", "10.1.2.3/8", "::1/64"],
        "cidr" => vec!["10.0.0.0/8", "::/0"],
        "aclitem" => vec!["postgres=arwdDxt/postgres"],
        "date" => vec!["4713-01-01 BC", "5874897-12-31", "infinity", "-infinity", "2024-02-29"],
        "time" => vec!["00:00:00", "24:00:00", "23:59:59.999999"],
        "timetz" => vec!["00:00:00+15:59", "23:59:59.999999-15:59"],
        "timestamp" => vec!["4713-01-01 00:00:00 BC", "294276-12-31 23:59:59.999999", "infinity", "-infinity"],
        "timestamptz" => vec![
            "4713-01-02 00:00:00+00 BC",
            "294276-12-31 23:59:59.999999+00",
            "infinity",
            "-infinity",
            "2024-03-31 02:30:00+05:45",
        ],
        "interval" => vec!["1 year -2 mons +3 days -04:05:06.789", "-178000000 years", "30 days", "1 mon"],
        "bit" => vec!["1", "0"],
        "varbit" => vec!["", "10101"],
        "numeric" => vec![
            "NaN",
            "Infinity",
            "-Infinity",
            "0",
            "1.10",
            "-123456789012345678901234567890.123456789012345678901234567890",
        ],
        "regproc" => vec!["pg_backend_pid", "-"],
        "regprocedure" => vec!["abs(integer)"],
        "regoper" => vec!["|/"],
        "regoperator" => vec!["+(integer,integer)"],
        "regclass" => vec!["pg_class", "-"],
        "regcollation" => vec!["\"C\""],
        "regtype" => vec!["integer", "timestamp with time zone"],
        "regrole" => vec!["postgres"],
        "regnamespace" => vec!["pg_catalog"],
        "regconfig" => vec!["english"],
        "regdictionary" => vec!["simple"],
        "uuid" => vec!["00000000-0000-0000-0000-000000000000", "ffffffff-ffff-ffff-ffff-ffffffffffff"],
        "pg_lsn" => vec!["0/0", "FFFFFFFF/FFFFFFFF"],
        "tsvector" => vec!["", "'a':1A 'b c':2,3"],
        "tsquery" => vec!["'a' & !'b c'", ""],
        "txid_snapshot" | "pg_snapshot" => vec!["10:20:10,14,15"],
        "int4range" | "int8range" => vec!["empty", "[1,5)", "(,)", "[3,)"],
        "numrange" => vec!["empty", "[1.0,1.10]", "(,5)"],
        "daterange" => vec!["[2024-01-01,infinity)", "empty"],
        "tsrange" => vec!["[\"2024-01-01 00:00:00\",)", "empty"],
        "tstzrange" => vec!["[\"2024-01-01 00:00:00+00\",infinity)"],
        "int4multirange" | "int8multirange" => vec!["{}", "{[1,2),[5,7)}"],
        "nummultirange" => vec!["{[1.0,1.10]}"],
        "datemultirange" => vec!["{[2024-01-01,2024-01-02)}"],
        "tsmultirange" => vec!["{[\"2024-01-01 00:00:00\",)}"],
        "tstzmultirange" => vec!["{[\"2024-01-01 00:00:00+00\",infinity)}"],
        _ => return None,
    })
}

/// Types that no table can be filled with by typing values in.
const NOT_FOR_TABLES: &[&str] = &[
    "gtsvector",
    "pg_node_tree",
    "pg_ndistinct",
    "pg_dependencies",
    "pg_mcv_list",
    "pg_brin_bloom_summary",
    "pg_brin_minmax_multi_summary",
    "pg_ddl_command",
];

fn quote(text: &str) -> String {
    format!("E'{}'", text.replace('\\', "\\\\").replace('\'', "''"))
}

/// All of a table's rows as text, under settings of our own.
fn dump(cluster: &pgrx_tests::Cluster, rel: &str, key: &str) -> Vec<String> {
    let columns = format!("SELECT whole_row::text FROM (SELECT * FROM {rel}) AS whole_row ORDER BY {key}");
    let mut client = cluster.connect();
    client.batch_execute("SET DateStyle = 'ISO'; SET TimeZone = 'UTC'; SET IntervalStyle = 'postgres'; SET extra_float_digits = 1; SET bytea_output = 'hex'").expect("settings");
    client.query(&columns, &[]).unwrap_or_else(|e| panic!("{}", explain(&e))).iter().map(|r| r.get(0)).collect()
}

fn odd_databases(pair: &Pair) {
    for cluster in [&pair.first, &pair.second] {
        for setting in ODD_SETTINGS
            .split(';')
            .filter_map(|s| s.trim().strip_prefix("SET "))
            .filter(|s| !s.starts_with("search_path"))
        {
            cluster.sql(&format!("ALTER DATABASE app SET {setting}"));
        }
    }
}

/// Runs statements of a client with odd settings.
fn odd(cluster: &pgrx_tests::Cluster, sql: &str) {
    cluster.sql(&format!("{ODD_SETTINGS}; {sql}"));
}

#[test]
fn every_built_in_type_keeps_its_values() {
    let pair = Pair::new();
    odd_databases(&pair);
    let types = pair.first.list(
        "SELECT typname FROM pg_type WHERE typnamespace = 'pg_catalog'::regnamespace AND typtype IN ('b', 'r', 'm') AND typcategory <> 'A' AND typname !~ '^_' ORDER BY 1",
    );
    let mut columns: Vec<(String, Vec<&str>)> = Vec::new();
    for name in types {
        match values(&name) {
            // A build without libxml has the type, and no values.
            Some(_) if name == "xml" && pair.first.connect().batch_execute("SELECT '<a/>'::xml").is_err() => {}
            Some(values) => columns.push((name, values)),
            None => assert!(NOT_FOR_TABLES.contains(&name.as_str()), "no values of type {name} are tried"),
        }
    }
    assert!(columns.len() > 60, "{} types", columns.len());
    let (mut definition, mut rows) = (String::from("id integer PRIMARY KEY"), String::new());
    for (name, _) in &columns {
        let _ = write!(definition, ", c_{name} pg_catalog.\"{name}\", a_{name} pg_catalog.\"{name}\"[]");
    }
    for id in 0..8 {
        let list: Vec<String> = columns
            .iter()
            .map(|(name, values)| {
                let cast = |v: &str| format!("{}::pg_catalog.\"{name}\"", quote(v));
                let all: Vec<String> = values.iter().map(|v| cast(v)).collect();
                format!("{}, ARRAY[{}, NULL]", cast(values[id % values.len()]), all.join(", "))
            })
            .collect();
        let _ = write!(rows, "{}({id}, {})", if id == 0 { "" } else { ", " }, list.join(", "));
    }
    pair.first.sql(&format!("SET TimeZone = 'UTC'; CREATE TABLE kinds ({definition}); INSERT INTO kinds VALUES {rows}; INSERT INTO kinds (id) VALUES (8)"));
    pair.second_store("k", &format!("CREATE TABLE kinds ({definition})"));
    let original = dump(&pair.first, "kinds", "id");
    let mapping = json!({"tables": [{"first": "public.kinds", "second": "k.kinds", "second_view": "public.kinds2"}]});
    let migration = Migration::start(&pair, "kinds", &mapping);
    migration.until_state("first");
    let equal = |when: &str, table: &str| {
        migration.settle();
        let (a, b) = (dump(&pair.first, table, "id"), dump(&pair.second, "k.kinds", "id"));
        for (a, b) in a.iter().zip(&b) {
            // The rows are long: the place will do.
            let at = a.chars().zip(b.chars()).take_while(|(a, b)| a == b).count();
            let near = |text: &str| text.chars().skip(at.saturating_sub(60)).take(120).collect::<String>();
            assert!(a == b, "{when}: {} and {}", near(a), near(b));
        }
        assert_eq!(a.len(), b.len(), "{when}");
        assert!(migration.conflicts().is_empty(), "{when}: {:?}", migration.conflicts());
        a
    };
    assert_eq!(equal("after the copy", "kinds"), original);
    // Each row takes all the values of the next one.
    let names: Vec<String> = columns.iter().flat_map(|(n, _)| [format!("c_{n}"), format!("a_{n}")]).collect();
    let list = names.join(", ");
    let rotate = |table: &str| {
        let set: Vec<String> = names.iter().map(|n| format!("{n} = o.{n}")).collect();
        format!("UPDATE {table} AS t SET {} FROM {table} AS o WHERE o.id = (t.id + 1) % 9", set.join(", "))
    };
    let copy = |table: &str, by: i32| {
        format!("INSERT INTO {table} (id, {list}) SELECT id + {by}, {list} FROM {table} WHERE id < 9")
    };
    odd(&pair.first, &rotate("kinds"));
    odd(&pair.first, &copy("kinds", 100));
    equal("in first", "kinds");
    migration.set_state("both");
    odd(&pair.first, &rotate("kinds"));
    equal("in both, forward", "kinds__first");
    odd(&pair.second, &rotate("k.kinds"));
    odd(&pair.second, &copy("k.kinds", 200));
    equal("in both, backward", "kinds__first");
    migration.set_state("second");
    odd(&pair.second, &rotate("k.kinds"));
    equal("in second, over there", "kinds__first");
    odd(&pair.first, &copy("kinds", 300));
    odd(&pair.first, "DELETE FROM kinds WHERE id BETWEEN 200 AND 208");
    odd(&pair.first, &rotate("kinds"));
    let rows = equal("in second, through the view", "kinds__first");
    assert_eq!(dump(&pair.first, "kinds", "id"), rows, "what the managed view shows");
    migration.set_state("both");
    migration.set_state("first");
    migration.cancel();
}

#[test]
fn every_type_of_key_finds_its_row() {
    let pair = Pair::new();
    odd_databases(&pair);
    pair.first.sql("CREATE TYPE mood AS ENUM ('sad', 'ok', 'happy')");
    pair.second.sql("CREATE TYPE mood AS ENUM ('sad', 'ok', 'happy')");
    let mut keys: BTreeMap<&str, Vec<&str>> = BTreeMap::from([
        ("text", vec!["", "a", "B", "b", "ä", "NULL", "{}", "a,b", "\\\"", "\u{1f600}"]),
        ("varchar(20)", vec!["", "a b", "A b", "\t"]),
        ("char(5)", vec!["a", "a b", "B"]),
        ("numeric(12,3)", vec!["-1", "0", "1.5", "999999999.999", "NaN"]),
        ("bool", vec!["t", "f"]),
        ("public.mood", vec!["happy", "sad", "ok"]),
    ]);
    for name in [
        "int2",
        "int4",
        "int8",
        "name",
        "oid",
        "uuid",
        "date",
        "time",
        "timestamp",
        "timestamptz",
        "bytea",
        "inet",
        "cidr",
        "macaddr",
        "macaddr8",
        "varbit",
        "pg_lsn",
        "xid8",
    ] {
        keys.insert(name, values(name).expect("values"));
    }
    // In the order of a language, capitals beside small letters, where the server knows one.
    if pair.first.text("SELECT count(*) FROM pg_collation WHERE collname = 'und-x-icu'").as_deref() != Some("0") {
        keys.insert(
            "text COLLATE \"und-x-icu\"",
            vec!["", "a", "A", "b", "B", "ä", "Ä", "z", "-a", "{\"", "\u{1f600}"],
        );
    }
    let mut mapping = json!({"tables": []});
    let (mut first, mut second) = (String::new(), String::new());
    for (i, (name, values)) in keys.iter().enumerate() {
        let _ = write!(second, "CREATE TABLE t{i} (k {name}, part integer, v integer, PRIMARY KEY (k, part));");
        let _ = write!(first, "CREATE TABLE t{i} (k {name}, part integer, v integer, PRIMARY KEY (k, part));");
        for value in values {
            let _ =
                write!(first, "INSERT INTO t{i} SELECT {}::{name}, n, 0 FROM generate_series(1, 3) n;", quote(value));
        }
        mapping["tables"]
            .as_array_mut()
            .expect("a list")
            .push(json!({"first": format!("public.t{i}"), "second": format!("keys.t{i}")}));
    }
    pair.first.sql(&format!("SET TimeZone = 'UTC'; SET DateStyle = 'ISO'; {first}"));
    pair.second_store("keys", &second);
    // Chunks of two rows: every key is the end of one.
    let migration = Migration::start_with(&pair, "keys", &mapping, &json!({"chunk_rows": 2, "copy_workers": 3}));
    migration.until_state("first");
    let equal = |when: &str, suffix: &str| {
        migration.settle();
        for (i, (name, values)) in keys.iter().enumerate() {
            let (a, b) = (
                dump(&pair.first, &format!("t{i}{suffix}"), "k, part"),
                dump(&pair.second, &format!("keys.t{i}"), "k, part"),
            );
            assert_eq!(a, b, "{when}: keys of type {name}");
            assert!(a.len() >= values.len() * 2, "{when}: {name} has {} rows", a.len());
        }
        assert!(migration.conflicts().is_empty(), "{when}: {:?}", migration.conflicts());
    };
    equal("after the copy", "");
    let change = |schema: &str, n: i32| -> String {
        (0..keys.len())
            .map(|i| format!("UPDATE {schema}t{i} SET v = v + {n}; UPDATE {schema}t{i} SET part = part + 10 * {n} WHERE part % 3 = 0; DELETE FROM {schema}t{i} WHERE part % 3 = 1 AND part < {n}; INSERT INTO {schema}t{i} SELECT k, 3000 + {n}, 1 FROM {schema}t{i} WHERE part % 3 = 2 AND part < 3000 ON CONFLICT DO NOTHING;"))
            .collect()
    };
    odd(&pair.first, &change("", 1));
    equal("in first", "");
    migration.set_state("both");
    odd(&pair.first, &change("", 2));
    equal("in both, forward", "__first");
    odd(&pair.second, &change("keys.", 3));
    equal("in both, backward", "__first");
    migration.set_state("second");
    odd(&pair.second, &change("keys.", 4));
    equal("in second", "__first");
    migration.finish();
}

#[test]
fn a_key_whose_equal_values_differ_in_text_is_refused() {
    let pair = Pair::new();
    for (i, name) in ["interval", "float8", "timetz", "jsonb", "integer[]", "numrange", "numeric"].iter().enumerate() {
        pair.first.sql(&format!("CREATE TABLE r{i} (k {name} PRIMARY KEY)"));
        pair.second_store(&format!("r{i}"), &format!("CREATE TABLE r{i} (k {name} PRIMARY KEY)"));
        let mapping = json!({"tables": [{"first": format!("public.r{i}"), "second": format!("r{i}.r{i}")}]});
        let error = Migration::named(&pair, "keys").try_start(&mapping, &json!({})).expect_err("an ambiguous key");
        assert!(
            explain(&error).starts_with("22023") && explain(&error).contains("key column"),
            "{name}: {}",
            explain(&error)
        );
    }
}

#[test]
fn wide_rows_and_large_values_arrive() {
    let pair = Pair::new();
    let columns: Vec<String> = (0..200).map(|i| format!("c{i} text")).collect();
    let definition = format!("id integer PRIMARY KEY, b bytea, {}", columns.join(", "));
    pair.first.sql(&format!(
        "CREATE TABLE wide ({definition});
         INSERT INTO wide (id, c0, c199) SELECT i, 'first ' || i, repeat(md5(i::text), 100) FROM generate_series(1, 300) i;
         INSERT INTO wide (id, b, c7) SELECT 1000 + i, decode(repeat(md5(i::text), 200000), 'hex'), repeat(E'x\\\\\"', 1000000) FROM generate_series(1, 6) i"
    ));
    pair.second_store("w", &format!("CREATE TABLE wide ({definition})"));
    let mapping = json!({"tables": [{"first": "public.wide", "second": "w.wide", "second_view": "public.wide2"}]});
    let migration = Migration::start(&pair, "wide", &mapping);
    migration.until_state("first");
    let equal = |when: &str, table: &str| {
        migration.settle();
        let digest = |rel: &str| format!("SELECT id || ' ' || md5(t::text) FROM {rel} AS t ORDER BY id");
        assert_eq!(pair.first.list(&digest(table)), pair.second.list(&digest("w.wide")), "{when}");
    };
    equal("after the copy", "wide");
    pair.first.sql("UPDATE wide SET b = b || '\\x01'::bytea, c100 = c7 WHERE id > 1000; UPDATE wide SET c150 = 'all'");
    equal("in first", "wide");
    migration.set_state("both");
    pair.second
        .sql("UPDATE w.wide SET b = b || '\\x02'::bytea, c101 = c7 WHERE id > 1003; UPDATE w.wide SET c151 = 'all'");
    equal("in both, backward", "wide__first");
    pair.first.sql("UPDATE wide SET b = b || '\\x03'::bytea, c103 = c7 WHERE id = 1006; UPDATE wide SET c152 = 'all' WHERE id < 1001");
    equal("in both, forward", "wide__first");
    migration.set_state("second");
    pair.first.sql("UPDATE wide SET c102 = c7, c151 = NULL WHERE id > 1004");
    equal("in second, through the view", "wide__first");
    pair.second
        .sql("UPDATE w.wide SET b = b || '\\x04'::bytea, c104 = c7 WHERE id = 1006; UPDATE w.wide SET c153 = 'all' WHERE id < 1001");
    equal("in second, over there", "wide__first");
    migration.finish();
}

#[test]
fn names_of_every_kind_work() {
    let pair = Pair::new();
    let (schema, table) = ("we\"ird $1 %s\\", "täble.x' \"");
    let odd = [
        "x",
        "r",
        "t",
        "d",
        "k",
        "n",
        "o",
        "rows",
        "key",
        "new_rows",
        "old_rows",
        "incoming",
        "select",
        "Ümläut \"q\"",
        "$1",
        "a\\b",
        "crossover_i",
    ];
    let q = |name: &str| format!("\"{}\"", name.replace('"', "\"\""));
    let long = "l".repeat(63);
    let columns: Vec<String> = odd.iter().chain([&long.as_str()]).map(|c| format!("{} text", q(c))).collect();
    let definition =
        format!("{} integer, {}, PRIMARY KEY ({})", q("the \"key\""), columns.join(", "), q("the \"key\""));
    pair.first.sql(&format!(
        "CREATE SCHEMA {s}; CREATE TABLE {s}.{t} ({definition}); CREATE UNIQUE INDEX ON {s}.{t} ({x}); INSERT INTO {s}.{t} SELECT i, 'x' || i FROM generate_series(1, 50) i",
        s = q(schema),
        t = q(table),
        x = q("x"),
    ));
    pair.second_store(
        "pl\"ace",
        &format!("CREATE TABLE {} ({definition}); CREATE UNIQUE INDEX ON {} ({})", q("rows"), q("rows"), q("x")),
    );
    let mapping: Value = json!({"tables": [{
        "first": format!("{}.{}", q(schema), q(table)), "second": format!("{}.{}", q("pl\"ace"), q("rows")),
        "second_view": format!("{}.{}", q(schema), q("incoming"))}]});
    let migration = Migration::start(&pair, "od\"d 'name'", &mapping);
    migration.until_state("first");
    let equal = |when: &str, name: &str| {
        migration.settle();
        let a = dump(&pair.first, &format!("{}.{}", q(schema), q(name)), "1");
        assert_eq!(a, dump(&pair.second, &format!("{}.{}", q("pl\"ace"), q("rows")), "1"), "{when}");
        assert_eq!(a.len(), 50, "{when}");
    };
    let write = |cluster: &pgrx_tests::Cluster, schema: &str, table: &str, n: i32| {
        let set: Vec<String> = odd[1..].iter().map(|c| format!("{} = '{n}'", q(c))).collect();
        let rel = format!("{}.{}", q(schema), q(table));
        let swap = format!(
            "UPDATE {rel} SET x = x || '!' || {n} WHERE {k} % 2 = 0; UPDATE {rel} SET {set} WHERE {k} > 25",
            k = q("the \"key\""),
            set = set.join(", ")
        );
        cluster.sql(&swap);
    };
    equal("after the copy", table);
    write(&pair.first, schema, table, 1);
    equal("in first", table);
    migration.set_state("both");
    write(&pair.first, schema, table, 2);
    equal("in both, forward", &format!("{table}__first"));
    write(&pair.second, "pl\"ace", "rows", 3);
    equal("in both, backward", &format!("{table}__first"));
    migration.set_state("second");
    write(&pair.first, schema, table, 4);
    equal("in second", &format!("{table}__first"));
    migration.finish();
}

//! Tables, columns and keys that cannot be migrated.

use pgrx_tests::Witness;
use serde_json::{Value, json};

use super::{Expected, NOTHING, bench, one, start};

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
            "\"f2\".\"a_view\" on the second server: is not a table",
            "A view cannot be a target.",
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

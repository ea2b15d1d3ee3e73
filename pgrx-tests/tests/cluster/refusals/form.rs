//! What is wrong with the JSON itself.

use pgrx_tests::Witness;
use serde_json::json;

use super::{Expected, NOTHING, bench, one, start_as};

#[test]
fn the_form_of_the_mapping() {
    let bench = bench();
    let witness = Witness::of(&bench.pair.first);
    let keys = "The keys that are allowed here: first, second, second_view, forward, backward, key.";
    let names = "Write it as in SQL: schema.table, in double quotes where it is not all in lower case.";
    let table = r#""first": "s1.t", "second": "f2.t""#;
    let long = "x".repeat(64);
    let deep = "[".repeat(200) + &"]".repeat(200);
    for (name, mapping, detail, hint) in [
        ("an array", "[]".to_owned(), "mapping: is an array, not an object", NOTHING),
        ("null", "null".into(), "mapping: is null, not an object", NOTHING),
        ("a deep one", deep, "mapping: cannot be read: recursion limit exceeded …", NOTHING),
        ("a number without end", "[1e999]".into(), "mapping: cannot be read: number out of range …", NOTHING),
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
            "/conflicts: is \"dice\"",
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

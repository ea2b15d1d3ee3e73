//! Names and other arguments: those that are refused, and those that are not.

use pgrx_tests::pair::quoted;
use pgrx_tests::{Migration, Pair, Witness};
use serde_json::json;

use super::{Expected, bench, literal, one, start_as};

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

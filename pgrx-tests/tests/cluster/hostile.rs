//! Hostile input and rows that do not fit: nobody gains rights, a running migration is not hurt, no image is lost.

use std::time::Duration;

use pgrx_tests::cluster::{explain, sqlstate};
use pgrx_tests::market;
use pgrx_tests::process;
use pgrx_tests::wait::{SOON, until};
use pgrx_tests::{Migration, Pair, Witness};
use serde_json::{Value, json};

fn is_superuser(pair: &Pair, role: &str) -> bool {
    pair.first.text(&format!("SELECT rolsuper FROM pg_roles WHERE rolname = '{role}'")).as_deref() == Some("t")
}

#[test]
fn a_search_path_lends_nobody_rights() {
    let pair = Pair::new();
    market::create(&pair, 10);
    let migration = market::started(&pair);
    pair.first.sql(
        "CREATE ROLE mallory; GRANT EXECUTE ON FUNCTION migration_wait(text, interval) TO mallory; CREATE SCHEMA evil AUTHORIZATION mallory",
    );
    pair.first.sql(
        "SET ROLE mallory;
         CREATE FUNCTION evil.eq(text, text) RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN
             IF current_user OPERATOR(pg_catalog.=) 'postgres' THEN EXECUTE 'ALTER ROLE mallory SUPERUSER'; END IF;
             RETURN $1 OPERATOR(pg_catalog.=) $2; END $$;
         CREATE OPERATOR evil.= (LEFTARG = text, RIGHTARG = text, FUNCTION = evil.eq)",
    );
    let mut mallory = pair.first.connect();
    mallory.batch_execute("SET ROLE mallory; SET search_path = evil, pg_catalog, public").expect("a setting");
    mallory.batch_execute("SELECT public.migration_wait('market', '5 s')").expect_err("not the owner");
    assert!(!is_superuser(&pair, "mallory"));
    migration.cancel();
}

#[test]
fn an_expression_is_one_expression() {
    let pair = Pair::new();
    market::create(&pair, 10);
    pair.first.sql("CREATE ROLE mallory");
    for text in [
        "name)::varchar(200) AS full_name FROM public.customer; ALTER ROLE mallory SUPERUSER; SELECT (name",
        "name)::varchar(200), (name",
        "name) FROM public.customer UNION SELECT (name",
    ] {
        let mut mapping = market::mapping();
        mapping["tables"][0]["forward"]["full_name"] = Value::from(text);
        let error =
            Migration::named(&pair, "inj").try_start(&mapping, &json!({})).expect_err("more than an expression");
        assert_eq!(sqlstate(&error), "22023", "{}", explain(&error));
        assert!(explain(&error).contains("is not valid"), "{}", explain(&error));
    }
    assert!(!is_superuser(&pair, "mallory"));
    assert_eq!(pair.first.text("SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'crossover%'").as_deref(), Some("0"));
    // The name is free again.
    let migration = Migration::start(&pair, "inj", &market::mapping());
    migration.until_state("first");
    migration.cancel();
}

#[test]
fn a_start_over_the_same_tables_does_not_hurt_the_running_migration() {
    let pair = Pair::new();
    market::create(&pair, 10);
    let migration = market::started(&pair);
    let triggers = || {
        let count = "SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'crossover%' AND tgenabled = 'A'";
        (pair.first.text(count), pair.second.text(count))
    };
    let before = triggers();
    let error = Migration::named(&pair, "again").try_start(&market::mapping(), &json!({})).expect_err("tables taken");
    assert_eq!(sqlstate(&error), "22023", "{}", explain(&error));
    assert_eq!(triggers(), before);
    pair.first.sql("UPDATE customer SET cents = 77 WHERE id = 3");
    migration.settle();
    assert_eq!(market::cents_in_second(&pair, 3), 77);
    migration.cancel();
}

#[test]
fn conflicts_of_the_last_switch_are_home_when_it_finishes() {
    let pair = Pair::new();
    market::create(&pair, 10);
    let witness = Witness::of(&pair.first);
    let migration = market::started(&pair);
    migration.set_state("both");
    let worker = migration.worker();
    pair.first.fault("switch:begin stop");
    std::thread::scope(|scope| {
        let switch = scope.spawn(|| migration.set_state("second"));
        until("the worker stops", SOON, || !pair.first.fault_is_armed() && process::is_stopped(worker));
        pair.first.sql("UPDATE customer SET name = 'on first' WHERE id = 4");
        pair.first.sql("UPDATE client SET full_name = 'on second' WHERE client_no = 4");
        process::signal(worker, process::CONTINUE);
        switch.join().expect("the switch");
    });
    migration.finish();
    let conflicts = migration.conflicts();
    let images: String = conflicts.iter().map(Value::to_string).collect();
    assert_eq!(conflicts.len(), 1, "{images}");
    assert!(images.contains("on first") && images.contains("on second"), "{images}");
    witness.testify();
}

#[test]
fn a_parked_row_takes_part_in_a_conflict() {
    let pair = Pair::new();
    market::create(&pair, 10);
    pair.second.sql("ALTER TABLE market.client ADD CHECK (balance < 1000)");
    let migration = market::started(&pair);
    migration.set_state("both");
    pair.first.sql("UPDATE customer SET cents = 500000 WHERE id = 3");
    until("the row is parked", SOON, || migration.conflicts().iter().any(|c| c["kind"] == "parked"));
    pair.first.sql("UPDATE customer SET cents = 600000 WHERE id = 3");
    let error = migration.try_wait(Duration::from_secs(20)).expect_err("a parked row");
    assert_eq!(sqlstate(&error), "55000", "{}", explain(&error));
    let error = migration.try_set_state("second", Duration::from_secs(5)).expect_err("a parked row");
    assert_eq!(sqlstate(&error), "55000", "{}", explain(&error));
    // The others go on.
    pair.first.sql("UPDATE customer SET cents = 12 WHERE id = 5");
    until("another row arrives", SOON, || market::cents_in_second(&pair, 5) == 12);
    pair.first.sql("UPDATE client SET balance = 0.79 WHERE client_no = 3");
    migration.settle();
    market::assert_equal(&pair, "__first");
    let conflicts = migration.conflicts();
    let images: String = conflicts.iter().filter(|c| c["kind"] == "conflict").map(Value::to_string).collect();
    assert!(images.contains("600000") && images.contains("0.79"), "an image is lost: {conflicts:?}");
    migration.walk(&["first"]);
    migration.cancel();
}

#[test]
fn a_row_whose_expression_fails_is_parked_and_the_others_go_on() {
    let pair = Pair::new();
    pair.first.sql("CREATE TABLE word (id integer PRIMARY KEY, n text); INSERT INTO word SELECT i, i FROM generate_series(1, 50) i");
    pair.second_store("words", "CREATE TABLE number (id integer PRIMARY KEY, n integer)");
    pair.first.sql("UPDATE word SET n = 'none' WHERE id = 7");
    let mapping = json!({"tables": [{"first": "public.word", "second": "words.number", "forward": {"n": "n::integer"}, "backward": {"n": "n::text"}}]});
    let migration = Migration::start(&pair, "words", &mapping);
    migration.until_state("first");
    pair.first.sql("UPDATE word SET n = 'nothing' WHERE id = 8; UPDATE word SET n = '900' WHERE id = 9");
    until("the good row arrives", SOON, || {
        pair.second.text("SELECT n FROM words.number WHERE id = 9").as_deref() == Some("900")
    });
    let error = migration.try_set_state("both", Duration::from_secs(5)).expect_err("parked rows");
    assert_eq!(sqlstate(&error), "55000", "{}", explain(&error));
    assert_eq!(migration.conflicts().iter().filter(|c| c["kind"] == "parked").count(), 2);
    assert_eq!(pair.second.text("SELECT count(*) FROM words.number").as_deref(), Some("49"));
    pair.first.sql("UPDATE word SET n = id WHERE n !~ '^[0-9]+$'");
    migration.settle();
    assert_eq!(pair.second.text("SELECT count(*) FROM words.number WHERE n = id").as_deref(), Some("49"));
    migration.set_state("both");
    migration.walk(&["second"]);
    migration.finish();
}

#[test]
fn a_column_without_a_place_in_the_second_store_is_not_changed_silently() {
    let pair = Pair::new();
    pair.first.sql(
        "CREATE TABLE note (id integer PRIMARY KEY, body text, draft text); INSERT INTO note VALUES (1, 'b', 'd')",
    );
    pair.second_store("notes", "CREATE TABLE note (id integer PRIMARY KEY, body text)");
    let mapping = json!({"tables": [{"first": "public.note", "second": "notes.note"}]});
    let migration = Migration::start(&pair, "notes", &mapping);
    migration.until_state("first");
    migration.walk(&["both", "second"]);
    let error = pair.first.connect().batch_execute("UPDATE note SET draft = 'new'").expect_err("no place");
    assert_eq!(sqlstate(&error), "0A000", "{}", explain(&error));
    pair.first.sql("UPDATE note SET body = 'changed'");
    migration.settle();
    assert_eq!(pair.first.text("SELECT concat_ws('|', body, draft) FROM note__first").as_deref(), Some("changed|d"));
    migration.finish();
}

#[test]
fn a_key_has_one_form() {
    let pair = Pair::new();
    pair.first.sql("CREATE TABLE amount (id numeric PRIMARY KEY)");
    pair.second_store("amounts", "CREATE TABLE amount (id numeric(10,2) PRIMARY KEY)");
    let mapping = json!({"tables": [{"first": "public.amount", "second": "amounts.amount"}]});
    let error = Migration::named(&pair, "amounts").try_start(&mapping, &json!({})).expect_err("no fixed scale");
    assert_eq!(sqlstate(&error), "22023");
    assert!(explain(&error).contains("no fixed scale"), "{}", explain(&error));
}

#[test]
fn a_conflict_over_a_value_that_jsonb_does_not_take_keeps_both_images() {
    let pair = Pair::new();
    pair.first.sql("CREATE TABLE doc (id integer PRIMARY KEY, d json); INSERT INTO doc VALUES (1, '{}')");
    pair.second_store("docs", "CREATE TABLE doc (id integer PRIMARY KEY, d json)");
    let mapping = json!({"tables": [{"first": "public.doc", "second": "docs.doc", "second_view": "public.new_doc"}]});
    let migration = Migration::start(&pair, "docs", &mapping);
    migration.until_state("first");
    migration.set_state("both");
    migration.call("pause");
    pair.first.sql(r#"UPDATE doc SET d = '{"first": "\u0000"}'"#);
    pair.first.sql(r#"UPDATE new_doc SET d = '{"second": "\u0000"}'"#);
    migration.call("resume");
    migration.settle();
    let conflicts = migration.conflicts();
    let images: String = conflicts.iter().map(Value::to_string).collect();
    assert!(images.contains("first") && images.contains("second"), "{images}");
    let stored = (pair.first.text("SELECT d FROM doc__first"), pair.second.text("SELECT d FROM docs.doc"));
    assert_eq!(stored.0, stored.1);
    migration.walk(&["first"]);
    migration.cancel();
}

#[test]
fn a_table_that_was_dropped_does_not_keep_its_migration() {
    for taken_over in [false, true] {
        let pair = Pair::new();
        market::create(&pair, 10);
        let second_before = pair.second.pg_dump_schema("app");
        let migration = market::started(&pair);
        if taken_over {
            migration.walk(&["both", "first"]);
        }
        let table = if taken_over { "purchase__first" } else { "purchase" };
        pair.first.sql(&format!("DROP TABLE {table} CASCADE"));
        // Whoever comes after this worker knows the table no more.
        let worker = migration.worker();
        pair.first.sql(&format!("SELECT pg_terminate_backend({worker})"));
        let hint = |status: &pgrx_tests::Status| status.text("hint");
        let status =
            migration.until_status("misses its table", |s| s.text("last_error").contains("does not exist any more"));
        let call = if taken_over { "migration_cancel('market', force => true)" } else { "migration_cancel('market')" };
        assert!(hint(&status).contains(call), "{}", hint(&status));
        for call in ["migration_wait('market')", "migration_set_state('market', 'both')"] {
            let error = pair.first.connect().query(&format!("SELECT {call}"), &[]).expect_err(call);
            assert_eq!(sqlstate(&error), "42P01", "{call}: {}", explain(&error));
        }
        assert_eq!(pair.first.text(&format!("SELECT {call}")).as_deref(), Some("cancelled"));
        assert_eq!(
            pair.first.text("SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'crossover%'").as_deref(),
            Some("0")
        );
        assert_eq!(
            pair.first
                .text("SELECT count(*) FROM pg_class WHERE relnamespace = 'crossover'::regnamespace AND relkind = 'v'")
                .as_deref(),
            Some("0")
        );
        assert_eq!(second_before, pair.second.pg_dump_schema("app"));
        pair.first.sql("UPDATE customer SET cents = 1 WHERE id = 1");
    }
}

#[test]
fn a_migration_that_has_lost_a_table_or_column_can_be_ended_from_any_state() {
    for (states, damage, restart) in [
        (&["both"][..], "DROP TABLE purchase__first CASCADE", false),
        (&["both", "second"], "DROP TABLE purchase__first CASCADE", true),
        (&["both"], "ALTER TABLE customer__first DROP COLUMN name CASCADE", true),
        (
            &["both", "first"],
            "ALTER TABLE customer__first DROP COLUMN name CASCADE; UPDATE customer__first SET cents = 1",
            false,
        ),
    ] {
        let pair = Pair::new();
        market::create(&pair, 10);
        let second_before = pair.second.pg_dump_schema("app");
        let migration = market::started(&pair);
        migration.walk(states);
        pair.first.sql(damage);
        if restart {
            let worker = migration.worker();
            pair.first.sql(&format!("SELECT pg_terminate_backend({worker})"));
        }
        let call = "SELECT migration_cancel('market', force => true)";
        migration.until_status(&format!("{states:?}, {damage}: what to do"), |s| s.text("hint").contains(call));
        assert_eq!(pair.first.text(call).as_deref(), Some("cancelled"), "{states:?}, {damage}");
        assert_eq!(
            pair.first.text("SELECT count(*) FROM pg_trigger WHERE tgname ~ '^crossover_(capture|fence)'").as_deref(),
            Some("0")
        );
        assert_eq!(second_before, pair.second.pg_dump_schema("app"));
    }
}

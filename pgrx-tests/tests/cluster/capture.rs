//! Whatever statement changes a row is captured: on either store directly, through the managed view, and in each state.

use std::io::Write as _;
use std::time::Duration;

use pgrx_tests::cluster::{Cluster, explain};
use pgrx_tests::process;
use pgrx_tests::wait::{LONG, SOON, until};
use pgrx_tests::{Migration, Pair};
use serde_json::{Value, json};

/// Three tables in a chain of foreign keys, with triggers of the users' own on first.
const FIRST: &str = "
CREATE TABLE account (id integer PRIMARY KEY, name text UNIQUE, total bigint NOT NULL DEFAULT 0);
CREATE TABLE item (id integer PRIMARY KEY, account_id integer NOT NULL REFERENCES account ON DELETE CASCADE ON UPDATE CASCADE DEFERRABLE INITIALLY DEFERRED,
    qty integer NOT NULL DEFAULT 1, changed integer NOT NULL DEFAULT 0);
CREATE TABLE tag (id integer PRIMARY KEY, item_id integer REFERENCES item ON DELETE SET NULL ON UPDATE CASCADE, label text);
CREATE FUNCTION touch() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN NEW.changed := OLD.changed + 1; RETURN NEW; END';
CREATE TRIGGER touch BEFORE UPDATE ON item FOR EACH ROW EXECUTE FUNCTION touch();
CREATE FUNCTION count_item() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    EXECUTE format('UPDATE %I.%I SET total = total + 10 WHERE id = $1', TG_TABLE_SCHEMA, replace(TG_TABLE_NAME, 'item', 'account')) USING NEW.account_id;
    RETURN NULL; END $$;
CREATE TRIGGER count_item AFTER INSERT ON item FOR EACH ROW EXECUTE FUNCTION count_item();
CREATE FUNCTION no_hidden() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN IF NEW.label = 'hidden' THEN RETURN NULL; END IF; NEW.label := lower(NEW.label); RETURN NEW; END $$;
CREATE TRIGGER no_hidden BEFORE INSERT ON tag FOR EACH ROW EXECUTE FUNCTION no_hidden();
INSERT INTO account SELECT i, 'a' || i FROM generate_series(1, 300) i;
INSERT INTO item SELECT i, 1 + i % 300 FROM generate_series(1, 600) i;
INSERT INTO tag SELECT i, 1 + i % 600, 'T' || i FROM generate_series(1, 600) i;";

const SECOND: &str = "
CREATE TABLE account (id integer PRIMARY KEY, name text UNIQUE, tenths bigint NOT NULL DEFAULT 0);
CREATE TABLE item (id integer PRIMARY KEY, account_id integer NOT NULL REFERENCES account ON DELETE CASCADE ON UPDATE CASCADE DEFERRABLE INITIALLY DEFERRED,
    qty integer NOT NULL DEFAULT 1, changed integer NOT NULL DEFAULT 0);
CREATE TABLE tag (id integer PRIMARY KEY, item_id integer REFERENCES item ON DELETE SET NULL ON UPDATE CASCADE, label text);";

fn mapping() -> Value {
    json!({"tables": [
        {"first": "public.account", "second": "v2.account", "second_view": "public.new_account",
         "forward": {"tenths": "total * 10"}, "backward": {"total": "tenths / 10"}},
        {"first": "public.item", "second": "v2.item", "second_view": "public.new_item"},
        {"first": "public.tag", "second": "v2.tag", "second_view": "public.new_tag"}]})
}

/// What is done to a store's tables; `@` stands before a table's name, `$` after it, `#` is the amount's column.
const STATEMENTS: &[(&str, &str)] = &[
    (
        "INSERT of thousands",
        "INSERT INTO @account$ (id, name, #) SELECT i, 'n' || i, i * 10 FROM generate_series(1001, 4000) i; INSERT INTO @item$ (id, account_id) SELECT i, i FROM generate_series(1001, 3000) i",
    ),
    (
        "UPDATE, DELETE",
        "UPDATE @account$ SET # = # + 10 WHERE id % 2 = 0; DELETE FROM @tag$ WHERE id % 10 = 1; UPDATE @account$ SET # = 0 WHERE false",
    ),
    (
        "UPDATE FROM, DELETE USING",
        "UPDATE @item$ AS i SET qty = length(a.name) FROM @account$ AS a WHERE a.id = i.account_id AND a.id % 3 = 0; DELETE FROM @tag$ AS t USING @item$ AS i WHERE i.id = t.item_id AND i.qty = 1 AND i.id % 50 = 0",
    ),
    (
        "key changes",
        "UPDATE @tag$ SET id = -id WHERE id % 4 = 0; UPDATE @tag$ SET id = id + 10000 WHERE id % 9 = 0; UPDATE @tag$ SET id = -id WHERE id < 0",
    ),
    (
        "keys that pass through one another",
        "DO $do$ BEGIN FOR i IN REVERSE 40..1 LOOP UPDATE @tag$ SET id = i + 50001 WHERE id = i + 50000; INSERT INTO @tag$ VALUES (50000 + i, NULL, 'p' || i) ON CONFLICT DO NOTHING; END LOOP; END $do$",
    ),
    (
        "unique values swapped",
        "BEGIN; UPDATE @account$ SET name = 'swap' WHERE id = 21; UPDATE @account$ SET name = 'a21' WHERE id = 22; UPDATE @account$ SET name = 'a22' WHERE id = 21; UPDATE @account$ SET name = (ARRAY['a22', 'a21'])[id - 20] || '!' WHERE id IN (21, 22); COMMIT",
    ),
    ("ON UPDATE CASCADE", "UPDATE @account$ SET id = id + 200000 WHERE id % 37 = 0"),
    (
        "ON DELETE CASCADE and SET NULL",
        "DELETE FROM @account$ WHERE id BETWEEN 100 AND 140 OR id = 200037; DELETE FROM @item$ WHERE id % 41 = 0",
    ),
    (
        "ON CONFLICT",
        "INSERT INTO @account$ AS a (id, name, #) SELECT i, 'c' || i, 10 FROM generate_series(290, 310) i ON CONFLICT (id) DO UPDATE SET # = a.# + EXCLUDED.#, name = EXCLUDED.name; INSERT INTO @tag$ VALUES (2, NULL, 'nothing') ON CONFLICT DO NOTHING",
    ),
    (
        "MERGE",
        "MERGE INTO @account$ AS a USING (SELECT i, 'm' || i AS name FROM generate_series(295, 330) i) AS s ON a.id = s.i WHEN MATCHED AND s.i % 3 = 0 THEN DELETE WHEN MATCHED THEN UPDATE SET # = a.# + 1000 WHEN NOT MATCHED THEN INSERT (id, name) VALUES (s.i, s.name)",
    ),
    (
        "CTEs that write",
        "WITH gone AS (DELETE FROM @tag$ WHERE id % 6 = 0 RETURNING *), more AS (INSERT INTO @tag$ SELECT id + 300000, item_id, label FROM gone RETURNING item_id) UPDATE @item$ SET qty = qty + 1 WHERE id IN (SELECT item_id FROM more)",
    ),
    (
        "deferred foreign keys",
        "BEGIN; INSERT INTO @item$ (id, account_id) SELECT i, i FROM generate_series(9001, 9050) i; INSERT INTO @account$ (id, name) SELECT i, 'late' || i FROM generate_series(9001, 9050) i; COMMIT; BEGIN; DELETE FROM @account$ WHERE id = 9001; INSERT INTO @account$ (id, name) VALUES (9001, 'again'); INSERT INTO @item$ (id, account_id) VALUES (9001, 9001) ON CONFLICT DO NOTHING; COMMIT",
    ),
    (
        "savepoints",
        "BEGIN; SAVEPOINT a; UPDATE @item$ SET qty = 100; SAVEPOINT b; DELETE FROM @item$; ROLLBACK TO a; UPDATE @item$ SET qty = qty + 1 WHERE id < 50; SAVEPOINT c; INSERT INTO @tag$ VALUES (777001, NULL, 'kept'); RELEASE c; SAVEPOINT d; TRUNCATE @tag$; ROLLBACK TO d; COMMIT",
    ),
    (
        "hundreds of subtransactions",
        "DO $do$ BEGIN FOR i IN 1..400 LOOP BEGIN INSERT INTO @tag$ VALUES (780000 + i / 2, NULL, 's' || i); UPDATE @account$ SET # = # + 10 WHERE id = 50; EXCEPTION WHEN unique_violation THEN UPDATE @tag$ SET label = label || '+' WHERE id = 780000 + i / 2; END; END LOOP; END $do$",
    ),
    ("all rolled back", "BEGIN; UPDATE @account$ SET # = -10; TRUNCATE @tag$; ROLLBACK"),
    (
        "WHERE CURRENT OF",
        "DO $do$ DECLARE c CURSOR FOR SELECT * FROM @item$ WHERE id BETWEEN 60 AND 90 FOR UPDATE; r record; BEGIN OPEN c; LOOP FETCH c INTO r; EXIT WHEN NOT FOUND; IF r.id % 2 = 0 THEN UPDATE @item$ SET qty = 60 WHERE CURRENT OF c; ELSE DELETE FROM @item$ WHERE CURRENT OF c; END IF; END LOOP; END $do$",
    ),
    (
        "session_replication_role",
        "BEGIN; SET LOCAL session_replication_role = replica; UPDATE @account$ SET # = # + 70 WHERE id % 5 = 0; DELETE FROM @tag$ WHERE id % 7 = 0; INSERT INTO @tag$ VALUES (790001, NULL, 'replica'); COMMIT; BEGIN; SET LOCAL session_replication_role = local; INSERT INTO @tag$ VALUES (790002, NULL, 'local'); COMMIT",
    ),
    (
        "rewrites",
        "CLUSTER @account$ USING account_pkey; VACUUM FULL @item$; REINDEX TABLE @tag$; UPDATE @tag$ SET label = 'rewritten' WHERE id % 5 = 0",
    ),
    (
        "a row written many times",
        "DO $do$ BEGIN FOR i IN 1..200 LOOP UPDATE @account$ SET # = # + 10 WHERE id = 3; DELETE FROM @tag$ WHERE id = 3; INSERT INTO @tag$ VALUES (3, NULL, 'n' || i); END LOOP; END $do$",
    ),
    (
        "TRUNCATE and more in one transaction",
        "BEGIN; UPDATE @tag$ SET label = 'doomed'; TRUNCATE @tag$; INSERT INTO @tag$ VALUES (1, NULL, 'reborn'), (800001, NULL, 'new'); COMMIT",
    ),
    ("TRUNCATE CASCADE", "TRUNCATE @item$ CASCADE"),
    (
        "after it",
        "INSERT INTO @item$ (id, account_id) SELECT i, (SELECT min(id) FROM @account$ WHERE id > i % 40) FROM generate_series(1, 200) i; INSERT INTO @tag$ SELECT i, i, 'U' || i FROM generate_series(2, 200) i",
    ),
    ("TRUNCATE of all", "TRUNCATE @account$, @item$, @tag$"),
    (
        "a fresh start",
        "INSERT INTO @account$ (id, name) SELECT i, 'a' || i FROM generate_series(1, 300) i; INSERT INTO @item$ (id, account_id) SELECT i, 1 + i % 300 FROM generate_series(1, 600) i; INSERT INTO @tag$ SELECT i, 1 + i % 600, 'T' || i FROM generate_series(1, 600) i",
    ),
];

/// The tables of one store as a statement names them.
struct Target<'a> {
    cluster: &'a Cluster,
    prefix: &'static str,
    suffix: &'static str,
    amount: &'static str,
}

impl Target<'_> {
    fn sql(&self, statement: &str) -> String {
        // DO's own quotes are `$do$`; they stay.
        statement
            .replace("$do$", "\u{1}")
            .replace('@', self.prefix)
            .replace('$', self.suffix)
            .replace('\u{1}', "$do$")
            .replace('#', self.amount)
    }

    fn run(&self, statement: &str) {
        let sql = self.sql(statement);
        if statement.starts_with("CLUSTER") {
            // VACUUM runs outside a transaction.
            sql.split(';').for_each(|sql| self.cluster.sql(sql));
        } else {
            self.cluster.sql(&sql);
        }
    }

    fn copy(&self, from: u32) -> Result<u64, postgres::Error> {
        let mut client = self.cluster.connect();
        let mut copy = client.copy_in(&self.sql("COPY @tag$ (id, label) FROM STDIN"))?;
        for i in 0..2000 {
            writeln!(copy, "{}\tcopied {i}", from + i).expect("a row");
        }
        copy.finish()
    }
}

/// Both stores, each asked on its own server.
fn assert_equal(pair: &Pair, suffix: &str, what: &str) {
    for (table, first, second) in [
        ("account", "id, name, total", "id, name, tenths / 10"),
        ("item", "id, account_id, qty, changed", "id, account_id, qty, changed"),
        ("tag", "id, coalesce(item_id, -1), label", "id, coalesce(item_id, -1), label"),
    ] {
        let rows = |columns: &str, from: &str| {
            format!("SELECT string_agg(concat_ws('|', {columns}), E'\\n' ORDER BY id) FROM {from}")
        };
        let a = pair.first.text(&rows(first, &format!("{table}{suffix}"))).unwrap_or_default();
        let b = pair.second.text(&rows(second, &format!("v2.{table}"))).unwrap_or_default();
        if a != b {
            let there: std::collections::HashSet<&str> = b.lines().collect();
            let here: std::collections::HashSet<&str> = a.lines().collect();
            let only = |a: &std::collections::HashSet<&str>, b: &std::collections::HashSet<&str>| {
                a.difference(b).take(5).copied().collect::<Vec<_>>().join(" ")
            };
            panic!(
                "{what}: {table} differs; on first only: {}; on second only: {}",
                only(&here, &there),
                only(&there, &here)
            );
        }
    }
}

fn started(pair: &Pair) -> Migration<'_> {
    pair.first.sql(FIRST);
    pair.second_store("v2", SECOND);
    let migration = Migration::start(pair, "capture", &mapping());
    migration.until_state("first");
    migration
}

fn every_statement(pair: &Pair, migration: &Migration, target: &Target, suffix: &str, state: &str) {
    for (what, statement) in STATEMENTS {
        target.run(statement);
        migration.settle();
        assert_equal(pair, suffix, &format!("{what} in {state}"));
        if *what == "rewrites" {
            target.copy(900_000).expect("a copy");
            migration.settle();
            assert_equal(pair, suffix, &format!("COPY in {state}"));
            let copied = target.sql("SELECT count(*) FROM @tag$ WHERE label LIKE 'copied%'");
            assert_eq!(target.cluster.text(&copied).as_deref(), Some("2000"));
        }
    }
}

#[test]
fn every_statement_on_the_first_store() {
    let pair = Pair::new();
    let migration = started(&pair);
    let target = |suffix| Target { cluster: &pair.first, prefix: "", suffix, amount: "total" };
    every_statement(&pair, &migration, &target(""), "", "first");
    migration.set_state("both");
    every_statement(&pair, &migration, &target("__first"), "__first", "both");
    assert_eq!(migration.conflicts(), Vec::<Value>::new());
    migration.walk(&["first"]);
    migration.cancel();
}

#[test]
fn every_statement_while_the_copy_runs() {
    let pair = Pair::new();
    pair.first.sql(FIRST);
    pair.second_store("v2", SECOND);
    pair.first.fault("copy:claimed stop");
    let options = json!({"copy_workers": 1, "chunk_rows": 100});
    let migration = Migration::start_with(&pair, "capture", &mapping(), &options);
    let copier = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'pg_crossover copy'";
    let copier = || pair.first.text(copier).and_then(|pid| pid.parse::<i32>().ok());
    until("the copy stands still", SOON, || !pair.first.fault_is_armed() && copier().is_some_and(process::is_stopped));
    pair.first.sql("BEGIN; ALTER TABLE tag DISABLE TRIGGER ALL; UPDATE tag SET label = 'unseen'; ALTER TABLE tag ENABLE TRIGGER ALL; COMMIT");
    until("capture is enabled again, and the fence is not", SOON, || {
        let count = "SELECT count(*) FROM pg_trigger WHERE tgrelid = 'tag'::regclass AND tgname LIKE 'crossover%' AND tgenabled =";
        pair.first.text(&format!("{count} 'A'")).as_deref() == Some("4")
            && pair.first.text(&format!("{count} 'D'")).as_deref() == Some("1")
    });
    let target = Target { cluster: &pair.first, prefix: "", suffix: "", amount: "total" };
    for (i, (_, statement)) in STATEMENTS.iter().enumerate() {
        target.run(statement);
        // In the middle, the copy goes on to its next chunk's claim.
        if i == STATEMENTS.len() / 2 {
            target.copy(900_000).expect("a copy");
            pair.first.fault("copy:claimed stop");
            process::signal(copier().expect("the copy worker"), process::CONTINUE);
            until("the copy stands still", SOON, || {
                !pair.first.fault_is_armed() && copier().is_some_and(process::is_stopped)
            });
        }
    }
    assert_eq!(migration.state(), "copying");
    process::signal(copier().expect("the copy worker"), process::CONTINUE);
    migration.until_state("first");
    assert_equal(&pair, "", "after the copy");
    migration.cancel();
}

#[test]
fn every_statement_on_the_second_store() {
    let pair = Pair::new();
    let migration = started(&pair);
    let target = Target { cluster: &pair.second, prefix: "v2.", suffix: "", amount: "tenths" };
    migration.set_state("both");
    every_statement(&pair, &migration, &target, "__first", "both");
    migration.set_state("second");
    every_statement(&pair, &migration, &target, "__first", "second");
    assert_eq!(migration.conflicts(), Vec::<Value>::new());
    migration.finish();
}

#[test]
fn statements_through_the_managed_view() {
    let pair = Pair::new();
    let migration = started(&pair);
    let views = Target { cluster: &pair.first, prefix: "", suffix: "", amount: "total" };
    // What a view over a foreign table cannot do is an error, never a change that is lost.
    let not_in_second = ["ON CONFLICT", "keys that pass through one another", "deferred foreign keys"];
    let not_on_a_view = ["MERGE", "WHERE CURRENT OF", "rewrites", "savepoints", "all rolled back"];
    for state in ["both", "second", "both"] {
        migration.set_state(state);
        for (what, statement) in STATEMENTS {
            if what.starts_with("TRUNCATE")
                || not_on_a_view.contains(what)
                || *what == "after it"
                || *what == "a fresh start"
            {
                continue;
            }
            if state == "second" && not_in_second.contains(what) {
                continue;
            }
            views.run(statement);
            migration.settle();
            assert_equal(&pair, "__first", &format!("{what} through the view in {state}"));
        }
        for (statement, code) in [("TRUNCATE account", "42809"), ("TRUNCATE account, item, tag CASCADE", "42809")] {
            let error = pair.first.connect().batch_execute(statement).expect_err(statement);
            assert!(explain(&error).starts_with(code), "{statement} in {state}: {}", explain(&error));
        }
        // From PostgreSQL 17 on, some views take it.
        let merge = "MERGE INTO account AS a USING (VALUES (1)) AS s(i) ON a.id = s.i WHEN MATCHED THEN DELETE";
        if let Err(e) = pair.first.connect().batch_execute(merge) {
            assert!(explain(&e).starts_with("0A000"), "{}", explain(&e));
        }
        // A view with INSTEAD OF triggers takes it row by row; any other refuses it.
        for (table, column) in [("account", "name"), ("tag", "label")] {
            let copy = format!(
                "COPY {table} (id, {column}) FROM PROGRAM 'seq 900001 902000 | sed \"s/.*/& c&/\"' DELIMITER ' '"
            );
            let by_trigger = state == "second" && table == "account";
            match pair.first.connect().batch_execute(&copy) {
                Ok(()) => assert!(by_trigger, "COPY into {table} in {state}"),
                Err(e) => {
                    let text = explain(&e);
                    assert!(!by_trigger && text.starts_with("42809") && text.contains("cannot copy to view"), "{text}");
                }
            }
        }
        migration.settle();
        assert_equal(&pair, "__first", &format!("refused statements in {state}"));
        // The same keys again for the next state.
        pair.second.sql("TRUNCATE v2.account, v2.item, v2.tag");
        migration.settle();
        pair.second.sql("INSERT INTO v2.account (id, name) SELECT i, 'a' || i FROM generate_series(1, 300) i; INSERT INTO v2.item (id, account_id) SELECT i, 1 + i % 300 FROM generate_series(1, 600) i; INSERT INTO v2.tag SELECT i, 1 + i % 600, 'T' || i FROM generate_series(1, 600) i");
        migration.settle();
        assert_equal(&pair, "__first", "a fresh start");
    }
    assert_eq!(migration.conflicts(), Vec::<Value>::new());
    migration.walk(&["first"]);
    migration.cancel();
}

#[test]
fn prepared_transactions_are_waited_for_or_captured() {
    let pair = Pair::new();
    pair.first.sql(FIRST);
    pair.second_store("v2", SECOND);
    let mut client = pair.first.connect();
    let mut prepare = |gid: &str, statements: &str| {
        client.batch_execute(&format!("BEGIN; {statements}; PREPARE TRANSACTION '{gid}'")).expect("to prepare");
    };
    let commit = |gid: &str| pair.first.sql(&format!("COMMIT PREPARED '{gid}'"));
    let migration = Migration::named(&pair, "capture");
    let start = |timeout: &str| {
        let sql = format!("SELECT migration_start('capture', $1::jsonb, '{{}}', '{timeout}')::text");
        pair.first.connect().query_one(&sql, &[&mapping()]).map(drop)
    };
    // Before the start: its changes would be in no snapshot of the copy and in no log.
    prepare("before", "UPDATE account SET total = 1 WHERE id = 1; DELETE FROM tag WHERE id = 5");
    let error = explain(&start("5 s").expect_err("a prepared transaction"));
    assert!(error.starts_with("55P03") && error.contains("prepared transaction 'before'"), "{error}");
    commit("before");
    // An old snapshot, which holds no lock, does not keep a start off; what it writes later is captured.
    let mut old = pair.first.connect();
    old.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1 FROM pg_class LIMIT 1").expect("a snapshot");
    start("30 s").expect("to start");
    // While the copy runs and long after it.
    prepare("copying", "UPDATE account SET total = 2 WHERE id = 2; INSERT INTO tag VALUES (6001, NULL, 'prepared')");
    migration.until_state("first");
    old.batch_execute("UPDATE account SET total = 3 WHERE id = 3; COMMIT").expect("a write after the copy");
    pair.first.sql("UPDATE account SET total = 4 WHERE id = 4");
    until("what comes later is not held up", SOON, || {
        pair.second.text("SELECT sum(tenths) FROM v2.account WHERE id IN (3, 4)").as_deref() == Some("70")
    });
    assert_eq!(pair.second.text("SELECT count(*) FROM v2.tag WHERE id = 6001").as_deref(), Some("0"));
    // The takeover needs the table to itself.
    let error = migration.try_set_state("both", Duration::from_secs(5)).expect_err("a prepared transaction");
    assert!(explain(&error).contains("prepared transaction 'copying'"), "{}", explain(&error));
    commit("copying");
    migration.settle();
    assert_equal(&pair, "", "committed long after the copy");
    migration.set_state("both");
    prepare("both", "UPDATE account SET total = 5 WHERE id = 5; DELETE FROM item WHERE id = 300");
    pair.first.sql("UPDATE account SET total = 6 WHERE id = 6");
    migration.settle();
    let error = migration.try_set_state("second", Duration::from_secs(5)).expect_err("a prepared transaction");
    assert!(explain(&error).contains("prepared transaction 'both'"), "{}", explain(&error));
    commit("both");
    migration.set_state("second");
    assert_equal(&pair, "__first", "committed before the switch");
    let mut client = pair.second.connect();
    client
        .batch_execute("BEGIN; UPDATE v2.account SET tenths = 80 WHERE id = 8; PREPARE TRANSACTION 'second'")
        .expect("to prepare");
    let error = migration.try_set_state("both", Duration::from_secs(5)).expect_err("a prepared transaction");
    assert!(explain(&error).contains("prepared transaction 'second' on the second server"), "{}", explain(&error));
    pair.second.sql("COMMIT PREPARED 'second'");
    migration.walk(&["both", "first"]);
    assert_equal(&pair, "__first", "committed on second before the switch");
    migration.cancel();
}

#[test]
fn a_long_transaction_and_a_large_statement() {
    let pair = Pair::new();
    pair.first.sql("CREATE TABLE big (id integer PRIMARY KEY, n bigint); INSERT INTO big SELECT i, i FROM generate_series(1, 200000) i");
    pair.second_store("v2", "CREATE TABLE big (id integer PRIMARY KEY, n bigint)");
    let migration = Migration::start(
        &pair,
        "big",
        &json!({"tables": [{"first": "public.big", "second": "v2.big", "second_view": "public.new_big"}]}),
    );
    let mut long = pair.first.connect();
    migration.until_state("first");
    long.batch_execute(
        "BEGIN; UPDATE big SET n = -1 WHERE id = 1; SAVEPOINT s; UPDATE big SET n = -2 WHERE id = 2; ROLLBACK TO s",
    )
    .expect("a write");
    let sums = |table: &str| {
        let sql = "SELECT concat_ws(' ', count(*), sum(n), sum(hashint8(n)::bigint * id)) FROM ";
        (pair.first.text(&format!("{sql}{table}")), pair.second.text(&format!("{sql}v2.big")))
    };
    pair.first.sql("UPDATE big SET n = n + 1 WHERE id > 2");
    until("200 000 rows of one statement arrive while a transaction is open", LONG, || {
        let (first, second) = sums("big");
        first == second
    });
    assert_eq!(pair.second.text("SELECT n FROM v2.big WHERE id = 1").as_deref(), Some("1"));
    long.batch_execute("COMMIT").expect("a commit");
    migration.settle();
    assert_eq!(pair.second.text("SELECT n FROM v2.big WHERE id = 1").as_deref(), Some("-1"));
    migration.set_state("both");
    pair.second.sql("UPDATE v2.big SET n = n + 1 WHERE id > 150000; DELETE FROM v2.big WHERE id % 10 = 0");
    migration.settle();
    let (first, second) = sums("big__first");
    assert_eq!(first, second);
    migration.set_state("second");
    long.batch_execute("BEGIN; DELETE FROM big WHERE id < 100").expect("a write");
    pair.first.sql("UPDATE big SET n = 5 WHERE id = 151");
    until("it arrives while a transaction is open", SOON, || {
        pair.first.text("SELECT n FROM big__first WHERE id = 151").as_deref() == Some("5")
    });
    long.batch_execute("COMMIT").expect("a commit");
    migration.settle();
    let (first, second) = sums("big__first");
    assert_eq!(first, second);
    migration.finish();
}

#[test]
fn what_happens_behind_the_triggers_is_noticed() {
    let pair = Pair::new();
    let migration = started(&pair);
    let check = |suffix: &str, what: &str| {
        migration.settle();
        assert_equal(&pair, suffix, what);
    };
    // Off for a while, whether a cycle has seen it or not.
    pair.first.sql("ALTER TABLE tag DISABLE TRIGGER crossover_capture_update");
    migration.until_status("names the trigger", |s| s.text("last_error").contains("tag.crossover_capture_update"));
    pair.first.sql("UPDATE tag SET label = 'unseen'; ALTER TABLE tag ENABLE ALWAYS TRIGGER crossover_capture_update");
    check("", "a trigger disabled for a while");
    // As pg_restore --disable-triggers does; this enables the fence, too, until the worker sees it.
    pair.first.sql("BEGIN; ALTER TABLE item DISABLE TRIGGER ALL; UPDATE item SET qty = 99; ALTER TABLE item ENABLE TRIGGER ALL; COMMIT");
    check("", "all triggers disabled for a while");
    pair.first.sql("UPDATE item SET qty = 98 WHERE id = 7; BEGIN; SET LOCAL session_replication_role = replica; UPDATE item SET qty = 97 WHERE id = 8; COMMIT");
    check("", "all triggers enabled");
    pair.second.sql("ALTER TABLE v2.item ENABLE TRIGGER ALL");
    migration.settle();
    let up = "SELECT count(*) FROM pg_trigger WHERE tgname = 'crossover_fence' AND tgenabled = 'A'";
    until("the fence is enabled ALWAYS again", SOON, || pair.second.text(up).as_deref() == Some("3"));
    pair.first.sql("BEGIN; ALTER TABLE account DISABLE TRIGGER crossover_capture_delete; DELETE FROM account WHERE id < 5; ALTER TABLE account ENABLE ALWAYS TRIGGER crossover_capture_delete; COMMIT");
    check("", "triggers disabled in one transaction");
    pair.first.sql("DROP TRIGGER crossover_capture_insert ON tag; INSERT INTO tag VALUES (5000, NULL, 'unseen')");
    check("", "a trigger dropped");
    let there = "SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'crossover_capture%' AND tgenabled = 'A'";
    assert_eq!(pair.first.text(there).as_deref(), Some("12"));
    pair.first.sql("INSERT INTO tag VALUES (5001, NULL, 'seen again')");
    check("", "a trigger made again");
    // A rewrite fires no trigger. On first, the rules' views keep it from happening to what is mapped.
    let error = pair
        .first
        .connect()
        .batch_execute("ALTER TABLE account ALTER total TYPE bigint USING total + 1")
        .expect_err("a view depends on it");
    assert!(explain(&error).starts_with("0A000"), "{}", explain(&error));
    pair.first.sql("VACUUM FULL account");
    migration.walk(&["both", "second"]);
    pair.second.sql("ALTER TABLE v2.account ALTER tenths TYPE bigint USING tenths + 50");
    check("__first", "rows rewritten by ALTER TABLE");
    assert_eq!(
        pair.first.text("SELECT count(*) FROM account__first WHERE total % 10 = 5").as_deref(),
        pair.first.text("SELECT count(*) FROM account__first").as_deref()
    );
    migration.walk(&["both", "first"]);
    // A table that is dropped and made anew is not taken for one that was emptied.
    migration.set_state("both");
    pair.second
        .sql("CREATE TABLE v2.copy (LIKE v2.tag INCLUDING ALL); DROP TABLE v2.tag; ALTER TABLE v2.copy RENAME TO tag");
    migration.until_status("names the table", |s| s.text("last_error").contains("made anew: v2.tag"));
    assert_ne!(pair.first.text("SELECT count(*) FROM tag__first").as_deref(), Some("0"));
}

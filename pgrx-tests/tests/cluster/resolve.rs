//! `migration_resolve`: an operator's decision stands on both stores, nothing that stood before is forgotten.

use std::time::Duration;

use pgrx_tests::cluster::explain;
use pgrx_tests::wait::{SOON, until};
use pgrx_tests::{Migration, Pair};
use serde_json::{Value, json};

/// Wares with a price in another unit on the second side, and a column that has no place there.
fn started(pair: &Pair) -> Migration<'_> {
    pair.first.sql(
        "CREATE TABLE ware (id integer PRIMARY KEY, name text, cents bigint, memo text);
         INSERT INTO ware SELECT n, 'w' || n, 100 * n, 'memo ' || n FROM generate_series(1, 9) AS n",
    );
    pair.second_store(
        "wares",
        "CREATE TABLE ware (no integer PRIMARY KEY, title text, price numeric(12,2) CHECK (price < 1000))",
    );
    let mapping = json!({"tables": [{"first": "public.ware", "second": "wares.ware", "second_view": "public.ware2",
        "forward": {"no": "id", "title": "upper(name)", "price": "cents / 100.0"},
        "backward": {"name": "lower(title)", "cents": "round(price * 100)::bigint"}}]});
    let migration = Migration::start(pair, "wares", &mapping);
    migration.until_state("first");
    migration
}

fn resolve(pair: &Pair, conflict: &Value, keep: &str) -> Result<Option<Value>, postgres::Error> {
    let id = conflict["id"].as_i64().expect("an id");
    let row = pair.first.connect().query_one("SELECT migration_resolve($1, $2)", &[&id, &keep])?;
    Ok(row.get(0))
}

/// The row on both stores: `id|name|cents|memo` and `no|title|price`.
fn row(pair: &Pair, id: i32) -> (String, String) {
    let first =
        pair.first.text(&format!("SELECT concat_ws('|', id, name, cents, memo) FROM ware__first WHERE id = {id}"));
    let second = pair.second.text(&format!("SELECT concat_ws('|', no, title, price) FROM wares.ware WHERE no = {id}"));
    (first.unwrap_or_default(), second.unwrap_or_default())
}

/// Changes one row on both stores at a time; the last entry of the conflicts.
fn conflict(pair: &Pair, migration: &Migration, first: &str, second: &str) -> Value {
    migration.call("pause");
    pair.first.sql(first);
    pair.second.sql(second);
    migration.call("resume");
    migration.settle();
    migration.conflicts().pop().expect("a conflict")
}

#[test]
fn the_other_image_stands_in_every_state() {
    let pair = Pair::new();
    let migration = started(&pair);
    migration.set_state("both");
    let first = |id: i32| format!("UPDATE ware SET name = 'first {id}', memo = 'seen' WHERE id = {id}");
    let second = |id: i32| format!("UPDATE wares.ware SET title = 'SECOND {id}' WHERE no = {id}");
    let latest = conflict(&pair, &migration, &first(1), &second(1));
    assert_eq!(row(&pair, 1), ("1|second 1|100|seen".into(), "1|SECOND 1|1.00".into()));
    let image = resolve(&pair, &latest, "first").unwrap_or_else(|e| panic!("{}", explain(&e))).expect("a row");
    assert_eq!(image["name"], "first 1");
    assert_eq!(row(&pair, 1), ("1|first 1|100|seen".into(), "1|FIRST 1|1.00".into()));
    // And back again: one may change one's mind.
    let image = resolve(&pair, &latest, "second").unwrap_or_else(|e| panic!("{}", explain(&e))).expect("a row");
    assert_eq!(image["title"], "SECOND 1");
    assert_eq!(row(&pair, 1), ("1|second 1|100|seen".into(), "1|SECOND 1|1.00".into()));

    // Deleted there, changed here: the deletion is an image, too.
    let gone = conflict(&pair, &migration, &first(2), "DELETE FROM wares.ware WHERE no = 2");
    assert_eq!(row(&pair, 2), (String::new(), String::new()));
    resolve(&pair, &gone, "first").unwrap_or_else(|e| panic!("{}", explain(&e)));
    assert_eq!(row(&pair, 2), ("2|first 2|200|seen".into(), "2|FIRST 2|2.00".into()));
    assert!(resolve(&pair, &gone, "second").unwrap_or_else(|e| panic!("{}", explain(&e))).is_none());
    assert_eq!(row(&pair, 2), (String::new(), String::new()));

    // What was written since is overwritten, and kept.
    let stale = conflict(&pair, &migration, &first(3), &second(3));
    pair.first.sql("UPDATE ware SET name = 'newer' WHERE id = 3");
    migration.settle();
    resolve(&pair, &stale, "first").unwrap_or_else(|e| panic!("{}", explain(&e)));
    let replaced = migration.conflicts().pop().expect("an entry");
    assert_eq!(replaced["kind"], "replaced");
    assert!(replaced["first_image"].to_string().contains("newer"), "{replaced}");

    let (a, b) =
        (conflict(&pair, &migration, &first(4), &second(4)), conflict(&pair, &migration, &first(5), &second(5)));
    // In `second` only the second store is written, in `first` only the first.
    migration.set_state("second");
    resolve(&pair, &a, "first").unwrap_or_else(|e| panic!("{}", explain(&e)));
    assert_eq!(row(&pair, 4), ("4|first 4|400|seen".into(), "4|FIRST 4|4.00".into()));
    migration.walk(&["both", "first"]);
    resolve(&pair, &b, "first").unwrap_or_else(|e| panic!("{}", explain(&e)));
    assert_eq!(row(&pair, 5), ("5|first 5|500|seen".into(), "5|FIRST 5|5.00".into()));
    resolve(&pair, &b, "second").unwrap_or_else(|e| panic!("{}", explain(&e)));
    assert_eq!(row(&pair, 5), ("5|second 5|500|seen".into(), "5|SECOND 5|5.00".into()));
    let open = migration.conflicts().into_iter().filter(|c| c["resolved_at"].is_null()).count();
    assert_eq!(open, 0, "{:?}", migration.conflicts());
    migration.cancel();
}

#[test]
fn a_parked_row_is_tried_again_or_given_up() {
    let pair = Pair::new();
    let migration = started(&pair);
    migration.set_state("both");
    pair.first.sql("UPDATE ware SET cents = 500000 WHERE id IN (1, 2)");
    let parked = || -> Vec<Value> {
        migration.conflicts().into_iter().filter(|c| c["kind"] == "parked" && c["resolved_at"].is_null()).collect()
    };
    until("both rows are parked", SOON, || parked().len() == 2);
    let entries = parked();
    assert_eq!(entries[0]["refused_by"], "second");
    let error = resolve(&pair, &entries[0], "first").expect_err("the constraint is there");
    assert!(explain(&error).starts_with("55000") && explain(&error).contains("check"), "{}", explain(&error));
    // Given up: the second store's row stands.
    resolve(&pair, &entries[1], "second").unwrap_or_else(|e| panic!("{}", explain(&e)));
    assert_eq!(row(&pair, 2), ("2|w2|200|memo 2".into(), "2|W2|2.00".into()));
    assert_eq!(parked().len(), 1);
    let kept = migration.conflicts().pop().expect("what stood before");
    assert!(kept["kind"] == "replaced" && kept["first_image"].to_string().contains("500000"), "{kept}");
    // Mended: it goes through.
    pair.second.sql("ALTER TABLE wares.ware DROP CONSTRAINT ware_price_check");
    let image = resolve(&pair, &entries[0], "first").unwrap_or_else(|e| panic!("{}", explain(&e))).expect("a row");
    assert_eq!(image["cents"], 500_000);
    assert_eq!(row(&pair, 1), ("1|w1|500000|memo 1".into(), "1|W1|5000.00".into()));
    assert!(parked().is_empty());
    migration.walk(&["second"]);
    migration.finish();
}

#[test]
fn wrong_calls_are_told_so_and_change_nothing() {
    let pair = Pair::new();
    let migration = started(&pair);
    migration.set_state("both");
    let entry = conflict(
        &pair,
        &migration,
        "UPDATE ware SET name = 'first' WHERE id = 1",
        "UPDATE wares.ware SET title = 'SECOND' WHERE no = 1",
    );
    let before = row(&pair, 1);
    let fails = |entry: &Value, keep: &str, sqlstate: &str| {
        let error = resolve(&pair, entry, keep).expect_err("a wrong call");
        assert!(explain(&error).starts_with(sqlstate) && explain(&error).contains("hint"), "{}", explain(&error));
    };
    fails(&json!({"id": 999}), "first", "42704");
    fails(&entry, "third", "22023");
    migration.call("pause");
    fails(&entry, "first", "55000");
    migration.call("resume");
    // A constraint of the store itself is in the way of the image.
    pair.first.sql("ALTER TABLE ware__first ADD CHECK (name <> 'first') NOT VALID");
    let error = resolve(&pair, &entry, "first").expect_err("a constraint");
    assert!(explain(&error).starts_with("23514"), "{}", explain(&error));
    pair.first.sql("CREATE ROLE stranger; GRANT EXECUTE ON FUNCTION migration_resolve(bigint, text) TO stranger");
    let mut stranger = pair.first.connect();
    stranger.batch_execute("SET ROLE stranger").expect("a role");
    let error =
        stranger.query("SELECT migration_resolve($1, 'first')", &[&entry["id"].as_i64()]).expect_err("not the owner");
    assert!(explain(&error).starts_with("42501"), "{}", explain(&error));
    assert_eq!(row(&pair, 1), before);
    assert_eq!(migration.conflicts().len(), 1);
    migration.walk(&["first"]);
    migration.cancel();
    fails(&entry, "first", "55000");
    let error = migration.try_set_state("both", Duration::from_secs(60)).expect_err("it has ended");
    assert!(explain(&error).contains("cannot go from cancelled to both"), "{}", explain(&error));
    migration.cancel();
}

//! pg_upgrade of either server, in the middle of a migration: it goes on where it was.

use pgrx_tests::{Migration, Pair, market};

/// Writes arrive, and the stores are equal, after each upgrade. `suffix` is what the first tables' names end in.
fn check(pair: &Pair, suffix: &str, round: i32) {
    let migration = Migration::named(pair, "shop");
    pair.first.sql(&format!("UPDATE customer SET cents = {round} WHERE id = {round}"));
    pair.first.sql(&format!("INSERT INTO customer (name, cents) VALUES ('of round {round}', {round})"));
    migration.settle();
    market::assert_equal(pair, suffix);
    assert_eq!(market::cents_in_second(pair, round), i64::from(round));
    assert_eq!(migration.conflicts(), Vec::<serde_json::Value>::new());
}

/// In `both`, see the operating guide.
#[test]
fn a_migration_goes_on_after_pg_upgrade_of_either_server() {
    let pair = Pair::new();
    market::create(&pair, 1000);
    let migration = Migration::start(&pair, "shop", &market::mapping());
    migration.wait();
    let server = || pair.first.text("SELECT server_id FROM crossover.migration");
    let before = server();
    pair.first.upgrade();
    check(&pair, "", 1);
    assert_ne!(server(), before, "pg_upgrade has kept the oid of the foreign server: this test shows nothing");
    pair.second.upgrade();
    check(&pair, "", 2);
    migration.walk(&["both", "second"]);
    pair.second.upgrade();
    check(&pair, "__first", 3);
    pair.first.upgrade();
    check(&pair, "__first", 4);
    migration.walk(&["both"]);
    check(&pair, "__first", 5);
    migration.walk(&["second"]);
    migration.finish();
    // The clients' isolation on the second server is a matter of the server's oid, too.
    let before = server();
    pair.first.upgrade();
    migration.until_status("knows its server", |_| server() != before);
    pair.first.sql("UPDATE customer SET cents = 7 WHERE id = 7");
    assert_eq!(market::cents_in_second(&pair, 7), 7);
}

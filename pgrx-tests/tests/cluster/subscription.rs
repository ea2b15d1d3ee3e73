//! Tables that a subscription fills: a third server publishes, and what the apply worker writes is captured.

use pgrx_tests::cluster::{Cluster, explain};
use pgrx_tests::schema::traces;
use pgrx_tests::wait::{LONG, SOON, until};
use pgrx_tests::{Migration, Pair, market};

const TABLES: &str =
    "CREATE TABLE customer (id integer PRIMARY KEY, name text NOT NULL, cents bigint NOT NULL DEFAULT 0);
    CREATE TABLE purchase (id bigint PRIMARY KEY, customer_id integer NOT NULL, cents bigint NOT NULL DEFAULT 0);
    INSERT INTO customer SELECT i, 'from the publisher ' || i, i FROM generate_series(1, 500) AS i;
    INSERT INTO purchase SELECT i, i % 100, i FROM generate_series(1, 500) AS i;
    CREATE PUBLICATION shop FOR TABLE customer, purchase";

fn publisher() -> Cluster {
    let publisher = Cluster::start_new("publisher", &["wal_level = logical"]);
    publisher.sql(TABLES);
    publisher
}

fn subscribe(pair: &Pair, publisher: &Cluster) {
    pair.first.sql(&format!("CREATE SUBSCRIPTION shop CONNECTION '{}' PUBLICATION shop", publisher.url()));
}

/// Waits until what the publisher has is in the first store, then until it is in the second.
fn arrives(pair: &Pair, publisher: &Cluster, migration: &Migration, suffix: &str) {
    let sums = |cluster: &Cluster, suffix: &str| {
        cluster.text(&format!(
            "SELECT concat((SELECT md5(string_agg(concat_ws('|', id, name, cents), ';' ORDER BY id)) FROM customer{suffix}), \
             (SELECT md5(string_agg(concat_ws('|', id, customer_id, cents), ';' ORDER BY id)) FROM purchase{suffix}))"
        ))
    };
    let expected = sums(publisher, "");
    until("the subscription has brought everything", LONG, || sums(&pair.first, suffix) == expected);
    migration.settle();
    market::assert_equal(pair, suffix);
}

fn write(publisher: &Cluster) {
    publisher.sql(
        "INSERT INTO customer SELECT i, 'later', i FROM generate_series((SELECT coalesce(max(id), 0) FROM customer) + 1, (SELECT coalesce(max(id), 0) FROM customer) + 300) AS i;
         UPDATE customer SET cents = cents + 1 WHERE id % 3 = 0;
         UPDATE customer SET id = -id WHERE id % 50 = 7;
         DELETE FROM customer WHERE id % 11 = 0;
         BEGIN; DELETE FROM purchase WHERE id % 5 = 0; SAVEPOINT s; DELETE FROM purchase; ROLLBACK TO s; UPDATE purchase SET cents = -cents WHERE id % 7 = 0; COMMIT",
    );
}

#[test]
fn what_a_subscription_brings_is_captured() {
    let pair = Pair::new();
    let publisher = publisher();
    market::create(&pair, 0);
    subscribe(&pair, &publisher);
    let migration = market::started(&pair);
    arrives(&pair, &publisher, &migration, "");
    write(&publisher);
    arrives(&pair, &publisher, &migration, "");
    publisher.sql("TRUNCATE purchase; INSERT INTO purchase VALUES (1, 1, 1)");
    arrives(&pair, &publisher, &migration, "");
    assert_eq!(pair.second.text("SELECT count(*) FROM market.sale").as_deref(), Some("1"));
    // From the takeover on, its name belongs to a view, into which no subscription writes.
    pair.first.sql("ALTER SUBSCRIPTION shop DISABLE");
    migration.set_state("both");
    pair.first.sql("UPDATE customer SET cents = 5 WHERE id = 1; UPDATE client SET balance = 7 WHERE client_no = 2");
    migration.settle();
    market::assert_equal(&pair, "__first");
    migration.set_state("first");
    migration.cancel();
    pair.first.sql("ALTER SUBSCRIPTION shop ENABLE");
    publisher.sql("UPDATE customer SET cents = 77 WHERE id = 4");
    until("the subscription goes on", SOON, || {
        pair.first.text("SELECT cents FROM customer WHERE id = 4").as_deref() == Some("77")
    });
    pair.first.sql("DROP SUBSCRIPTION shop");
}

#[test]
fn a_subscription_that_comes_later_is_noticed() {
    let pair = Pair::new();
    let publisher = publisher();
    market::create(&pair, 0);
    let migration = market::started(&pair);
    pair.first.sql("INSERT INTO customer (id, name) VALUES (9001, 'before')");
    migration.settle();
    subscribe(&pair, &publisher);
    publisher.sql("INSERT INTO customer VALUES (9001, 'before')");
    pair.first.sql("DELETE FROM customer WHERE id = 9001");
    arrives(&pair, &publisher, &migration, "");
    for _ in 0..3 {
        write(&publisher);
        arrives(&pair, &publisher, &migration, "");
    }
    let by_row = "SELECT count(*) FROM pg_trigger WHERE tgname = 'crossover_capture_row' AND tgenabled = 'A'";
    assert_eq!(pair.first.text(by_row).as_deref(), Some("2"));
    // What is written here is captured as before.
    pair.first.sql("INSERT INTO purchase SELECT i, 1, 1 FROM generate_series(100001, 101000) AS i; UPDATE purchase SET cents = 2 WHERE id > 100500; TRUNCATE customer");
    migration.settle();
    market::assert_equal(&pair, "");
    assert_eq!(pair.second.text("SELECT count(*) FROM market.client").as_deref(), Some("0"));
    pair.first.sql("DROP SUBSCRIPTION shop");
    pair.first.sql("INSERT INTO customer (id, name) VALUES (1, 'after')");
    migration.settle();
    market::assert_equal(&pair, "");
    migration.walk(&["both", "second", "both", "first"]);
    migration.cancel();
    assert_eq!(traces(&pair.first), Vec::<String>::new());
    assert_eq!(traces(&pair.second), Vec::<String>::new());
}

#[test]
fn the_second_store_is_fenced_against_a_subscription() {
    let pair = Pair::new();
    let publisher = Cluster::start_new("publisher", &["wal_level = logical"]);
    publisher.sql(
        "CREATE SCHEMA market; CREATE TABLE market.client (client_no integer PRIMARY KEY, full_name varchar(200), balance numeric(20,2));
         CREATE PUBLICATION shop FOR TABLE market.client",
    );
    market::create(&pair, 10);
    pair.second.sql(&format!(
        "CREATE SUBSCRIPTION shop CONNECTION '{}' PUBLICATION shop WITH (copy_data = false, disable_on_error = true)",
        publisher.url()
    ));
    let migration = market::started(&pair);
    publisher.sql("INSERT INTO market.client VALUES (5000, 'not yet', 1)");
    until("the apply worker has met the fence", SOON, || {
        pair.second.text("SELECT subenabled FROM pg_subscription").as_deref() == Some("f")
    });
    market::assert_equal(&pair, "");
    migration.set_state("both");
    pair.second.sql("ALTER SUBSCRIPTION shop ENABLE");
    until("the row arrives on the second store", SOON, || {
        pair.second.text("SELECT count(*) FROM market.client WHERE client_no = 5000").as_deref() == Some("1")
    });
    migration.settle();
    market::assert_equal(&pair, "__first");
    assert_eq!(pair.first.text("SELECT name FROM customer WHERE id = 5000").as_deref(), Some("not yet"));
    pair.second.sql("DROP SUBSCRIPTION shop");
    migration.walk(&["second", "both", "first"]);
    migration.cancel();
    let error = pair.first.connect().batch_execute("SELECT * FROM client").expect_err("gone");
    assert!(explain(&error).starts_with("42P01"));
}

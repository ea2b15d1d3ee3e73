//! Several migrations at a time, in one database and in several, under writers: each has its own worker, and none waits for another, least of
//! all for one whose second server cannot be reached.

use std::thread;
use std::time::Duration;

use pgrx_tests::cluster::explain;
use pgrx_tests::journal::{self, Journal};
use pgrx_tests::schema::{traces, workers};
use pgrx_tests::wait::{SOON, until};
use pgrx_tests::{Load, Migration, Pair, Wire, Witness, market};
use serde_json::{Value, json};

/// Clients that add to the cents of rows of `table`, each to its own.
fn adders(pair: &Pair, database: &str, table: &'static str) -> Load {
    Load::start(&pair.first.config(database), 2, move |client, round, connection| {
        let id = (client as i64) * 50 + (round % 50) as i64 + 1;
        connection.execute(&format!("UPDATE {table} SET cents = cents + 1 WHERE id = $1::bigint"), &[&id]).map(drop)
    })
}

/// One of the market's tables by itself.
fn only(table: usize) -> Value {
    json!({"tables": [market::mapping()["tables"][table]]})
}

/// The sums of both stores of the market in a database, which are the same at rest.
fn sums(pair: &Pair, database: &str, suffix: &str) -> [String; 2] {
    let sum = |cluster: &pgrx_tests::Cluster, query: &str| -> String {
        let row = cluster.connect_to(database).query_one(query, &[]);
        row.unwrap_or_else(|e| panic!("{}", explain(&e))).get(0)
    };
    let first = format!(
        "SELECT concat_ws(' ', (SELECT sum(cents * id) FROM customer{suffix}), (SELECT sum(cents * id) FROM purchase{suffix}))"
    );
    let second = "SELECT concat_ws(' ', (SELECT round(sum(balance * 100 * client_no)) FROM market.client), \
                                        (SELECT round(sum(amount * 100 * sale_no)) FROM market.sale))";
    [sum(&pair.first, &first), sum(&pair.second, second)]
}

fn assert_equal(pair: &Pair, database: &str, suffix: &str) {
    let [first, second] = sums(pair, database, suffix);
    assert_eq!(first, second, "the stores of database {database} differ");
}

#[test]
fn each_goes_its_own_way() {
    let pair = Pair::new();
    market::create(&pair, 2000);
    journal::create(&pair, 2000);
    pair.copy_database("branch");
    let witness = Witness::of(&pair.first);
    // The journal's second server is the same one, but over a wire of its own.
    let wire = Wire::to(pair.second.port());
    pair.first.sql(&format!(
        "DROP SCHEMA ledger CASCADE; CREATE SCHEMA ledger;
         CREATE SERVER far_server FOREIGN DATA WRAPPER postgres_fdw OPTIONS (host '127.0.0.1', port '{}', dbname 'app');
         CREATE USER MAPPING FOR PUBLIC SERVER far_server OPTIONS (user 'postgres');
         IMPORT FOREIGN SCHEMA ledger FROM SERVER far_server INTO ledger",
        wire.port()
    ));
    let customers = Migration::named(&pair, "customers");
    let purchases = Migration::named(&pair, "purchases");
    let branch = Migration::named_in(&pair, "branch", "market");
    let far = Migration::named(&pair, "journal");
    let all = [
        (&customers, only(0)),
        (&purchases, only(1)),
        (&branch, market::mapping()),
        (&far, json!({"tables": [journal::mapping()]})),
    ];
    let loads = [
        adders(&pair, "app", "customer"),
        adders(&pair, "app", "purchase"),
        adders(&pair, "branch", "customer"),
        adders(&pair, "branch", "purchase"),
    ];
    let entries = Journal::start(&pair, 1, "new");

    // All at once.
    thread::scope(|threads| {
        for (migration, mapping) in &all {
            threads.spawn(move || {
                let options = json!({"chunk_rows": 200});
                migration
                    .try_start(mapping, &options)
                    .unwrap_or_else(|e| panic!("{}: {}", migration.name(), explain(&e)));
                migration.until_state("first");
            });
        }
    });
    let near = [&customers, &purchases, &branch];
    let pids: Vec<i32> = all.iter().map(|(m, _)| m.worker()).collect();
    assert!((1..pids.len()).all(|n| !pids[..n].contains(&pids[n])), "{pids:?}");

    // One loses its second server; the others go to `second` and back, all at the same time.
    wire.cut();
    far.until_status("misses its second server", |status| !status.text("last_error").is_empty());
    thread::scope(|threads| {
        for migration in near {
            threads.spawn(|| migration.walk(&["both", "second", "both", "first"]));
        }
    });
    for migration in near {
        let status = migration.until_status("is content", |status| status.text("hint").is_empty());
        // The last error stays there. What a busy machine may have caused is none of the other migration's.
        assert!(!status.text("last_error").contains("server"), "{}", status.0);
    }
    assert_eq!(far.state(), "first");
    let error = far.try_set_state("both", Duration::from_secs(2)).expect_err("its second server is away");
    println!("{}", explain(&error));
    // One ends; its siblings, whose objects on the second server are in the same schema, go on.
    purchases.cancel();
    let client = "SELECT sum(balance)::text FROM market.client";
    let before = pair.second.text(client);
    until("its sibling replicates", SOON, || pair.second.text(client) != before);
    wire.mend();
    far.settle();
    for load in &loads {
        load.until_done(20);
        load.take().assert_clean("with several migrations");
    }
    for load in loads {
        load.stop().assert_clean("at the end");
    }
    let acked = entries.stop();
    [&customers, &branch, &far].into_iter().for_each(Migration::settle);
    journal::check(&pair, "journal", &acked);
    assert_equal(&pair, "branch", "__first");
    let sum = "SELECT sum(cents * id)::text FROM customer__first";
    let arrived = "SELECT round(sum(balance * 100 * client_no))::text FROM market.client";
    assert_eq!(pair.first.text(sum), pair.second.text(arrived));

    // The ends, at the same time.
    thread::scope(|threads| {
        threads.spawn(|| customers.cancel());
        threads.spawn(|| far.cancel());
        threads.spawn(|| {
            branch.walk(&["both", "second"]);
            branch.finish();
        });
    });
    assert_eq!(traces(&pair.first), [""; 0]);
    assert_eq!(traces(&pair.second), [""; 0]);
    until("no worker is left", SOON, || workers(&pair).is_empty());
    witness.testify();
}

/// What they share on the second server is made by the first that comes and dropped by the last that goes, whoever that is.
#[test]
fn they_come_and_go_at_the_same_time() {
    let pair = Pair::new();
    market::create(&pair, 20);
    let before = (pair.first.pg_dump_schema("app"), pair.second.pg_dump_schema("app"));
    thread::scope(|threads| {
        for (table, name) in ["customers", "purchases"].into_iter().enumerate() {
            let pair = &pair;
            threads.spawn(move || {
                let migration = Migration::named(pair, name);
                for _ in 0..6 {
                    let started = migration.try_start(&only(table), &json!({"target": "truncate"}));
                    started.unwrap_or_else(|e| panic!("{name}: {}", explain(&e)));
                    migration.cancel();
                }
            });
        }
    });
    until("no worker is left", SOON, || workers(&pair).is_empty());
    assert_eq!(before.0, pair.first.pg_dump_schema("app"));
    assert_eq!(before.1, pair.second.pg_dump_schema("app"));
}

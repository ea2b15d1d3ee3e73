//! `DROP DATABASE` with migrations in the database: refused at once, and it says why; `WITH (FORCE)` goes through at once, and nothing of the
//! migrations comes back or fills the log.

use std::fs;
use std::time::Duration;

use pgrx_tests::cluster::{Cluster, explain};
use pgrx_tests::wait::{SOON, Stopwatch, for_a, until};
use pgrx_tests::{Migration, Pair, Witness, market};
use postgres::Client;
use serde_json::json;

/// Well below the five seconds for which PostgreSQL would wait.
const AT_ONCE: Duration = Duration::from_secs(1);

/// How much longer a forced drop may take for the migrations in the database.
const MORE: Duration = Duration::from_secs(1);

fn log_lines(cluster: &Cluster, what: &str) -> Vec<String> {
    let text = fs::read(cluster.log_path()).map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default();
    text.lines().filter(|line| line.contains(what)).map(str::to_owned).collect()
}

#[test]
fn without_force_it_is_refused() {
    let pair = Pair::new();
    market::create(&pair, 10);
    let witness = Witness::of(&pair.first);
    let migration = market::started(&pair);
    let worker = migration.worker();
    let mut admin = pair.first.connect_to("postgres");
    for (statement, hint) in [
        ("DROP DATABASE app", "WITH (FORCE)"),
        ("DROP DATABASE IF EXISTS app", "WITH (FORCE)"),
        ("ALTER DATABASE app RENAME TO shop", "Finish or cancel"),
        ("ALTER DATABASE app SET TABLESPACE pg_default", "Finish or cancel"),
        ("CREATE DATABASE shop TEMPLATE app", "Finish or cancel"),
    ] {
        let began = Stopwatch::start();
        let error = admin.batch_execute(statement).expect_err("migrations run in it");
        let took = began.elapsed();
        let text = explain(&error);
        assert_eq!(error.code().map(|c| c.code()), Some("55006"), "{statement}: {text}");
        assert!(
            text.contains("migration \"market\"") && text.contains(&format!("pid {worker}")),
            "{statement}: {text}"
        );
        assert!(text.contains(hint), "{statement}: {text}");
        assert!(took < AT_ONCE, "{statement}: refused after {took:?}");
        println!("{statement}: {took:?}\n{text}");
    }
    // What runs in a database is not everybody's to know.
    pair.first.sql("CREATE ROLE mallory");
    admin.batch_execute("SET ROLE mallory").expect("a role");
    let error = admin.batch_execute("DROP DATABASE app").expect_err("not the owner");
    assert_eq!(error.code().map(|c| c.code()), Some("42501"), "{}", explain(&error));
    admin.batch_execute("RESET ROLE").expect("a role");
    // The database is in use as before, and the migration undisturbed.
    pair.first.sql("UPDATE customer SET cents = 5 WHERE id = 3");
    migration.settle();
    assert_eq!(market::cents_in_second(&pair, 3), 5);
    assert_eq!(migration.worker(), worker);
    migration.cancel();
    witness.testify();
    // Nothing is in the way of a database whose migrations have ended.
    until("the database can be renamed", SOON, || admin.batch_execute("ALTER DATABASE app RENAME TO shop").is_ok());
    admin.batch_execute("ALTER DATABASE shop RENAME TO app").expect("its name again");
}

#[test]
fn an_error_of_another_statement_is_as_it_was() {
    let pair = Pair::new();
    let mut client = pair.first.connect();
    let error = client.batch_execute("CREATE TABLE a (b nosuchtype)").expect_err("no such type");
    let position = error.as_db_error().and_then(|e| e.position().cloned());
    assert_eq!(position, Some(postgres::error::ErrorPosition::Original(19)), "{}", explain(&error));
    client.batch_execute("CREATE TABLE a (b int CONSTRAINT once UNIQUE); INSERT INTO a VALUES (1)").expect("a table");
    let error = client.batch_execute("DO $$ BEGIN INSERT INTO a VALUES (1); END $$").expect_err("there already");
    let error = error.as_db_error().expect("an error of the server");
    assert_eq!((error.constraint(), error.table(), error.schema()), (Some("once"), Some("a"), Some("public")));
    let error = client.batch_execute("CREATE DATABASE x TEMPLATE = nosuch").expect_err("no such database");
    assert_eq!(error.code().map(|c| c.code()), Some("3D000"), "{}", explain(&error));
    client.batch_execute("CREATE DATABASE x TEMPLATE = DEFAULT; ").expect("a database");
    client.batch_execute("ALTER TABLE a RENAME TO b").expect("a name");
    client.batch_execute("DROP DATABASE IF EXISTS nosuch").expect("a notice");
    client.batch_execute("DROP DATABASE x").expect("nothing in the way");
}

/// How long `DROP DATABASE ... WITH (FORCE)` takes.
fn drop_by_force(admin: &mut Client, database: &str) -> Duration {
    let began = Stopwatch::start();
    let drop = format!("DROP DATABASE {database} WITH (FORCE)");
    admin.batch_execute(&drop).unwrap_or_else(|e| panic!("{}", explain(&e)));
    began.elapsed()
}

#[test]
fn with_force_it_goes_through() {
    let pair = Pair::new();
    market::create(&pair, 20_000);
    let databases = ["copying", "replicating", "waiting", "deaf"];
    databases.iter().for_each(|database| pair.copy_database(database));
    let witness = Witness::of(&pair.second);
    let mut admin = pair.first.connect_to("postgres");
    // To compare with: a drop writes all that is dirty first.
    let empty = |n: usize| format!("empty_{n}");
    for n in 0..databases.len() {
        admin.batch_execute(&format!("CREATE DATABASE {}", empty(n))).expect("a database");
    }
    let workers =
        "SELECT count(*) FROM pg_stat_activity WHERE backend_type LIKE 'pg_crossover%' AND datname IS NOT NULL";
    for (n, database) in databases.into_iter().enumerate() {
        let migration = Migration::named_in(&pair, database, database);
        let options = if database == "copying" { json!({"copy_rate": 1000}) } else { json!({}) };
        migration.try_start(&market::mapping(), &options).unwrap_or_else(|e| panic!("{}", explain(&e)));
        match database {
            "copying" => {
                let progress = "SELECT sum(rows_copied)::int8 FROM migration_progress";
                let mut client = pair.first.connect_to(database);
                until("the copy is under way", SOON, || {
                    client.query_one(progress, &[]).is_ok_and(|row| row.get::<_, Option<i64>>(0) > Some(0))
                });
            }
            _ => migration.until_state("first"),
        }
        let in_the_way = (database == "waiting").then(|| {
            let mut writer = pair.first.connect_to(database);
            writer.batch_execute("BEGIN; UPDATE customer SET cents = 1 WHERE id = 1").expect("a writer");
            let mut operator = pair.first.connect_to(database);
            let thread = std::thread::spawn(move || {
                operator.batch_execute("SELECT migration_set_state('waiting', 'both', '1 min')")
            });
            migration.until_status("is switching", |status| status.phase() == "switching");
            (writer, thread)
        });
        if database == "deaf" {
            pair.second.pause();
            pair.first
                .connect_to(database)
                .batch_execute("UPDATE customer SET cents = 1 WHERE id = 1")
                .expect("an update");
        }
        let ended = || log_lines(&pair.first, "its database has been dropped").len();
        let ended_before = ended();
        let without = drop_by_force(&mut admin, &empty(n));
        let took = drop_by_force(&mut admin, database);
        println!("{database}: dropped after {took:?}, and one in which nothing runs after {without:?}");
        assert!(took < without + MORE, "{database}: dropped after {took:?}, not {without:?}");
        if let Some((writer, thread)) = in_the_way {
            drop(writer);
            thread.join().expect("a thread").expect_err("its database is gone");
        }
        // The postmaster starts the migration's worker once more, who finds that there is nothing left to do.
        until("the worker ends for good", SOON, || ended() > ended_before);
        until("no worker runs", SOON, || admin.query_one(workers, &[]).expect("a count").get::<_, i64>(0) == 0);
        pair.second.resume();
    }
    // Longer than the postmaster waits before it starts a worker again: the first time it may have been about to.
    let ended = [(), ()].map(|()| {
        for_a(Duration::from_secs(3));
        log_lines(&pair.first, "its database has been dropped").len()
    });
    assert_eq!(ended[0], ended[1], "workers come back to databases that have been dropped");
    let wrong = log_lines(&pair.first, "does not exist");
    assert!(wrong.is_empty(), "the log: {wrong:#?}");
    // All of them have given their slots back, and the launcher is at its post.
    let launchers = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'pg_crossover launcher'";
    assert_eq!(admin.query_one(launchers, &[]).expect("a count").get::<_, i64>(0), 1);
    witness.testify();
}

//! Everything that waits can be interrupted: shutdown, pg_terminate_backend and a caller's cancel end it within a second, also while the
//! second server is there and does not answer, or packets vanish. What was interrupted goes on by itself, or was never asked for.

use std::thread;
use std::time::Duration;

use pgrx_tests::cluster::explain;
use pgrx_tests::journal::{self, Journal};
use pgrx_tests::logs::{Line, Moment};
use pgrx_tests::migration::{is_disconnect, set_state};
use pgrx_tests::schema::traces;
use pgrx_tests::wait::{SOON, Stopwatch, for_a, until, until_some};
use pgrx_tests::{Migration, Pair, Wire, market, process};
use postgres::Client;
use serde_json::{Value, json};

const A_SECOND: Duration = Duration::from_secs(1);

/// Asserts that something took less than a second: `took` by a server's clock, `watch` from before that began.
fn within_a_second(what: &str, took: Duration, watch: &Stopwatch) {
    let stalled = watch.stalled();
    println!("{what}: {took:?}, of which the machine stood still for {stalled:?} at most");
    assert!(took.saturating_sub(stalled) < A_SECOND, "{what}: it took {took:?}");
}

/// What is wrong with the way to the second server.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Network {
    Well,
    /// SIGSTOP: it accepts connections, and is silent.
    Silent,
    /// Nothing arrives, connections neither accepted nor refused.
    Cut,
}

/// Longer than any worker sleeps that does not wait for the second server.
const STANDSTILL: Duration = Duration::from_millis(400);

/// Entries to copy.
const OLD: i64 = 12_000;

const NETWORKS: [Network; 3] = [Network::Well, Network::Silent, Network::Cut];

struct Scene {
    pair: Pair,
    wire: Wire,
}

impl Scene {
    fn new() -> Self {
        let pair = Pair::new();
        market::create(&pair, 10);
        journal::create(&pair, OLD as u32);
        let wire = Wire::between(&pair);
        Self { pair, wire }
    }

    fn start(&self) -> Migration<'_> {
        let mut mapping = market::mapping();
        mapping["tables"].as_array_mut().expect("tables").push(journal::mapping());
        // Slow enough to be met on the way by every disturbance.
        let options = json!({"chunk_rows": 100, "copy_workers": 2, "copy_rate": 200});
        Migration::start_with(&self.pair, "market", &mapping, &options)
    }

    /// Rows copied so far.
    fn copied(&self) -> i64 {
        let query = "SELECT sum(rows_copied)::text FROM migration_progress";
        self.pair.first.text(query).and_then(|text| text.parse().ok()).unwrap_or(0)
    }

    fn until_copied_more(&self) {
        let before = self.copied();
        until("the copy goes on", SOON, || self.copied() > before);
    }

    /// From here on the copy is as fast as it can be.
    fn hurry(&self) {
        self.pair.first.sql("UPDATE crossover.migration SET options = '{}'");
    }

    /// Breaks the network, and waits until a process of ours hangs on it.
    fn disturb(&self, network: Network) {
        match network {
            Network::Well => return,
            Network::Silent => self.pair.second.pause(),
            Network::Cut => self.wire.cut(),
        }
        let kind = if self.copied() < OLD { "copy" } else { "migration" };
        until("a worker hangs on the network", SOON, || {
            let naps = |pids: &[i32]| pids.iter().map(|pid| process::naps(*pid)).collect::<Vec<_>>();
            let pids = self.pids(kind);
            let before = naps(&pids);
            for_a(STANDSTILL);
            !pids.is_empty() && naps(&pids) == before && before.iter().all(Option::is_some)
        });
    }

    fn mend(&self) {
        self.pair.second.resume();
        self.wire.mend();
    }

    /// Fast shutdown, as `pg_ctl stop -m fast` asks for it, and a start.
    fn restart(&self, when: &str) {
        // What a shutdown writes is not what it waits for.
        self.pair.first.sql("CHECKPOINT");
        let postmaster = self.pair.first.postmaster().expect("a server");
        let watch = Stopwatch::start();
        assert!(process::signal(postmaster, libc::SIGINT));
        until("the server is down", SOON, || !process::is_alive(postmaster));
        let lines = self.pair.first.log_lines();
        let last = |what: &str| lines.iter().rfind(|line| line.text.ends_with(what)).map(|line| line.at);
        let asked = last("received fast shutdown request").expect("the request in the log");
        let down = last("LOG:  database system is shut down").expect("the end in the log");
        within_a_second(&format!("{when}: down"), down.since(asked), &watch);
        self.mend();
        self.pair.first.start();
    }

    fn pids(&self, kind: &str) -> Vec<i32> {
        let query = format!("SELECT pid FROM pg_stat_activity WHERE backend_type = 'pg_crossover {kind}'");
        self.pair.first.list(&query).iter().filter_map(|pid| pid.parse().ok()).collect()
    }

    /// `pg_terminate_backend` of all workers of a kind, who are gone within a second; they, or others, come back.
    fn terminate(&self, kind: &str, when: &str) {
        let pids = until_some(&format!("a worker of kind {kind} runs"), SOON, || {
            Some(self.pids(kind)).filter(|p| !p.is_empty())
        });
        let query = "SELECT extract(epoch FROM statement_timestamp())::float8, pg_terminate_backend(pid) FROM unnest($1::int[]) AS pid";
        let mut client = self.pair.first.connect();
        let watch = Stopwatch::start();
        let rows = client.query(query, &[&pids]).expect("a signal");
        let asked = Moment::of_epoch(rows[0].get(0));
        // Those that were there to be told.
        for (pid, _) in pids.iter().zip(&rows).filter(|(_, row)| row.get(1)) {
            let end = format!("(PID {pid}) exited with exit code 1");
            let gone = logged(&self.pair, &format!("{kind} has gone"), |line| line.text.ends_with(&end));
            within_a_second(&format!("{when}: {kind} gone"), gone.since(asked), &watch);
        }
    }
}

/// Waits until the first server has logged a line, and returns when it did: the last such.
fn logged(pair: &Pair, what: &str, is_it: impl Fn(&Line) -> bool) -> Moment {
    until_some(what, SOON, || pair.first.log_lines().into_iter().rfind(&is_it)).at
}

/// An `UPDATE` in the way of a switch.
fn in_the_way(pair: &Pair) -> Client {
    let mut writer = pair.first.connect();
    writer.batch_execute("BEGIN; UPDATE customer SET cents = cents + 1 WHERE id = 1").expect("an update");
    writer
}

fn check(scene: &Scene, migration: &Migration, journal: Journal, suffix: &str) {
    let acked = journal.stop();
    migration.settle();
    market::assert_equal(&scene.pair, suffix);
    journal::check(&scene.pair, &format!("journal{suffix}"), &acked);
}

#[test]
fn fast_shutdown() {
    let scene = Scene::new();
    let migration = scene.start();
    let journal = Journal::start(&scene.pair, 1, "new");
    for network in NETWORKS {
        scene.until_copied_more();
        scene.disturb(network);
        assert_eq!(migration.state(), "copying");
        scene.restart(&format!("copying, {network:?}"));
    }
    scene.hurry();
    migration.until_state("first");
    for network in NETWORKS {
        journal.until_acked(10);
        scene.disturb(network);
        scene.restart(&format!("replicating, {network:?}"));
        migration.wait();
    }
    // While a switch waits: for a lock, for a silent server.
    for network in NETWORKS {
        let writer = in_the_way(&scene.pair);
        let mut operator = scene.pair.first.connect();
        let from = migration.state();
        let to = if from == "both" { "second" } else { "both" };
        thread::scope(|threads| {
            let waiting = threads.spawn(|| set_state(&mut operator, "market", to, Duration::from_secs(60)));
            migration.until_status("is switching", |status| status.phase() == "switching");
            scene.disturb(network);
            scene.restart(&format!("switching to {to}, {network:?}"));
            waiting.join().expect("the operator").expect_err("its server was shut down");
        });
        drop(writer);
        // It was begun, and nobody has said that it should not be: it is made.
        migration.until_state(to);
        journal.until_acked(10);
        migration.set_state("both");
    }
    check(&scene, &migration, journal, "__first");
    migration.walk(&["first"]);
    migration.cancel();
    assert_eq!(traces(&scene.pair.first), [""; 0]);
}

#[test]
fn workers_that_are_terminated() {
    let scene = Scene::new();
    let migration = scene.start();
    let journal = Journal::start(&scene.pair, 1, "new");
    for network in NETWORKS {
        scene.disturb(network);
        scene.terminate("copy", &format!("copying, {network:?}"));
        scene.terminate("migration", &format!("copying, {network:?}"));
        scene.mend();
        scene.until_copied_more();
    }
    scene.hurry();
    migration.until_state("first");
    for network in NETWORKS {
        scene.disturb(network);
        scene.terminate("migration", &format!("replicating, {network:?}"));
        scene.mend();
        journal.until_acked(10);
        migration.wait();
    }
    // In a switch: the successor goes on with it, as its caller still waits.
    migration.set_state("both");
    for network in NETWORKS {
        let mut writer = in_the_way(&scene.pair);
        let mut operator = scene.pair.first.connect();
        thread::scope(|threads| {
            let waiting = threads.spawn(|| set_state(&mut operator, "market", "second", Duration::from_secs(60)));
            migration.until_status("is switching", |status| status.phase() == "switching");
            scene.disturb(network);
            scene.terminate("migration", &format!("switching, {network:?}"));
            scene.mend();
            writer.batch_execute("COMMIT").expect("a commit");
            let state =
                waiting.join().expect("the operator").unwrap_or_else(|e| panic!("{network:?}: {}", explain(&e)));
            assert_eq!(state, "second");
        });
        migration.set_state("both");
    }
    migration.set_state("first");
    // The launcher, and a scout that it has sent out; both are stopped by a lock here.
    let mut lock = scene.pair.first.connect();
    lock.batch_execute("BEGIN; LOCK TABLE crossover.migration IN ACCESS EXCLUSIVE MODE").expect("a lock");
    scene.terminate("launcher", "idle");
    scene.terminate("scout", "waiting for a lock");
    // A clerk, and its caller.
    let waiting = thread::spawn({
        let mut operator = scene.pair.first.connect();
        move || {
            operator.batch_execute("SELECT migration_start('other', '{\"tables\": [{\"first\": \"public.customer\", \"second\": \"market.client\"}]}')")
        }
    });
    scene.terminate("clerk", "waiting for a lock");
    let error = waiting.join().expect("the operator").expect_err("its clerk is gone");
    println!("{}", explain(&error));
    assert_eq!(error.code().map(|c| c.code()), Some("57014"), "{}", explain(&error));
    lock.batch_execute("ROLLBACK").expect("a rollback");
    assert!(migration.try_status().is_some());
    until("the launcher is back", SOON, || !scene.pids("launcher").is_empty());
    check(&scene, &migration, journal, "__first");
    migration.cancel();
    assert_eq!(traces(&scene.pair.first), [""; 0]);
}

/// How a caller goes away.
#[derive(Debug, Clone, Copy)]
enum Gone {
    Cancelled,
    TimedOut,
    Terminated,
}

/// The statement_timeout: time enough to begin to wait, and to be seen at it.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Has `call` waiting, makes it go away, and sees that it does within a second, that nothing of it is left, and that nobody goes on with it.
fn interrupted(pair: &Pair, call: &str, waits: &dyn Fn() -> bool) {
    for gone in [Gone::Cancelled, Gone::TimedOut, Gone::Terminated] {
        interrupted_by(gone, pair, call, waits);
    }
}

fn interrupted_by(gone: Gone, pair: &Pair, call: &str, waits: &dyn Fn() -> bool) {
    let what = format!("{call}, {gone:?}");
    let mut operator = pair.first.connect();
    let pid: i32 = operator.query_one("SELECT pg_backend_pid()", &[]).expect("a pid").get(0);
    let limit = if matches!(gone, Gone::TimedOut) { TIMEOUT } else { Duration::from_secs(100) };
    operator.batch_execute(&format!("SET statement_timeout = {}", limit.as_millis())).expect("a setting");
    let statement = format!("SELECT {call}");
    let waiting = thread::spawn(move || operator.batch_execute(&statement));
    until(&format!("{what}: it waits"), SOON, waits);
    let mut other = pair.first.connect();
    let mut moment = |query: &str| Moment::of_epoch(other.query_one(query, &[&pid]).expect("a moment").get(0));
    let mut watch = Stopwatch::start();
    let asked = match gone {
        Gone::TimedOut => {
            let began = moment("SELECT extract(epoch FROM query_start)::float8 FROM pg_stat_activity WHERE pid = $1");
            let now = moment("SELECT extract(epoch FROM clock_timestamp())::float8, $1::int");
            // What happens before it is due does not count.
            for_a(TIMEOUT.saturating_sub(now.since(began)));
            watch = Stopwatch::start();
            began + TIMEOUT
        }
        Gone::Cancelled => moment("SELECT extract(epoch FROM statement_timestamp())::float8, pg_cancel_backend($1)"),
        Gone::Terminated => {
            moment("SELECT extract(epoch FROM statement_timestamp())::float8, pg_terminate_backend($1)")
        }
    };
    let error = waiting.join().expect("the operator").expect_err("it was interrupted");
    match gone {
        Gone::Terminated => assert!(is_disconnect(&error), "{what}: {}", explain(&error)),
        _ => assert_eq!(error.code().map(|c| c.code()), Some("57014"), "{what}: {}", explain(&error)),
    }
    let is_end = |line: &Line| line.pid == pid && (line.text.contains("ERROR:  ") || line.text.contains("FATAL:  "));
    let ended = logged(pair, "its end is in the log", is_end);
    within_a_second(&what, ended.since(asked), &watch);
    // Given up, although what it waited for is in the way still.
    let open = "SELECT count(*) FROM crossover.request WHERE status IN ('queued', 'running')";
    until(&format!("{what}: the request is given up"), SOON, || pair.first.text(open).as_deref() == Some("0"));
    let locks = "SELECT count(*) FROM pg_locks l JOIN pg_stat_activity a USING (pid)
                     WHERE l.relation = ANY (ARRAY(SELECT oid FROM pg_class WHERE relname ~ '^(customer|purchase|client|sale)')) AND a.backend_type LIKE 'pg_crossover%'";
    until(&format!("{what}: no lock is held"), SOON, || pair.first.text(locks).as_deref() == Some("0"));
    let marks = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 28772";
    assert_eq!(pair.first.text(marks).as_deref(), Some("0"), "{what}");
}

#[test]
fn callers_that_are_interrupted() {
    let pair = Pair::new();
    market::create(&pair, 10);
    let before = (pair.first.pg_dump_schema("app"), pair.second.pg_dump_schema("app"));
    let status = "SELECT concat_ws(' ', state, phase) FROM migration_status";

    // A start that waits for a writer.
    let writer = in_the_way(&pair);
    let mapping: Value = market::mapping();
    let start = format!("migration_start('market', '{mapping}', timeout => '60 s')");
    // It locks the first tables after it has put its triggers on the second ones.
    let installed = "SELECT count(*) FROM pg_trigger WHERE tgname = 'crossover_capture_delete'";
    interrupted(&pair, &start, &|| pair.second.text(installed).as_deref() == Some("2"));
    until("nothing is left of it", SOON, || pair.first.text(status).is_none());
    assert_eq!(before.0, pair.first.pg_dump_schema("app"));
    assert_eq!(before.1, pair.second.pg_dump_schema("app"));
    drop(writer);

    let running = "SELECT count(*) FROM crossover.request WHERE status IN ('queued', 'running')";
    let is_running = || pair.first.text(running).as_deref() == Some("1");
    // One that waits for a silent server.
    pair.second.pause();
    interrupted_by(Gone::Cancelled, &pair, &start, &is_running);
    pair.second.resume();
    until("nothing is left of it", SOON, || pair.first.text(status).is_none());
    assert_eq!(before.1, pair.second.pg_dump_schema("app"));
    let migration = market::started(&pair);
    pair.second.pause();
    interrupted(&pair, "migration_wait('market')", &is_running);
    pair.second.resume();
    migration.wait();

    // A switch, a cancel and a finish that wait for a client.
    let writer = in_the_way(&pair);
    // Not for long: the second store may be opened, and is closed again.
    let is = |what: &str| {
        until(&format!("it is {what} again"), SOON, || pair.first.text(status).as_deref() == Some(what));
    };
    let switching = || pair.first.text(status).is_some_and(|s| s.ends_with("switching"));
    interrupted(&pair, "migration_set_state('market', 'both', '60 s')", &switching);
    is("first replicating");
    interrupted(&pair, "migration_cancel('market', '60 s')", &is_running);
    is("first replicating");
    drop(writer);
    migration.walk(&["both"]);
    let writer = in_the_way(&pair);
    interrupted(&pair, "migration_set_state('market', 'second', '60 s')", &switching);
    is("both replicating");
    drop(writer);
    migration.walk(&["second"]);
    let mut reader = pair.first.connect();
    reader.batch_execute("BEGIN; SELECT count(*) FROM customer").expect("a reader");
    interrupted(&pair, "migration_set_state('market', 'both', '60 s')", &switching);
    is("second replicating");
    interrupted(&pair, "migration_finish('market', '60 s')", &is_running);
    is("second replicating");
    drop(reader);
    // The way is open: nobody has gone on with any of it, and each can be asked for again.
    pair.first.sql("UPDATE customer SET cents = cents + 7 WHERE id = 2");
    migration.settle();
    market::assert_equal(&pair, "__first");
    assert_eq!(migration.state(), "second");
    migration.walk(&["both", "first"]);
    migration.cancel();
    pair.second.sql("TRUNCATE market.client, market.sale");
    assert_eq!(before.0, pair.first.pg_dump_schema("app"));
    assert_eq!(before.1, pair.second.pg_dump_schema("app"));
}

//! The writers of the crash tests: they go on whatever is killed, and know in the end what was acknowledged to them.
//!
//! Two tables: tokens, a few hot rows that all clients change, and a journal that one client appends to.

use std::collections::{BTreeSet, HashSet};
use std::time::Instant;

use postgres::Config;
use serde_json::{Value, json};

use crate::cluster::{Cluster, explain};
use crate::journal::{self, Journal};
use crate::migration::{Migration, is_disconnect};
use crate::pair::Pair;
use crate::process;
use crate::schema::{assert_same_dump, traces, workers};
use crate::template::DATABASE;
use crate::tokens::{self, Door, Tokens};
use crate::wait::{LONG, SOON, until, until_some};

/// The `application_name` of the writers, which does not make them look like processes of the extension.
pub const WRITER: &str = "a writer";

/// What the migration of both tables is called.
pub const NAME: &str = "rail";

/// How a writer connects.
pub fn writer(cluster: &Cluster) -> Config {
    let mut config = cluster.config(DATABASE);
    config.application_name(WRITER);
    config
}

/// A pair with both tables, `old` entries in the journal. Processes may be killed.
pub fn pair(old: u32) -> Pair {
    // Logs rotate whenever they can: that is to be seen under kills, too.
    let pair = Pair::with(&["crossover.log_retention = 0", "crossover.log_rotation = 1"], &[]);
    pair.expect_crashes();
    tokens::create(&pair);
    journal::create(&pair, old);
    pair
}

/// The mapping of both tables.
pub fn mapping() -> Value {
    json!({"tables": [tokens::mapping(), journal::mapping()]})
}

/// Clients on the first shape, and more doors where they are open; they come back after a crash.
pub struct Writers {
    tokens: Tokens,
    journal: Journal,
}

impl Writers {
    /// Clients of a migration in `copying` or `first`.
    pub fn start(pair: &Pair) -> Self {
        Self::start_at(pair, &[])
    }

    /// Clients of a migration in `state`: through every door that is open there.
    pub fn start_in(pair: &Pair, state: &str) -> Self {
        match state {
            "both" | "second" => Self::start_at(pair, &[Door::second(pair), Door::second_view(pair)]),
            _ => Self::start(pair),
        }
    }

    fn start_at(pair: &Pair, more: &[Door]) -> Self {
        let mut doors = vec![Door::first(pair), Door::first(pair)];
        doors.extend_from_slice(more);
        let seed = tokens::seed();
        Self { tokens: Tokens::start(&doors, seed), journal: Journal::start(pair, 1, &format!("writer {seed}")) }
    }

    /// Waits until each of them has got something done since now.
    pub fn until_busy(&self) {
        self.tokens.until_each_acked();
        self.journal.until_acked(3);
    }

    /// Ends them, and compares both stores with each other and with what they were told. `suffix` as in [`tokens::Stopped::check`].
    pub fn check(self, pair: &Pair, migration: &Migration, suffix: &str) {
        let (ledger, acked) = (self.tokens.stop(), self.journal.stop());
        migration.settle();
        let summary = ledger.check(pair, migration, &format!("trail{suffix}"));
        println!("{:?}", summary.unwrap_or_else(|wrong| panic!("{wrong}")));
        // Where capture was renewed in `both`, all rows of a table count as changed, and a conflict may keep an entry as an image.
        let conflicts = migration.conflicts();
        let images: BTreeSet<&str> = conflicts.iter().filter_map(|c| c["first_image"]["token"].as_str()).collect();
        let (kept, acked): (HashSet<_>, HashSet<_>) = acked.into_iter().partition(|t| images.contains(t.as_str()));
        println!("{} entries, and {} as images of conflicts", acked.len(), kept.len());
        journal::check(pair, &format!("journal{suffix}"), &acked);
    }

    /// Ends them, and compares the first store, after a migration was cancelled, with what they were told.
    pub fn check_first(self, pair: &Pair) {
        let (ledger, acked) = (self.tokens.stop(), self.journal.stop());
        ledger.check_alone(&pair.first, "SELECT id, trail FROM trail");
        journal::check_alone(&pair.first, "SELECT token FROM journal", &acked);
    }

    /// Ends them, and compares the second store, after a migration was finished, with what they were told.
    pub fn check_second(self, pair: &Pair) {
        let (ledger, acked) = (self.tokens.stop(), self.journal.stop());
        ledger.check_alone(&pair.second, "SELECT ident, substr(path, 2, length(path) - 2) FROM rail.path");
        journal::check_alone(&pair.second, "SELECT lower(left(word, 1)) || substr(word, 2) FROM ledger.entry", &acked);
    }
}

/// Waits until an entry that was appended before this call is on the other store: replication goes on by itself.
pub fn until_replicated(pair: &Pair, state: &str) {
    let (first, second) = match state {
        "second" => ("journal__first", true),
        _ => ("journal", false),
    };
    let last = |cluster: &Cluster, table: &str, column: &str| {
        let row = cluster.try_connect().ok()?.query_one(&format!("SELECT max({column}) FROM {table}"), &[]).ok()?;
        row.get::<_, Option<i64>>(0)
    };
    let on_first = || last(&pair.first, first, "id");
    let on_second = || last(&pair.second, "ledger.entry", "entry_no");
    let mut goal = None;
    until("replication goes on", LONG, || {
        let (source, destination) = if second { (on_second(), on_first()) } else { (on_first(), on_second()) };
        goal = goal.or(source);
        goal.is_some() && destination >= goal
    });
}

/// The processes of a server, to tell afterwards that it has thrown all of them out: a crash restart, or a new postmaster.
pub struct Generation(BTreeSet<i32>);

impl Generation {
    /// Those that there are now; none of a server that is down.
    pub fn of(cluster: &Cluster) -> Self {
        let children = cluster.postmaster().map(process::children).unwrap_or_default();
        Self(children.into_iter().map(|(pid, _)| pid).collect())
    }

    /// Waits until all of them are gone and the server accepts connections.
    pub fn until_replaced(&self, cluster: &Cluster) {
        self.until_gone(cluster);
        cluster.connect_soon();
    }

    /// Waits until all of them are gone.
    pub fn until_gone(&self, cluster: &Cluster) {
        until(&format!("the processes of cluster {} are gone", cluster.name()), SOON, || {
            !self.0.iter().any(|pid| process::is_alive(*pid))
        });
    }
}

/// The process of a server that is held by a fault, or a signal.
pub fn held_process(cluster: &Cluster) -> Option<i32> {
    process::children(cluster.postmaster()?).into_iter().find(|(_, state)| *state == 'T').map(|(pid, _)| pid)
}

/// What a call may end in when its process, the server or the step that it waits for is struck.
pub fn any_end(what: &str, result: Result<String, postgres::Error>) {
    match result {
        Ok(state) => println!("{what}: {state}"),
        Err(e) if is_disconnect(&e) => println!("{what}: disconnected"),
        Err(e) => println!("{what}: {}", explain(&e).lines().next().unwrap_or_default()),
    }
}

/// The state once nothing is half done, `none` where there is no migration.
pub fn at_rest(pair: &Pair, what: &str) -> String {
    until_some(&format!("{what}: the migration is at rest"), LONG, || {
        let query = "SELECT state::text, phase FROM migration_status WHERE name = $1";
        let row = pair.first.try_connect().ok()?.query_opt(query, &[&NAME]).ok()?;
        let (state, phase) = row.map_or_else(|| ("none".into(), String::new()), |r| (r.get(0), r.get::<_, String>(1)));
        let busy = ["switching", "fence pending", "setting up", "finishing", "cancelling"];
        (!busy.contains(&phase.as_str())).then_some(state)
    })
}

/// Makes a pair on which a migration was finished what it was before one was started, but for the entries.
pub fn begin_anew(pair: &Pair) {
    pair.second.sql("TRUNCATE rail.path, ledger.entry");
    pair.first.sql(
        "DROP VIEW path, entry, trail, journal, trail__write, journal__write;
         DROP FUNCTION trail__write, journal__write;
         ALTER TABLE trail__first RENAME TO trail; ALTER TABLE journal__first RENAME TO journal",
    );
}

/// What a migration must not have changed.
pub struct Untouched(String, String);

impl Untouched {
    /// The schemas of both servers before it.
    pub fn of(pair: &Pair) -> Self {
        Self(pair.first.pg_dump_schema("app"), pair.second.pg_dump_schema("app"))
    }

    /// Asserts that nothing is left of a cancelled migration: no object, worker, connection or lock.
    pub fn assert_again(&self, pair: &Pair) {
        self.assert_no_trace(pair);
        assert_no_lock_left(pair);
    }

    /// As [`Untouched::assert_again`], while clients work.
    pub fn assert_no_trace(&self, pair: &Pair) {
        self.assert_second_no_trace(pair);
        assert_same_dump("the first database", &self.0, &pair.first.pg_dump_schema("app"));
    }

    /// Asserts that nothing is left on the second server, nor any worker, connection or lock on either.
    pub fn assert_second_again(&self, pair: &Pair) {
        self.assert_second_no_trace(pair);
        assert_no_lock_left(pair);
    }

    fn assert_second_no_trace(&self, pair: &Pair) {
        assert_same_dump("the second database", &self.1, &pair.second.pg_dump_schema("app"));
        assert_eq!((traces(&pair.first), traces(&pair.second)), (vec![], vec![]));
        until("all workers and their connections are gone", SOON, || workers(pair).is_empty());
    }
}

/// Waits until nobody holds a lock on a table, nor a transaction: clients have stopped, and what a killed one had is rolled back.
pub fn assert_no_lock_left(pair: &Pair) {
    let query = "SELECT concat_ws(' ', l.pid, l.mode, l.relation::regclass, a.backend_type, a.application_name, a.state, a.query)
          FROM pg_locks l LEFT JOIN pg_stat_activity a USING (pid)
         WHERE l.pid IS DISTINCT FROM pg_backend_pid() AND a.backend_type IS DISTINCT FROM 'autovacuum worker'
           AND (l.locktype = 'transactionid' OR l.locktype = 'relation' AND l.database <> 0 AND EXISTS (
                 SELECT FROM pg_class c WHERE c.oid = l.relation AND c.relnamespace >= 16384 OR c.relnamespace = 'public'::regnamespace))";
    for cluster in [&pair.first, &pair.second] {
        let late = Instant::now() + SOON;
        until("no lock is held", SOON * 2, || {
            let held = cluster.list(query);
            assert!(held.is_empty() || Instant::now() < late, "locks on cluster {}: {held:#?}", cluster.name());
            held.is_empty()
        });
    }
}

//! The memory of every worker is the same whatever the number of rows, and a few large values do not multiply it.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pgrx_tests::cluster::explain;
use pgrx_tests::wait::{LONG, for_a};
use pgrx_tests::{Migration, Pair, Witness, process};
use serde_json::json;

/// Kilobytes at most, by kind of worker.
type Peaks = BTreeMap<String, u64>;

/// Ends the watch, also when what it watches fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Of everything that this extension runs on the first server while `work` runs.
fn peaks_of(pair: &Pair, work: impl FnOnce()) -> Peaks {
    let (peaks, stop) = (Mutex::new(Peaks::new()), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let postmaster = pair.first.postmaster().expect("a running server");
                for (pid, state) in process::children(postmaster) {
                    if let (Some(title), Some(peak)) = (process::title(pid), process::peak_memory(pid))
                        && let Some(kind) = ["migration", "copy", "launcher"]
                            .iter()
                            .find(|k| title.contains(&format!("pg_crossover {k}")))
                    {
                        let mut peaks = peaks.lock().expect("no panic");
                        let most = peaks.entry((*kind).to_string()).or_default();
                        *most = peak.max(*most);
                        // A copy worker that was held until it was looked at.
                        if state == 'T' {
                            process::signal(pid, process::CONTINUE);
                        }
                    }
                }
                for_a(Duration::from_millis(5));
            }
        });
        let _stop = Stop(&stop);
        work();
    });
    peaks.into_inner().expect("no panic")
}

/// What a process touches of the shared buffers counts as its memory, too: few, so that all of them are touched in any case.
const SETTINGS: [&str; 4] = ["shared_buffers = '4MB'", "autovacuum = off", "max_wal_size = '4GB'", "fsync = off"];

/// A table of `rows` rows, and a migration of it.
struct Heap<'a> {
    pair: &'a Pair,
    rows: u32,
    migration: Migration<'a>,
}

impl<'a> Heap<'a> {
    fn start(pair: &'a Pair, rows: u32, body: &str) -> Self {
        pair.first.sql(&format!(
            "CREATE TABLE heap (id integer PRIMARY KEY, n integer NOT NULL, body text);
             INSERT INTO heap SELECT i, 0, {body} FROM generate_series(1, {rows}) AS i; ANALYZE heap"
        ));
        pair.second_store("pile", "CREATE TABLE heap (id integer PRIMARY KEY, n integer NOT NULL, body text)");
        let mapping = json!({"tables": [{"first": "public.heap", "second": "pile.heap", "second_view": "public.pile",
            "forward": {"n": "n + 1"}, "backward": {"n": "n - 1"}}]});
        // However short a copy worker lives, it is looked at when it has copied a chunk.
        pair.first.fault("copy:committed stop");
        let migration = Migration::start(pair, "heap", &mapping);
        migration.until_state("first");
        assert!(!pair.first.fault_is_armed(), "no copy worker was looked at");
        Self { pair, rows, migration }
    }

    /// Runs a statement on the first store, or `@` in the second one, and waits until it has been replicated.
    fn change(&self, what: &str, sql: &str) {
        let began = Instant::now();
        let (state, suffix) = match self.migration.state() {
            state if state == "first" => (state, ""),
            state => (state, "__first"),
        };
        match sql.strip_prefix('@') {
            Some(sql) => self.pair.second.sql(sql),
            None => self.pair.first.sql(sql),
        }
        self.migration.try_wait(LONG * 4).unwrap_or_else(|e| panic!("{what}: {}", explain(&e)));
        let sum = "SELECT count(*) || ' ' || coalesce(sum(hashint8(n::bigint * id + length(body))::bigint), 0)";
        let first = format!("{sum} FROM (SELECT id, n + 1 AS n, body FROM heap{suffix}) AS heap");
        assert_eq!(self.pair.first.text(&first), self.pair.second.text(&format!("{sum} FROM pile.heap")), "{what}");
        let peak = process::peak_memory(self.migration.worker());
        println!("{} rows, {state}, {what}: {:?}, {peak:?} kB so far", self.rows, began.elapsed());
    }
}

/// A whole life over `rows` rows: all of them are changed by one statement in `first`, and in the other states the rows that `some` says.
fn life(rows: u32, body: &str, some: &str, last: &str) -> Peaks {
    let pair = Pair::for_long(&SETTINGS, &SETTINGS);
    let witness = Witness::of(&pair.first);
    let peaks = peaks_of(&pair, || {
        let heap = Heap::start(&pair, rows, body);
        heap.change("all changed", "UPDATE heap SET n = 1");
        heap.change("a third deleted", "DELETE FROM heap WHERE id % 3 = 0");
        heap.migration.set_state("both");
        heap.change("some changed", &format!("UPDATE heap SET n = 2 WHERE {some}"));
        heap.change("some changed over there", &format!("@UPDATE pile.heap SET n = 3 WHERE {some}"));
        heap.migration.set_state("second");
        heap.change("some changed", &format!("@UPDATE pile.heap SET n = 4 WHERE {some}"));
        heap.change("some deleted", last);
        assert!(heap.migration.conflicts().is_empty());
        heap.migration.finish();
    });
    witness.testify();
    println!("{rows} rows of {body}: {peaks:?}");
    peaks
}

fn assert_about_equal(less: &Peaks, more: &Peaks, what: &str) {
    for (kind, less) in less {
        let more = more[kind];
        assert!(more * 10 <= less * 11, "{kind}: {less} kB, and {more} kB with {what}");
    }
}

#[test]
fn it_does_not_grow_with_the_number_of_rows() {
    // More than a cycle takes at once, in either case.
    let life = |rows: u32| {
        let some = format!("id <= {}", rows / 4);
        life(rows, "'body ' || i", &some, &format!("@DELETE FROM pile.heap WHERE {some}"))
    };
    assert_about_equal(&life(100_000), &life(2_000_000), "twenty times the rows");
}

#[test]
fn it_does_not_grow_with_the_number_of_large_rows() {
    // Four megabytes each, hardly compressible.
    let body = "(SELECT string_agg(md5(i || ' ' || j), '') FROM generate_series(1, 131072) AS j)";
    let life = |rows: u32| life(rows, body, "true", "@TRUNCATE pile.heap");
    assert_about_equal(&life(6), &life(60), "ten times the large rows");
}

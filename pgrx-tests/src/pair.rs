//! The two servers of a migration: the first has the extension, the second is stock PostgreSQL.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

use crate::cluster::{Cluster, explain};
use crate::installation::Installation;
use crate::template::DATABASE;

/// A test that takes longer hangs: the process ends, and with it the clusters.
const TOO_LONG: Duration = Duration::from_secs(420);

/// The same for one that moves millions of rows.
const MUCH_TOO_LONG: Duration = Duration::from_secs(1500);

/// Two clusters; `second_server` on the first leads to the second.
///
/// When a test that passed drops it, both logs are searched for what may never be there.
#[derive(Debug)]
pub struct Pair {
    /// Where the applications connect.
    pub first: Cluster,
    /// Where the tables are to go.
    pub second: Cluster,
    crashes_expected: AtomicBool,
    /// Dropped with the pair, which calls off the alarm.
    _alarm: Sender<()>,
}

impl Pair {
    /// Two clusters, the extension loaded and created on the first.
    pub fn new() -> Self {
        Self::with(&[], &[])
    }

    /// The same with further lines of configuration.
    pub fn with(first: &[&str], second: &[&str]) -> Self {
        Self::within(TOO_LONG, first, second)
    }

    /// As [`Pair::with`], for a test that may take long.
    pub fn for_long(first: &[&str], second: &[&str]) -> Self {
        Self::within(MUCH_TOO_LONG, first, second)
    }

    fn within(limit: Duration, first: &[&str], second: &[&str]) -> Self {
        assert!(
            Installation::get().has_extension(),
            "pg_crossover is not installed below {}: let make install the test build there",
            Installation::get().share().display()
        );
        let mut lines = vec!["shared_preload_libraries = 'pg_crossover'"];
        lines.extend(first);
        let pair = Self::bare(limit, &lines, second);
        pair.first.sql("CREATE EXTENSION pg_crossover");
        pair
    }

    /// Two clusters connected by postgres_fdw, without the extension: to test the harness itself.
    pub fn plain() -> Self {
        Self::bare(TOO_LONG, &[], &[])
    }

    fn bare(limit: Duration, first: &[&str], second: &[&str]) -> Self {
        let (alarm, called_off) = channel::<()>();
        let test = thread::current().name().unwrap_or("a test").to_owned();
        thread::spawn(move || {
            if called_off.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
                eprintln!("{test} has hung for {limit:?}");
                std::process::abort();
            }
        });
        let pair = Self {
            first: Cluster::start_new("first", first),
            second: Cluster::start_new("second", second),
            crashes_expected: AtomicBool::new(false),
            _alarm: alarm,
        };
        pair.first.sql(&format!(
            "CREATE EXTENSION postgres_fdw;
             CREATE SERVER second_server FOREIGN DATA WRAPPER postgres_fdw
                 OPTIONS (host '127.0.0.1', port '{}', dbname 'app');
             CREATE USER MAPPING FOR PUBLIC SERVER second_server OPTIONS (user 'postgres');",
            pair.second.port()
        ));
        pair
    }

    /// Runs `tables` on the second server, in a new schema, and imports them as foreign tables into a schema of the same name on
    /// the first: what a DBA does before a migration.
    pub fn second_store(&self, schema: &str, tables: &str) {
        let schema = quoted(schema);
        self.second.sql(&format!("CREATE SCHEMA {schema}; SET search_path = {schema}; {tables}"));
        self.first.sql(&format!(
            "CREATE SCHEMA {schema}; IMPORT FOREIGN SCHEMA {schema} FROM SERVER second_server INTO {schema};"
        ));
    }

    /// Makes a database of both servers, a copy of the tests' own, whose foreign server leads to its namesake. Nothing may run in those.
    pub fn copy_database(&self, name: &str) {
        for cluster in [&self.first, &self.second] {
            let create = format!("CREATE DATABASE {} TEMPLATE {DATABASE}", quoted(name));
            // The tests' last connection may not be gone yet; PostgreSQL waits for it.
            cluster.connect_to("postgres").batch_execute(&create).unwrap_or_else(|e| panic!("{}", explain(&e)));
        }
        let lead = format!("ALTER SERVER second_server OPTIONS (SET dbname '{name}')");
        self.first.connect_to(name).batch_execute(&lead).unwrap_or_else(|e| panic!("{}", explain(&e)));
    }

    /// From now on, killed processes are no finding.
    pub fn expect_crashes(&self) {
        self.crashes_expected.store(true, Ordering::Relaxed);
    }

    /// What both logs hold that they must not, and nothing when they are clean.
    pub fn findings(&self) -> String {
        let mut text = String::new();
        for cluster in [&self.first, &self.second] {
            let findings = cluster.findings(self.crashes_expected.load(Ordering::Relaxed));
            if !findings.is_empty() {
                let _ = writeln!(text, "in the log of cluster {}:\n{findings}", cluster.name());
            }
        }
        text
    }
}

impl Default for Pair {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        let findings = self.findings();
        if thread::panicking() {
            eprint!("{findings}");
        } else {
            assert!(findings.is_empty(), "{findings}");
        }
    }
}

/// An SQL identifier.
pub fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

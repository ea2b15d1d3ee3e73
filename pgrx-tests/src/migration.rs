//! A migration as an operator drives it: the functions of the extension, its status and its records.

use std::time::Duration;

use postgres::{Client, Error};
use serde_json::{Value, json};

use crate::cluster::explain;
use crate::pair::Pair;
use crate::template::DATABASE;
use crate::wait::{LONG, SOON, until, until_some};

/// A named migration on the first server of a pair. Each call has its own connection: any of them may be killed.
#[derive(Debug)]
pub struct Migration<'a> {
    pair: &'a Pair,
    database: String,
    name: String,
}

impl<'a> Migration<'a> {
    /// Starts a migration with default options.
    pub fn start(pair: &'a Pair, name: &str, mapping: &Value) -> Self {
        Self::start_with(pair, name, mapping, &json!({}))
    }

    /// Starts a migration.
    pub fn start_with(pair: &'a Pair, name: &str, mapping: &Value, options: &Value) -> Self {
        let migration = Self::named(pair, name);
        let state = migration.try_start(mapping, options).unwrap_or_else(|e| migration.fail("start", &e));
        assert_eq!(state, "copying", "the state after the start of {name}");
        migration
    }

    /// A handle, whether the migration exists or not.
    pub fn named(pair: &'a Pair, name: &str) -> Self {
        Self::named_in(pair, DATABASE, name)
    }

    /// A handle in another database.
    pub fn named_in(pair: &'a Pair, database: &str, name: &str) -> Self {
        Self { pair, database: database.to_owned(), name: name.to_owned() }
    }

    /// `migration_start`.
    pub fn try_start(&self, mapping: &Value, options: &Value) -> Result<String, Error> {
        let query = "SELECT migration_start($1, $2::jsonb, $3::jsonb)::text";
        Ok(self.try_connect()?.query_one(query, &[&self.name, mapping, options])?.get(0))
    }

    /// Waits until the copy is complete and all that was committed before the call has been replicated.
    pub fn wait(&self) {
        self.try_wait(LONG).unwrap_or_else(|e| self.fail("wait", &e));
    }

    /// `migration_wait`.
    pub fn try_wait(&self, timeout: Duration) -> Result<String, Error> {
        let query = "SELECT migration_wait($1, $2::text::interval)::text";
        let mut client = self.try_connect()?;
        // This timeout counts, whatever the statements of the tests have.
        client.batch_execute("SET statement_timeout = 0")?;
        Ok(client.query_one(query, &[&self.name, &interval(timeout)])?.get(0))
    }

    /// Moves to a state.
    pub fn set_state(&self, to: &str) {
        let state = self.try_set_state(to, SOON).unwrap_or_else(|e| self.fail(&format!("set_state {to}"), &e));
        assert_eq!(state, to, "the state after the switch");
        assert_eq!(self.state(), to, "the state that the status shows after the switch");
    }

    /// `migration_set_state`.
    pub fn try_set_state(&self, to: &str, timeout: Duration) -> Result<String, Error> {
        set_state(&mut self.try_connect()?, &self.name, to, timeout)
    }

    /// `migration_set_state` with `force`.
    pub fn force_state(&self, to: &str) {
        let query = "SELECT migration_set_state($1, $2::text::migration_state, force => true)::text";
        self.connect()
            .query_one(query, &[&self.name, &to])
            .unwrap_or_else(|e| self.fail(&format!("set_state {to}, forced"), &e));
    }

    /// Moves through several states, one after the other.
    pub fn walk(&self, states: &[&str]) {
        for state in states {
            self.set_state(state);
        }
    }

    /// Ends the migration in `finished`.
    pub fn finish(&self) {
        self.try_end("finish").unwrap_or_else(|e| self.fail("finish", &e));
        assert_eq!(self.state(), "finished");
    }

    /// Ends the migration in `cancelled`.
    pub fn cancel(&self) {
        self.try_end("cancel").unwrap_or_else(|e| self.fail("cancel", &e));
        assert_eq!(self.state(), "cancelled");
    }

    /// `migration_finish` or `migration_cancel`, as `verb` says.
    pub fn try_end(&self, verb: &str) -> Result<String, Error> {
        let query = format!("SELECT migration_{verb}($1)::text");
        Ok(self.try_connect()?.query_one(&query, &[&self.name])?.get(0))
    }

    /// `migration_pause` or `migration_resume`, as `verb` says.
    pub fn call(&self, verb: &str) {
        let query = format!("SELECT migration_{verb}($1)::text");
        self.connect().query_one(&query, &[&self.name]).unwrap_or_else(|e| self.fail(verb, &e));
    }

    /// The row of `migration_status`, if there is one and the server answers.
    pub fn try_status(&self) -> Option<Status> {
        let query = "SELECT to_jsonb(s) FROM migration_status AS s WHERE name = $1";
        let row = self.try_connect().ok()?.query_opt(query, &[&self.name]).ok()??;
        Some(Status(row.get(0)))
    }

    /// The row of `migration_status`.
    pub fn status(&self) -> Status {
        until_some(&format!("migration {} has a status", self.name), SOON, || self.try_status())
    }

    /// Its state.
    pub fn state(&self) -> String {
        self.status().state()
    }

    /// Waits for a state that it reaches by itself.
    pub fn until_state(&self, state: &str) {
        self.until_status(&format!("is {state}"), |status| status.state() == state);
    }

    /// Waits until its status fulfils a condition; a failure shows the last one.
    pub fn until_status(&self, what: &str, mut condition: impl FnMut(&Status) -> bool) -> Status {
        let deadline = std::time::Instant::now() + LONG;
        until_some(&format!("migration {} {what}", self.name), LONG + SOON, || {
            let status = self.try_status()?;
            let met = condition(&status);
            let late = std::time::Instant::now() > deadline;
            assert!(met || !late, "in vain: migration {} {what}; status: {}", self.name, status.0);
            met.then_some(status)
        })
    }

    /// Waits until all that is committed now, on either store, is on the other.
    pub fn settle(&self) {
        until(&format!("migration {} answers a wait", self.name), LONG, || match self.try_wait(LONG) {
            Ok(_) => true,
            Err(e) if is_disconnect(&e) => false,
            Err(e) => self.fail("wait", &e),
        });
    }

    /// The pid of its worker, as soon as it has one.
    pub fn worker(&self) -> i32 {
        until_some(&format!("migration {} has a worker", self.name), SOON, || self.try_status()?.worker())
    }

    /// Its rows of `migration_history`, oldest first.
    pub fn history(&self) -> Vec<Value> {
        self.rows("SELECT to_jsonb(h) FROM migration_history AS h WHERE name = $1 ORDER BY at")
    }

    /// Its rows of `migration_conflicts`.
    pub fn conflicts(&self) -> Vec<Value> {
        self.rows("SELECT to_jsonb(c) FROM migration_conflicts AS c WHERE name = $1 ORDER BY id")
    }

    /// The name that it was started with.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn rows(&self, query: &str) -> Vec<Value> {
        let rows = self.connect().query(query, &[&self.name]).unwrap_or_else(|e| self.fail("a view", &e));
        rows.iter().map(|row| row.get(0)).collect()
    }

    fn connect(&self) -> Client {
        until_some("the first server accepts connections", SOON, || self.try_connect().ok())
    }

    fn try_connect(&self) -> Result<Client, Error> {
        self.pair.first.try_connect_to(&self.database)
    }

    fn fail(&self, what: &str, error: &Error) -> ! {
        let status = self.try_status().map_or_else(|| "none".to_owned(), |s| s.0.to_string());
        panic!("migration {}, {what}: {}\nstatus: {status}", self.name, explain(error));
    }
}

/// `migration_set_state` on a connection of the caller's.
pub fn set_state(client: &mut Client, name: &str, to: &str, timeout: Duration) -> Result<String, Error> {
    let query = "SELECT migration_set_state($1, $2::text::migration_state, $3::text::interval)::text";
    Ok(client.query_one(query, &[&name, &to, &interval(timeout)])?.get(0))
}

/// A duration as PostgreSQL's interval.
fn interval(duration: Duration) -> String {
    format!("{} milliseconds", duration.as_millis())
}

/// How long a call that was given up says that it has tried.
///
/// # Panics
/// When it does not say so.
pub fn waited(error: &Error) -> Duration {
    let text = explain(error);
    let ms =
        text.split_once("within ").and_then(|(_, rest)| rest.split_once(" ms")).and_then(|(ms, _)| ms.parse().ok());
    Duration::from_millis(ms.unwrap_or_else(|| panic!("it does not say how long it has tried: {text}")))
}

/// Whether an error is the end of a connection, of which a client does not know what became of its last statement.
pub fn is_disconnect(error: &Error) -> bool {
    error.as_db_error().is_none_or(|db| {
        let code = db.code().code();
        code.starts_with("08") || code.starts_with("57P")
    })
}

/// A row of `migration_status`.
#[derive(Debug)]
pub struct Status(pub Value);

impl Status {
    /// A column of type text; empty when NULL.
    pub fn text(&self, column: &str) -> String {
        self.0[column].as_str().unwrap_or_default().to_owned()
    }

    /// The state.
    pub fn state(&self) -> String {
        self.text("state")
    }

    /// The phase.
    pub fn phase(&self) -> String {
        self.text("phase")
    }

    /// Changed rows that wait for replication.
    pub fn backlog_rows(&self) -> i64 {
        self.0["backlog_rows"].as_i64().unwrap_or(0)
    }

    /// The worker's pid while one runs.
    pub fn worker(&self) -> Option<i32> {
        self.0["worker_pid"].as_i64().and_then(|pid| i32::try_from(pid).ok())
    }
}

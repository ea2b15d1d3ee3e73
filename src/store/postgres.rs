//! The second store's session: a PostgreSQL server over a libpq connection of our own.
//!
//! It connects with the options of the foreign server and the owner's user mapping, as postgres_fdw would.

use std::time::{Duration, Instant};

use super::libpq::{Connection, Row, known_keywords};
use super::local::millis;
use super::{Each, Isolation, Session, parse};
use crate::error::{Error, Result, Side};
use crate::mapping::sql::{session_settings, set_statement};

/// How to reach the second server.
#[derive(Debug, Clone)]
pub struct Target {
    /// libpq's keywords and values.
    pub options: Vec<(String, String)>,
    pub must_use_password: bool,
}

impl Target {
    /// Keeps of the server's and the mapping's options those that are libpq's.
    pub fn new(options: Vec<(String, String)>, must_use_password: bool) -> Target {
        let known = known_keywords();
        let ours = ["client_encoding", "fallback_application_name", "replication"];
        let mut options: Vec<_> =
            options.into_iter().filter(|(k, _)| known.iter().any(|n| n == k) && !ours.contains(&k.as_str())).collect();
        options.push(("client_encoding".into(), "UTF8".into()));
        Target { options, must_use_password }
    }
}

pub struct RemoteSession {
    connection: Connection,
    target: Target,
    /// A second connection, to commit a counter while this one's transaction holds the switch's locks.
    flusher: Option<Box<Connection>>,
    /// What [`Session::become_replica`] sets, as far as the role may.
    replica: String,
    depth: usize,
    deadline: Option<Instant>,
    patience: Duration,
}

/// How long one answer of the second server may take where nobody says otherwise.
pub const PATIENCE: Duration = Duration::from_secs(60);

impl RemoteSession {
    pub fn connect(target: &Target, deadline: Option<Instant>) -> Result<RemoteSession> {
        let mut connection = open(target, deadline)?;
        let settings = connection.query(
            "SELECT string_agg(format('SET LOCAL %s = %L', name, value), '; ') \
             FROM (VALUES ('session_replication_role', 'replica'), ('deadlock_timeout', '30ms')) AS s(name, value) \
             WHERE CASE WHEN current_setting('server_version_num')::int >= 150000 THEN has_parameter_privilege(name, 'SET') \
                   ELSE current_setting('is_superuser') = 'on' END",
            &[],
        )?;
        let replica = settings.into_iter().next().and_then(|mut r| r.pop().flatten()).unwrap_or_default();
        Ok(RemoteSession {
            connection,
            target: target.clone(),
            flusher: None,
            replica,
            depth: 0,
            deadline: None,
            patience: PATIENCE,
        })
    }

    pub fn is_broken(&self) -> bool {
        self.connection.is_broken()
    }

    /// Bounds the wait for each single answer; a deadline bounds them all together. Returns what it was before.
    pub fn set_patience(&mut self, patience: Duration) -> Duration {
        std::mem::replace(&mut self.patience, patience)
    }

    fn answer_by(&self) -> Option<Instant> {
        let answer = Instant::now() + self.patience;
        Some(self.deadline.map_or(answer, |deadline| deadline.min(answer)))
    }

    /// The connection, its next answer bounded.
    pub fn armed(&mut self) -> &mut Connection {
        self.connection.set_deadline(self.answer_by());
        &mut self.connection
    }
}

fn open(target: &Target, deadline: Option<Instant>) -> Result<Connection> {
    let deadline = deadline.or_else(|| Some(Instant::now() + Duration::from_secs(10)));
    let mut connection = Connection::connect(&target.options, target.must_use_password, deadline)?;
    let sql: String = session_settings().iter().map(|(n, v)| set_statement(n, v) + ";").collect();
    connection.set_deadline(deadline);
    connection.batch(&sql)?;
    Ok(connection)
}

impl Session for RemoteSession {
    fn side(&self) -> Side {
        Side::Second
    }

    fn query(&mut self, sql: &str, params: &[Option<&str>]) -> Result<Vec<Row>> {
        self.armed().query(sql, params)
    }

    fn execute(&mut self, sql: &str, params: &[Option<&str>]) -> Result<u64> {
        self.armed().execute(sql, params)
    }

    fn stream(&mut self, sql: &str, params: &[Option<&str>], each: &mut Each) -> Result<()> {
        self.armed().stream(sql, params, each)
    }

    fn batch(&mut self, sql: &str) -> Result<()> {
        self.armed().batch(sql)
    }

    fn admin_query(&mut self, sql: &str, params: &[Option<&str>]) -> Result<Vec<Row>> {
        self.query(sql, params)
    }

    fn admin_execute(&mut self, sql: &str, params: &[Option<&str>]) -> Result<u64> {
        self.execute(sql, params)
    }

    fn admin_batch(&mut self, sql: &str) -> Result<()> {
        self.batch(sql)
    }

    fn become_replica(&mut self) -> Result<()> {
        if self.replica.is_empty() {
            return Ok(());
        }
        let sql = self.replica.clone();
        self.batch(&sql)
    }

    fn begin(&mut self, isolation: Isolation, lock: &[String]) -> Result<()> {
        let mut sql = match isolation {
            Isolation::RepeatableRead => "BEGIN ISOLATION LEVEL REPEATABLE READ".to_string(),
            Isolation::ReadCommitted => "BEGIN ISOLATION LEVEL READ COMMITTED".to_string(),
        };
        if !lock.is_empty() {
            sql += &format!("; LOCK TABLE {} IN ACCESS SHARE MODE", lock.join(", "));
        }
        self.depth = 0;
        self.batch(&sql)
    }

    fn commit(&mut self) -> Result<()> {
        self.depth = 0;
        self.armed().batch("COMMIT")
    }

    fn rollback(&mut self) {
        self.depth = 0;
        if self.connection.is_broken() || !self.connection.in_transaction() {
            return;
        }
        self.connection.set_deadline(Some(Instant::now() + Duration::from_secs(5)));
        // A failure marks the connection broken; the worker makes a new one.
        let _ = self.connection.batch("ROLLBACK");
    }

    fn savepoint(&mut self) -> Result<()> {
        self.depth += 1;
        let sql = format!("SAVEPOINT crossover_{}", self.depth);
        self.batch(&sql)
    }

    fn release(&mut self) -> Result<()> {
        let sql = format!("RELEASE SAVEPOINT crossover_{}", self.depth);
        self.depth = self.depth.saturating_sub(1);
        self.batch(&sql)
    }

    fn rollback_to(&mut self) -> Result<()> {
        let name = format!("crossover_{}", self.depth);
        self.depth = self.depth.saturating_sub(1);
        self.batch(&format!("ROLLBACK TO SAVEPOINT {name}; RELEASE SAVEPOINT {name}"))
    }

    fn set_lock_timeout(&mut self, timeout: Duration) -> Result<()> {
        self.batch(&format!("SET LOCAL lock_timeout = {}", millis(timeout)))
    }

    fn set_deadline(&mut self, deadline: Option<Instant>) {
        self.deadline = deadline;
    }

    fn flush(&mut self, counter: &str) -> Result<i64> {
        let sql = format!("UPDATE {counter} SET n = n + 1 RETURNING n");
        let rows = if self.connection.in_transaction() {
            if self.flusher.as_ref().is_none_or(|c| c.is_broken()) {
                self.flusher = Some(Box::new(open(&self.target, self.deadline)?));
            }
            let deadline = self.answer_by();
            let flusher = self.flusher.as_mut().ok_or_else(|| Error::internal("no connection to flush with"))?;
            flusher.set_deadline(deadline);
            flusher.query(&sql, &[])?
        } else {
            self.query(&sql, &[])?
        };
        parse(rows.first().and_then(|r| r[0].as_deref()).unwrap_or("0"))
    }
}

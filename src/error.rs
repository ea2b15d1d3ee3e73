//! What can go wrong, and how PostgreSQL says it: SQLSTATE, message, detail, hint.
//!
//! Every fallible function of the crate returns [`Result`]. Only `api` and the workers turn an [`Error`]
//! into a report; whether a failure is worth retrying is decided here, by the class of its SQLSTATE.

use std::fmt;

use pgrx::pg_sys::errcodes::PgSqlErrorCode;

use crate::state::State;

pub type Result<T> = std::result::Result<T, Error>;

/// The server that reported an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Side {
    First,
    Second,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Side::First => "first",
            Side::Second => "second",
        })
    }
}

/// An error as a PostgreSQL server reports it.
#[derive(Debug, Clone)]
pub struct ServerError {
    pub sqlstate: String,
    pub message: String,
    pub detail: Option<String>,
    pub hint: Option<String>,
}

/// One finding of the check that precedes a migration.
#[derive(Debug, Clone)]
pub struct Problem {
    /// What it is about: a table, a column, a key of the mapping.
    pub object: String,
    pub message: String,
    pub hint: Option<String>,
}

impl Problem {
    pub fn new(object: impl fmt::Display, message: impl Into<String>) -> Self {
        Problem { object: object.to_string(), message: message.into(), hint: None }
    }

    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

/// Who keeps a lock attempt from its lock.
#[derive(Debug, Clone, Default)]
pub struct InTheWay {
    /// One line each: pid, application, state, age of the transaction; or a prepared transaction.
    pub holders: Vec<String>,
    /// Whoever called is among them, and will be as long as the call lasts.
    pub is_caller: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{}", error.message)]
    Server { side: Side, error: ServerError },
    #[error("no connection to the second server: {message}")]
    RemoteConnection { message: String },
    #[error("the second server did not answer in time")]
    RemoteTimeout,
    #[error("password is required to connect to the second server")]
    /// `unused`: there is one, and the second server did not ask for it.
    PasswordRequired { unused: bool },
    /// A worker runs as the owner of its migration.
    #[error("{message}")]
    OwnerCannotConnect { message: String, hint: String },
    #[error("role with OID {oid}, which owns the migration, does not exist")]
    OwnerIsGone { oid: u32 },
    #[error("migration \"{name}\" cannot go from {from} to {to}")]
    Transition { name: String, from: State, to: State },
    #[error("migration \"{name}\" cannot {action} in state {state}")]
    WrongState { name: String, action: &'static str, state: State, hint: &'static str },
    #[error("table {table} of migration \"{name}\" does not exist any more")]
    TableIsGone { name: String, table: String, taken_over: bool },
    #[error("migration \"{name}\" is paused and cannot {action}")]
    Paused { name: String, action: &'static str },
    #[error("migration \"{name}\" is {state}, but what it has on the second server could not be removed")]
    NotCleanedUp { name: String, state: State, cause: Box<Error> },
    #[error("migration \"{name}\" does not exist")]
    UnknownMigration { name: String },
    #[error("migration \"{name}\" already exists")]
    NameTaken { name: String },
    #[error("the mapping of migration \"{name}\" has {} problem{}", problems.len(), if problems.len() == 1 { "" } else { "s" })]
    Mapping { name: String, problems: Vec<Problem> },
    #[error("the options of migration \"{name}\" have a problem")]
    Options { name: String, problem: Problem },
    /// Somebody has changed the tables of a migration that runs.
    #[error("the tables of migration \"{name}\" do not fit its mapping any more")]
    Misfit { name: String, problems: Vec<Problem> },
    #[error("the name of the migration is too long")]
    NameTooLong { bytes: usize, most: usize },
    #[error("{message}")]
    BadArgument { message: String, hint: String },
    #[error("could not lock out the writers of migration \"{name}\" within {waited_ms} ms")]
    LockTimeout { name: String, waited_ms: u64, in_the_way: InTheWay },
    /// One attempt of several; never reaches a client.
    #[error("lock not available")]
    LockNotAvailable,
    /// The next cycle mends it; never reaches a client.
    #[error("partitions or subscriptions of the tables have changed")]
    CaptureChanged,
    #[error("migration \"{name}\" did not get there within {waited_ms} ms")]
    Timeout { name: String, waited_ms: u64, detail: String },
    #[error("migration \"{name}\" has {count} parked row{}", if *count == 1 { "" } else { "s" })]
    Parked { name: String, count: i64 },
    #[error("the backlog of migration \"{name}\" cannot be applied within the timeout")]
    Backlog { name: String, detail: String },
    #[error("the stores of migration \"{name}\" have diverged")]
    Diverged { name: String, state: State, detail: String },
    /// A store has lost commits; [`crate::divergence`] makes it [`Error::Diverged`].
    #[error("the {side} store has lost commits")]
    Lost { side: Side, detail: String },
    #[error("changes of migration \"{name}\" are not captured")]
    NotCaptured { name: String, detail: String },
    #[error("pg_crossover is not loaded by shared_preload_libraries")]
    NotPreloaded,
    #[error("conflict {conflict} does not exist")]
    UnknownConflict { conflict: i64 },
    #[error("the row of conflict {conflict} is refused again")]
    StillParked { conflict: i64, detail: String },
    #[error("migrations cannot be controlled on a standby")]
    InRecovery,
    #[error("no background worker can be started: all {limit} of max_worker_processes are in use")]
    NoWorkerSlot { limit: i32 },
    #[error("extension pg_crossover is not installed in this database")]
    NotInstalled,
    #[error(
        "the library of pg_crossover is version {}, but the extension in this database is version {objects}",
        env!("CARGO_PKG_VERSION")
    )]
    Version { objects: String, is_older: bool },
    #[error("cannot execute {function}() in a read-only transaction")]
    ReadOnly { function: String },
    #[error("must be owner of migration \"{name}\"")]
    NotOwner { name: String, owner: String },
    /// A request that another backend carried out failed there.
    #[error("{message}")]
    Request { sqlstate: String, message: String, detail: Option<String>, hint: Option<String> },
    /// Only with the feature `fault-points`.
    #[cfg_attr(not(feature = "fault-points"), allow(dead_code))]
    #[error("fault injected at {0}")]
    Fault(&'static str),
    #[error("the background worker that files the request has ended without an answer")]
    NotFiled,
    #[error("nobody waits for the request any more")]
    Withdrawn,
    #[error("{0}")]
    Internal(String),
}

impl Error {
    pub fn internal(message: impl Into<String>) -> Self {
        Error::Internal(message.into())
    }

    pub fn sqlstate(&self) -> String {
        match self {
            Error::Server { error, .. } => error.sqlstate.clone(),
            Error::Request { sqlstate, .. } => sqlstate.clone(),
            Error::RemoteConnection { .. } => "08001".into(),
            Error::RemoteTimeout => "08006".into(),
            Error::PasswordRequired { .. } => "2F003".into(),
            Error::OwnerCannotConnect { .. } => "28000".into(),
            Error::OwnerIsGone { .. } => "42704".into(),
            Error::TableIsGone { .. } => "42P01".into(),
            Error::NotCleanedUp { cause, .. } => cause.sqlstate(),
            Error::Transition { .. } | Error::WrongState { .. } | Error::Paused { .. } | Error::Parked { .. } => {
                "55000".into()
            }
            Error::Diverged { .. } | Error::Lost { .. } | Error::NotCaptured { .. } | Error::NotPreloaded => {
                "55000".into()
            }
            Error::StillParked { .. } => "55000".into(),
            Error::UnknownMigration { .. } | Error::UnknownConflict { .. } => "42704".into(),
            Error::NameTaken { .. } => "42710".into(),
            Error::Mapping { .. } | Error::Options { .. } | Error::BadArgument { .. } => "22023".into(),
            Error::Misfit { .. } => "55000".into(),
            Error::NameTooLong { .. } => "42622".into(),
            Error::LockTimeout { .. } | Error::LockNotAvailable | Error::CaptureChanged => "55P03".into(),
            Error::Timeout { .. } | Error::Backlog { .. } | Error::Withdrawn | Error::NotFiled => "57014".into(),
            Error::InRecovery | Error::ReadOnly { .. } => "25006".into(),
            Error::NoWorkerSlot { .. } => "53000".into(),
            Error::NotInstalled | Error::Version { .. } => "55000".into(),
            Error::NotOwner { .. } => "42501".into(),
            Error::Fault(_) => "58000".into(),
            Error::Internal(_) => "XX000".into(),
        }
    }

    pub fn detail(&self) -> Option<String> {
        match self {
            Error::Server { error, .. } => error.detail.clone(),
            Error::Request { detail, .. } => detail.clone(),
            // The only one has its hint as that of the error.
            Error::Mapping { problems, .. } if problems.len() == 1 => Some(line(&problems[0], false)),
            Error::Mapping { problems, .. } | Error::Misfit { problems, .. } => {
                Some(problems.iter().map(|p| line(p, true)).collect::<Vec<_>>().join("\n"))
            }
            Error::Options { problem, .. } => Some(line(problem, false)),
            Error::NameTooLong { bytes, most } => Some(format!("It has {bytes} bytes; a name can have {most}.")),
            Error::PasswordRequired { unused: true } => {
                Some("The second server did not ask for the password of the user mapping.".into())
            }
            Error::PasswordRequired { unused: false } => Some("The user mapping has no password.".into()),
            Error::LockTimeout { in_the_way, .. } if !in_the_way.holders.is_empty() => {
                Some(format!("In the way:\n{}", in_the_way.holders.join("\n")))
            }
            Error::NotCleanedUp { cause, .. } => Some(
                [Some(format!("{cause}.")), cause.detail(), cause.hint()]
                    .into_iter()
                    .flatten()
                    .collect::<Vec<_>>()
                    .join(" "),
            ),
            Error::OwnerCannotConnect { .. } => Some("The worker of a migration runs as the migration's owner.".into()),
            Error::Timeout { detail, .. }
            | Error::Backlog { detail, .. }
            | Error::Diverged { detail, .. }
            | Error::Lost { detail, .. }
            | Error::NotCaptured { detail, .. }
            | Error::StillParked { detail, .. } => Some(detail.clone()),
            _ => None,
        }
    }

    pub fn hint(&self) -> Option<String> {
        let nothing = "Nothing was changed. Correct the mapping and call migration_start again.";
        let hint = match self {
            // PostgreSQL's own speaks of CASCADE, which would take what is not ours.
            Error::Server { error, .. } if error.sqlstate == "2BP01" => {
                "Drop what is named above, or have it depend on something else, and call again.".into()
            }
            Error::Server { side: Side::First, error } => return error.hint.clone(),
            Error::Server { side: Side::Second, error } => match &error.hint {
                Some(hint) => format!("On the second server: {hint}"),
                None => "That was on the second server, where the worker is the role of the user mapping.".into(),
            },
            Error::Request { hint, .. } => return hint.clone(),
            Error::BadArgument { hint, .. } | Error::OwnerCannotConnect { hint, .. } => hint.clone(),
            Error::NotCleanedUp { .. } => {
                "There is nothing more to decide: the worker removes it as soon as the second server can be reached.".into()
            }
            Error::TableIsGone { name, taken_over, .. } => {
                let name = literal(name);
                if *taken_over {
                    format!("SELECT migration_cancel({name}, force => true) ends it. Its other tables and views keep the names that they have now.")
                } else {
                    format!("SELECT migration_cancel({name}) ends it.")
                }
            }
            Error::OwnerIsGone { .. } => {
                "As a superuser, give the migration to the role that owns its tables now: UPDATE crossover.migration SET owner = 'new_owner'::regrole WHERE name = '...'; then call migration_wait.".into()
            }
            Error::WrongState { name, state, hint: "", .. } => state.allowed_hint(&literal(name)),
            Error::WrongState { name, state, hint, .. } => format!("{hint} {}", state.allowed_hint(&literal(name))),
            Error::Transition { name, from, .. } => from.allowed_hint(&literal(name)),
            Error::Paused { name, .. } => format!("SELECT migration_resume({});", literal(name)),
            Error::RemoteConnection { .. } | Error::RemoteTimeout => {
                "Check that the second server runs, and the options of the foreign server and the user mapping.".into()
            }
            Error::PasswordRequired { .. } => {
                "A migration owned by a role that is not a superuser needs a password in the user mapping, and a second server that asks for it.".into()
            }
            Error::NameTooLong { .. } => "Choose a shorter one.".into(),
            Error::Options { problem, .. } => problem.hint.clone().unwrap_or_else(|| {
                "Nothing was changed. Correct the options and call migration_start again.".into()
            }),
            Error::Misfit { name, .. } => format!(
                "Undo what was changed of the tables' columns. Or SELECT migration_cancel({}, force => true) ends it; tables and views keep the names that they have now.",
                literal(name)
            ),
            Error::NotOwner { owner, .. } => format!("SET ROLE {owner};"),
            Error::UnknownMigration { .. } => "SELECT name, state FROM migration_status lists the migrations of this database.".into(),
            Error::UnknownConflict { .. } => {
                "SELECT id, name, table_name, key, kind FROM migration_conflicts lists them.".into()
            }
            Error::StillParked { .. } => {
                "Change the row on its own store, or the constraint that refuses it; or keep the other store's row."
                    .into()
            }
            Error::NameTaken { .. } => "Choose another name, or end the other migration with migration_finish or migration_cancel.".into(),
            Error::Mapping { problems, .. } if problems.len() == 1 => {
                problems[0].hint.clone().unwrap_or_else(|| nothing.into())
            }
            Error::Mapping { .. } => nothing.into(),
            Error::LockTimeout { in_the_way: InTheWay { is_caller: true, .. }, .. } => {
                "The state has not changed. Locks of the transaction that calls are in the way: commit it, and call outside of it.".into()
            }
            Error::LockTimeout { .. } => {
                "The state has not changed. Let the transactions above end, or call again with a longer timeout.".into()
            }
            Error::Timeout { .. } => "See migration_status and migration_progress; call again with a longer timeout.".into(),
            Error::Backlog { name, .. } => {
                format!("Wait, then call again: SELECT migration_wait({});", literal(name))
            }
            Error::Parked { name, .. } => {
                format!("SELECT * FROM migration_conflicts WHERE name = {} AND kind = 'parked' AND resolved_at IS NULL shows them.", literal(name))
            }
            Error::NotPreloaded => {
                "Add pg_crossover to shared_preload_libraries in postgresql.conf and restart the server.".into()
            }
            Error::NotFiled => "Nothing was done. Call again; the server log may say why it ended.".into(),
            Error::InRecovery => "Call this on the primary server.".into(),
            Error::NoWorkerSlot { .. } => {
                "Raise max_worker_processes and restart the server, or wait until another background worker has ended.".into()
            }
            Error::NotInstalled => "CREATE EXTENSION pg_crossover;".into(),
            Error::Version { is_older: true, .. } => "Run ALTER EXTENSION pg_crossover UPDATE in this database.".into(),
            Error::Version { objects, .. } => {
                format!("Install the library of version {objects} and restart the server.")
            }
            Error::ReadOnly { .. } => {
                "Call it in a transaction that is READ WRITE; see default_transaction_read_only for what new ones are.".into()
            }
            Error::Diverged { name, state, .. } => format!(
                "No store is newly exposed until all rows have been {}: SELECT migration_set_state({}, '{state}', force => true);",
                if *state == State::Copying { "copied again" } else { "compared" },
                literal(name)
            ),
            Error::NotCaptured { .. } => "Replication goes on when all changes are captured again.".into(),
            _ => return None,
        };
        Some(hint)
    }

    fn class_is(&self, classes: &[&str]) -> bool {
        let code = self.sqlstate();
        classes.iter().any(|c| code.starts_with(c))
    }

    /// The target refuses this very row: a constraint (23), a cast or a value out of range (22).
    pub fn is_rejected_row(&self) -> bool {
        matches!(self, Error::Server { .. }) && self.class_is(&["22", "23", "54", "P0"])
    }

    /// Something is not there that a name stands for: a relation of the statement, or of a value (regclass and the like). Whether it
    /// is the row's fault shows when the statement runs without rows.
    pub fn is_undefined_name(&self) -> bool {
        matches!(self, Error::Server { .. }) && self.class_is(&["42P01", "42704", "42883", "42725", "42602", "42601"])
    }

    /// A unique value is there already, in another row.
    pub fn is_unique_violation(&self) -> bool {
        matches!(self, Error::Server { .. }) && self.sqlstate() == "23505"
    }

    /// A cancel request has met this process: `migration_pause`, or a DBA's.
    pub fn is_cancel(&self) -> bool {
        matches!(self, Error::Server { side: Side::First, .. }) && self.sqlstate() == "57014"
    }

    /// Whoever asked keeps it from being done, for as long as they wait.
    pub fn is_caller_in_the_way(&self) -> bool {
        matches!(self, Error::LockTimeout { in_the_way: InTheWay { is_caller: true, .. }, .. })
    }

    /// A client held the lock, or the replicator gave way to one.
    pub fn is_contention(&self) -> bool {
        matches!(self, Error::LockNotAvailable | Error::CaptureChanged)
            || matches!(self, Error::Server { .. }) && self.class_is(&["55P03", "40001", "40P01", "57014"])
    }
}

fn line(problem: &Problem, with_hint: bool) -> String {
    match &problem.hint {
        Some(hint) if with_hint => format!("{}: {} ({hint})", problem.object, problem.message),
        _ => format!("{}: {}", problem.object, problem.message),
    }
}

/// A name as an SQL literal, for hints that can be pasted.
fn literal(name: &str) -> String {
    format!("'{}'", name.replace('\'', "''"))
}

/// Reports `error` as PostgreSQL does; never returns.
pub fn report(error: &Error) -> ! {
    raise(pgrx::PgLogLevel::ERROR, error);
    unreachable!("an error report does not return")
}

/// Reports `error` at `level`.
pub fn raise(level: pgrx::PgLogLevel, error: &Error) {
    let mut report = pgrx::pg_sys::panic::ErrorReport::new(code(&error.sqlstate()), error.to_string(), "pg_crossover");
    if let Some(detail) = error.detail() {
        report = report.set_detail(detail);
    }
    if let Some(hint) = error.hint() {
        report = report.set_hint(hint);
    }
    report.report(level);
}

/// PostgreSQL packs a SQLSTATE into six bits a character (`MAKE_SQLSTATE`).
fn code(sqlstate: &str) -> PgSqlErrorCode {
    let packed = sqlstate
        .bytes()
        .take(5)
        .enumerate()
        .fold(0i32, |acc, (i, b)| acc | ((i32::from(b).wrapping_sub(i32::from(b'0')) & 0x3F) << (6 * i)));
    PgSqlErrorCode::from(packed)
}

/// The five characters of a packed SQLSTATE.
pub fn unpack(code: PgSqlErrorCode) -> String {
    let packed = code as i32;
    (0..5).map(|i| (((packed >> (6 * i)) & 0x3F) as u8 + b'0') as char).collect()
}

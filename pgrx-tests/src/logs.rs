//! What no server's log may hold after a test, whatever the clients saw.

use std::fmt;
use std::fs;
use std::path::Path;
use std::time::Duration;

/// Never, in any test.
const NEVER: &[&str] = &[
    "PANIC:",
    "TRAP:",
    "panicked at",
    "was terminated by signal 6",
    "was terminated by signal 11",
    "invalid memory alloc",
    "stack is not",
    "reference leak",
    "refcount leak",
    "left non-empty SPI stack",
    "you don't own a lock",
    "could not read block",
    "cache lookup failed",
];

/// Only where a test kills.
const ON_A_KILL: &[&str] = &["was terminated by signal", "terminating any other active server processes"];

/// The application name that the extension's own remote connections carry (a prefix of it).
const OURS: &str = "pg_crossover";

/// Lines of a log that must not be there.
#[derive(Debug)]
pub struct Findings(Vec<String>);

impl Findings {
    /// Searches the log at `path`.
    pub fn of(path: &Path, crashes_expected: bool) -> Self {
        let text = fs::read(path).map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default();
        Self(text.lines().filter(|line| is_wrong(line, crashes_expected)).map(str::to_owned).collect())
    }

    /// Whether the log is clean.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Display for Findings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("\n"))
    }
}

/// A moment by a server's clock, to the millisecond, of which the day does not matter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moment(u64);

const DAY: u64 = 24 * 60 * 60 * 1000;

impl Moment {
    /// The moment of an `extract(epoch FROM ...)`.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    pub fn of_epoch(seconds: f64) -> Self {
        Self((seconds * 1000.0) as u64 % DAY)
    }

    /// How long after `earlier` it was, less than a day.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_millis((self.0 + DAY - earlier.0) % DAY)
    }
}

impl std::ops::Add<Duration> for Moment {
    type Output = Self;

    fn add(self, time: Duration) -> Self {
        Self((self.0 + u64::try_from(time.as_millis()).expect("no age of the world")) % DAY)
    }
}

/// A line of a server's log.
#[derive(Debug, Clone)]
pub struct Line {
    /// When it was logged.
    pub at: Moment,
    /// The process that logged it.
    pub pid: i32,
    /// What follows the time and the pid.
    pub text: String,
}

impl Line {
    /// Those of the log at `path` that begin with `log_line_prefix`, in which the time is UTC.
    pub fn all(path: &Path) -> Vec<Self> {
        let text = fs::read(path).map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default();
        text.lines().filter_map(Self::parse).collect()
    }

    fn parse(line: &str) -> Option<Self> {
        let (date, rest) = line.split_once(' ')?;
        let (time, rest) = rest.split_once(" UTC [")?;
        let (pid, text) = rest.split_once("] ")?;
        let (time, milliseconds) = time.split_once('.')?;
        let parts: Vec<u64> = time.split(':').map(str::parse).collect::<Result<_, _>>().ok()?;
        let [hours, minutes, seconds] = parts[..] else { return None };
        let milliseconds: u64 = milliseconds.parse().ok()?;
        let at = Moment(((hours * 60 + minutes) * 60 + seconds) * 1000 + milliseconds);
        date.starts_with(|c: char| c.is_ascii_digit()).then_some(Self {
            at,
            pid: pid.parse().ok()?,
            text: text.to_owned(),
        })
    }
}

fn is_wrong(line: &str, crashes_expected: bool) -> bool {
    let holds = |words: &[&str]| words.iter().any(|word| line.contains(word));
    holds(NEVER)
        || (!crashes_expected && holds(ON_A_KILL))
        || (line.contains("deadlock detected") && is_a_clients(line))
}

/// Whether a line was logged for a client. The replicator may find a deadlock: it is meant to be the one, and to give way.
/// The prefix of a line is `time [pid] backend type/application/SQLSTATE`.
fn is_a_clients(line: &str) -> bool {
    line.contains("] client backend/") && !line.contains(&format!("] client backend/{OURS}"))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{Line, Moment, is_wrong};

    #[test]
    fn a_line_has_a_moment_and_a_pid() {
        let line = |time| Line::parse(&format!("2026-01-01 {time} UTC [77] postmaster//00000 LOG:  shutting down"));
        let (late, early) = (line("23:59:59.900").expect("a line"), line("00:00:00.150").expect("a line"));
        assert_eq!((late.pid, late.text.as_str()), (77, "postmaster//00000 LOG:  shutting down"));
        assert_eq!(early.at.since(late.at), Duration::from_millis(250));
        assert_eq!(
            Moment::of_epoch(1_767_225_600.150_9) + Duration::from_millis(50),
            early.at + Duration::from_millis(50)
        );
        assert!(Line::parse("\tand 00:00:00.1 UTC [7] x").is_none() && line("x").is_none());
    }

    #[test]
    fn only_a_clients_deadlock_counts() {
        let line = |who| format!("2026-01-01 00:00:00 UTC [7] {who}/40P01 ERROR:  deadlock detected");
        assert!(is_wrong(&line("client backend/pgbench"), false));
        assert!(is_wrong(&line("client backend/postgres_fdw"), true));
        assert!(!is_wrong(&line("client backend/pg_crossover shop"), false));
        assert!(!is_wrong(&line("pg_crossover worker/pg_crossover shop"), false));
    }

    #[test]
    fn a_kill_counts_unless_expected() {
        let line = "LOG:  server process (PID 1) was terminated by signal 9: Killed";
        assert!(is_wrong(line, false) && !is_wrong(line, true));
        assert!(is_wrong("LOG:  background worker (PID 1) was terminated by signal 11: Segmentation fault", true));
    }
}

//! What no server's log may hold after a test, whatever the clients saw.

use std::fmt;
use std::fs;
use std::path::Path;

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
    use super::is_wrong;

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

//! Waiting for a condition with a deadline: the only place of the suite that sleeps.

use std::thread;
use std::time::{Duration, Instant};

/// How often a condition is looked at again.
const POLL: Duration = Duration::from_millis(10);

/// A deadline that is generous for a busy machine and still an answer.
pub const SOON: Duration = Duration::from_secs(30);

/// For what has a million rows to move.
pub const LONG: Duration = Duration::from_secs(120);

/// Waits until `condition` holds.
///
/// # Panics
/// When it does not hold within `deadline`; the message says `what` was waited for.
pub fn until(what: &str, deadline: Duration, mut condition: impl FnMut() -> bool) {
    until_some(what, deadline, || condition().then_some(()));
}

/// Waits until `probe` has a value, and returns it.
///
/// # Panics
/// As [`until`].
pub fn until_some<T>(what: &str, deadline: Duration, mut probe: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = probe() {
            return value;
        }
        assert!(start.elapsed() < deadline, "waited {deadline:?} in vain until {what}");
        thread::sleep(POLL);
    }
}

/// As [`until`], with a message of what was the matter the last time.
pub fn until_or(deadline: Duration, message: impl Fn() -> String, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < deadline, "waited {deadline:?} in vain: {}", message());
        thread::sleep(POLL);
    }
}

/// The pace of a client that is not there to fill the processors: one beat between two transactions.
pub fn beat() {
    thread::sleep(POLL / 5);
}

/// Lets clients work for `period`: the length of a scenario, not a hope.
pub fn for_a(period: Duration) {
    thread::sleep(period);
}

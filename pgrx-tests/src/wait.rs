//! Waiting for a condition with a deadline: the only place of the suite that sleeps.

use std::sync::{Mutex, Once, PoisonError};
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

/// How often the heart beats.
const BEAT: Duration = Duration::from_millis(5);

/// From which delay on a beat was late because the machine stood still, not because somebody else had the processor for a moment.
const STALL: Duration = Duration::from_millis(20);

/// Measures time, without that in which the whole machine stood still: a thread that has nothing to do but to wake up came to nothing, so
/// nobody did. What is slow for any other reason counts in full.
#[derive(Debug, Clone, Copy)]
pub struct Stopwatch {
    began: Instant,
    stalled_before: Duration,
}

impl Stopwatch {
    /// Begins to measure.
    pub fn start() -> Self {
        Self { stalled_before: Heart::stalled(), began: Instant::now() }
    }

    /// The time since the start, without [`Stopwatch::stalled`].
    pub fn elapsed(&self) -> Duration {
        self.began.elapsed().saturating_sub(self.stalled())
    }

    /// For how long the machine has stood still since the start.
    pub fn stalled(&self) -> Duration {
        Heart::stalled().saturating_sub(self.stalled_before)
    }
}

/// The thread that tells a machine that stands still.
struct Heart {
    last_beat: Option<Instant>,
    stalled: Duration,
}

impl Heart {
    /// For how long the machine has stood still since the first call.
    fn stalled() -> Duration {
        static HEART: Mutex<Heart> = Mutex::new(Heart { last_beat: None, stalled: Duration::ZERO });
        static BEGUN: Once = Once::new();
        let of = || HEART.lock().unwrap_or_else(PoisonError::into_inner);
        BEGUN.call_once(|| {
            of().last_beat = Some(Instant::now());
            thread::spawn(move || {
                loop {
                    thread::sleep(BEAT);
                    of().beat();
                }
            });
        });
        let heart = of();
        heart.stalled + heart.late()
    }

    fn beat(&mut self) {
        self.stalled += self.late();
        self.last_beat = Some(Instant::now());
    }

    /// By how much the next beat is overdue, where that is a stall.
    fn late(&self) -> Duration {
        let late = self.last_beat.map_or(Duration::ZERO, |last| last.elapsed().saturating_sub(BEAT));
        if late < STALL { Duration::ZERO } else { late }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stopwatch_counts_what_is_no_stall() {
        let watch = Stopwatch::start();
        let wall = Instant::now();
        for_a(Duration::from_millis(200));
        // Asked in this order, a stall in between is in the sum.
        let (elapsed, stalled) = (watch.elapsed(), watch.stalled());
        assert!(elapsed + stalled >= Duration::from_millis(200), "{elapsed:?} and {stalled:?}");
        assert!(elapsed <= wall.elapsed() + STALL, "{elapsed:?}");
    }

    #[test]
    fn a_late_beat_is_a_stall_and_is_counted_once() {
        let ago = |ms| Instant::now().checked_sub(Duration::from_millis(ms));
        let mut heart = Heart { last_beat: ago(15), stalled: Duration::ZERO };
        heart.beat();
        assert_eq!(heart.stalled, Duration::ZERO);
        heart.last_beat = ago(305);
        let late = heart.late();
        assert!(late >= Duration::from_millis(300), "{late:?}");
        heart.beat();
        assert!(heart.stalled >= late && heart.late() < heart.stalled, "{:?}", heart.stalled);
    }
}

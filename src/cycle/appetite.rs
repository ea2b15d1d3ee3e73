//! How much a cycle takes at a time, in rows, in bytes, and in the time that clients wait for it.

use std::time::Duration;

/// Scopes that a cycle holds in memory, of either direction.
pub const SCOPES: usize = 10_000;
/// Scopes that the last cycle of a direction takes, for which its writers wait: more than ever come while a switch takes its locks.
pub const MOST_AT_LAST: usize = 10 * SCOPES;
/// Bytes that the rows of one direction, or the images of conflicts, may have in memory.
const ROOM: usize = 8 << 20;
/// How long the writes of a cycle should take on either store at most.
const PATIENCE_OF_CLIENTS: Duration = Duration::from_millis(800);
/// Scopes of which a cycle is not made smaller for the time that it takes: on a busy machine it would fall behind ever more.
const FEW: usize = 2000;

/// How many scopes of either direction the next cycle takes: fewer where their rows are large.
#[derive(Debug, Clone, Copy)]
pub struct Appetite {
    scopes: usize,
    /// The cycle before has put off what was changed, and applied nothing.
    pub has_put_off: bool,
}

impl Default for Appetite {
    fn default() -> Appetite {
        Appetite { scopes: SCOPES, has_put_off: false }
    }
}

impl Appetite {
    pub fn scopes(self) -> usize {
        self.scopes
    }

    /// Bytes that a plan's rows may have: one row of either store is never too large.
    pub fn room(self) -> usize {
        if self.scopes == 1 { usize::MAX } else { ROOM }
    }

    /// The rows of `scopes` scopes have no room.
    pub fn shrink(&mut self, scopes: usize) {
        self.scopes = (scopes.min(self.scopes) / 4).max(1);
    }

    /// After a cycle whose writes took `time`, during which clients may have waited for its rows.
    pub fn adapt(&mut self, time: Duration, scopes: usize, bytes: usize) {
        if time > PATIENCE_OF_CLIENTS {
            self.scopes = (scopes.min(self.scopes) / 2).max(FEW.min(self.scopes));
        } else if bytes < ROOM / 4 {
            self.scopes = (self.scopes * 2).min(SCOPES);
        }
    }
}

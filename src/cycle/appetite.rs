//! How much a cycle takes at a time, in rows, in bytes, and in the time that clients wait for it.

use std::time::Duration;

/// Scopes that a cycle holds in memory, of either direction.
pub const SCOPES: usize = 10_000;
/// Bytes that the rows of one direction, or the images of conflicts, may have in memory.
const ROOM: usize = 8 << 20;
/// How long the writes of a cycle should take on either store at most.
const PATIENCE_OF_CLIENTS: Duration = Duration::from_millis(300);
/// Scopes of which a cycle is not made smaller for the time that it takes.
const FEW: usize = 100;

/// How many scopes of either direction the next cycle takes: fewer where their rows are large.
#[derive(Debug, Clone, Copy)]
pub struct Appetite(usize);

impl Default for Appetite {
    fn default() -> Appetite {
        Appetite(SCOPES)
    }
}

impl Appetite {
    pub fn scopes(self) -> usize {
        self.0
    }

    /// Bytes that a plan's rows may have: one row of either store is never too large.
    pub fn room(self) -> usize {
        if self.0 == 1 { usize::MAX } else { ROOM }
    }

    /// The rows of `scopes` scopes have no room.
    pub fn shrink(&mut self, scopes: usize) {
        self.0 = (scopes.min(self.0) / 4).max(1);
    }

    /// After a cycle whose writes took `time`, during which clients may have waited for its rows.
    pub fn adapt(&mut self, time: Duration, scopes: usize, bytes: usize) {
        if time > PATIENCE_OF_CLIENTS {
            self.0 = (scopes.min(self.0) / 2).max(FEW.min(self.0));
        } else if bytes < ROOM / 4 {
            self.0 = (self.0 * 2).min(SCOPES);
        }
    }
}

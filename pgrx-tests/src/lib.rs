//! Tests of pg_crossover against real clusters that they start, stop and kill.
//!
//! The library is the harness; the tests are in `tests/`, one file per promise, and read as scenarios. A harness function that
//! cannot do what it is for panics and says why: a test has no use for the error. What a test wants to see fail has a `try_` form.

pub mod bank;
pub mod cluster;
pub mod docs;
pub mod fingerprint;
pub mod installation;
pub mod journal;
pub mod load;
pub mod logs;
pub mod market;
pub mod migration;
pub mod pair;
pub mod pgbench;
pub mod process;
pub mod replica;
pub mod schema;
mod template;
pub mod tokens;
pub mod wait;
pub mod wire;
pub mod witness;
pub mod writers;

pub use cluster::Cluster;
pub use load::{Load, Tally};
pub use migration::{Migration, Status};
pub use pair::Pair;
pub use pgbench::Pgbench;
pub use replica::Replica;
pub use wait::until;
pub use wire::Wire;
pub use witness::Witness;

//! Does the library that is loaded fit the extension's objects in this database?
//!
//! They differ between the installation of another version with its restart, and `ALTER EXTENSION pg_crossover UPDATE`. Nothing is done then, by
//! workers or for callers: the objects are not what the library was written for.

use crate::error::{Error, Result};
use crate::store::Row;

/// The version of this library.
pub const LIBRARY: &str = env!("CARGO_PKG_VERSION");

/// What to ask a server that has the extension.
pub const QUERY: &str = "SELECT extversion FROM pg_catalog.pg_extension WHERE extname = 'pg_crossover'";

/// # Errors
/// `Error::Version` when the answer to [`QUERY`] names another version; `Error::NotInstalled` when there is none.
pub fn check(answer: &[Row]) -> Result<()> {
    match answer.first().and_then(|row| row[0].as_deref()) {
        None => Err(Error::NotInstalled),
        Some(LIBRARY) => Ok(()),
        Some(other) => Err(Error::Version { objects: other.to_string(), is_older: is_older(other, LIBRARY) }),
    }
}

/// By their numbers, part by part; what is no number counts as none.
fn is_older(one: &str, other: &str) -> bool {
    let parts = |version: &str| version.split(['.', '-']).map(|p| p.parse().unwrap_or(0)).collect::<Vec<u64>>();
    parts(one) < parts(other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_by_number() {
        assert!(is_older("0.9.0", "0.10.0") && is_older("0.1", "0.1.1") && !is_older("1.0.0", "0.9.9"));
        assert!(!is_older(LIBRARY, LIBRARY));
    }

    #[test]
    fn only_this_version_fits() {
        let answer = |version: &str| vec![vec![Some(version.to_string())]];
        assert!(check(&answer(LIBRARY)).is_ok());
        assert!(matches!(check(&answer("0.0.1")), Err(Error::Version { is_older: true, .. })));
        assert!(matches!(check(&answer("99.0")), Err(Error::Version { is_older: false, .. })));
        assert!(matches!(check(&[]), Err(Error::NotInstalled)));
    }
}

//! The schema on the second server that all migrations into a database share: made by the first of them, dropped by the last.
//!
//! Who installs holds a shared lock, and who drops an exclusive one, both until their transaction ends: nothing is put into a schema that is
//! being dropped, and of two that leave at the same time the second one sees that it is the last.

use crate::error::{Error, Result};
use crate::mapping::ident::Ident;
use crate::store::{Isolation, Session};

/// The arguments of pg_advisory_xact_lock(): "cros", "peer".
const LOCK: &str = "1668444019, 1885693298";
/// Tries to make the schema while others make or drop it.
const TRIES: usize = 20;

/// Begins a transaction in which the schema is there, and stays.
pub fn begin_in_schema<S: Session>(session: &mut S, schema: &Ident) -> Result<()> {
    for _ in 0..TRIES {
        session.begin(Isolation::ReadCommitted, &[])?;
        session.query(&format!("SELECT pg_advisory_xact_lock_shared({LOCK})"), &[])?;
        if exists(session, schema)? {
            return Ok(());
        }
        session.rollback();
        create(session, schema)?;
    }
    Err(Error::internal(format!("schema {schema} comes and goes on the second server")))
}

fn exists<S: Session>(session: &mut S, schema: &Ident) -> Result<bool> {
    let rows = session.query("SELECT FROM pg_namespace WHERE nspname = $1::text", &[Some(schema.as_str())])?;
    Ok(!rows.is_empty())
}

/// In a transaction of its own. Another migration may be faster.
fn create<S: Session>(session: &mut S, schema: &Ident) -> Result<()> {
    session.begin(Isolation::ReadCommitted, &[])?;
    let sql = format!(
        "CREATE SCHEMA {schema}; COMMENT ON SCHEMA {schema} IS 'pg_crossover: change logs of migrations into this database'"
    );
    match session.batch(&sql).and_then(|()| session.commit()) {
        Err(e) if e.is_unique_violation() || e.sqlstate() == "42P06" => {
            session.rollback();
            Ok(())
        }
        Err(e) => {
            session.rollback();
            Err(e)
        }
        Ok(()) => Ok(()),
    }
}

/// Drops the schema if nothing is left in it and it is this role's. In the caller's transaction, which has removed what was its own, as its last step: it may wait
/// for another migration that is being installed or removed.
pub fn drop_if_empty<S: Session>(session: &mut S, schema: &Ident) -> Result<()> {
    session.query(&format!("SELECT pg_advisory_xact_lock({LOCK})"), &[])?;
    let empty = session.query(
        "SELECT FROM pg_namespace n WHERE n.nspname = $1::text AND NOT EXISTS (SELECT FROM pg_class c WHERE c.relnamespace = n.oid) \
         AND NOT EXISTS (SELECT FROM pg_proc p WHERE p.pronamespace = n.oid) AND pg_has_role(n.nspowner, 'USAGE')",
        &[Some(schema.as_str())],
    )?;
    if empty.is_empty() { Ok(()) } else { session.batch(&format!("DROP SCHEMA {schema}")) }
}

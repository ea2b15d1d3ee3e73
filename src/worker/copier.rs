//! A copy worker: takes chunks until none is left. The migration's worker starts another one when it dies.

use pgrx::pg_sys;
use pgrx::prelude::*;

use super::{assignment, connect, exit, show_name};
use crate::context::Context;
use crate::copy;
use crate::error::Result;
use crate::store::local::{LocalSession, catch};

const CANCELLED: &str = "57014";

#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn crossover_copy_main(_arg: pg_sys::Datum) {
    let assignment = assignment();
    connect(assignment);
    match catch(|| run(assignment.number as i32)).and_then(|result| result) {
        // Cancelled, by migration_pause as a rule.
        Err(e) if e.sqlstate() == CANCELLED => exit(0),
        Err(e) => {
            crate::error::raise(PgLogLevel::WARNING, &e);
            exit(1)
        }
        Ok(()) => exit(0),
    }
}

fn run(id: i32) -> Result<()> {
    let session = LocalSession::new()?;
    let Some(mut ctx) = Context::load(session, id)? else { return Ok(()) };
    show_name(&ctx.migration.name);
    ctx.load_tables()?;
    let result = copy::work(&mut ctx);
    ctx.rollback_all();
    if let Err(e) = &result
        && e.sqlstate() != CANCELLED
    {
        ctx.first.session.write(
            "UPDATE crossover.activity SET last_error = $2::text, last_error_at = clock_timestamp(), retries = retries + 1 WHERE migration_id = $1::text::int",
            &[Some(&id.to_string()), Some(&e.to_string())],
        )?;
    }
    result
}

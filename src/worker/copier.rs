//! A copy worker: takes chunks until none is left. The migration's worker starts another one when it dies.

use pgrx::pg_sys;
use pgrx::prelude::*;

use super::{assignment, connect, exit};
use crate::context::Context;
use crate::copy;
use crate::error::Result;
use crate::store::local::LocalSession;

#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn crossover_copy_main(_arg: pg_sys::Datum) {
    let assignment = assignment();
    connect(assignment);
    let result = run(assignment.number as i32);
    if let Err(e) = result {
        // The migration's worker shows what it meets itself; this goes to the server log.
        crate::error::raise(PgLogLevel::WARNING, &e);
        exit(1);
    }
    exit(0)
}

fn run(id: i32) -> Result<()> {
    let session = LocalSession::new()?;
    let Some(mut ctx) = Context::load(session, id)? else { return Ok(()) };
    ctx.load_tables()?;
    let result = copy::work(&mut ctx);
    ctx.rollback_all();
    result
}

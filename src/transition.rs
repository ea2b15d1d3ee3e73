//! The ways from a state to another one: a switch, a new copy, and out of phase `diverged`.

use crate::context::Context;
use crate::error::{Error, Result};
use crate::reconcile;
use crate::resync;
use crate::state::{By, State};
use crate::switch::{self, Order};

/// Moves the migration to `to`.
///
/// # Errors
/// `Error::Transition` for a move that does not exist; `Error::Backlog`, `Error::Parked`, `Error::LockTimeout` when it cannot be
/// made now. The state has not changed then.
pub fn set_state(ctx: &mut Context, to: State, force: bool, order: &Order) -> Result<()> {
    let from = ctx.migration.state;
    if force {
        return forced(ctx, to, order);
    }
    if from == to {
        return Ok(());
    }
    if !from.allows(to, By::SetState) {
        return Err(Error::Transition { name: ctx.migration.name.clone(), from, to });
    }
    if to == State::Copying {
        return resync::drop_capture(ctx, order);
    }
    switch::switch(ctx, to, order)
}

/// `force`, to the state that the migration is in: the way out of phase `diverged`.
fn forced(ctx: &mut Context, to: State, order: &Order) -> Result<()> {
    if ctx.migration.state != to {
        return Err(Error::BadArgument {
            message: "force is not supported yet for a move to another state".into(),
            hint: "Bring the second server back and call without force.".into(),
        });
    }
    match (&ctx.migration.diverged, to) {
        (None, _) => Ok(()),
        (Some(_), State::Copying) => resync::drop_capture(ctx, order),
        (Some(_), _) => reconcile::run(ctx, order),
    }
}

//! One run of replication: read the change logs, derive the rows anew, decide, apply, look again.
//!
//! While one store only is exposed the other has no clients, and a cycle streams its batches through
//! ([`one_way`]); while both are, one cycle serves both directions ([`two_way`]). The switch composes the same steps
//! under its locks. A watermark commits with the rows that it speaks for, after its source has been flushed.

pub mod appetite;
pub mod apply;
pub mod backlog;
mod one_way;
pub mod plan;
pub mod two_way;
pub mod write;

use std::time::Duration;

use crate::catalog::Migration;
use crate::context::{Context, FirstStore, SecondStore};
use crate::divergence;
use crate::error::{Error, Result};
use crate::fault;
use crate::mapping::model::Policy;
use crate::state::Phase;
use crate::store::postgres::PATIENCE;
use crate::store::{Isolation, Session};

/// Where no client may notice the second server, a transaction on first ends after this long without an answer of it.
pub const STALL: Duration = Duration::from_secs(5);

/// What a cycle did.
#[derive(Debug, Clone, Copy, Default)]
pub struct Outcome {
    /// Changed scopes read.
    pub scopes: usize,
    /// Rows written or deleted.
    pub rows: u64,
    /// Scopes that a client held; they come again.
    pub contended: usize,
    /// Scopes that are owed and not parked, those that a client held among them: there is more to do.
    pub left: usize,
    /// Rows that a target refuses, all in all.
    pub parked: usize,
    /// The oldest change that this cycle has read.
    pub oldest: Option<i64>,
}

/// Which directions are replicated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Directions {
    pub forward: bool,
    pub backward: bool,
}

impl Directions {
    pub const BOTH: Directions = Directions { forward: true, backward: true };

    pub fn of(migration: &Migration) -> Directions {
        match migration.phase {
            Phase::FencePending | Phase::Reconciling => return Directions::BOTH,
            Phase::CatchingUp => return Directions { forward: true, backward: false },
            _ => {}
        }
        Directions { forward: migration.state.replicates_forward(), backward: migration.state.replicates_backward() }
    }
}

/// Runs one cycle, in transactions of its own on both stores. `retry_parked`: try the parked rows again, too.
///
/// # Errors
/// Whatever a server reports; nothing is half done, and the next cycle repeats what is missing.
pub fn run(ctx: &mut Context, retry_parked: bool) -> Result<Outcome> {
    ctx.connect()?;
    divergence::guard(ctx)?;
    ctx.refresh_constraints()?;
    let directions = Directions::of(&ctx.migration);
    let name = ctx.migration.name.clone();
    // Rows that one server has lost are no wish of a client's.
    let reconciling = ctx.migration.phase == Phase::Reconciling;
    let policy = if reconciling { Policy::Latest } else { ctx.migration.options.conflicts };
    let fence = ctx.migration.options.fence;
    let Context { pairs, first, second, appetite, .. } = ctx;
    let second = second.as_mut().ok_or_else(|| Error::internal("not connected"))?;
    second.session.set_patience(if directions.backward { PATIENCE } else { STALL });
    let mut once = |first: &mut FirstStore, second: &mut SecondStore| match directions {
        Directions { forward: true, backward: true } => {
            two_way::run(&name, policy, pairs, first, second, retry_parked, appetite)
        }
        Directions { forward: true, .. } => one_way::run(first, second, retry_parked),
        Directions { backward: true, .. } => one_way::run(second, first, retry_parked),
        _ => Ok(Outcome::default()),
    };
    let mut result = once(first, second);
    if matches!(result, Err(Error::CaptureChanged)) {
        first.session.rollback();
        second.session.rollback();
        result = first
            .renew_capture(directions.forward, !directions.forward)
            .and_then(|()| fault::point("capture:renewed"))
            .and_then(|()| second.renew_capture(directions.backward, fence && !directions.backward))
            .and_then(|()| once(first, second));
    }
    result.map_err(|e| {
        ctx.rollback_all();
        match e {
            Error::NotCaptured { detail, .. } => Error::NotCaptured { name, detail },
            e => divergence::met(ctx, e),
        }
    })
}

/// What a cycle does for the capture of its sources, while the copy runs and there are no cycles. A transaction of its own.
///
/// # Errors
/// As [`Store::check_capture`]; a client that is in the way is none.
pub fn look_after_capture(ctx: &mut Context) -> Result<()> {
    ctx.first.session.begin(Isolation::ReadCommitted, &[])?;
    let result = ctx.first.check_capture();
    ctx.first.session.rollback();
    match result {
        Err(Error::CaptureChanged) => match ctx.first.renew_capture(true, false) {
            Err(e) if e.is_contention() => Ok(()),
            other => other,
        },
        Err(Error::NotCaptured { detail, .. }) => Err(Error::NotCaptured { name: ctx.migration.name.clone(), detail }),
        other => other,
    }
}

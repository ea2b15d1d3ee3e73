//! The states of a migration and the moves between them, as data. Pure.

use std::fmt;
use std::str::FromStr;

/// The words of the SQL type `migration_state`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum State {
    Copying,
    First,
    Both,
    Second,
    Finished,
    Cancelled,
}

use State::*;

/// By which call a move is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum By {
    /// It happens by itself when the copy is complete and its backlog has been applied.
    Itself,
    SetState,
    Finish,
    Cancel,
}

/// Every move there is.
pub const TRANSITIONS: &[(State, State, By)] = &[
    (Copying, First, By::Itself),
    (First, Both, By::SetState),
    (Both, First, By::SetState),
    (Both, Second, By::SetState),
    (Second, Both, By::SetState),
    (Second, Finished, By::Finish),
    (Copying, Cancelled, By::Cancel),
    (First, Cancelled, By::Cancel),
    // Everything is copied again; also by itself, past crossover.max_log_size.
    (First, Copying, By::SetState),
];

impl State {
    pub const ALL: [State; 6] = [Copying, First, Both, Second, Finished, Cancelled];

    pub fn as_str(self) -> &'static str {
        match self {
            Copying => "copying",
            First => "first",
            Both => "both",
            Second => "second",
            Finished => "finished",
            Cancelled => "cancelled",
        }
    }

    pub fn allows(self, to: State, by: By) -> bool {
        TRANSITIONS.contains(&(self, to, by))
    }

    pub fn has_ended(self) -> bool {
        matches!(self, Finished | Cancelled)
    }

    /// Changes of the first store go to the second.
    pub fn replicates_forward(self) -> bool {
        matches!(self, First | Both)
    }

    /// Changes of the second store go to the first.
    pub fn replicates_backward(self) -> bool {
        matches!(self, Both | Second)
    }

    /// What the operator may do from here, as a hint. `name`: the migration's, as an SQL literal.
    pub fn allowed_hint(self, name: &str) -> String {
        if self.has_ended() {
            return format!("A migration that is {self} has ended; migration_start begins another one.");
        }
        let moves: Vec<String> = TRANSITIONS
            .iter()
            .filter_map(|(from, to, by)| match by {
                _ if *from != self => None,
                By::Itself => None,
                By::SetState => Some(format!("SELECT migration_set_state({name}, '{to}');")),
                By::Finish => Some(format!("SELECT migration_finish({name});")),
                By::Cancel => Some(format!("SELECT migration_cancel({name});")),
            })
            .collect();
        let by_itself = if self == Copying { "it goes to first by itself when the copy is complete, and " } else { "" };
        format!("From {self} {by_itself}these are allowed: {}", moves.join(" "))
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for State {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        State::ALL.into_iter().find(|v| v.as_str() == s).ok_or_else(|| format!("\"{s}\" is not a migration state"))
    }
}

/// What a migration is doing; shown in `migration_status`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    SettingUp,
    Copying,
    /// `copying`, while no change is captured: the copy begins anew once the second server is there.
    CaptureDropped,
    CatchingUp,
    Replicating,
    Switching,
    /// `first`, while the second store is not fenced yet (again): replication runs as in `both`.
    FencePending,
    /// After a server had lost commits: all rows of both stores are compared, and replication runs as in `both`.
    Reconciling,
    Finishing,
    Done,
}

impl Phase {
    pub const ALL: [Phase; 10] = [
        Phase::SettingUp,
        Phase::Copying,
        Phase::CaptureDropped,
        Phase::CatchingUp,
        Phase::Replicating,
        Phase::Switching,
        Phase::FencePending,
        Phase::Reconciling,
        Phase::Finishing,
        Phase::Done,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            Phase::SettingUp => "setting up",
            Phase::Copying => "copying",
            Phase::CaptureDropped => "capture dropped",
            Phase::CatchingUp => "catching up",
            Phase::Replicating => "replicating",
            Phase::Switching => "switching",
            Phase::FencePending => "fence pending",
            Phase::Reconciling => "reconciling",
            Phase::Finishing => "finishing",
            Phase::Done => "done",
        }
    }
}

impl FromStr for Phase {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        Phase::ALL.into_iter().find(|v| v.as_str() == s).ok_or_else(|| format!("\"{s}\" is not a phase"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_parse_back() {
        for state in State::ALL {
            assert_eq!(state.as_str().parse(), Ok(state));
        }
        for phase in Phase::ALL {
            assert_eq!(phase.as_str().parse(), Ok(phase));
        }
        assert!("three".parse::<State>().is_err());
    }

    #[test]
    fn ended_states_have_no_way_out() {
        for state in State::ALL {
            let moves = TRANSITIONS.iter().filter(|t| t.0 == state).count();
            assert_eq!(moves == 0, state.has_ended(), "{state}");
        }
    }

    #[test]
    fn there_is_a_way_back_from_every_exposed_state() {
        for (from, to, by) in TRANSITIONS {
            if *by == By::SetState {
                let back = to.allows(*from, By::SetState) || to.allows(*from, By::Itself);
                assert!(back, "{from} to {to} has no way back");
            }
        }
    }

    #[test]
    fn hints_name_the_allowed_moves() {
        let hint = |state: State| state.allowed_hint("'a'");
        for (from, to, by) in TRANSITIONS {
            let call = match by {
                By::Itself => "by itself".to_string(),
                By::SetState => format!("SELECT migration_set_state('a', '{to}');"),
                By::Finish => "SELECT migration_finish('a');".into(),
                By::Cancel => "SELECT migration_cancel('a');".into(),
            };
            assert!(hint(*from).contains(&call), "{}", hint(*from));
        }
        assert!(!hint(First).contains("'second'"));
        assert!(hint(Finished).contains("has ended"));
    }
}

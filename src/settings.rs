//! The settings `crossover.*`: what they mean, their units and limits.

use std::time::Duration;

use pgrx::{GucContext, GucFlags, GucRegistry, GucSetting, PostgresGucEnum};

/// How a client's transactions on the second store are isolated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PostgresGucEnum)]
pub enum RemoteIsolation {
    /// As the local transaction: READ COMMITTED stays READ COMMITTED.
    #[name = c"match"]
    Match,
    /// As postgres_fdw does by itself.
    #[name = c"repeatable read"]
    RepeatableRead,
}

static LOCK_ATTEMPT: GucSetting<i32> = GucSetting::<i32>::new(200);
static MAX_PAUSE: GucSetting<i32> = GucSetting::<i32>::new(2000);
static LOG_RETENTION: GucSetting<i32> = GucSetting::<i32>::new(60);
static LOG_ROTATION: GucSetting<i32> = GucSetting::<i32>::new(60);
static MAX_LOG_SIZE: GucSetting<i32> = GucSetting::<i32>::new(-1);
static IDLE_WAIT: GucSetting<i32> = GucSetting::<i32>::new(50);
static REMOTE_ISOLATION: GucSetting<RemoteIsolation> = GucSetting::<RemoteIsolation>::new(RemoteIsolation::Match);

/// Defines the settings. Called once, from `_PG_init`.
pub fn register() {
    let ms = GucFlags::UNIT_MS;
    let seconds = GucFlags::UNIT_S;
    GucRegistry::define_int_guc(
        c"crossover.lock_attempt",
        c"Longest time that one attempt of a switch to lock writers out may take.",
        c"A switch tries again and again until its timeout, with pauses four times as long in between, so that clients are held up for a fifth of the time at most. In milliseconds.",
        &LOCK_ATTEMPT, 10, 10_000, GucContext::Sighup, ms,
    );
    GucRegistry::define_int_guc(
        c"crossover.max_pause",
        c"Longest time that a switch may hold its locks before it lets go and tries again.",
        c"Counted from the first lock on, network included. In milliseconds.",
        &MAX_PAUSE,
        100,
        600_000,
        GucContext::Sighup,
        ms,
    );
    GucRegistry::define_int_guc(
        c"crossover.log_retention",
        c"How long rows of a change log are kept after they have been replicated.",
        c"The log tables are emptied as a whole when all in them is older than this and has been replicated. In seconds.",
        &LOG_RETENTION, 0, 7 * 86_400, GucContext::Sighup, seconds,
    );
    GucRegistry::define_int_guc(
        c"crossover.log_rotation",
        c"How long new rows of a change log go to one table of its ring.",
        c"Taken when a migration starts. In seconds.",
        &LOG_ROTATION,
        1,
        86_400,
        GucContext::Sighup,
        seconds,
    );
    GucRegistry::define_int_guc(
        c"crossover.max_log_size",
        c"Size of a migration's change logs past which capture is dropped, in copying and first; all rows are copied again then.",
        c"migration_status warns from half of it on. In the other states the logs are kept whatever their size: they are what a way back or forth needs. In megabytes; -1: unlimited.",
        &MAX_LOG_SIZE, -1, i32::MAX, GucContext::Sighup, GucFlags::UNIT_MB,
    );
    GucRegistry::define_int_guc(
        c"crossover.idle_wait",
        c"How long a migration's worker waits between two looks at the change logs when it found nothing.",
        c"In milliseconds.",
        &IDLE_WAIT,
        1,
        10_000,
        GucContext::Sighup,
        ms,
    );
    GucRegistry::define_enum_guc(
        c"crossover.remote_isolation",
        c"Isolation of a client's transactions on the second server of a migration.",
        c"\"match\": a READ COMMITTED client stays READ COMMITTED there, so that it meets no serialization failure that it never saw before. \"repeatable read\": postgres_fdw's own choice.",
        &REMOTE_ISOLATION, GucContext::Userset, GucFlags::default(),
    );
}

fn milliseconds(setting: &GucSetting<i32>) -> Duration {
    Duration::from_millis(setting.get().max(0) as u64)
}

pub fn lock_attempt() -> Duration {
    milliseconds(&LOCK_ATTEMPT)
}

pub fn max_pause() -> Duration {
    milliseconds(&MAX_PAUSE)
}

pub fn log_retention() -> Duration {
    Duration::from_secs(LOG_RETENTION.get().max(0) as u64)
}

/// In bytes; None: unlimited.
pub fn max_log_size() -> Option<i64> {
    u32::try_from(MAX_LOG_SIZE.get()).ok().map(|megabytes| i64::from(megabytes) << 20)
}

/// In seconds.
pub fn log_rotation() -> i32 {
    LOG_ROTATION.get()
}

pub fn idle_wait() -> Duration {
    milliseconds(&IDLE_WAIT)
}

pub fn remote_isolation_matches() -> bool {
    REMOTE_ISOLATION.get() == RemoteIsolation::Match
}

//! Which PostgreSQL is tested, and how its programs are run: never the system's own clusters, never as root.

use std::ffi::CString;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// A PostgreSQL installation, found by `PG_CONFIG`.
#[derive(Debug)]
pub struct Installation {
    bin: PathBuf,
    share: PathBuf,
    /// The user and group that the servers run as when we are root.
    server_user: Option<(u32, u32)>,
}

impl Installation {
    /// The installation under test: `PG_CONFIG`, else the throwaway prefix that `make` fills.
    pub fn get() -> &'static Self {
        static FOUND: OnceLock<Installation> = OnceLock::new();
        FOUND.get_or_init(Self::find)
    }

    fn find() -> Self {
        let pg_config = std::env::var_os("PG_CONFIG").map_or_else(default_pg_config, PathBuf::from);
        let ask = |what: &str| {
            let out = Command::new(&pg_config).arg(what).output();
            match out {
                Ok(out) if out.status.success() => PathBuf::from(String::from_utf8_lossy(&out.stdout).trim()),
                other => panic!(
                    "cannot run {} {what} ({other:?}): set PG_CONFIG, or let make fill the test prefix",
                    pg_config.display()
                ),
            }
        };
        Self { bin: ask("--bindir"), share: ask("--sharedir"), server_user: server_user() }
    }

    /// Whether the extension has been installed there.
    pub fn has_extension(&self) -> bool {
        self.share.join("extension/pg_crossover.control").exists()
    }

    /// The directory of its programs.
    pub fn bin(&self) -> &Path {
        &self.bin
    }

    /// The directory that the extension's control file belongs in.
    pub fn share(&self) -> &Path {
        &self.share
    }

    /// A program of this installation, run by the user that may run servers, deaf to the caller's `PG*` environment.
    pub fn program(&self, name: &str) -> Command {
        self.clean(Command::new(self.bin.join(name)), "/usr/bin:/bin")
    }

    /// Another program, which finds this installation's in its path.
    pub fn program_of(&self, path: &str) -> Command {
        self.clean(Command::new(path), &format!("{}:/usr/bin:/bin", self.bin.display()))
    }

    fn clean(&self, mut command: Command, path: &str) -> Command {
        command.env_clear().env("LC_ALL", "C.UTF-8").env("PATH", path).current_dir("/");
        self.as_server_user(&mut command);
        command
    }

    /// Makes `command` run as the server's user when we are root.
    pub fn as_server_user(&self, command: &mut Command) {
        if let Some((uid, gid)) = self.server_user {
            command.uid(uid).gid(gid);
        }
    }

    /// Hands `path` to the user that the servers run as.
    pub fn give(&self, path: &Path) {
        if let Some((uid, gid)) = self.server_user {
            std::os::unix::fs::chown(path, Some(uid), Some(gid))
                .unwrap_or_else(|e| panic!("cannot hand {} to the server's user: {e}", path.display()));
        }
    }
}

fn default_pg_config() -> PathBuf {
    let prefix = std::env::var_os("CROSSOVER_PREFIX").map_or_else(|| "/var/tmp/pg_crossover".into(), PathBuf::from);
    prefix.join("pg15/usr/lib/postgresql/15/bin/pg_config")
}

/// PostgreSQL refuses to run as root: then user `postgres` runs it.
fn server_user() -> Option<(u32, u32)> {
    // SAFETY: geteuid has no preconditions.
    if unsafe { libc::geteuid() } != 0 {
        return None;
    }
    let name = CString::new("postgres").expect("no NUL in the name");
    // SAFETY: the argument is a C string; the result is read at once, before any other call could overwrite it.
    let user = unsafe { libc::getpwnam(name.as_ptr()).as_ref().map(|pw| (pw.pw_uid, pw.pw_gid)) };
    Some(user.expect("root needs a user postgres to run the servers as"))
}

/// Runs `command` and returns its standard output.
///
/// # Panics
/// With its standard error, when it fails.
pub fn run(mut command: Command) -> String {
    let out = command.output().unwrap_or_else(|e| panic!("cannot run {command:?}: {e}"));
    assert!(
        out.status.success(),
        "{command:?} failed, {}:\n{}{}",
        out.status,
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
    String::from_utf8(out.stdout).expect("output in UTF-8")
}

/// The last `n` lines of a file, for a message.
pub fn tail(path: &Path, n: usize) -> String {
    let text = fs::read(path).map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(n)..].join("\n")
}

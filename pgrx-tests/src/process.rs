//! Server processes as the operating system sees them: signals, parents, states, and a watchdog that outlives us.

use std::fs;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};

use crate::installation::Installation;

/// `kill -9`.
pub const KILL: i32 = libc::SIGKILL;
/// Holds a process where it is.
pub const STOP: i32 = libc::SIGSTOP;
/// Lets a held process go on.
pub const CONTINUE: i32 = libc::SIGCONT;

/// Sends `signal` to one process; false when it is gone.
pub fn signal(pid: i32, signal: i32) -> bool {
    assert!(pid > 1, "pid {pid} is not one server process");
    // SAFETY: kill(2) with a positive pid touches nothing of ours.
    unsafe { libc::kill(pid, signal) == 0 }
}

/// The children of `parent`, with the state letter of each (`T` is stopped, `Z` is dead).
pub fn children(parent: i32) -> Vec<(i32, char)> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(|pid: i32| stat(pid).filter(|s| s.1 == parent).map(|s| (pid, s.0)))
        .collect()
}

/// Whether a process is stopped by SIGSTOP.
pub fn is_stopped(pid: i32) -> bool {
    stat(pid).is_some_and(|s| s.0 == 'T')
}

/// How often a process has gone to sleep so far: as long as this stays the same, it sleeps or works without a break.
pub fn naps(pid: i32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    text.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:")?.trim().parse().ok())
}

/// What a process calls itself, as ps shows it.
pub fn title(pid: i32) -> Option<String> {
    let title = fs::read_to_string(format!("/proc/{pid}/cmdline")).ok()?;
    Some(title.trim_end_matches('\0').to_owned())
}

/// The most memory that a process has had so far, in kilobytes: its own, and what it has touched of the shared.
pub fn peak_memory(pid: i32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    text.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.trim().parse().ok())
}

/// Whether a process is there and not a zombie.
pub fn is_alive(pid: i32) -> bool {
    stat(pid).is_some_and(|s| s.0 != 'Z')
}

/// State and parent, from `/proc/<pid>/stat`: the fields after the name, which may hold blanks and parentheses.
fn stat(pid: i32) -> Option<(char, i32)> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = text[text.rfind(')')? + 1..].split_whitespace();
    Some((fields.next()?.chars().next()?, fields.next()?.parse().ok()?))
}

/// Stops and removes the cluster in a directory when this process ends, however it ends: Ctrl-C and kill -9 included.
#[derive(Debug)]
pub struct Watchdog {
    child: Child,
    leash: Option<ChildStdin>,
}

impl Watchdog {
    /// Watches over `base`, which may hold a cluster in `base/data`.
    pub fn over(base: &Path) -> Self {
        let installation = Installation::get();
        let script = r#"read -r word && [ "$word" = released ] && exit
            pid=$(head -n 1 "$1/data/postmaster.pid") && kill -CONT "$pid" && "$2" -D "$1/data" -m immediate -w stop
            for _ in 1 2 3 4 5; do rm -rf "$1" && break; sleep 1; done"#;
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script, "watchdog"]).arg(base).arg(installation.program("pg_ctl").get_program());
        installation.as_server_user(&mut command);
        let mut child = command
            .current_dir("/")
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("a shell for the watchdog");
        let leash = child.stdin.take();
        Self { child, leash }
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        if let Some(mut leash) = self.leash.take() {
            let _ = leash.write_all(b"released\n");
        }
        let _ = self.child.wait();
    }
}

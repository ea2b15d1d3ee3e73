//! pgbench, unmodified, as the application that must not notice.

use std::fs;
use std::io::Read;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::cluster::Cluster;
use crate::installation::{Installation, run};
use crate::process;
use crate::wait::{LONG, SOON, until, until_some};

/// A running pgbench; dropping it kills it.
pub struct Pgbench {
    child: Child,
    stdout: Option<JoinHandle<String>>,
    stderr: Option<JoinHandle<String>>,
    log: PathBuf,
}

/// What pgbench says at its end.
#[derive(Debug)]
pub struct Report {
    /// Transactions per second.
    pub tps: f64,
    /// Transactions that committed.
    pub processed: u64,
    /// Transactions that failed (serialisation and deadlock errors; any other error aborts its client).
    pub failed: u64,
    /// The longest transaction.
    pub slowest: Duration,
}

impl Pgbench {
    /// Fills the tables of the built-in scripts.
    pub fn init(cluster: &Cluster, scale: u32) {
        let mut command = Installation::get().program("pgbench");
        command.args(["-i", "-I", "dtGvp", "-q", "-s", &scale.to_string(), &cluster.url()]);
        run(command);
    }

    /// Starts pgbench against the tests' database of `cluster` with these arguments, for as long as it takes.
    pub fn start(cluster: &Cluster, args: &[&str]) -> Self {
        let log =
            tempfile::Builder::new().prefix("pgbench.").tempdir_in(cluster.scratch()).expect("a directory").keep();
        Installation::get().give(&log);
        let mut command = Installation::get().program("pgbench");
        command.args(["-n", "-T", "3600", "-l", "--log-prefix"]).arg(log.join("log")).args(args).arg(cluster.url());
        let mut child = spawn(&mut command);
        let stdout = child.stdout.take().map(reader);
        let stderr = child.stderr.take().map(reader);
        let mut pgbench = Self { child, stdout, stderr, log };
        until("pgbench works", SOON, || pgbench.is_over() || pgbench.transactions() > 0);
        pgbench
    }

    /// About how many transactions it has done, by the size of its log.
    pub fn transactions(&self) -> u64 {
        const LINE: u64 = 32;
        self.logs().iter().filter_map(|file| fs::metadata(file).ok()).map(|meta| meta.len()).sum::<u64>() / LINE
    }

    /// Waits until it has done about `count` more transactions.
    pub fn until_done(&mut self, count: u64) {
        let goal = self.transactions() + count;
        until("pgbench has done more", LONG, || self.is_over() || self.transactions() >= goal);
    }

    /// Whether it has ended by itself, which it does when all its clients were aborted.
    pub fn is_over(&mut self) -> bool {
        self.child.try_wait().is_ok_and(|status| status.is_some())
    }

    /// Ends it in order, as its own `-T` would (it sets an alarm for it), and returns its report.
    ///
    /// # Panics
    /// When a client was aborted, or pgbench does not say what it should.
    pub fn stop(mut self) -> Report {
        let pid = i32::try_from(self.child.id()).expect("a pid");
        process::signal(pid, libc::SIGALRM);
        let status = until_some("pgbench ends", SOON, || self.child.try_wait().expect("its status"));
        let text =
            |thread: Option<JoinHandle<String>>| thread.map(|t| t.join().expect("its output")).unwrap_or_default();
        let (out, err) = (text(self.stdout.take()), text(self.stderr.take()));
        assert!(status.success() && !err.contains("aborted"), "pgbench failed, {status}:\n{out}\n{err}");
        let figure = |label: &str| {
            out.lines()
                .find_map(|line| line.strip_prefix(label))
                .and_then(|rest| rest.split_whitespace().next())
                .and_then(|word| word.parse::<f64>().ok())
                .unwrap_or_else(|| panic!("pgbench does not say {label:?}:\n{out}\n{err}"))
        };
        Report {
            tps: figure("tps = "),
            processed: figure("number of transactions actually processed:") as u64,
            failed: figure("number of failed transactions:") as u64,
            slowest: self.slowest(),
        }
    }

    /// The latency is the third field of a line, in microseconds, or a word when the transaction failed.
    fn slowest(&self) -> Duration {
        let latency = |line: &str| line.split_whitespace().nth(2)?.parse().ok();
        let of_file = |file: &PathBuf| fs::read_to_string(file).ok()?.lines().filter_map(latency).max();
        Duration::from_micros(self.logs().iter().filter_map(of_file).max().unwrap_or(0))
    }

    fn logs(&self) -> Vec<PathBuf> {
        fs::read_dir(&self.log).expect("pgbench's log directory").flatten().map(|file| file.path()).collect()
    }
}

impl Drop for Pgbench {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(command: &mut Command) -> Child {
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).stdin(Stdio::null()).spawn().expect("pgbench to run")
}

fn reader(mut pipe: impl Read + Send + 'static) -> JoinHandle<String> {
    thread::spawn(move || {
        let mut text = String::new();
        let _ = pipe.read_to_string(&mut text);
        text
    })
}

//! The applications of the demo: pgbench, from its start to its end, with what it says of itself every second.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use pgrx_tests::Cluster;
use pgrx_tests::installation::Installation;
use pgrx_tests::process::signal;

/// What one pgbench has reported so far.
#[derive(Default)]
struct Reports {
    seconds: Vec<Second>,
    errors: Vec<String>,
}

/// One line of `pgbench --progress=1`.
#[derive(Clone, Copy)]
struct Second {
    tps: f64,
    latency_ms: f64,
    failed: u64,
}

/// What clients did during one state.
#[derive(Default, Clone, Copy)]
pub struct Figures {
    pub tps: f64,
    pub latency_ms: f64,
}

/// One pgbench with one kind of transactions.
pub struct Clients {
    child: Child,
    reports: Arc<Mutex<Reports>>,
    reader: Option<JoinHandle<()>>,
    /// Seconds before this one belong to a state that is over.
    since: usize,
}

impl Clients {
    /// Starts `connections` clients that offer `rate` transactions a second of `script` to the server.
    pub fn start(
        server: &Cluster,
        name: &str,
        script: &str,
        connections: u32,
        rate: u32,
        sizes: &[(&str, u64)],
    ) -> Self {
        let file = server.scratch().join(format!("{name}.sql"));
        std::fs::write(&file, script).expect("pgbench's script to be written");
        let mut command = Installation::get().program("pgbench");
        command
            .args(["--no-vacuum", "--protocol=prepared", "--max-tries=1", "--progress=1", "--time=3600"])
            .args([format!("--client={connections}"), format!("--rate={rate}")])
            .args(sizes.iter().map(|(name, value)| format!("--define={name}={value}")))
            .arg("--file")
            .arg(file)
            .arg(server.url());
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("pgbench to start");
        let reports = Arc::new(Mutex::new(Reports::default()));
        let stderr = BufReader::new(child.stderr.take().expect("pgbench's standard error"));
        let theirs = Arc::clone(&reports);
        let reader = std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                let mut reports = theirs.lock().expect("no panic while it is held");
                match parse(&line) {
                    Some(second) => reports.seconds.push(second),
                    None if line.contains("error:") || line.contains("aborted") => reports.errors.push(line),
                    None => {}
                }
            }
        });
        Self { child, reports, reader: Some(reader), since: 0 }
    }

    /// From here on, [`Clients::figures`] speaks of a new state.
    pub fn new_state(&mut self) {
        self.since = self.reports.lock().expect("no panic while it is held").seconds.len();
    }

    /// The means of this state's seconds.
    pub fn figures(&self) -> Figures {
        let reports = self.reports.lock().expect("no panic while it is held");
        let seconds = reports.seconds.get(self.since..).unwrap_or_default();
        let count = seconds.len().max(1) as f64;
        Figures {
            tps: seconds.iter().map(|s| s.tps).sum::<f64>() / count,
            latency_ms: seconds.iter().map(|s| s.latency_ms).sum::<f64>() / count,
        }
    }

    /// Errors and failed transactions since the start.
    pub fn errors(&self) -> u64 {
        let reports = self.reports.lock().expect("no panic while it is held");
        reports.errors.len() as u64 + reports.seconds.iter().map(|s| s.failed).sum::<u64>()
    }

    /// Lets the clients finish their transactions, and returns how many there were and what went wrong, as pgbench sums it up.
    pub fn stop(mut self) -> (u64, Vec<String>) {
        // pgbench ends a run by time with SIGALRM: in order, with a summary.
        signal(self.child.id().try_into().expect("a pid"), libc::SIGALRM);
        let mut summary = String::new();
        let mut stdout = self.child.stdout.take().expect("pgbench's standard output");
        stdout.read_to_string(&mut summary).expect("pgbench's summary");
        let status = self.child.wait().expect("pgbench's end");
        self.reader.take().expect("its reader").join().expect("the reader not to panic");
        let mut errors = std::mem::take(&mut self.reports.lock().expect("no panic while it is held").errors);
        let figure = |label: &str| {
            let line = summary.lines().find_map(|line| line.strip_prefix(label))?;
            line.split_whitespace().next()?.parse::<u64>().ok()
        };
        match figure("number of failed transactions: ") {
            Some(0) => {}
            Some(failed) => errors.push(format!("{failed} transactions failed")),
            None => errors.push("pgbench gave no summary".to_owned()),
        }
        if !status.success() {
            errors.push(format!("pgbench: {status}"));
        }
        (figure("number of transactions actually processed: ").unwrap_or(0), errors)
    }
}

impl Drop for Clients {
    fn drop(&mut self) {
        if self.reader.is_some() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// `progress: 7.0 s, 402.0 tps, lat 1.304 ms stddev 0.713, 0 failed, lag 0.100 ms`
fn parse(line: &str) -> Option<Second> {
    let mut second = Second { tps: 0.0, latency_ms: 0.0, failed: 0 };
    for part in line.strip_prefix("progress: ")?.split(", ") {
        match part.split(' ').collect::<Vec<_>>()[..] {
            [tps, "tps"] => second.tps = tps.parse().ok()?,
            ["lat", ms, "ms", ..] => second.latency_ms += milliseconds(ms),
            // How late transactions began, as the rate wants them: not part of what one takes.
            ["lag", ms, "ms"] => second.latency_ms -= milliseconds(ms),
            [failed, "failed"] => second.failed = failed.parse().ok()?,
            _ => {}
        }
    }
    Some(second)
}

/// pgbench says NaN (or -nan) of a second without a transaction.
fn milliseconds(text: &str) -> f64 {
    text.parse().ok().filter(|ms: &f64| ms.is_finite()).unwrap_or(0.0)
}

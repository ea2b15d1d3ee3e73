//! A throwaway PostgreSQL cluster: made, started, paused, killed and thrown away by the test that owns it.

use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::thread;
use std::time::Duration;

use postgres::{Client, Config, NoTls};
use tempfile::TempDir;

use crate::installation::{Installation, run, tail};
use crate::logs::{Findings, Line};
use crate::process::{self, Watchdog};
use crate::template::{self, DATABASE};
use crate::wait::{SOON, until, until_some};

/// No statement of a test hangs for ever.
const STATEMENT_TIMEOUT: &str = "180s";

/// What every cluster of the tests is configured with. `fsync` is off: what is killed is a process, never the machine.
const SETTINGS: &str = "\
listen_addresses = '127.0.0.1'
fsync = off
shared_buffers = 64MB
max_connections = 80
max_worker_processes = 24
max_prepared_transactions = 10
max_wal_size = 4GB
checkpoint_timeout = 30min
log_lock_waits = on
log_line_prefix = '%m [%p] %b/%a/%e '
log_timezone = 'UTC'
";

/// How to stop a server.
#[derive(Debug, Clone, Copy)]
pub enum Stop {
    /// Clients are thrown out, the server shuts down in order.
    Fast,
    /// As a crash: recovery follows.
    Immediate,
}

impl Stop {
    fn mode(self) -> &'static str {
        match self {
            Self::Fast => "fast",
            Self::Immediate => "immediate",
        }
    }
}

/// One server with its directory; dropping it stops the server and removes the directory
/// (kept, and named, when `CROSSOVER_KEEP` is set).
#[derive(Debug)]
pub struct Cluster {
    name: &'static str,
    port: u16,
    base: TempDir,
    data: PathBuf,
    _watchdog: Watchdog,
}

impl Cluster {
    /// Makes a cluster and starts it. `name` is what messages call it, `settings` are lines of postgresql.conf.
    pub fn start_new(name: &'static str, settings: &[&str]) -> Self {
        let base = tempfile::Builder::new().prefix("crossover.").tempdir().expect("a temporary directory");
        Installation::get().give(base.path());
        let watchdog = Watchdog::over(base.path());
        let data = base.path().join("data");
        template::copy_to(&data);
        let cluster = Self { name, port: free_port(), data, _watchdog: watchdog, base };
        cluster.configure(&[
            SETTINGS,
            &format!("port = {}", cluster.port),
            &format!("unix_socket_directories = '{}'", cluster.base.path().display()),
        ]);
        cluster.configure(settings);
        cluster.start();
        cluster
    }

    /// Makes a streaming standby of this server and starts it.
    pub fn standby(&self, name: &'static str) -> Self {
        let standby = Self::copy_of(name, self, true);
        standby.start();
        standby
    }

    /// A base backup of a running cluster as a cluster of its own, on another port, not started; as a standby of it if `standby`.
    pub fn copy_of(name: &'static str, primary: &Self, standby: bool) -> Self {
        let base = tempfile::Builder::new().prefix("crossover.").tempdir().expect("a temporary directory");
        Installation::get().give(base.path());
        let watchdog = Watchdog::over(base.path());
        let data = base.path().join("data");
        let mut backup = Installation::get().program("pg_basebackup");
        backup.args(["-h", "127.0.0.1", "-p", &primary.port.to_string(), "-U", "postgres", "-c", "fast", "--no-sync"]);
        backup.arg("-D").arg(&data).args(standby.then_some("-R"));
        run(backup);
        let mut cluster = Self { name, port: 0, data, _watchdog: watchdog, base };
        cluster.set_port(free_port());
        cluster.configure(&[&format!("unix_socket_directories = '{}'", cluster.base.path().display())]);
        cluster
    }

    /// The port from the next start on.
    pub fn set_port(&mut self, port: u16) {
        self.port = port;
        self.configure(&[&format!("port = {port}")]);
    }

    /// Whether it starts as a standby.
    pub fn is_standby(&self) -> bool {
        self.data.join("standby.signal").exists()
    }

    /// Makes a standby a primary, and waits until it is one.
    pub fn promote(&self) {
        let mut command = self.pg_ctl("promote");
        command.args(["-t", "60"]);
        run(command);
    }

    /// Puts the server through pg_upgrade, from and to this installation, and starts it.
    pub fn upgrade(&self) {
        self.stop(Stop::Fast);
        let new = self.base.path().join("upgraded");
        template::initdb(&new);
        for file in ["postgresql.conf", "pg_hba.conf"] {
            let text = fs::read_to_string(self.data.join(file)).expect("a file of the old cluster");
            fs::write(new.join(file), text).expect("a file of the new cluster");
        }
        let mut upgrade = Installation::get().program("pg_upgrade");
        let (bin, ports) = (Installation::get().bin(), [free_port().to_string(), free_port().to_string()]);
        upgrade.arg("-b").arg(bin).arg("-B").arg(bin).arg("-d").arg(&self.data).arg("-D").arg(&new);
        upgrade
            .args(["-U", "postgres", "-p", &ports[0], "-P", &ports[1], "-s"])
            .arg(self.base.path())
            .current_dir(self.base.path());
        run(upgrade);
        fs::remove_dir_all(&self.data).and_then(|()| fs::rename(&new, &self.data)).expect("to take its place");
        self.start();
    }

    /// Appends lines to postgresql.conf; they count from the next start or [`Cluster::reload`].
    pub fn configure(&self, lines: &[&str]) {
        let mut file =
            fs::File::options().append(true).open(self.data.join("postgresql.conf")).expect("postgresql.conf");
        for line in lines {
            writeln!(file, "{line}").expect("postgresql.conf to be written");
        }
    }

    /// Lets the server read its configuration again.
    pub fn reload(&self) {
        assert!(process::signal(self.postmaster().expect("a running server"), libc::SIGHUP));
    }

    /// Starts the server and waits until it accepts connections.
    pub fn start(&self) {
        let mut command = self.pg_ctl("start");
        command.arg("-l").arg(self.log_path()).args(["-t", "60"]);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let ok = command.status().expect("pg_ctl to run").success();
        assert!(ok, "cluster {} did not start:\n{}", self.name, self.log_tail());
    }

    /// Starts the server after its postmaster was killed and all of its processes have gone. Where nobody reaps orphans at once, the dead
    /// postmaster still has its pid, and its lock files seem to be in use.
    pub fn start_after_kill(&self) {
        assert!(self.postmaster().is_none(), "the postmaster of cluster {} is alive", self.name);
        for lock in [self.data.join("postmaster.pid"), self.base.path().join(format!(".s.PGSQL.{}.lock", self.port))] {
            let _ = fs::remove_file(lock);
        }
        self.start();
    }

    /// Stops the server and waits until it is gone; a paused one is woken first.
    pub fn stop(&self, how: Stop) {
        self.resume();
        let mut command = self.pg_ctl("stop");
        command.args(["-m", how.mode(), "-t", "60"]);
        run(command);
    }

    /// [`Cluster::stop`], then [`Cluster::start`].
    pub fn restart(&self, how: Stop) {
        self.stop(how);
        self.start();
    }

    /// Stops every process of the server with SIGSTOP: it is there, it accepts connections, and it never answers.
    pub fn pause(&self) {
        let postmaster = self.postmaster().expect("a running server");
        process::signal(postmaster, libc::SIGSTOP);
        until("the postmaster is stopped", SOON, || process::is_stopped(postmaster));
        for (pid, _) in process::children(postmaster) {
            process::signal(pid, libc::SIGSTOP);
        }
    }

    /// Lets every process of the server go on.
    pub fn resume(&self) {
        let Some(postmaster) = self.postmaster() else {
            return;
        };
        for (pid, _) in process::children(postmaster) {
            process::signal(pid, libc::SIGCONT);
        }
        process::signal(postmaster, libc::SIGCONT);
    }

    /// The postmaster's pid while it runs.
    pub fn postmaster(&self) -> Option<i32> {
        let text = fs::read_to_string(self.data.join("postmaster.pid")).ok()?;
        text.lines().next()?.trim().parse().ok().filter(|pid| process::is_alive(*pid))
    }

    /// Writes into `postmaster.pid` what the postmaster itself writes there when it becomes `ready` or is `stopping`.
    pub fn set_status(&self, status: &str) {
        const LINE: usize = 7;
        let path = self.data.join("postmaster.pid");
        let text = fs::read_to_string(&path).expect("postmaster.pid");
        let mut lines: Vec<&str> = text.lines().collect();
        lines[LINE] = status;
        // In place: it stays the server user's.
        fs::write(&path, lines.join("\n") + "\n").expect("postmaster.pid to be written");
    }

    /// Has the server ask these roles for a password; all others it trusts.
    pub fn demand_password(&self, roles: &[&str]) {
        let path = self.data.join("pg_hba.conf");
        let before = fs::read_to_string(&path).expect("pg_hba.conf");
        fs::write(&path, format!("host all {} 127.0.0.1/32 scram-sha-256\n{before}", roles.join(",")))
            .expect("pg_hba.conf");
        self.reload();
    }

    /// How applications of the tests connect.
    pub fn config(&self, database: &str) -> Config {
        let mut config = Config::new();
        config.host("127.0.0.1").port(self.port).user("postgres").dbname(database);
        config.connect_timeout(Duration::from_secs(10));
        config.options(&format!("-c statement_timeout={STATEMENT_TIMEOUT}"));
        config
    }

    /// A connection to the tests' database.
    pub fn connect(&self) -> Client {
        self.connect_to(DATABASE)
    }

    /// A connection to another database.
    pub fn connect_to(&self, database: &str) -> Client {
        self.config(database)
            .connect(NoTls)
            .unwrap_or_else(|e| panic!("cannot connect to cluster {}: {e:?}\n{}", self.name, self.log_tail()))
    }

    /// A connection of another role.
    pub fn connect_as(&self, role: &str) -> Client {
        let mut config = self.config(DATABASE);
        config.user(role);
        config.connect(NoTls).unwrap_or_else(|e| panic!("{role} cannot connect to cluster {}: {e:?}", self.name))
    }

    /// A connection, if the server grants one now: it may be in recovery after a crash.
    pub fn try_connect(&self) -> Result<Client, postgres::Error> {
        self.try_connect_to(DATABASE)
    }

    /// A connection to another database, if the server grants one now.
    pub fn try_connect_to(&self, database: &str) -> Result<Client, postgres::Error> {
        self.config(database).connect(NoTls)
    }

    /// A connection as soon as the server grants one that answers.
    pub fn connect_soon(&self) -> Client {
        until_some(&format!("cluster {} accepts connections", self.name), SOON, || {
            self.try_connect().ok().and_then(|mut client| client.simple_query("SELECT 1").is_ok().then_some(client))
        })
    }

    /// The tests' database as libpq's programs name it.
    pub fn url(&self) -> String {
        format!("host=127.0.0.1 port={} user=postgres dbname={DATABASE}", self.port)
    }

    /// The port that it listens on, at 127.0.0.1, the same for its whole life.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// What messages call it.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Runs statements on a connection of their own.
    ///
    /// # Panics
    /// With the first error.
    pub fn sql(&self, statements: &str) {
        if let Err(e) = self.connect_soon().batch_execute(statements) {
            panic!("cluster {}: {}\n{statements}", self.name, explain(&e));
        }
    }

    /// The single value of a query, as text.
    pub fn text(&self, query: &str) -> Option<String> {
        let rows = self.connect_soon().simple_query(query);
        let rows = rows.unwrap_or_else(|e| panic!("cluster {}: {}\n{query}", self.name, explain(&e)));
        rows.iter().find_map(|message| match message {
            postgres::SimpleQueryMessage::Row(row) => Some(row.get(0).map(str::to_owned)),
            _ => None,
        })?
    }

    /// The first column of a query, as text.
    pub fn list(&self, query: &str) -> Vec<String> {
        self.text(&format!("SELECT json_agg(v) FROM ({query}) AS q(v)")).map_or_else(Vec::new, |json| {
            let values: Vec<serde_json::Value> = serde_json::from_str(&json).expect("json of the server");
            values.into_iter().map(|v| v.as_str().map_or_else(|| v.to_string(), str::to_owned)).collect()
        })
    }

    /// Feeds `script` to psql, which stops at the first error, and returns what it prints (unaligned, tuples only).
    pub fn psql(&self, script: &str) -> String {
        let mut command = Installation::get().program("psql");
        command.args(["-XqAt", "-v", "ON_ERROR_STOP=1", "-d", &self.url(), "-c", script]);
        run(command)
    }

    /// Feeds `script` to psql as a user types it, and returns what it prints (aligned, errors included) and whether all of it succeeded:
    /// either it stops at the first error, or it goes on and shows the first line of each.
    pub fn psql_as(
        &self,
        role: &str,
        database: &str,
        password: Option<&str>,
        script: &str,
        on_error_stop: bool,
    ) -> (bool, String) {
        let mut psql = Installation::get().program("psql");
        psql.args(["-Xq", "-v", &format!("ON_ERROR_STOP={}", u8::from(on_error_stop)), "-h", "127.0.0.1"]);
        psql.args(["-v", if on_error_stop { "VERBOSITY=default" } else { "VERBOSITY=terse" }]);
        psql.args(["-p", &self.port.to_string(), "-U", role, "-d", database]);
        psql.envs(password.map(|p| ("PGPASSWORD", p)));
        let (reader, writer) = std::io::pipe().expect("a pipe");
        psql.stdin(Stdio::piped()).stderr(writer.try_clone().expect("its end")).stdout(writer);
        let mut child = psql.spawn().expect("psql to run");
        // Its ends of the pipe are the child's alone from here on.
        drop(psql);
        child.stdin.take().expect("its standard input").write_all(script.as_bytes()).expect("to be read");
        let printed = std::io::read_to_string(reader).expect("text");
        (child.wait().expect("its end").success(), printed)
    }

    /// A shell as a DBA of this server has it: its programs in the path, its address in the environment.
    pub fn shell(&self) -> Command {
        let mut shell = Installation::get().program_of("/bin/bash");
        shell.env("PGHOST", "127.0.0.1").env("PGPORT", self.port.to_string()).env("PGUSER", "postgres");
        shell.env("PGDATA", &self.data).current_dir(self.base.path());
        shell
    }

    /// Puts lines before those of pg_hba.conf, and has the server read it.
    pub fn authenticate(&self, lines: &str) {
        let file = self.data.join("pg_hba.conf");
        let rest = fs::read_to_string(&file).expect("pg_hba.conf");
        fs::write(&file, format!("{lines}\n{rest}")).expect("pg_hba.conf to be written");
        self.reload();
    }

    /// `pg_dump --schema-only` of a database: the same text for the same schema.
    pub fn pg_dump_schema(&self, database: &str) -> String {
        let mut command = Installation::get().program("pg_dump");
        command.args(["--schema-only", "-h", "127.0.0.1", "-p", &self.port.to_string(), "-U", "postgres", database]);
        // Lines with a key that pg_dump draws anew each time.
        let random = |line: &&str| !line.starts_with("\\restrict ") && !line.starts_with("\\unrestrict ");
        run(command).lines().filter(random).fold(String::new(), |mut text, line| {
            let _ = writeln!(text, "{line}");
            text
        })
    }

    /// Arms one fault (`"<point> kill"`, `stop` or `error`), in a build with the feature `fault-points`.
    pub fn fault(&self, order: &str) {
        self.place("crossover_fault", order);
    }

    /// Whether the armed fault has not been reached yet.
    pub fn fault_is_armed(&self) -> bool {
        self.data.join("crossover_fault").exists()
    }

    /// Takes back a fault that was not reached; false when it was reached after all.
    pub fn disarm(&self) -> bool {
        fs::remove_file(self.data.join("crossover_fault")).is_ok()
    }

    /// Takes a named safety out of the replicator (feature `fault-points`), to see that a test notices.
    pub fn break_protocol(&self, what: &str) {
        self.place("crossover_break", what);
    }

    /// Writes a file into the data directory, whole or not at all.
    fn place(&self, name: &str, content: &str) {
        let aside = self.data.join(format!("{name}.new"));
        fs::write(&aside, content)
            .and_then(|()| fs::rename(&aside, self.data.join(name)))
            .expect("a file in the data directory");
    }

    /// What the server's log holds that no test may cause.
    pub fn findings(&self, crashes_expected: bool) -> Findings {
        Findings::of(&self.log_path(), crashes_expected)
    }

    /// The lines of the server's log, with their times.
    pub fn log_lines(&self) -> Vec<Line> {
        Line::all(&self.log_path())
    }

    /// The end of the server's log.
    pub fn log_tail(&self) -> String {
        format!("--- the end of the log of cluster {} ---\n{}", self.name, tail(&self.log_path(), 60))
    }

    /// Where the server logs to.
    pub fn log_path(&self) -> PathBuf {
        self.base.path().join("server.log")
    }

    /// A directory for the test's own files, readable by the server's user.
    pub fn scratch(&self) -> &Path {
        self.base.path()
    }

    fn pg_ctl(&self, verb: &str) -> Command {
        let mut command = Installation::get().program("pg_ctl");
        command.arg(verb).arg("-D").arg(&self.data).args(["-w", "-s"]);
        command
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("{}", self.log_tail());
        }
        if std::env::var_os("CROSSOVER_KEEP").is_some() {
            self.base.disable_cleanup(true);
            eprintln!("cluster {} is kept in {}", self.name, self.base.path().display());
        }
        self.resume();
        let mut command = self.pg_ctl("stop");
        let _ = command.args(["-m", "immediate"]).stdout(Stdio::null()).stderr(Stdio::null()).status();
    }
}

/// The SQLSTATE of an error; empty where it is none of the server's.
pub fn sqlstate(error: &postgres::Error) -> String {
    error.code().map(|c| c.code().to_owned()).unwrap_or_default()
}

/// An error with all that the server said.
pub fn explain(error: &postgres::Error) -> String {
    error.as_db_error().map_or_else(
        || format!("{error:?}"),
        |db| {
            let part = |label, text: Option<&str>| text.map_or_else(String::new, |t| format!("\n{label}: {t}"));
            format!(
                "{} {}{}{}{}",
                db.code().code(),
                db.message(),
                part("detail", db.detail()),
                part("hint", db.hint()),
                part("where", db.where_())
            )
        },
    )
}

/// A free port outside the range that outgoing connections take theirs from, so that it stays ours over a restart.
fn free_port() -> u16 {
    const FROM: u16 = 20_000;
    const COUNT: u16 = 10_000;
    static NEXT: AtomicU16 = AtomicU16::new(0);
    // Programs that are started one after the other, and run side by side, are to look for theirs far from each other.
    const APART: u32 = 7919;
    let start = u16::try_from(std::process::id().wrapping_mul(APART) % u32::from(COUNT)).expect("a remainder fits");
    (0..COUNT)
        .map(|_| FROM + (start + NEXT.fetch_add(1, Ordering::Relaxed)) % COUNT)
        .find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok())
        .expect("a free port")
}

//! `make demo`: a shop with more than a million rows moves to another server and another structure, while clients use it.
//!
//! Exits with an error when a client saw one, when a server's log holds a crash, or when the stores differ at the end.

mod clients;
mod report;

use std::io::Write;
use std::process::{ExitCode, Stdio};
use std::time::{Duration, Instant};

use pgrx_tests::Cluster;
use pgrx_tests::cluster::explain;
use pgrx_tests::installation::Installation;
use pgrx_tests::wait::for_a;
use postgres::Client;

use clients::Clients;
use report::{Lag, grouped};

const CUSTOMERS: u64 = 150_000;
const ORDERS: u64 = 350_000;

/// How long each state is stayed in.
const STAY: Duration = Duration::from_secs(5);
const SAMPLE: Duration = Duration::from_millis(250);

/// Clients of each shape, and the transactions a second that they offer: what two cores do beside the copy.
const FIRST_CLIENTS: (u32, u32) = (4, 250);
const SECOND_CLIENTS: (u32, u32) = (2, 80);

/// As a production server would be, but that nothing else needs the memory.
const SETTINGS: &[&str] = &["fsync = on", "shared_buffers = 256MB"];

type Failure = String;

struct Demo {
    first: Cluster,
    second: Cluster,
    /// For the calls of the operator.
    operator: Client,
    /// Applications of the old shape run from beginning to end, those of the new one while it is exposed.
    old: Option<Clients>,
    new: Option<Clients>,
    transactions: u64,
    errors: Vec<String>,
}

fn main() -> ExitCode {
    let start = Instant::now();
    match Demo::set_up().run() {
        Ok(transactions) => {
            let seconds = start.elapsed().as_secs();
            println!(
                "\n{} transactions, no client saw an error, and the stores are equal. {seconds} s.",
                grouped(transactions.cast_signed())
            );
            ExitCode::SUCCESS
        }
        Err(failure) => {
            eprintln!("\nFAILED: {failure}");
            ExitCode::FAILURE
        }
    }
}

impl Demo {
    fn set_up() -> Self {
        let mut settings = SETTINGS.to_vec();
        let second = Cluster::start_new("second", &settings);
        settings.push("shared_preload_libraries = 'pg_crossover'");
        let first = Cluster::start_new("first", &settings);

        println!("Two throwaway servers; a shop on the first one ...");
        psql(
            &first,
            include_str!("../../../demo/first.sql"),
            &[("customers", &CUSTOMERS.to_string()), ("orders", &ORDERS.to_string())],
        );
        psql(&second, include_str!("../../../demo/second.sql"), &[]);
        psql(
            &first,
            include_str!("../../../demo/foreign.sql"),
            &[
                ("second_host", "127.0.0.1"),
                ("second_port", &second.port().to_string()),
                ("second_dbname", "app"),
                ("second_user", "postgres"),
            ],
        );
        let mut operator = first.connect();
        operator.batch_execute("CREATE EXTENSION pg_crossover").unwrap_or_else(|e| panic!("{}", explain(&e)));
        for (server, tables) in [
            (&first, ["public.customer", "public.orders", "public.order_line"]),
            (&second, ["sales.client", "sales.purchase", "sales.item"]),
        ] {
            let counts = tables.map(|t| {
                let count = server.text(&format!("SELECT count(*) FROM {t}")).expect("a count");
                format!("{t} {} rows", grouped(count.parse().expect("a number")))
            });
            println!("  {:<6} server, port {}: {}", server.name(), server.port(), counts.join(", "));
        }
        println!(
            "  clients: pgbench, {} connections on the old shape all the time, {} on the new one while it is exposed\n",
            FIRST_CLIENTS.0, SECOND_CLIENTS.0
        );
        Self { first, second, operator, old: None, new: None, transactions: 0, errors: Vec::new() }
    }

    fn run(mut self) -> Result<u64, Failure> {
        self.start_old_clients();
        self.copy()?;
        for state in ["both", "second", "both", "first", "both", "second"] {
            self.switch(state)?;
        }

        // Equal at rest: the clients let go for a moment, and what they wrote has arrived.
        self.stop_clients();
        self.call("SELECT migration_wait('shop')")?;
        println!(
            "\nThe stores, compared by queries that know nothing of the mapping, after {} conflicts in \"both\":",
            self.conflicts()?
        );
        self.compare(
            "first",
            [
                ("customer", "public.customer__first"),
                ("orders", "public.orders__first"),
                ("order_line", "public.order_line__first"),
            ],
        )?;
        println!();

        self.start_old_clients();
        self.start_new_clients();
        self.call("SELECT migration_finish('shop')")?;
        self.stay("finished")?;
        self.stop_clients();
        println!("\nFinished: what applications of the old shape see, and the second store:");
        self.compare(
            "views",
            [("customer", "public.customer"), ("orders", "public.orders"), ("order_line", "public.order_line")],
        )?;

        for cluster in [&self.first, &self.second] {
            let findings = cluster.findings(false);
            if !findings.is_empty() {
                self.errors.push(format!("the log of the {} server:\n{findings}", cluster.name()));
            }
        }
        if self.errors.is_empty() { Ok(self.transactions) } else { Err(self.errors.join("\n")) }
    }

    /// Starts the migration and shows the copy until the state is `first`.
    fn copy(&mut self) -> Result<(), Failure> {
        self.operator
            .execute("SELECT migration_start('shop', $1::text::jsonb)", &[&include_str!("../../../demo/mapping.json")])
            .map_err(|e| explain(&e))?;
        let start = Instant::now();
        let mut next = start;
        loop {
            let row = self
                .operator
                .query_one(
                    "SELECT s.state::text, s.phase, p.copied, greatest(p.estimated, p.copied), s.last_error
                       FROM migration_status s, (SELECT sum(rows_copied)::bigint AS copied, sum(rows_estimated)::bigint AS estimated
                                                   FROM migration_progress WHERE name = 'shop') p
                      WHERE s.name = 'shop'",
                    &[],
                )
                .map_err(|e| explain(&e))?;
            let (state, phase): (String, String) = (row.get(0), row.get(1));
            let (copied, estimated): (i64, i64) = (row.get(2), row.get(3));
            let complete = state != "copying";
            if complete || Instant::now() >= next {
                next = Instant::now() + Duration::from_secs(1);
                let error: Option<String> = row.get(4);
                report::copy(copied, estimated, start.elapsed(), &phase, error.as_deref());
            }
            if complete {
                break;
            }
            if start.elapsed() > Duration::from_secs(300) {
                return Err("the copy did not end within five minutes".into());
            }
            for_a(SAMPLE);
        }
        println!();
        report::heading();
        self.line("copying", &Lag::default(), None)?;
        self.new_state();
        self.stay("first")
    }

    /// Takes the migration to `state` and shows how it does there.
    fn switch(&mut self, state: &str) -> Result<(), Failure> {
        if state == "first"
            && let Some(new) = self.new.take()
        {
            // The second store goes out of use: its applications are stopped, as an operator would.
            self.stop(new);
        }
        self.call(&format!("SELECT migration_set_state('shop', '{state}')"))?;
        self.new_state();
        if state != "first" && self.new.is_none() {
            self.start_new_clients();
        }
        self.stay(state)
    }

    /// Stays in a state for a while and prints its line.
    fn stay(&mut self, state: &str) -> Result<(), Failure> {
        let mut lag = Lag::default();
        let start = Instant::now();
        while start.elapsed() < STAY {
            for_a(SAMPLE);
            let row = self
                .operator
                .query_one("SELECT coalesce(backlog_rows, 0)::bigint, coalesce(backlog_seconds, 0)::float8 FROM migration_status WHERE name = 'shop'", &[])
                .map_err(|e| explain(&e))?;
            lag.sample(row.get(0), row.get(1));
        }
        let pause = self
            .operator
            .query_opt(
                "SELECT pause_ms::float8 FROM migration_history WHERE name = 'shop' AND to_state = $1::text::migration_state ORDER BY at DESC LIMIT 1",
                &[&state],
            )
            .map_err(|e| explain(&e))?
            .and_then(|row| row.get(0));
        self.line(state, &lag, pause)?;
        self.new_state();
        Ok(())
    }

    fn line(&mut self, state: &str, lag: &Lag, pause: Option<f64>) -> Result<(), Failure> {
        let both = [&self.old, &self.new].map(|c| c.as_ref().map(|c| (c.figures(), c.errors())));
        report::line(state, both, lag, pause);
        if both.iter().flatten().any(|(_, errors)| *errors > 0) {
            self.stop_clients();
            return Err(self.errors.join("\n"));
        }
        Ok(())
    }

    fn start_old_clients(&mut self) {
        let sizes = [("customers", CUSTOMERS), ("orders", ORDERS)];
        let (connections, rate) = FIRST_CLIENTS;
        self.old = Some(Clients::start(
            &self.first,
            "client-first",
            include_str!("../../../demo/client-first.sql"),
            connections,
            rate,
            &sizes,
        ));
    }

    fn start_new_clients(&mut self) {
        let sizes = [("customers", CUSTOMERS), ("orders", ORDERS)];
        let (connections, rate) = SECOND_CLIENTS;
        self.new = Some(Clients::start(
            &self.first,
            "client-second",
            include_str!("../../../demo/client-second.sql"),
            connections,
            rate,
            &sizes,
        ));
    }

    fn new_state(&mut self) {
        for clients in [&mut self.old, &mut self.new].into_iter().flatten() {
            clients.new_state();
        }
    }

    fn stop_clients(&mut self) {
        for clients in [self.old.take(), self.new.take()].into_iter().flatten() {
            self.stop(clients);
        }
    }

    fn stop(&mut self, clients: Clients) {
        let (transactions, errors) = clients.stop();
        self.transactions += transactions;
        self.errors.extend(errors);
    }

    /// Compares the relations on the first server with the tables of the second store, each read on its own server.
    fn compare(&self, left: &str, relations: [(&str, &str); 3]) -> Result<(), Failure> {
        let first = psql(&self.first, include_str!("../../../demo/compare-first.sql"), &relations);
        let second = psql(&self.second, include_str!("../../../demo/compare-second.sql"), &[]);
        let mut different = Vec::new();
        for (a, b) in first.lines().zip(second.lines()) {
            let fields = |line: &str| line.split('|').map(str::to_owned).collect::<Vec<_>>();
            let (a, b) = (fields(a), fields(b));
            let [what, rows, hash] = &a[..] else {
                return Err(format!("unexpected result of the comparison: {a:?}"));
            };
            println!(
                "  {what:<12} {:>9} rows   {left} {hash:>24}   second {:>24}   {}",
                grouped(rows.parse().unwrap_or(-1)),
                b[2],
                if a == b { "equal" } else { "DIFFERENT" }
            );
            if a != b {
                different.push(format!("{what} differ: {rows} rows against {}", b[1]));
            }
        }
        if first.lines().count() != 3 || second.lines().count() != 3 {
            different.push(format!("unexpected result of the comparison:\n{first}\n{second}"));
        }
        if different.is_empty() { Ok(()) } else { Err(different.join("\n")) }
    }

    fn conflicts(&mut self) -> Result<String, Failure> {
        let row = self.operator.query_one("SELECT count(*) FROM migration_conflicts WHERE name = 'shop'", &[]);
        Ok(grouped(row.map_err(|e| explain(&e))?.get(0)))
    }

    fn call(&mut self, statement: &str) -> Result<(), Failure> {
        self.operator.batch_execute(statement).map_err(|e| format!("{statement}\n{}", explain(&e)))
    }
}

/// Runs a script of psql with variables; it stops at the first error. Returns what it prints, unaligned.
fn psql(server: &Cluster, script: &str, variables: &[(&str, &str)]) -> String {
    let mut command = Installation::get().program("psql");
    command.args(["-XqAt", "-v", "ON_ERROR_STOP=1", "-f", "-", "-d", &server.url()]);
    command.args(variables.iter().flat_map(|(name, value)| ["-v".to_owned(), format!("{name}={value}")]));
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("psql to start");
    child.stdin.take().expect("psql's standard input").write_all(script.as_bytes()).expect("psql to read");
    let output = child.wait_with_output().expect("psql's end");
    assert!(output.status.success(), "a script of the demo failed on the {} server", server.name());
    String::from_utf8(output.stdout).expect("UTF-8")
}

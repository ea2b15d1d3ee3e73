//! The documentation is true: every example runs and prints what its page shows, and the reference is what the catalog says.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use pgrx_tests::cluster::{Stop, explain};
use pgrx_tests::docs::{self, Block, Item, Kind, Server};
use pgrx_tests::{Cluster, Migration, Pair};
use serde_json::{Value, json};

/// The only things in which what is run differs from what the page says: where the servers are.
const ADDRESSES: &[(&str, &str)] = &[("192.0.2.10", "127.0.0.1"), ("192.0.2.20", "127.0.0.1")];
/// The ports by which pages name the second server.
const PORTS: &[&str] = &["port '5432'", "port '5433'"];

/// The two servers of a page.
enum Servers {
    /// As initdb has left them.
    Bare(Cluster, Cluster),
    /// With the extension, and tables to migrate.
    Pair(Pair),
}

/// A page being followed from its top to its end.
struct Reader {
    servers: Servers,
    /// The page's database, on both servers.
    database: String,
    /// Of the second server's roles, as the page has set them.
    passwords: BTreeMap<String, String>,
}

impl Reader {
    fn new(fixture: &str) -> Self {
        let words: Vec<&str> = fixture.split_whitespace().collect();
        let (servers, database) = match words[..] {
            ["bare", database] => {
                let reader = Servers::Bare(Cluster::start_new("first", &[]), Cluster::start_new("second", &[]));
                (reader, database)
            }
            ["shop"] => (Servers::Pair(shop()), "app"),
            ["orders"] => (Servers::Pair(orders()), "app"),
            _ => panic!("no fixture is called \"{fixture}\""),
        };
        let reader = Self { servers, database: database.to_owned(), passwords: BTreeMap::new() };
        if database != "postgres" && database != "app" {
            reader.cluster(Server::First).psql_as(
                "postgres",
                "postgres",
                None,
                &format!("CREATE DATABASE {database}"),
                true,
            );
        }
        reader
    }

    fn cluster(&self, server: Server) -> &Cluster {
        let (first, second) = match &self.servers {
            Servers::Bare(first, second) => (first, second),
            Servers::Pair(pair) => (&pair.first, &pair.second),
        };
        if server == Server::First { first } else { second }
    }

    fn pair(&self) -> &Pair {
        let Servers::Pair(pair) = &self.servers else { panic!("the page has no migration of the test's own") };
        pair
    }

    /// What a page says with this test's addresses.
    fn adapted(&self, text: &str) -> String {
        let port = format!("port '{}'", self.cluster(Server::Second).port());
        let text = ADDRESSES.iter().fold(text.to_owned(), |text, (from, to)| text.replace(from, to));
        PORTS.iter().fold(text, |text, from| text.replace(from, &port))
    }

    /// `shop in STATE`: leads the migration of the fixture there, by a new start if the last one has ended. `second away` and `second back`.
    fn lead(&self, fixture: &str) {
        match fixture {
            "second away" => return self.cluster(Server::Second).stop(Stop::Fast),
            "second back" => return self.cluster(Server::Second).start(),
            _ => {}
        }
        let Some(state) = fixture.strip_prefix("shop in ") else { panic!("no fixture is called \"{fixture}\"") };
        let migration = Migration::named(self.pair(), "shop");
        let is = migration.try_status().map_or_else(|| "cancelled".to_owned(), |status| status.state());
        let way: &[&str] = match (is.as_str(), state) {
            ("cancelled", "none" | "cancelled") => &[],
            (_, "none") => panic!("the migration shop is there already"),
            ("finished", _) => panic!("the tables of the page have their new shape"),
            ("cancelled", _) => {
                Migration::start(self.pair(), "shop", &shop_mapping()).wait();
                return self.lead(fixture);
            }
            (is, to) if is == to => &[],
            ("copying", "first") => &[],
            ("first", "both") | ("second", "both") => &["both"],
            ("first", "second") => &["both", "second"],
            ("both", to) => &[if to == "first" { "first" } else { "second" }],
            ("second", "first") => &["both", "first"],
            (is, to) => panic!("there is no way from {is} to {to}"),
        };
        migration.wait();
        migration.walk(way);
    }

    fn run(&mut self, block: &Block) {
        let text = self.adapted(&block.text);
        match &block.kind {
            _ if block.exempt.is_some() => {}
            Kind::Picture => {}
            Kind::Sql { server, role, database, fails } => {
                let database = database.as_deref().unwrap_or(&self.database).to_owned();
                let password = self.passwords.get(role).filter(|_| *server == Server::Second).map(String::as_str);
                let (ok, printed) = self.cluster(*server).psql_as(role, &database, password, &text, !fails);
                let has_error = printed.lines().any(|l| l.starts_with("ERROR:") || l.starts_with("FATAL:"));
                assert!(ok, "{}: {printed}\n{}", block.place, self.cluster(*server).log_tail());
                assert_eq!(has_error, *fails, "{}: an error, or none where the page shows one: {printed}", block.place);
                self.compare(block, &printed);
                self.remember_passwords(*server, &text);
            }
            Kind::Shell { server } => {
                let printed = self.shell(*server, &text).unwrap_or_else(|e| panic!("{}: {e}", block.place));
                self.compare(block, &printed);
            }
            Kind::Conf { server, file } if file == "pg_hba.conf" => self.cluster(*server).authenticate(&text),
            Kind::Conf { server, .. } => {
                self.cluster(*server).configure(&text.lines().collect::<Vec<_>>());
                self.cluster(*server).restart(Stop::Fast);
            }
            Kind::Mapping => {
                let mapping: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", block.place));
                let migration = Migration::start(self.pair(), "example", &mapping);
                migration.wait();
                migration.walk(&["both", "second", "both", "first"]);
                migration.cancel();
            }
        }
    }

    fn compare(&self, block: &Block, printed: &str) {
        let Some(shown) = &block.output else { return };
        docs::is_as_shown(shown, printed)
            .unwrap_or_else(|e| panic!("{}:\n{e}\nall that was printed:\n{printed}", block.place));
    }

    fn shell(&self, server: Server, script: &str) -> Result<String, String> {
        let cluster = self.cluster(server);
        let mut shell = cluster.shell();
        shell.args(["-euo", "pipefail", "-c", script]).env("PGDATABASE", &self.database);
        let out = shell.output().map_err(|e| e.to_string())?;
        let printed = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
        if out.status.success() { Ok(printed) } else { Err(printed) }
    }

    fn remember_passwords(&mut self, server: Server, text: &str) {
        for statement in text.split(';').filter(|_| server == Server::Second) {
            let words: Vec<&str> = statement.split_whitespace().collect();
            if let ["CREATE", "ROLE", role, "LOGIN", "PASSWORD", password] = words[..] {
                self.passwords.insert(role.to_owned(), password.trim_matches('\'').to_owned());
            }
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        if let Servers::Bare(first, second) = &self.servers
            && !std::thread::panicking()
        {
            for cluster in [first, second] {
                let findings = cluster.findings(false);
                assert!(findings.is_empty(), "in the log of cluster {}: {findings}", cluster.name());
            }
        }
    }
}

/// Follows a page. What comes before its first fixture must need no server.
fn follow(page: &str) {
    let text = fs::read_to_string(docs::root().join(page)).unwrap_or_else(|e| panic!("{page}: {e}"));
    let mut reader: Option<Reader> = None;
    for item in docs::items(page, &text).unwrap_or_else(|e| panic!("{e}")) {
        match item {
            Item::Fixture(fixture) => match &reader {
                Some(reader) if fixture.starts_with("shop in ") || fixture.starts_with("second ") => {
                    reader.lead(&fixture)
                }
                _ => reader = Some(Reader::new(&fixture)),
            },
            Item::Block(block) if block.kind == Kind::Picture => {}
            Item::Block(block) => {
                let reader = reader.as_mut().unwrap_or_else(|| panic!("{}: no fixture before this block", block.place));
                let began = std::time::Instant::now();
                reader.run(&block);
                println!("{} took {:.1?}", block.place, began.elapsed());
            }
        }
    }
}

/// The tables of the pages, with rows.
fn shop() -> Pair {
    let pair = Pair::new();
    pair.second_store(
        "v2",
        "CREATE TABLE client (client_id bigint PRIMARY KEY, full_name text NOT NULL, balance numeric(14,2) NOT NULL);
         CREATE TABLE tag (id bigint PRIMARY KEY, label text)",
    );
    pair.first.sql(
        "CREATE TABLE public.customer (id bigserial PRIMARY KEY, first_name text NOT NULL, last_name text NOT NULL,
             balance_cents bigint NOT NULL DEFAULT 0);
         INSERT INTO customer (first_name, last_name, balance_cents) SELECT 'Ada', 'Lovelace ' || n, n FROM generate_series(1, 1000) AS n;
         CREATE ROLE new_owner LOGIN SUPERUSER;
         CREATE TABLE public.tag (id bigint PRIMARY KEY, label text);
         INSERT INTO tag SELECT n, 'blue' FROM generate_series(1, 1000) AS n",
    );
    pair
}

fn shop_mapping() -> Value {
    json!({"tables": [{
        "first": "public.customer", "second": "v2.client", "second_view": "public.client",
        "forward": {"client_id": "id", "full_name": "first_name || ' ' || last_name", "balance": "balance_cents / 100.0"},
        "backward": {
            "first_name": "split_part(full_name, ' ', 1)",
            "last_name": "substr(full_name, strpos(full_name, ' ') + 1)",
            "balance_cents": "round(balance * 100)::bigint",
        },
    }, {"first": "public.tag", "second": "v2.tag"}]})
}

/// The table of the page on mappings.
fn orders() -> Pair {
    let pair = Pair::new();
    pair.second_store(
        "v2",
        "CREATE TABLE purchase (purchase_id bigint PRIMARY KEY, state text NOT NULL, street text, city text)",
    );
    pair.first.sql(
        "CREATE TYPE public.order_status AS ENUM ('open', 'paid');
         CREATE TABLE public.orders (order_id bigserial PRIMARY KEY, status order_status NOT NULL, ship_to text NOT NULL);
         INSERT INTO orders (status, ship_to) VALUES ('open', '1 Main St, Springfield'), ('paid', '2 Side St, Shelbyville')",
    );
    pair
}

#[test]
fn the_readme_runs() {
    follow("README.md");
}

#[test]
fn the_quick_start_runs() {
    follow("docs/quickstart.md");
}

#[test]
fn the_operating_guide_runs() {
    follow("docs/operations.md");
}

#[test]
fn the_limits_are_as_the_page_says() {
    follow("docs/limits.md");
}

#[test]
fn the_concepts_run() {
    follow("docs/concepts.md");
}

#[test]
fn the_mappings_of_the_page_are_accepted() {
    follow("docs/mapping.md");
}

#[test]
fn the_examples_of_the_reference_run() {
    follow("docs/reference.md");
}

/// A page that is added here is one that a test above has to follow.
#[test]
fn every_page_is_followed() {
    let source = fs::read_to_string(docs::root().join("pgrx-tests/tests/cluster/docs.rs")).expect("this file");
    for page in docs::pages() {
        let name = page.strip_prefix(docs::root()).expect("a page of ours").display().to_string();
        assert!(source.contains(&format!("follow(\"{name}\");")), "no test follows {name}");
        let text = fs::read_to_string(&page).expect("a page");
        docs::items(&name, &text).unwrap_or_else(|e| panic!("{e}"));
    }
}

/// Links between the pages lead to what is there, headings included.
#[test]
fn no_link_is_dead() {
    let mut anchors: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let pages = docs::pages();
    let name = |page: &std::path::Path| page.file_name().expect("a file").to_string_lossy().into_owned();
    for page in &pages {
        let text = fs::read_to_string(page).expect("a page");
        anchors.insert(name(page), text.lines().filter(|l| l.starts_with('#')).map(anchor).collect());
    }
    for page in &pages {
        let text = fs::read_to_string(page).expect("a page");
        for target in text.split("](").skip(1).filter_map(|t| t.split(')').next()) {
            if target.starts_with("http") {
                continue;
            }
            let (file, heading) = target.split_once('#').map_or((target, None), |(f, h)| (f, Some(h)));
            let at = if file.is_empty() { page.clone() } else { page.parent().expect("a directory").join(file) };
            assert!(at.exists(), "{}: there is no {target}", page.display());
            if let Some(heading) = heading {
                assert!(anchors[&name(&at)].contains(heading), "{}: no heading for {target}", page.display());
            }
        }
    }
}

/// A heading as GitHub makes a link of it.
fn anchor(heading: &str) -> String {
    let text = heading.trim_start_matches('#').trim().to_lowercase();
    text.chars().filter(|c| c.is_alphanumeric() || "-_ ".contains(*c)).map(|c| if c == ' ' { '-' } else { c }).collect()
}

/// The lines of a page below a heading, up to the next heading of its level.
fn section<'a>(text: &'a str, heading: &str) -> Vec<&'a str> {
    let level = heading.chars().take_while(|c| *c == '#').count();
    let ends = |line: &str| line.starts_with('#') && line.chars().take_while(|c| *c == '#').count() <= level;
    let mut lines = text.lines().skip_while(|line| *line != heading);
    assert!(lines.next().is_some(), "no heading \"{heading}\"");
    lines.take_while(|line| !ends(line)).collect()
}

/// The rows of the tables among some lines, as cells, without their heads.
fn rows(lines: &[&str]) -> Vec<Vec<String>> {
    let table = lines.iter().filter_map(|line| line.strip_prefix("| ")?.strip_suffix('|'));
    let mut rows: Vec<Vec<String>> =
        table.map(|row| row.split('|').map(|cell| cell.trim().to_owned()).collect()).collect();
    rows.retain(|row| {
        !["function", "option", "key", "column", "phase", "setting", "SQLSTATE"].contains(&row[0].as_str())
    });
    rows
}

/// What stands in backquotes.
fn quoted(text: &str) -> Vec<String> {
    text.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

fn reference() -> String {
    fs::read_to_string(docs::root().join("docs/reference.md")).expect("the reference")
}

/// The first cells of a section's tables, unquoted.
fn names(text: &str, heading: &str) -> Vec<String> {
    rows(&section(text, heading)).iter().flat_map(|row| quoted(&row[0])).collect()
}

/// In the catalog, pg_get_function_arguments has its own way to write a default: so the server reads the page's, too.
#[test]
fn the_reference_is_the_catalog() {
    let pair = Pair::new();
    let (page, first) = (reference(), &pair.first);

    let arguments = |schema: &str| {
        first.list(&format!(
            "SELECT proname || '(' || pg_get_function_arguments(oid) || ')' FROM pg_proc
              WHERE pronamespace = '{schema}'::regnamespace AND proname ^@ 'migration_' ORDER BY 1"
        ))
    };
    first.sql("CREATE SCHEMA page");
    for signature in names(&page, "## Functions") {
        first.sql(&format!("CREATE FUNCTION page.{signature} RETURNS int LANGUAGE sql RETURN 1"));
    }
    assert_eq!(arguments("page"), arguments("public"), "functions");

    let values = section(&page, "## Functions").into_iter().find(|line| line.contains("is an enum: "));
    let values = quoted(values.expect("the enum's values").split("is an enum: ").last().expect("a list"));
    assert_eq!(values, first.list("SELECT unnest(enum_range(NULL::migration_state))"), "states");

    let views = first.list(
        "SELECT relname FROM pg_class WHERE relkind = 'v' AND relnamespace = 'public'::regnamespace AND relname ^@ 'migration_' ORDER BY 1",
    );
    let headings: BTreeSet<String> =
        section(&page, "## Views").iter().filter_map(|line| line.strip_prefix("### ").map(str::to_owned)).collect();
    assert_eq!(headings.into_iter().collect::<Vec<_>>(), views, "views");
    for view in views {
        let columns = first.list(&format!(
            "SELECT attname FROM pg_attribute WHERE attrelid = '{view}'::regclass AND attnum > 0 ORDER BY attnum"
        ));
        assert_eq!(names(&page, &format!("### {view}")), columns, "columns of {view}");
    }

    let settings: Vec<String> =
        rows(&section(&page, "## Settings")).iter().map(|row| row[..4].join("|").replace('`', "")).collect();
    let query = "SELECT concat_ws('|', name, boot_val, coalesce(unit, ''), context) FROM pg_settings WHERE name ^@ 'crossover.' ORDER BY name";
    assert_eq!(settings, first.list(query), "settings");

    let allowed = |mapping: &Value, options: &Value| {
        let refused = Migration::named(&pair, "none").try_start(mapping, options).expect_err("a refusal");
        let said = explain(&refused);
        let keys = said.split("allowed here: ").nth(1).and_then(|rest| rest.split('.').next());
        let keys = keys.unwrap_or_else(|| panic!("no list of keys: {said}")).split(", ").map(str::to_owned);
        keys.collect::<BTreeSet<String>>()
    };
    let options = as_set(&names(&page, "## Options of `migration_start`"));
    assert_eq!(options, allowed(&shop_mapping(), &json!({"nonsense": 1})), "options");
    let page = fs::read_to_string(docs::root().join("docs/mapping.md")).expect("the page on mappings");
    let keys = as_set(&names(&page, "# The mapping"));
    assert_eq!(keys, allowed(&json!({"tables": [{"nonsense": 1}]}), &json!({})), "keys of a table in a mapping");
}

/// What only the source says: the errors that it raises, and the phases.
#[test]
fn the_reference_has_every_error_and_phase() {
    let source = |file: &str| fs::read_to_string(docs::root().join("src").join(file)).expect("a source file");
    let body = |file: &str, function: &str| {
        let text = source(file);
        let from = text.find(function).unwrap_or_else(|| panic!("{file} has no {function}"));
        text[from..].split("\n    }\n").next().expect("a body").to_owned()
    };
    let literals = |body: &str| -> BTreeSet<String> { body.split('"').skip(1).step_by(2).map(str::to_owned).collect() };
    let page = reference();
    let errors: Vec<String> = rows(&section(&page, "## Errors")).iter().map(|row| row[0].clone()).collect();
    let mut raised = literals(&body("error.rs", "pub fn sqlstate("));
    assert!(raised.len() > 10, "{raised:?}");
    // Only where faults are injected.
    assert!(raised.remove("58000"));
    // DROP DATABASE; and what triggers raise.
    raised.extend(["55006", "0A000", "25006", "40001"].map(str::to_owned));
    assert_eq!(as_set(&errors), raised);

    // Not a phase of the source's: the view says it of a migration in any of them.
    let phases = source("state.rs");
    let phases = phases.split("impl Phase").nth(1).expect("phases");
    let mut phases = literals(phases.split("impl FromStr").next().expect("words"));
    phases.insert("diverged".to_owned());
    assert_eq!(as_set(&names(&page, "## Phases")), phases);
    // And the operating guide says what to do in each of them, and about each error.
    let guide = fs::read_to_string(docs::root().join("docs/operations.md")).expect("the guide");
    assert_eq!(as_set(&names(&guide, "### Phases")), phases, "phases in the guide");
    let codes: Vec<String> = rows(&section(&guide, "### Errors")).iter().map(|row| row[0].clone()).collect();
    assert_eq!(as_set(&codes), raised, "errors in the guide");
}

fn as_set(names: &[String]) -> BTreeSet<String> {
    let set: BTreeSet<String> = names.iter().cloned().collect();
    set
}

/// What a migration makes on either server says what it is, in `\d+` and `\df+`.
#[test]
fn all_that_a_migration_makes_has_a_comment() {
    let pair = shop();
    let migration = Migration::start(&pair, "shop", &shop_mapping());
    migration.wait();
    migration.walk(&["both", "second"]);
    let uncommented = |schema: &str| {
        format!(
            "SELECT c.oid::regclass::text FROM pg_class c WHERE relnamespace = '{schema}'::regnamespace AND relkind IN ('r', 'p', 'v')
                AND obj_description(c.oid, 'pg_class') IS NULL
             UNION ALL SELECT p.oid::regprocedure::text FROM pg_proc p WHERE pronamespace = '{schema}'::regnamespace AND obj_description(p.oid, 'pg_proc') IS NULL
             UNION ALL SELECT nspname FROM pg_namespace n WHERE nspname = '{schema}' AND obj_description(n.oid, 'pg_namespace') IS NULL"
        )
    };
    assert_eq!(pair.first.list(&uncommented("crossover")), Vec::<String>::new());
    assert_eq!(pair.second.list(&uncommented("crossover_peer")), Vec::<String>::new());
    let theirs =
        "SELECT count(*) FROM pg_proc WHERE proname ~ '__write$' AND obj_description(oid, 'pg_proc') IS NOT NULL";
    assert_eq!(pair.first.text(theirs).as_deref(), Some("1"));
    migration.walk(&["both", "first"]);
    migration.cancel();
}

/// In the ordinary case a row of every view fits the screen, in each state.
#[test]
fn psql_needs_no_x() {
    const SCREEN: usize = 140;
    let pair = shop();
    let migration = Migration::start(&pair, "crm", &shop_mapping());
    let look = |state: &str, views: &[&str]| {
        for view in views {
            let (_, printed) =
                pair.first.psql_as("postgres", "app", None, &format!("SELECT * FROM migration_{view};"), true);
            let widest = printed.lines().map(|line| line.trim_end().chars().count()).max().unwrap_or(0);
            assert!(
                printed.contains("crm") && widest <= SCREEN,
                "{view} in {state} is {widest} columns wide:\n{printed}"
            );
        }
    };
    look("copying", &["status", "progress", "details", "history"]);
    migration.wait();
    for state in ["both", "second", "both", "first", "both", "second"] {
        migration.set_state(state);
        look(state, &["status", "progress", "details", "history"]);
    }
    migration.call("pause");
    look("second, paused", &["status"]);
    migration.call("resume");
    migration.finish();
    look("finished", &["status", "progress", "details", "history"]);
}

/// What docs/limits.md says of two sessions at a time.
#[test]
fn transactions_on_two_servers_are_as_the_limits_say() {
    let pair = shop();
    let migration = Migration::start(&pair, "shop", &shop_mapping());
    migration.wait();
    migration.walk(&["both", "second"]);
    pair.first.sql("CREATE TABLE doctor (id int PRIMARY KEY, on_call boolean NOT NULL); INSERT INTO doctor VALUES (1, true), (2, true)");
    let (mut a, mut b) = (pair.first.connect(), pair.first.connect());
    let cents = |client: &mut postgres::Client| -> i64 {
        client.query_one("SELECT balance_cents FROM customer WHERE id = 7", &[]).expect("a row").get(0)
    };
    let code = |result: Result<(), postgres::Error>| result.err().and_then(|e| e.code().map(|c| c.code().to_owned()));

    // The second server commits first: write skew on a table of the first server alone.
    for client in [&mut a, &mut b] {
        client
            .batch_execute("BEGIN ISOLATION LEVEL SERIALIZABLE; SELECT count(*) FROM doctor WHERE on_call")
            .expect("a transaction");
    }
    a.batch_execute("UPDATE doctor SET on_call = false WHERE id = 1").expect("an update");
    b.batch_execute(
        "UPDATE doctor SET on_call = false WHERE id = 2; UPDATE customer SET balance_cents = 4711 WHERE id = 7",
    )
    .expect("updates");
    a.batch_execute("COMMIT").expect("a commit");
    assert_eq!(code(b.batch_execute("COMMIT")).as_deref(), Some("40001"));
    assert_eq!(
        (cents(&mut a), pair.first.text("SELECT on_call FROM doctor WHERE id = 2").as_deref()),
        (4711, Some("t"))
    );

    // SKIP LOCKED and NOWAIT wait.
    a.batch_execute("BEGIN; UPDATE customer SET balance_cents = 0 WHERE id = 7").expect("an update");
    for how in ["SKIP LOCKED", "NOWAIT"] {
        let query = format!("SET statement_timeout = '300ms'; SELECT FROM customer WHERE id = 7 FOR UPDATE {how}");
        assert_eq!(code(b.batch_execute(&query)).as_deref(), Some("57014"), "{how}");
    }
    a.batch_execute("ROLLBACK").expect("a rollback");
    b.batch_execute("RESET statement_timeout").expect("a reset");

    // Snapshots.
    let write = |value: i64| pair.first.sql(&format!("UPDATE customer SET balance_cents = {value} WHERE id = 7"));
    a.batch_execute("BEGIN").expect("a transaction");
    assert_eq!(cents(&mut a), 4711);
    write(1);
    assert_eq!(cents(&mut a), 1);
    a.batch_execute("COMMIT; SET crossover.remote_isolation = 'repeatable read'; BEGIN").expect("a transaction");
    assert_eq!(cents(&mut a), 1);
    write(2);
    assert_eq!(cents(&mut a), 1);
    assert_eq!(code(a.batch_execute("UPDATE customer SET balance_cents = 3 WHERE id = 7")).as_deref(), Some("40001"));
    a.batch_execute(
        "ROLLBACK; RESET crossover.remote_isolation; BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT FROM doctor",
    )
    .expect("a transaction");
    pair.first.sql("UPDATE doctor SET on_call = false; UPDATE customer SET balance_cents = 5 WHERE id = 7");
    let local: bool = a.query_one("SELECT bool_or(on_call) FROM doctor", &[]).expect("a row").get(0);
    assert_eq!((cents(&mut a), local), (5, true), "the second server's snapshot is taken when it is first needed");
    write(6);
    assert_eq!(cents(&mut a), 5);
    a.batch_execute("COMMIT").expect("a commit");

    // A connection for each backend that has used the second store. The name keeps other sessions' connections apart,
    // which end a moment after their session.
    let name = "one of five clients";
    let connections = format!("SELECT count(*) FROM pg_stat_activity WHERE application_name = '{name}'");
    let count = || pair.second.text(&connections).and_then(|n| n.parse::<i64>().ok()).expect("a number");
    let mut clients: Vec<_> = (0..5).map(|_| pair.first.connect()).collect();
    for client in &mut clients {
        client.batch_execute(&format!("SET postgres_fdw.application_name = '{name}'")).expect("a setting");
        client.query("SELECT FROM doctor", &[]).expect("rows of the first store");
    }
    assert_eq!(count(), 0);
    for client in &mut clients {
        cents(client);
    }
    assert_eq!(count(), 5);
}

/// The arrows of the picture are the moves that the extension knows, each with its call.
#[test]
fn the_picture_of_the_states_is_true() {
    let page = fs::read_to_string(docs::root().join("docs/concepts.md")).expect("the concepts");
    let picture = page.split("```mermaid").nth(1).and_then(|t| t.split("```").next()).expect("a picture");
    let drawn: BTreeSet<(String, String, &str)> = picture
        .lines()
        .filter(|line| !line.contains("[*]"))
        .filter_map(|line| {
            let (arrow, call) = line.split_once(" : ")?;
            let (from, to) = arrow.split_once(" --> ")?;
            let by = ["SetState", "Finish", "Cancel"];
            let calls = ["migration_set_state", "migration_finish", "migration_cancel"];
            let by = calls.iter().position(|c| call.starts_with(c)).map_or("Itself", |i| by[i]);
            Some((from.trim().to_owned(), to.trim().to_owned(), by))
        })
        .collect();
    let source = fs::read_to_string(docs::root().join("src/state.rs")).expect("the states");
    let table = source.split("TRANSITIONS: ").nth(1).and_then(|t| t.split("];").next()).expect("the table");
    let known: BTreeSet<(String, String, &str)> = table
        .lines()
        .filter_map(|line| {
            let words: Vec<&str> = line.trim().strip_prefix('(')?.strip_suffix("),")?.split(", ").collect();
            let [from, to, by] = words[..] else { return None };
            Some((from.to_lowercase(), to.to_lowercase(), by.strip_prefix("By::")?))
        })
        .collect();
    assert_eq!(drawn, known);
    assert!(known.len() > 8, "{known:?}");
}

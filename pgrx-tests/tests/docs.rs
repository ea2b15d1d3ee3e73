//! The documentation is true: every example runs and prints what its page shows, and the reference is what the catalog says.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use pgrx_tests::cluster::Stop;
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
            reader.cluster(Server::First).psql_as("postgres", "postgres", None, &format!("CREATE DATABASE {database}"), true);
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

    /// `shop in STATE`: leads the migration of the fixture there, by a new start if the last one has ended.
    fn lead(&self, fixture: &str) {
        let Some(state) = fixture.strip_prefix("shop in ") else { panic!("no fixture is called \"{fixture}\"") };
        let migration = Migration::named(self.pair(), "shop");
        let is = migration.try_status().map_or_else(|| "cancelled".to_owned(), |status| status.state());
        let way: &[&str] = match (is.as_str(), state) {
            ("cancelled", "none" | "cancelled") => &[],
            (_, "none") => panic!("the migration shop is there already"),
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
        docs::is_as_shown(shown, printed).unwrap_or_else(|e| panic!("{}:\n{e}\nall that was printed:\n{printed}", block.place));
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
                Some(reader) if fixture.starts_with("shop in ") => reader.lead(&fixture),
                _ => reader = Some(Reader::new(&fixture)),
            },
            Item::Block(block) if block.kind == Kind::Picture => {}
            Item::Block(block) => {
                reader.as_mut().unwrap_or_else(|| panic!("{}: no fixture before this block", block.place)).run(&block);
            }
        }
    }
}

/// The table of the pages, with rows.
fn shop() -> Pair {
    let pair = Pair::new();
    pair.second_store(
        "v2",
        "CREATE TABLE client (client_id bigint PRIMARY KEY, full_name text NOT NULL, balance numeric(14,2) NOT NULL)",
    );
    pair.first.sql(
        "CREATE TABLE public.customer (id bigserial PRIMARY KEY, first_name text NOT NULL, last_name text NOT NULL,
             balance_cents bigint NOT NULL DEFAULT 0);
         INSERT INTO customer (first_name, last_name, balance_cents) SELECT 'Ada', 'Lovelace ' || n, n FROM generate_series(1, 1000) AS n",
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
    }]})
}

/// The table of the page on mappings.
fn orders() -> Pair {
    let pair = Pair::new();
    pair.second_store("v2", "CREATE TABLE purchase (purchase_id bigint PRIMARY KEY, state text NOT NULL, street text, city text)");
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
    let source = fs::read_to_string(docs::root().join("pgrx-tests/tests/docs.rs")).expect("this file");
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

//! The token check: clients on both stores append unique tokens to the same few rows, insert and delete them, and keep a ledger of what was
//! acknowledged. At rest every acknowledged token is in a store, in a conflict's image, or was in a row that somebody deleted.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use postgres::error::SqlState;
use postgres::{Client, Config, Error, NoTls};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};

use crate::cluster::{Cluster, explain};
use crate::migration::{Migration, is_disconnect};
use crate::pair::Pair;
use crate::wait::{LONG, beat, until};
use crate::writers::writer;

/// Few rows, so that the clients meet.
const KEYS: i32 = 12;

/// Creates the table and its counterpart, of another shape: an expression either way.
pub fn create(pair: &Pair) {
    pair.first.sql("CREATE TABLE trail (id integer PRIMARY KEY, trail text NOT NULL)");
    pair.second_store("rail", "CREATE TABLE path (ident integer PRIMARY KEY, path text NOT NULL)");
}

/// The entry of the mapping's `tables`.
pub fn mapping() -> Value {
    json!({
        "first": "public.trail", "second": "rail.path", "second_view": "public.path",
        "forward": {"ident": "id", "path": "'<' || trail || '>'"},
        "backward": {"trail": "substr(path, 2, length(path) - 2)"}
    })
}

/// One way to reach the rows.
#[derive(Clone)]
pub struct Door {
    config: Config,
    /// Parameters: key, token.
    append: String,
    /// Parameters: key, token.
    insert: String,
    /// Parameter: key. Returns the trail.
    delete: String,
}

impl Door {
    /// The table of the first shape under its own name, on the first server.
    pub fn first(pair: &Pair) -> Self {
        Self {
            config: writer(&pair.first),
            append: "UPDATE trail SET trail = trail || $2 WHERE id = $1".into(),
            insert: "INSERT INTO trail (id, trail) VALUES ($1, $2)".into(),
            delete: "DELETE FROM trail WHERE id = $1 RETURNING trail".into(),
        }
    }

    /// The view of the second shape, on the first server.
    pub fn second_view(pair: &Pair) -> Self {
        Self::of_the_second_shape(writer(&pair.first), "public.path")
    }

    /// The table on the second server itself.
    pub fn second(pair: &Pair) -> Self {
        Self::of_the_second_shape(writer(&pair.second), "rail.path")
    }

    fn of_the_second_shape(config: Config, table: &str) -> Self {
        Self {
            config,
            append: format!("UPDATE {table} SET path = left(path, -1) || $2 || '>' WHERE ident = $1"),
            insert: format!("INSERT INTO {table} (ident, path) VALUES ($1, '<' || $2 || '>')"),
            delete: format!("DELETE FROM {table} WHERE ident = $1 RETURNING substr(path, 2, length(path) - 2)"),
        }
    }
}

/// What the clients were told.
#[derive(Default)]
struct Ledger {
    /// Acknowledged tokens.
    acked: HashSet<String>,
    /// How many each client has got.
    acked_by: HashMap<String, usize>,
    /// Rows that were deleted, with their trail; and whether the commit was acknowledged.
    deleted: Vec<(i32, String, bool)>,
    /// Errors that no client should see.
    errors: Vec<String>,
}

/// Clients that append, insert and delete until they are stopped, over lost connections if need be.
pub struct Tokens {
    stop: Arc<AtomicBool>,
    ledger: Arc<Mutex<Ledger>>,
    threads: Vec<JoinHandle<()>>,
}

/// What a check has found, when it has found nothing wrong.
#[derive(Debug)]
pub struct Summary {
    /// Acknowledged tokens.
    pub tokens: usize,
    /// Deleted rows.
    pub deletes: usize,
    /// Recorded conflicts.
    pub conflicts: usize,
}

impl Tokens {
    /// Starts one client per door. The seed makes the clients' choices repeatable, not their timing.
    pub fn start(doors: &[Door], seed: u64) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let ledger = Arc::new(Mutex::new(Ledger::default()));
        let threads = doors
            .iter()
            .enumerate()
            .map(|(number, door)| {
                let (door, stop, ledger) = (door.clone(), Arc::clone(&stop), Arc::clone(&ledger));
                let name = format!("{seed}.{number}");
                let rng = StdRng::seed_from_u64(seed.wrapping_mul(1000) + number as u64);
                thread::spawn(move || client(&name, &door, rng, &stop, &ledger))
            })
            .collect();
        Self { stop, ledger, threads }
    }

    /// Waits until `count` more tokens were acknowledged: the clients work, through whatever is being done to the servers.
    pub fn until_acked(&self, count: usize) {
        let goal = lock(&self.ledger).acked.len() + count;
        until("the clients of the token check have done their work", LONG, || lock(&self.ledger).acked.len() >= goal);
    }

    /// Waits until `count` tokens have been acknowledged since the start.
    pub fn until_acked_in_all(&self, count: usize) {
        until("the clients of the token check have done enough", LONG, || lock(&self.ledger).acked.len() >= count);
    }

    /// Waits until each client has got a token acknowledged since now, whatever had become of its connection.
    pub fn until_each_acked(&self) {
        let before = lock(&self.ledger).acked_by.clone();
        until("each client of the token check works", LONG, || {
            let now = lock(&self.ledger).acked_by.clone();
            now.len() == self.threads.len() && now.iter().all(|(name, count)| before.get(name) < Some(count))
        });
    }

    /// Ends the clients.
    pub fn stop(mut self) -> Stopped {
        self.join();
        Stopped { ledger: std::mem::take(&mut *lock(&self.ledger)) }
    }

    fn join(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Drop for Tokens {
    fn drop(&mut self) {
        self.join();
    }
}

/// The ledger of clients that have ended.
pub struct Stopped {
    ledger: Ledger,
}

impl Stopped {
    /// Compares both stores, at rest, with each other and with the ledger. `first_table` is the first store's table now.
    ///
    /// # Errors
    /// All that is wrong, in words.
    pub fn check(&self, pair: &Pair, migration: &Migration, first_table: &str) -> Result<Summary, String> {
        let mut wrong = self.ledger.errors.clone();
        let first = rows(&mut pair.first.connect_soon(), &format!("SELECT id, trail FROM {first_table}"));
        let query = "SELECT ident, substr(path, 2, length(path) - 2) FROM rail.path";
        let second = rows(&mut pair.second.connect_soon(), query);
        let conflicts = migration.conflicts();
        if first != second {
            let differ = |key: &i32| first.get(key) != second.get(key);
            let keys: Vec<i32> = (0..KEYS).filter(differ).collect();
            wrong.push(format!("the stores differ in the rows {keys:?}"));
        }

        for (store, rows) in [("first", &first), ("second", &second)] {
            let mut once = HashSet::new();
            let twice: Vec<&str> =
                rows.values().flat_map(|trail| tokens_of(trail)).filter(|t| !once.insert(*t)).collect();
            if !twice.is_empty() {
                wrong.push(format!("tokens are in the {store} store twice: {twice:?}"));
            }
        }

        let mut seen: HashSet<&str> = HashSet::new();
        let deleted = &self.ledger.deleted;
        let trails = first.values().chain(second.values()).chain(deleted.iter().map(|(_, trail, _)| trail));
        trails.for_each(|trail| seen.extend(tokens_of(trail)));
        let mut images = Vec::new();
        conflicts.iter().for_each(|c| strings_in(&c["first_image"], &mut images));
        conflicts.iter().for_each(|c| strings_in(&c["second_image"], &mut images));
        images.iter().for_each(|image| seen.extend(tokens_of(image)));
        let lost: Vec<_> = self.ledger.acked.iter().filter(|token| !seen.contains(token.as_str())).collect();
        if !lost.is_empty() {
            let some: Vec<_> = lost.iter().take(5).collect();
            wrong.push(format!("{} acknowledged tokens are lost, such as {some:?}", lost.len()));
        }

        // A row that somebody deleted may come back only as the winner of a conflict with that delete.
        let undeleted: HashSet<i32> = conflicts
            .iter()
            .filter(|c| c["first_image"].is_null() || c["second_image"].is_null())
            .filter_map(|c| key_of(&c["key"]))
            .collect();
        for (key, trail, acked) in deleted {
            let last = tokens_of(trail).last();
            let back = last.is_some_and(|last| first.get(key).is_some_and(|row| tokens_of(row).any(|t| t == last)));
            if *acked && back && !undeleted.contains(key) {
                wrong.push(format!("the row {key} came back after its delete, with {last:?}"));
            }
        }
        if wrong.is_empty() {
            Ok(Summary { tokens: self.ledger.acked.len(), deletes: deleted.len(), conflicts: conflicts.len() })
        } else {
            Err(wrong.join("\n"))
        }
    }
}

impl Stopped {
    /// Checks a store that stands alone, after a migration's end: `query` gives its keys and trails.
    ///
    /// # Panics
    /// With what is lost, or there twice.
    pub fn check_alone(&self, cluster: &Cluster, query: &str) {
        assert!(self.ledger.errors.is_empty(), "clients saw errors: {:#?}", self.ledger.errors);
        let rows = rows(&mut cluster.connect_soon(), query);
        let mut seen = HashSet::new();
        let twice: Vec<&str> = rows.values().flat_map(|trail| tokens_of(trail)).filter(|t| !seen.insert(*t)).collect();
        assert!(twice.is_empty(), "tokens are there twice: {twice:?}");
        self.ledger.deleted.iter().for_each(|(_, trail, _)| seen.extend(tokens_of(trail)));
        let lost: Vec<_> = self.ledger.acked.iter().filter(|token| !seen.contains(token.as_str())).take(5).collect();
        assert!(lost.is_empty(), "acknowledged tokens are lost, such as {lost:?}");
    }
}

fn client(name: &str, door: &Door, mut rng: StdRng, stop: &AtomicBool, ledger: &Mutex<Ledger>) {
    const ENOUGH: usize = 10;
    let mut connection: Option<Client> = None;
    let mut count = 0_u64;
    while !stop.load(Ordering::Relaxed) {
        let token = format!("{name}.{count}");
        count += 1;
        let result = match &mut connection {
            Some(client) if !client.is_closed() => one_transaction(client, name, door, &mut rng, &token, ledger),
            lost => door.config.connect(NoTls).map(|client| *lost = Some(client)),
        };
        match result {
            Err(e) if e.code() == Some(&SqlState::UNIQUE_VIOLATION) || is_disconnect(&e) => {}
            Err(e) => {
                let mut ledger = lock(ledger);
                if ledger.errors.len() < ENOUGH {
                    ledger.errors.push(format!("client {name}: {}", explain(&e)));
                }
            }
            Ok(()) => {}
        }
        beat();
    }
}

/// Appends (mostly), inserts or deletes, and enters in the ledger what became of it.
fn one_transaction(
    client: &mut Client,
    name: &str,
    door: &Door,
    rng: &mut StdRng,
    token: &str,
    ledger: &Mutex<Ledger>,
) -> Result<(), Error> {
    let key = rng.random_range(0..KEYS);
    let text = format!("{token};");
    let choice: f64 = rng.random();
    let mut transaction = client.transaction()?;
    let (mut wrote, mut entry) = (0, None);
    if choice < 0.7 {
        wrote = transaction.execute(&door.append, &[&key, &text])?;
    } else if choice < 0.85 {
        wrote = transaction.execute(&door.insert, &[&key, &text])?;
    } else if let Some(row) = transaction.query_opt(&door.delete, &[&key])? {
        // Entered before the commit: whoever loses the connection then does not know whether the row is there.
        let mut ledger = lock(ledger);
        entry = Some(ledger.deleted.len());
        ledger.deleted.push((key, row.get(0), false));
    }
    if rng.random_bool(0.1) {
        (0..rng.random_range(1..10)).for_each(|_| beat());
    }
    transaction.commit()?;
    let mut ledger = lock(ledger);
    if let Some(entry) = entry {
        ledger.deleted[entry].2 = true;
    }
    if wrote > 0 {
        ledger.acked.insert(token.to_owned());
        *ledger.acked_by.entry(name.to_owned()).or_default() += 1;
    }
    Ok(())
}

/// The tokens in a text: `seed.client.count;`, whatever stands around them.
fn tokens_of(text: &str) -> impl Iterator<Item = &str> {
    let is_token = |c: char| c.is_ascii_digit() || c == '.';
    text.split_inclusive(';').filter_map(move |part| part.strip_suffix(';')).map(move |part| {
        let start =
            part.rfind(|c| !is_token(c)).map_or(0, |at| at + part[at..].chars().next().map_or(0, char::len_utf8));
        &part[start..]
    })
}

/// All strings in a JSON value.
fn strings_in(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::String(text) => found.push(text.clone()),
        Value::Array(items) => items.iter().for_each(|item| strings_in(item, found)),
        Value::Object(fields) => fields.values().for_each(|field| strings_in(field, found)),
        _ => {}
    }
}

/// The integer in a recorded key, however it is written.
fn key_of(key: &Value) -> Option<i32> {
    let text = key.to_string();
    text.split(|c: char| !c.is_ascii_digit()).find(|part| !part.is_empty())?.parse().ok()
}

fn rows(client: &mut Client, query: &str) -> BTreeMap<i32, String> {
    let rows = client.query(query, &[]).unwrap_or_else(|e| panic!("{}\n{query}", explain(&e)));
    let list: Vec<(i32, String)> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    let map: HashMap<i32, String> = list.iter().cloned().collect();
    assert_eq!(map.len(), list.len(), "a key is there twice: {query}");
    map.into_iter().collect()
}

fn lock(ledger: &Mutex<Ledger>) -> MutexGuard<'_, Ledger> {
    ledger.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The seed before, and some room behind it for clients that a test numbers itself.
static SEEDS: AtomicU64 = AtomicU64::new(0);
const ROOM: u64 = 10;

/// A seed of the clock's, printed so that a failure can be repeated; `CROSSOVER_SEED` sets the first one. No two are the same, also within
/// a second: clients sign their tokens with it.
pub fn seed() -> u64 {
    let clock = || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let wished =
        std::env::var("CROSSOVER_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or_else(|| clock().as_secs() % 10_000);
    let next = |before: u64| wished.max(before + ROOM);
    let before = SEEDS.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |before| Some(next(before)));
    let seed = next(before.unwrap_or_else(|before| before));
    println!("CROSSOVER_SEED={seed}");
    seed
}

#[cfg(test)]
mod tests {
    use super::{key_of, tokens_of};
    use serde_json::json;

    #[test]
    fn tokens_are_found_in_any_wrapping() {
        let found = |text| tokens_of(text).collect::<Vec<_>>();
        assert_eq!(found("1.0.3;1.2.4;"), ["1.0.3", "1.2.4"]);
        assert_eq!(found("<1.0.3;1.2.4;>"), ["1.0.3", "1.2.4"]);
        assert_eq!(found("\u{e4}1.0.3;"), ["1.0.3"]);
        assert!(found("").is_empty());
    }

    #[test]
    fn keys_are_found_in_any_wrapping() {
        for key in [json!("7"), json!({"id": 7}), json!([7]), json!("(7)")] {
            assert_eq!(key_of(&key), Some(7));
        }
    }
}

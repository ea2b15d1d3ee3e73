//! Clients of every encoding derive the same rows, whatever encoding databases and roles have for those that name none.

use std::fs;
use std::process::Stdio;

use pgrx_tests::cluster::explain;
use pgrx_tests::installation::Installation;
use pgrx_tests::wait::{SOON, until};
use pgrx_tests::{Cluster, Migration, Pair};
use serde_json::{Value, json};

/// The same words as a client of an encoding writes them, and as they are.
const WORDS: [(&str, &[u8], &str); 6] = [
    ("LATIN1", b"Stra\xdfe \xe9\xf1\xff", "Straße éñÿ"),
    ("WIN1252", b"\x80 \x93q\x94 \xfc", "€ “q” ü"),
    ("LATIN9", b"\xa4 \xbd\xe9", "€ œé"),
    ("KOI8R", b"\xcd\xc9\xd2", "мир"),
    ("EUC_JP", b"\xc6\xfc\xcb\xdc", "日本"),
    // The second byte of the last one is a backslash, and that of the one before a bar.
    ("SJIS", b"\x93\xfa\x96\x7b \x83\x7c\x83\x5c", "日本 ポソ"),
];

/// Runs a script in a client of an encoding and returns what it prints, all of it bytes.
fn client(cluster: &Cluster, encoding: &str, script: &[u8]) -> Vec<u8> {
    let file = cluster.scratch().join(format!("{encoding}.sql"));
    fs::write(&file, script).expect("a script");
    let mut psql = Installation::get().program("psql");
    psql.args(["-XqAt", "-v", "ON_ERROR_STOP=1", "-d", &cluster.url(), "-f"]).arg(&file);
    let out = psql.env("PGCLIENTENCODING", encoding).stdin(Stdio::null()).output().expect("psql");
    assert!(out.status.success(), "{encoding}: {}", String::from_utf8_lossy(&out.stderr));
    out.stdout
}

/// A script with `%` for the word.
fn script(template: &str, word: &[u8]) -> Vec<u8> {
    let parts: Vec<&[u8]> = template.split('%').map(str::as_bytes).collect();
    parts.join(word)
}

/// Keys and values are text; the second store has them backwards, with their length in characters.
fn mapping() -> Value {
    json!({"tables": [{"first": "public.word", "second": "tongues.word", "second_view": "public.new_word",
        "forward": {"backwards": "lpad(length(name)::text, 3, '0') || reverse(name)"},
        "backward": {"name": "reverse(substr(backwards, 4))"}}]})
}

const FIRST: &str = "CREATE TABLE word (key text PRIMARY KEY, name text NOT NULL)";
const SECOND: &str = "CREATE TABLE word (key text PRIMARY KEY, backwards text NOT NULL)";

/// What a client does to the rows of its own: in the first shape or in the second.
fn write(cluster: &Cluster, table: &str, second_shape: bool, place: &str) {
    for (encoding, word, _) in WORDS {
        let name = |suffix: &str| match second_shape {
            true => format!("lpad(length('%{suffix}')::text, 3, '0') || reverse('%{suffix}')"),
            false => format!("'%{suffix}'"),
        };
        let column = if second_shape { "backwards" } else { "name" };
        let template = format!(
            "INSERT INTO {table} VALUES ('{encoding} {place} %', {}), ('{encoding} {place} gone %', {});
             UPDATE {table} SET {column} = {} WHERE key = '{encoding} {place} %';
             DELETE FROM {table} WHERE key = '{encoding} {place} gone %';
             SELECT {column} FROM {table} WHERE key = '{encoding} {place} %'",
            name(""),
            name(""),
            name("!")
        );
        let printed = client(cluster, encoding, &script(&template, word));
        let printed = printed.strip_suffix(b"\n").expect("a line");
        if !second_shape {
            assert_eq!(printed, [word, b"!"].concat(), "{encoding} at {place}: what the client reads");
        }
    }
}

/// Both stores, at rest, have what was written in `places`, each word in its own letters.
fn assert_words(pair: &Pair, migration: &Migration, suffix: &str, places: &[&str]) {
    migration.settle();
    let mut expected: Vec<String> = places
        .iter()
        .flat_map(|place| WORDS.map(|(encoding, _, word)| format!("{encoding} {place} {word} = {word}!")))
        .collect();
    expected.sort();
    let sorted = |mut rows: Vec<String>| {
        rows.sort();
        rows
    };
    let first = pair.first.list(&format!("SELECT key || ' = ' || name FROM word{suffix}"));
    assert_eq!(sorted(first), expected, "the first store");
    let second = "SELECT key || ' = ' || reverse(substr(backwards, 4)) FROM tongues.word WHERE left(backwards, 3)::integer = length(backwards) - 3";
    assert_eq!(sorted(pair.second.list(second)), expected, "the second store");
    assert!(migration.conflicts().is_empty(), "{:#?}", migration.conflicts());
}

fn through_all_states(end: impl Fn(&Migration)) {
    let pair = Pair::new();
    // What a client or a worker gets that does not ask for an encoding.
    for (cluster, encoding) in [(&pair.first, "LATIN1"), (&pair.second, "SJIS")] {
        cluster.sql(&format!("ALTER DATABASE app SET client_encoding = '{encoding}'"));
    }
    pair.first.sql("ALTER ROLE postgres IN DATABASE app SET client_encoding = 'WIN1252'");
    pair.first.sql(FIRST);
    pair.second_store("tongues", SECOND);
    write(&pair.first, "word", false, "copied");
    // Chunks of two rows: a word is the end of each.
    let migration = Migration::start_with(&pair, "tongues", &mapping(), &json!({"chunk_rows": 2}));
    migration.until_state("first");
    write(&pair.first, "word", false, "in first");
    assert_words(&pair, &migration, "", &["copied", "in first"]);
    migration.set_state("both");
    write(&pair.first, "word", false, "in both");
    write(&pair.first, "new_word", true, "in both, the new view");
    write(&pair.second, "tongues.word", true, "in both, there");
    let mut places = vec!["copied", "in first", "in both", "in both, the new view", "in both, there"];
    assert_words(&pair, &migration, "__first", &places);
    migration.set_state("second");
    write(&pair.first, "word", false, "in second");
    write(&pair.first, "new_word", true, "in second, the new view");
    write(&pair.second, "tongues.word", true, "in second, there");
    places.extend(["in second", "in second, the new view", "in second, there"]);
    assert_words(&pair, &migration, "__first", &places);
    end(&migration);
}

#[test]
fn clients_of_six_encodings_on_the_way_to_finished() {
    through_all_states(|migration| migration.finish());
}

#[test]
fn clients_of_six_encodings_on_the_way_back() {
    through_all_states(|migration| {
        migration.walk(&["both", "first"]);
        migration.cancel();
    });
}

#[test]
fn a_database_of_another_encoding_is_refused() {
    let pair = Pair::new();
    let create = "CREATE DATABASE latin ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0";
    pair.second.connect_to("postgres").batch_execute(create).expect("a database");
    let mut latin = pair.second.connect_to("latin");
    latin.batch_execute(&format!("CREATE SCHEMA tongues; SET search_path = tongues; {SECOND}")).expect("a store");
    pair.first.sql(&format!(
        "{FIRST}; ALTER SERVER second_server OPTIONS (SET dbname 'latin'); CREATE SCHEMA tongues;
         IMPORT FOREIGN SCHEMA tongues FROM SERVER second_server INTO tongues"
    ));
    let error = Migration::named(&pair, "tongues").try_start(&mapping(), &json!({})).expect_err("another encoding");
    let text = explain(&error);
    assert!(text.contains("second server: the database's encoding is not UTF8"), "{text}");
    let left = "SELECT count(*) FROM migration_status WHERE state <> 'cancelled'";
    until("nothing is left of the start", SOON, || pair.first.text(left).as_deref() == Some("0"));
}

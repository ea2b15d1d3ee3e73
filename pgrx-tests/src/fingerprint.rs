//! All that a refused call could have changed: catalogs, rows and settings of a server's database, each as a hash that can be compared.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use postgres::{Client, SimpleQueryMessage};

use crate::cluster::{Cluster, explain};

/// Catalogs, but for the objects that every database has from the beginning (FirstNormalObjectId); of `pg_class` not what VACUUM and ANALYZE write (they also take back
/// that a table has triggers, once it has none), nor which files the logs of changes have after a TRUNCATE.
const CATALOGS: &[(&str, &str)] = &[
    (
        "pg_class",
        "SELECT to_jsonb(c) - '{relpages,reltuples,relallvisible,relallfrozen,relfrozenxid,relminmxid,relhasindex,relhasrules,relhastriggers,relhassubclass}'::text[]
                - CASE WHEN n.nspname ~ '^(crossover|pg_toast)' THEN 'relfilenode' ELSE '' END
         FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid >= 16384",
    ),
    ("pg_attribute", "SELECT to_jsonb(a) FROM pg_attribute a WHERE a.attrelid >= 16384"),
    ("pg_attrdef", "SELECT to_jsonb(d) FROM pg_attrdef d WHERE d.oid >= 16384"),
    ("pg_auth_members", "SELECT to_jsonb(m) FROM pg_auth_members m"),
    ("pg_authid", "SELECT to_jsonb(a) FROM pg_authid a"),
    ("pg_constraint", "SELECT to_jsonb(c) FROM pg_constraint c WHERE c.oid >= 16384"),
    ("pg_db_role_setting", "SELECT to_jsonb(s) FROM pg_db_role_setting s"),
    ("pg_default_acl", "SELECT to_jsonb(a) FROM pg_default_acl a"),
    ("pg_depend", "SELECT to_jsonb(d) FROM pg_depend d WHERE d.objid >= 16384"),
    ("pg_description", "SELECT to_jsonb(d) FROM pg_description d WHERE d.objoid >= 16384"),
    ("pg_event_trigger", "SELECT to_jsonb(e) FROM pg_event_trigger e"),
    ("pg_extension", "SELECT to_jsonb(e) FROM pg_extension e"),
    ("pg_foreign_server", "SELECT to_jsonb(s) FROM pg_foreign_server s"),
    ("pg_foreign_table", "SELECT to_jsonb(t) FROM pg_foreign_table t"),
    ("pg_index", "SELECT to_jsonb(i) FROM pg_index i WHERE i.indrelid >= 16384"),
    ("pg_inherits", "SELECT to_jsonb(i) FROM pg_inherits i"),
    ("pg_namespace", "SELECT to_jsonb(n) FROM pg_namespace n"),
    ("pg_policy", "SELECT to_jsonb(p) FROM pg_policy p"),
    ("pg_proc", "SELECT to_jsonb(p) FROM pg_proc p WHERE p.oid >= 16384"),
    ("pg_publication", "SELECT to_jsonb(p) FROM pg_publication p"),
    ("pg_replication_slots", "SELECT to_jsonb(s.slot_name) FROM pg_replication_slots s"),
    ("pg_rewrite", "SELECT to_jsonb(r) FROM pg_rewrite r WHERE r.oid >= 16384"),
    ("pg_trigger", "SELECT to_jsonb(t) FROM pg_trigger t WHERE t.oid >= 16384"),
    ("pg_type", "SELECT to_jsonb(t) FROM pg_type t WHERE t.oid >= 16384"),
    ("pg_user_mapping", "SELECT to_jsonb(m) FROM pg_user_mapping m"),
];

/// The rows of every table that is not the system's, but for those whose rows change while a migration runs.
const TABLES: &str = "SELECT format('%I.%I', n.nspname, c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
     WHERE c.relkind = 'r' AND n.nspname NOT IN ('pg_catalog', 'information_schema') AND n.nspname !~ '^pg_'
       AND (n.nspname !~ '^crossover' OR n.nspname = 'crossover' AND c.relname IN ('migration', 'migrated_table', 'conflict', 'history'))
     ORDER BY 1";

/// Hashes by what they are of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fingerprint(BTreeMap<String, String>);

impl Fingerprint {
    /// Takes it on a connection of the test's own: that of a superuser, with the database's settings.
    /// Not of the rows of tables that are `changing`.
    pub fn take(client: &mut Client, changing: &[&str]) -> Self {
        let rows = query(client, TABLES);
        let tables = rows.into_iter().map(|mut row| row.swap_remove(0)).filter(|t| !changing.contains(&t.as_str()));
        let tables = tables.map(|table| (table.clone(), format!("SELECT to_jsonb(x) FROM {table} x")));
        let catalogs = CATALOGS.iter().map(|(name, sql)| ((*name).to_owned(), (*sql).to_owned()));
        let parts: Vec<String> = catalogs
            .chain(tables)
            .map(|(name, sql)| {
                let name = name.replace('\'', "''");
                format!("SELECT '{name}', md5(coalesce(string_agg(h, '' ORDER BY h), '')) FROM (SELECT md5(v::text) AS h FROM ({sql}) AS q(v)) AS hashes")
            })
            .collect();
        let hashes = query(client, &parts.join("\nUNION ALL\n"));
        Self(hashes.into_iter().map(|mut row| (row.swap_remove(0), row.swap_remove(0))).collect())
    }

    /// What has another hash now; empty when nothing has changed.
    pub fn difference(&self, now: &Self) -> String {
        let mut text = String::new();
        for name in self.0.keys().chain(now.0.keys().filter(|name| !self.0.contains_key(*name))) {
            if self.0.get(name) != now.0.get(name) {
                let _ = write!(text, "{name} ");
            }
        }
        text
    }
}

fn query(client: &mut Client, sql: &str) -> Vec<Vec<String>> {
    let messages = client.simple_query(sql).unwrap_or_else(|e| panic!("{}\n{sql}", explain(&e)));
    let row = |message| match message {
        SimpleQueryMessage::Row(row) => {
            Some((0..row.len()).map(|i| row.get(i).unwrap_or_default().to_owned()).collect())
        }
        _ => None,
    };
    messages.into_iter().filter_map(row).collect()
}

/// A connection to take fingerprints on.
pub fn observer(cluster: &Cluster) -> Client {
    cluster.connect_soon()
}

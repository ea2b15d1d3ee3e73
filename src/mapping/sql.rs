//! The SQL of replication: one template serves both stores. Pure.
//!
//! Keys and rows travel as the text of text arrays (`{1,"a b",NULL}`): every type has a text form that is the
//! same on both servers once the settings of section 6 of the design are pinned.

use super::ident::{Ident, RelName, dollar_quoted, quote_literal};
use super::rule::{Pair, writable};
use super::table::{Column, Table, key_cast, text_depends_on_settings};
use crate::error::Side;

/// How many tables the change log is spread over; never dropped, all always read.
pub const LOG_RING: u32 = 3;

/// The names of what replication keeps on one store.
#[derive(Debug, Clone)]
pub struct Objects {
    schema: Ident,
    tag: String,
}

impl Objects {
    pub fn new(side: Side, tag: &str) -> Self {
        let schema = match side {
            Side::First => "crossover",
            Side::Second => "crossover_peer",
        };
        Objects { schema: Ident::new(schema), tag: tag.to_string() }
    }

    fn rel(&self, what: &str) -> RelName {
        RelName { schema: self.schema.clone(), name: Ident::new(format!("{what}_{}", self.tag)) }
    }

    pub fn schema(&self) -> &Ident {
        &self.schema
    }
    /// The tables of each tree as they were when capture was last looked after.
    pub fn member(&self) -> RelName {
        self.rel("member")
    }
    /// Which keys changed.
    pub fn log(&self) -> RelName {
        self.rel("log")
    }
    pub fn log_ring(&self, ring: u32) -> RelName {
        self.rel("log").with_suffix(&format!("_{ring}"))
    }
    /// The replicator's own transactions, as rows that no client can write.
    pub fn origin(&self) -> RelName {
        self.rel("origin")
    }
    /// Updated and committed before a watermark speaks of this store ("flush first"); and what has been cut from the log.
    pub fn counter(&self) -> RelName {
        self.rel("counter")
    }
    /// The watermark of the *other* store.
    pub fn mark(&self) -> RelName {
        self.rel("mark")
    }
    /// Scopes inside that watermark that are not applied here yet.
    pub fn owed(&self) -> RelName {
        self.rel("owed")
    }
    /// Checkpoints of the copy (second store).
    pub fn chunk(&self) -> RelName {
        self.rel("chunk")
    }
    /// Conflicts that wait to be brought home (second store).
    pub fn conflict(&self) -> RelName {
        self.rel("conflict")
    }
    pub fn fence_function(&self) -> RelName {
        self.rel("fence")
    }
    pub fn capture_function(&self, index: usize) -> RelName {
        self.rel("capture").with_suffix(&format!("_{index}"))
    }
    /// The rule of one direction as a view (first store).
    pub fn rule_view(&self, direction: &str, index: usize) -> RelName {
        self.rel(direction).with_suffix(&format!("_{index}"))
    }

    /// Creates everything that replication keeps on a store but the triggers.
    pub fn install(&self, rotation_seconds: i32) -> String {
        let (log, origin, counter) = (self.log(), self.origin(), self.counter());
        let (mark, owed, chunk, conflict) = (self.mark(), self.owed(), self.chunk(), self.conflict());
        let member = self.member();
        let rings: String = (0..LOG_RING)
            .map(|i| format!("CREATE TABLE {} PARTITION OF {log} FOR VALUES IN ({i});\n", self.log_ring(i)))
            .collect();
        let indexes: String = (0..LOG_RING)
            .map(|i| {
                format!("CREATE INDEX {} ON {} (xid);\n", self.log_ring(i).name.with_suffix("_xid"), self.log_ring(i))
            })
            .collect();
        format!(
            "CREATE TABLE {log} (xid xid8 NOT NULL, at timestamptz NOT NULL, source int NOT NULL, key text[],
    ring int NOT NULL DEFAULT (extract(epoch FROM clock_timestamp())::bigint / {rotation_seconds}) % {LOG_RING}
) PARTITION BY LIST (ring);
{rings}{indexes}CREATE TABLE {member} (source int NOT NULL, rel oid NOT NULL, by_row boolean NOT NULL, triggers text, filenode oid NOT NULL, shape text,
    PRIMARY KEY (source, rel));
CREATE TABLE {origin} (xid xid8 PRIMARY KEY);
CREATE TABLE {counter} (n bigint NOT NULL, cut pg_snapshot);
INSERT INTO {counter} VALUES (0);
CREATE TABLE {mark} (watermark pg_snapshot NOT NULL, counter bigint NOT NULL, at timestamptz NOT NULL DEFAULT clock_timestamp());
CREATE TABLE {owed} (source int NOT NULL, key text[] NOT NULL, at timestamptz NOT NULL, error text, image text,
    PRIMARY KEY (source, key));
CREATE TABLE {chunk} (source int NOT NULL, chunk bigint NOT NULL, rows bigint NOT NULL, PRIMARY KEY (source, chunk));
CREATE TABLE {conflict} (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, source int NOT NULL, key text[] NOT NULL,
    kept text NOT NULL, first_image jsonb, second_image jsonb, at timestamptz NOT NULL DEFAULT clock_timestamp());
{fence}",
            fence = self.create_fence_function(),
        )
    }

    /// Drops what [`Objects::install`] made and the capture functions of `tables`; harmless when it is not there.
    pub fn uninstall(&self, tables: usize) -> String {
        let mut sql = String::new();
        let (member, origin) = (self.member(), self.origin());
        for rel in [self.log(), member, origin, self.counter(), self.mark(), self.owed(), self.chunk(), self.conflict()]
        {
            sql += &format!("DROP TABLE IF EXISTS {rel};\n");
        }
        sql += &format!("DROP FUNCTION IF EXISTS {}();\n", self.fence_function());
        for i in 0..tables {
            sql += &format!("DROP FUNCTION IF EXISTS {}();\n", self.capture_function(i));
        }
        sql
    }

    /// Rejects writes to a store that is not exposed; the replicator passes.
    fn create_fence_function(&self) -> String {
        let (function, origin) = (self.fence_function(), self.origin());
        dollar_quoted(&format!(
            "CREATE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS \0
BEGIN
    IF EXISTS (SELECT FROM {origin} WHERE xid = pg_current_xact_id()) THEN
        RETURN NULL;
    END IF;
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'could not serialize access: a migration has taken table \"%\" out of use', TG_TABLE_NAME
            USING ERRCODE = 'serialization_failure', HINT = 'Retry the transaction.';
    END IF;
    RAISE EXCEPTION 'table \"%\" belongs to a store that a migration does not expose', TG_TABLE_NAME
        USING ERRCODE = 'read_only_sql_transaction',
              HINT = 'Write through the view under the table''s old name; migration_status() of pg_crossover on the first server shows the state.';
END
\0;
REVOKE ALL ON FUNCTION {function}() FROM PUBLIC;
"
        ))
    }
}

/// A table of one store, as replication reads and writes it.
#[derive(Debug, Clone)]
pub struct StoreTable {
    pub index: usize,
    /// The table on its own server, under its present name.
    pub rel: RelName,
    /// Key columns with the type that a key's text is cast to.
    pub key: Vec<(Ident, String)>,
    /// Where this store's rows are read in the second shape: a rule view on first, the table itself on second.
    read_from: RelName,
    /// Columns of that shape, in its own order, by their names in `read_from`.
    read_columns: Vec<Column>,
    read_key: Vec<(Ident, String)>,
    /// Columns written here, and the query that makes them of the rows that come in.
    written: Vec<Ident>,
    /// Columns that nothing maps to: a row that is deleted and inserted again keeps them.
    unmapped: Vec<Column>,
    pub(super) incoming: String,
    pub(super) key_needs_settings: bool,
}

impl StoreTable {
    /// The first store's table of `pair`, which is `rel` at present.
    pub fn first(pair: &Pair, objects: &Objects, rel: &RelName) -> StoreTable {
        let key = keys(pair.key.iter().map(|(a, _)| a), &pair.first);
        let second_key = keys(pair.key.iter().map(|(_, b)| b), &pair.second);
        // Rows come in the second shape; the backward rule is evaluated here, where its types and functions are.
        let raw: Vec<String> = writable(&pair.second)
            .enumerate()
            .map(|(i, c)| format!("{} AS {}", c.of_text(&format!("x[{}]", i + 1)), c.name))
            .collect();
        let made: Vec<String> = pair
            .backward
            .iter()
            .map(|(name, expression)| {
                let cast = pair.first.column(name).map_or("text", |c| c.cast_type.as_str());
                format!("({expression})::{cast} AS {name}")
            })
            .collect();
        StoreTable {
            index: pair.index,
            rel: rel.clone(),
            key_needs_settings: needs_settings(&pair.first),
            read_from: objects.rule_view("forward", pair.index),
            read_columns: writable(&pair.second).cloned().collect(),
            read_key: second_key,
            written: pair.backward.iter().map(|(c, _)| c.clone()).collect(),
            unmapped: writable(&pair.first).filter(|c| pair.backward_of(&c.name).is_none()).cloned().collect(),
            incoming: format!(
                "SELECT {} FROM (SELECT {} FROM (SELECT r::text[] AS x FROM unnest($1::text[]) AS r OFFSET 0) AS rows OFFSET 0) AS {}",
                made.join(", "),
                raw.join(", "),
                pair.second.rel.name
            ),
            key,
        }
    }

    /// The second store's table of `pair`; `remote` is what its own catalog says of it.
    pub fn second(pair: &Pair, remote: &Table) -> StoreTable {
        // A column that the server does not have (any more) stays in the list: statements then fail, and say so.
        let read_columns: Vec<Column> = writable(&pair.second)
            .map(|c| {
                remote
                    .column(&c.remote_name)
                    .cloned()
                    .unwrap_or_else(|| Column { name: c.remote_name.clone(), ..c.clone() })
            })
            .collect();
        let columns: Vec<Ident> = read_columns.iter().map(|c| c.name.clone()).collect();
        let key_names: Vec<Ident> =
            pair.key.iter().filter_map(|(_, b)| pair.second.column(b)).map(|c| c.remote_name.clone()).collect();
        let made: Vec<String> = read_columns
            .iter()
            .enumerate()
            .map(|(i, c)| format!("{} AS {}", c.of_text(&format!("x[{}]", i + 1)), c.name))
            .collect();
        let key = keys(key_names.iter(), remote);
        StoreTable {
            index: pair.index,
            rel: remote.rel.clone(),
            key_needs_settings: needs_settings(remote),
            read_from: remote.rel.clone(),
            read_columns,
            read_key: key.clone(),
            unmapped: remote.columns.iter().filter(|c| !c.generated && !columns.contains(&c.name)).cloned().collect(),
            written: columns,
            incoming: format!(
                "SELECT {} FROM (SELECT r::text[] AS x FROM unnest($1::text[]) AS r OFFSET 0) AS rows",
                made.join(", ")
            ),
            key,
        }
    }

    /// Rows in the second shape: `(key, row)`. With `whole`, all of them; else of the keys in `$1`.
    pub fn derive(&self, whole: bool) -> String {
        let columns: Vec<String> = self.read_columns.iter().map(|c| c.to_text(&format!("d.{}", c.name))).collect();
        let (from, _) = self.keyed(&self.read_from, "d", &self.read_key, whole);
        format!("SELECT {}, ARRAY[{}]::text {from}", key_text("d", &self.read_key), columns.join(", "))
    }

    /// Rows as they stand here: `(key, image)` of the keys in `$1`; `image` is a jsonb expression over the row `t`.
    pub fn images(&self, image: &str) -> String {
        let (from, _) = self.keyed(&self.rel, "t", &self.key, false);
        format!("SELECT {}, {image}::text {from}", key_text("t", &self.key))
    }

    /// The keys among `$1` (or all) that are there.
    pub fn present(&self, whole: bool) -> String {
        let (from, _) = self.keyed(&self.rel, "t", &self.key, whole);
        format!("SELECT {} {from}", key_text("t", &self.key))
    }

    /// Locks, in key order, those rows of `$1` that nobody else holds. `strength`: UPDATE or NO KEY UPDATE.
    pub fn lock_rows(&self, strength: &str) -> String {
        let (from, order) = self.keyed(&self.rel, "t", &self.key, false);
        format!("SELECT {} {from} ORDER BY {order} FOR {strength} OF t SKIP LOCKED", key_text("t", &self.key))
    }

    /// Writes the rows in `$1` (second shape), in key order; rows equal to what is there are not written.
    pub fn upsert(&self) -> String {
        let key: Vec<String> = self.key.iter().map(|(c, _)| c.to_string()).collect();
        let columns: Vec<String> = self.written.iter().map(|c| c.to_string()).collect();
        let rest: Vec<&Ident> = self.written.iter().filter(|c| !self.key.iter().any(|(k, _)| k == *c)).collect();
        let action = if rest.is_empty() {
            "DO NOTHING".to_string()
        } else {
            let set: Vec<String> = rest.iter().map(|c| format!("{c} = EXCLUDED.{c}")).collect();
            let list = |alias: &str| rest.iter().map(|c| format!("{alias}.{c}")).collect::<Vec<_>>().join(", ");
            format!(
                "DO UPDATE SET {} WHERE ROW({})::record *<> ROW({})::record",
                set.join(", "),
                list("t"),
                list("EXCLUDED")
            )
        };
        format!(
            "INSERT INTO {} AS t ({cols}) OVERRIDING SYSTEM VALUE SELECT {cols} FROM ({}) AS incoming ORDER BY {keys} ON CONFLICT ({keys}) {action}",
            self.rel,
            self.incoming,
            cols = columns.join(", "),
            keys = key.join(", "),
        )
    }

    /// Deletes the keys in `$1`.
    pub fn delete(&self) -> String {
        let key: Vec<String> =
            self.key.iter().enumerate().map(|(i, (c, ty))| format!("t.{c} = k.x[{}]::{ty}", i + 1)).collect();
        format!(
            "DELETE FROM {} AS t USING (SELECT r::text[] AS x FROM unnest($1::text[]) AS r OFFSET 0) AS k WHERE {}",
            self.rel,
            key.join(" AND ")
        )
    }

    /// Writes the row that is `$1` as jsonb, all of its columns.
    pub fn put_image(&self) -> String {
        let key: Vec<String> = self.key.iter().map(|(c, _)| c.to_string()).collect();
        let columns: Vec<&Ident> = self.written.iter().chain(self.unmapped.iter().map(|c| &c.name)).collect();
        let list = columns.iter().map(|c| c.to_string()).collect::<Vec<_>>().join(", ");
        let set: Vec<String> = columns.iter().map(|c| format!("{c} = EXCLUDED.{c}")).collect();
        format!(
            "INSERT INTO {rel} ({list}) OVERRIDING SYSTEM VALUE SELECT {list} FROM jsonb_populate_record(NULL::{rel}, $1::text::jsonb) \
             ON CONFLICT ({}) DO UPDATE SET {}",
            key.join(", "),
            set.join(", "),
            rel = self.rel,
        )
    }

    /// `(key, key columns and unmapped columns)` of the keys in `$1`; None where every column is mapped.
    pub fn unmapped(&self) -> Option<String> {
        if self.unmapped.is_empty() {
            return None;
        }
        let key = self.key.iter().map(|(c, _)| format!("t.{c}::text"));
        let texts = key.chain(self.unmapped.iter().map(|c| c.to_text(&format!("t.{}", c.name))));
        let (from, _) = self.keyed(&self.rel, "t", &self.key, false);
        Some(format!(
            "SELECT {}, ARRAY[{}]::text {from}",
            key_text("t", &self.key),
            texts.collect::<Vec<_>>().join(", ")
        ))
    }

    /// Inserts those of the rows in `$1` (second shape) whose unmapped columns are in `$2`, with these.
    pub fn insert_again(&self) -> String {
        let columns: Vec<String> = self.written.iter().map(|c| c.to_string()).collect();
        let kept: Vec<String> = self.unmapped.iter().map(|c| c.name.to_string()).collect();
        let values: Vec<String> = self
            .unmapped
            .iter()
            .enumerate()
            .map(|(i, c)| c.of_text(&format!("kept.x[{}]", self.key.len() + i + 1)))
            .collect();
        let on: Vec<String> =
            self.key.iter().enumerate().map(|(i, (c, ty))| format!("coming.{c} = kept.x[{}]::{ty}", i + 1)).collect();
        format!(
            "INSERT INTO {} ({}, {}) OVERRIDING SYSTEM VALUE SELECT {}, {} FROM ({}) AS coming \
             JOIN (SELECT r::text[] AS x FROM unnest($2::text[]) AS r OFFSET 0) AS kept ON {}",
            self.rel,
            columns.join(", "),
            kept.join(", "),
            columns.iter().map(|c| format!("coming.{c}")).collect::<Vec<_>>().join(", "),
            values.join(", "),
            self.incoming,
            on.join(" AND ")
        )
    }

    /// COPY of rows in the second shape into this table (second store).
    pub fn copy_in(&self) -> String {
        let columns: Vec<String> = self.written.iter().map(|c| c.to_string()).collect();
        format!("COPY {} ({}) FROM STDIN", self.rel, columns.join(", "))
    }

    /// Rows in the second shape, column by column, of one chunk: keys after `$1` (a key's text, or NULL) up to and
    /// with `$2` (or NULL), in key order.
    pub fn chunk(&self) -> String {
        let columns: Vec<String> = self.read_columns.iter().map(|c| format!("d.{}", c.name)).collect();
        format!(
            "SELECT {} FROM {} AS d WHERE {} ORDER BY {}",
            columns.join(", "),
            self.read_from,
            chunk_bounds("d", &self.read_key),
            order("d", &self.read_key)
        )
    }

    /// The keys of a chunk, for where COPY was refused.
    pub fn chunk_keys(&self) -> String {
        format!("SELECT {} FROM {} AS t WHERE {}", key_text("t", &self.key), self.rel, chunk_bounds("t", &self.key))
    }

    /// The last key of the chunk of `$2` rows after the key `$1`, or no row when fewer are left.
    pub fn chunk_end(&self) -> String {
        format!(
            "SELECT {} FROM {} AS t WHERE {} ORDER BY {} OFFSET $2::text::bigint - 1 LIMIT 1",
            key_text("t", &self.key),
            self.rel,
            after("t", &self.key, "$1"),
            order("t", &self.key)
        )
    }

    pub(super) fn keyed(&self, rel: &RelName, alias: &str, key: &[(Ident, String)], whole: bool) -> (String, String) {
        let order = order(alias, key);
        if whole {
            return (format!("FROM {rel} AS {alias}"), order);
        }
        let from = match key {
            [(column, ty)] => format!(
                "FROM {rel} AS {alias} WHERE {alias}.{column} = ANY (ARRAY(SELECT (r::text[])[1]::{ty} FROM unnest($1::text[]) AS r))"
            ),
            _ => {
                let on: Vec<String> =
                    key.iter().enumerate().map(|(i, (c, ty))| format!("{alias}.{c} = k.x[{}]::{ty}", i + 1)).collect();
                format!(
                    "FROM (SELECT r::text[] AS x FROM unnest($1::text[]) AS r OFFSET 0) AS k JOIN {rel} AS {alias} ON {}",
                    on.join(" AND ")
                )
            }
        };
        (from, order)
    }
}

/// A rule as a view over the table that it reads, its columns named and typed as the target's.
pub fn create_rule_view(view: &RelName, rules: &[(Ident, String)], target: &Table, source: &RelName) -> String {
    let columns: Vec<String> = rules
        .iter()
        .map(|(name, expression)| {
            let cast = target.column(name).map_or("text", |c| c.cast_type.as_str());
            format!("    ({expression})::{cast} AS {name}")
        })
        .collect();
    format!("CREATE VIEW {view} AS SELECT\n{}\nFROM {source}", columns.join(",\n"))
}

/// Settings under which a value has the same text on every server, and no timeout of a role's interferes.
pub fn session_settings() -> Vec<(&'static str, &'static str)> {
    vec![
        ("DateStyle", "ISO, MDY"),
        ("IntervalStyle", "postgres"),
        ("TimeZone", "UTC"),
        ("extra_float_digits", "1"),
        ("bytea_output", "hex"),
        ("xmloption", "content"),
        ("search_path", "pg_catalog, pg_temp"),
        ("default_transaction_isolation", "read committed"),
        ("default_transaction_read_only", "off"),
        ("default_transaction_deferrable", "off"),
        ("synchronous_commit", "on"),
        ("statement_timeout", "0"),
        ("lock_timeout", "0"),
        ("idle_in_transaction_session_timeout", "0"),
        ("row_security", "off"),
    ]
}

pub fn set_statement(name: &str, value: &str) -> String {
    // A list such as search_path or DateStyle is not quoted as one word.
    if value.contains(',') { format!("SET {name} = {value}") } else { format!("SET {name} = {}", quote_literal(value)) }
}

fn keys<'a>(names: impl Iterator<Item = &'a Ident>, table: &Table) -> Vec<(Ident, String)> {
    names.map(|name| (name.clone(), table.column(name).map_or_else(|| "text".to_string(), key_cast))).collect()
}

fn needs_settings(table: &Table) -> bool {
    table.key.iter().filter_map(|k| table.column(k)).any(|c| text_depends_on_settings(c.type_oid))
}

pub(super) fn key_text(alias: &str, key: &[(Ident, String)]) -> String {
    let columns: Vec<String> = key.iter().map(|(c, _)| format!("{alias}.{c}::text")).collect();
    format!("ARRAY[{}]::text", columns.join(", "))
}

fn order(alias: &str, key: &[(Ident, String)]) -> String {
    key.iter().map(|(c, _)| format!("{alias}.{c}")).collect::<Vec<_>>().join(", ")
}

fn row_bound(key: &[(Ident, String)], param: &str) -> String {
    let items: Vec<String> =
        key.iter().enumerate().map(|(i, (_, ty))| format!("({param}::text[])[{}]::{ty}", i + 1)).collect();
    format!("({})", items.join(", "))
}

fn after(alias: &str, key: &[(Ident, String)], param: &str) -> String {
    format!("({param} IS NULL OR ({}) > {})", order(alias, key), row_bound(key, param))
}

fn chunk_bounds(alias: &str, key: &[(Ident, String)]) -> String {
    format!("{} AND ($2 IS NULL OR ({}) <= {})", after(alias, key, "$1"), order(alias, key), row_bound(key, "$2"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mapping::rule::tests::customer;

    #[test]
    fn the_first_store_evaluates_the_backward_rule_on_what_comes_in() {
        let pair = customer().unwrap();
        let objects = Objects::new(Side::First, "ab12");
        let table = StoreTable::first(&pair, &objects, &pair.first.rel);
        let sql = table.upsert();
        assert!(sql.contains(r#"INSERT INTO "public"."customer" AS t ("id", "first_name""#), "{sql}");
        assert!(sql.contains(r#"(round(balance * 100)::bigint)::bigint AS "balance_cents""#), "{sql}");
        assert!(sql.contains(r#"AS "client""#), "{sql}");
        assert!(sql.contains(r#"ON CONFLICT ("id") DO UPDATE"#), "{sql}");
        assert!(table.derive(false).contains(r#"FROM "crossover"."forward_ab12_0" AS d"#));
    }

    #[test]
    fn set_statements_quote_what_is_one_word() {
        assert_eq!(set_statement("TimeZone", "UTC"), "SET TimeZone = 'UTC'");
        assert_eq!(set_statement("search_path", "a, b"), "SET search_path = a, b");
    }
}

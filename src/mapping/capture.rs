//! The SQL of capture: the triggers that log which keys change, the fence, and what a look at them asks. Pure.
//!
//! Triggers are per statement, with transition tables, where PostgreSQL fires them for every change. On partitioned tables it
//! fires them for the named relation only, and for a subscription's changes not at all: there they are per row, which
//! PostgreSQL clones onto every partition, and TRUNCATE, which it does not clone, has a trigger on each member of the tree.

use super::ident::{Ident, dollar_quoted};
use super::sql::{Objects, StoreTable};

/// The trigger of tables that are captured row by row.
pub const BY_ROW: &str = "crossover_capture_row";

/// The tables in `$1` (names, in the mapping's order) and their partitions: `source`, `root`, `rel`, `depth`, `partitioned`, `by_row` (are its
/// triggers to be per row?), `triggers` (those that capture, and the transactions that changed them last), `filenode`. A partition that is
/// being detached counts no more.
pub fn tree(objects: &Objects) -> String {
    format!(
        "RECURSIVE ours AS (SELECT oid FROM pg_proc WHERE pronamespace = to_regnamespace('{schema}') AND proname ^@ '{capture}'), \
tree AS ( \
    SELECT (i - 1)::int AS source, c.oid AS root, c.oid AS rel, 0 AS depth, c.relkind = 'p' AS partitioned, \
           c.relkind = 'p' OR EXISTS (SELECT FROM pg_subscription_rel s WHERE s.srrelid = c.oid) \
               OR EXISTS (SELECT FROM {member} m WHERE m.source = i - 1 AND m.by_row) AS by_row \
      FROM unnest($1::text[]) WITH ORDINALITY AS t(name, i) JOIN pg_class c ON c.oid = to_regclass(t.name)::oid \
    UNION ALL \
    SELECT tree.source, tree.root, h.inhrelid, depth + 1, partitioned, by_row \
      FROM tree JOIN pg_inherits h ON h.inhparent = tree.rel AND NOT h.inhdetachpending), \
present AS ( \
    SELECT tree.*, c.relfilenode AS filenode, c.relkind = 'r' AS has_rows, (SELECT string_agg(t.oid || ' ' || t.xmin::text, ', ' ORDER BY t.oid) \
               FROM pg_trigger t WHERE t.tgrelid = tree.rel AND t.tgfoid IN (SELECT oid FROM ours)) AS triggers \
      FROM tree JOIN pg_class c ON c.oid = tree.rel WHERE partitioned OR rel = root)",
        schema = objects.schema().as_str(),
        capture = objects.capture_prefix(),
        member = objects.member(),
    )
}

/// The columns of `rel` and the transactions that defined them.
fn shape(rel: &str) -> String {
    format!(
        "(SELECT string_agg(a.attnum || ' ' || a.xmin::text, ', ' ORDER BY a.attnum) FROM pg_attribute a WHERE a.attrelid = {rel} AND a.attnum > 0 AND NOT a.attisdropped)"
    )
}

/// Is what was written down as `m` not what is there as `p`? Either it is captured otherwise (a trigger that was disabled for a while
/// has another transaction, a partition that was attached again has another trigger), or a new definition of a column has
/// rewritten its rows, for which no trigger fires.
fn differs() -> String {
    format!(
        "(m.by_row <> p.by_row OR m.triggers IS DISTINCT FROM p.triggers OR m.filenode <> p.filenode AND m.shape IS DISTINCT FROM {})",
        shape("p.rel")
    )
}

/// What is amiss with the capture of the tables in `$1`, as `(source, what, name)`: `changed` where a table or its tree is not what it
/// was; `off` for a trigger that is disabled, or a table that is not there; `inherited` for a child of an ordinary table; `replaced` for a
/// table that is another one under the same name. What is worst comes first.
pub fn look(objects: &Objects) -> String {
    format!(
        "WITH {tree} \
SELECT p.source, 'changed', p.rel::regclass::text FROM present p LEFT JOIN {member} m ON (m.source, m.rel) = (p.source, p.rel) \
    WHERE m.rel IS NULL OR {differs} \
UNION ALL \
SELECT source, 'changed', rel::text FROM {member} m \
    WHERE NOT EXISTS (SELECT FROM tree t WHERE (t.source, t.rel) = (m.source, m.rel)) AND EXISTS (SELECT FROM tree t WHERE t.source = m.source) \
UNION ALL \
SELECT source, 'changed', rel::regclass::text FROM present JOIN pg_trigger t ON t.tgrelid = rel AND t.tgenabled IN ('O', 'R') AND t.tgfoid = to_regproc('{fence}') \
UNION ALL \
SELECT source, 'inherited', rel::regclass::text FROM tree WHERE NOT partitioned AND rel <> root \
UNION ALL \
SELECT source, 'off', rel::regclass || '.' || t.tgname FROM present JOIN pg_trigger t ON t.tgrelid = rel AND t.tgenabled = 'D' \
    AND t.tgfoid IN (SELECT oid FROM ours) \
UNION ALL \
SELECT source, 'replaced', rel::regclass::text FROM tree WHERE rel = root \
    AND EXISTS (SELECT FROM {member} m WHERE m.source = tree.source) AND NOT EXISTS (SELECT FROM {member} m WHERE (m.source, m.rel) = (tree.source, tree.rel)) \
UNION ALL \
SELECT i - 1, 'off', t.name FROM unnest($1::text[]) WITH ORDINALITY AS t(name, i) WHERE to_regclass(t.name) IS NULL \
ORDER BY 2 DESC, 1, 3",
        tree = tree(objects),
        member = objects.member(),
        differs = differs(),
        fence = objects.fence_function(),
    )
}

/// Triggers on the trees of `$1` that `ALTER TABLE ... ENABLE TRIGGER ALL` has touched: `(table, trigger, is it the fence)`.
pub fn half_enabled(objects: &Objects) -> String {
    format!(
        "WITH {tree} SELECT rel::regclass::text, quote_ident(t.tgname), t.tgfoid = to_regproc('{fence}') FROM present JOIN pg_trigger t ON t.tgrelid = rel \
         AND t.tgenabled IN ('O', 'R') AND (t.tgfoid = to_regproc('{fence}') OR t.tgfoid IN (SELECT oid FROM ours)) ORDER BY source, depth, rel",
        tree = tree(objects),
        fence = objects.fence_function(),
    )
}

/// The members of the trees of `$1`, roots first: `(source, name, is it the root, by_row, has it rows of its own, may it have been
/// truncated, is it known, has it changed since, are all its capture triggers there, is the fence up)`.
pub fn members(objects: &Objects) -> String {
    format!(
        "WITH {tree} \
SELECT p.source, p.rel::regclass::text, p.rel = p.root, p.by_row, p.has_rows, p.filenode <> p.rel, m.rel IS NOT NULL, m.rel IS NOT NULL AND {differs}, \
       (SELECT count(*) FROM pg_trigger t WHERE t.tgrelid = p.rel AND t.tgfoid IN (SELECT oid FROM ours) AND t.tgname = ANY ( \
           CASE WHEN p.by_row THEN ARRAY['{BY_ROW}', 'crossover_capture_truncate'] ELSE ARRAY['crossover_capture_insert', \
               'crossover_capture_update', 'crossover_capture_delete', 'crossover_capture_truncate'] END)) = CASE WHEN p.by_row THEN 2 ELSE 4 END, \
       EXISTS (SELECT FROM pg_trigger t WHERE t.tgrelid = p.root AND t.tgfoid = to_regproc('{fence}') AND t.tgenabled = 'A') \
  FROM present p LEFT JOIN {member} m ON (m.source, m.rel) = (p.source, p.rel) ORDER BY p.source, p.depth, p.rel",
        tree = tree(objects),
        member = objects.member(),
        differs = differs(),
        fence = objects.fence_function(),
    )
}

/// How many tables have left the trees of `$1` since they were written down, by source.
pub fn gone(objects: &Objects) -> String {
    format!(
        "WITH {tree} SELECT DISTINCT m.source FROM {member} m WHERE NOT EXISTS (SELECT FROM tree t WHERE (t.source, t.rel) = (m.source, m.rel))",
        tree = tree(objects),
        member = objects.member(),
    )
}

/// Writes the trees of `$1` down as they are.
pub fn remember(objects: &Objects) -> String {
    format!(
        "WITH {tree} INSERT INTO {member} SELECT source, rel, by_row, triggers, filenode, {shape} FROM present AS p",
        shape = shape("p.rel"),
        tree = tree(objects),
        member = objects.member(),
    )
}

/// Which of a migration's triggers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ours {
    All,
    Capture,
    Fence,
}

/// This migration's triggers that are not clones, as `(table, trigger)`, the tables in `$1` first.
pub fn triggers(objects: &Objects, which: Ours) -> String {
    format!(
        "SELECT t.tgrelid::regclass::text, quote_ident(t.tgname) FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid \
         WHERE p.pronamespace = to_regnamespace('{}') AND (p.proname = '{}' AND {} OR p.proname ^@ '{}' AND {}) AND t.tgparentid = 0 AND NOT t.tgisinternal \
         ORDER BY array_position(ARRAY(SELECT to_regclass(n)::oid FROM unnest($1::text[]) WITH ORDINALITY AS u(n, i) ORDER BY i), t.tgrelid), t.tgrelid, t.tgname",
        objects.schema().as_str(),
        objects.fence_function().name.as_str(),
        which != Ours::Capture,
        objects.capture_prefix(),
        which != Ours::Fence,
    )
}

/// Of [`triggers`], those on tables that are no members of the trees of `$1` any more.
pub fn left_behind(objects: &Objects) -> String {
    format!(
        "WITH {tree} SELECT t.tgrelid::regclass::text, quote_ident(t.tgname) FROM pg_trigger t \
         WHERE (t.tgfoid IN (SELECT oid FROM ours) OR t.tgfoid = to_regproc('{fence}')) AND t.tgparentid = 0 AND NOT t.tgisinternal \
         AND NOT EXISTS (SELECT FROM tree WHERE tree.rel = t.tgrelid) AND NOT EXISTS (SELECT FROM pg_inherits h WHERE h.inhrelid = t.tgrelid AND h.inhdetachpending)",
        tree = tree(objects),
        fence = objects.fence_function(),
    )
}

impl StoreTable {
    fn logged_key(&self, alias: &str) -> String {
        let columns: Vec<String> =
            self.key_columns.iter().map(|c| c.to_text_safely(&format!("{alias}.{}", c.name))).collect();
        format!("ARRAY[{}]", columns.join(", "))
    }

    /// The function and the triggers that log which keys of this table change; on a table of its own, or the root of a tree.
    pub fn create_capture(&self, objects: &Objects, by_row: bool) -> String {
        let (function, log, origin) = (objects.capture_function(self.index), objects.log(), objects.origin());
        let pins = if self.key_needs_settings {
            " SET DateStyle = 'ISO, MDY' SET IntervalStyle = 'postgres' SET TimeZone = 'UTC' SET extra_float_digits = 1 SET bytea_output = 'hex'"
        } else {
            ""
        };
        let insert = format!("INSERT INTO {log} (xid, at, source, key)");
        let row = format!("pg_current_xact_id(), clock_timestamp(), {}", self.index);
        let body = if by_row {
            let (new, old) = (self.logged_key("NEW"), self.logged_key("OLD"));
            format!(
                "    IF TG_OP = 'INSERT' THEN
        {insert} VALUES ({row}, {new});
    ELSIF TG_OP = 'UPDATE' THEN
        {insert} VALUES ({row}, {new});
        IF {new} <> {old} THEN
            {insert} VALUES ({row}, {old});
        END IF;
    ELSIF TG_OP = 'DELETE' THEN
        {insert} VALUES ({row}, {old});"
            )
        } else {
            let (new, old) = (self.logged_key("n"), self.logged_key("o"));
            format!(
                "    IF TG_OP = 'INSERT' THEN
        {insert} SELECT {row}, {new} FROM new_rows AS n;
    ELSIF TG_OP = 'UPDATE' THEN
        {insert} SELECT {row}, k FROM (SELECT {new} AS k FROM new_rows AS n UNION SELECT {old} FROM old_rows AS o) AS changed;
    ELSIF TG_OP = 'DELETE' THEN
        {insert} SELECT {row}, {old} FROM old_rows AS o;"
            )
        };
        dollar_quoted(&format!(
            "CREATE OR REPLACE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp{pins} AS \0
BEGIN
    IF EXISTS (SELECT FROM {origin} WHERE xid = pg_current_xact_id()) THEN
        RETURN NULL;
    END IF;
{body}
    ELSE
        {insert} SELECT {row}, NULL;
    END IF;
    RETURN NULL;
END
\0;
REVOKE ALL ON FUNCTION {function}() FROM PUBLIC;
COMMENT ON FUNCTION {function}() IS 'pg_crossover: logs which keys are changed';
{}",
            if by_row { self.row_triggers(objects) } else { self.statement_triggers(objects) }
        ))
    }

    fn statement_triggers(&self, objects: &Objects) -> String {
        format!(
            "CREATE TRIGGER crossover_capture_insert AFTER INSERT ON {rel} REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION {function}();
CREATE TRIGGER crossover_capture_update AFTER UPDATE ON {rel} REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION {function}();
CREATE TRIGGER crossover_capture_delete AFTER DELETE ON {rel} REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT EXECUTE FUNCTION {function}();
CREATE TRIGGER crossover_capture_truncate AFTER TRUNCATE ON {rel} FOR EACH STATEMENT EXECUTE FUNCTION {function}();
CREATE TRIGGER crossover_fence BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON {rel} FOR EACH STATEMENT EXECUTE FUNCTION {fence}();
ALTER TABLE {rel} ENABLE ALWAYS TRIGGER crossover_capture_insert, ENABLE ALWAYS TRIGGER crossover_capture_update,
    ENABLE ALWAYS TRIGGER crossover_capture_delete, ENABLE ALWAYS TRIGGER crossover_capture_truncate, DISABLE TRIGGER crossover_fence;
",
            rel = self.rel,
            function = objects.capture_function(self.index),
            fence = objects.fence_function(),
        )
    }

    /// The fence comes after the row, too: a trigger before it, even a disabled one, would keep COPY from inserting many rows at a time.
    fn row_triggers(&self, objects: &Objects) -> String {
        format!(
            "CREATE TRIGGER {BY_ROW} AFTER INSERT OR UPDATE OR DELETE ON {rel} FOR EACH ROW EXECUTE FUNCTION {function}();
CREATE TRIGGER crossover_fence_row AFTER INSERT OR UPDATE OR DELETE ON {rel} FOR EACH ROW EXECUTE FUNCTION {fence}();
ALTER TABLE {rel} ENABLE ALWAYS TRIGGER {BY_ROW}, DISABLE TRIGGER crossover_fence_row;
",
            rel = self.rel,
            function = objects.capture_function(self.index),
            fence = objects.fence_function(),
        )
    }

    /// What PostgreSQL does not clone onto a partition; `member` as the catalogs quote it.
    pub fn member_triggers(&self, objects: &Objects, member: &str, fenced: bool) -> String {
        format!(
            "CREATE TRIGGER crossover_capture_truncate AFTER TRUNCATE ON {member} FOR EACH STATEMENT EXECUTE FUNCTION {function}();
CREATE TRIGGER crossover_fence_truncate BEFORE TRUNCATE ON {member} FOR EACH STATEMENT EXECUTE FUNCTION {fence}();
ALTER TABLE {member} ENABLE ALWAYS TRIGGER crossover_capture_truncate, {fenced} TRIGGER crossover_fence_truncate;
",
            function = objects.capture_function(self.index),
            fence = objects.fence_function(),
            fenced = enable(fenced),
        )
    }

    /// Logs every key of one member of this table's tree.
    pub fn log_member(&self, objects: &Objects, member: &str) -> String {
        format!(
            "INSERT INTO {} (xid, at, source, key) SELECT pg_current_xact_id(), clock_timestamp(), {}, {} FROM ONLY {member} AS t",
            objects.log(),
            self.index,
            self.logged_key("t")
        )
    }

    /// Logs every key that is there or that the log knows: at its last change, or at `$1` where the log does not know that.
    pub fn log_all(&self, objects: &Objects) -> String {
        let (log, source) = (objects.log(), self.index);
        format!(
            "INSERT INTO {log} (xid, at, source, key) SELECT pg_current_xact_id(), coalesce(l.at, $1::text::timestamptz), {source}, coalesce(t.key, l.key) \
             FROM (SELECT {} AS key FROM {} AS t) AS t FULL JOIN (SELECT key, max(at) AS at FROM {log} WHERE source = {source} AND key IS NOT NULL GROUP BY key) AS l \
             ON l.key = t.key",
            self.logged_key("t"),
            self.rel
        )
    }

    /// Logs the scope that overlaps every scope.
    pub fn log_whole(&self, objects: &Objects) -> String {
        format!(
            "INSERT INTO {} (xid, at, source) VALUES (pg_current_xact_id(), clock_timestamp(), {})",
            objects.log(),
            self.index
        )
    }
}

pub fn enable(on: bool) -> &'static str {
    if on { "ENABLE ALWAYS" } else { "DISABLE" }
}

impl Objects {
    /// What the names of all capture functions begin with.
    fn capture_prefix(&self) -> String {
        let name: Ident = self.capture_function(0).name;
        name.as_str().trim_end_matches('0').to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Side;
    use crate::mapping::rule::tests::customer;

    #[test]
    fn rows_are_captured_one_by_one_where_a_statement_does_not_tell() {
        let pair = customer().unwrap();
        let objects = Objects::new(Side::First, "ab12");
        let table = StoreTable::first(&pair, &objects, &pair.first.rel);
        let by_row = table.create_capture(&objects, true);
        assert!(by_row.contains(r#"ARRAY[concat(NEW."id")] <> ARRAY[concat(OLD."id")]"#), "{by_row}");
        assert!(by_row.contains("FOR EACH ROW") && !by_row.contains("REFERENCING"), "{by_row}");
        assert!(!table.create_capture(&objects, false).contains("FOR EACH ROW"));
        assert!(tree(&objects).contains("'capture_ab12_'"), "{}", tree(&objects));
    }
}

//! What a migration may leave behind in catalogs and among processes, and how two dumps differ.

use std::collections::HashMap;
use std::fmt::Write as _;

use postgres::Client;

use crate::cluster::{Cluster, explain};
use crate::pair::Pair;

/// Asserts that two dumps are the same to the byte, or shows the lines that differ.
pub fn assert_same_dump(what: &str, before: &str, after: &str) {
    assert!(before == after, "the schema of {what} has changed:\n{}", difference(before, after));
}

/// The lines that one text has more often than the other, and whether only their order differs.
fn difference(before: &str, after: &str) -> String {
    let mut count: HashMap<&str, i32> = HashMap::new();
    before.lines().for_each(|line| *count.entry(line).or_default() -= 1);
    after.lines().for_each(|line| *count.entry(line).or_default() += 1);
    let mut text = String::new();
    for (mark, lines, sign) in [('-', before, -1), ('+', after, 1)] {
        for line in lines.lines() {
            if count[line].signum() == sign {
                let _ = writeln!(text, "{mark} {line}");
            }
        }
    }
    if text.is_empty() {
        let at = before.lines().zip(after.lines()).position(|(a, b)| a != b);
        let _ = writeln!(text, "the same lines in another order, from line {at:?} on");
    }
    text
}

/// Everything in a database that speaks of the extension, apart from the members of the extension itself.
pub fn traces(cluster: &Cluster) -> Vec<String> {
    cluster.list(
        "SELECT 'trigger ' || tgname || ' on ' || tgrelid::regclass FROM pg_trigger t JOIN pg_proc p ON p.oid = tgfoid
             WHERE NOT tgisinternal AND (tgname LIKE '%crossover%' OR pronamespace::regnamespace::text LIKE 'crossover%')
               AND NOT EXISTS (SELECT FROM pg_class WHERE oid = tgrelid AND relkind = 'v')
         UNION ALL
         SELECT 'event trigger ' || evtname FROM pg_event_trigger
             WHERE evtname LIKE '%crossover%'
               AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = pg_event_trigger.oid AND d.deptype = 'e')
         UNION ALL
         SELECT 'schema ' || nspname FROM pg_namespace WHERE nspname LIKE 'crossover%'
               AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = pg_namespace.oid AND d.deptype = 'e')
         UNION ALL
         SELECT 'function ' || oid::regprocedure FROM pg_proc p WHERE (proname LIKE '%crossover%' OR pronamespace::regnamespace::text LIKE 'crossover%')
               AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_proc'::regclass AND d.objid = p.oid AND d.deptype = 'e')
               AND NOT EXISTS (SELECT FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid WHERE t.tgfoid = p.oid AND c.relkind = 'v')
         UNION ALL
         SELECT 'publication ' || pubname FROM pg_publication WHERE pubname LIKE '%crossover%'
         UNION ALL
         SELECT 'replication slot ' || slot_name FROM pg_replication_slots WHERE slot_name LIKE '%crossover%'
         ORDER BY 1",
    )
}

/// Processes that work for a migration: workers on the first server, their connections on the second. The launcher, which
/// belongs to the library and not to a migration, does not count.
pub fn workers(pair: &Pair) -> Vec<String> {
    [&pair.first, &pair.second].into_iter().flat_map(|cluster| workers_of(&mut cluster.connect_soon())).collect()
}

/// The same, of one server.
pub fn workers_of(client: &mut Client) -> Vec<String> {
    let query = "SELECT concat_ws(' ', pid, backend_type, application_name, query) FROM pg_stat_activity
                 WHERE (backend_type ILIKE '%crossover%' OR application_name ILIKE '%crossover%')
                   AND backend_type NOT ILIKE '%launcher%' AND pid <> pg_backend_pid()";
    let rows = client.query(query, &[]).unwrap_or_else(|e| panic!("{}", explain(&e)));
    rows.iter().map(|row| row.get(0)).collect()
}

#[cfg(test)]
mod tests {
    use super::difference;

    #[test]
    fn a_difference_names_its_lines() {
        assert_eq!(difference("a\nb\nc", "a\nd\nc"), "- b\n+ d\n");
        assert!(difference("a\nb", "b\na").contains("another order"));
    }
}

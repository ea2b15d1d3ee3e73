//! A start changes nothing that an application can see; and a managed view costs no plan.

use pgrx_tests::{Migration, Pair, Witness, market};
use serde_json::{Value, json};

/// What an application may ask: keys, indexes, joins, aggregates, order, writes.
const QUERIES: &[&str] = &[
    "SELECT * FROM customer WHERE id = 7",
    "SELECT * FROM customer WHERE name = 'Nº 7'",
    "SELECT count(*) FROM customer WHERE cents > 100",
    "SELECT * FROM customer ORDER BY id LIMIT 10",
    "SELECT * FROM customer ORDER BY cents DESC LIMIT 10",
    "SELECT c.name, sum(p.cents) FROM customer c JOIN purchase p ON p.customer_id = c.id WHERE c.id < 100 GROUP BY c.id, c.name",
    "SELECT * FROM customer c WHERE EXISTS (SELECT FROM purchase p WHERE p.customer_id = c.id AND p.cents > 5)",
    "SELECT * FROM purchase WHERE customer_id IN (1, 2, 3)",
    "SELECT * FROM customer WHERE id = 7 FOR UPDATE",
    "UPDATE customer SET cents = cents + 1 WHERE id = 7",
    "UPDATE purchase SET cents = 0 WHERE customer_id = 7",
    "DELETE FROM purchase WHERE id = 7",
    "INSERT INTO customer (name) VALUES ('new')",
];

/// The plans of all queries, as JSON, with the names that a takeover changes put back.
fn plans(pair: &Pair) -> Vec<(String, Value)> {
    let plan = |query: &&str| {
        let text = pair.first.text(&format!("EXPLAIN (FORMAT JSON) {query}")).expect("a plan");
        let mut plan: Value = serde_json::from_str(&text.replace("__first", "")).expect("a plan in JSON");
        without_aliases(&mut plan);
        ((*query).to_owned(), plan)
    };
    QUERIES.iter().map(plan).collect()
}

/// An alias is a name in the plan's text, not a part of the plan: `c.id`, `customer_1.id` and `id` are one column of one node.
fn without_aliases(plan: &mut Value) {
    match plan {
        Value::Object(fields) => {
            fields.remove("Alias");
            fields.values_mut().for_each(without_aliases);
        }
        Value::Array(items) => items.iter_mut().for_each(without_aliases),
        Value::String(text) => *text = without_qualifiers(text),
        _ => {}
    }
}

/// Takes `name.` away in front of column names; a number keeps its point.
fn without_qualifiers(expression: &str) -> String {
    let mut text = String::new();
    for part in expression.split_inclusive('.') {
        let unpointed = part.trim_end_matches('.');
        let before = unpointed.trim_end_matches(|c: char| c.is_alphanumeric() || c == '_');
        let is_a_name = unpointed[before.len()..].starts_with(|c: char| c.is_alphabetic() || c == '_');
        text.push_str(if part.ends_with('.') && is_a_name { before } else { part });
    }
    text
}

fn assert_same_plans(before: &[(String, Value)], after: &[(String, Value)], when: &str) {
    for ((query, a), (_, b)) in before.iter().zip(after) {
        assert_eq!(a, b, "{when} the plan of {query} has changed from\n{a:#}\nto\n{b:#}");
    }
}

/// What says that it is the same relation: its oid, its file, its columns, its kind and owner.
fn identity(pair: &Pair) -> Vec<String> {
    pair.first.list(
        "SELECT concat_ws(' ', c.oid, c.relname, c.relfilenode, c.relkind, c.relowner, c.relacl::text,
                          (SELECT string_agg(a.attname || ' ' || a.atttypid || ' ' || a.attnum || ' ' || a.attnotnull, ',' ORDER BY attnum)
                           FROM pg_attribute a WHERE a.attrelid = c.oid))
         FROM pg_class c WHERE c.oid IN ('customer'::regclass, 'purchase'::regclass) ORDER BY 1",
    )
}

#[test]
fn an_application_sees_nothing_of_a_start() {
    let pair = Pair::with(&["autovacuum = off"], &[]);
    market::create(&pair, 10_000);
    let witness = Witness::of(&pair.first);
    let (who, how) = (identity(&pair), plans(&pair));
    // An application with a statement prepared before, and a transaction open all the time.
    let mut application = pair.first.connect();
    let prepared = application.prepare("SELECT name FROM customer WHERE id = $1").expect("a statement");
    let mut reader = pair.first.connect();
    reader.batch_execute("BEGIN; SELECT count(*) FROM customer").expect("a reader");
    let migration = Migration::start(&pair, "market", &market::mapping());
    assert_eq!(identity(&pair), who, "after the start");
    assert_same_plans(&how, &plans(&pair), "while copying");
    migration.until_state("first");
    migration.wait();
    assert_eq!(identity(&pair), who, "in first");
    assert_same_plans(&how, &plans(&pair), "in first");
    assert_eq!(application.query_one(&prepared, &[&7]).expect("a row").get::<_, String>(0), "Nº 7");
    reader.batch_execute("COMMIT").expect("the reader's end");
    market::assert_equal(&pair, "");
    migration.cancel();
    assert_eq!(identity(&pair), who, "after the cancel");
    assert_same_plans(&how, &plans(&pair), "after the cancel");
    witness.testify();
}

#[test]
fn the_managed_view_has_the_plans_of_the_table() {
    let pair = Pair::with(&["autovacuum = off"], &[]);
    market::create(&pair, 10_000);
    let witness = Witness::of(&pair.first);
    let how = plans(&pair);
    let migration = Migration::start_with(&pair, "market", &market::mapping(), &json!({"takeover": "start"}));
    migration.until_state("first");
    migration.wait();
    let kind = "SELECT relkind FROM pg_class WHERE oid = 'customer'::regclass";
    assert_eq!(pair.first.text(kind).as_deref(), Some("v"), "the table was taken over at the start");
    assert_same_plans(&how, &plans(&pair), "over the managed view");
    pair.first.sql(
        "INSERT INTO customer (name) VALUES ('late'); UPDATE customer SET cents = 3 WHERE id = 3; DELETE FROM purchase WHERE id = 4",
    );
    migration.settle();
    market::assert_equal(&pair, "__first");
    migration.set_state("both");
    assert_same_plans(&how, &plans(&pair), "in both");
    migration.walk(&["second", "both", "first"]);
    assert_same_plans(&how, &plans(&pair), "in first, again");
    migration.cancel();
    assert_eq!(pair.first.text(kind).as_deref(), Some("r"));
    assert_same_plans(&how, &plans(&pair), "after the cancel");
    witness.testify();
}

#[cfg(test)]
mod tests {
    #[test]
    fn qualifiers_are_taken_away() {
        assert_eq!(
            super::without_qualifiers("((c.id = p.customer_id) AND (cents > 1.5))"),
            "((id = customer_id) AND (cents > 1.5))"
        );
        assert_eq!(super::without_qualifiers("(customer_1.id)::text"), "(id)::text");
    }
}

//! A mapping held against the two tables: which expression gives which column, in both directions. Pure.

use super::form::pointer_token;
use super::ident::{Ident, RelName, parse_ident};
use super::model::NamedTable;
use super::table::{Column, Table, keys_agree};
use crate::error::Problem;

/// One table to one table. The simple form of the mapping compiles into two rules (views) of it.
#[derive(Debug, Clone)]
pub struct Pair {
    /// Its place in the mapping; names its objects on both servers.
    pub index: usize,
    pub first: Table,
    pub second: Table,
    pub second_view: Option<RelName>,
    /// By column of the second table that replication writes.
    pub forward: Vec<(Ident, String)>,
    /// By column of the first table that the second store maps back.
    pub backward: Vec<(Ident, String)>,
    /// Key columns: first's and second's.
    pub key: Vec<(Ident, Ident)>,
}

impl Pair {
    pub fn compile(index: usize, named: &NamedTable, first: Table, second: Table) -> Result<Pair, Vec<Problem>> {
        let mut problems = Vec::new();
        unknown_columns(index, &named.forward, &second, "forward", &mut problems);
        unknown_columns(index, &named.backward, &first, "backward", &mut problems);
        let forward = direction(&named.forward, &named.backward, &second, &first);
        let backward = direction(&named.backward, &named.forward, &first, &second);

        for column in writable(&second) {
            if !forward.iter().any(|(c, _)| *c == column.name) {
                problems.push(
                    Problem::new(format!("{}.{}", second.rel, column.name), "no expression gives this column")
                        .hint(format!("Add it to /tables/{index}/forward.")),
                );
            }
        }
        for column in first.columns.iter().filter(|c| c.generated) {
            problems.push(
                Problem::new(
                    format!("{}.{}", first.rel, column.name),
                    "a generated column cannot be shown over the second store",
                )
                .hint("Not supported yet."),
            );
        }
        for column in writable(&first) {
            let mapped = backward.iter().any(|(c, _)| *c == column.name);
            if !mapped && column.not_null && column.default.is_none() && column.identity.is_none() {
                problems.push(
                    Problem::new(
                        format!("{}.{}", first.rel, column.name),
                        "nothing maps back to this column, and it is NOT NULL without a default",
                    )
                    .hint(format!("Add it to /tables/{index}/backward.")),
                );
            }
        }
        let key = key(&first, &second, &forward, &backward, &mut problems);
        if !problems.is_empty() {
            return Err(problems);
        }
        Ok(Pair { index, first, second, second_view: named.second_view.clone(), forward, backward, key })
    }

    /// The expression that gives a column of the first table from the second, if there is one.
    pub fn backward_of(&self, column: &Ident) -> Option<&str> {
        self.backward.iter().find(|(c, _)| c == column).map(|(_, e)| e.as_str())
    }

    /// The second server's column that stands for this one of first, as it is.
    pub fn second_column(&self, column: &Ident) -> Option<Ident> {
        let plain = |e: &str| parse_ident(e).as_ref() == Some(column);
        let (name, _) = self.forward.iter().find(|(_, e)| plain(e))?;
        self.second.column(name).map(|c| c.remote_name.clone())
    }

    /// First's column that stands for this one of the second server.
    pub fn first_column(&self, remote: &Ident) -> Option<Ident> {
        let column = self.second.columns.iter().find(|c| c.remote_name == *remote)?;
        let plain = |e: &str| parse_ident(e).as_ref() == Some(&column.name);
        self.backward.iter().find(|(_, e)| plain(e)).map(|(name, _)| name.clone())
    }

    /// Every column of the first shape is a plain column of the second table, of the very same type:
    /// then a view over it is auto-updatable.
    pub fn is_plain_backward(&self) -> bool {
        self.first.columns.iter().all(|column| {
            !column.generated
                && self
                    .backward_of(&column.name)
                    .and_then(|e| plain_column(e, &self.second))
                    .is_some_and(|source| source.type_name == column.type_name && source.collation == column.collation)
        })
    }
}

/// Columns that replication writes.
pub fn writable(table: &Table) -> impl Iterator<Item = &Column> {
    table.columns.iter().filter(|c| !c.generated)
}

/// The column of `source` that `expression` is, when it is nothing else.
pub fn plain_column<'t>(expression: &str, source: &'t Table) -> Option<&'t Column> {
    parse_ident(expression).and_then(|name| source.column(&name))
}

fn unknown_columns(
    index: usize,
    given: &[(String, String)],
    table: &Table,
    direction: &str,
    problems: &mut Vec<Problem>,
) {
    for (name, _) in given {
        let pointer = format!("/tables/{index}/{direction}{}", pointer_token(name));
        match table.column(&Ident::new(name.clone())) {
            None => problems.push(
                Problem::new(pointer, format!("{} has no column \"{name}\"", table.rel))
                    .hint("Column names are written as the catalog holds them, without quotes and in the same case."),
            ),
            Some(column) if column.generated => problems.push(
                Problem::new(pointer, format!("column \"{name}\" of {} is generated", table.rel))
                    .hint("Leave it out: its own server derives its values."),
            ),
            Some(_) => {}
        }
    }
}

/// Expressions by target column: given, or a plain reference turned around, or the same name on both sides.
fn direction(
    given: &[(String, String)],
    opposite: &[(String, String)],
    target: &Table,
    source: &Table,
) -> Vec<(Ident, String)> {
    let mut rules = Vec::new();
    for column in writable(target) {
        let explicit = given.iter().find(|(name, _)| name == column.name.as_str()).map(|(_, e)| e.clone());
        let inverted = || {
            opposite.iter().find_map(|(name, e)| {
                (parse_ident(e).as_ref() == Some(&column.name) && source.column(&Ident::new(name.clone())).is_some())
                    .then(|| Ident::new(name.clone()).to_string())
            })
        };
        let same_name = || source.column(&column.name).map(|c| c.name.to_string());
        if let Some(expression) = explicit.or_else(inverted).or_else(same_name) {
            rules.push((column.name.clone(), expression));
        }
    }
    rules
}

fn key(
    first: &Table,
    second: &Table,
    forward: &[(Ident, String)],
    backward: &[(Ident, String)],
    problems: &mut Vec<Problem>,
) -> Vec<(Ident, Ident)> {
    let mut key = Vec::new();
    for name in &first.key {
        let matched = forward.iter().find(|(target, expression)| {
            parse_ident(expression).as_ref() == Some(name)
                && backward.iter().any(|(c, e)| c == name && parse_ident(e).as_ref() == Some(target))
        });
        let Some((target, _)) = matched else {
            problems.push(
                Problem::new(format!("{}.{name}", first.rel), "a key column is not mapped by a plain reference").hint(
                    format!("Give it a column of its own in {}, by a plain reference in both directions.", second.rel),
                ),
            );
            continue;
        };
        let (Some(a), Some(b)) = (first.column(name), second.column(target)) else { continue };
        if a.type_name == "numeric" {
            problems.push(
                Problem::new(format!("{}.{name}", first.rel), "a key column of type numeric has no fixed scale")
                    .hint("One number has several forms then (1, 1.0). Give the column a scale: numeric(p, s)."),
            );
        }
        if !a.one_text || !b.one_text {
            problems.push(
                Problem::new(
                    format!("{}.{name}", first.rel),
                    format!("a key column of type {} can hold equal values of different text", a.type_name),
                )
                .hint("Keys travel as text: use integers, text with a deterministic collation, uuid, dates, timestamps, numeric(p, s), bytea, enums or network addresses."),
            );
        }
        if !keys_agree(a, b) {
            problems.push(
                Problem::new(
                    format!("{}.{target}", second.rel),
                    format!(
                        "key column has type {}, but {name} of the first table has type {}",
                        b.type_name, a.type_name
                    ),
                )
                .hint(format!(
                    "Give it that type on both servers; here: ALTER FOREIGN TABLE {} ALTER COLUMN {target} TYPE {};",
                    second.rel, a.type_name
                )),
            );
        }
        key.push((name.clone(), target.clone()));
    }
    key
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::mapping::model::Mapping;

    pub fn column(name: &str, type_name: &str, type_oid: u32) -> Column {
        Column {
            name: Ident::new(name),
            type_name: type_name.into(),
            cast_type: type_name.into(),
            type_oid,
            not_null: false,
            generated: false,
            identity: None,
            default: None,
            collation: None,
            one_text: true,
            cast_to_text: false,
            cast_of_text: false,
            base_type: type_name.into(),
            remote_name: Ident::new(name),
        }
    }

    pub fn table(rel: &str, columns: Vec<Column>, key: &[&str]) -> Table {
        let rel = RelName::parse(rel).unwrap();
        Table { remote: rel.clone(), rel, oid: 1, columns, key: key.iter().map(|k| Ident::new(*k)).collect() }
    }

    pub fn customer() -> Result<Pair, Vec<Problem>> {
        compile(
            r#"{"tables": [{"first": "public.customer", "second": "v2.client",
             "forward": {"client_id": "id", "full_name": "first_name || ' ' || last_name", "balance": "balance_cents / 100.0"},
             "backward": {"first_name": "split_part(full_name, ' ', 1)", "last_name": "split_part(full_name, ' ', 2)",
                          "balance_cents": "round(balance * 100)::bigint"}}]}"#,
        )
    }

    fn compile(json: &str) -> Result<Pair, Vec<Problem>> {
        let named = Mapping::parse(json)?.remove(0);
        let first = table(
            "public.customer",
            vec![
                column("id", "bigint", 20),
                column("first_name", "text", 25),
                column("last_name", "text", 25),
                column("balance_cents", "bigint", 20),
                column("note", "text", 25),
            ],
            &["id"],
        );
        let second = table(
            "v2.client",
            vec![
                column("client_id", "bigint", 20),
                column("full_name", "text", 25),
                column("balance", "numeric", 1700),
                column("note", "text", 25),
            ],
            &[],
        );
        Pair::compile(0, &named, first, second)
    }

    #[test]
    fn plain_references_invert_and_same_names_need_no_entry() {
        let pair = customer().unwrap();
        assert_eq!(pair.key, [(Ident::new("id"), Ident::new("client_id"))]);
        assert_eq!(pair.backward_of(&Ident::new("id")), Some("\"client_id\""));
        assert_eq!(pair.backward_of(&Ident::new("note")), Some("\"note\""));
        assert_eq!(pair.forward.len(), 4);
        assert!(!pair.is_plain_backward());
    }

    #[test]
    fn everything_that_is_wrong_is_reported() {
        let problems = compile(
            r#"{"tables": [{"first": "public.customer", "second": "v2.client",
                "forward": {"client_id": "id + 1", "nonsense": "1"}, "backward": {"id": "client_id - 1"}}]}"#,
        )
        .unwrap_err();
        let text = problems.iter().map(|p| format!("{}: {}\n", p.object, p.message)).collect::<String>();
        assert!(text.contains("has no column \"nonsense\""), "{text}");
        assert!(text.contains("full_name\": no expression"), "{text}");
        assert!(text.contains("key column is not mapped"), "{text}");
    }
}

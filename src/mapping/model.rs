//! The mapping as the operator writes it. Pure.

use serde::Deserialize;
use serde_json::Map;

use super::form::{self, pointer_token};
use super::ident::RelName;
use crate::error::Problem;

/// `{"tables": [...]}`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mapping {
    pub tables: Vec<TableMapping>,
}

/// One table to one table: expressions by column.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TableMapping {
    pub first: String,
    pub second: String,
    #[serde(default)]
    pub second_view: Option<String>,
    #[serde(default)]
    pub forward: Map<String, serde_json::Value>,
    #[serde(default)]
    pub backward: Map<String, serde_json::Value>,
    /// Columns of the first table that identify a row, where it has no primary key.
    #[serde(default)]
    pub key: Option<Vec<String>>,
}

/// What `migration_start` may be told besides.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    pub conflicts: Policy,
    pub copy_workers: i32,
    pub chunk_rows: i64,
    /// Rows per second, over all copy workers.
    pub copy_rate: Option<i64>,
    pub fence: bool,
    pub target: Target,
    pub takeover: Takeover,
    pub foreign_keys: bool,
}

/// Whose change stands where both stores changed the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Policy {
    /// The later one, by the clocks of their servers; first's when both say the same.
    Latest,
    First,
    Second,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Target {
    Empty,
    Truncate,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Takeover {
    Both,
    Start,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            conflicts: Policy::Latest,
            copy_workers: 2,
            chunk_rows: 10_000,
            copy_rate: None,
            fence: true,
            target: Target::Empty,
            takeover: Takeover::Both,
            foreign_keys: false,
        }
    }
}

impl Options {
    /// Rows of one chunk: no more than are due in a tenth of a second, so that a throttled copy goes on evenly.
    pub fn chunk_size(&self) -> i64 {
        self.copy_rate.map_or(self.chunk_rows, |rate| self.chunk_rows.min(rate / 10).max(1))
    }

    /// # Errors
    /// The first thing that is wrong with them, by JSON pointer.
    pub fn parse(text: &str) -> Result<Options, Problem> {
        let options: Options = form::read("options", text)?;
        let between = |key: &str, value: i64, most: i64, unit: &str| {
            if (1..=most).contains(&value) {
                return Ok(());
            }
            Err(Problem::new(pointer_token(key), format!("is {value}"))
                .hint(format!("It can be between 1 and {most}{unit}.")))
        };
        between("copy_workers", options.copy_workers.into(), 32, "")?;
        between("chunk_rows", options.chunk_rows, 1_000_000, "")?;
        between("copy_rate", options.copy_rate.unwrap_or(1), 1_000_000_000, " rows/s")?;
        Ok(options)
    }
}

/// A table of the mapping with its names parsed and its expressions known to be text.
#[derive(Debug, Clone)]
pub struct NamedTable {
    pub first: RelName,
    pub second: RelName,
    pub second_view: Option<RelName>,
    pub forward: Vec<(String, String)>,
    pub backward: Vec<(String, String)>,
    pub key: Option<Vec<String>>,
}

impl Mapping {
    /// Parses the mapping; everything that is wrong with its form is returned at once.
    pub fn parse(text: &str) -> Result<Vec<NamedTable>, Vec<Problem>> {
        let mapping: Mapping = form::read("mapping", text).map_err(|problem| vec![problem])?;
        let mut problems = Vec::new();
        let mut tables: Vec<NamedTable> = Vec::new();
        if mapping.tables.is_empty() {
            problems.push(
                Problem::new("/tables", "names no table")
                    .hint("Name at least one: {\"tables\": [{\"first\": \"public.a\", \"second\": \"remote.a\"}]}."),
            );
        }
        for (i, table) in mapping.tables.iter().enumerate() {
            let mut name = |key: &str, text: &str| {
                let wrong = |e| {
                    Problem::new(format!("/tables/{i}/{key}"), e)
                        .hint("Write it as in SQL: schema.table, in double quotes where it is not all in lower case.")
                };
                RelName::parse(text).map_err(|e| problems.push(wrong(e))).ok()
            };
            let first = name("first", &table.first);
            let second = name("second", &table.second);
            let second_view = table.second_view.as_deref().map(|v| name("second_view", v));
            let forward = expressions(i, "forward", &table.forward, &mut problems);
            let backward = expressions(i, "backward", &table.backward, &mut problems);
            let (Some(first), Some(second)) = (first, second) else { continue };
            for other in &tables {
                if other.first == first {
                    problems.push(Problem::new(format!("/tables/{i}/first"), format!("{first} is named twice")));
                }
                if other.second == second {
                    problems.push(Problem::new(format!("/tables/{i}/second"), format!("{second} is named twice")));
                }
            }
            let second_view = second_view.flatten();
            if let Some(view) = &second_view
                && tables.iter().any(|other| other.second_view.as_ref() == Some(view))
            {
                problems.push(Problem::new(format!("/tables/{i}/second_view"), format!("{view} is named twice")));
            }
            tables.push(NamedTable { first, second, second_view, forward, backward, key: table.key.clone() });
        }
        if problems.is_empty() { Ok(tables) } else { Err(problems) }
    }
}

fn expressions(
    i: usize,
    key: &str,
    map: &Map<String, serde_json::Value>,
    problems: &mut Vec<Problem>,
) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for (column, value) in map {
        let wrong = match value.as_str() {
            Some(expression) if !expression.trim().is_empty() => {
                found.push((column.clone(), expression.to_string()));
                continue;
            }
            Some(_) => "is an empty string".to_string(),
            None => format!("is {}, not a string", form::kind(value)),
        };
        problems.push(
            Problem::new(format!("/tables/{i}/{key}{}", pointer_token(column)), wrong)
                .hint("Write an SQL expression, as a JSON string."),
        );
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_keys_are_errors() {
        let problems = Mapping::parse(r#"{"tables": [], "colour": 1}"#).unwrap_err();
        assert_eq!(problems[0].object, "/colour");
        assert!(Mapping::parse(r#"{"tables": [{"first": "a.b", "second": "c.d", "foreward": {}}]}"#).is_err());
        assert!(Options::parse(r#"{"takeover": "later"}"#).is_err());
        assert!(Options::parse(r#"{"copy_workers": 0}"#).is_err());
        assert!(Options::parse(r#"{"conflicts": "third"}"#).is_err());
        assert_eq!(Options::parse(r#"{"conflicts": "second"}"#).unwrap().conflicts, Policy::Second);
        assert_eq!(Options::parse("{}").unwrap().takeover, Takeover::Both);
    }

    #[test]
    fn all_problems_come_at_once() {
        let problems = Mapping::parse(
            r#"{"tables": [{"first": "customer", "second": "v2.a.b", "forward": {"x": 1}},
                           {"first": "p.t", "second": "v.t"}, {"first": "p.t", "second": "v.t"}]}"#,
        )
        .unwrap_err();
        let objects: Vec<_> = problems.iter().map(|p| p.object.as_str()).collect();
        assert_eq!(
            objects,
            ["/tables/0/first", "/tables/0/second", "/tables/0/forward/x", "/tables/2/first", "/tables/2/second"]
        );
    }
}

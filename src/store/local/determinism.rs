//! What an expression's value depends on besides the columns of its row: functions, casts, the clock, settings, other tables.
//!
//! The walk over the analysed query only collects; what is collected is judged by what the catalog says of it. Functions that
//! PostgreSQL calls stable are refused, but for those whose volatility is that of the types they are given: an enum's text, say.

mod hint;
mod walk;

use self::hint::{declare_hint, function_hint, literal_hint, of_text_hint, to_text_hint};
use self::walk::{Use, collect};
use super::LocalSession;
use crate::error::Result;
use crate::mapping::ident::quote_literal;
use crate::mapping::text::array_literal;
use crate::store::{Row, Session};

/// Why an expression cannot be part of a rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Objection {
    is_volatile: bool,
    /// What follows "the expression ...".
    pub message: String,
    pub hint: String,
}

/// Functions of pg_catalog that PostgreSQL calls stable because of the output functions of the types that they may be given.
const BY_OUTPUT: &[&str] = &[
    "array_out",
    "array_to_json",
    "array_to_string",
    "anytextcat",
    "concat",
    "concat_ws",
    "enum_out",
    "format",
    "json_build_array",
    "json_build_object",
    "jsonb_build_array",
    "jsonb_build_object",
    "multirange_out",
    "quote_literal",
    "quote_nullable",
    "range_out",
    "record_out",
    "row_to_json",
    "textanycat",
    "to_json",
    "to_jsonb",
];

/// Functions whose locale-dependent patterns are marked in the format: with a literal format without them they are deterministic.
const BY_FORMAT: &[&str] = &["to_char", "to_date", "to_number"];

/// Are these types' texts, and those of all that they are made of, the same in every session? The first that is not.
/// `date`, `timestamp` and their like are written by ISO 8601 in JSON.
const UNSETTLED: &str = "WITH RECURSIVE part(oid) AS ( \
        SELECT unnest($1::text::oid[]) \
        UNION \
        SELECT inner_part.oid FROM part JOIN pg_type t ON t.oid = part.oid CROSS JOIN LATERAL ( \
            SELECT t.typbasetype WHERE t.typtype = 'd' \
            UNION ALL SELECT t.typelem WHERE t.typelem <> 0 AND t.typlen = -1 AND t.typsubscript = 'array_subscript_handler'::regproc \
            UNION ALL SELECT a.atttypid FROM pg_attribute a WHERE t.typtype = 'c' AND a.attrelid = t.typrelid AND a.attnum > 0 AND NOT a.attisdropped \
            UNION ALL SELECT r.rngsubtype FROM pg_range r WHERE r.rngtypid = t.oid \
            UNION ALL SELECT r.rngtypid FROM pg_range r WHERE r.rngmultitypid = t.oid) AS inner_part(oid)) \
     SELECT format_type(t.oid, NULL) FROM part JOIN pg_type t ON t.oid = part.oid \
       JOIN pg_proc p ON p.oid = CASE WHEN $2 = 'input' THEN t.typinput ELSE t.typoutput END \
      WHERE t.typtype NOT IN ('d', 'c', 'e', 'r', 'm') AND NOT (t.typelem <> 0 AND t.typlen = -1 AND t.typsubscript = 'array_subscript_handler'::regproc) \
        AND (p.provolatile <> 'i' OR t.oid = 'bytea'::regtype AND $2 <> 'input') \
        AND NOT ($2 = 'json' AND t.oid IN ('date'::regtype, 'timestamp'::regtype)) \
      ORDER BY 1 LIMIT 1";

const FUNCTIONS: &str = "WITH called AS ( \
        SELECT $1::text::oid AS oid \
        UNION SELECT u.oid FROM pg_aggregate a, unnest(ARRAY[a.aggtransfn, a.aggfinalfn]::oid[]) AS u(oid) WHERE a.aggfnoid = $1::text::oid AND u.oid <> 0) \
     SELECT p.provolatile::text, p.pronamespace = 'pg_catalog'::regnamespace AND p.oid < 16384, p.proname::text, p.oid::regprocedure::text, \
            format('%I.%I(%s)', n.nspname, p.proname, pg_get_function_identity_arguments(p.oid)), 'timestamptz'::regtype = ANY (p.proargtypes::oid[]), \
            EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_proc'::regclass AND d.objid = p.oid AND d.deptype = 'e') \
       FROM called JOIN pg_proc p USING (oid) JOIN pg_namespace n ON n.oid = p.pronamespace \
      ORDER BY p.provolatile = 'v' DESC, p.oid <> $1::text::oid";

impl LocalSession {
    /// Parses and analyses `SELECT <one expression> FROM <one table>` without running it. What keeps it from being a rule?
    ///
    /// # Errors
    /// What PostgreSQL says of it.
    pub fn objection(&mut self, sql: &str) -> Result<Option<Objection>> {
        let uses = self.guarded(false, || collect(sql))?;
        let mut first = None;
        for found in &uses {
            let Some(objection) = self.judge(sql, found)? else { continue };
            if objection.is_volatile {
                return Ok(Some(objection));
            }
            first.get_or_insert(objection);
        }
        Ok(first)
    }

    /// Parses and analyses `SELECT <one expression> FROM <one table>`, and no more.
    ///
    /// # Errors
    /// What PostgreSQL says of it, or that it is more.
    pub fn analyse(&mut self, sql: &str) -> Result<()> {
        self.guarded(false, || collect(sql)).map(drop)
    }

    fn judge(&mut self, sql: &str, found: &Use) -> Result<Option<Objection>> {
        let objection = |message: String, hint: String| Ok(Some(Objection { is_volatile: false, message, hint }));
        match found {
            Use::Function { oid, arguments, literal } => {
                for row in self.query(FUNCTIONS, &[Some(&oid.to_string())])? {
                    let called = Called::new(&row, arguments, literal.as_deref());
                    if let Some(found) = self.judge_function(&called)? {
                        return Ok(Some(found));
                    }
                }
                Ok(None)
            }
            Use::Cast { from, to, location } => {
                let (from_unsettled, to_unsettled) = (self.unsettled(&[*from], "output")?, self.unsettled(&[*to], "input")?);
                let Some(leaf) = from_unsettled.as_deref().or(to_unsettled.as_deref()) else { return Ok(None) };
                let names = self.query(
                    "SELECT format_type($1::text::oid, NULL), format_type($2::text::oid, NULL)",
                    &[Some(&from.to_string()), Some(&to.to_string())],
                )?;
                let name = |i: usize| names[0][i].clone().unwrap_or_default();
                let hint = if from_unsettled.is_some() { to_text_hint(leaf, &source(sql, *location)) } else { of_text_hint(leaf) };
                objection(format!("depends on the session: it casts {} to {}", name(0), name(1)), hint)
            }
            Use::Literal { type_oid, location } => {
                let Some(leaf) = self.unsettled(&[*type_oid], "input")? else { return Ok(None) };
                let Some(text) = literal_at(sql, *location) else { return Ok(None) };
                if is_settled_literal(&leaf, &text) {
                    return Ok(None);
                }
                objection(
                    format!("depends on the session: it reads {} as {leaf}", quote_literal(&text)),
                    literal_hint(&leaf),
                )
            }
            Use::Session(what) => objection(format!("depends on the session: it calls {what}"), ROW_ONLY.into()),
            Use::Sequence => Ok(Some(Objection {
                is_volatile: true,
                message: "is volatile: it calls nextval(regclass)".into(),
                hint: SAME_VALUE.into(),
            })),
            Use::Json => objection(
                "depends on the session: it makes JSON of values whose text depends on settings".into(),
                "Convert them to text first, in a way that does not: to_char(column AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US'), for example.".into(),
            ),
            Use::Table(oid) => {
                let rows = self.query(
                    "SELECT format('%I.%I', n.nspname, c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = $1::text::oid",
                    &[Some(&oid.to_string())],
                )?;
                let table = rows[0][0].as_deref().unwrap_or("?");
                objection(format!("reads table {table}"), "An expression may use the columns of one row only: changes of other rows would not be noticed.".into())
            }
            Use::Rows(what) => objection(format!("contains {what}"), "An expression gives one value for one row.".into()),
        }
    }

    fn judge_function(&mut self, called: &Called) -> Result<Option<Objection>> {
        let signature = called.signature;
        if called.volatile {
            return Ok(Some(Objection {
                is_volatile: true,
                message: format!("is volatile: it calls {signature}"),
                hint: if called.built_in { SAME_VALUE.into() } else { declare_hint(called) },
            }));
        }
        if !called.stable || called.is_settled_by_literal() {
            return Ok(None);
        }
        let message = format!("depends on the session: it calls {signature}");
        if called.built_in && is_by_output(called.name) {
            let how = if called.name.contains("json") { "json" } else { "output" };
            let Some(leaf) = self.unsettled(called.arguments, how)? else { return Ok(None) };
            return Ok(Some(Objection {
                is_volatile: false,
                message: format!("{message} with a value of type {leaf}"),
                hint: to_text_hint(&leaf, "column"),
            }));
        }
        if called.built_in && called.name.contains("_populate_record") {
            // The first argument is of the type that is read.
            let read = called.arguments.get(..1).unwrap_or_default();
            let Some(leaf) = self.unsettled(read, "input")? else { return Ok(None) };
            let message = format!("{message} for a value of type {leaf}");
            return Ok(Some(Objection { is_volatile: false, message, hint: of_text_hint(&leaf) }));
        }
        Ok(Some(Objection { is_volatile: false, message, hint: function_hint(called) }))
    }

    /// The first of these types, or of their parts, whose text depends on a session's settings.
    fn unsettled(&mut self, types: &[u32], how: &str) -> Result<Option<String>> {
        let types = array_literal(types.iter().map(u32::to_string));
        Ok(self.query(UNSETTLED, &[Some(&types), Some(how)])?.into_iter().next().and_then(|mut r| r.pop().flatten()))
    }
}

/// A function that is called, and with what.
struct Called<'a> {
    volatile: bool,
    stable: bool,
    built_in: bool,
    name: &'a str,
    signature: &'a str,
    /// With its schema, for ALTER FUNCTION.
    full_name: &'a str,
    takes_timestamptz: bool,
    of_extension: bool,
    arguments: &'a [u32],
    literal: Option<&'a str>,
}

impl<'a> Called<'a> {
    fn new(row: &'a Row, arguments: &'a [u32], literal: Option<&'a str>) -> Called<'a> {
        let field = |i: usize| row[i].as_deref().unwrap_or("");
        Called {
            volatile: field(0) == "v",
            stable: field(0) == "s",
            built_in: field(1) == "t",
            name: field(2),
            signature: field(3),
            full_name: field(4),
            takes_timestamptz: field(5) == "t",
            of_extension: field(6) == "t",
            arguments,
            literal,
        }
    }

    /// Stable only for what a constant argument, which is known here, might ask for.
    fn is_settled_by_literal(&self) -> bool {
        let Some(literal) = self.literal.filter(|_| self.built_in) else { return false };
        let pattern = outside_quotes(literal).to_uppercase();
        match self.name {
            // Seconds since an instant are the same everywhere.
            "extract" | "date_part" => literal.eq_ignore_ascii_case("epoch"),
            // Names of months and days in the language of lc_time.
            "to_char" | "to_date" if !self.is_of_number() => !self.takes_timestamptz && !pattern.contains("TM"),
            // Separators and signs of lc_numeric and lc_monetary.
            name if BY_FORMAT.contains(&name) => !pattern.contains(['D', 'G', 'L']),
            _ => false,
        }
    }

    fn is_of_number(&self) -> bool {
        const NUMBERS: [u32; 5] = [20, 23, 700, 701, 1700]; // bigint, integer, real, double precision, numeric
        self.name == "to_number" || self.arguments.first().is_some_and(|a| NUMBERS.contains(a))
    }
}

const SAME_VALUE: &str = "An expression must give the same value whenever it is evaluated.";
const ROW_ONLY: &str = "An expression must give the same value in every session, from the columns of its row only.";

/// Aggregates into JSON are many: with and without NULLs or duplicate keys.
fn is_by_output(function: &str) -> bool {
    BY_OUTPUT.contains(&function) || function.starts_with("json") && function.contains("_agg")
}

/// The format is text but for what stands in double quotes.
fn outside_quotes(format: &str) -> String {
    format.split('"').step_by(2).collect::<Vec<_>>().join("\"")
}

/// A literal that every session reads alike: ISO 8601, with a time zone where the type has one.
fn is_settled_literal(leaf: &str, text: &str) -> bool {
    let text = text.trim();
    // The names of tables, functions, configurations are looked up once, as all names of an expression are.
    if leaf.starts_with("reg") || matches!(text, "epoch" | "infinity" | "-infinity") {
        return true;
    }
    let bytes = text.as_bytes();
    let starts_with_year =
        bytes.len() >= 10 && bytes[..4].iter().all(u8::is_ascii_digit) && bytes[4] == b'-' && bytes[7] == b'-';
    match leaf {
        "date" | "timestamp without time zone" => starts_with_year,
        "timestamp with time zone" => {
            starts_with_year && (text.ends_with('Z') || text[10..].contains(['+', '-']) || text.ends_with(" UTC"))
        }
        // sql_standard reads one sign as that of all fields.
        "interval" => !text.contains('-'),
        "time without time zone" => text.starts_with(|c: char| c.is_ascii_digit()),
        "time with time zone" => text.ends_with('Z') || text.contains(['+', '-']),
        _ => false,
    }
}

/// The text of the string literal that begins at, or next after, this byte.
fn literal_at(sql: &str, location: i32) -> Option<String> {
    let rest = sql.get(usize::try_from(location).ok()?..)?;
    let rest = &rest[rest.find('\'')? + 1..];
    let mut text = String::new();
    let mut chars = rest.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\'' if chars.peek() == Some(&'\'') => {
                chars.next();
                text.push('\'');
            }
            '\'' => return Some(text),
            c => text.push(c),
        }
    }
    None
}

/// The name that stands at this byte, where it is one: for a hint.
fn source(sql: &str, location: i32) -> String {
    let rest = usize::try_from(location).ok().and_then(|l| sql.get(l..)).unwrap_or("");
    let name: String = rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
    let after = rest[name.len()..].trim_start();
    if name.is_empty()
        || name.starts_with(|c: char| c.is_ascii_digit())
        || !(after.starts_with("::") || after.starts_with(')'))
    {
        return "column".into();
    }
    name
}

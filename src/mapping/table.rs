//! What a catalog says of a table, as far as a mapping needs it. Pure.

use super::ident::{Ident, RelName};

#[derive(Debug, Clone)]
pub struct Column {
    pub name: Ident,
    /// With type modifier, as `format_type` prints it.
    pub type_name: String,
    /// Without type modifier, so that a cast to it never rounds or cuts silently.
    pub cast_type: String,
    pub type_oid: u32,
    pub not_null: bool,
    /// GENERATED ALWAYS AS (...) STORED: derived by its own server, never written.
    pub generated: bool,
    /// `a`lways, by `d`efault
    pub identity: Option<char>,
    /// The default's expression as SQL.
    pub default: Option<String>,
    /// A collation other than the type's own, quoted.
    pub collation: Option<String>,
    /// Equal values have the same text: what a key needs, as keys travel as text.
    pub one_text: bool,
    /// There is a function that casts to text, and one that casts from it: they need not be those that print and read values.
    pub cast_to_text: bool,
    pub cast_of_text: bool,
    /// Without type modifier; of a domain, what it is over.
    pub base_type: String,
    /// The column's name on the second server, for a foreign table.
    pub remote_name: Ident,
}

#[derive(Debug, Clone)]
pub struct Table {
    pub rel: RelName,
    pub oid: u32,
    pub columns: Vec<Column>,
    /// Columns of the primary key or of the declared key.
    pub key: Vec<Ident>,
    /// The table on the second server that a foreign table stands for; for a local table its own name.
    pub remote: RelName,
}

impl Table {
    pub fn column(&self, name: &Ident) -> Option<&Column> {
        self.columns.iter().find(|c| c.name == *name)
    }
}

/// Types whose text is the same wherever a row goes, grouped by what may stand for what in a key.
pub fn key_family(type_oid: u32) -> u32 {
    match type_oid {
        20 | 21 | 23 => 20, // bigint, smallint, integer
        25 | 1043 => 25,    // text, varchar
        other => other,
    }
}

/// May a key column of the one type hold the same keys as one of the other, with the same text?
pub fn keys_agree(a: &Column, b: &Column) -> bool {
    match key_family(a.type_oid) {
        20 | 25 => key_family(a.type_oid) == key_family(b.type_oid),
        _ => a.type_name == b.type_name,
    }
}

/// The type that a key's text is cast to: wide enough for the keys of either store.
pub fn key_cast(column: &Column) -> String {
    if key_family(column.type_oid) == 20 { "bigint".to_string() } else { column.cast_type.clone() }
}

impl Column {
    /// The text of a value, as the type's output function gives it; `value` is an SQL expression.
    pub fn to_text(&self, value: &str) -> String {
        if self.cast_to_text {
            // The cast is another function: that of bpchar loses trailing blanks.
            return format!("CASE WHEN {value} IS NOT NULL THEN concat({value}) END");
        }
        format!("{value}::text")
    }

    /// The same text as a cast's, for a statement with more rights than the table's owner has: whoever owns a type can give it a cast, and
    /// with it code to run, at any time, but none to its output function.
    pub fn to_text_safely(&self, value: &str) -> String {
        if self.cast_to_text {
            format!("concat({value})::{}::text", self.base_type)
        } else {
            format!("concat({value})")
        }
    }

    /// The value of a text, as the type's input function reads it; `text` is an SQL expression.
    pub fn of_text(&self, text: &str) -> String {
        if self.cast_of_text {
            // The cast is another function: that to regclass does not know the text of no relation.
            return format!("(ARRAY[{text}]::text::{}[])[1]", self.cast_type);
        }
        format!("{text}::{}", self.cast_type)
    }
}

/// Types whose text depends on a session's settings (DateStyle, TimeZone, extra_float_digits, ...).
pub fn text_depends_on_settings(type_oid: u32) -> bool {
    !matches!(type_oid, 16 | 18 | 19 | 20 | 21 | 23 | 25 | 26 | 1042 | 1043 | 1700 | 2950)
}

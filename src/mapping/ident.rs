//! Identifiers as a type: made from a catalog read or from parsed input, quoted whenever they are shown. Pure.

use std::fmt;

/// PostgreSQL's `NAMEDATALEN - 1`.
pub const MAX_BYTES: usize = 63;

/// One identifier, held unquoted; `Display` always quotes.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ident(String);

impl Ident {
    /// From a catalog read, or a name that the extension makes.
    pub fn new(raw: impl Into<String>) -> Self {
        Ident(raw.into())
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// This name with `suffix`, cut (and told apart by a hash of the whole) so that it fits.
    pub fn with_suffix(&self, suffix: &str) -> Ident {
        if self.0.len() + suffix.len() <= MAX_BYTES {
            return Ident(format!("{}{suffix}", self.0));
        }
        let hash = format!("_{:08x}", fnv1a(self.0.as_bytes()));
        let mut end = MAX_BYTES - suffix.len() - hash.len();
        while !self.0.is_char_boundary(end) {
            end -= 1;
        }
        Ident(format!("{}{hash}{suffix}", &self.0[..end]))
    }
}

/// FNV-1a, 32 bits: a short, stable hash for names (never for security).
fn fnv1a(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |h, b| (h ^ u32::from(*b)).wrapping_mul(0x0100_0193))
}

impl fmt::Display for Ident {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", self.0.replace('"', "\"\""))
    }
}

/// A schema-qualified relation name; `Display` quotes both parts.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RelName {
    pub schema: Ident,
    pub name: Ident,
}

impl RelName {
    pub fn new(schema: impl Into<String>, name: impl Into<String>) -> Self {
        RelName { schema: Ident::new(schema), name: Ident::new(name) }
    }

    pub fn with_suffix(&self, suffix: &str) -> RelName {
        RelName { schema: self.schema.clone(), name: self.name.with_suffix(suffix) }
    }

    /// `schema.name`, each part quoted or folded to lower case as SQL does.
    pub fn parse(text: &str) -> Result<RelName, String> {
        let parts = parse_parts(text)?;
        match <[Ident; 2]>::try_from(parts) {
            Ok([schema, name]) => Ok(RelName { schema, name }),
            Err(parts) if parts.len() == 1 => Err(format!("{text} has no schema")),
            Err(_) => Err(format!("{text} is not a name of the form schema.table")),
        }
    }
}

impl fmt::Display for RelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.schema, self.name)
    }
}

/// The identifier that `text` is, when it is nothing but one identifier.
pub fn parse_ident(text: &str) -> Option<Ident> {
    match parse_parts(text) {
        Ok(mut parts) if parts.len() == 1 => parts.pop(),
        _ => None,
    }
}

fn parse_parts(text: &str) -> Result<Vec<Ident>, String> {
    let mut parts = Vec::new();
    let mut rest = text.trim();
    loop {
        let (ident, after) = parse_one(rest).ok_or_else(|| format!("{text} is not a valid name"))?;
        if ident.as_str().len() > MAX_BYTES {
            return Err(format!("the name {ident} is longer than {MAX_BYTES} bytes"));
        }
        parts.push(ident);
        let after = after.trim_start();
        if after.is_empty() {
            return Ok(parts);
        }
        rest = after.strip_prefix('.').ok_or_else(|| format!("{text} is not a valid name"))?.trim_start();
    }
}

fn parse_one(text: &str) -> Option<(Ident, &str)> {
    if let Some(quoted) = text.strip_prefix('"') {
        let mut name = String::new();
        let mut chars = quoted.char_indices().peekable();
        while let Some((at, c)) = chars.next() {
            match c {
                '"' if chars.peek().is_some_and(|(_, next)| *next == '"') => {
                    chars.next();
                    name.push('"');
                }
                '"' if name.is_empty() => return None,
                '"' => return Some((Ident(name), &quoted[at + 1..])),
                '\0' => return None,
                _ => name.push(c),
            }
        }
        return None;
    }
    let starts = |c: char| c.is_ascii_alphabetic() || c == '_' || !c.is_ascii();
    let goes_on = |c: char| starts(c) || c.is_ascii_digit() || c == '$';
    if !text.starts_with(starts) {
        return None;
    }
    let end = text.find(|c| !goes_on(c)).unwrap_or(text.len());
    Some((Ident(text[..end].to_ascii_lowercase()), &text[end..]))
}

/// A text literal for SQL; standard_conforming_strings does not matter to it.
pub fn quote_literal(text: &str) -> String {
    if text.contains('\\') {
        format!(" E'{}'", text.replace('\\', "\\\\").replace('\'', "''"))
    } else {
        format!("'{}'", text.replace('\'', "''"))
    }
}

/// Puts a dollar-quote tag that does not occur in `sql` where it has a NUL (which no name or value can hold): whatever a
/// function's body contains, it does not end there.
pub fn dollar_quoted(sql: &str) -> String {
    let tags = std::iter::once("$crossover$".to_string()).chain((0..).map(|n| format!("$crossover{n}$")));
    let free = tags.into_iter().find(|tag| !sql.contains(tag.as_str())).unwrap_or_default();
    sql.replace('\0', &free)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_parse_as_sql_does() {
        assert_eq!(RelName::parse("Public.Customer").unwrap(), RelName::new("public", "customer"));
        assert_eq!(RelName::parse(r#""we""ird"."täble""#).unwrap(), RelName::new("we\"ird", "täble"));
        assert_eq!(RelName::parse(r#" a . "B.c" "#).unwrap(), RelName::new("a", "B.c"));
        for bad in ["customer", "a.b.c", "", "a.", "1a.b", r#"a."""#, "a.b; drop", r#""a"#] {
            assert!(RelName::parse(bad).is_err(), "{bad}");
        }
        assert_eq!(parse_ident("Id"), Some(Ident::new("id")));
        assert_eq!(parse_ident("id + 1"), None);
    }

    #[test]
    fn a_body_cannot_end_its_own_quotes() {
        assert_eq!(dollar_quoted("AS \0a\0;"), "AS $crossover$a$crossover$;");
        assert_eq!(dollar_quoted("AS \0a$crossover$b\0;"), "AS $crossover0$a$crossover$b$crossover0$;");
    }

    #[test]
    fn long_names_are_cut_at_a_character_and_stay_apart() {
        let a = Ident::new("ä".repeat(31)).with_suffix("__first");
        let b = Ident::new(format!("{}x", "ä".repeat(31))).with_suffix("__first");
        assert!(a.as_str().len() <= MAX_BYTES && b.as_str().len() <= MAX_BYTES);
        assert_ne!(a, b);
        assert!(a.as_str().ends_with("__first"));
    }

    proptest! {
        #[test]
        fn quoted_names_parse_back(schema in "[^\0]{1,15}", name in "[^\0]{1,15}") {
            let rel = RelName::new(schema, name);
            prop_assert_eq!(RelName::parse(&rel.to_string()).unwrap(), rel);
        }
    }
}

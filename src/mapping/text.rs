//! PostgreSQL's array literal, in which keys and rows travel as text. Pure.

/// The literal of a one-dimensional text array.
pub fn array_literal<S: AsRef<str>>(items: impl IntoIterator<Item = S>) -> String {
    let mut out = String::from("{");
    for (i, item) in items.into_iter().enumerate() {
        if i > 0 {
            out.push(',');
        }
        out.push('"');
        for c in item.as_ref().chars() {
            if matches!(c, '"' | '\\') {
                out.push('\\');
            }
            out.push(c);
        }
        out.push('"');
    }
    out.push('}');
    out
}

/// Appends one row in the text format of COPY.
pub fn copy_line(out: &mut Vec<u8>, values: impl IntoIterator<Item = Option<impl AsRef<[u8]>>>) {
    for (i, value) in values.into_iter().enumerate() {
        if i > 0 {
            out.push(b'\t');
        }
        match value {
            None => out.extend_from_slice(b"\\N"),
            Some(value) => {
                for b in value.as_ref() {
                    match b {
                        b'\\' => out.extend_from_slice(b"\\\\"),
                        b'\n' => out.extend_from_slice(b"\\n"),
                        b'\r' => out.extend_from_slice(b"\\r"),
                        b'\t' => out.extend_from_slice(b"\\t"),
                        other => out.push(*other),
                    }
                }
            }
        }
    }
    out.push(b'\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrays_quote_every_item() {
        assert_eq!(array_literal(["1", "a,b", "{", "NULL", "q\"\\"]), r#"{"1","a,b","{","NULL","q\"\\"}"#);
        assert_eq!(array_literal::<&str>([]), "{}");
    }

    #[test]
    fn copy_lines_escape_what_copy_reads() {
        let mut out = Vec::new();
        copy_line(&mut out, [Some("a\tb\\"), None, Some("\n\r"), Some("")]);
        assert_eq!(out, b"a\\tb\\\\\t\\N\t\\n\\r\t\n");
    }
}

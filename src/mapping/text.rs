//! PostgreSQL's array literal, in which keys and rows travel as text. Pure.

/// The literal of a one-dimensional text array.
pub fn array_literal<S: AsRef<str>>(items: impl IntoIterator<Item = S>) -> String {
    nullable_array_literal(items.into_iter().map(Some))
}

/// The same, of items some of which are NULL.
pub fn nullable_array_literal<S: AsRef<str>>(items: impl IntoIterator<Item = Option<S>>) -> String {
    let mut out = String::from("{");
    for (i, item) in items.into_iter().enumerate() {
        if i > 0 {
            out.push(',');
        }
        let Some(item) = item else {
            out.push_str("NULL");
            continue;
        };
        out.reserve(item.as_ref().len() + 2);
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

/// Appends one row in the text format of COPY. `full` is told whenever there may be a piece to send, large values in between as well.
pub fn copy_line<E>(
    out: &mut Vec<u8>,
    values: &[Option<&[u8]>],
    mut full: impl FnMut(&mut Vec<u8>) -> Result<(), E>,
) -> Result<(), E> {
    for (i, value) in values.iter().enumerate() {
        if i > 0 {
            out.push(b'\t');
        }
        let Some(value) = value else {
            out.extend_from_slice(b"\\N");
            continue;
        };
        for piece in value.chunks(PIECE) {
            for b in piece {
                match b {
                    b'\\' => out.extend_from_slice(b"\\\\"),
                    b'\n' => out.extend_from_slice(b"\\n"),
                    b'\r' => out.extend_from_slice(b"\\r"),
                    b'\t' => out.extend_from_slice(b"\\t"),
                    other => out.push(*other),
                }
            }
            full(out)?;
        }
    }
    out.push(b'\n');
    Ok(())
}

/// Bytes of a value between two looks.
const PIECE: usize = 32 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrays_quote_every_item() {
        assert_eq!(array_literal(["1", "a,b", "{", "NULL", "q\"\\"]), r#"{"1","a,b","{","NULL","q\"\\"}"#);
        assert_eq!(array_literal::<&str>([]), "{}");
        assert_eq!(nullable_array_literal([Some("NULL"), None]), r#"{"NULL",NULL}"#);
    }

    #[test]
    fn copy_lines_escape_what_copy_reads() {
        let never = |_: &mut Vec<u8>| Ok::<(), ()>(());
        let mut out = Vec::new();
        copy_line(&mut out, &[Some(b"a\tb\\"), None, Some(b"\n\r"), Some(b"")], never).unwrap();
        assert_eq!(out, b"a\\tb\\\\\t\\N\t\\n\\r\t\n");
    }

    #[test]
    fn a_large_value_is_sent_in_pieces() {
        let large = vec![b'\\'; 5 * PIECE];
        let (mut out, mut sent, mut most) = (Vec::new(), 0, 0);
        let send = |out: &mut Vec<u8>| {
            most = most.max(out.len());
            sent += std::mem::take(out).len();
            Ok::<(), ()>(())
        };
        copy_line(&mut out, &[Some(&large), Some(b"x")], send).unwrap();
        assert_eq!((sent + out.len(), most), (10 * PIECE + 3, 2 * PIECE));
    }
}

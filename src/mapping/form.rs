//! Reads JSON into the mapping's types; what does not fit is said by JSON pointer (RFC 6901) and in JSON's words. Pure.

use std::fmt;

use serde::de::value::{MapDeserializer, SeqDeserializer, StrDeserializer};
use serde::de::{DeserializeOwned, Deserializer, IntoDeserializer, Unexpected, Visitor};
use serde_json::Value;
use serde_path_to_error::Segment;

use crate::error::Problem;

/// Reads `text`, which a message about all of it calls `what`.
///
/// # Errors
/// The first thing that does not fit the form.
pub fn read<T: DeserializeOwned>(what: &str, text: &str) -> Result<T, Problem> {
    let value: Value = serde_json::from_str(text).map_err(|e| Problem::new(what, format!("cannot be read: {e}")))?;
    serde_path_to_error::deserialize(Json(&value)).map_err(|e| {
        let pointer: String = e.path().iter().map(token).collect();
        let Misfit { key, message, hint } = e.into_inner();
        let pointer = pointer + &key.map(|k| pointer_token(&k)).unwrap_or_default();
        let object = if pointer.is_empty() { what.to_string() } else { pointer };
        Problem { hint, ..Problem::new(object, message) }
    })
}

/// One step of a JSON pointer.
pub fn pointer_token(key: &str) -> String {
    format!("/{}", key.replace('~', "~0").replace('/', "~1"))
}

fn token(segment: &Segment) -> String {
    match segment {
        Segment::Seq { index } => format!("/{index}"),
        Segment::Map { key } => pointer_token(key),
        Segment::Enum { variant } => pointer_token(variant),
        Segment::Unknown => String::new(),
    }
}

/// What a value is, in JSON's words.
pub fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// What serde found not to fit, before it is known where.
#[derive(Debug)]
struct Misfit {
    /// A key that is missing at that place.
    key: Option<String>,
    message: String,
    hint: Option<String>,
}

impl Misfit {
    fn new(message: impl Into<String>) -> Misfit {
        Misfit { key: None, message: message.into(), hint: None }
    }

    fn not(value: &Value, expected: &str) -> Misfit {
        Misfit::new(format!("is {}, not {expected}", kind(value)))
    }
}

impl fmt::Display for Misfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Misfit {}

impl serde::de::Error for Misfit {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Misfit::new(message.to_string())
    }

    fn invalid_value(unexpected: Unexpected, _: &dyn serde::de::Expected) -> Self {
        match unexpected {
            Unexpected::Unsigned(n) => Misfit::new(format!("is {n}, which is out of range")),
            Unexpected::Signed(n) => Misfit::new(format!("is {n}, which is out of range")),
            other => Misfit::new(format!("cannot be {other}")),
        }
    }

    fn unknown_variant(variant: &str, expected: &'static [&'static str]) -> Self {
        let quoted: Vec<String> = expected.iter().map(|v| format!("\"{v}\"")).collect();
        Misfit { hint: Some(format!("It can be {}.", quoted.join(", "))), ..Misfit::new(format!("is \"{variant}\"")) }
    }

    fn unknown_field(_: &str, expected: &'static [&'static str]) -> Self {
        Misfit {
            hint: Some(format!("The keys that are allowed here: {}.", expected.join(", "))),
            ..Misfit::new("is not a key that is known here")
        }
    }

    fn missing_field(field: &'static str) -> Self {
        Misfit { key: Some(field.to_string()), ..Misfit::new("is missing") }
    }
}

/// A JSON value that says by itself what it is not: the type that is asked for is known from the question.
#[derive(Clone, Copy)]
struct Json<'a>(&'a Value);

impl IntoDeserializer<'_, Misfit> for Json<'_> {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

macro_rules! expect {
    ($($method:ident)+: $is:expr, $expected:literal) => {
        $(fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Misfit> {
            let is: fn(&Value) -> bool = $is;
            if is(self.0) { self.deserialize_any(visitor) } else { Err(Misfit::not(self.0, $expected)) }
        })+
    };
}

impl<'de> Deserializer<'de> for Json<'_> {
    type Error = Misfit;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Misfit> {
        match self.0 {
            Value::Null => visitor.visit_unit(),
            Value::Bool(b) => visitor.visit_bool(*b),
            Value::Number(n) => match (n.as_i64(), n.as_u64(), n.as_f64()) {
                (Some(n), ..) => visitor.visit_i64(n),
                (_, Some(n), _) => visitor.visit_u64(n),
                (_, _, n) => visitor.visit_f64(n.unwrap_or(f64::NAN)),
            },
            Value::String(s) => visitor.visit_str(s),
            Value::Array(items) => visitor.visit_seq(SeqDeserializer::new(items.iter().map(Json))),
            Value::Object(fields) => {
                visitor.visit_map(MapDeserializer::new(fields.iter().map(|(k, v)| (k.as_str(), Json(v)))))
            }
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Misfit> {
        if self.0.is_null() { visitor.visit_none() } else { visitor.visit_some(self) }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, Misfit> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Misfit> {
        self.deserialize_map(visitor)
    }

    fn deserialize_tuple<V: Visitor<'de>>(self, _: usize, visitor: V) -> Result<V::Value, Misfit> {
        self.deserialize_seq(visitor)
    }

    fn deserialize_tuple_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: usize,
        visitor: V,
    ) -> Result<V::Value, Misfit> {
        self.deserialize_seq(visitor)
    }

    /// Only words: no enum of the mapping carries data.
    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Misfit> {
        match self.0 {
            Value::String(word) => visitor.visit_enum(StrDeserializer::new(word)),
            other => Err(Misfit::not(other, "a string")),
        }
    }

    expect!(deserialize_str deserialize_string deserialize_char deserialize_identifier deserialize_bytes deserialize_byte_buf:
        Value::is_string, "a string");
    expect!(deserialize_bool: Value::is_boolean, "a boolean");
    expect!(deserialize_i8 deserialize_i16 deserialize_i32 deserialize_i64 deserialize_u8 deserialize_u16 deserialize_u32 deserialize_u64:
        |v| v.is_i64() || v.is_u64(), "an integer");
    expect!(deserialize_f32 deserialize_f64: Value::is_number, "a number");
    expect!(deserialize_seq: Value::is_array, "an array");
    expect!(deserialize_map: Value::is_object, "an object");
    expect!(deserialize_unit: Value::is_null, "null");

    fn deserialize_unit_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, Misfit> {
        self.deserialize_unit(visitor)
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Misfit> {
        self.deserialize_any(visitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mapping::model::{Mapping, Options};

    fn misfit<T: DeserializeOwned + fmt::Debug>(text: &str) -> String {
        let p = read::<T>("mapping", text).unwrap_err();
        format!("{}: {} ({})", p.object, p.message, p.hint.unwrap_or_default())
    }

    #[test]
    fn what_does_not_fit_has_a_pointer() {
        let table = r#""first": "a.b", "second": "c.d""#;
        let keys = "The keys that are allowed here: first, second, second_view, forward, backward, key.";
        for (text, expected) in [
            ("[]".to_string(), "mapping: is an array, not an object ()".to_string()),
            ("null".into(), "mapping: is null, not an object ()".into()),
            ("{}".into(), "/tables: is missing ()".into()),
            (r#"{"tables": {}}"#.into(), "/tables: is an object, not an array ()".into()),
            (r#"{"tables": ["a"]}"#.into(), "/tables/0: is a string, not an object ()".into()),
            (r#"{"tables": [{"first": "a.b"}]}"#.into(), "/tables/0/second: is missing ()".into()),
            (r#"{"tables": [{"first": 1}]}"#.into(), "/tables/0/first: is a number, not a string ()".into()),
            (
                format!(r#"{{"tables": [{{{table}}}, {{{table}, "foreward": {{}}}}]}}"#),
                format!("/tables/1/foreward: is not a key that is known here ({keys})"),
            ),
            (
                format!(r#"{{"tables": [{{{table}, "a/b~c": 1}}]}}"#),
                format!("/tables/0/a~1b~0c: is not a key that is known here ({keys})"),
            ),
            (
                format!(r#"{{"tables": [{{{table}, "forward": "id"}}]}}"#),
                "/tables/0/forward: is a string, not an object ()".into(),
            ),
            (
                format!(r#"{{"tables": [{{{table}, "key": ["id", 2]}}]}}"#),
                "/tables/0/key/1: is a number, not a string ()".into(),
            ),
            (
                format!(r#"{{"tables": [{{{table}, "second_view": true}}]}}"#),
                "/tables/0/second_view: is a boolean, not a string ()".into(),
            ),
            (
                r#"{"tables": [], "colour": 1}"#.into(),
                "/colour: is not a key that is known here (The keys that are allowed here: tables.)".into(),
            ),
        ] {
            assert_eq!(misfit::<Mapping>(&text), expected, "{text}");
        }
        for (text, expected) in [
            (r#"{"copy_workers": "two"}"#, "/copy_workers: is a string, not an integer ()"),
            (r#"{"copy_workers": 1.5}"#, "/copy_workers: is a number, not an integer ()"),
            (r#"{"copy_workers": 3000000000}"#, "/copy_workers: is 3000000000, which is out of range ()"),
            (r#"{"fence": "yes"}"#, "/fence: is a string, not a boolean ()"),
            (r#"{"target": 1}"#, "/target: is a number, not a string ()"),
            (r#"{"target": "full"}"#, r#"/target: is "full" (It can be "empty", "truncate".)"#),
        ] {
            assert_eq!(misfit::<Options>(text), expected, "{text}");
        }
    }
}

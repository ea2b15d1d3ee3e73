//! What to write instead of an expression that depends on the session.

use super::{Called, ROW_ONLY};

pub(super) fn declare_hint(called: &Called) -> String {
    if called.of_extension {
        return wrap_hint();
    }
    format!(
        "If its result depends on nothing but its arguments and some settings, pin these: ALTER FUNCTION {} IMMUTABLE SET timezone = 'UTC' SET datestyle = 'ISO';",
        called.full_name
    )
}

pub(super) fn wrap_hint() -> String {
    "Call it in a function of your own that pins the settings: CREATE FUNCTION ... IMMUTABLE SET timezone = 'UTC' SET datestyle = 'ISO' ...".into()
}

pub(super) fn function_hint(called: &Called) -> String {
    if !called.built_in {
        return declare_hint(called);
    }
    match called.name {
        "now" | "transaction_timestamp" | "statement_timestamp" | "current_setting" | "pg_typeof" | "current_schema" | "age"
            if called.arguments.len() < 2 =>
        {
            ROW_ONLY.into()
        }
        "to_tsvector" | "to_tsquery" | "plainto_tsquery" | "phraseto_tsquery" | "websearch_to_tsquery" | "ts_headline" => {
            format!("Name the text search configuration: {}('english', ...).", called.name)
        }
        "timestamptz" if called.arguments.first() == Some(&DATE) => {
            "Say in which time zone: column::timestamp AT TIME ZONE 'UTC'.".into()
        }
        "timestamptz" => "Say in which time zone: column AT TIME ZONE 'UTC'.".into(),
        "to_char" if called.takes_timestamptz => {
            "Say in which time zone: to_char(column AT TIME ZONE 'UTC', ...); of a date: to_char(column::timestamp, ...).".into()
        }
        "to_char" | "to_date" => "Write the format as a literal, without TM (names in the language of lc_time).".into(),
        "to_number" => "Write the format as a literal, without D, G and L (signs of the locale).".into(),
        "timestamptz_pl_interval" | "timestamptz_mi_interval" | "interval_pl_timestamptz" => {
            "Say in which time zone days are counted: (column AT TIME ZONE 'UTC' + ...) AT TIME ZONE 'UTC'.".into()
        }
        "date" | "time" | "timestamp" | "timetz" | "date_trunc" | "date_part" | "extract" if called.takes_timestamptz => {
            "Say in which time zone, and go on with that: column AT TIME ZONE 'UTC'.".into()
        }
        name if name.contains("_timestamptz") || name.starts_with("timestamptz_") => {
            "Say in which time zone: column AT TIME ZONE 'UTC' makes one of the two types of the other.".into()
        }
        _ => wrap_hint(),
    }
}

const DATE: u32 = 1082;

/// How to write a value of this type as text that is the same in every session.
pub(super) fn to_text_hint(leaf: &str, column: &str) -> String {
    match leaf {
        "timestamp with time zone" => {
            format!("Write to_char({column} AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US').")
        }
        "timestamp without time zone" => format!("Write to_char({column}, 'YYYY-MM-DD\"T\"HH24:MI:SS.US')."),
        "date" => format!("Write to_char({column}::timestamp, 'YYYY-MM-DD')."),
        "bytea" => format!("Write encode({column}, 'hex')."),
        _ => wrap_hint(),
    }
}

/// How to read a text as a value of this type in every session alike.
pub(super) fn of_text_hint(leaf: &str) -> String {
    match leaf {
        "date" => "Write to_date(column, 'YYYY-MM-DD').".into(),
        _ => wrap_hint(),
    }
}

pub(super) fn literal_hint(leaf: &str) -> String {
    match leaf {
        "timestamp with time zone" => "Write it as in '2024-01-31 12:00:00+00'.",
        "timestamp without time zone" => "Write it as in '2024-01-31 12:00:00'.",
        "date" => "Write it as in '2024-01-31'.",
        "interval" => "Write it as in '1 day 02:00:00', without a sign.",
        _ => "Write a constant of a type whose text is the same in every session.",
    }
    .into()
}

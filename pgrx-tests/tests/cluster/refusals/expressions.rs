//! Expressions that are not valid, or that not every session evaluates alike; and those that only look like them.

use pgrx_tests::{Migration, Witness};
use serde_json::{Value, json};

use super::{Expected, NOTHING, bench, one, start};

const SAME_VALUE: &str = "An expression must give the same value whenever it is evaluated.";
const ROW_ONLY: &str = "An expression must give the same value in every session, from the columns of its row only.";
const WRAP: &str = "Call it in a function of your own that pins the settings: CREATE FUNCTION ... IMMUTABLE SET timezone = 'UTC' SET datestyle = 'ISO' ...";

#[test]
fn expressions() {
    let bench = bench();
    let witness = Witness::of(&bench.pair.first);
    let forward = |expression: &str| one("s1.e", "f2.v", &json!({"forward": {"v": expression}}));
    let one_value = "An expression gives one value for one row.";
    let zone = "Say in which time zone, and go on with that: column AT TIME ZONE 'UTC'.";
    let in_utc = |column: &str| format!("Write to_char({column} AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US').");
    let pin = |signature: &str| {
        format!(
            "If its result depends on nothing but its arguments and some settings, pin these: ALTER FUNCTION {signature} IMMUTABLE SET timezone = 'UTC' SET datestyle = 'ISO';"
        )
    };
    let functions = "No function matches the given name and argument types. You might need to add explicit type casts.";
    let operators = "No operator matches the given name and argument types. You might need to add explicit type casts.";
    let rows: Vec<(&str, &str, String)> = vec![
        // What does not parse, or does not fit.
        ("t ||", "is not valid: syntax error at or near \")\"", String::new()),
        ("nothing", "is not valid: column \"nothing\" does not exist", String::new()),
        ("nothing(t)", "is not valid: function nothing(text) does not exist", functions.into()),
        ("id + t", "is not valid: operator does not exist: bigint + text", operators.into()),
        ("t::nothing", "is not valid: type \"nothing\" does not exist", String::new()),
        ("id::timestamp", "is not valid: cannot cast type bigint to timestamp without time zone", String::new()),
        ("'x'::integer", "is not valid: invalid input syntax for type integer: \"x\"", String::new()),
        ("$1", "is not valid: there is no parameter $1", String::new()),
        // What is more than one value of one row.
        ("t AS v", "is not valid: syntax error at or near \"AS\"", String::new()),
        ("t) FROM s1.e --", "is not valid: …", String::new()),
        ("t) || (t", "is not valid: syntax error at or near \")\"", String::new()),
        ("t, t", "is not valid: it is more than one expression", String::new()),
        ("max(t)", "contains an aggregate", one_value.into()),
        ("row_number() OVER ()", "contains a window function", one_value.into()),
        ("unnest(tags)", "contains a function that returns a set", one_value.into()),
        ("(SELECT max(label) FROM s1.t)", "reads table s1.t", "An expression may use the columns of one row only: changes of other rows would not be noticed.".into()),
        // Volatile.
        ("t || random()", "is volatile: it calls random()", SAME_VALUE.into()),
        ("clock_timestamp()::text", "is volatile: it calls clock_timestamp()", SAME_VALUE.into()),
        ("nextval('s1.seq')", "is volatile: it calls nextval(regclass)", SAME_VALUE.into()),
        ("gen_random_uuid()", "is volatile: it calls gen_random_uuid()", SAME_VALUE.into()),
        ("undeclared(t)", "is volatile: it calls undeclared(text)", pin("s1.undeclared(text)")),
        ("now()::text || random()", "is volatile: it calls random()", SAME_VALUE.into()),
        // Of the session.
        ("now() > tz", "depends on the session: it calls now()", ROW_ONLY.into()),
        ("CURRENT_DATE > d", "depends on the session: it calls CURRENT_DATE", ROW_ONLY.into()),
        ("CURRENT_USER", "depends on the session: it calls CURRENT_USER", ROW_ONLY.into()),
        ("current_setting('TimeZone')", "depends on the session: it calls current_setting(text)", ROW_ONLY.into()),
        // Text by output functions that depend on settings.
        ("tz::text", "depends on the session: it casts timestamp with time zone to text", in_utc("tz")),
        ("(tz + iv)::text", "depends on the session: it casts timestamp with time zone to text", in_utc("column")),
        ("ts::text", "depends on the session: it casts timestamp without time zone to text", "Write to_char(ts, 'YYYY-MM-DD\"T\"HH24:MI:SS.US').".into()),
        ("d::text", "depends on the session: it casts date to text", "Write to_char(d::timestamp, 'YYYY-MM-DD').".into()),
        ("dom::text", "depends on the session: it casts day to text", "Write to_char(dom::timestamp, 'YYYY-MM-DD').".into()),
        ("iv::text", "depends on the session: it casts interval to text", WRAP.into()),
        ("cash::text", "depends on the session: it casts money to text", WRAP.into()),
        ("b::text", "depends on the session: it casts bytea to text", "Write encode(b, 'hex').".into()),
        ("days::text", "depends on the session: it casts date[] to text", "Write to_char(days::timestamp, 'YYYY-MM-DD').".into()),
        ("u::text", "depends on the session: it casts unsettled to text", in_utc("u")),
        ("dr::text", "depends on the session: it casts daterange to text", "…".into()),
        ("'s1.t'::regclass::text", "depends on the session: …", "…".into()),
        ("t || ts", "depends on the session: it calls textanycat(text,anynonarray) with a value of type timestamp without time zone", "Write to_char(column, 'YYYY-MM-DD\"T\"HH24:MI:SS.US').".into()),
        ("concat(t, ', ', tz)", "depends on the session: it calls concat(\"any\") with a value of type timestamp with time zone", in_utc("column")),
        ("format('%s', b)", "depends on the session: it calls format(text,\"any\") with a value of type bytea", "Write encode(column, 'hex').".into()),
        ("array_to_string(days, ',')", "depends on the session: it calls array_to_string(anyarray,text) with a value of type date", "Write to_char(column::timestamp, 'YYYY-MM-DD').".into()),
        ("to_jsonb(u)", "depends on the session: it calls to_jsonb(anyelement) with a value of type timestamp with time zone", in_utc("column")),
        ("to_jsonb(ROW(t, tz))", "depends on the session: it calls to_jsonb(anyelement) with a value of type timestamp with time zone", in_utc("column")),
        ("(SELECT jsonb_agg(x) FROM unnest(ARRAY[iv]) AS x)", "depends on the session: it calls jsonb_agg(anyelement) with a value of type interval", WRAP.into()),
        // Values by input functions that depend on settings.
        ("t::date = d", "depends on the session: it casts text to date", "Write to_date(column, 'YYYY-MM-DD').".into()),
        ("t::timestamptz = tz", "depends on the session: it casts text to timestamp with time zone", WRAP.into()),
        ("d > '01/02/2024'", "depends on the session: it reads '01/02/2024' as date", "Write it as in '2024-01-31'.".into()),
        ("ts > 'now'", "depends on the session: it reads 'now' as timestamp without time zone", "Write it as in '2024-01-31 12:00:00'.".into()),
        ("tz > '2024-01-31 12:00'", "depends on the session: it reads '2024-01-31 12:00' as timestamp with time zone", "Write it as in '2024-01-31 12:00:00+00'.".into()),
        ("(jsonb_populate_record(u, j)).a", "depends on the session: it calls jsonb_populate_record(anyelement,jsonb) for a value of type timestamp with time zone", WRAP.into()),
        // Time zones, locales and configurations.
        ("date_trunc('day', tz) = ts", "depends on the session: it calls …", "…".into()),
        ("extract(hour FROM tz)", "depends on the session: it calls \"extract\"(text,timestamp with time zone)", zone.into()),
        ("tz::date = d", "depends on the session: it calls date(timestamp with time zone)", zone.into()),
        ("d::timestamptz = tz", "depends on the session: it calls timestamptz(date)", "Say in which time zone: column::timestamp AT TIME ZONE 'UTC'.".into()),
        ("ts::timestamptz = tz", "depends on the session: it calls timestamptz(timestamp without time zone)", "Say in which time zone: column AT TIME ZONE 'UTC'.".into()),
        ("tz + iv = tz", "depends on the session: it calls timestamptz_pl_interval(timestamp with time zone,interval)", "Say in which time zone days are counted: (column AT TIME ZONE 'UTC' + ...) AT TIME ZONE 'UTC'.".into()),
        ("ts = tz", "depends on the session: it calls timestamp_eq_timestamptz(timestamp without time zone,timestamp with time zone)", "Say in which time zone: column AT TIME ZONE 'UTC' makes one of the two types of the other.".into()),
        ("to_char(tz, 'YYYY')", "depends on the session: it calls to_char(timestamp with time zone,text)", "Say in which time zone: to_char(column AT TIME ZONE 'UTC', ...); of a date: to_char(column::timestamp, ...).".into()),
        ("to_char(ts, 'TMMonth')", "depends on the session: it calls to_char(timestamp without time zone,text)", "Write the format as a literal, without TM (names in the language of lc_time).".into()),
        ("to_char(ts, t)", "depends on the session: it calls to_char(timestamp without time zone,text)", "Write the format as a literal, without TM (names in the language of lc_time).".into()),
        ("to_char(n, '999D99')", "depends on the session: it calls to_char(numeric,text)", "…".into()),
        ("to_tsvector(t)", "depends on the session: it calls to_tsvector(text)", "Name the text search configuration: to_tsvector('english', ...).".into()),
        ("declared_stable(tz)", "depends on the session: it calls declared_stable(timestamp with time zone)", pin("s1.declared_stable(timestamp with time zone)")),
    ];
    for (expression, problem, hint) in rows {
        let detail = format!("/tables/0/forward/v: the expression {expression} {problem}");
        let hint = if hint.is_empty() { NOTHING } else { &hint };
        bench.refuses(expression, &start(&forward(expression)), &Expected::problem(&detail, hint));
    }
    let backward = one("s1.e", "f2.v", &json!({"forward": {"v": "t"}, "backward": {"d": "v::date"}}));
    bench.refuses(
        "backward",
        &start(&backward),
        &Expected::problem(
            "/tables/0/backward/d: the expression v::date depends on the session: it casts text to date",
            "Write to_date(column, 'YYYY-MM-DD').",
        ),
    );
    bench.refuses(
        "what the mapping leaves out",
        &start(&one("s1.same", "f2.same", &json!({"backward": {"at": "NULL"}}))),
        &Expected::problem("\"f2\".\"same\".\"at\": the expression \"at\" depends on the session: it casts timestamp with time zone to text", &in_utc("column")),
    );
    witness.testify();
}

/// What looks like the refused ones and is not, the remedies of the hints among them.
#[test]
fn expressions_that_every_session_evaluates_alike() {
    let bench = bench();
    let expressions = [
        "lower(t)",
        "id::text",
        "n::text",
        "f::text",
        "m::text",
        "tags::text",
        "moods::text",
        "s::text",
        "r::text",
        "j::text",
        "t || id",
        "t || m",
        "concat(t, n, m)",
        "concat_ws('-', t, id)",
        "format('%s-%s', t, id)",
        "quote_nullable(m)",
        "to_jsonb(tags)::text",
        "to_jsonb(s)::text",
        "jsonb_build_object('a', t, 'd', d, 'ts', ts)::text",
        "array_to_string(tags, ',')",
        "array_to_string(moods, ',')",
        "to_char(tz AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US')",
        "to_char(ts, 'YYYY-MM-DD\"T\"HH24:MI:SS.US')",
        "to_char(d::timestamp, 'YYYY-MM-DD')",
        "encode(b, 'hex')",
        "to_tsvector('english', t)::text",
        "pinned(tz)",
        "extract(epoch FROM tz)::text",
        "extract(hour FROM tz AT TIME ZONE 'UTC')::text",
        "((tz AT TIME ZONE 'UTC' + interval '1 day') AT TIME ZONE 'UTC' = tz)::text",
        "(tz > '2024-01-31 12:00:00+00')::text",
        "(d > '2024-01-31')::text",
        "(ts > DATE '2024-01-31')::text",
        "(ts > 'epoch')::text",
        "((tz AT TIME ZONE 'UTC')::date = to_date(t, 'YYYY-MM-DD'))::text",
        "(d::timestamp AT TIME ZONE 'UTC' = tz)::text",
        "(date_trunc('day', tz AT TIME ZONE 'UTC') = ts)::text",
        "to_char(n, 'FM999990.00')",
        "(SELECT string_agg(x, ',') FROM unnest(tags) AS x)",
        "(SELECT jsonb_agg(x) FROM unnest(tags) AS x)::text",
        "(t::s1.mood = m)::text",
        "CASE WHEN m = 'good' THEN t END",
        "(jsonb_populate_record(s, j)).a::text",
    ];
    let columns: Vec<String> = (0..expressions.len()).map(|i| format!("c{i} text")).collect();
    bench.pair.second_store("many", &format!("CREATE TABLE v (id bigint PRIMARY KEY, {})", columns.join(", ")));
    bench.pair.first.sql(
        "INSERT INTO s1.e (id, ts, tz, d, n, m, tags) VALUES (1, '2024-01-31', '2024-01-31 12:00+00', '2024-01-31', 1.5, 'good', '{a,b}')",
    );
    let forward: Value = expressions
        .iter()
        .enumerate()
        .map(|(i, e)| (format!("c{i}"), Value::from(*e)))
        .collect::<serde_json::Map<_, _>>()
        .into();
    let mapping = json!({"tables": [{"first": "s1.e", "second": "many.v", "forward": forward}]});
    let migration = Migration::start(&bench.pair, "alike", &mapping);
    migration.until_state("first");
    migration.wait();
    let copied = bench.pair.second.text("SELECT c21 FROM many.v");
    assert_eq!(copied.as_deref(), Some("2024-01-31T12:00:00.000000"));
    migration.cancel();
}

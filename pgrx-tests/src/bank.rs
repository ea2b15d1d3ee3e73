//! The four tables of pgbench's built-in scripts, and a second store of other names, types and units for them.

use serde_json::{Value, json};

use crate::cluster::Cluster;
use crate::pair::Pair;
use crate::pgbench::Pgbench;

/// Fills the tables at a scale and creates the second store.
pub fn create(pair: &Pair, scale: u32) {
    Pgbench::init(&pair.first, scale);
    pair.first.sql("ALTER TABLE pgbench_history ADD id bigserial PRIMARY KEY");
    pair.second_store(
        "bank",
        "CREATE TABLE branch  (branch_no integer PRIMARY KEY, balance numeric(20,2), note text);
         CREATE TABLE teller  (teller_no integer PRIMARY KEY, branch_no integer, thousandths bigint, note varchar(84));
         CREATE TABLE account (account_no integer PRIMARY KEY, branch_no bigint, balance numeric(20,2), note text);
         CREATE TABLE movement (movement_no bigint PRIMARY KEY, teller_no bigint, branch_no integer, account_no integer,
                                amount numeric(12,2), happened_at timestamptz, note text)",
    );
}

/// The mapping: money in another unit and type, padded text as text, times with a zone.
pub fn mapping() -> Value {
    json!({"tables": [
        {"first": "public.pgbench_branches", "second": "bank.branch", "second_view": "public.branch",
         "forward":  {"branch_no": "bid", "balance": "bbalance / 100.0", "note": "filler::text"},
         "backward": {"bbalance": "round(balance * 100)::integer", "filler": "note::character(88)"}},
        {"first": "public.pgbench_tellers", "second": "bank.teller", "second_view": "public.teller",
         "forward":  {"teller_no": "tid", "branch_no": "bid", "thousandths": "tbalance::bigint * 10", "note": "filler::varchar(84)"},
         "backward": {"tbalance": "(thousandths / 10)::integer", "filler": "note::character(84)"}},
        {"first": "public.pgbench_accounts", "second": "bank.account", "second_view": "public.account",
         "forward":  {"account_no": "aid", "branch_no": "bid::bigint", "balance": "abalance / 100.0", "note": "filler::text"},
         "backward": {"bid": "branch_no::integer", "abalance": "round(balance * 100)::integer", "filler": "note::character(84)"}},
        {"first": "public.pgbench_history", "second": "bank.movement", "second_view": "public.movement",
         "forward":  {"movement_no": "id", "teller_no": "tid::bigint", "branch_no": "bid", "account_no": "aid", "amount": "delta / 100.0",
                      "happened_at": "mtime AT TIME ZONE 'UTC'", "note": "filler::text"},
         "backward": {"tid": "teller_no::integer", "delta": "round(amount * 100)::integer",
                      "mtime": "happened_at AT TIME ZONE 'UTC'", "filler": "note::character(22)"}}
    ]})
}

/// The sums of a store, in the first store's unit, and a fingerprint of all its rows.
#[derive(Debug, PartialEq, Eq)]
pub struct Sums {
    /// Accounts, tellers, branches, history.
    pub sums: [i64; 4],
    /// Of all rows of all tables.
    pub fingerprint: String,
}

impl Sums {
    /// Of the first store; `suffix` is what its tables' names end in now.
    pub fn first(pair: &Pair, suffix: &str) -> Self {
        let text = |column: &str| format!("coalesce(rtrim({column}), '-')");
        Self::of(
            &pair.first,
            [
                (
                    "abalance",
                    format!("pgbench_accounts{suffix}"),
                    "aid",
                    format!("concat_ws(' ', aid, bid, abalance, {})", text("filler")),
                ),
                (
                    "tbalance",
                    format!("pgbench_tellers{suffix}"),
                    "tid",
                    format!("concat_ws(' ', tid, bid, tbalance, {})", text("filler")),
                ),
                (
                    "bbalance",
                    format!("pgbench_branches{suffix}"),
                    "bid",
                    format!("concat_ws(' ', bid, bbalance, {})", text("filler")),
                ),
                (
                    "delta",
                    format!("pgbench_history{suffix}"),
                    "id",
                    format!("concat_ws(' ', id, tid, bid, aid, delta, mtime, {})", text("filler")),
                ),
            ],
        )
    }

    /// Of the second store, read on its own server.
    pub fn second(pair: &Pair) -> Self {
        let text = "coalesce(rtrim(note), '-')";
        let cents = |column: &str| format!("round({column} * 100)::bigint");
        Self::of(
            &pair.second,
            [
                (
                    &cents("balance"),
                    "bank.account".into(),
                    "account_no",
                    format!("concat_ws(' ', account_no, branch_no, {}, {text})", cents("balance")),
                ),
                (
                    "thousandths / 10",
                    "bank.teller".into(),
                    "teller_no",
                    format!("concat_ws(' ', teller_no, branch_no, thousandths / 10, {text})"),
                ),
                (
                    &cents("balance"),
                    "bank.branch".into(),
                    "branch_no",
                    format!("concat_ws(' ', branch_no, {}, {text})", cents("balance")),
                ),
                (
                    &cents("amount"),
                    "bank.movement".into(),
                    "movement_no",
                    format!(
                        "concat_ws(' ', movement_no, teller_no, branch_no, account_no, {}, happened_at AT TIME ZONE 'UTC', {text})",
                        cents("amount")
                    ),
                ),
            ],
        )
    }

    /// Sum, table, order, and the text of a row for each table.
    fn of(cluster: &Cluster, tables: [(&str, String, &str, String); 4]) -> Self {
        let ask = |query: String| cluster.text(&query).unwrap_or_default();
        let fingerprint = tables
            .iter()
            .map(|(_, table, key, row)| {
                ask(format!("SELECT count(*) || ':' || coalesce(md5(string_agg(md5({row}), '' ORDER BY {key})), '') FROM {table}"))
            })
            .collect::<Vec<_>>()
            .join(" ");
        let sums = tables.map(|(sum, table, ..)| {
            ask(format!("SELECT coalesce(sum({sum}), 0)::bigint FROM {table}")).parse().expect("a sum")
        });
        Self { sums, fingerprint }
    }

    /// Asserts that the four sums are one and the same, as every pgbench transaction leaves them.
    pub fn assert_agree(&self, store: &str) {
        assert!(
            self.sums.iter().all(|sum| *sum == self.sums[0]),
            "the sums of the {store} store do not agree: {:?}",
            self.sums
        );
    }
}

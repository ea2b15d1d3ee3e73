//! The SQL surface inside one server: what a call that needs no worker answers. Migrations themselves are tested on real clusters.

#[pgrx::pg_schema]
mod tests {
    use pgrx::prelude::*;

    fn text(sql: &str) -> Option<String> {
        Spi::get_one::<String>(sql).expect("a query")
    }

    #[pg_test]
    fn states_are_the_words_of_the_design() {
        let labels = text("SELECT string_agg(e::text, ' ') FROM unnest(enum_range(NULL::migration_state)) AS e");
        assert_eq!(labels.as_deref(), Some("copying first both second finished cancelled"));
    }

    #[pg_test]
    fn public_may_call_nothing() {
        let open = text(
            "SELECT string_agg(p.proname, ' ') FROM pg_proc p WHERE p.proname LIKE 'migration\\_%' AND has_function_privilege('public', p.oid, 'EXECUTE')",
        );
        assert_eq!(open, None);
    }

    #[pg_test]
    fn views_are_there_and_empty() {
        for view in ["migration_status", "migration_progress", "migration_conflicts", "migration_history"] {
            assert_eq!(text(&format!("SELECT count(*)::text FROM {view}")).as_deref(), Some("0"), "{view}");
        }
    }

    #[pg_test]
    fn every_setting_says_its_unit() {
        let without = text(
            "SELECT string_agg(name, ' ') FROM pg_settings WHERE name LIKE 'crossover.%' AND vartype = 'integer' \
             AND (unit IS NULL OR extra_desc !~ CASE unit WHEN 'ms' THEN 'milliseconds' WHEN 's' THEN '[Ii]n seconds' WHEN 'MB' THEN '[Ii]n megabytes' END)",
        );
        assert_eq!(without, None);
    }

    #[pg_test(error = "the mapping of migration \"m\" has 2 problems")]
    fn a_mapping_is_checked_as_a_whole() {
        Spi::run(r#"SELECT migration_start('m', '{"tables": [{"first": "customer", "second": "a.b.c"}]}')"#)
            .expect("an error");
    }

    #[pg_test(error = "the mapping of migration \"m\" has 1 problem")]
    fn unknown_keys_are_errors() {
        Spi::run(r#"SELECT migration_start('m', '{"tables": [], "colour": 1}')"#).expect("an error");
    }

    #[pg_test(error = "migration \"nobody\" does not exist")]
    fn an_unknown_migration_is_an_error() {
        Spi::run("SELECT migration_set_state('nobody', 'both')").expect("an error");
    }

    #[pg_test(error = "the timeout must be positive")]
    fn a_timeout_is_positive() {
        Spi::run("SELECT migration_wait('nobody', interval '0')").expect("an error");
    }

    #[pg_test]
    fn a_write_twin_of_a_stranger_is_not_used() {
        Spi::run(
            "CREATE ROLE stranger; CREATE TABLE kept (id int); INSERT INTO kept VALUES (1); CREATE VIEW shown AS SELECT id FROM kept;
             CREATE TABLE trap (id int); INSERT INTO trap VALUES (1); CREATE VIEW shown__write AS SELECT id FROM trap; ALTER VIEW shown__write OWNER TO stranger;
             UPDATE shown SET id = 2",
        )
        .expect("an update");
        assert_eq!(text("SELECT id::text FROM kept").as_deref(), Some("2"));
    }

    #[pg_test]
    fn a_twin_by_name_only_is_not_used() {
        Spi::run(
            "CREATE TABLE words (a text); INSERT INTO words VALUES ('w'); CREATE TABLE numbers (a int8); INSERT INTO numbers VALUES (12345678);
             CREATE VIEW v AS SELECT a FROM words; CREATE VIEW v__write AS SELECT a FROM numbers;
             UPDATE v SET a = '1' WHERE a || 'x' <> 'y'",
        )
        .expect("an update");
        assert_eq!(text("SELECT a FROM words").as_deref(), Some("1"));
        assert_eq!(text("SELECT a::text FROM numbers").as_deref(), Some("12345678"));
    }
}

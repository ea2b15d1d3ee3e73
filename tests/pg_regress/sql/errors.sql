-- Errors that come before anything is touched, as psql shows them; the tests on clusters have the whole table of them.
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS postgres_fdw;
CREATE EXTENSION IF NOT EXISTS pg_crossover;
RESET client_min_messages;
\set SHOW_CONTEXT never
\getenv host PGHOST
\getenv port PGPORT
CREATE DATABASE regress_errors_second;
\connect regress_errors_second
CREATE SCHEMA s2;
CREATE TABLE s2.t (id bigint PRIMARY KEY, label text NOT NULL, amount numeric(10,2));
CREATE TABLE s2.filled (id bigint PRIMARY KEY);
INSERT INTO s2.filled VALUES (1);
\connect regression
\set SHOW_CONTEXT never
CREATE SERVER errors_second FOREIGN DATA WRAPPER postgres_fdw OPTIONS (host :'host', port :'port', dbname 'regress_errors_second');
CREATE USER MAPPING FOR CURRENT_USER SERVER errors_second;
CREATE SCHEMA s1;
CREATE SCHEMA f2;
IMPORT FOREIGN SCHEMA s2 FROM SERVER errors_second INTO f2;
CREATE TABLE s1.t (id bigint PRIMARY KEY, name text NOT NULL, cents bigint);
CREATE TABLE s1.filled (id bigint PRIMARY KEY);
CREATE TABLE s1.keyless (id bigint, label text, amount numeric(10,2));
CREATE TABLE s1.viewed (id bigint PRIMARY KEY, label text NOT NULL, amount numeric(10,2));
CREATE VIEW s1.a_view AS SELECT * FROM s1.viewed;

-- Names.
SELECT migration_wait('nobody');
\echo :SQLSTATE
SELECT migration_set_state('nobody', 'both');
\echo :SQLSTATE
SELECT migration_set_state('nobody', 'sideways');
\echo :SQLSTATE
SELECT migration_pause('nobody');
\echo :SQLSTATE
SELECT migration_finish('nobody');
\echo :SQLSTATE
SELECT migration_cancel('nobody');
\echo :SQLSTATE
SELECT migration_start(NULL, '{}');

-- The form of the mapping.
SELECT migration_start('m1', '{}');
\echo :SQLSTATE
SELECT migration_start('m3', '{"tables": [{"first": "s1.t", "second": "f2.t", "foreward": {}}]}');
\echo :SQLSTATE
SELECT migration_start('m4', '{"tables": [{"first": "t", "second": "f2.t.x", "forward": {"label": 1}}]}');
\echo :SQLSTATE

-- Options.
SELECT migration_start('m5', '{"tables": [{"first": "s1.filled", "second": "f2.filled"}]}', '{"speed": "high"}');
\echo :SQLSTATE
SELECT migration_start('m7', '{"tables": [{"first": "s1.filled", "second": "f2.filled"}]}', '{"conflicts": "dice"}');
\echo :SQLSTATE

-- What the tables do not allow; each statement has several things wrong.
SELECT migration_start('m8', '{"tables": [{"first": "s1.nowhere", "second": "f2.nowhere"}, {"first": "s1.a_view", "second": "s1.t"}]}');
\echo :SQLSTATE
SELECT migration_start('m9', '{"tables": [{"first": "s1.t", "second": "f2.t"}]}');
\echo :SQLSTATE
SELECT migration_start('m10', '{"tables": [{"first": "s1.t", "second": "f2.t", "forward": {"label": "name", "amount": "cents / 100.0", "colour": "1"}, "backward": {"nmae": "label", "cents": "(amount * 100)::bigint"}}]}');
\echo :SQLSTATE
SELECT migration_start('m11', '{"tables": [{"first": "s1.t", "second": "f2.t", "forward": {"label": "nmae", "amount": "cents / 100.0"}, "backward": {"name": "label", "cents": "amount * "}}]}');
\echo :SQLSTATE
SELECT migration_start('m13', '{"tables": [{"first": "s1.t", "second": "f2.t", "forward": {"label": "name || random()", "amount": "cents / 100.0"}, "backward": {"name": "label", "cents": "(amount * 100)::bigint"}}]}');
\echo :SQLSTATE
SELECT migration_start('m16', '{"tables": [{"first": "s1.keyless", "second": "f2.t"}]}');
\echo :SQLSTATE

-- The second table must be empty.
SELECT migration_start('m20', '{"tables": [{"first": "s1.filled", "second": "f2.filled"}]}');
\echo :SQLSTATE

-- Nothing has happened: the worker of a start that failed removes what there was of it.
DO $$
DECLARE
    deadline timestamptz := clock_timestamp() + interval '30 seconds';
BEGIN
    WHILE EXISTS (SELECT FROM migration_status WHERE name ~ '^m[0-9]') AND clock_timestamp() < deadline LOOP
        PERFORM pg_sleep(0.01);
        COMMIT;
    END LOOP;
END $$;
SELECT count(*) FROM migration_status WHERE name ~ '^m[0-9]';
SELECT count(*) FROM pg_trigger WHERE tgrelid IN (SELECT oid FROM pg_class WHERE relnamespace = 's1'::regnamespace);
\connect regress_errors_second
SELECT nspname FROM pg_namespace WHERE nspname ~ '^crossover';
SELECT count(*) FROM pg_trigger WHERE tgrelid IN (SELECT oid FROM pg_class WHERE relnamespace = 's2'::regnamespace);

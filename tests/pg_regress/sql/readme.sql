-- The migration of the README, word for word but for the connection and the writes in between. The second "server" is another database.
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS postgres_fdw;
CREATE EXTENSION IF NOT EXISTS pg_crossover;
RESET client_min_messages;
\set SHOW_CONTEXT never
\getenv host PGHOST
\getenv port PGPORT
CREATE DATABASE regress_readme_second;

CREATE TABLE public.customer (
    id            bigserial PRIMARY KEY,
    first_name    text NOT NULL,
    last_name     text NOT NULL,
    balance_cents bigint NOT NULL DEFAULT 0
);
INSERT INTO customer (first_name, last_name, balance_cents) VALUES ('Ada', 'Lovelace', 181500), ('Zoë', 'van der Berg', -1), ('Grace', 'Hopper', 0);

\connect regress_readme_second
CREATE SCHEMA crm;
CREATE TABLE crm.client (
    client_id bigint PRIMARY KEY,
    full_name text NOT NULL,
    balance   numeric(14,2) NOT NULL
);

\connect regression
CREATE SERVER new_server FOREIGN DATA WRAPPER postgres_fdw OPTIONS (host :'host', port :'port', dbname 'regress_readme_second');
CREATE USER MAPPING FOR CURRENT_USER SERVER new_server;
CREATE SCHEMA v2;
IMPORT FOREIGN SCHEMA crm FROM SERVER new_server INTO v2;

SELECT migration_start('crm', $$
{"tables": [
  {"first": "public.customer", "second": "v2.client", "second_view": "public.client",
   "forward":  {"client_id": "id",
                "full_name": "first_name || ' ' || last_name",
                "balance":   "balance_cents / 100.0"},
   "backward": {"first_name":    "split_part(full_name, ' ', 1)",
                "last_name":     "substr(full_name, strpos(full_name, ' ') + 1)",
                "balance_cents": "round(balance * 100)::bigint"}}]}
$$);
SELECT migration_start('crm', '{"tables": [{"first": "public.customer", "second": "v2.client"}]}');
\echo :SQLSTATE
SELECT migration_wait('crm');
SELECT name, table_name, rows_copied, percent, eta FROM migration_progress;
SELECT relkind FROM pg_class WHERE oid = 'public.customer'::regclass;
UPDATE customer SET balance_cents = 5 WHERE id = 2;

SELECT migration_set_state('crm', 'second');
\echo :SQLSTATE
SELECT migration_set_state('crm', 'both');
SELECT relkind FROM pg_class WHERE oid = 'public.customer'::regclass;
SELECT * FROM client ORDER BY client_id;
UPDATE client SET full_name = 'Ada King' WHERE client_id = 1;
INSERT INTO customer (first_name, last_name) VALUES ('Edsger', 'Dijkstra') RETURNING *;
SELECT migration_wait('crm');

SELECT migration_set_state('crm', 'second');
SELECT * FROM customer ORDER BY id;
INSERT INTO customer (first_name, last_name, balance_cents) VALUES ('Barbara', 'Liskov', 250) RETURNING *;
UPDATE customer SET balance_cents = balance_cents + 1 WHERE last_name = 'Hopper' RETURNING balance_cents;
DELETE FROM customer WHERE id = 2;
INSERT INTO public.customer__first (first_name, last_name) VALUES ('Not', 'Here');
\echo :SQLSTATE

SELECT migration_set_state('crm', 'both');
SELECT migration_set_state('crm', 'first');
SELECT * FROM customer ORDER BY id;
SELECT migration_set_state('crm', 'both');
SELECT migration_set_state('crm', 'second');
SELECT migration_cancel('crm');
\echo :SQLSTATE
SELECT migration_finish('crm');

SELECT name, state, phase, backlog_rows, backlog_seconds, last_error, hint FROM migration_status;
SELECT name, from_state, to_state, forced FROM migration_history;
SELECT count(*) FROM migration_conflicts;

-- The views go on without the extension.
DROP EXTENSION pg_crossover;
SELECT * FROM customer ORDER BY id;
INSERT INTO client (client_id, full_name, balance) VALUES (100, 'Alan Turing', 1.5);
UPDATE customer SET balance_cents = 175 WHERE id = 100 RETURNING *;
SELECT * FROM public.customer__first ORDER BY id;
\connect regress_readme_second
SELECT * FROM crm.client ORDER BY client_id;
SELECT nspname FROM pg_namespace WHERE nspname ~ '^crossover';

-- What a DBA watches. A role sees the migrations of the roles it belongs to; the barriers keep functions of its own from seeing more.
-- The columns that are short come first, those that may be long last, and times are cut to seconds where nothing is ordered by them: psql
-- shows it all without \x on a usual screen.
CREATE FUNCTION crossover.visible(owner oid) RETURNS boolean LANGUAGE sql STABLE SECURITY INVOKER
RETURN pg_catalog.pg_has_role(owner, 'USAGE');
COMMENT ON FUNCTION crossover.visible(oid) IS 'may the current role see the migrations of this owner';

CREATE FUNCTION crossover.relation_name(quoted text) RETURNS text LANGUAGE sql IMMUTABLE
RETURN (SELECT pg_catalog.string_agg(pg_catalog.quote_ident(part), '.' ORDER BY n) FROM unnest(pg_catalog.parse_ident(quoted)) WITH ORDINALITY AS u(part, n));
COMMENT ON FUNCTION crossover.relation_name(text) IS 'the name of a relation, quoted only where it must be';

CREATE FUNCTION crossover.why_no_worker(owner oid) RETURNS text LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'crossover_why_no_worker_wrapper';
COMMENT ON FUNCTION crossover.why_no_worker(oid) IS 'why no worker can run as this role, NULL where there is no reason to be seen';

CREATE VIEW migration_status WITH (security_barrier) AS
SELECT m.name, m.state::migration_state AS state,
       CASE WHEN m.phase IN ('replicating', 'fence pending') AND EXISTS (
                SELECT FROM crossover.request r WHERE r.migration_id = m.id AND r.kind = 'set_state' AND r.status = 'running')
            THEN 'switching'
            WHEN m.diverged IS NOT NULL AND m.phase <> 'reconciling' THEN 'diverged' ELSE m.phase END AS phase, m.paused,
       a.backlog_rows,
       round(extract(epoch FROM clock_timestamp() - a.backlog_since), 1) AS backlog_seconds,
       a.log_bytes,
       (SELECT p.pid FROM pg_catalog.pg_stat_activity p WHERE p.pid = a.worker_pid AND p.backend_type = 'pg_crossover migration') AS worker_pid,
       CASE WHEN m.paused THEN 'migration_resume' WHEN m.diverged IS NOT NULL AND m.phase <> 'reconciling' THEN 'migration_set_state' ELSE a.waiting_for END AS waiting_for,
       pg_catalog.regexp_replace(a.last_error, '\s+', ' ', 'g') AS last_error,
       CASE WHEN m.state IN ('finished', 'cancelled') AND m.phase = 'done' THEN NULL
            ELSE nullif(concat_ws(' ',
                CASE WHEN a.worker_pid IS NULL OR NOT EXISTS (SELECT FROM pg_catalog.pg_stat_activity p WHERE p.pid = a.worker_pid AND p.backend_type = 'pg_crossover migration')
                     THEN pg_catalog.concat('No worker is running: ', coalesce(crossover.why_no_worker(m.owner), 'it is started again within seconds, or the server log says why not.')) END,
                CASE WHEN m.diverged IS NOT NULL THEN pg_catalog.format(
                     'The stores have diverged. %s Nothing is replicated and no store is newly exposed. To %s: migration_set_state(%L, %L, force => true)%s.',
                     m.diverged, CASE m.state WHEN 'copying' THEN 'copy all rows again' ELSE 'compare all rows' END, m.name, m.state,
                     CASE m.state WHEN 'first' THEN pg_catalog.format('; to copy them again: migration_set_state(%L, %L)', m.name, 'copying') END) END,
                CASE WHEN m.phase = 'capture dropped' THEN 'No change is captured; all rows will be copied again as soon as the second server can be reached.' END,
                CASE WHEN a.parked > 0 THEN 'Rows are parked: see migration_conflicts.' END,
                CASE WHEN a.log_bytes >= a.log_limit / 2 AND m.phase <> 'capture dropped' THEN pg_catalog.format(
                     'WARNING: the change logs have reached %s %% of crossover.max_log_size%s', a.log_bytes * 100 / greatest(a.log_limit, 1),
                     CASE WHEN m.state IN ('copying', 'first') THEN '; past it capture is dropped and all rows are copied again.' ELSE '; they are kept in this state.' END) END,
                a.last_error_hint), '') END AS hint
FROM crossover.migration m LEFT JOIN crossover.activity a ON a.migration_id = m.id
WHERE crossover.visible(m.owner)
ORDER BY m.name;
COMMENT ON VIEW migration_status IS 'each migration: its state, how far behind it is, its last error and what to do about it';

CREATE VIEW migration_details WITH (security_barrier) AS
SELECT m.name, m.owner::regrole::text AS owner, s.srvname::text AS server, date_trunc('second', m.created_at) AS started_at,
       a.retries, date_trunc('second', a.last_error_at) AS last_error_at, m.options::jsonb AS options
FROM crossover.migration m LEFT JOIN crossover.activity a ON a.migration_id = m.id LEFT JOIN pg_catalog.pg_foreign_server s ON s.oid = m.server_id
WHERE crossover.visible(m.owner)
ORDER BY m.name;
COMMENT ON VIEW migration_details IS 'each migration: whose it is, where it leads, its options, and how often its worker had to try again';

CREATE VIEW migration_progress WITH (security_barrier) AS
SELECT m.name, crossover.relation_name(t.table_name) AS table_name,
       CASE WHEN t.copy_finished IS NOT NULL THEN 100.0
            ELSE least(99.9, round(100.0 * t.rows_copied / greatest(t.rows_estimated, t.rows_copied, 1), 1)) END AS percent,
       t.rows_copied, t.rows_estimated,
       round(t.rows_copied / greatest(extract(epoch FROM coalesce(t.copy_finished, clock_timestamp()) - t.copy_started), 0.001)) AS rows_per_second,
       CASE WHEN t.copy_finished IS NULL AND t.rows_copied > 0 THEN
            make_interval(secs => round(greatest(t.rows_estimated - t.rows_copied, 0)
                * extract(epoch FROM clock_timestamp() - t.copy_started) / t.rows_copied)::float8) END AS eta
FROM crossover.migration m JOIN crossover.migrated_table t ON t.migration_id = m.id
WHERE crossover.visible(m.owner)
ORDER BY m.name, t.index;
COMMENT ON VIEW migration_progress IS 'how far the copy of each table is';

CREATE VIEW migration_conflicts WITH (security_barrier) AS
SELECT c.id, c.name, crossover.relation_name(c.table_name) AS table_name, c.key, c.kind, c.kept, date_trunc('second', c.recorded_at) AS recorded_at,
       date_trunc('second', c.resolved_at) AS resolved_at, c.refused_by, c.error, c.first_image, c.second_image
FROM crossover.conflict c JOIN crossover.migration m USING (name)
WHERE crossover.visible(m.owner)
ORDER BY c.id;
COMMENT ON VIEW migration_conflicts IS 'rows changed on both stores at a time, with both images, and rows that a store refused';

CREATE VIEW migration_history WITH (security_barrier) AS
SELECT h.name, h.at, h.from_state::migration_state AS from_state, h.to_state::migration_state AS to_state,
       h.pause_ms, h.rows_drained, h.who, h.forced, h.reason
FROM crossover.history h JOIN crossover.migration m USING (name)
WHERE crossover.visible(m.owner)
ORDER BY h.id;
COMMENT ON VIEW migration_history IS 'every change of state: who, when, how long writers were held, rows drained in the pause';

GRANT USAGE ON SCHEMA crossover TO PUBLIC;
GRANT EXECUTE ON FUNCTION crossover.visible(oid), crossover.relation_name(text), crossover.why_no_worker(oid) TO PUBLIC;
GRANT SELECT ON migration_status, migration_details, migration_progress, migration_conflicts, migration_history TO PUBLIC;

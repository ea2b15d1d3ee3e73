-- What a migration is, what it does, and what it has done. Written by the workers only.
CREATE SCHEMA crossover;
COMMENT ON SCHEMA crossover IS 'pg_crossover: migrations, their change logs and rules';

CREATE TABLE crossover.migration (
    id         int GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name       text NOT NULL UNIQUE,
    tag        text NOT NULL UNIQUE,      -- part of the names of its objects on both servers
    owner      oid NOT NULL,
    server_id  oid NOT NULL,              -- the foreign server of the second store
    mapping    text NOT NULL,
    options    text NOT NULL,
    state      text NOT NULL,
    phase      text NOT NULL,
    paused     boolean NOT NULL DEFAULT false,
    taken_over boolean NOT NULL DEFAULT false,
    diverged   text,                      -- why no proof is left that each store has what the other says it has
    lost       text,                      -- the store that has lost commits: first or second
    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
COMMENT ON TABLE crossover.migration IS 'one row for each migration of this database, ended ones included until their name is used again';

-- The first tables by oid: a takeover changes their names.
CREATE TABLE crossover.migrated_table (
    migration_id   int NOT NULL REFERENCES crossover.migration ON DELETE CASCADE,
    index          int NOT NULL,
    first_table    oid NOT NULL,
    table_name     text NOT NULL,
    rows_copied    bigint NOT NULL DEFAULT 0,
    rows_estimated bigint NOT NULL DEFAULT 0,
    copy_started   timestamptz,
    copy_finished  timestamptz,
    grants         text,                  -- as the table had them before the takeover
    second_grants  text,                  -- as the view of the second shape had them when it was hidden last
    take_back      jsonb,                 -- what the table's owner was granted for the sake of the view: kind, role and object, by oid
    last_chunk     bigint NOT NULL DEFAULT 0,
    last_key       text,                  -- end of the last chunk handed out
    handed_out     boolean NOT NULL DEFAULT false,  -- the last chunk has been
    PRIMARY KEY (migration_id, index)
);
COMMENT ON TABLE crossover.migrated_table IS 'the tables of each migration and how far their copy is';

CREATE TABLE crossover.chunk (
    migration_id int NOT NULL REFERENCES crossover.migration ON DELETE CASCADE,
    index        int NOT NULL,
    chunk        bigint NOT NULL,
    after_key    text,                    -- exclusive; NULL: from the beginning
    last_key     text,                    -- inclusive; NULL: to the end
    worker       int,                     -- pid of the copy worker that has it
    PRIMARY KEY (migration_id, index, chunk)
);
COMMENT ON TABLE crossover.chunk IS 'parts of the copy that are handed out; done when the second store has their checkpoint';

CREATE TABLE crossover.activity (
    migration_id    int PRIMARY KEY REFERENCES crossover.migration ON DELETE CASCADE,
    worker_pid      int,
    worker_role     oid,                  -- the role that it runs as
    backlog_rows    bigint NOT NULL DEFAULT 0,
    backlog_since   timestamptz,
    log_bytes       bigint NOT NULL DEFAULT 0,
    last_error      text,
    last_error_at   timestamptz,
    last_error_hint text,
    waiting_for     text,
    retries         bigint NOT NULL DEFAULT 0,
    parked          bigint NOT NULL DEFAULT 0,
    log_limit       bigint,               -- crossover.max_log_size in bytes; NULL: unlimited
    copy_due        timestamptz           -- when the next chunk of a throttled copy may begin
);
COMMENT ON TABLE crossover.activity IS 'what the worker of each migration is doing';

CREATE TABLE crossover.request (
    id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    migration_id int NOT NULL REFERENCES crossover.migration ON DELETE CASCADE,
    kind         text NOT NULL,
    arguments    jsonb NOT NULL DEFAULT '{}',
    who          text NOT NULL,
    caller_pid   int NOT NULL,
    caller_call  bigint,                           -- with the pid: the lock that the caller holds while it waits; NULL: it is not waited for
    deadline     timestamptz NOT NULL,
    status       text NOT NULL DEFAULT 'queued',   -- queued, running, done, failed
    answer       jsonb,
    created_at   timestamptz NOT NULL DEFAULT clock_timestamp()
);
COMMENT ON TABLE crossover.request IS 'what the functions have asked the workers to do';

CREATE TABLE crossover.conflict (
    id            bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name          text NOT NULL,
    table_name    text NOT NULL,
    key           text NOT NULL,
    kind          text NOT NULL,
    kept          text,
    first_image   jsonb,
    second_image  jsonb,
    refused_by    text,                   -- the store that refuses a parked row
    error         text,
    standing      jsonb,                  -- what stands since migration_resolve
    recorded_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    resolved_at   timestamptz,
    peer_id       bigint,                 -- its number on the second server, where a switch recorded it
    UNIQUE (name, peer_id)
);
COMMENT ON TABLE crossover.conflict IS 'rows changed on both stores at a time, with both images; rows that a store refused';
CREATE INDEX ON crossover.conflict (name);
CREATE INDEX ON crossover.conflict USING hash (key);

CREATE TABLE crossover.history (
    id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name         text NOT NULL,
    at           timestamptz NOT NULL DEFAULT clock_timestamp(),
    who          text NOT NULL,
    from_state   text,
    to_state     text NOT NULL,
    pause_ms     numeric(12,1),
    rows_drained bigint,
    forced       boolean NOT NULL DEFAULT false,
    reason       text                     -- why, where nobody asked for it
);
COMMENT ON TABLE crossover.history IS 'every change of state';

REVOKE ALL ON ALL TABLES IN SCHEMA crossover FROM PUBLIC;

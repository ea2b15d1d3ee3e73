-- A migration moves data and runs SQL as its owner: nobody may call these unless told so.
REVOKE EXECUTE ON FUNCTION
    migration_start(text, jsonb, jsonb, interval),
    migration_wait(text, interval),
    migration_set_state(text, migration_state, interval, boolean),
    migration_pause(text),
    migration_resume(text),
    migration_resolve(bigint, text),
    migration_finish(text, interval, boolean),
    migration_cancel(text, interval, boolean)
FROM PUBLIC;
COMMENT ON FUNCTION migration_start(text, jsonb, jsonb, interval) IS 'checks the mapping, installs capture and begins the copy';
COMMENT ON FUNCTION migration_wait(text, interval) IS 'returns when the copy is complete and every change committed before the call has been replicated';
COMMENT ON FUNCTION migration_set_state(text, migration_state, interval, boolean) IS 'moves a migration between first, both and second, one step at a time';
COMMENT ON FUNCTION migration_pause(text) IS 'stops copy and replication, holding no snapshot';
COMMENT ON FUNCTION migration_resume(text) IS 'goes on after migration_pause';
COMMENT ON FUNCTION migration_resolve(bigint, text) IS 'decides a recorded conflict anew, or has a parked row tried again';
COMMENT ON FUNCTION migration_finish(text, interval, boolean) IS 'from second: ends replication; the first tables stay unless told otherwise';
COMMENT ON FUNCTION migration_cancel(text, interval, boolean) IS 'from copying or first: everything as before';
COMMENT ON TYPE migration_state IS 'the states of a migration';

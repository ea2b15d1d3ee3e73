-- What CREATE EXTENSION makes for a user: functions, views, settings; and who may use them.
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS postgres_fdw;
CREATE EXTENSION IF NOT EXISTS pg_crossover;
RESET client_min_messages;

SELECT p.proname, pg_get_function_arguments(p.oid) AS arguments, pg_get_function_result(p.oid) AS result
  FROM pg_proc p WHERE p.proname ~ '^migration_' AND p.pronamespace = 'public'::regnamespace ORDER BY 1;

SELECT enum_range(NULL::migration_state);

SELECT c.relname, a.attname, format_type(a.atttypid, a.atttypmod) AS type
  FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0
 WHERE c.relname ~ '^migration_' AND c.relnamespace = 'public'::regnamespace AND c.relkind = 'v'
 ORDER BY c.relname, a.attnum;

SELECT name, setting, unit, context FROM pg_settings WHERE name ~ '^crossover\.' ORDER BY name;

-- All of it says what it is: what the extension has made, and each column of its tables and views.
SELECT pg_describe_object(classid, objid, 0) AS uncommented FROM pg_depend d
 WHERE refclassid = 'pg_extension'::regclass AND deptype = 'e' AND refobjid = (SELECT oid FROM pg_extension WHERE extname = 'pg_crossover')
   AND coalesce(obj_description(objid, classid::regclass::name), '') = ''
   -- Row types and arrays, which newer versions count as the extension's, too.
   AND NOT EXISTS (SELECT FROM pg_type t WHERE classid = 'pg_type'::regclass AND t.oid = objid AND (typrelid <> 0 OR typelem <> 0))
UNION ALL
SELECT pg_describe_object(classid, objid, attnum) FROM pg_depend d JOIN pg_attribute a ON a.attrelid = objid AND attnum > 0 AND NOT attisdropped
  JOIN pg_class c ON c.oid = objid AND c.relkind IN ('r', 'v') WHERE classid = 'pg_class'::regclass AND refclassid = 'pg_extension'::regclass AND deptype = 'e'
   AND refobjid = (SELECT oid FROM pg_extension WHERE extname = 'pg_crossover') AND coalesce(col_description(objid, attnum), '') = '' ORDER BY 1;
SELECT count(*) > 100 AS looked_at_all FROM pg_depend d LEFT JOIN pg_attribute a ON d.classid = 'pg_class'::regclass AND a.attrelid = objid AND attnum > 0
 WHERE refclassid = 'pg_extension'::regclass AND deptype = 'e' AND refobjid = (SELECT oid FROM pg_extension WHERE extname = 'pg_crossover');

-- Nothing is executable by PUBLIC.
SELECT p.proname FROM pg_proc p
 WHERE p.proname ~ '^migration_' AND p.pronamespace = 'public'::regnamespace
   AND has_function_privilege('public', p.oid, 'EXECUTE');
CREATE ROLE regress_crossover_nobody;
SET ROLE regress_crossover_nobody;
SELECT migration_cancel('shop');
\echo :SQLSTATE
SELECT count(*) FROM migration_status;
SELECT count(*) FROM crossover.migration;
\echo :SQLSTATE
RESET ROLE;
DROP ROLE regress_crossover_nobody;

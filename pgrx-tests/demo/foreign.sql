-- The second store as the first server sees it: foreign tables, made by the DBA before the migration.

CREATE EXTENSION postgres_fdw;
CREATE SERVER new_shop FOREIGN DATA WRAPPER postgres_fdw OPTIONS (host :'second_host', port :'second_port', dbname :'second_dbname', fetch_size '1000');
CREATE USER MAPPING FOR CURRENT_USER SERVER new_shop OPTIONS (user :'second_user');
CREATE SCHEMA new_shop;
IMPORT FOREIGN SCHEMA sales FROM SERVER new_shop INTO new_shop;

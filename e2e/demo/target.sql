-- The warehouse: Sluice owns the database it writes to, and no more.
-- psql variable: password (of role sluice)
\set ON_ERROR_STOP on
\set QUIET on
CREATE ROLE sluice LOGIN PASSWORD :'password';
ALTER DATABASE warehouse OWNER TO sluice;

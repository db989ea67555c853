-- Laravel's table, rewritten column by column from its migration (signs of integers left out):
-- https://github.com/laravel/laravel/blob/090eca4988221d0d74675afe694e68dd6843b4e4/database/migrations/0001_01_01_000002_create_jobs_table.php
CREATE TABLE jobs (
    id bigint NOT NULL PRIMARY KEY,
    queue varchar(255) NOT NULL,
    payload text NOT NULL,
    attempts smallint NOT NULL,
    reserved_at integer,
    available_at integer NOT NULL,
    created_at integer NOT NULL
);
CREATE INDEX jobs_queue_index ON jobs (queue);

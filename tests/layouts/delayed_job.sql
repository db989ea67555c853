-- delayed_job_active_record 4.1.11, rewritten column by column from its migration, with the types
-- that Rails 7 gives them:
-- https://github.com/collectiveidea/delayed_job_active_record/blob/e5b4fbf8c65698d575d1afc95e4ae55e4646d24e/lib/generators/delayed_job/templates/migration.rb
CREATE TABLE delayed_jobs (
    id bigint NOT NULL PRIMARY KEY,
    priority integer DEFAULT 0 NOT NULL,
    attempts integer DEFAULT 0 NOT NULL,
    handler text NOT NULL,
    last_error text,
    run_at {datetime},
    locked_at {datetime},
    failed_at {datetime},
    locked_by varchar(255),
    queue varchar(255),
    created_at {datetime},
    updated_at {datetime}
);
CREATE INDEX delayed_jobs_priority ON delayed_jobs (priority, run_at);

-- BeanQueue 1.2.0, as its models' metadata made the tables.
CREATE TYPE taskstate AS ENUM (
    'PENDING',
    'PROCESSING',
    'DONE',
    'FAILED'
);
CREATE TYPE workerstate AS ENUM (
    'RUNNING',
    'SHUTDOWN',
    'NO_HEARTBEAT'
);
CREATE TABLE bq_tasks (
    id uuid DEFAULT gen_random_uuid() NOT NULL,
    state taskstate DEFAULT 'PENDING'::taskstate NOT NULL,
    channel character varying NOT NULL,
    module character varying NOT NULL,
    func_name character varying NOT NULL,
    kwargs jsonb,
    result jsonb,
    error_message character varying,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    scheduled_at timestamp with time zone,
    worker_id uuid,
    parent_id uuid
);
CREATE TABLE bq_workers (
    id uuid DEFAULT gen_random_uuid() NOT NULL,
    state workerstate DEFAULT 'RUNNING'::workerstate NOT NULL,
    name character varying NOT NULL,
    channels character varying[] NOT NULL,
    last_heartbeat timestamp with time zone DEFAULT now() NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL
);
ALTER TABLE ONLY bq_tasks
    ADD CONSTRAINT bq_tasks_pkey PRIMARY KEY (id);
ALTER TABLE ONLY bq_workers
    ADD CONSTRAINT bq_workers_pkey PRIMARY KEY (id);
CREATE INDEX ix_bq_tasks_channel ON bq_tasks USING btree (channel);
CREATE INDEX ix_bq_tasks_state ON bq_tasks USING btree (state);
CREATE INDEX ix_bq_workers_last_heartbeat ON bq_workers USING btree (last_heartbeat);
CREATE INDEX ix_bq_workers_state ON bq_workers USING btree (state);
ALTER TABLE ONLY bq_tasks
    ADD CONSTRAINT fk_task_parent_task_id FOREIGN KEY (parent_id) REFERENCES bq_tasks(id);
ALTER TABLE ONLY bq_tasks
    ADD CONSTRAINT fk_workers_id FOREIGN KEY (worker_id) REFERENCES bq_workers(id);

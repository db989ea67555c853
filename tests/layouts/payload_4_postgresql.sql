-- Payload 4.0.0-canary.36 with @payloadcms/db-postgres, as its schema push made the tables.
CREATE TYPE enum_payload_jobs_task_slug AS ENUM (
    'inline',
    'record'
);
CREATE TABLE payload_jobs (
    id integer NOT NULL,
    input jsonb,
    meta jsonb,
    completed_at timestamp(3) with time zone,
    total_tried numeric DEFAULT 0,
    has_error boolean DEFAULT false,
    error jsonb,
    task_slug enum_payload_jobs_task_slug,
    queue character varying DEFAULT 'default'::character varying,
    wait_until timestamp(3) with time zone,
    processing_until timestamp(3) with time zone,
    processing_token character varying,
    concurrency_key character varying,
    updated_at timestamp(3) with time zone DEFAULT now() NOT NULL,
    created_at timestamp(3) with time zone DEFAULT now() NOT NULL
);
CREATE SEQUENCE payload_jobs_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE payload_jobs_id_seq OWNED BY payload_jobs.id;
ALTER TABLE ONLY payload_jobs ALTER COLUMN id SET DEFAULT nextval('payload_jobs_id_seq'::regclass);
ALTER TABLE ONLY payload_jobs
    ADD CONSTRAINT payload_jobs_pkey PRIMARY KEY (id);
CREATE INDEX payload_jobs_completed_at_idx ON payload_jobs USING btree (completed_at);
CREATE INDEX payload_jobs_concurrency_key_idx ON payload_jobs USING btree (concurrency_key);
CREATE INDEX payload_jobs_created_at_idx ON payload_jobs USING btree (created_at);
CREATE INDEX payload_jobs_has_error_idx ON payload_jobs USING btree (has_error);
CREATE INDEX payload_jobs_processing_until_idx ON payload_jobs USING btree (processing_until);
CREATE INDEX payload_jobs_queue_idx ON payload_jobs USING btree (queue);
CREATE INDEX payload_jobs_task_slug_idx ON payload_jobs USING btree (task_slug);
CREATE INDEX payload_jobs_total_tried_idx ON payload_jobs USING btree (total_tried);
CREATE INDEX payload_jobs_updated_at_idx ON payload_jobs USING btree (updated_at);
CREATE INDEX payload_jobs_wait_until_idx ON payload_jobs USING btree (wait_until);

-- pgmq 1.13.0 (pgmq.sql of the Python package 1.1.4), as pgmq.create('jobs') made the table.
CREATE SCHEMA pgmq;
CREATE TABLE pgmq.q_jobs (
    msg_id bigint NOT NULL,
    read_ct integer DEFAULT 0 NOT NULL,
    enqueued_at timestamp with time zone DEFAULT now() NOT NULL,
    last_read_at timestamp with time zone,
    vt timestamp with time zone NOT NULL,
    message jsonb,
    headers jsonb
);
ALTER TABLE pgmq.q_jobs ALTER COLUMN msg_id ADD GENERATED ALWAYS AS IDENTITY (
    SEQUENCE NAME pgmq.q_jobs_msg_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1
);
ALTER TABLE ONLY pgmq.q_jobs
    ADD CONSTRAINT q_jobs_pkey PRIMARY KEY (msg_id);
CREATE INDEX q_jobs_vt_idx ON pgmq.q_jobs USING btree (vt);

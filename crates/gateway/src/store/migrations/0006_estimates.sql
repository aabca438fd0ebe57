-- 1: nobody counted the tokens (a provider that says nothing, a stream that was cut), so they are a bound or a guess.
ALTER TABLE requests ADD COLUMN estimated BIGINT NOT NULL DEFAULT 0;

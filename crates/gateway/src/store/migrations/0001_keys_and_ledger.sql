-- One text for SQLite and PostgreSQL: TEXT and BIGINT only. Times are milliseconds since 1970 (UTC), money is in
-- nano-dollars.

-- What was changed how often: other processes watch these counters to learn that they must read again.
CREATE TABLE changes (
    name TEXT NOT NULL PRIMARY KEY,
    counter BIGINT NOT NULL
);
INSERT INTO changes (name, counter) VALUES ('api_keys', 0);

-- Keys are never deleted: a revoked one still explains itself.
CREATE TABLE api_keys (
    id TEXT NOT NULL PRIMARY KEY,
    tenant TEXT NOT NULL,
    name TEXT NOT NULL,
    -- SHA-256 in hex; the key itself is nowhere.
    digest TEXT NOT NULL,
    created_at BIGINT NOT NULL,
    expires_at BIGINT,
    revoked_at BIGINT,
    -- The key that replaced it.
    successor TEXT,
    -- The counter of `changes` at its last change.
    changed BIGINT NOT NULL
);
CREATE INDEX api_keys_changed ON api_keys (changed);

-- One row a process that may hold reservations; `seen_at` is its sign of life.
CREATE TABLE processes (
    incarnation TEXT NOT NULL PRIMARY KEY,
    node TEXT NOT NULL,
    started_at BIGINT NOT NULL,
    seen_at BIGINT NOT NULL
);

-- What is spent and reserved of a budget in a day (2026-11-28) or a month (2026-11).
CREATE TABLE budget_use (
    scope TEXT NOT NULL,
    period TEXT NOT NULL,
    spent BIGINT NOT NULL,
    reserved BIGINT NOT NULL,
    ceiling BIGINT NOT NULL,
    PRIMARY KEY (scope, period)
);

-- Calls that may be under way. A row goes when its call is settled or released.
CREATE TABLE reservations (
    id TEXT NOT NULL PRIMARY KEY,
    incarnation TEXT NOT NULL,
    at BIGINT NOT NULL,
    tenant TEXT NOT NULL,
    credential TEXT NOT NULL,
    model TEXT NOT NULL,
    adapter TEXT NOT NULL,
    route TEXT NOT NULL,
    amount BIGINT NOT NULL,
    -- JSON: [[scope, period], ...]
    budgets TEXT NOT NULL
);
CREATE INDEX reservations_incarnation ON reservations (incarnation);

-- The ledger.
CREATE TABLE requests (
    id TEXT NOT NULL PRIMARY KEY,
    at BIGINT NOT NULL,
    day TEXT NOT NULL,
    tenant TEXT NOT NULL,
    credential TEXT NOT NULL,
    model TEXT NOT NULL,
    adapter TEXT NOT NULL,
    route TEXT NOT NULL,
    status TEXT NOT NULL,
    prompt_tokens BIGINT NOT NULL,
    cached_tokens BIGINT NOT NULL,
    completion_tokens BIGINT NOT NULL,
    reasoning_tokens BIGINT NOT NULL,
    latency_ms BIGINT NOT NULL,
    price BIGINT NOT NULL,
    -- What the reference model upstream would have cost; local rows only.
    reference_price BIGINT,
    -- local, settled, or unsettled: charged in full because nobody said what was used.
    settlement TEXT NOT NULL,
    -- By how much the price went above what was reserved.
    overrun BIGINT NOT NULL
);
CREATE INDEX requests_at ON requests (at);
CREATE INDEX requests_day ON requests (day, tenant, model);

-- The newest record of each audit log: its number and its HMAC in hex. A log that ends before it was cut.
CREATE TABLE audit_heads (
    -- The log's folder, as the config names it.
    log TEXT NOT NULL PRIMARY KEY,
    seq BIGINT NOT NULL,
    mac TEXT NOT NULL
);

-- Who writes each audit log: a word that one process made up at its start, and the node's name for people.
-- `log` is from now on a name: `[audit] name`, or the machine's name and the folder's absolute path.
ALTER TABLE audit_heads ADD COLUMN owner TEXT;
ALTER TABLE audit_heads ADD COLUMN writer TEXT;

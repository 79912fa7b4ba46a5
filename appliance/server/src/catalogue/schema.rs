//! The tables, and how older ones become them.

use std::path::Path;
use std::time::Duration;

use rusqlite::Connection;

use super::{CatalogueError, sql};

/// One step for each version: the first makes an empty file version 1.
const STEPS: [&str; 2] = [
    r"
    CREATE TABLE agents (
        agent    TEXT PRIMARY KEY,
        enrolled INTEGER NOT NULL,
        expires  INTEGER NOT NULL,
        revoked  INTEGER
    ) STRICT;
    CREATE TABLE certificates (
        serial   BLOB PRIMARY KEY,
        agent    TEXT REFERENCES agents (agent),
        admin    TEXT,
        issued   INTEGER NOT NULL,
        expires  INTEGER NOT NULL,
        revoked  INTEGER,
        CHECK ((agent IS NULL) <> (admin IS NULL))
    ) STRICT;
    CREATE INDEX certificates_by_agent ON certificates (agent);
    CREATE TABLE tokens (
        hash     BLOB PRIMARY KEY,
        created  INTEGER NOT NULL,
        expires  INTEGER NOT NULL,
        used     INTEGER,
        used_by  TEXT
    ) STRICT;
    CREATE TABLE machines (
        machine  TEXT PRIMARY KEY,
        name     TEXT NOT NULL
    ) STRICT;
    CREATE TABLE grants (
        machine  TEXT PRIMARY KEY,
        agent    TEXT NOT NULL REFERENCES agents (agent),
        since    INTEGER NOT NULL
    ) STRICT;
    CREATE INDEX grants_by_agent ON grants (agent);
    CREATE TABLE events (
        number   INTEGER PRIMARY KEY AUTOINCREMENT,
        time     INTEGER NOT NULL,
        kind     TEXT NOT NULL,
        text     TEXT NOT NULL
    ) STRICT;
",
    r"
    CREATE TABLE branches (
        history          TEXT PRIMARY KEY,
        machine          TEXT NOT NULL,
        disk             TEXT NOT NULL,
        name             TEXT NOT NULL,
        parent           TEXT NOT NULL,
        lsn              INTEGER NOT NULL,
        size_bytes       INTEGER NOT NULL,
        created          INTEGER NOT NULL,
        quota_bytes      INTEGER,
        used_bytes       INTEGER NOT NULL,
        promotion_target TEXT,
        promotion_lsn    INTEGER,
        promotion_done   INTEGER NOT NULL
    ) STRICT;
    CREATE INDEX branches_by_disk ON branches (machine, disk);
",
];

/// Sets the connection up and migrates.
///
/// # Durability
/// From here on every transaction is on disk when it has committed.
pub(super) fn prepare(connection: &mut Connection, path: &Path) -> Result<(), CatalogueError> {
    let fail = sql("prepare");
    connection
        .busy_timeout(Duration::from_secs(5))
        .map_err(&fail)?;
    connection
        .pragma_update(None, "journal_mode", "WAL")
        .map_err(&fail)?;
    connection
        .pragma_update(None, "synchronous", "FULL")
        .map_err(&fail)?;
    connection
        .pragma_update(None, "foreign_keys", "ON")
        .map_err(&fail)?;
    let found: i64 = connection
        .query_row("PRAGMA user_version", [], |row| row.get(0))
        .map_err(&fail)?;
    let known = i64::try_from(STEPS.len()).unwrap_or(i64::MAX);
    if found > known {
        return Err(CatalogueError::Newer {
            path: path.to_owned(),
            found,
            known,
        });
    }
    let done = usize::try_from(found).unwrap_or(0);
    for (index, step) in STEPS.iter().enumerate().skip(done) {
        let version = i64::try_from(index + 1).unwrap_or(i64::MAX);
        let migrate = sql("migrate");
        let transaction = connection.transaction().map_err(&migrate)?;
        transaction.execute_batch(step).map_err(&migrate)?;
        transaction
            .pragma_update(None, "user_version", version)
            .map_err(&migrate)?;
        transaction.commit().map_err(&migrate)?;
    }
    Ok(())
}

//! What happened, for people; bounded.

use afterimage_blockdev::Timestamp;
use afterimage_protocol::rest::server::Event;
use rusqlite::params;

use super::{Catalogue, CatalogueError, from_sql, to_sql};

/// Longest text of an event, in characters.
const TEXT_CHARS_MAX: usize = 2000;

impl Catalogue {
    /// Notes an event, and drops the oldest beyond the bound.
    ///
    /// # Errors
    /// [`CatalogueError::Sql`].
    pub fn add_event(&self, now: Timestamp, kind: &str, text: &str) -> Result<(), CatalogueError> {
        let text: String = text.chars().take(TEXT_CHARS_MAX).collect();
        let kept = i64::try_from(self.events_max).unwrap_or(i64::MAX);
        self.with("add an event", |connection| {
            let transaction = connection.transaction()?;
            transaction.execute(
                "INSERT INTO events (time, kind, text) VALUES (?1, ?2, ?3)",
                params![to_sql(now), kind, text],
            )?;
            let newest = transaction.last_insert_rowid();
            transaction.execute(
                "DELETE FROM events WHERE number <= ?1",
                [newest.saturating_sub(kept)],
            )?;
            transaction.commit()
        })
    }

    /// Lists up to `limit` events after number `after`, oldest first.
    ///
    /// # Errors
    /// [`CatalogueError::Sql`].
    pub fn events(&self, after: u64, limit: usize) -> Result<Vec<Event>, CatalogueError> {
        let after = i64::try_from(after).unwrap_or(i64::MAX);
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        self.with("list events", |connection| {
            connection
                .prepare(
                    "SELECT number, time, kind, text FROM events WHERE number > ?1
                     ORDER BY number LIMIT ?2",
                )?
                .query_map([after, limit], |row| {
                    Ok(Event {
                        number: from_sql(row.get(0)?).0,
                        time: from_sql(row.get(1)?),
                        kind: row.get(2)?,
                        text: row.get(3)?,
                    })
                })?
                .collect()
        })
    }
}

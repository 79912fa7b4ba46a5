//! The catalogue: who may do what, what people call things, and what happened. The engine does
//! without it; it is no part of any data path.
//!
//! Invariants
//! * One writer: all access goes through one connection behind one lock.
//! * A machine has at most one grant, so at most one agent may write for it.
//! * No two machines that an agent may write for have the same name.
//! * A token is used at most once: its use and the certificate it gives are one transaction.
//! * Secrets of tokens are never stored, only their hashes.

mod access;
mod branches;
mod enrolment;
mod events;
mod schema;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use afterimage_blockdev::{ErrorClass, Timestamp};
use parking_lot::Mutex;
use rusqlite::Connection;

pub use access::{Grant, MoveOutcome};
pub use branches::{BranchRow, PromotionRow};
pub use enrolment::{Enrolment, NewCertificate};

/// What went wrong with the catalogue.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CatalogueError {
    /// SQLite failed.
    #[error("catalogue: {operation}: {source}")]
    Sql {
        /// What was tried.
        operation: &'static str,
        /// What SQLite says.
        source: rusqlite::Error,
    },
    /// Made by a newer release.
    #[error(
        "the catalogue {} has version {found}; this release knows up to {known}", path.display()
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: i64,
        /// The newest known.
        known: i64,
    },
    /// No such token.
    #[error("the token is not known here")]
    TokenUnknown,
    /// The token's time is over.
    #[error("the token has expired")]
    TokenExpired,
    /// The token was used before.
    #[error("the token was used before")]
    TokenUsed,
    /// The agent's certificates were revoked.
    #[error("the agent {agent} was revoked")]
    AgentRevoked {
        /// The agent.
        agent: String,
    },
    /// Another machine has the name.
    #[error("a machine named {name} has enrolled already, with agent {holder}")]
    NameTaken {
        /// The name.
        name: String,
        /// Who holds that machine.
        holder: String,
    },
    /// No such agent.
    #[error("no agent {agent} has enrolled here")]
    NoAgent {
        /// What was asked for.
        agent: String,
    },
    /// The thread that worked on it panicked.
    #[error("catalogue: the working thread failed")]
    Gone,
}

impl CatalogueError {
    /// How to go on.
    #[must_use]
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::Sql { source, .. } => match source.sqlite_error_code() {
                Some(rusqlite::ErrorCode::DiskFull | rusqlite::ErrorCode::DatabaseBusy) => {
                    ErrorClass::Retry
                }
                Some(rusqlite::ErrorCode::DatabaseCorrupt | rusqlite::ErrorCode::NotADatabase) => {
                    ErrorClass::Corrupt
                }
                _ => ErrorClass::Operator,
            },
            Self::Newer { .. } => ErrorClass::Operator,
            Self::Gone => ErrorClass::Retry,
            _ => ErrorClass::Refused,
        }
    }

    /// What a person can do about it; empty when the message says all.
    #[must_use]
    pub fn hint(&self) -> &'static str {
        match self {
            Self::TokenUnknown | Self::TokenExpired | Self::TokenUsed => {
                "make a new one at the appliance with `aft token create`"
            }
            Self::NameTaken { .. } => {
                "choose another name with --machine-name, or, if that machine is gone, run \
                 `aft agent revoke` for its agent first"
            }
            Self::AgentRevoked { .. } => "enrol it again under a new identity",
            Self::NoAgent { .. } => "`aft agent list` shows those that have",
            Self::Newer { .. } => "start the release that wrote it, or a newer one",
            _ => "",
        }
    }
}

/// The catalogue; clones share the one connection.
#[derive(Clone)]
pub struct Catalogue {
    connection: Arc<Mutex<Connection>>,
    events_max: u64,
}

impl Catalogue {
    /// Opens the catalogue of a data directory, makes it at the first start, and brings an older
    /// one up to date. The last `events_max` events are kept.
    ///
    /// # Errors
    /// [`CatalogueError`].
    pub fn open(path: &Path, events_max: u64) -> Result<Self, CatalogueError> {
        let mut connection = Connection::open(path).map_err(sql("open"))?;
        schema::prepare(&mut connection, path)?;
        Ok(Self {
            connection: Arc::new(Mutex::new(connection)),
            events_max,
        })
    }

    /// Does blocking work with the catalogue away from the threads that carry data.
    ///
    /// # Errors
    /// What the work says, or [`CatalogueError::Gone`].
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Self) -> Result<T, CatalogueError> + Send + 'static,
    ) -> Result<T, CatalogueError> {
        let catalogue = self.clone();
        tokio::task::spawn_blocking(move || work(&catalogue))
            .await
            .unwrap_or(Err(CatalogueError::Gone))
    }

    fn with<T>(
        &self,
        operation: &'static str,
        work: impl FnOnce(&mut Connection) -> rusqlite::Result<T>,
    ) -> Result<T, CatalogueError> {
        work(&mut self.connection.lock()).map_err(sql(operation))
    }
}

fn sql(operation: &'static str) -> impl Fn(rusqlite::Error) -> CatalogueError {
    move |source| CatalogueError::Sql { operation, source }
}

/// SQLite counts in signed numbers; this goes wrong in the year 2262.
fn to_sql(time: Timestamp) -> i64 {
    i64::try_from(time.0).unwrap_or(i64::MAX)
}

fn from_sql(value: i64) -> Timestamp {
    Timestamp(u64::try_from(value).unwrap_or(0))
}

/// Reads an identity that this program wrote.
fn parse_id<T: std::str::FromStr>(column: usize, text: &str) -> rusqlite::Result<T>
where
    T::Err: std::error::Error + Send + Sync + 'static,
{
    text.parse().map_err(|error| {
        rusqlite::Error::FromSqlConversionFailure(
            column,
            rusqlite::types::Type::Text,
            Box::new(error),
        )
    })
}

//! What keeps a socket from being served.

use std::io;
use std::path::{Path, PathBuf};

/// Why a socket is not served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VhostError {
    /// Something else is at the path.
    #[error("{path} is there already and is no socket; choose another path")]
    Occupied {
        /// The path.
        path: PathBuf,
    },
    /// Somebody serves the path.
    #[error("{path} is served already; end that, or choose another path")]
    Served {
        /// The path.
        path: PathBuf,
    },
    /// The operating system said no.
    #[error("{doing} {path}: {source}")]
    File {
        /// What was being done.
        doing: &'static str,
        /// The path.
        path: PathBuf,
        /// What it said.
        #[source]
        source: io::Error,
    },
    /// A setting is out of its range.
    #[error("{name} is {value}, which is not between {least} and {most}")]
    Setting {
        /// Its name.
        name: &'static str,
        /// What it is.
        value: usize,
        /// What it may be at least.
        least: usize,
        /// What it may be at most.
        most: usize,
    },
    /// There is no thread or descriptor for it.
    #[error("starting the server: {0}")]
    Start(#[source] io::Error),
}

impl VhostError {
    pub(crate) fn file(doing: &'static str, path: &Path, source: io::Error) -> Self {
        Self::File {
            doing,
            path: path.to_owned(),
            source,
        }
    }
}

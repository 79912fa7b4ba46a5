//! Why the daemon does not start, or ends, and its exit code.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use afterimage_blockdev::ErrorClass;
use afterimage_protocol::rest::ApiError;

use crate::ca::CaError;
use crate::catalogue::CatalogueError;
use crate::config::ConfigError;

/// Why the daemon does not start, or ends.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The configuration is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Somebody else than root started it.
    #[error("afterimaged must run as root: it mounts file systems and attaches loop devices")]
    NotRoot,
    /// The kernel has no FUSE.
    #[error("the kernel serves no FUSE: {source}; load it with `modprobe fuse`")]
    NoFuse {
        /// What the system says.
        source: io::Error,
    },
    /// Another daemon runs.
    #[error(
        "another afterimaged{holder} runs on {}; stop it first, or choose another --data-dir",
        path.display()
    )]
    Running {
        /// The data directory.
        path: PathBuf,
        /// Its process, as far as known.
        holder: String,
    },
    /// A file or directory cannot be used.
    #[error("{operation} of {}: {source}", path.display())]
    File {
        /// What was tried.
        operation: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// An address cannot be bound.
    #[error("cannot listen at {address}: {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system says.
        source: io::Error,
    },
    /// The authority cannot be used.
    #[error(transparent)]
    Ca(#[from] CaError),
    /// TLS cannot be set up.
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
    /// The catalogue cannot be used.
    #[error(transparent)]
    Catalogue(#[from] CatalogueError),
    /// The engine or the mounts do not start.
    #[error(transparent)]
    Part(#[from] ApiError),
    /// No thread or event loop can be had.
    #[error("cannot start threads: {0}")]
    Runtime(#[source] io::Error),
    /// The engine thread ended by itself.
    #[error("the engine has ended; the log says why")]
    EngineEnded,
}

impl StartError {
    pub(crate) fn file(operation: &'static str, path: &Path, source: io::Error) -> Self {
        Self::File {
            operation,
            path: path.to_owned(),
            source,
        }
    }

    /// The documented exit code.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(match self {
            Self::Config(_) => 2,
            Self::Running { .. } => 3,
            Self::Runtime(_) | Self::EngineEnded => 1,
            Self::Part(error) => of_class(error.class),
            Self::Ca(error) => of_class(error.class()),
            Self::Catalogue(error) => of_class(error.class()),
            _ => 4,
        })
    }
}

fn of_class(class: ErrorClass) -> u8 {
    match class {
        ErrorClass::Retry => 1,
        ErrorClass::Corrupt => 6,
        _ => 4,
    }
}

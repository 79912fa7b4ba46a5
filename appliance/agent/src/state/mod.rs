//! What the agent must know after a restart, in its state directory:
//!
//! | file | what |
//! |---|---|
//! | `lock` | held while an agent runs |
//! | `identity.json` | who this agent is, and where its appliance is; made by `enrol` |
//! | `agent.key`, `agent.pem`, `authority.pem` | key, certificate, and the appliance's authority |
//! | `counters` | epoch, reserved LSNs, acknowledged LSN, last time; binary, two copies |
//! | `disks.json` | the attached disks |
//! | `keys.json` | the disks' keys, as secret as `agent.key` |
//! | `activity/<disk>` | the activity log of a disk |
//! | `spool/` | frames that memory has no room for; emptied at start |
//! | `fuse/` | where the taps are mounted |

pub mod counters;
pub mod disks;
pub mod identity;

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::AgentError;

/// The paths of a state directory.
#[derive(Clone, Debug)]
pub struct StateDir {
    root: PathBuf,
}

impl StateDir {
    /// Takes a directory, and makes it when it is missing, for its owner only.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn open(root: &Path) -> Result<Self, AgentError> {
        let make = |path: &Path| {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(path)
                .map_err(AgentError::file("create", path))
        };
        make(root)?;
        let root = root
            .canonicalize()
            .map_err(AgentError::file("find", root))?;
        for directory in ["activity", "spool"] {
            make(&root.join(directory))?;
        }
        Ok(Self { root })
    }

    /// The directory itself.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// A file in it.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// Removes what an earlier run left in the spool: it lies within marked regions.
    ///
    /// # Errors
    /// When a file cannot be removed.
    pub fn empty_spool(&self) -> Result<(), AgentError> {
        let spool = self.path("spool");
        fs::remove_dir_all(&spool).map_err(AgentError::file("empty", &spool))?;
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&spool)
            .map_err(AgentError::file("create", &spool))
    }
}

/// Replaces a file by another content.
///
/// # Errors
/// When it cannot be written; the old content then stays.
///
/// # Durability
/// Durable when this returns: either content is there after a crash, never a mixture.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<(), AgentError> {
    let temporary = path.with_extension("new");
    let write = || {
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        path.parent()
            .map_or(Ok(()), |parent| File::open(parent)?.sync_all())
    };
    write().map_err(AgentError::file("write", path))
}

/// As [`replace`], with JSON.
///
/// # Errors
/// As [`replace`].
pub fn save_json<T: Serialize>(path: &Path, value: &T) -> Result<(), AgentError> {
    let bytes = serde_json::to_vec_pretty(value).map_err(|error| AgentError::Damaged {
        path: path.to_owned(),
        what: error.to_string(),
    })?;
    replace(path, &bytes)
}

/// Reads JSON; `None` when the file is missing.
///
/// # Errors
/// When it cannot be read or is damaged.
pub fn load_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, AgentError> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(AgentError::file("read", path)(error)),
    };
    let damaged = |error: serde_json::Error| AgentError::Damaged {
        path: path.to_owned(),
        what: error.to_string(),
    };
    serde_json::from_slice(&bytes).map(Some).map_err(damaged)
}

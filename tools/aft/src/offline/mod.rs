//! Tools for a store whose daemon is stopped.
//!
//! Invariants
//! * The lock of the data directory is held as long as anything of it is looked at.
//! * Only `rebuild` writes, and it removes nothing.
//! * Nothing that a file says is believed before its hash was looked at.

mod chain;
mod check;
mod complete;
mod dump;
mod edits;
mod evidence;
mod maps;
mod marks;
mod notes;
mod parts;
mod place;
mod rebuild;
mod source;
mod state;
mod verify;

use std::path::{Path, PathBuf};

use afterimage_blockdev::{DirectoryLock, ErrorClass, FileName};

pub use check::{Checked, check};
pub use dump::{What, dump};
pub use rebuild::{Order, Rebuilt, rebuild};
pub use verify::{Walk, verify};

use crate::error::AftError;

/// Something of a store that is not as it should be.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
pub struct Finding {
    /// The file, below the data directory.
    pub file: String,
    /// Byte offset.
    pub offset: u64,
    /// What is wrong.
    pub what: String,
    /// The points that it may hurt, where that is known.
    pub points: Vec<String>,
}

impl Finding {
    fn new(file: impl Into<String>, offset: u64, what: impl ToString) -> Self {
        Self {
            file: file.into(),
            offset,
            what: what.to_string(),
            points: Vec::new(),
        }
    }
}

/// A data directory that nobody else uses.
#[derive(Debug)]
pub struct Store {
    /// The directory.
    pub root: PathBuf,
    _lock: DirectoryLock,
}

impl Store {
    /// Takes a data directory.
    ///
    /// # Errors
    /// When it is none, or a daemon uses it.
    pub fn open(root: &Path) -> Result<Self, AftError> {
        let is_store = ["store.key", "manifest", "log"]
            .iter()
            .any(|name| root.join(name).exists());
        if !is_store {
            return Err(AftError::new(
                ErrorClass::Refused,
                format!(
                    "{} is not the data directory of an appliance",
                    root.display()
                ),
                "name the directory that afterimaged was started with",
            ));
        }
        match DirectoryLock::acquire(root) {
            Ok(Some(lock)) => Ok(Self {
                root: root.to_owned(),
                _lock: lock,
            }),
            Ok(None) => {
                let holder = std::fs::read_to_string(root.join("lock")).unwrap_or_default();
                Err(AftError::new(
                    ErrorClass::Operator,
                    format!("{} is in use by process {}", root.display(), holder.trim()),
                    "stop afterimaged first; `aft store scrub` checks a store that is in use",
                ))
            }
            Err(error) => Err(file_error(&root.join("lock"), &error)),
        }
    }

    /// Names of the files of a directory, sorted; a directory that does not exist is empty.
    fn names(&self, directory: &str) -> Result<Vec<String>, AftError> {
        let path = self.root.join(directory);
        let entries = match std::fs::read_dir(&path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(file_error(&path, &error)),
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|error| file_error(&path, &error))?;
            names.extend(entry.file_name().into_string());
        }
        names.sort();
        Ok(names)
    }

    /// Files of a directory whose names mean something.
    fn parsed<T>(
        &self,
        directory: &str,
        parse: impl Fn(&FileName) -> Option<T>,
    ) -> Result<Vec<T>, AftError> {
        let names = self.names(directory)?;
        let named = names
            .into_iter()
            .filter_map(|name| FileName::parse(&format!("{directory}/{name}")));
        Ok(named.filter_map(|name| parse(&name)).collect())
    }

    /// All bytes of a file; `None` when it does not exist.
    fn read(&self, name: &str) -> Result<Option<Vec<u8>>, AftError> {
        let path = self.root.join(name);
        match std::fs::read(&path) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(file_error(&path, &error)),
        }
    }

    /// The first sector of a file; what cannot be read is left out.
    fn begin(&self, name: &str) -> Result<Vec<u8>, AftError> {
        use std::io::Read;
        let path = self.root.join(name);
        let mut bytes = Vec::new();
        let read =
            std::fs::File::open(&path).and_then(|file| file.take(4096).read_to_end(&mut bytes));
        read.map_err(|error| file_error(&path, &error))?;
        Ok(bytes)
    }

    /// The key of the store.
    fn key(&self) -> Result<[u8; 32], String> {
        match std::fs::read(self.root.join("store.key")) {
            Ok(bytes) => bytes
                .try_into()
                .map_err(|_| "it does not have 32 bytes".to_owned()),
            Err(error) => Err(error.to_string()),
        }
    }
}

/// What a file system said.
fn file_error(path: &Path, error: &std::io::Error) -> AftError {
    let message = format!("{}: {error}", path.display());
    AftError::new(ErrorClass::Operator, message, "")
}

/// A refusal.
fn refused(message: impl Into<String>, hint: impl Into<String>) -> AftError {
    AftError::new(ErrorClass::Refused, message, hint)
}

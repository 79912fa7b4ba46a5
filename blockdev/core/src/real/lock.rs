//! Says that a process uses a data directory.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use super::file::try_lock;

/// Name of the lock file. A storage never lists it.
pub(super) const LOCK_NAME: &str = "lock";

/// Holds a data directory until it is dropped or the process ends, however it ends.
#[derive(Debug)]
pub struct DirectoryLock {
    _file: File,
}

impl DirectoryLock {
    /// Takes the advisory lock of a directory: the file `lock` in it, which also tells the holder's
    /// process id. `None` when another process, or this one, holds it.
    ///
    /// # Errors
    /// When the directory is missing or cannot be written.
    pub fn acquire(directory: impl AsRef<Path>) -> io::Result<Option<Self>> {
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(directory.as_ref().join(LOCK_NAME))?;
        if !try_lock(&file)? {
            return Ok(None);
        }
        file.set_len(0)?;
        writeln!(file, "{}", std::process::id())?;
        Ok(Some(Self { _file: file }))
    }
}

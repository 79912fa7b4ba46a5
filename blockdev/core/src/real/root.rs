//! The directory that a storage lives in. Everything is reached from its descriptor, part by
//! part, so that no name and no symbolic link leads out of it.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use super::file::{self, make_directory_at, open_at, remove_at, rename_at, settle_direct};
use super::lock::LOCK_NAME;
use crate::storage::{Capacity, FileName};

const DIRECTORY: libc::c_int = libc::O_RDONLY | libc::O_DIRECTORY | libc::O_NOFOLLOW;
const REGULAR: libc::c_int = libc::O_RDWR | libc::O_NOFOLLOW | libc::O_NONBLOCK;

/// An open file and its unit of direct I/O in bytes, 1 when it goes through the page cache.
pub(super) struct Opened {
    pub(super) file: File,
    pub(super) alignment: u32,
}

pub(super) struct Root {
    descriptor: OwnedFd,
    path: PathBuf,
    is_direct: bool,
}

impl Root {
    /// Opens the root, and makes it, durably, when it does not exist.
    pub(super) fn open(path: &Path, is_direct: bool) -> io::Result<Self> {
        if !path.exists() {
            fs::create_dir_all(path)?;
            if let Some(parent) = path.canonicalize()?.parent() {
                File::open(parent)?.sync_all()?;
            }
        }
        let path = path.canonicalize()?;
        let descriptor = OwnedFd::from(File::open(&path)?);
        let text = path.to_str();
        if text.is_none() || !path.is_dir() {
            return Err(io::ErrorKind::NotADirectory.into());
        }
        Ok(Self {
            descriptor,
            path,
            is_direct,
        })
    }

    /// Opens a directory below the root, making missing ones when asked to.
    fn directory(&self, directory: &str, may_create: bool) -> io::Result<OwnedFd> {
        let mut at = self.descriptor.try_clone()?;
        for part in directory.split('/').filter(|part| !part.is_empty()) {
            if may_create {
                make_directory_at(at.as_raw_fd(), part)?;
            }
            at = open_at(at.as_raw_fd(), part, DIRECTORY)?;
        }
        Ok(at)
    }

    pub(super) fn create(&self, name: &FileName) -> io::Result<Opened> {
        let at = self.directory(name.directory(), true)?;
        let flags = REGULAR | libc::O_CREAT;
        if self.is_direct {
            match open_at(
                at.as_raw_fd(),
                name.base(),
                flags | libc::O_EXCL | libc::O_DIRECT,
            ) {
                // The name was free, and the file may have been made before the refusal.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                    return opened(open_at(at.as_raw_fd(), name.base(), flags)?, false);
                }
                result => return opened(result?, true),
            }
        }
        opened(
            open_at(at.as_raw_fd(), name.base(), flags | libc::O_EXCL)?,
            false,
        )
    }

    pub(super) fn open_file(&self, name: &FileName) -> io::Result<Opened> {
        let at = self.directory(name.directory(), false)?;
        if self.is_direct {
            match open_at(at.as_raw_fd(), name.base(), REGULAR | libc::O_DIRECT) {
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
                result => return opened(result?, true),
            }
        }
        opened(open_at(at.as_raw_fd(), name.base(), REGULAR)?, false)
    }

    pub(super) fn rename(&self, from: &FileName, to: &FileName) -> io::Result<()> {
        let at = self.directory(from.directory(), false)?;
        rename_at(at.as_raw_fd(), from.base(), to.base())
    }

    pub(super) fn remove(&self, name: &FileName) -> io::Result<()> {
        let at = self.directory(name.directory(), false)?;
        remove_at(at.as_raw_fd(), name.base())
    }

    /// Lists regular files with legal names; the lock file of the root is none of ours.
    pub(super) fn list(&self, directory: &str) -> io::Result<Vec<FileName>> {
        match self.directory(directory, false) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        }
        let mut names = Vec::new();
        for entry in fs::read_dir(self.path.join(directory))? {
            let entry = entry?;
            let base = entry.file_name();
            let Some(base) = base.to_str() else { continue };
            if !entry.file_type()?.is_file() || (directory.is_empty() && base == LOCK_NAME) {
                continue;
            }
            let name = if directory.is_empty() {
                FileName::parse(base)
            } else {
                FileName::parse(&format!("{directory}/{base}"))
            };
            names.extend(name);
        }
        Ok(names)
    }

    /// Syncs a directory and those above it: they may have been made for it.
    pub(super) fn sync_directory(&self, directory: &str) -> io::Result<()> {
        let mut rest = directory;
        loop {
            File::from(self.directory(rest, false)?).sync_all()?;
            if rest.is_empty() {
                return Ok(());
            }
            rest = rest.rsplit_once('/').map_or("", |(above, _)| above);
        }
    }

    pub(super) fn capacity(&self, directory: &str) -> io::Result<Capacity> {
        let at = match self.directory(directory, false) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => self.descriptor.try_clone()?,
            result => result?,
        };
        let (total_bytes, free_bytes) = file::capacity(at.as_raw_fd())?;
        Ok(Capacity {
            total_bytes,
            free_bytes,
        })
    }
}

fn opened(descriptor: OwnedFd, is_direct: bool) -> io::Result<Opened> {
    let file = File::from(descriptor);
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "not a regular file",
        ));
    }
    let alignment = if is_direct { settle_direct(&file)? } else { 1 };
    Ok(Opened { file, alignment })
}

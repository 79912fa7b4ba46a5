//! The directory that a file system is mounted at.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use afterimage_blockdev::ErrorClass;
use afterimage_export::{ExportError, is_mount_point};
use afterimage_protocol::rest::ApiError;

use crate::appliance::api_error;

/// A directory that is empty and no mount point. One that was made here goes with it.
#[derive(Debug)]
pub(super) struct MountDirectory {
    path: PathBuf,
    is_ours: bool,
}

impl MountDirectory {
    /// Takes a directory, and makes it when it is missing.
    pub(super) fn take(path: &Path) -> Result<Self, ApiError> {
        if !path.is_absolute() {
            return Err(api_error(
                ErrorClass::Refused,
                format!("{} is not an absolute path", path.display()),
                "name the directory from the root",
            ));
        }
        let is_ours = match fs::symlink_metadata(path) {
            Ok(_) => false,
            Err(error) if error.kind() == io::ErrorKind::NotFound => true,
            Err(source) => return Err(wrong(path, source)),
        };
        if is_ours {
            fs::create_dir_all(path).map_err(|source| wrong(path, source))?;
        }
        let directory = Self {
            path: path.to_owned(),
            is_ours,
        };
        directory.check()?;
        Ok(directory)
    }

    fn check(&self) -> Result<(), ApiError> {
        let path = self.path.clone();
        if is_mount_point(&path).map_err(|error| export_error(&error))? {
            return Err(export_error(&ExportError::AlreadyMounted { path }));
        }
        let mut entries = fs::read_dir(&path).map_err(|source| wrong(&path, source))?;
        match entries.next() {
            None => Ok(()),
            Some(_) => Err(export_error(&ExportError::NotEmpty { path })),
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for MountDirectory {
    fn drop(&mut self) {
        if self.is_ours
            && let Err(error) = fs::remove_dir(&self.path)
        {
            tracing::debug!(%error, directory = %self.path.display(), "a directory stays");
        }
    }
}

fn wrong(path: &Path, source: io::Error) -> ApiError {
    export_error(&ExportError::NotADirectory {
        path: path.to_owned(),
        source,
    })
}

/// Makes an answer of a failed export.
pub(super) fn export_error(error: &ExportError) -> ApiError {
    api_error(error.class(), error.to_string(), error.hint())
}

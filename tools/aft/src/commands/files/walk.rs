//! Ways through a mounted file system that nobody trusts.

use std::ffi::{OsStr, OsString};
use std::fs::{self, Metadata};
use std::io;
use std::path::{Component, Path, PathBuf};

use afterimage_blockdev::ErrorClass;

use crate::error::AftError;
use crate::output;

/// Deepest directory that is looked into.
const DEPTH_MAX: usize = 512;

/// What to say of a directory that is too deep to look into.
pub(super) fn too_deep(path: &Path, depth: usize) -> Option<AftError> {
    (depth >= DEPTH_MAX).then(|| {
        let error = io::Error::other(format!("it lies deeper than {DEPTH_MAX} directories"));
        failed("list", path, &error)
    })
}

/// A file that was named, below the root of its file system.
pub(super) struct Named {
    /// Where it is mounted.
    pub(super) place: PathBuf,
    /// From the root of the file system; empty for the root itself.
    pub(super) path: PathBuf,
    pub(super) metadata: Metadata,
}

/// What went wrong with one file.
pub(super) fn failed(operation: &str, path: &Path, error: &io::Error) -> AftError {
    let path = output::printable(&path.display().to_string());
    let (class, hint) = match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR) => {
            (ErrorClass::Refused, "`aft files ls` lists what there is")
        }
        // EIO, EUCLEAN and EBADMSG: the file system itself is damaged, or cannot be read.
        Some(libc::EIO | libc::EUCLEAN | libc::EBADMSG) => (
            ErrorClass::Corrupt,
            "look at another point; `aft log verify` finds damage of the store",
        ),
        _ => (ErrorClass::Operator, ""),
    };
    AftError::new(class, format!("cannot {operation} {path:?}: {error}"), hint)
}

/// Finds a file below a root. No symbolic link on the way is followed.
pub(super) fn find(root: &Path, wanted: &Path) -> Result<Named, AftError> {
    let mut place = root.to_owned();
    let mut path = PathBuf::new();
    let mut metadata =
        fs::symlink_metadata(root).map_err(|error| failed("find", wanted, &error))?;
    for component in wanted.components() {
        let name = match component {
            Component::RootDir | Component::CurDir => continue,
            Component::Normal(name) => name,
            Component::ParentDir | Component::Prefix(_) => {
                return Err(AftError::new(
                    ErrorClass::Refused,
                    format!("{} is no path from the root", wanted.display()),
                    "write it without ..",
                ));
            }
        };
        if metadata.file_type().is_symlink() {
            let to = fs::read_link(&place).unwrap_or_default();
            return Err(AftError::new(
                ErrorClass::Refused,
                format!(
                    "{:?} is a symbolic link to {:?}, and is not followed",
                    path.display().to_string(),
                    to.display().to_string()
                ),
                "name the file where the link leads",
            ));
        }
        place.push(name);
        path.push(name);
        metadata = fs::symlink_metadata(&place).map_err(|error| failed("find", &path, &error))?;
    }
    Ok(Named {
        place,
        path,
        metadata,
    })
}

/// The names of a directory, sorted by their bytes.
pub(super) fn names(place: &Path) -> io::Result<Vec<OsString>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(place)? {
        names.push(entry?.file_name());
    }
    names.sort_unstable();
    names.dedup();
    Ok(names)
}

/// The name of a child, below a path that may be empty.
pub(super) fn child(path: &Path, name: &OsStr) -> PathBuf {
    path.join(name)
}

/// Says what could not be read, and goes on.
#[derive(Default)]
pub(super) struct Problems {
    count: u64,
    is_corrupt: bool,
}

impl Problems {
    pub(super) fn note(&mut self, error: &AftError) {
        self.count += 1;
        self.is_corrupt |= error.0.class == ErrorClass::Corrupt;
        eprintln!("aft: {}", error.0.message);
    }

    /// # Errors
    /// When there was any.
    pub(super) fn end(self) -> Result<(), AftError> {
        if self.count == 0 {
            return Ok(());
        }
        let class = if self.is_corrupt {
            ErrorClass::Corrupt
        } else {
            ErrorClass::Operator
        };
        let message = format!("{} files or directories could not be read", self.count);
        Err(AftError::new(class, message, "the lines above name them"))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_link_is_found_and_never_followed() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        fs::create_dir(root.join("d")).unwrap();
        fs::write(root.join("d/f"), "x").unwrap();
        symlink("/etc", root.join("out")).unwrap();
        let found = find(root, Path::new("/d/./f")).unwrap();
        assert_eq!(found.path, Path::new("d/f"));
        assert!(find(root, Path::new("out")).unwrap().metadata.is_symlink());
        for (path, why) in [
            ("/out/passwd", "not followed"),
            ("/d/../../etc/passwd", "no path from the root"),
            ("/none", "cannot find"),
        ] {
            let error = find(root, Path::new(path)).err().unwrap();
            assert!(error.0.message.contains(why), "{error}");
            assert_eq!(error.0.class, ErrorClass::Refused);
        }
    }
}

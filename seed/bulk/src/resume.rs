//! The small file beside an unfinished raw image that says how far it is.
//!
//! It is written to a new file, synced and renamed, after the image was synced: what it says of the
//! image is on the medium.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::error::BulkError;

const FIRST_LINE: &str = "afterimage raw export 1";
/// Longest file that is read.
const BYTES_MAX: u64 = 16 << 10;

/// What is known of an unfinished image.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Resume {
    /// Which state of which disk it is, in one line.
    pub(crate) identity: String,
    pub(crate) size_bytes: u64,
    /// Everything below is whole and durable.
    pub(crate) done_bytes: u64,
}

/// The file that belongs to an image.
#[must_use]
pub fn resume_file(target: &Path) -> PathBuf {
    let mut name = OsString::from(target.file_name().unwrap_or_default());
    name.push(".aft-resume");
    target.with_file_name(name)
}

/// The state of which an image is an unfinished export; `None` when it is none.
///
/// # Errors
/// When the file is there and cannot be read.
pub fn resume_identity(target: &Path) -> Result<Option<String>, BulkError> {
    Ok(Resume::load(target)?.map(|resume| resume.identity))
}

impl Resume {
    /// Reads the file of an image. One that does not verify counts as none: the image is then no
    /// known export, and is not overwritten unasked.
    pub(crate) fn load(target: &Path) -> Result<Option<Self>, BulkError> {
        let path = resume_file(target);
        let metadata = match fs::metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            found => found.map_err(BulkError::io("look at", &path))?,
        };
        if metadata.len() > BYTES_MAX {
            return Ok(None);
        }
        let bytes = fs::read(&path).map_err(BulkError::io("read", &path))?;
        Ok(String::from_utf8(bytes)
            .ok()
            .and_then(|text| Self::parse(&text)))
    }

    fn parse(text: &str) -> Option<Self> {
        let (body, check) = text.split_once("check ")?;
        if check.trim_end() != blake3::hash(body.as_bytes()).to_hex().as_str() {
            return None;
        }
        let mut lines = body.lines();
        if lines.next() != Some(FIRST_LINE) {
            return None;
        }
        let mut field = |name: &str| lines.next()?.strip_prefix(name)?.strip_prefix(' ');
        Some(Self {
            identity: field("identity")?.to_owned(),
            size_bytes: field("size")?.parse().ok()?,
            done_bytes: field("done")?.parse().ok()?,
        })
    }

    /// # Durability
    /// On disk when this returns.
    pub(crate) fn save(&self, target: &Path) -> Result<(), BulkError> {
        let body = format!(
            "{FIRST_LINE}\nidentity {}\nsize {}\ndone {}\n",
            self.identity, self.size_bytes, self.done_bytes
        );
        let check = blake3::hash(body.as_bytes()).to_hex();
        let path = resume_file(target);
        let mut new = path.clone().into_os_string();
        new.push(".new");
        let new = PathBuf::from(new);
        let write = || {
            let mut file = File::create(&new)?;
            writeln!(file, "{body}check {check}")?;
            file.sync_all()?;
            fs::rename(&new, &path)?;
            sync_parent(&path)
        };
        write().map_err(BulkError::io("write", &path))
    }

    pub(crate) fn remove(target: &Path) -> Result<(), BulkError> {
        let path = resume_file(target);
        match fs::remove_file(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => removed.map_err(BulkError::io("remove", &path)),
        }
    }
}

/// Makes the name of a file durable.
pub(crate) fn sync_parent(path: &Path) -> io::Result<()> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    File::open(parent)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resume_file_comes_back_and_a_changed_one_does_not() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("disk.img");
        let resume = Resume {
            identity: "web1/root@h:lsn:7".to_owned(),
            size_bytes: 1 << 40,
            done_bytes: 123,
        };
        assert_eq!(Resume::load(&target).unwrap(), None);
        resume.save(&target).unwrap();
        assert_eq!(Resume::load(&target).unwrap(), Some(resume));
        let path = resume_file(&target);
        let good = fs::read(&path).unwrap();
        for at in 0..good.len() - 1 {
            let mut bad = good.clone();
            bad[at] ^= 1;
            fs::write(&path, &bad).unwrap();
            assert_eq!(Resume::load(&target).unwrap(), None, "flip at {at}");
        }
        Resume::remove(&target).unwrap();
        Resume::remove(&target).unwrap();
        assert_eq!(resume_identity(&target).unwrap(), None);
    }
}

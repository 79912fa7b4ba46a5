//! `aft files ls`.

use std::fs;
use std::path::Path;

use super::entry::Entry;
use super::shown::Stop;
use super::walk::{Problems, child, failed, find, names, too_deep};
use crate::error::AftError;
use crate::output::Output;

/// How it is listed.
#[derive(Clone, Copy)]
pub(super) struct How {
    pub(super) is_long: bool,
    pub(super) is_recursive: bool,
    pub(super) is_json: bool,
}

struct Listing<'a> {
    how: How,
    output: Output,
    stop: &'a Stop,
    problems: Problems,
}

pub(super) fn ls(root: &Path, wanted: &Path, how: How, stop: &Stop) -> Result<(), AftError> {
    let found = find(root, wanted)?;
    let mut listing = Listing {
        how,
        output: Output::new(how.is_json),
        stop,
        problems: Problems::default(),
    };
    if found.metadata.is_dir() {
        // What cannot be listed at all is the answer, not a problem beside it.
        let all = names(&found.place).map_err(|error| failed("list", &found.path, &error))?;
        listing.all(&found.place, &found.path, all, 0)?;
    } else {
        listing.one(&found.place, &found.path)?;
    }
    listing.problems.end()
}

impl Listing<'_> {
    fn all(
        &mut self,
        place: &Path,
        path: &Path,
        all: Vec<std::ffi::OsString>,
        depth: usize,
    ) -> Result<(), AftError> {
        for name in all {
            self.stop.check()?;
            let (place, path) = (place.join(&name), child(path, &name));
            let is_directory = match self.one(&place, &path) {
                Ok(is_directory) => is_directory,
                Err(error) => {
                    self.problems.note(&error);
                    continue;
                }
            };
            if !is_directory || !self.how.is_recursive {
                continue;
            }
            if let Some(error) = too_deep(&path, depth) {
                self.problems.note(&error);
                continue;
            }
            match names(&place) {
                Ok(inner) => self.all(&place, &path, inner, depth + 1)?,
                Err(error) => self.problems.note(&failed("list", &path, &error)),
            }
        }
        Ok(())
    }

    /// Shows one file; says whether it is a directory.
    fn one(&mut self, place: &Path, path: &Path) -> Result<bool, AftError> {
        let metadata =
            fs::symlink_metadata(place).map_err(|error| failed("look at", path, &error))?;
        let target = if metadata.is_symlink() {
            let read = fs::read_link(place);
            Some(read.map_err(|error| failed("look at", path, &error))?)
        } else {
            None
        };
        let target = target.as_ref().map(|target| target.as_os_str());
        let entry = Entry::new(path, &metadata, target);
        let line = if self.how.is_long {
            entry.long(&metadata)
        } else {
            entry.name.printable()
        };
        self.output.line(&entry, &line);
        Ok(metadata.is_dir())
    }
}

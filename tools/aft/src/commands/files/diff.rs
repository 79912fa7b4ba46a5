//! `aft files diff`: two states of a file system, directory by directory.

use std::cmp::Ordering;
use std::ffi::OsString;
use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::entry::{Name, kind};
use super::shown::Stop;
use super::walk::{Problems, child, failed, find, names, too_deep};
use crate::error::AftError;
use crate::output::{self, Output};

const BUFFER_BYTES: usize = 256 << 10;

/// How they are compared.
#[derive(Clone, Copy)]
pub(super) struct How {
    /// Reads also what looks the same.
    pub(super) compares_all: bool,
    pub(super) is_json: bool,
}

#[derive(Serialize)]
struct Change {
    change: &'static str,
    #[serde(flatten)]
    name: Name,
    kind: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    before_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    after_bytes: Option<u64>,
    /// What changed.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    what: Vec<&'static str>,
}

#[derive(Default, Serialize)]
struct Summary {
    added: u64,
    removed: u64,
    changed: u64,
    added_bytes: u64,
    removed_bytes: u64,
}

struct Diff<'a> {
    how: How,
    output: Output,
    stop: &'a Stop,
    problems: Problems,
    summary: Summary,
    buffers: (Vec<u8>, Vec<u8>),
}

/// One side of the comparison.
struct Side<'a> {
    place: &'a Path,
    all: Vec<OsString>,
}

pub(super) fn diff(
    (before, after): (&Path, &Path),
    wanted: &Path,
    how: How,
    stop: &Stop,
) -> Result<(), AftError> {
    let (before, after) = (find(before, wanted)?, find(after, wanted)?);
    let mut diff = Diff {
        how,
        output: Output::new(how.is_json),
        stop,
        problems: Problems::default(),
        summary: Summary::default(),
        buffers: (vec![0; BUFFER_BYTES], vec![0; BUFFER_BYTES]),
    };
    let (here, there) = (&before.metadata, &after.metadata);
    diff.both(
        &before.path,
        (&before.place, here),
        (&after.place, there),
        0,
    )?;
    let summary = &diff.summary;
    let text = format!(
        "{} added ({}), {} removed ({}), {} changed",
        summary.added,
        output::bytes(summary.added_bytes),
        summary.removed,
        output::bytes(summary.removed_bytes),
        summary.changed
    );
    diff.output.line(summary, &text);
    diff.problems.end()
}

impl Diff<'_> {
    fn directories(
        &mut self,
        path: &Path,
        before: &Path,
        after: &Path,
        depth: usize,
    ) -> Result<(), AftError> {
        let (one, other) = match (names(before), names(after)) {
            (Ok(one), Ok(other)) => (one, other),
            (Err(error), _) | (_, Err(error)) => {
                self.problems.note(&failed("list", path, &error));
                return Ok(());
            }
        };
        let (before, after) = (
            Side {
                place: before,
                all: one,
            },
            Side {
                place: after,
                all: other,
            },
        );
        let (mut i, mut j) = (0, 0);
        loop {
            self.stop.check()?;
            let order = match (before.all.get(i), after.all.get(j)) {
                (None, None) => return Ok(()),
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
                (Some(one), Some(other)) => one.cmp(other),
            };
            match order {
                Ordering::Less => {
                    let name = &before.all[i];
                    let (path, place) = (child(path, name), before.place.join(name));
                    self.alone("removed", &path, &place, depth)?;
                    i += 1;
                }
                Ordering::Greater => {
                    let name = &after.all[j];
                    let (path, place) = (child(path, name), after.place.join(name));
                    self.alone("added", &path, &place, depth)?;
                    j += 1;
                }
                Ordering::Equal => {
                    let name = &before.all[i];
                    let path = child(path, name);
                    let (one, other) = (before.place.join(name), after.place.join(name));
                    self.named(&path, &one, &other, depth)?;
                    i += 1;
                    j += 1;
                }
            }
        }
    }

    fn named(
        &mut self,
        path: &Path,
        before: &Path,
        after: &Path,
        depth: usize,
    ) -> Result<(), AftError> {
        match (fs::symlink_metadata(before), fs::symlink_metadata(after)) {
            (Ok(here), Ok(there)) => self.both(path, (before, &here), (after, &there), depth),
            (Err(error), _) | (_, Err(error)) => {
                self.problems.note(&failed("look at", path, &error));
                Ok(())
            }
        }
    }

    fn both(
        &mut self,
        path: &Path,
        (before, here): (&Path, &Metadata),
        (after, there): (&Path, &Metadata),
        depth: usize,
    ) -> Result<(), AftError> {
        if here.file_type() != there.file_type() {
            self.alone("removed", path, before, depth)?;
            return self.alone("added", path, after, depth);
        }
        let what = match self.differences((before, here), (after, there)) {
            Ok(what) => what,
            Err(error) => {
                self.problems.note(&failed("read", path, &error));
                return Ok(());
            }
        };
        if !what.is_empty() {
            self.summary.changed += 1;
            let has_bytes = here.is_file();
            self.show(Change {
                change: "changed",
                name: Name::new(path),
                kind: kind(there).0,
                before_bytes: has_bytes.then_some(here.len()),
                after_bytes: has_bytes.then_some(there.len()),
                what,
            });
        }
        if here.is_dir() {
            if let Some(error) = too_deep(path, depth) {
                self.problems.note(&error);
                return Ok(());
            }
            self.directories(path, before, after, depth + 1)?;
        }
        Ok(())
    }

    fn differences(
        &mut self,
        (before, here): (&Path, &Metadata),
        (after, there): (&Path, &Metadata),
    ) -> io::Result<Vec<&'static str>> {
        let mut what = Vec::new();
        if here.mode() != there.mode() {
            what.push("mode");
        }
        if (here.uid(), here.gid()) != (there.uid(), there.gid()) {
            what.push("owner");
        }
        // Times of a directory say no more than that something in it changed.
        if here.is_dir() {
            return Ok(what);
        }
        if here.rdev() != there.rdev() {
            what.push("device");
        }
        if here.is_symlink() && fs::read_link(before)? != fs::read_link(after)? {
            what.push("target");
        }
        let times = |metadata: &Metadata| {
            let modified = (metadata.mtime(), metadata.mtime_nsec());
            let changed = (metadata.ctime(), metadata.ctime_nsec());
            (modified, changed, metadata.ino())
        };
        let looks_same = times(here) == times(there) && here.len() == there.len();
        if here.is_file() {
            if here.len() != there.len() {
                what.push("size");
            } else if (!looks_same || self.how.compares_all)
                && self.content_differs(before, after)?
            {
                what.push("content");
            }
        }
        if what.is_empty() && times(here).0 != times(there).0 {
            what.push("time");
        } else if what.is_empty() && times(here).1 != times(there).1 {
            // Extended attributes, or the number of links.
            what.push("attributes");
        }
        Ok(what)
    }

    fn content_differs(&mut self, before: &Path, after: &Path) -> io::Result<bool> {
        let open = |path: &Path| -> io::Result<File> {
            let mut options = OpenOptions::new();
            let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
            options.read(true).custom_flags(flags).open(path)
        };
        let (mut one, mut other) = (open(before)?, open(after)?);
        let (a, b) = &mut self.buffers;
        loop {
            let (length, more) = (fill(&mut one, a)?, fill(&mut other, b)?);
            if length != more || a[..length] != b[..more] {
                return Ok(true);
            }
            if length == 0 {
                return Ok(false);
            }
        }
    }

    /// What is on one side only, with all that is in it.
    fn alone(
        &mut self,
        change: &'static str,
        path: &Path,
        place: &Path,
        depth: usize,
    ) -> Result<(), AftError> {
        let mut left: Vec<(PathBuf, PathBuf, usize)> =
            vec![(path.to_owned(), place.to_owned(), depth)];
        while let Some((path, place, depth)) = left.pop() {
            self.stop.check()?;
            let metadata = match fs::symlink_metadata(&place) {
                Ok(metadata) => metadata,
                Err(error) => {
                    self.problems.note(&failed("look at", &path, &error));
                    continue;
                }
            };
            let size = metadata.is_file().then_some(metadata.len());
            let (before_bytes, after_bytes) = if change == "added" {
                self.summary.added += 1;
                self.summary.added_bytes += size.unwrap_or(0);
                (None, size)
            } else {
                self.summary.removed += 1;
                self.summary.removed_bytes += size.unwrap_or(0);
                (size, None)
            };
            self.show(Change {
                change,
                name: Name::new(&path),
                kind: kind(&metadata).0,
                before_bytes,
                after_bytes,
                what: Vec::new(),
            });
            if !metadata.is_dir() {
                continue;
            }
            if let Some(error) = too_deep(&path, depth) {
                self.problems.note(&error);
                continue;
            }
            match names(&place) {
                Ok(all) => left.extend(
                    all.iter()
                        .rev()
                        .map(|name| (child(&path, name), place.join(name), depth + 1)),
                ),
                Err(error) => self.problems.note(&failed("list", &path, &error)),
            }
        }
        Ok(())
    }

    fn show(&self, change: Change) {
        let sizes = match (change.before_bytes, change.after_bytes) {
            (Some(before), Some(after)) if before != after => format!(" {before} -> {after} bytes"),
            (Some(size), _) | (None, Some(size)) => format!(" {size} bytes"),
            (None, None) => String::new(),
        };
        let what = match change.what.as_slice() {
            [] => String::new(),
            what => format!(" ({})", what.join(", ")),
        };
        let text = format!(
            "{:<8}{}{sizes}{what}",
            change.change,
            change.name.printable()
        );
        self.output.line(&change, &text);
    }
}

/// Reads until the buffer is full or the file ends.
fn fill(file: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

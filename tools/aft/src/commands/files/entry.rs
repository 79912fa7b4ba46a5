//! One file, as it is shown.

use std::ffi::OsStr;
use std::fs::Metadata;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use afterimage_blockdev::Timestamp;
use afterimage_protocol::rest::time::format_rfc3339;
use serde::Serialize;

use crate::output;

/// A name or path, exact for scripts.
#[derive(Clone, Serialize)]
pub(super) struct Name {
    /// As text; bytes that are no UTF-8 are replaced.
    pub(super) path: String,
    /// The bytes in hexadecimal digits, where the text is not exact.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) path_hex: Option<String>,
}

impl Name {
    pub(super) fn new(path: &Path) -> Self {
        let bytes = path.as_os_str().as_bytes();
        let hex = || bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        Self {
            path: String::from_utf8_lossy(bytes).into_owned(),
            path_hex: path.to_str().is_none().then(hex),
        }
    }

    pub(super) fn printable(&self) -> String {
        output::printable(&self.path)
    }
}

/// A file and what it is.
#[derive(Serialize)]
pub(super) struct Entry {
    #[serde(flatten)]
    pub(super) name: Name,
    kind: &'static str,
    mode: String,
    uid: u32,
    gid: u32,
    pub(super) size_bytes: u64,
    held_bytes: u64,
    links: u64,
    modified_s: i64,
    modified_ns: i64,
    #[serde(skip_serializing_if = "Option::is_none")]
    target: Option<String>,
}

/// What a file is, in one word and in the letter of `ls -l`.
pub(super) fn kind(metadata: &Metadata) -> (&'static str, char) {
    let kind = metadata.file_type();
    let all = [
        (kind.is_dir(), ("directory", 'd')),
        (kind.is_symlink(), ("symlink", 'l')),
        (kind.is_block_device(), ("block-device", 'b')),
        (kind.is_char_device(), ("character-device", 'c')),
        (kind.is_fifo(), ("fifo", 'p')),
        (kind.is_socket(), ("socket", 's')),
    ];
    let found = all.into_iter().find(|(is_it, _)| *is_it);
    found.map_or(("file", '-'), |(_, names)| names)
}

impl Entry {
    /// Of a file whose path below the root is `path`.
    pub(super) fn new(path: &Path, metadata: &Metadata, target: Option<&OsStr>) -> Self {
        Self {
            name: Name::new(path),
            kind: kind(metadata).0,
            mode: format!("{:04o}", metadata.mode() & 0o7777),
            uid: metadata.uid(),
            gid: metadata.gid(),
            size_bytes: metadata.len(),
            held_bytes: metadata.blocks().saturating_mul(512),
            links: metadata.nlink(),
            modified_s: metadata.mtime(),
            modified_ns: metadata.mtime_nsec(),
            target: target.map(|target| target.to_string_lossy().into_owned()),
        }
    }

    /// The line of `ls -l`.
    pub(super) fn long(&self, metadata: &Metadata) -> String {
        let mut text = format!(
            "{}{} {:>5} {:>5} {:>12} {} {}",
            kind(metadata).1,
            letters(metadata.mode()),
            self.uid,
            self.gid,
            self.size_bytes,
            time(self.modified_s, self.modified_ns),
            self.name.printable()
        );
        if let Some(target) = &self.target {
            text.push_str(" -> ");
            text.push_str(&output::printable(target));
        }
        text
    }
}

/// A time; one before 1970 as its number of seconds.
fn time(seconds: i64, nanoseconds: i64) -> String {
    let whole = u64::try_from(seconds)
        .ok()
        .and_then(|seconds| seconds.checked_mul(1_000_000_000))
        .and_then(|ns| ns.checked_add(u64::try_from(nanoseconds).ok()? / 1_000_000 * 1_000_000));
    whole.map_or_else(|| seconds.to_string(), |ns| format_rfc3339(Timestamp(ns)))
}

/// The nine letters of a mode.
fn letters(mode: u32) -> String {
    let mut text = String::with_capacity(9);
    for (shift, special, letter) in [(6, 0o4000, 's'), (3, 0o2000, 's'), (0, 0o1000, 't')] {
        let bits = mode >> shift;
        text.push(if bits & 4 != 0 { 'r' } else { '-' });
        text.push(if bits & 2 != 0 { 'w' } else { '-' });
        text.push(match (mode & special != 0, bits & 1 != 0) {
            (false, false) => '-',
            (false, true) => 'x',
            (true, true) => letter,
            (true, false) => letter.to_ascii_uppercase(),
        });
    }
    text
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    #[test]
    fn modes_and_times_read_as_usual() {
        assert_eq!(letters(0o755), "rwxr-xr-x");
        assert_eq!(letters(0o4755), "rwsr-xr-x");
        assert_eq!(letters(0o1666), "rw-rw-rwT");
        assert_eq!(time(1, 0), "1970-01-01T00:00:01Z");
        assert_eq!(time(-7, 0), "-7");
    }

    #[test]
    fn a_name_is_exact_for_scripts_and_harmless_on_a_terminal() {
        let name = Name::new(Path::new("a\nb\u{1b}[2J"));
        assert_eq!(name.printable(), "a?b?[2J");
        assert_eq!(name.path_hex, None);
        let path = PathBuf::from(OsStr::from_bytes(b"\xff/x"));
        assert_eq!(Name::new(&path).path_hex.as_deref(), Some("ff2f78"));
    }
}

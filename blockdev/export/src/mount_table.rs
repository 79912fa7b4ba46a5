//! The kernel's list of mounts, as this process sees it.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use crate::error::ExportError;

const MOUNT_INFO: &str = "/proc/self/mountinfo";

/// One mount.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MountEntry {
    /// Major and minor number of the mounted device.
    pub device: (u32, u32),
    /// The mount directory.
    pub directory: PathBuf,
    /// Kind of file system, for instance `ext4` or `fuse.afterimage`.
    pub kind: String,
    /// What is mounted, as the mounter named it.
    pub source: OsString,
}

/// Reads the list, oldest mount first.
///
/// # Errors
/// When `/proc` is not there.
pub fn read() -> Result<Vec<MountEntry>, ExportError> {
    let text = fs::read(MOUNT_INFO)
        .map_err(|source| ExportError::system("read", Path::new(MOUNT_INFO), source))?;
    Ok(parse(&text))
}

/// Reads the mounts of one device, oldest first.
///
/// # Errors
/// When `/proc` is not there.
pub fn of_device(device: (u32, u32)) -> Result<Vec<MountEntry>, ExportError> {
    let mut entries = read()?;
    entries.retain(|entry| entry.device == device);
    Ok(entries)
}

/// The absolute path of a mount directory; its own last part is not resolved, so that this works
/// for a mount whose server is dead.
///
/// # Errors
/// When the parent directory cannot be resolved.
pub fn absolute(directory: &Path) -> Result<PathBuf, ExportError> {
    let system = |source| ExportError::system("resolve", directory, source);
    if let Ok(path) = directory.canonicalize() {
        return Ok(path);
    }
    let path = std::path::absolute(directory).map_err(system)?;
    match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) => Ok(parent.canonicalize().map_err(system)?.join(name)),
        _ => Ok(path),
    }
}

fn parse(text: &[u8]) -> Vec<MountEntry> {
    text.split(|byte| *byte == b'\n')
        .filter_map(parse_line)
        .collect()
}

/// `id parent major:minor root directory options [tags...] - kind source super-options`
fn parse_line(line: &[u8]) -> Option<MountEntry> {
    let mut fields = line.split(|byte| *byte == b' ');
    let device = parse_device(fields.nth(2)?)?;
    let directory = PathBuf::from(unescape(fields.nth(1)?));
    let mut rest = fields.skip_while(|field| *field != b"-").skip(1);
    let kind = String::from_utf8_lossy(rest.next()?).into_owned();
    let source = unescape(rest.next()?);
    Some(MountEntry {
        device,
        directory,
        kind,
        source,
    })
}

/// Parses `major:minor`.
pub(crate) fn parse_device(text: &[u8]) -> Option<(u32, u32)> {
    let text = std::str::from_utf8(text).ok()?.trim();
    let (major, minor) = text.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// Undoes the kernel's octal escapes of blanks and backslashes.
fn unescape(text: &[u8]) -> OsString {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((first, tail)) = rest.split_first() {
        let digits = if *first == b'\\' {
            tail.get(..3).and_then(octal)
        } else {
            None
        };
        match digits {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            None => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    OsString::from_vec(bytes)
}

fn octal(digits: &[u8]) -> Option<u8> {
    let text = std::str::from_utf8(digits).ok()?;
    u8::from_str_radix(text, 8).ok()
}

/// Says whether `path` lies in `directory`, or is it. The mark that the kernel adds to paths of
/// files that are gone is ignored.
pub(crate) fn is_under(path: &Path, directory: &Path) -> bool {
    let bytes = path.as_os_str().as_bytes();
    let bytes = bytes.strip_suffix(b" (deleted)").unwrap_or(bytes);
    Path::new(std::ffi::OsStr::from_bytes(bytes)).starts_with(directory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_lines_with_and_without_tags_and_with_blanks() {
        let text = b"24 1 254:0 / / rw shared:1 - ext4 /dev/vda rw\n\
            90 24 7:3 / /mnt/a\\040b\\134c rw,nosuid - fuse.afterimage after\\040image rw,fd=4\n\
            broken line\n";
        let entries = parse(text);
        assert_eq!(entries.len(), 2);
        assert_eq!(entries[0].device, (254, 0));
        assert_eq!(entries[0].kind, "ext4");
        assert_eq!(entries[1].directory, PathBuf::from("/mnt/a b\\c"));
        assert_eq!(entries[1].source, OsString::from("after image"));
    }

    #[test]
    fn knows_what_lies_under_a_directory() {
        assert!(is_under(Path::new("/a/b/c.img"), Path::new("/a/b")));
        assert!(is_under(
            Path::new("/a/b/c.img (deleted)"),
            Path::new("/a/b/c.img")
        ));
        assert!(!is_under(Path::new("/a/bc"), Path::new("/a/b")));
    }

    #[test]
    fn the_root_is_in_the_list() {
        assert!(
            read()
                .expect("mount table")
                .iter()
                .any(|entry| entry.directory == Path::new("/"))
        );
    }
}

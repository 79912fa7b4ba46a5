//! `aft files get`. The copying is cp's and tar's: they know owners, times, extended attributes,
//! holes and hard links, and follow no links either.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use afterimage_blockdev::ErrorClass;
use serde::Serialize;

use super::walk::{Named, failed, find};
use crate::error::AftError;
use crate::output;

/// Longest message of a program that is repeated, in bytes.
const SAID_BYTES_MAX: u64 = 64 << 10;

/// What was brought back.
#[derive(Serialize)]
pub(super) struct Got {
    pub(super) path: String,
    pub(super) target: String,
}

/// Brings a file or directory back. None when it went to standard output.
pub(super) fn get(root: &Path, wanted: &Path, target: &Path) -> Result<Option<Got>, AftError> {
    let found = find(root, wanted)?;
    if target == Path::new("-") {
        write_out(root, &found)?;
        return Ok(None);
    }
    let target = free_target(&found, target)?;
    let mut command = Command::new("cp");
    command
        .args(["-dR", "--no-target-directory", "--sparse=auto"])
        .arg("--preserve=mode,ownership,timestamps,links,xattr")
        .args(["--".as_ref(), found.place.as_os_str(), target.as_os_str()])
        .stdout(Stdio::null());
    run(&mut command, &found)?;
    Ok(Some(Got {
        path: found.path.display().to_string(),
        target: output::printable(&target.display().to_string()),
    }))
}

/// The name that the copy gets. Nothing is there: neither a file that would be overwritten, nor a
/// link that would be followed.
fn free_target(found: &Named, target: &Path) -> Result<PathBuf, AftError> {
    let refused = |why: String, hint: &str| Err(AftError::new(ErrorClass::Refused, why, hint));
    let target = std::path::absolute(target).map_err(|error| failed("use", target, &error))?;
    let target = if target.is_dir() {
        match found.path.file_name() {
            Some(name) => target.join(name),
            None => {
                return refused(
                    "the root of a file system has no name of its own".to_owned(),
                    "name a directory that is not there yet",
                );
            }
        }
    } else {
        target
    };
    match fs::symlink_metadata(&target) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(target),
        Err(error) => Err(failed("use", &target, &error)),
        Ok(_) => refused(
            format!("{} is there already", target.display()),
            "name a directory, or a file that is not there yet",
        ),
    }
}

fn write_out(root: &Path, found: &Named) -> Result<(), AftError> {
    if found.metadata.is_dir() {
        let inner = if found.path.as_os_str().is_empty() {
            Path::new(".")
        } else {
            &found.path
        };
        let mut command = Command::new("tar");
        command
            .args(["--create", "--file=-", "--sparse", "--numeric-owner"])
            .args(["--xattrs", "--xattrs-include=*", "--format=posix"])
            .arg("--directory")
            .args([root.as_os_str(), "--".as_ref(), inner.as_os_str()])
            .stdout(Stdio::inherit());
        return run(&mut command, found);
    }
    if !found.metadata.is_file() {
        return Err(AftError::new(
            ErrorClass::Refused,
            format!(
                "{:?} has no bytes to write",
                found.path.display().to_string()
            ),
            "name a target instead of -",
        ));
    }
    let copy = || -> io::Result<()> {
        let mut options = OpenOptions::new();
        let options = options.read(true).custom_flags(libc::O_NOFOLLOW);
        let mut file: File = options.open(&found.place)?;
        match io::copy(&mut file, &mut io::stdout().lock()) {
            // Whoever reads has had enough.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            copied => copied.map(|_| ()),
        }
    };
    copy().map_err(|error| failed("read", &found.path, &error))
}

/// Runs a program to its end, and repeats what it says when it fails.
fn run(command: &mut Command, found: &Named) -> Result<(), AftError> {
    let name = command.get_program().to_string_lossy().into_owned();
    let missing = |error: io::Error| {
        AftError::new(
            ErrorClass::Operator,
            format!("cannot start {name}: {error}"),
            format!("install {name}"),
        )
    };
    command
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stderr(Stdio::piped());
    let mut child = command.spawn().map_err(&missing)?;
    let mut said = Vec::new();
    if let Some(errors) = child.stderr.take() {
        let mut errors = errors;
        let read = errors.by_ref().take(SAID_BYTES_MAX).read_to_end(&mut said);
        read.map_err(&missing)?;
        // The rest is read, so that it can end.
        io::copy(&mut errors, &mut io::sink()).map_err(&missing)?;
    }
    let status = child.wait().map_err(&missing)?;
    if status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&said);
    let lines: Vec<String> = said.lines().take(20).map(output::printable).collect();
    // EIO, EUCLEAN and EBADMSG, in the words of the system.
    let damage = ["Input/output error", "needs cleaning", "Bad message"];
    let class = if damage.iter().any(|words| said.contains(words)) {
        ErrorClass::Corrupt
    } else {
        ErrorClass::Operator
    };
    let path = found.path.display().to_string();
    Err(AftError::new(
        class,
        format!("not all of {path:?} came back: {}", lines.join("; ")),
        "what could be read is there",
    ))
}

//! qcow2 images, by qemu-img, which knows the format better than anybody.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use crate::error::BulkError;
use crate::progress::Progress;
use crate::resume::sync_parent;

const MAGIC: [u8; 4] = *b"QFI\xfb";
/// How often is looked whether somebody asked to stop.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// What is kept of what qemu-img says.
const SAID_BYTES_MAX: u64 = 4096;

/// Says whether a file is a qcow2 image.
///
/// # Errors
/// When it cannot be read.
pub fn is_qcow2(path: &Path) -> Result<bool, BulkError> {
    let mut file = File::open(path).map_err(BulkError::io("open", path))?;
    let mut magic = [0; 4];
    match file.read_exact(&mut magic) {
        Ok(()) => Ok(magic == MAGIC),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(BulkError::io("read", path)(error)),
    }
}

/// Writes a raw image or the file of a view as a qcow2 image. It has its name only when it is
/// whole; what was interrupted begins anew.
///
/// # Errors
/// `NoQemu`, `Qemu`, `Exists`, `Interrupted`, `Io`.
///
/// # Durability
/// On the medium when this returns.
pub fn export_qcow2(
    source: &Path,
    target: &Path,
    is_forced: bool,
    progress: &Progress,
) -> Result<u64, BulkError> {
    if target.exists() && !is_forced {
        return Err(BulkError::Exists {
            path: target.to_owned(),
        });
    }
    let part = with_suffix(target, ".part");
    let converted = convert(source, "raw", &part, "qcow2", progress).and_then(|()| {
        let finish = || {
            let file = File::open(&part)?;
            file.sync_all()?;
            let bytes = file.metadata()?.len();
            std::fs::rename(&part, target)?;
            sync_parent(target)?;
            Ok(bytes)
        };
        finish().map_err(BulkError::io("finish", target))
    });
    if converted.is_err() {
        // It has no use, and what went wrong is told already.
        let _missing = std::fs::remove_file(&part);
    }
    converted
}

/// Writes a qcow2 image as a sparse raw image, which must not be there.
///
/// # Errors
/// As [`export_qcow2`].
pub fn unpack_qcow2(source: &Path, raw: &Path, progress: &Progress) -> Result<(), BulkError> {
    convert(source, "qcow2", raw, "raw", progress)
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path.as_os_str());
    name.push(suffix);
    PathBuf::from(name)
}

/// A path that qemu-img takes for nothing else, whatever colons are in it.
fn plain(path: &Path) -> Result<PathBuf, BulkError> {
    std::path::absolute(path).map_err(BulkError::io("find", path))
}

fn convert(
    source: &Path,
    from: &str,
    target: &Path,
    to: &str,
    progress: &Progress,
) -> Result<(), BulkError> {
    let (source, target) = (plain(source)?, plain(target)?);
    let mut command = Command::new("qemu-img");
    // Formats are named: a guest must not choose how its own bytes are read.
    command.args(["convert", "-f", from, "-O", to]);
    command.args([&source, &target]);
    run(&mut command, progress)
}

fn run(command: &mut Command, progress: &Progress) -> Result<(), BulkError> {
    let thread = |source| BulkError::Thread { source };
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => BulkError::NoQemu,
            _ => BulkError::Thread { source: error },
        })?;
    let status = wait(&mut child, progress);
    let mut said = String::new();
    if let Some(stderr) = child.stderr.take() {
        // What is no text says nothing.
        let _unreadable = stderr.take(SAID_BYTES_MAX).read_to_string(&mut said);
    }
    match status.map_err(thread)? {
        None => Err(BulkError::Interrupted),
        Some(status) if status.success() => Ok(()),
        Some(status) => {
            let last = said.trim().lines().next_back().unwrap_or_default();
            let message = if last.is_empty() {
                status.to_string()
            } else {
                last.to_owned()
            };
            Err(BulkError::Qemu { message })
        }
    }
}

/// Waits for the end; `None` when the child was ended because somebody asked to stop.
fn wait(child: &mut Child, progress: &Progress) -> io::Result<Option<ExitStatus>> {
    loop {
        if progress.is_stopping() {
            // It may have ended by itself just now.
            let _gone = child.kill();
            child.wait()?;
            return Ok(None);
        }
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

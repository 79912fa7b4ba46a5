//! Opens a source: an image file or block device that nobody else writes.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use afterimage_blockdev::{
    BlockDevice, BlockOp, BlockOutcome, DeviceOptions, ErrorClass, ExtentKind, RealDevice, wait,
};
use afterimage_export::LoopDevice;

use crate::config::TapConfig;
use crate::error::AgentError;

/// An open source.
pub(super) struct Source {
    pub(super) device: Arc<RealDevice>,
    /// Tells its size. Of an image it is the lock that keeps other agents off.
    pub(super) file: File,
}

fn refuse(path: &Path, what: impl Into<String>) -> AgentError {
    AgentError::Source {
        path: path.to_owned(),
        what: what.into(),
        class: ErrorClass::Refused,
    }
}

/// Finds the source that a person means.
///
/// # Errors
/// `Source` when it is no image file and no block device, or not absolute.
pub(super) fn find(text: &str) -> Result<PathBuf, AgentError> {
    let path = Path::new(text);
    if !path.is_absolute() {
        return Err(refuse(path, "an absolute path is needed"));
    }
    let path = path
        .canonicalize()
        .map_err(|error| refuse(path, error.to_string()))?;
    let metadata = path
        .metadata()
        .map_err(|error| refuse(&path, error.to_string()))?;
    let kind = metadata.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(refuse(
            &path,
            "it is neither an image file nor a block device",
        ));
    }
    Ok(path)
}

/// Says whether two paths are the same file or device.
pub(super) fn is_same(a: &Path, b: &Path) -> bool {
    let (Ok(a), Ok(b)) = (a.metadata(), b.metadata()) else {
        return a == b;
    };
    if a.file_type().is_block_device() && b.file_type().is_block_device() {
        return a.rdev() == b.rdev();
    }
    (a.dev(), a.ino()) == (b.dev(), b.ino())
}

/// Opens it for this agent alone.
///
/// # Errors
/// `Source` when somebody else uses it.
pub(super) fn open(path: &Path, config: &TapConfig) -> Result<Source, AgentError> {
    let in_use = |what: String| AgentError::Source {
        path: path.to_owned(),
        what,
        class: ErrorClass::Operator,
    };
    let metadata = path
        .metadata()
        .map_err(|error| refuse(path, error.to_string()))?;
    let is_file = metadata.file_type().is_file();
    let file = if is_file {
        let users = LoopDevice::list()?;
        if let Some(user) = users.iter().find(|user| is_same(&user.backing, path)) {
            return Err(in_use(format!(
                "/dev/loop{} uses it; detach that first",
                user.number
            )));
        }
        lock_image(path).map_err(in_use)?
    } else {
        File::open(path).map_err(|error| in_use(error.to_string()))?
    };
    let options = DeviceOptions {
        queue_depth: config.source_depth,
        ..DeviceOptions::default()
    };
    let device = RealDevice::open(path, options).map_err(|error| match error.raw_os_error() {
        Some(libc::EBUSY) => in_use("it is mounted or held by something else".to_owned()),
        _ => in_use(error.to_string()),
    })?;
    let geometry = device.geometry();
    if geometry.is_read_only {
        return Err(in_use("it is read-only".to_owned()));
    }
    if geometry.size_bytes == 0 {
        return Err(refuse(path, "it is empty"));
    }
    Ok(Source { device, file })
}

/// The present size of an open source, in whole logical blocks.
pub(super) fn size(mut file: &File, logical_block_bytes: u32) -> io::Result<u64> {
    let bytes = file.seek(SeekFrom::End(0))?;
    Ok(bytes - bytes % u64::from(logical_block_bytes))
}

/// Says whether a range of an open source may hold anything but zeroes.
pub(super) fn may_hold_data(file: &File, range: &Range<u64>) -> bool {
    let options = DeviceOptions {
        is_read_only: true,
        is_exclusive: false,
        queue_depth: 1,
        ..DeviceOptions::default()
    };
    // By its descriptor: the name may mean another file by now.
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let Ok(device) = RealDevice::open(Path::new(&path), options) else {
        return true;
    };
    let op = BlockOp::Extents {
        offset: range.start,
        length: range.end - range.start,
    };
    match wait::device(device.as_ref(), op) {
        Ok(BlockOutcome::Extents(extents)) => {
            extents.iter().any(|extent| extent.kind == ExtentKind::Data)
        }
        _ => true,
    }
}

fn lock_image(path: &Path) -> Result<File, String> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .map_err(|e| e.to_string())?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err("another agent or program holds it".to_owned()),
        Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Unsupported => Ok(file),
        Err(TryLockError::Error(error)) => Err(error.to_string()),
    }
}

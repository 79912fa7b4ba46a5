//! Mounting the file system that is on a device, and taking it off again.

use std::ffi::{CStr, CString};
use std::fs;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::error::ExportError;
use crate::fuse::LOOK_AGAIN;
use crate::probe::FsKind;
use crate::{mount_table, sys};

/// What a copy of somebody's disk must not be able to do to this machine.
const SAFE_FLAGS: libc::c_ulong = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;

/// Says whether something is mounted at a directory.
///
/// # Errors
/// When the directory's parent cannot be resolved or `/proc` is not there.
pub fn is_mount_point(directory: &Path) -> Result<bool, ExportError> {
    let path = mount_table::absolute(directory)?;
    Ok(mount_table::read()?
        .iter()
        .any(|entry| entry.directory == path))
}

/// Checks that a directory exists, is free and is empty.
pub(crate) fn check_directory(directory: &Path) -> Result<(), ExportError> {
    let path = directory.to_owned();
    let wrong = |source| ExportError::NotADirectory {
        path: path.clone(),
        source,
    };
    if sys::is_dead_mount(directory) {
        return Err(ExportError::AlreadyMounted { path });
    }
    if !fs::metadata(directory).map_err(wrong)?.is_dir() {
        return Err(wrong(io::Error::from_raw_os_error(libc::ENOTDIR)));
    }
    if is_mount_point(directory)? {
        return Err(ExportError::AlreadyMounted { path });
    }
    match fs::read_dir(directory).map_err(wrong)?.next() {
        Some(_) => Err(ExportError::NotEmpty { path }),
        None => Ok(()),
    }
}

/// Mounts the file system on a device, without set-user-id, devices and programs.
///
/// XFS is told to ignore that the original with the same UUID may be mounted; a read-only XFS
/// does not replay its log, so that it shows what had reached its place. For a clean view give a
/// writable overlay and mount it writable.
///
/// # Errors
/// `NotAFilesystem` for what cannot be mounted directly (the hint says what to do);
/// `SameFilesystemMounted` where the kernel refuses a second one of the same UUID; the
/// directory's errors as for [`FuseMount::mount`](crate::FuseMount::mount).
pub fn mount_filesystem(
    device: &Path,
    directory: &Path,
    kind: FsKind,
    is_read_only: bool,
) -> Result<(), ExportError> {
    let Some((drivers, options)) = driver(kind, is_read_only) else {
        return Err(ExportError::NotAFilesystem {
            device: device.to_owned(),
            kind,
        });
    };
    if !sys::is_root() {
        return Err(ExportError::NotRoot {
            operation: "mounting a file system",
        });
    }
    check_directory(directory)?;
    let system = |source| ExportError::system("mount", device, source);
    let source = sys::c_path(device).map_err(system)?;
    let target = sys::c_path(directory).map_err(system)?;
    let flags = if is_read_only {
        SAFE_FLAGS | libc::MS_RDONLY
    } else {
        SAFE_FLAGS
    };
    let mut result = Err(io::Error::from_raw_os_error(libc::ENODEV));
    for driver in drivers {
        result = sys::mount(&source, &target, driver, flags, options);
        // This kernel lacks the driver; the next one may know the format too.
        if !matches!(&result, Err(error) if error.raw_os_error() == Some(libc::ENODEV)) {
            break;
        }
    }
    result.map_err(|source| explain(device, directory, kind, source))
}

/// The drivers to try, best first, and their options.
fn driver(kind: FsKind, is_read_only: bool) -> Option<(&'static [&'static CStr], &'static CStr)> {
    match kind {
        FsKind::Ext2 => Some((&[c"ext2", c"ext4"], c"")),
        FsKind::Ext3 => Some((&[c"ext3", c"ext4"], c"")),
        FsKind::Ext4 => Some((&[c"ext4"], c"")),
        FsKind::Xfs if is_read_only => Some((&[c"xfs"], c"nouuid,norecovery")),
        FsKind::Xfs => Some((&[c"xfs"], c"nouuid")),
        FsKind::Btrfs => Some((&[c"btrfs"], c"")),
        _ => None,
    }
}

fn explain(device: &Path, directory: &Path, kind: FsKind, source: io::Error) -> ExportError {
    let (device, path) = (device.to_owned(), directory.to_owned());
    match source.raw_os_error() {
        Some(libc::EEXIST) if kind == FsKind::Btrfs => {
            ExportError::SameFilesystemMounted { device }
        }
        Some(libc::EBUSY) if kind == FsKind::Btrfs => ExportError::SameFilesystemMounted { device },
        Some(libc::EBUSY) => {
            let user = "it is mounted or in exclusive use".to_owned();
            ExportError::Busy { path: device, user }
        }
        Some(libc::EPERM) => ExportError::NotRoot {
            operation: "mounting a file system",
        },
        _ => ExportError::MountRefused {
            device,
            path,
            kind,
            source,
        },
    }
}

/// Unmounts a directory, after waiting at most `busy_wait` for its users.
///
/// # Errors
/// `NotMounted`, or `Busy` when its users did not go.
///
/// # Durability
/// A file system on a device of its own is written out completely when this returns.
pub fn unmount(directory: &Path, busy_wait: Duration) -> Result<(), ExportError> {
    let system = |source| ExportError::system("unmount", directory, source);
    let target: CString = sys::c_path(directory).map_err(system)?;
    let until = Instant::now() + busy_wait;
    loop {
        let Err(error) = sys::umount(&target, libc::UMOUNT_NOFOLLOW) else {
            return Ok(());
        };
        match error.raw_os_error() {
            Some(libc::EBUSY) if Instant::now() < until => std::thread::sleep(LOOK_AGAIN),
            Some(libc::EBUSY) => {
                let user = "a process has files open in it, or works in it".to_owned();
                return Err(ExportError::Busy {
                    path: directory.to_owned(),
                    user,
                });
            }
            Some(libc::EINVAL | libc::ENOENT) => {
                return Err(ExportError::NotMounted {
                    path: directory.to_owned(),
                });
            }
            Some(libc::EPERM) => {
                return Err(ExportError::NotRoot {
                    operation: "unmounting",
                });
            }
            _ => return Err(system(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_file_systems_have_a_driver() {
        for kind in [
            FsKind::Swap,
            FsKind::Lvm2Member,
            FsKind::MdMember,
            FsKind::Luks,
            FsKind::Gpt,
        ] {
            assert!(driver(kind, false).is_none());
            let error = mount_filesystem(Path::new("/dev/null"), Path::new("/"), kind, false)
                .expect_err("must be refused");
            assert!(matches!(error, ExportError::NotAFilesystem { .. }));
            assert!(!error.hint().is_empty());
        }
    }

    #[test]
    fn a_root_directory_is_busy_and_a_missing_one_is_missing() {
        assert!(matches!(
            check_directory(Path::new("/")),
            Err(ExportError::AlreadyMounted { .. })
        ));
        assert!(matches!(
            check_directory(Path::new("/no/such/directory")),
            Err(ExportError::NotADirectory { .. })
        ));
        assert!(matches!(
            check_directory(Path::new("/etc")),
            Err(ExportError::NotEmpty { .. })
        ));
    }
}

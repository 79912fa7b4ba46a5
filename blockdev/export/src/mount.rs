//! Mounting the file system that is on a device, and taking it off again.

use std::ffi::{CStr, CString};
use std::fs;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::error::ExportError;
use crate::fuse::LOOK_AGAIN;
use crate::probe::FsKind;
use crate::{btrfs, mount_table, sys};

/// How a file system is mounted. By default a copy of somebody's disk can do nothing to this
/// machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct MountFlags {
    /// Nobody can write to the file system.
    pub is_read_only: bool,
    /// The device itself cannot be written, so that no journal can be replayed.
    pub is_device_read_only: bool,
    /// Lets programs take the rights of their owners.
    pub allow_suid: bool,
    /// Lets device nodes be opened.
    pub allow_dev: bool,
    /// Lets programs run.
    pub allow_exec: bool,
}

impl MountFlags {
    fn bits(self) -> libc::c_ulong {
        let flags = [
            (!self.allow_suid, libc::MS_NOSUID),
            (!self.allow_dev, libc::MS_NODEV),
            (!self.allow_exec, libc::MS_NOEXEC),
            (
                self.is_read_only || self.is_device_read_only,
                libc::MS_RDONLY,
            ),
        ];
        let set = flags.into_iter().filter(|(is_set, _)| *is_set);
        set.fold(0, |bits, (_, flag)| bits | flag)
    }
}

/// What was done to mount a file system.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MountedAs {
    /// Nothing out of the ordinary.
    Itself,
    /// The kernel has mounted the original too, and took the device only under a new identity: its
    /// superblocks were changed.
    NewIdentity,
}

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

/// Mounts the file system on a device.
///
/// The original with the same UUID may be mounted beside it. XFS is told to ignore that; btrfs gets
/// a temporary identity from the kernel, or else a new one, in its superblocks. On a read-only
/// device XFS does not replay its log, so that it shows what had reached its place; for a clean
/// view give a writable overlay.
///
/// # Errors
/// `NotAFilesystem` for what cannot be mounted directly (the hint says what to do);
/// `SameFilesystemMounted` where the kernel refuses a second one of the same UUID; the
/// directory's errors as for [`FuseMount::mount`](crate::FuseMount::mount).
pub fn mount_filesystem(
    device: &Path,
    directory: &Path,
    kind: FsKind,
    flags: MountFlags,
) -> Result<MountedAs, ExportError> {
    let Some((drivers, options)) = driver(kind, flags.is_device_read_only) else {
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
    let mount = || {
        let mut result = Err(io::Error::from_raw_os_error(libc::ENODEV));
        for driver in drivers {
            result = sys::mount(&source, &target, driver, flags.bits(), options);
            // This kernel lacks the driver; the next one may know the format too.
            if !matches!(&result, Err(error) if error.raw_os_error() == Some(libc::ENODEV)) {
                break;
            }
        }
        result
    };
    let refusal = match mount() {
        Ok(()) => return Ok(MountedAs::Itself),
        Err(error) => explain(device, directory, kind, error),
    };
    if !matches!(refusal, ExportError::SameFilesystemMounted { .. }) || flags.is_device_read_only {
        return Err(refusal);
    }
    btrfs::renew_identity(device)?;
    mount().map_err(|source| explain(device, directory, kind, source))?;
    Ok(MountedAs::NewIdentity)
}

/// The drivers to try, best first, and their options.
fn driver(kind: FsKind, is_read_only: bool) -> Option<(&'static [&'static CStr], &'static CStr)> {
    match kind {
        FsKind::Ext2 => Some((&[c"ext2", c"ext4"], c"")),
        FsKind::Ext3 => Some((&[c"ext3", c"ext4"], c"")),
        FsKind::Ext4 => Some((&[c"ext4"], c"")),
        FsKind::Vfat => Some((&[c"vfat"], c"")),
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
            let flags = MountFlags::default();
            let error = mount_filesystem(Path::new("/dev/null"), Path::new("/"), kind, flags)
                .expect_err("must be refused");
            assert!(matches!(error, ExportError::NotAFilesystem { .. }));
            assert!(!error.hint().is_empty());
        }
    }

    #[test]
    fn nothing_is_allowed_that_was_not_asked_for() {
        let safe = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
        assert_eq!(MountFlags::default().bits(), safe);
        let some = MountFlags {
            is_read_only: true,
            allow_exec: true,
            ..MountFlags::default()
        };
        assert_eq!(
            some.bits(),
            libc::MS_NOSUID | libc::MS_NODEV | libc::MS_RDONLY
        );
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

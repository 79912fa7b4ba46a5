//! Cleaning up after a daemon that died: its loop devices, what was mounted from them, and its
//! FUSE mount. In this order, since the kernel forgets where a backing file lay as soon as its
//! mount is gone.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::ExportError;
use crate::loop_device::{LoopDevice, detach_binding, device_numbers, node_path};
use crate::{ioctl, mount_table, sys};

/// Dead mounts on top of each other that are taken away, at most.
const STACKED_MAX: usize = 16;
/// How long a dead device's last users have to notice.
const BUSY_WAIT: Duration = Duration::from_secs(5);

/// What was cleaned up.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Detached {
    /// Directories that were unmounted.
    pub directories: Vec<PathBuf>,
    /// Loop devices that were detached.
    pub devices: Vec<PathBuf>,
}

/// Takes a FUSE mount away whose server has died; says whether there was one. A mount that
/// somebody serves is left alone.
///
/// # Errors
/// `NotRoot`, or what the kernel says.
pub fn detach_stale(mountpoint: &Path) -> Result<bool, ExportError> {
    let mut was_stale = false;
    for _ in 0..STACKED_MAX {
        if !sys::is_dead_mount(mountpoint) {
            break;
        }
        detach(mountpoint)?;
        was_stale = true;
    }
    Ok(was_stale)
}

/// Detaches every loop device over a file below `mountpoint`, and unmounts what is mounted from
/// them. Only for a tree whose server is dead: data that its mounts had not written is lost.
///
/// # Errors
/// `Busy` when a device does not become free; what came before stays cleaned up.
pub fn detach_stale_under(mountpoint: &Path) -> Result<Detached, ExportError> {
    let directory = mount_table::absolute(mountpoint)?;
    let mut detached = Detached::default();
    for entry in LoopDevice::list()? {
        if !mount_table::is_under(&entry.backing, &directory) {
            continue;
        }
        let numbers = device_numbers(entry.number);
        let mut mounts = mount_table::read()?;
        mounts.retain(|mount| numbers.contains(&mount.device));
        // The newest first: a mount may lie within another.
        for mount in mounts.iter().rev() {
            detach(&mount.directory)?;
            detached.directories.push(mount.directory.clone());
        }
        detach_binding(entry.binding, BUSY_WAIT)?;
        detached.devices.push(node_path(entry.number));
    }
    Ok(detached)
}

/// A device of a dead daemon that somebody still uses.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StaleDevice {
    /// The device.
    pub device: PathBuf,
    /// The file behind it.
    pub backing: PathBuf,
    /// Where it is mounted; empty when something else uses it.
    pub directories: Vec<PathBuf>,
}

/// Lets go of every loop device over a file below `mountpoint`, and unmounts nothing: a free device
/// goes now, one in use with its last user. Returns those in use. Only for a tree whose server is
/// dead.
///
/// # Errors
/// When the devices or mounts of the machine cannot be listed.
pub fn release_stale_under(mountpoint: &Path) -> Result<Vec<StaleDevice>, ExportError> {
    let directory = mount_table::absolute(mountpoint)?;
    let mut in_use = Vec::new();
    for entry in LoopDevice::list()? {
        if !mount_table::is_under(&entry.backing, &directory) {
            continue;
        }
        let device = node_path(entry.number);
        let numbers = device_numbers(entry.number);
        match detach_binding(entry.binding, Duration::ZERO) {
            Ok(()) => continue,
            Err(error) => tracing::debug!(%error, "a dead device stays until it is free"),
        }
        if let Err(error) = clear_when_free(&device) {
            tracing::warn!(%error, device = %device.display(), "a dead device stays");
        }
        let mut mounts = mount_table::read()?;
        mounts.retain(|mount| numbers.contains(&mount.device));
        let directories = mounts.into_iter().map(|mount| mount.directory).collect();
        in_use.push(StaleDevice {
            device,
            backing: entry.backing,
            directories,
        });
    }
    Ok(in_use)
}

/// Makes a device that is in use go with its last user.
fn clear_when_free(device: &Path) -> std::io::Result<()> {
    ioctl::clear_loop(&std::fs::File::open(device)?)
}

/// Unmounts at once when free, otherwise with the last user.
fn detach(directory: &Path) -> Result<(), ExportError> {
    let system = |source: std::io::Error| match source.raw_os_error() {
        Some(libc::EPERM) => ExportError::NotRoot {
            operation: "unmounting",
        },
        _ => ExportError::system("unmount", directory, source),
    };
    let path = sys::c_path(directory).map_err(system)?;
    match sys::umount(&path, libc::UMOUNT_NOFOLLOW) {
        Ok(()) => Ok(()),
        Err(_) => sys::umount(&path, libc::MNT_DETACH | libc::UMOUNT_NOFOLLOW).map_err(system),
    }
}

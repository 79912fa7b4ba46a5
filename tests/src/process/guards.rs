//! Mounts and loop devices that go when they are dropped, and the sweep behind all of them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::programs::{outcome_of, run};

/// A mounted file system.
#[derive(Debug)]
pub struct FsMount {
    /// Where it is mounted.
    pub path: PathBuf,
    is_mounted: bool,
}

impl FsMount {
    /// Mounts a device, and makes the directory.
    ///
    /// # Panics
    /// When it cannot be mounted.
    #[must_use]
    pub fn new(device: &Path, path: &Path, options: &str) -> Self {
        fs::create_dir_all(path).expect("a directory");
        let options = if options.is_empty() { "rw" } else { options };
        let (device, place) = (device.display().to_string(), path.display().to_string());
        run("mount", &["-o", options, &device, &place]);
        Self {
            path: path.to_owned(),
            is_mounted: true,
        }
    }

    /// Unmounts it, with all that was written to it.
    ///
    /// # Panics
    /// When it is in use.
    pub fn umount(mut self) {
        run("umount", &[&self.path]);
        self.is_mounted = false;
    }
}

impl Drop for FsMount {
    fn drop(&mut self) {
        if self.is_mounted {
            quiet("umount", &["-l", &self.path.display().to_string()]);
        }
    }
}

/// A loop device over a file.
#[derive(Debug)]
pub struct LoopFile {
    /// The device.
    pub device: PathBuf,
}

impl LoopFile {
    /// Attaches a file with direct I/O, so that only what was flushed into it is in it.
    ///
    /// # Panics
    /// When it cannot be attached.
    #[must_use]
    pub fn new(file: &Path) -> Self {
        let file = file.display().to_string();
        let said = run("losetup", &["-f", "--show", "--direct-io=on", &file]);
        let device = PathBuf::from(said.trim());
        Self { device }
    }
}

impl Drop for LoopFile {
    fn drop(&mut self) {
        quiet("losetup", &["-d", &self.device.display().to_string()]);
    }
}

fn quiet(program: &str, arguments: &[&str]) {
    let _gone = Command::new(program)
        .args(arguments)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
}

/// Loop devices whose file is below a directory.
#[must_use]
pub fn loops_below(root: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir("/sys/block") else {
        return Vec::new();
    };
    let is_ours = |name: &str| {
        let file = format!("/sys/block/{name}/loop/backing_file");
        fs::read_to_string(file).is_ok_and(|file| Path::new(file.trim()).starts_with(root))
    };
    let names = entries.flatten().map(|entry| entry.file_name());
    names
        .filter_map(|name| name.into_string().ok())
        .filter(|name| is_ours(name))
        .map(|name| Path::new("/dev").join(name))
        .collect()
}

/// Mounts below a directory, or of a loop device over a file below it, newest first.
#[must_use]
pub fn mounts_below(root: &Path) -> Vec<PathBuf> {
    let loops = loops_below(root);
    let table = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let mut found: Vec<_> = table
        .lines()
        .filter_map(|line| {
            let mut words = line.split(' ');
            let (source, place) = (Path::new(words.next()?), PathBuf::from(words.next()?));
            let is_ours = place.starts_with(root) || loops.iter().any(|l| l == source);
            is_ours.then_some(place)
        })
        .collect();
    found.reverse();
    found
}

/// Takes away what daemons that were killed left below a directory.
pub fn sweep(root: &Path) {
    for place in mounts_below(root) {
        quiet("umount", &[&place.display().to_string()]);
    }
    // First, since a file is no longer found below the root once its mount is out of sight.
    for device in loops_below(root) {
        quiet("losetup", &["-d", &device.display().to_string()]);
    }
    for place in mounts_below(root) {
        quiet("umount", &["-l", &place.display().to_string()]);
    }
    for device in loops_below(root) {
        quiet("losetup", &["-d", &device.display().to_string()]);
    }
}

/// Makes a sparse file.
///
/// # Panics
/// When it cannot be made.
pub fn sparse(path: &Path, bytes: u64) {
    let file = fs::File::create(path).expect("an image");
    file.set_len(bytes).expect("its size");
}

/// What a file system check says of a device that is not mounted.
///
/// # Panics
/// When it finds a fault.
pub fn fsck(kind: &str, device: &Path) {
    let mut command = match kind {
        "ext4" => {
            let mut command = Command::new("e2fsck");
            command.arg("-fn");
            command
        }
        _ => {
            let mut command = Command::new("xfs_repair");
            command.arg("-n");
            command
        }
    };
    let outcome = outcome_of(command.arg(device));
    assert_eq!(outcome.code, 0, "{command:?}: {outcome:?}");
}

//! `/dev/loopN` over a file, with direct I/O or not at all.
//!
//! Invariants:
//! * the backing file is opened on a thread that serves nothing, so that a daemon can attach
//!   its own files;
//! * a [`LoopDevice`] does direct I/O and has the wanted logical block: the kernel drops both in
//!   silence, so that both are read back;
//! * what this process attached is detached when the [`LoopDevice`] goes.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use crate::error::ExportError;
use crate::fuse::LOOK_AGAIN;
use crate::{ioctl, mount_table, partition, sys};

const LOOP_CONTROL: &str = "/dev/loop-control";
/// Free devices that others snatched away before one is ours, at most.
const ATTEMPTS_MAX: u32 = 64;
/// The unit of sizes below `/sys`, whatever the logical block.
const SECTOR_BYTES: u64 = 512;
/// The backing file's server has this long to open it.
const ATTACH_WAIT: Duration = Duration::from_secs(30);

/// How a device is attached.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LoopOptions {
    /// Refuses writes.
    pub is_read_only: bool,
    /// The logical block in bytes: 512 or 4096.
    pub logical_block_bytes: u32,
    /// Refuses to attach when the kernel drops direct I/O. Only for a file that no process of
    /// this product serves may it be false.
    pub must_direct_io: bool,
    /// Requests that the kernel queues; its own default when none.
    pub queue_requests: Option<u32>,
    /// What the kernel reads ahead of a sequential reader, in bytes; its own default when none.
    pub read_ahead_bytes: Option<u32>,
}

impl Default for LoopOptions {
    fn default() -> Self {
        Self {
            is_read_only: false,
            logical_block_bytes: 512,
            must_direct_io: true,
            queue_requests: None,
            read_ahead_bytes: None,
        }
    }
}

/// A loop device of somebody's, as the kernel lists it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LoopEntry {
    /// The N of `/dev/loopN`.
    pub number: u32,
    /// The file behind it, as the kernel names it.
    pub backing: PathBuf,
    pub(crate) binding: Binding,
}

/// One binding of a loop device to a file; the number alone may name another one later.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Binding {
    number: u32,
    /// The kernel's count of media in the device; none before Linux 5.15.
    sequence: Option<u64>,
}

impl Binding {
    fn of(number: u32) -> Self {
        Self {
            number,
            sequence: read_number(&sys_path(number, "diskseq")).ok(),
        }
    }

    fn holds(self) -> bool {
        backing_file(self.number).is_some() && Self::of(self.number) == self
    }
}

/// An attached device. Dropping it detaches it: at once when it is free, otherwise with its last
/// user.
#[derive(Debug)]
pub struct LoopDevice {
    number: u32,
    backing: PathBuf,
    binding: Binding,
    is_attached: bool,
}

impl LoopDevice {
    /// Attaches a file. The work is done on a thread of its own; when the file's server does not
    /// answer within 30 s this gives up, and whatever comes of it later is undone.
    ///
    /// # Errors
    /// `NotRoot`, `NoLoop`, `NoFreeLoop`; `DirectIoRefused` or `BlockSizeRefused` when the kernel
    /// would do less than asked; `TimedOut`.
    pub fn attach(backing: &Path, options: LoopOptions) -> Result<Self, ExportError> {
        if !sys::is_root() {
            return Err(ExportError::NotRoot {
                operation: "attaching a loop device",
            });
        }
        let path = backing.to_owned();
        let (sender, receiver) = sync_channel(1);
        // A device that comes too late is dropped by the failed send, and so detached.
        std::thread::Builder::new()
            .name("loop-attach".to_owned())
            .spawn(move || sender.send(attach_here(&path, options)).is_ok())
            .map_err(|source| ExportError::system("attach", backing, source))?;
        match receiver.recv_timeout(ATTACH_WAIT) {
            Ok(result) => result,
            Err(RecvTimeoutError::Timeout) => Err(ExportError::TimedOut {
                operation: "attach",
                path: backing.to_owned(),
                waited: ATTACH_WAIT,
            }),
            Err(RecvTimeoutError::Disconnected) => Err(ExportError::system(
                "attach",
                backing,
                io::Error::other("the attaching thread panicked"),
            )),
        }
    }

    /// The device node.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        node_path(self.number)
    }

    /// The N of `/dev/loopN`.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.number
    }

    /// The file behind it.
    #[must_use]
    pub fn backing(&self) -> &Path {
        &self.backing
    }

    /// Takes over the backing file's present size. For a file of a FUSE tree call
    /// [`FuseMount::invalidate_node`](crate::FuseMount::invalidate_node) before.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn resize(&self) -> Result<(), ExportError> {
        let path = self.path();
        let system = |source| ExportError::system("resize", &path, source);
        let device = open_device(&path, false).map_err(system)?;
        ioctl::update_loop_capacity(&device).map_err(system)
    }

    /// The present size in bytes.
    ///
    /// # Errors
    /// When `/sys` cannot be read.
    pub fn size_bytes(&self) -> Result<u64, ExportError> {
        let path = sys_path(self.number, "size");
        let sectors = read_number(&path);
        let sectors = sectors.map_err(|source| ExportError::system("read", &path, source))?;
        Ok(sectors.saturating_mul(SECTOR_BYTES))
    }

    /// Detaches, and returns when the backing file is closed.
    ///
    /// # Errors
    /// `Busy` when it, or a partition of it, is mounted or held (nothing has changed then), or
    /// when somebody still has it open after `busy_wait` (it then goes with its last user).
    pub fn detach(&mut self, busy_wait: Duration) -> Result<(), ExportError> {
        let result = detach_binding(self.binding, busy_wait);
        self.is_attached = result.is_err();
        result
    }

    /// All loop devices of the machine that have a backing file.
    ///
    /// # Errors
    /// When `/sys` cannot be read.
    pub fn list() -> Result<Vec<LoopEntry>, ExportError> {
        let directory = Path::new("/sys/block");
        let system = |source| ExportError::system("list", directory, source);
        let mut entries = Vec::new();
        for entry in fs::read_dir(directory).map_err(system)? {
            let name = entry.map_err(system)?.file_name();
            let number = name
                .to_str()
                .and_then(|name| name.strip_prefix("loop")?.parse().ok());
            let Some(number) = number else { continue };
            if let Some(backing) = backing_file(number) {
                entries.push(LoopEntry {
                    number,
                    backing,
                    binding: Binding::of(number),
                });
            }
        }
        entries.sort_by_key(|entry| entry.number);
        Ok(entries)
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        if !self.is_attached || !self.binding.holds() {
            return;
        }
        let path = self.path();
        if let Err(error) = partition::remove_all(&path) {
            tracing::warn!(%error, device = %path.display(), "partitions are in use");
        }
        let cleared = open_device(&path, true).and_then(|device| ioctl::clear_loop(&device));
        if let Err(error) = cleared {
            tracing::warn!(%error, device = %path.display(), "a loop device stays");
        }
    }
}

/// The device node of a number.
pub(crate) fn node_path(number: u32) -> PathBuf {
    PathBuf::from(format!("/dev/loop{number}"))
}

fn sys_path(number: u32, attribute: &str) -> PathBuf {
    PathBuf::from(format!("/sys/block/loop{number}/{attribute}"))
}

fn read_number(path: &Path) -> io::Result<u64> {
    fs::read_to_string(path)?
        .trim()
        .parse()
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "not a number"))
}

/// The backing file that the kernel names; none when the device is free.
fn backing_file(number: u32) -> Option<PathBuf> {
    let text = fs::read(sys_path(number, "loop/backing_file")).ok()?;
    let text = text.strip_suffix(b"\n").unwrap_or(&text);
    Some(PathBuf::from(std::ffi::OsStr::from_bytes(text)))
}

fn open_device(path: &Path, is_read_only: bool) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(!is_read_only)
        .custom_flags(libc::O_CLOEXEC)
        .open(path)
}

fn attach_here(backing: &Path, options: LoopOptions) -> Result<LoopDevice, ExportError> {
    let system = |source| ExportError::system("attach", backing, source);
    let no_loop = |source| ExportError::NoLoop { source };
    let path = backing.canonicalize().map_err(system)?;
    let file = OpenOptions::new()
        .read(true)
        .write(!options.is_read_only)
        .open(&path)
        .map_err(system)?;
    let control = OpenOptions::new()
        .read(true)
        .write(true)
        .open(LOOP_CONTROL)
        .map_err(no_loop)?;
    let read_only = if options.is_read_only {
        ioctl::LOOP_READ_ONLY
    } else {
        0
    };
    let flags = ioctl::LOOP_DIRECT_IO | read_only;
    for _ in 0..ATTEMPTS_MAX {
        let number = ioctl::free_loop(&control).map_err(no_loop)?;
        ensure_node(number).map_err(no_loop)?;
        let device = open_device(&node_path(number), options.is_read_only).map_err(no_loop)?;
        let name = path.as_os_str().as_bytes();
        match ioctl::configure_loop(&device, &file, options.logical_block_bytes, flags, name) {
            Ok(()) => {
                let binding = Binding::of(number);
                let device = LoopDevice {
                    number,
                    backing: path,
                    binding,
                    is_attached: true,
                };
                check_manners(&device, options)?;
                tune(&device, options);
                return Ok(device);
            }
            // Somebody else took it between the two calls.
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
            Err(error) => return Err(system(error)),
        }
    }
    Err(ExportError::NoFreeLoop {
        attempts: ATTEMPTS_MAX,
    })
}

/// Makes the device node where the kernel does not, in a container for instance.
fn ensure_node(number: u32) -> io::Result<()> {
    let path = node_path(number);
    if fs::metadata(&path).is_ok_and(|metadata| metadata.file_type().is_block_device()) {
        return Ok(());
    }
    let (major, minor) = device_number(&sys_path(number, "dev"))?;
    sys::make_block_node(&path, major, minor)
}

/// Reads `major:minor` of a device below `/sys`.
pub(crate) fn device_number(path: &Path) -> io::Result<(u32, u32)> {
    mount_table::parse_device(&fs::read(path)?)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "not a device number"))
}

/// Reads back what the kernel may have dropped. On an error the device is dropped, and detached.
fn check_manners(device: &LoopDevice, options: LoopOptions) -> Result<(), ExportError> {
    let read = |attribute| {
        let path = sys_path(device.number, attribute);
        read_number(&path).map_err(|source| ExportError::system("read", &path, source))
    };
    if options.must_direct_io && read("loop/dio")? != 1 {
        let (device, backing) = (device.path(), device.backing.clone());
        return Err(ExportError::DirectIoRefused { device, backing });
    }
    let got = read("queue/logical_block_size")?;
    if got != u64::from(options.logical_block_bytes) {
        let (device, wanted) = (device.path(), options.logical_block_bytes);
        return Err(ExportError::BlockSizeRefused {
            device,
            wanted,
            got,
        });
    }
    Ok(())
}

/// Sets what makes the device faster; it works without.
fn tune(device: &LoopDevice, options: LoopOptions) {
    let mut settings = vec![("queue/scheduler", "none".to_owned())];
    settings.extend(
        options
            .queue_requests
            .map(|n| ("queue/nr_requests", n.to_string())),
    );
    settings.extend(
        options
            .read_ahead_bytes
            .map(|bytes| ("queue/read_ahead_kb", (bytes / 1024).to_string())),
    );
    for (attribute, value) in settings {
        if let Err(error) = fs::write(sys_path(device.number, attribute), value) {
            tracing::debug!(%error, attribute, device = %device.path().display(), "not tuned");
        }
    }
}

/// Detaches a device from its file, whoever attached it.
pub(crate) fn detach_binding(binding: Binding, busy_wait: Duration) -> Result<(), ExportError> {
    let number = binding.number;
    let path = node_path(number);
    let system = |source| ExportError::system("detach", &path, source);
    let until = Instant::now() + busy_wait;
    if !binding.holds() {
        return Ok(());
    }
    if let Some(user) = user_of(number)? {
        return Err(ExportError::Busy { path, user });
    }
    partition::remove_all(&path).map_err(|source| partition::explain("detach", &path, source))?;
    let device = open_device(&path, true).map_err(system)?;
    match ioctl::clear_loop(&device) {
        Ok(()) => {}
        // Free already.
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => return Ok(()),
        Err(error) => return Err(system(error)),
    }
    // The kernel unbinds when the last descriptor is closed, ours included.
    drop(device);
    while binding.holds() {
        if Instant::now() >= until {
            let user = "a process has it open; it will go with that process".to_owned();
            return Err(ExportError::Busy { path, user });
        }
        std::thread::sleep(LOOK_AGAIN);
    }
    Ok(())
}

/// The numbers of a device and its partitions.
pub(crate) fn device_numbers(number: u32) -> Vec<(u32, u32)> {
    let mut numbers: Vec<_> = device_number(&sys_path(number, "dev"))
        .into_iter()
        .collect();
    for (_, directory) in partition::list(&node_path(number)) {
        numbers.extend(device_number(&directory.join("dev")));
    }
    numbers
}

/// Who makes it impossible to detach: a mount, or a device made of it.
fn user_of(number: u32) -> Result<Option<String>, ExportError> {
    let numbers = device_numbers(number);
    let mounts = mount_table::read()?;
    if let Some(entry) = mounts.iter().find(|entry| numbers.contains(&entry.device)) {
        return Ok(Some(format!(
            "it is mounted at {}",
            entry.directory.display()
        )));
    }
    let holder = fs::read_dir(sys_path(number, "holders"))
        .ok()
        .and_then(|mut holders| holders.next())
        .and_then(Result::ok);
    Ok(holder.map(|holder| format!("{} is made of it", holder.file_name().display())))
}

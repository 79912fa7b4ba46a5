//! The connection with the kernel: mounting it, and agreeing on what both sides can do.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use fuser::{Config, Filesystem, InitFlags, KernelConfig, Notifier, Request, Session, SessionACL};
use parking_lot::Mutex;

use super::server::REQUEST_BYTES_MAX;
use crate::error::ExportError;
use crate::sys;

/// The kind that mount tables show, behind `fuse.`.
const SUBTYPE: &str = "afterimage";
/// `FUSE_DEV_IOC_CLONE`.
const CLONE: u64 = 0x8004_E500;
/// File systems above each other, at most, for the kernel to use a backing file itself.
const STACK_DEPTH_MAX: u32 = 1;

/// What the kernel agreed to.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct Agreed {
    /// It sends requests over rings, and waits for them.
    pub(super) has_ring: bool,
    /// It can use a plain file itself.
    pub(super) has_passthrough: bool,
}

/// An open connection.
pub(super) struct Connection {
    pub(super) fuse: File,
    pub(super) notifier: Notifier,
    pub(super) agreed: Agreed,
}

/// Opens `/dev/fuse`.
pub(super) fn open() -> Result<File, ExportError> {
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).open("/dev/fuse");
    file.map_err(|source| ExportError::NoFuse { source })
}

/// Connects `/dev/fuse` to the directory. The kernel checks permissions; all users may pass it,
/// so that a loop device works whoever reads it.
pub(super) fn mount(kernel: &File, directory: &Path, source: &str) -> io::Result<()> {
    let options = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions",
        sys::descriptor(kernel)
    );
    let source = CString::new(source)?;
    let kind = CString::new(format!("fuse.{SUBTYPE}"))?;
    let flags = libc::MS_NODEV | libc::MS_NOSUID | libc::MS_NOEXEC;
    sys::mount(
        &source,
        &sys::c_path(directory)?,
        &kind,
        flags,
        &CString::new(options)?,
    )
}

impl Connection {
    /// Answers the kernel's first request.
    pub(super) fn agree(kernel: File, max_background: u16, wants_ring: bool) -> io::Result<Self> {
        let agreed = Arc::new(Mutex::new(Agreed::default()));
        let handshake = Handshake {
            max_background,
            wants_ring,
            agreed: Arc::clone(&agreed),
        };
        let (kernel, acl) = (OwnedFd::from(kernel), SessionACL::All);
        let session = Session::from_fd(handshake, kernel, acl, Config::default())?;
        let agreed = *agreed.lock();
        Ok(Self {
            fuse: File::from(session.as_fd().try_clone_to_owned()?),
            notifier: session.notifier(),
            agreed,
        })
    }
}

/// Makes another descriptor of a connection, from which requests can be read independently.
pub(super) fn clone(fuse: &File) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/fuse")?;
    let source = fuse.as_raw_fd();
    // SAFETY: the argument is a descriptor's number that outlives the call.
    #[allow(unsafe_code)]
    let result = unsafe { libc::ioctl(file.as_raw_fd(), CLONE, &raw const source) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file)
}

/// Agrees with the kernel; serves nothing else.
struct Handshake {
    max_background: u16,
    wants_ring: bool,
    agreed: Arc<Mutex<Agreed>>,
}

impl Filesystem for Handshake {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Without it the kernel sends one request at a time: depth would be lost in silence.
        config
            .add_capabilities(InitFlags::FUSE_ASYNC_DIO)
            .map_err(|_| {
                io::Error::new(
                    io::ErrorKind::Unsupported,
                    "the kernel has no FUSE_ASYNC_DIO",
                )
            })?;
        let wanted = InitFlags::FUSE_PARALLEL_DIROPS
            | InitFlags::FUSE_DO_READDIRPLUS
            | InitFlags::FUSE_READDIRPLUS_AUTO
            | InitFlags::FUSE_HANDLE_KILLPRIV_V2;
        for flag in wanted.iter() {
            if config.add_capabilities(flag).is_err() {
                tracing::debug!(?flag, "the kernel lacks a FUSE capability");
            }
        }
        let nearest = |value: u32| io::Error::other(format!("the kernel wants {value}"));
        config.set_max_write(REQUEST_BYTES_MAX).map_err(nearest)?;
        if let Err(largest) = config.set_max_readahead(REQUEST_BYTES_MAX) {
            config.set_max_readahead(largest).map_err(nearest)?;
        }
        let has_passthrough = config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).is_ok();
        if has_passthrough {
            config
                .set_max_stack_depth(STACK_DEPTH_MAX)
                .map_err(nearest)?;
        }
        let ring = InitFlags::FUSE_OVER_IO_URING;
        let has_ring = self.wants_ring && config.add_capabilities(ring).is_ok();
        *self.agreed.lock() = Agreed {
            has_ring,
            has_passthrough,
        };
        let nearest = |value: u16| io::Error::other(format!("the kernel wants {value}"));
        config
            .set_max_background(self.max_background)
            .map_err(nearest)?;
        let threshold = (self.max_background - self.max_background / 4).max(1);
        config
            .set_congestion_threshold(threshold)
            .map_err(nearest)?;
        Ok(())
    }
}

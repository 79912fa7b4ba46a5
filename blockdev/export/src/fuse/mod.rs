//! A tree of files, each of them a device, over `/dev/fuse`.
//!
//! Invariants:
//! * the threads that read `/dev/fuse` carry data: names are resolved elsewhere, and answers go
//!   out from whichever thread completes a request;
//! * they wait for nothing, but that one of several may wait for a short read when no other read
//!   or write is under way in the mount;
//! * no byte of a file is ever in the page cache;
//! * `fsync` answers what the device's flush says, each time.

mod chain;
mod file;
mod gate;
mod known;
mod names;
mod patch;
mod request;
mod seek;
mod server;
mod tree;
mod workers;

use std::ffi::{CString, OsStr};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use fuser::{Config, INodeNo, Notifier, Session, SessionACL};

use self::file::OpenFiles;
use self::known::KnownNodes;
use self::names::Names;
use self::request::UnderWay;
use self::server::Server;
use self::workers::Workers;
use crate::error::ExportError;
use crate::{mount, mount_table, sys};

pub use self::tree::{ListedNode, Node, NodeId, NodeKind, Tree, TreeError};

/// The kind that mount tables show, behind `fuse.`.
const SUBTYPE: &str = "afterimage";
/// How long an unmount waits for files that are just being closed.
const BUSY_WAIT: Duration = Duration::from_secs(5);
/// Pause between two looks at something that ends by itself.
pub(crate) const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// How a tree is served.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FuseOptions {
    /// What mount tables show as the source.
    pub source: String,
    /// Threads that read requests; at least 1. Each holds a buffer of 16 MiB of address space.
    pub event_threads: usize,
    /// Threads that resolve names and open devices; at least 1.
    pub tree_threads: usize,
    /// Requests to the tree that wait, at most; further ones run on an event thread.
    pub tree_queue_max: usize,
    /// Asynchronous requests that the kernel keeps in flight: the queue depth of all loop
    /// devices over this mount together; at least 1.
    pub max_background: u16,
    /// How long the kernel may use a name or attribute without asking again.
    pub name_lifetime: Duration,
}

impl Default for FuseOptions {
    fn default() -> Self {
        Self {
            source: "afterimage".to_owned(),
            event_threads: 2,
            tree_threads: 4,
            tree_queue_max: 1024,
            max_background: 512,
            name_lifetime: Duration::from_secs(1),
        }
    }
}

/// A mounted tree. Dropping it unmounts it: at once when it is free, otherwise as soon as its
/// last user is gone.
pub struct FuseMount {
    directory: PathBuf,
    notifier: Notifier,
    /// Serves until the kernel ends the connection; none after that was seen.
    serving: Option<JoinHandle<io::Result<()>>>,
}

impl FuseMount {
    /// Mounts a tree and begins to serve it.
    ///
    /// # Errors
    /// `NotRoot`, `NoFuse`; `NotADirectory`, `NotEmpty` or `AlreadyMounted` for the directory.
    pub fn mount(
        tree: Arc<dyn Tree>,
        mountpoint: &Path,
        options: FuseOptions,
    ) -> Result<Self, ExportError> {
        if !sys::is_root() {
            return Err(ExportError::NotRoot {
                operation: "mounting a FUSE tree",
            });
        }
        mount::check_directory(mountpoint)?;
        let system = |source| ExportError::system("mount", mountpoint, source);
        let directory = mount_table::absolute(mountpoint)?;
        let names = Arc::new(Names {
            tree,
            files: OpenFiles::default(),
            known: KnownNodes::default(),
            lifetime: options.name_lifetime,
        });
        let workers = Workers::start(options.tree_threads.max(1), options.tree_queue_max.max(1))
            .map_err(system)?;
        let server = Server {
            names,
            workers,
            max_background: options.max_background.max(1),
            under_way: UnderWay::default(),
            may_wait: options.event_threads > 1,
        };
        let kernel = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/fuse")
            .map_err(|source| ExportError::NoFuse { source })?;
        warn_of_timeouts();
        mount_connection(&kernel, &directory, &options.source).map_err(system)?;
        Self::serve(server, kernel, directory.clone(), &options).inspect_err(|_| {
            if let Err(error) = detach(&directory) {
                tracing::warn!(%error, "a failed mount stays");
            }
        })
    }

    fn serve(
        server: Server,
        kernel: File,
        directory: PathBuf,
        options: &FuseOptions,
    ) -> Result<Self, ExportError> {
        let system = |source| ExportError::system("serve", &directory, source);
        let mut config = Config::default();
        config.acl = SessionACL::All;
        config.n_threads = Some(options.event_threads.max(1));
        config.clone_fd = true;
        let session = Session::from_fd(server, OwnedFd::from(kernel), SessionACL::All, config)
            .map_err(system)?;
        let notifier = session.notifier();
        let serving = std::thread::Builder::new()
            .name("fuse".to_owned())
            .spawn(move || session.run())
            .map_err(system)?;
        Ok(Self {
            directory,
            notifier,
            serving: Some(serving),
        })
    }

    /// The mount directory, absolute.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Says whether the tree is still served; false after somebody else unmounted it.
    #[must_use]
    pub fn is_served(&self) -> bool {
        self.serving
            .as_ref()
            .is_some_and(|serving| !serving.is_finished())
    }

    /// Makes the kernel ask again for a node's attributes, after a device has grown for
    /// instance. Not to be called from within a [`Tree`] call.
    ///
    /// # Errors
    /// When the mount has gone.
    pub fn invalidate_node(&self, id: NodeId) -> Result<(), ExportError> {
        self.notifier
            .inval_inode(INodeNo(id.0), -1, 0)
            .map_err(|source| ExportError::system("invalidate", &self.directory, source))
    }

    /// Makes the kernel look a name up again, after it has changed its meaning. Not to be called
    /// from within a [`Tree`] call.
    ///
    /// # Errors
    /// When the mount has gone.
    pub fn invalidate_name(&self, parent: NodeId, name: &OsStr) -> Result<(), ExportError> {
        self.notifier
            .inval_entry(INodeNo(parent.0), name)
            .map_err(|source| ExportError::system("invalidate", &self.directory, source))
    }

    /// Unmounts, and returns when every device has been closed. Waits up to 5 s for files that
    /// are just being closed.
    ///
    /// # Errors
    /// `Busy` while files are open; the mount then stays and is served.
    pub fn unmount(&mut self) -> Result<(), ExportError> {
        let system = |source| ExportError::system("unmount", &self.directory, source);
        let path = sys::c_path(&self.directory).map_err(system)?;
        let until = Instant::now() + BUSY_WAIT;
        while self.is_served() {
            match sys::umount(&path, libc::UMOUNT_NOFOLLOW) {
                Ok(()) => break,
                // Busy, or out of sight already and in use still.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EBUSY | libc::EINVAL)) => {
                    if Instant::now() >= until {
                        let user = "files of the tree are open".to_owned();
                        return Err(ExportError::Busy {
                            path: self.directory.clone(),
                            user,
                        });
                    }
                    std::thread::sleep(LOOK_AGAIN);
                }
                Err(error) => return Err(system(error)),
            }
        }
        self.join()
    }

    fn join(&mut self) -> Result<(), ExportError> {
        let Some(serving) = self.serving.take() else {
            return Ok(());
        };
        let result = serving
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("a thread panicked")));
        result.map_err(|source| ExportError::system("serve", &self.directory, source))
    }
}

impl Drop for FuseMount {
    fn drop(&mut self) {
        if !self.is_served() {
            return;
        }
        if let Err(error) = detach(&self.directory) {
            tracing::warn!(%error, directory = %self.directory.display(), "a tree stays mounted");
        }
    }
}

/// Connects `/dev/fuse` to the directory. The kernel checks permissions; all users may pass it,
/// so that a loop device works whoever reads it.
fn mount_connection(kernel: &File, directory: &Path, source: &str) -> io::Result<()> {
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

/// Says so when the kernel would end the whole connection after one slow request.
fn warn_of_timeouts() {
    for name in ["default_request_timeout", "max_request_timeout"] {
        let path = format!("/proc/sys/fs/fuse/{name}");
        // Kernels before 6.15 know no such limit.
        let seconds = std::fs::read_to_string(&path).unwrap_or_default();
        if !matches!(seconds.trim(), "" | "0") {
            tracing::warn!(
                path,
                seconds = seconds.trim(),
                "slow requests will abort the mount"
            );
        }
    }
}

/// Takes a mount out of sight; it ends with its last user.
fn detach(directory: &Path) -> io::Result<()> {
    sys::umount(
        &sys::c_path(directory)?,
        libc::MNT_DETACH | libc::UMOUNT_NOFOLLOW,
    )
}

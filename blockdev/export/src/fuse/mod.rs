//! A tree of files, each of them a device, over `/dev/fuse` or `io_uring`.
//!
//! Both transports end in the same [`Server`]: they differ in where a request's bytes come from
//! and where its answer goes, and in nothing else.
//!
//! Invariants:
//! * the threads that take requests carry data: names are resolved elsewhere, and answers are
//!   given from whichever thread completes a request;
//! * they wait for nothing, but that one of several may wait for a short read when no other read
//!   or write is under way in the mount;
//! * no byte of a file is ever in the page cache;
//! * `fsync` answers what the device's flush says, each time.

mod backing;
mod chain;
mod classic;
mod connection;
mod file;
mod gate;
mod known;
mod names;
mod parse;
mod patch;
mod reply;
mod request;
mod ring;
mod seek;
mod server;
mod transport;
mod tree;
mod trial;
mod wire;
mod workers;

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use fuser::{INodeNo, Notifier};

use self::backing::Backings;
use self::classic::Channel;
use self::connection::Connection;
use self::file::OpenFiles;
use self::known::KnownNodes;
use self::names::Names;
use self::request::UnderWay;
use self::ring::{Prepared, Rings};
use self::server::Server;
use self::workers::Workers;
use crate::error::ExportError;
use crate::{mount, mount_table, sys};

pub use self::transport::{IoUring, Transport};
pub use self::tree::{ListedNode, Node, NodeId, NodeKind, Tree, TreeError};

/// How long an unmount waits for files that are just being closed.
const BUSY_WAIT: Duration = Duration::from_secs(5);
/// Pause between two looks at something that ends by itself.
pub(crate) const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// How a tree is served.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FuseOptions {
    /// What mount tables show as the source.
    pub source: String,
    /// Threads that read requests from `/dev/fuse`; at least 1.
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
    /// Whether requests may go over `io_uring`.
    pub io_uring: IoUring,
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
            io_uring: IoUring::Auto,
        }
    }
}

/// A mounted tree. Dropping it unmounts it: at once when it is free, otherwise as soon as its
/// last user is gone.
pub struct FuseMount {
    directory: PathBuf,
    notifier: Notifier,
    transport: Transport,
    has_passthrough: bool,
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
        let directory = mount_table::absolute(mountpoint)?;
        warn_of_timeouts();
        let wants_ring = options.io_uring.is_wanted()
            && trial::verdict(&directory)
                .map_err(|reason| transport::fall_back(&reason))
                .is_ok();
        Self::mount_as(tree, directory, &options, wants_ring)
    }

    fn mount_as(
        tree: Arc<dyn Tree>,
        directory: PathBuf,
        options: &FuseOptions,
        wants_ring: bool,
    ) -> Result<Self, ExportError> {
        let system = |source| ExportError::system("mount", &directory, source);
        let names = Arc::new(Names {
            tree,
            files: OpenFiles::default(),
            known: KnownNodes::default(),
            backings: Backings::default(),
            lifetime: options.name_lifetime,
        });
        let workers = Workers::start(options.tree_threads.max(1), options.tree_queue_max.max(1))
            .map_err(system)?;
        let server = Arc::new(Server {
            names,
            workers,
            under_way: UnderWay::default(),
        });
        let kernel = connection::open()?;
        let prepared = wants_ring.then(|| Prepared::new(&server)).transpose();
        let prepared = prepared.unwrap_or_else(|error| {
            transport::fall_back(&error.to_string());
            None
        });
        connection::mount(&kernel, &directory, &options.source).map_err(system)?;
        Self::serve(server, kernel, directory.clone(), options, prepared).inspect_err(|_| {
            if let Err(error) = detach(&directory) {
                tracing::warn!(%error, "a failed mount stays");
            }
        })
    }

    fn serve(
        server: Arc<Server>,
        kernel: File,
        directory: PathBuf,
        options: &FuseOptions,
        prepared: Option<Prepared>,
    ) -> Result<Self, ExportError> {
        let system = |source| ExportError::system("serve", &directory, source);
        let background = options.max_background.max(1);
        let Connection {
            fuse,
            notifier,
            agreed,
        } = Connection::agree(kernel, background, prepared.is_some()).map_err(system)?;
        if agreed.has_passthrough {
            let fuse = fuse.try_clone().map_err(system)?;
            server.names.backings.allow(fuse);
        }
        let (rings, transport) = start_rings(prepared, agreed.has_ring, &fuse);
        let mut channels = Vec::new();
        for _ in 1..options.event_threads {
            channels.push(Channel::new(connection::clone(&fuse).map_err(system)?));
        }
        channels.push(Channel::new(fuse));
        let serving = std::thread::Builder::new()
            .name("fuse".to_owned())
            .spawn(move || serve_until_end(server, channels, rings))
            .map_err(system)?;
        Ok(Self {
            directory,
            notifier,
            transport,
            has_passthrough: agreed.has_passthrough,
            serving: Some(serving),
        })
    }

    /// How requests come.
    #[must_use]
    pub fn transport(&self) -> Transport {
        self.transport
    }

    /// Says whether the kernel can read and write plain files itself, see [`Tree::plain_file`].
    #[must_use]
    pub fn has_passthrough(&self) -> bool {
        self.has_passthrough
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
        if sys::is_dead_mount(&self.directory) {
            // Somebody ended the connection, and left the mount.
            detach(&self.directory).map_err(system)?;
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

/// Starts the rings that the kernel agreed to.
fn start_rings(
    prepared: Option<Prepared>,
    has_ring: bool,
    fuse: &File,
) -> (Option<Rings>, Transport) {
    let Some(prepared) = prepared else {
        return (None, Transport::Classic);
    };
    if !has_ring {
        prepared.end();
        transport::fall_back("the kernel does not offer it");
        return (None, Transport::Classic);
    }
    match prepared.start(fuse) {
        (rings, Ok(())) => (Some(rings), Transport::IoUring),
        (rings, Err(error)) => {
            transport::fall_back(&format!("the kernel refused a ring: {error}"));
            (Some(rings), Transport::Classic)
        }
    }
}

/// Serves a connection until the kernel ends it.
fn serve_until_end(
    server: Arc<Server>,
    channels: Vec<Arc<Channel>>,
    rings: Option<Rings>,
) -> io::Result<()> {
    let may_wait = channels.len() > 1;
    let mut result = Ok(());
    let mut threads = Vec::with_capacity(channels.len());
    for (index, channel) in channels.into_iter().enumerate() {
        let server = Arc::clone(&server);
        let thread = std::thread::Builder::new()
            .name(format!("fuse-{index}"))
            .spawn(move || channel.serve(&server, may_wait));
        match thread {
            Ok(thread) => threads.push(thread),
            Err(error) => result = Err(error),
        }
    }
    for thread in threads {
        let panicked = |_| Err(io::Error::other("a thread panicked"));
        result = result.and(thread.join().unwrap_or_else(panicked));
    }
    if let Some(rings) = rings {
        result = result.and(rings.join());
    }
    match Arc::into_inner(server) {
        Some(server) => server.end(),
        None => tracing::error!("a thread of a connection is still there"),
    }
    result
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

//! Makes, lists and ends mounts. All of it waits: call it from threads that may.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use afterimage_blockdev::{Backend, BlockDevice, Clock, ErrorClass, HistoryId, Lsn, Monotonic};
use afterimage_export::{FuseMount, FuseOptions, detach_stale, detach_stale_under};
use afterimage_protocol::rest::ApiError;
use afterimage_protocol::rest::server::{CreateMount, Mount};
use parking_lot::Mutex;

use super::branches::{BranchUse, Branches, named};
use super::build::{Exported, unmount_directory};
use super::directory::{MountDirectory, export_error};
use super::overlay;
use super::promotion::Promotions;
use super::tree::DiskTree;
use crate::appliance::api_error;
use crate::catalogue::Catalogue;
use crate::config;
use crate::engine::{Command, EngineHandle, ViewRequest};

/// Where mounts and what belongs to them are.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MountPlaces {
    /// Directory of the FUSE tree and of mounts whose place nobody chose.
    pub root: PathBuf,
    /// Directory of private copies.
    pub overlays: PathBuf,
}

impl MountPlaces {
    fn fuse(&self) -> PathBuf {
        self.root.join("fuse")
    }
}

struct Active {
    shown: Mount,
    exported: Exported,
    directory: Option<MountDirectory>,
}

enum Entry {
    /// Being made or ended.
    Busy,
    Active(Box<Active>),
}

#[derive(Default)]
struct Table {
    last_id: u64,
    entries: BTreeMap<u64, Entry>,
    is_closed: bool,
}

/// The mounts of this daemon.
pub struct Mounts {
    pub(super) engine: EngineHandle,
    clock: Arc<dyn Clock>,
    places: MountPlaces,
    config: config::Mounts,
    backend: Backend,
    tree: Arc<DiskTree>,
    fuse: Mutex<Option<FuseMount>>,
    table: Mutex<Table>,
    pub(super) branches: Arc<Branches>,
    pub(super) promotions: Promotions,
}

/// A device to be shown.
struct Source {
    device: Arc<dyn BlockDevice>,
    history: HistoryId,
    lsn: Lsn,
    resolved_to_batch_begin: bool,
    branch: Option<(String, BranchUse)>,
}

impl Mounts {
    /// Cleans up what a dead daemon left, and mounts the tree.
    ///
    /// # Errors
    /// What keeps the tree from being mounted.
    pub fn start(
        engine: EngineHandle,
        catalogue: Catalogue,
        clock: Arc<dyn Clock>,
        places: MountPlaces,
        config: config::Mounts,
        backend: Backend,
    ) -> Result<Self, ApiError> {
        clean(&places)?;
        let branches = Branches::load(engine.clone(), catalogue, Arc::clone(&clock))?;
        let promotions = Promotions::new(engine.clone(), Arc::clone(&branches));
        let tree = Arc::new(DiskTree::new(
            engine.clone(),
            Arc::clone(&clock),
            Arc::clone(&branches),
        ));
        let options = FuseOptions {
            event_threads: config.event_threads,
            io_uring: config.io_uring,
            max_background: config.max_background,
            ..FuseOptions::default()
        };
        let served: Arc<DiskTree> = Arc::clone(&tree);
        let fuse = FuseMount::mount(served, &places.fuse(), options)
            .map_err(|error| export_error(&error))?;
        Ok(Self {
            engine,
            clock,
            places,
            config,
            backend,
            tree,
            fuse: Mutex::new(Some(fuse)),
            table: Mutex::default(),
            branches,
            promotions,
        })
    }

    /// Makes a mount.
    ///
    /// # Errors
    /// What is wrong with the reference or the directory, what is on the disk that cannot be
    /// mounted, or what the kernel refuses. Nothing is left behind then.
    pub fn create(&self, request: &CreateMount) -> Result<Mount, ApiError> {
        let begun = self.clock.monotonic();
        if request.device_only && request.directory.is_some() {
            return Err(api_error(
                ErrorClass::Refused,
                "a directory and --device exclude each other",
                "leave one of them out",
            ));
        }
        let id = self.reserve()?;
        let made = self.make(id, request, begun);
        let mut table = self.table.lock();
        match made {
            Ok(active) => {
                let shown = active.shown.clone();
                table.entries.insert(id, Entry::Active(Box::new(active)));
                Ok(shown)
            }
            Err(error) => {
                table.entries.remove(&id);
                Err(error)
            }
        }
    }

    fn reserve(&self) -> Result<u64, ApiError> {
        let mut table = self.table.lock();
        if table.is_closed {
            return Err(api_error(
                ErrorClass::Retry,
                "the appliance is going down",
                "",
            ));
        }
        if table.entries.len() >= self.config.mounts_max {
            return Err(api_error(
                ErrorClass::Refused,
                format!("there are {} mounts already", table.entries.len()),
                "end one with `aft umount`, or raise mounts.mounts_max",
            ));
        }
        table.last_id += 1;
        let id = table.last_id;
        table.entries.insert(id, Entry::Busy);
        Ok(id)
    }

    fn make(&self, id: u64, request: &CreateMount, begun: Monotonic) -> Result<Active, ApiError> {
        let directory = match (&request.directory, request.device_only) {
            (_, true) => None,
            (Some(path), false) => Some(MountDirectory::take(Path::new(path))?),
            (None, false) => Some(MountDirectory::take(
                &self.places.root.join(id.to_string()),
            )?),
        };
        let source = self.open(id, request)?;
        let fuse_root = self.places.fuse();
        let tree = Arc::clone(&self.tree);
        let (branch_name, using) = source.branch.unzip();
        let is_branch = branch_name.is_some();
        let mut exported = Exported::attach(id, tree, source.device, using, &fuse_root)?;
        let device_ms = self.ms_since(begun);
        let (filesystem, mut notes) = match &directory {
            Some(directory) => {
                let mounted = exported.mount(directory.path(), &request.options)?;
                (Some(mounted.kind.to_string()), mounted.notes)
            }
            None => (None, exported.show_partitions(request.options.partition)?),
        };
        if request.device_only && !is_branch {
            notes.push(
                "the device may be written: what is written goes into a private copy and is lost \
                 with the mount"
                    .to_owned(),
            );
        }
        let shown = Mount {
            id,
            reference: request.reference.clone(),
            history: source.history,
            lsn: source.lsn,
            resolved_to_batch_begin: source.resolved_to_batch_begin,
            device: exported.node().display().to_string(),
            directory: directory
                .as_ref()
                .map(|found| found.path().display().to_string()),
            filesystem,
            notes,
            is_branch,
            branch_name,
            device_ms,
            total_ms: self.ms_since(begun),
        };
        Ok(Active {
            shown,
            exported,
            directory,
        })
    }

    fn open(&self, id: u64, request: &CreateMount) -> Result<Source, ApiError> {
        let reference = request.reference.clone();
        let wanted = ViewRequest {
            reference,
            allow_incomplete: request.allow_incomplete,
        };
        let still = match request.options.is_read_only {
            true => self.branches.still(&wanted.reference)?,
            false => None,
        };
        let wanted = match still {
            // Whoever only looks at a branch replays no journal into it.
            Some(reference) => ViewRequest {
                reference,
                ..wanted
            },
            None => match self.open_branch(wanted.clone(), request)? {
                Some(source) => return Ok(source),
                None => wanted,
            },
        };
        let view = self
            .engine
            .ask_blocking(|reply| Command::OpenView(wanted, reply))??;
        let device = overlay::private_copy(view.device, &self.places.overlays, id, self.backend)?;
        Ok(Source {
            device,
            history: view.history,
            lsn: view.lsn,
            resolved_to_batch_begin: view.resolved_to_batch_begin,
            branch: None,
        })
    }

    /// Opens the branch that is named, or forks the one that is wanted.
    fn open_branch(
        &self,
        wanted: ViewRequest,
        request: &CreateMount,
    ) -> Result<Option<Source>, ApiError> {
        let options = &request.options;
        let (row, using, resolved_to_batch_begin) = if named(&request.reference).is_some() {
            let history = self.branches.find(&request.reference)?;
            (
                self.branches.row(history)?,
                self.branches.acquire(history)?,
                false,
            )
        } else if request.is_branch {
            let name = options.branch_name.as_deref();
            self.branches.create(wanted, name, options.quota_bytes)?
        } else {
            return Ok(None);
        };
        Ok(Some(Source {
            device: using.device(),
            history: row.history,
            lsn: row.lsn,
            resolved_to_batch_begin,
            branch: Some((row.name, using)),
        }))
    }

    fn ms_since(&self, begun: Monotonic) -> u64 {
        let passed = self.clock.monotonic().since(begun);
        u64::try_from(passed.as_millis()).unwrap_or(u64::MAX)
    }

    fn busy_wait(&self) -> Duration {
        config::ms(self.config.busy_wait_ms)
    }

    /// Lists the mounts.
    #[must_use]
    pub fn list(&self) -> Vec<Mount> {
        let table = self.table.lock();
        let shown = table.entries.values().filter_map(|entry| match entry {
            Entry::Active(active) => Some(active.shown.clone()),
            Entry::Busy => None,
        });
        shown.collect()
    }

    /// Ends a mount. A branch's history stays, unless it is to be dropped too.
    ///
    /// # Errors
    /// When there is none, or somebody uses it; it is there as before then.
    pub fn remove(&self, id: u64, drop_branch: bool) -> Result<(), ApiError> {
        let active = self.begin_removal(id)?;
        if drop_branch && !active.shown.is_branch {
            self.table.lock().entries.insert(id, Entry::Active(active));
            return Err(api_error(
                ErrorClass::Refused,
                format!("mount {id} is not a branch"),
                "unmount it without --drop-branch",
            ));
        }
        let (history, is_branch) = (active.shown.history, active.shown.is_branch);
        self.take_down(id, active)?;
        if drop_branch && is_branch {
            self.drop_branch(history)?;
        }
        Ok(())
    }

    fn begin_removal(&self, id: u64) -> Result<Box<Active>, ApiError> {
        let mut table = self.table.lock();
        match table.entries.insert(id, Entry::Busy) {
            Some(Entry::Active(active)) => Ok(active),
            Some(Entry::Busy) => Err(api_error(
                ErrorClass::Retry,
                format!("mount {id} is just being made or ended"),
                "try again",
            )),
            None => {
                table.entries.remove(&id);
                Err(api_error(
                    ErrorClass::Refused,
                    format!("there is no mount {id}"),
                    "`aft mounts` lists them",
                ))
            }
        }
    }

    fn take_down(&self, id: u64, mut active: Box<Active>) -> Result<(), ApiError> {
        if let Some(directory) = &active.directory
            && let Err(error) = unmount_directory(directory, self.busy_wait())
        {
            self.table.lock().entries.insert(id, Entry::Active(active));
            return Err(error);
        }
        active.directory = None;
        active.shown.directory = None;
        if let Err(error) = active.exported.detach(self.busy_wait()) {
            self.table.lock().entries.insert(id, Entry::Active(active));
            return Err(error);
        }
        drop(active);
        self.table.lock().entries.remove(&id);
        Ok(())
    }

    /// Ends all mounts and the tree. What somebody uses is detached nevertheless.
    pub fn stop(&self) {
        self.table.lock().is_closed = true;
        self.promotions.stop_all();
        for mount in self.list() {
            if let Err(error) = self.remove(mount.id, false) {
                tracing::warn!(id = mount.id, %error, "a mount is in use; it is detached");
            }
        }
        let left = std::mem::take(&mut self.table.lock().entries);
        if !left.is_empty()
            && let Err(error) = detach_stale_under(&self.places.fuse())
        {
            tracing::warn!(%error, "something stays mounted");
        }
        drop(left);
        if let Some(mut fuse) = self.fuse.lock().take()
            && let Err(error) = fuse.unmount()
        {
            tracing::warn!(%error, "the tree is in use; it is detached");
        }
    }
}

/// Takes away what a dead daemon left: file systems, loop devices, the tree and private copies.
fn clean(places: &MountPlaces) -> Result<(), ApiError> {
    let fuse = places.fuse();
    let failed = |operation: &str, path: &Path, error: &dyn std::fmt::Display| {
        let message = format!("cannot {operation} {}: {error}", path.display());
        api_error(ErrorClass::Operator, message, "")
    };
    overlay::prepare(&places.overlays)
        .map_err(|error| failed("prepare", &places.overlays, &error))?;
    std::fs::create_dir_all(&places.root).map_err(|error| failed("make", &places.root, &error))?;
    let cleaned = detach_stale_under(&fuse).map_err(|error| export_error(&error));
    match cleaned {
        Ok(cleaned) => {
            for path in cleaned.directories.iter().chain(&cleaned.devices) {
                tracing::info!(path = %path.display(), "detached what a dead daemon left");
            }
        }
        Err(error) => tracing::warn!(%error, "what a dead daemon left is still in use"),
    }
    if detach_stale(&fuse).map_err(|error| export_error(&error))? {
        tracing::info!(path = %fuse.display(), "detached the tree of a dead daemon");
    }
    match std::fs::create_dir(&fuse) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            return Err(failed("make", &fuse, &error));
        }
        _ => {}
    }
    remove_empty(&places.root, &fuse);
    Ok(())
}

/// Removes the empty directories of mounts that are gone.
fn remove_empty(root: &Path, fuse: &Path) {
    let Ok(entries) = std::fs::read_dir(root) else {
        return;
    };
    for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or_default();
        if path != fuse && name.parse::<u64>().is_ok() {
            // Only an empty one goes, which is what is meant.
            let _in_use = std::fs::remove_dir(&path);
        }
    }
}

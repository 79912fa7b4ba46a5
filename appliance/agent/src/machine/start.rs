//! Starts the agent: takes up what an earlier run left, before anything can be written.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::Duration;

use afterimage_blockdev::{
    BlockDevice, Clock, DirectoryLock, Entropy, Epoch, Lsn, RealOptions, RealStorage, StoreId,
};
use afterimage_cache::FrameIdentity;
use afterimage_cache::log::LogOptions;
use afterimage_export::{FuseMount, FuseOptions, StaleDevice, detach_stale, release_stale_under};
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::disk::{Disk, DiskState};
use super::{Bridge, Link, Machine, source};
use crate::activity::worker::{Bell, Worker};
use crate::clock::ApplianceClock;
use crate::config::Config;
use crate::error::AgentError;
use crate::export::TapTree;
use crate::order::{Order, OrderStart, PortionOptions};
use crate::pipeline::sealer::{SealJob, level_for_cores};
use crate::pipeline::{FrameStore, Keys, LogSpool, SealPool, SpoolEvents, StoreLimits};
use crate::replicate::Outbox;
use crate::state::StateDir;
use crate::state::counters::{CounterFile, Counters};
use crate::state::disks::{SavedDisk, SavedDisks, load_keys};
use crate::state::identity::Identity;
use crate::tap::Tap;
use crate::tap::admission::Admission;

/// What starts with the machine, by its maker.
pub struct Parts {
    /// The configuration.
    pub config: Config,
    /// The state directory.
    pub state: StateDir,
    /// The machine's clocks.
    pub clock: Arc<dyn Clock>,
    /// Randomness.
    pub entropy: Arc<dyn Entropy>,
}

fn system(what: &'static str) -> impl FnOnce(std::io::Error) -> AgentError {
    AgentError::file(what, Path::new("/"))
}

impl Machine {
    /// Starts everything but the connection and the control socket.
    ///
    /// # Errors
    /// `Locked`, `NotEnrolled`, and whatever cannot be read or made.
    pub fn start(parts: Parts) -> Result<Arc<Self>, AgentError> {
        let Parts {
            config,
            state,
            clock: system_clock,
            entropy,
        } = parts;
        let root = state.root().to_owned();
        let lock = DirectoryLock::acquire(&root)
            .map_err(AgentError::file("lock", &root))?
            .ok_or(AgentError::Locked { path: root })?;
        let identity = Identity::load(&state)?;
        let fresh = Counters::new(identity.machine, identity.history);
        let (mut file, mut counters) = CounterFile::open(&state.path("counters"), fresh)?;
        // LSNs from the old reservation on were never given out.
        let first = counters.reserved;
        counters.epoch = Epoch(counters.epoch.0 + 1);
        counters.reserved = Lsn(first.0 + config.state.reserve_lsns);
        file.save(&counters)?;
        let frame_identity = FrameIdentity {
            machine: identity.machine,
            history: counters.history,
            origin: identity.agent,
            epoch: counters.epoch,
        };
        let clock = Arc::new(ApplianceClock::new(
            Arc::clone(&system_clock),
            counters.wall_offset_ns,
        ));
        let keeper_bell: Arc<Bell> = Arc::default();
        let wake = Arc::new(Notify::new());
        let bridge = Bridge::new(Arc::clone(&wake), Arc::clone(&keeper_bell));
        let start = OrderStart {
            identity: frame_identity,
            next: first,
            reserved: counters.reserved,
            time_floor: counters.last_time,
        };
        let portions = PortionOptions {
            bytes: config.pipeline.frame_bytes,
            gather: Duration::from_micros(config.pipeline.frame_gather_us),
        };
        let low_on_lsns = {
            let bell = Arc::clone(&keeper_bell);
            Box::new(move || bell.ring())
        };
        let half = config.state.reserve_lsns / 2;
        let order = Order::new(start, Arc::clone(&clock), portions, half, low_on_lsns);
        let order = Arc::new(order);
        bridge.set_order(Arc::clone(&order));
        let (spool, store) = start_store(
            &config,
            &state,
            counters.epoch,
            &bridge,
            &system_clock,
            &*entropy,
        )?;
        let outbox_wake = Arc::clone(&wake);
        let machine = Arc::new(Self {
            admission: Arc::new(Admission::new(config.pipeline.captured_bytes_max)),
            activity: Worker::start(config.activity.clone()).map_err(system("start a thread"))?,
            acknowledged: Arc::new(AtomicU64::new(counters.acknowledged.0)),
            outbox: Outbox::new(Box::new(move || outbox_wake.notify_one())),
            tree: TapTree::new(&*system_clock),
            keys: Arc::new(Keys::default()),
            config,
            state,
            identity,
            clock,
            entropy,
            counters: Mutex::new((file, counters)),
            order,
            store,
            disks: Mutex::default(),
            waiting_captures: Mutex::default(),
            changing: Mutex::default(),
            restarting: Mutex::default(),
            saving_disks: Mutex::default(),
            replicator: Mutex::default(),
            keeper: Mutex::default(),
            watcher: Mutex::default(),
            watcher_bell: Arc::default(),
            mount: Mutex::default(),
            link: Mutex::new(Link {
                reason: "not connected yet".to_owned(),
                ..Link::default()
            }),
            wake,
            retry_now: Notify::new(),
            keeper_bell,
            bridge,
            _spool: spool,
            begun: Mutex::default(),
            epoch_first: AtomicU64::new(first.0),
            generation: AtomicU64::new(0),
            is_stopping: AtomicBool::new(false),
            is_report_due: AtomicBool::new(false),
            seal_pool: Mutex::default(),
            _lock: lock,
        });
        machine.take_up()?;
        Ok(machine)
    }

    /// Takes up disks, begins the epoch, then lets writes come.
    fn take_up(self: &Arc<Self>) -> Result<(), AgentError> {
        load_keys(&self.state, &self.keys)?;
        let stale = self.clear_stale()?;
        for saved in SavedDisks::load(&self.state)?.disks {
            if saved.is_attached {
                let disk = self.take_up_disk(saved);
                if let Some((_, text)) = stale.iter().find(|(name, _)| *name == disk.name()) {
                    disk.state.lock().stale_device.clone_from(text);
                }
                self.disks.lock().push(disk);
            }
        }
        self.start_sealing()?;
        self.begin_epoch()?;
        self.note_sizes()?;
        self.record_growth();
        self.mount_taps()?;
        for disk in self.disks() {
            if let Err(error) = self.expose(&disk) {
                tracing::error!(%error, disk = disk.name(), "the disk has no device");
                disk.state.lock().stale_device = error.to_string();
            }
        }
        *self.keeper.lock() = Some(self.start_keeper().map_err(system("start a thread"))?);
        *self.watcher.lock() = Some(self.start_watcher().map_err(system("start a thread"))?);
        *self.replicator.lock() =
            Some(crate::replicate::start(self).map_err(system("start a thread"))?);
        Ok(())
    }

    fn start_sealing(&self) -> Result<(), AgentError> {
        let job = SealJob {
            order: Arc::clone(&self.order),
            admission: Arc::clone(&self.admission),
            store: Arc::clone(&self.store),
            keys: Arc::clone(&self.keys),
            entropy: Arc::clone(&self.entropy),
            waiting_max: self.config.pipeline.captured_bytes_max,
            level_max: level_for_cores(self.config.pipeline.compress_level_max),
        };
        let pool = SealPool::start(job, self.config.pipeline.seal_threads)
            .map_err(system("start a thread"))?;
        *self.seal_pool.lock() = Some(pool);
        Ok(())
    }

    /// Opens a saved disk. One that cannot be opened stays in the list, with the reason.
    fn take_up_disk(&self, mut saved: SavedDisk) -> Arc<Disk> {
        let opened = source::find(&saved.source)
            .and_then(|path| source::open(&path, &self.config.tap))
            .and_then(|opened| match opened.device.geometry().size_bytes {
                found_bytes if found_bytes < saved.size_bytes => {
                    saved.note_shrunk(found_bytes);
                    Err(AgentError::Shrunk {
                        name: saved.name.clone(),
                        known_bytes: saved.size_bytes,
                        found_bytes,
                    })
                }
                _ => Ok(opened),
            });
        let (id, is_protected) = (saved.disk, saved.is_protected);
        let mut state = DiskState::default();
        let (tap, file) = match opened {
            Ok(opened) => (Some(Tap::new(opened.device)), Some(opened.file)),
            Err(error) => {
                tracing::error!(%error, disk = saved.name, "the disk cannot be attached");
                state.trouble = format!("{error}; {}", error.hint());
                (None, None)
            }
        };
        let disk = Disk {
            id,
            saved: Mutex::new(saved),
            state: Mutex::new(state),
            tap,
            file,
        };
        if is_protected
            && disk.tap.is_some()
            && let Err(error) = self.resume_capture(&disk)
        {
            tracing::error!(%error, disk = disk.name(), "the disk cannot be captured");
            disk.state.lock().trouble = error.to_string();
            return Arc::new(Disk { tap: None, ..disk });
        }
        Arc::new(disk)
    }

    fn resume_capture(&self, disk: &Disk) -> Result<(), AgentError> {
        let Some(tap) = &disk.tap else { return Ok(()) };
        if self.keys.disk(disk.id).is_none() || self.keys.tag().is_none() {
            let path = self.state.path("keys.json");
            let what = "the key of a protected disk is missing".to_owned();
            return Err(AgentError::Damaged { path, what });
        }
        let capture = self.make_capture(disk, false)?;
        let found = tap.geometry().size_bytes;
        let (known, shrunk) = {
            let saved = disk.saved.lock();
            (saved.size_bytes, saved.shrunk_bytes)
        };
        let unseen = shrunk.map_or(known, |bytes| bytes.min(known));
        if found > unseen {
            capture.activity.taint_new(&(unseen..found));
            capture.activity.commit();
        }
        // The mark stays until the range was compared, so that the note can go.
        disk.saved.lock().shrunk_bytes = None;
        tap.capture(capture, Box::new(|| ()));
        Ok(())
    }

    /// Writes down what was found of the sources' sizes. That of a disk that is captured follows
    /// when the appliance knows it.
    fn note_sizes(&self) -> Result<(), AgentError> {
        for disk in self.disks() {
            let tap = disk.tap.as_ref();
            if tap.is_none_or(|tap| tap.captured_by().is_none()) {
                let found = disk.size_bytes();
                let mut saved = disk.saved.lock();
                saved.size_bytes = saved.size_bytes.max(found);
            }
        }
        self.save_disks()
    }

    fn mount_taps(&self) -> Result<(), AgentError> {
        let directory = self.state.path("fuse");
        fs::create_dir_all(&directory).map_err(AgentError::file("create", &directory))?;
        let options = FuseOptions {
            source: "afterimage-agent".to_owned(),
            event_threads: self.config.tap.fuse_threads,
            max_background: self.config.tap.fuse_background_max,
            io_uring: self.config.tap.io_uring,
            // A name that comes back means another disk, and a size changes under a device.
            name_lifetime: Duration::ZERO,
            ..FuseOptions::default()
        };
        let tree: Arc<TapTree> = Arc::clone(&self.tree);
        *self.mount.lock() = Some(FuseMount::mount(tree, &directory, options)?);
        Ok(())
    }

    /// Takes away what a dead agent left. Devices in use stay until they are free; their disks are
    /// given back with what to do.
    fn clear_stale(&self) -> Result<Vec<(String, String)>, AgentError> {
        let directory = self.state.path("fuse");
        if !directory.exists() && !is_dead(&directory) {
            return Ok(Vec::new());
        }
        let in_use = release_stale_under(&directory)?;
        if detach_stale(&directory)? {
            tracing::info!(directory = %directory.display(), "unmounted what a dead agent left");
        }
        let told = |stale: StaleDevice| {
            let device = stale.device.display().to_string();
            let places: Vec<_> = stale
                .directories
                .iter()
                .map(|d| d.display().to_string())
                .collect();
            let text = match places.as_slice() {
                [] => format!("{device} of an agent that died is still in use; end what uses it"),
                places => format!(
                    "{device} of an agent that died is still mounted at {}; unmount it and mount \
                     the new device",
                    places.join(", ")
                ),
            };
            tracing::warn!("{text}");
            let disk = stale.backing.file_stem().unwrap_or_default();
            (disk.to_string_lossy().into_owned(), text)
        };
        Ok(in_use.into_iter().map(told).collect())
    }
}

/// A mount whose server is dead does not seem to exist.
fn is_dead(directory: &Path) -> bool {
    matches!(directory.metadata(), Err(error) if error.raw_os_error() == Some(libc::ENOTCONN))
}

fn start_store(
    config: &Config,
    state: &StateDir,
    epoch: Epoch,
    bridge: &Arc<Bridge>,
    clock: &Arc<dyn Clock>,
    entropy: &dyn Entropy,
) -> Result<(Arc<LogSpool>, Arc<FrameStore>), AgentError> {
    state.empty_spool()?;
    let root = state.path("spool");
    let storage = RealStorage::open(&root, RealOptions::default())
        .map_err(AgentError::file("open", &root))?;
    let directory = String::new();
    let ask = afterimage_blockdev::StorageOp::Capacity { directory };
    let capacity = afterimage_blockdev::wait::storage(&*storage, ask)?;
    let total = match capacity {
        afterimage_blockdev::StorageOutcome::Capacity(capacity) => capacity.total_bytes,
        _ => 0,
    };
    let bytes_max = if config.spool.bytes_max > 0 {
        config.spool.bytes_max
    } else {
        total / 10
    };
    let limits = StoreLimits {
        memory_bytes: config.pipeline.sealed_bytes_max,
        writing_bytes: config.spool.read_ahead_bytes,
        loaded_bytes: config.spool.read_ahead_bytes,
        // What was captured already must still find room.
        spooled_bytes: (bytes_max / 2).max(bytes_max.saturating_sub(256 << 20)),
        stall: crate::config::ms(config.spool.stall_ms),
    };
    let spool = LogSpool::new();
    let for_store: Arc<LogSpool> = Arc::clone(&spool);
    let events: Arc<Bridge> = Arc::clone(bridge);
    let store = FrameStore::new(epoch, limits, for_store, events);
    let options = LogOptions {
        segment_bytes: config.spool.file_bytes,
        budget_bytes: bytes_max,
        seals: false,
        recycles: true,
        ..LogOptions::new("frames", StoreId(entropy.identity()))
    };
    let told: Arc<dyn SpoolEvents> = Arc::<FrameStore>::clone(&store);
    let storage: Arc<dyn afterimage_blockdev::Storage> = storage;
    spool
        .start(storage, options, Arc::clone(clock), told)
        .map_err(system("start a thread"))?;
    Ok((spool, store))
}

//! One protected machine: its disks, its order, its connection, and what holds them together.
//!
//! Invariants
//! * One epoch is written per run, or per [`Machine::restart_epoch`]; it is durable in the counters
//!   before any record of it exists.
//! * A disk that may differ from its replica is within a batch from the first record of an epoch
//!   on, so no state is shown that the source never had.
//! * Nothing that carries data waits for the connection.

mod attach;
mod bridge;
mod copies;
mod disk;
mod epoch;
pub mod host;
mod keeper;
mod protect;
mod source;
pub mod start;
mod stop;
mod watch;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use afterimage_blockdev::{DirectoryLock, DiskId, Entropy, Lsn};
use afterimage_export::FuseMount;
use afterimage_protocol::message::DiskDescription;
use afterimage_protocol::rest::agent::{AgentStatus, TappedDisk};
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::activity::worker::{Bell, Worker};
use crate::clock::ApplianceClock;
use crate::config::Config;
use crate::export::TapTree;
use crate::order::Order;
use crate::pipeline::{FrameStore, Keys, LogSpool, SealPool};
use crate::replicate::{Begun, Outbox};
use crate::state::StateDir;
use crate::state::counters::{CounterFile, Counters};
use crate::state::identity::Identity;
use crate::tap::Capture;
use crate::tap::admission::Admission;
pub(crate) use attach::check_name;
use bridge::Bridge;
pub use disk::{Disk, DiskState, Progress};

/// What the connection is to the agent.
#[derive(Default)]
struct Link {
    is_streaming: bool,
    /// Why not, or what is wrong.
    reason: String,
    /// The connection's epoch is given up.
    is_outdated: bool,
    /// Frames of this epoch were given to a connection.
    has_sent: bool,
    /// Disks to declare on the present connection.
    declares: Vec<DiskDescription>,
    /// The appliance refused this, while a disk waited to be declared.
    refusal: Option<afterimage_protocol::Refusal>,
}

/// See the module's text.
pub struct Machine {
    config: Config,
    state: StateDir,
    identity: Identity,
    clock: Arc<ApplianceClock>,
    entropy: Arc<dyn Entropy>,
    counters: Mutex<(CounterFile, Counters)>,
    order: Arc<Order>,
    admission: Arc<Admission>,
    store: Arc<FrameStore>,
    keys: Arc<Keys>,
    activity: Worker,
    acknowledged: Arc<AtomicU64>,
    outbox: Outbox,
    disks: Mutex<Vec<Arc<Disk>>>,
    /// Protected disks that begin to capture with their batch.
    waiting_captures: Mutex<Vec<(Arc<Disk>, Arc<Capture>)>>,
    /// Serialises attaching, detaching and protecting.
    changing: Mutex<()>,
    /// Serialises restarts of the epoch.
    restarting: Mutex<()>,
    /// One at a time reads and writes the file of the disks.
    saving_disks: Mutex<()>,
    replicator: Mutex<Option<JoinHandle<()>>>,
    keeper: Mutex<Option<JoinHandle<()>>>,
    watcher: Mutex<Option<JoinHandle<()>>>,
    watcher_bell: Arc<Bell>,
    tree: Arc<TapTree>,
    mount: Mutex<Option<FuseMount>>,
    link: Mutex<Link>,
    wake: Arc<Notify>,
    retry_now: Notify,
    keeper_bell: Arc<Bell>,
    bridge: Arc<Bridge>,
    _spool: Arc<LogSpool>,
    begun: Mutex<Option<Begun>>,
    /// First LSN of the present epoch.
    epoch_first: AtomicU64,
    /// Counts epochs of this run; copies of an earlier one give up.
    generation: AtomicU64,
    is_stopping: AtomicBool,
    /// The appliance should be told the state at once.
    is_report_due: AtomicBool,
    seal_pool: Mutex<Option<SealPool>>,
    _lock: DirectoryLock,
}

impl Machine {
    /// The configuration.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Who this agent is.
    #[must_use]
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Where its files are.
    #[must_use]
    pub fn state_dir(&self) -> &StateDir {
        &self.state
    }

    /// The order of all writes.
    #[must_use]
    pub fn order(&self) -> &Arc<Order> {
        &self.order
    }

    /// What copies have for the connection.
    #[must_use]
    pub fn outbox(&self) -> &Outbox {
        &self.outbox
    }

    /// The attached disks.
    #[must_use]
    pub fn disks(&self) -> Vec<Arc<Disk>> {
        self.disks.lock().clone()
    }

    /// A disk by its name.
    #[must_use]
    pub fn disk_named(&self, name: &str) -> Option<Arc<Disk>> {
        self.disks().into_iter().find(|disk| disk.name() == name)
    }

    /// A disk by its identity.
    #[must_use]
    pub fn disk(&self, id: DiskId) -> Option<Arc<Disk>> {
        self.disks().into_iter().find(|disk| disk.id == id)
    }

    /// Highest LSN acknowledged.
    #[must_use]
    pub fn acknowledged(&self) -> Lsn {
        Lsn(self.acknowledged.load(Ordering::Acquire))
    }

    /// Says whether records flow to the appliance.
    #[must_use]
    pub fn is_streaming(&self) -> bool {
        self.link.lock().is_streaming
    }

    /// Says whether the agent stops.
    #[must_use]
    pub fn is_stopping(&self) -> bool {
        self.is_stopping.load(Ordering::Acquire)
    }

    /// Counts epochs of this run.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// The stable link to a disk's device.
    #[must_use]
    pub fn link_path(&self, name: &str) -> PathBuf {
        self.config.paths.link_dir.join(name)
    }

    /// Shows a disk.
    #[must_use]
    pub fn show(&self, disk: &Disk) -> TappedDisk {
        let link = self.link_path(&disk.name()).display().to_string();
        disk.show(link, self.order.is_flowing())
    }

    /// Shows everything.
    #[must_use]
    pub fn status(&self) -> AgentStatus {
        let (is_connected, reason) = {
            let link = self.link.lock();
            (link.is_streaming, link.reason.clone())
        };
        let holding = self.store.holding();
        let frame_identity = self.order.identity();
        let (captured, _) = self.order.captured();
        AgentStatus {
            agent: self.identity.agent,
            machine: self.identity.machine,
            machine_name: self.identity.machine_name.clone(),
            history: frame_identity.history,
            epoch: frame_identity.epoch,
            captured,
            acknowledged: self.acknowledged(),
            is_connected,
            reason,
            buffered_bytes: holding.memory_bytes + self.order.waiting_bytes() as u64,
            spooled_bytes: holding.spooled_bytes,
            server: self.identity.data_address(),
            disks: self.disks().iter().map(|disk| self.show(disk)).collect(),
        }
    }
}

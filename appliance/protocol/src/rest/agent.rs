//! The agent's local socket.

use afterimage_blockdev::{AgentId, DiskId, Epoch, HistoryId, Lsn, MachineId};
use serde::{Deserialize, Serialize};

use crate::message::DiskPhase;

/// `POST /v1/disks`: puts a tap in front of an image file or block device.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttachDisk {
    /// Image file or block device, an absolute path.
    pub source: String,
    /// Name of the disk, unique within the machine.
    pub name: String,
}

/// `POST /v1/disks/{name}/protect`: begins replication. `POST /v1/disks/{name}/detach` ends the
/// tap; refused while the device is in use. `POST /v1/disks/{name}/grow` looks at the size of the
/// source at once, and lets disk and device follow.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProtectDisk {}

/// One tapped disk; `GET /v1/disks` lists them.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TappedDisk {
    /// Name of the disk.
    pub name: String,
    /// Identity of the disk.
    pub disk: DiskId,
    /// The image file or block device behind it.
    pub source: String,
    /// The device to use instead of the source, such as `/dev/loop3`.
    pub device: String,
    /// A stable name for that device.
    pub link: String,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Says whether writes are captured.
    pub is_protected: bool,
    /// What is going on; `None` when not protected.
    pub phase: Option<DiskPhase>,
    /// Why, for people; empty when all is well.
    pub reason: String,
    /// Bytes of the present pass that are done.
    pub done_bytes: u64,
    /// Bytes of the present pass.
    pub total_bytes: u64,
    /// Bytes per second of the present pass.
    pub rate_bytes: u64,
    /// Bytes of the source that the last pass after a restart had to read.
    pub recheck_read_bytes: u64,
    /// Bytes that differed in it.
    pub recheck_sent_bytes: u64,
}

/// `GET /v1/status`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct AgentStatus {
    /// The agent.
    pub agent: AgentId,
    /// The machine that it writes for.
    pub machine: MachineId,
    /// The machine's name.
    pub machine_name: String,
    /// The history being written.
    pub history: HistoryId,
    /// The writer's epoch.
    pub epoch: Epoch,
    /// Highest LSN given out.
    pub captured: Lsn,
    /// Highest LSN acknowledged.
    pub acknowledged: Lsn,
    /// Says whether the appliance is connected.
    pub is_connected: bool,
    /// Why not, or what is wrong; empty when all is well.
    pub reason: String,
    /// Bytes of records held in memory.
    pub buffered_bytes: u64,
    /// Bytes of records held in the spool.
    pub spooled_bytes: u64,
    /// Address of the appliance.
    pub server: String,
    /// The disks.
    pub disks: Vec<TappedDisk>,
}

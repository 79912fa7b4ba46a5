//! The appliance's control port and local socket.

use afterimage_blockdev::{AgentId, DiskId, Epoch, HistoryId, Lsn, MachineId, PointId, Timestamp};
use serde::{Deserialize, Serialize};

use crate::message::DiskPhase;

/// `POST /v1/tokens`: makes a one-time enrolment token.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateToken {
    /// Seconds until it expires.
    pub ttl_s: u64,
}

/// The answer to [`CreateToken`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Token {
    /// What the agent is given: the secret and the fingerprint of the appliance's authority.
    pub token: String,
    /// When it expires.
    pub expires: Timestamp,
}

/// `POST /v1/enrol`: the only request that needs no certificate; the token stands for it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Enrol {
    /// The secret part of the token.
    pub secret: String,
    /// The agent's identity, made by itself.
    pub agent: AgentId,
    /// The machine that it wants to write for; the grant is made with the certificate.
    pub machine: MachineId,
    /// The machine's name.
    pub machine_name: String,
    /// Certificate signing request, PEM.
    pub request_pem: String,
}

/// The answer to [`Enrol`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Enrolled {
    /// The agent's certificate, PEM.
    pub certificate_pem: String,
    /// The authority's certificate, PEM.
    pub authority_pem: String,
    /// Port of the data service.
    pub data_port: u16,
}

/// `GET /v1/status`.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct ServerStatus {
    /// `green`, `yellow` or `red`.
    pub health: String,
    /// Why it is not green.
    pub causes: Vec<String>,
    /// The program's version.
    pub version: String,
    /// Appliance time.
    pub now: Timestamp,
    /// Bytes of the store on disk.
    pub stored_bytes: u64,
    /// Bytes free for it.
    pub free_bytes: u64,
    /// Says whether ingest is paused.
    pub is_ingest_paused: bool,
    /// The machines.
    pub machines: Vec<MachineStatus>,
}

/// One machine; `GET /v1/machines` lists them.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct MachineStatus {
    /// Identity.
    pub machine: MachineId,
    /// Name.
    pub name: String,
    /// The trunk history.
    pub history: HistoryId,
    /// Epoch of its writer.
    pub epoch: Epoch,
    /// Who holds the epoch.
    pub origin: Option<AgentId>,
    /// Says whether the agent is connected.
    pub is_connected: bool,
    /// Highest durable LSN.
    pub durable: Lsn,
    /// Age of the newest state that the machine could boot from, in ms; `None` before the first.
    pub rpo_ms: Option<u64>,
    /// Delay by stage.
    pub lag: StageLag,
    /// The disks.
    pub disks: Vec<DiskStatus>,
}

/// Delay of the newest data by stage, in ms.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct StageLag {
    /// Completed at the source, not yet sealed into a frame.
    pub capture_ms: u64,
    /// Sealed, not yet received.
    pub link_ms: u64,
    /// Received, not yet durable.
    pub cache_ms: u64,
    /// Durable, not yet visible to views.
    pub apply_ms: u64,
}

/// One disk; `GET /v1/machines/{machine}/disks` lists them.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct DiskStatus {
    /// Identity.
    pub disk: DiskId,
    /// Name.
    pub name: String,
    /// Size in bytes.
    pub size_bytes: u64,
    /// What is going on.
    pub phase: DiskPhase,
    /// Why.
    pub reason: String,
    /// Bytes of the present pass that are done.
    pub done_bytes: u64,
    /// Bytes of the present pass.
    pub total_bytes: u64,
    /// What is addressable.
    pub addressable: Vec<AddressableRange>,
    /// Holes and damage, for people.
    pub damage: Vec<String>,
}

/// A range of LSNs of one history in which every LSN can be mounted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct AddressableRange {
    /// The history.
    pub history: HistoryId,
    /// First LSN.
    pub first: Lsn,
    /// Last LSN.
    pub last: Lsn,
    /// Time of the first.
    pub first_time: Timestamp,
    /// Time of the last.
    pub last_time: Timestamp,
}

/// `POST /v1/machines/{machine}/points`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreatePoint {
    /// Its name; `None` lets the appliance choose.
    pub name: Option<String>,
    /// A cut to name instead of the present one: a ref without machine and disk.
    pub at: Option<String>,
}

/// One recovery point; `GET /v1/machines/{machine}/points?after=N&limit=M` lists them, newest last.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Point {
    /// Identity.
    pub id: PointId,
    /// Name, unique within the machine.
    pub name: String,
    /// `crash`, `application`, `bookmark` or `resync-incomplete`.
    pub kind: String,
    /// The history.
    pub history: HistoryId,
    /// The cut.
    pub lsn: Lsn,
    /// Time of the cut.
    pub time: Timestamp,
}

/// `POST /v1/mounts`: shows a disk as it was.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateMount {
    /// `<machine>/<disk>@<name | time | -90s | [history:]lsn:N | latest>`.
    pub reference: String,
    /// Where; `None` lets the appliance choose. Not with `device_only`.
    pub directory: Option<String>,
    /// Gives a block device and mounts nothing.
    pub device_only: bool,
    /// Forks a branch, whose writes are kept and have history.
    pub is_branch: bool,
    /// Opens a point inside an unfinished copy, which is no state of the source.
    pub allow_incomplete: bool,
}

/// One mount; `GET /v1/mounts` lists them, `DELETE /v1/mounts/{id}` ends one.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Mount {
    /// Names the mount.
    pub id: u64,
    /// The reference as given.
    pub reference: String,
    /// The history shown, or the branch's own.
    pub history: HistoryId,
    /// The LSN shown, or forked from.
    pub lsn: Lsn,
    /// What was asked for was inside a batch, so its begin is shown.
    pub resolved_to_batch_begin: bool,
    /// The block device.
    pub device: String,
    /// The directory, if mounted.
    pub directory: Option<String>,
    /// The file system, if one was found.
    pub filesystem: Option<String>,
    /// Says whether it is a branch.
    pub is_branch: bool,
    /// From request to a readable device, in ms.
    pub device_ms: u64,
    /// From request to the end, in ms.
    pub total_ms: u64,
}

/// `POST /v1/log/verify`: reads every byte of the store and checks it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct VerifyReport {
    /// Segments read.
    pub segments: u64,
    /// Slots checked.
    pub slots: u64,
    /// Bytes read.
    pub bytes: u64,
    /// What is damaged, and which points it hurts.
    pub damage: Vec<String>,
}

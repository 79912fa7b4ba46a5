//! The appliance's control port and local socket.

use afterimage_blockdev::{AgentId, DiskId, Epoch, HistoryId, Lsn, MachineId, PointId, Timestamp};
use serde::{Deserialize, Serialize};

use super::scrub::ScrubStatus;
use super::space::SpaceForecast;
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

/// `POST /v1/renew`: a new certificate for the agent whose certificate comes with the request.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Renew {
    /// Certificate signing request, PEM.
    pub request_pem: String,
}

/// The answer to [`Renew`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Renewed {
    /// The agent's certificate, PEM.
    pub certificate_pem: String,
    /// When it expires.
    pub expires: Timestamp,
}

/// `POST /v1/certificates/admin`: makes a certificate that may do everything on the control port.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IssueAdmin {
    /// Who it is for, for people.
    pub name: String,
}

/// The answer to [`IssueAdmin`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct AdminIdentity {
    /// The certificate, PEM.
    pub certificate_pem: String,
    /// Its private key, PEM. The appliance keeps no copy.
    pub key_pem: String,
    /// The authority's certificate, PEM.
    pub authority_pem: String,
    /// When it expires.
    pub expires: Timestamp,
}

/// `POST /v1/machines/{machine}/move`: gives a machine to another agent; the present one is fenced.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MoveMachine {
    /// Who may write from now on.
    pub agent: AgentId,
}

/// One enrolled agent; `GET /v1/agents` lists them. `POST /v1/agents/{agent}/revoke` makes all its
/// certificates worthless.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Agent {
    /// Identity.
    pub agent: AgentId,
    /// When it enrolled first.
    pub enrolled: Timestamp,
    /// When its newest certificate expires.
    pub expires: Timestamp,
    /// All its certificates were revoked.
    pub is_revoked: bool,
    /// The machines that it may write for.
    pub machines: Vec<MachineId>,
}

/// Something that happened; `GET /v1/events?after=N&limit=M` lists them, newest last.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Event {
    /// Rising number.
    pub number: u64,
    /// When.
    pub time: Timestamp,
    /// A word for programs.
    pub kind: String,
    /// What happened, for people.
    pub text: String,
}

/// One page of recovery points, oldest first.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Points {
    /// The points.
    pub points: Vec<Point>,
    /// How many the machine has in all.
    pub total: u64,
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
    /// Why it is not green; each says what to do.
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
    /// Port of the data service.
    pub data_port: u16,
    /// Port of the control service.
    pub control_port: u16,
    /// How long the room lasts.
    #[serde(default)]
    pub space: SpaceForecast,
    /// Of the checks of the whole store.
    #[serde(default)]
    pub scrub: ScrubStatus,
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
    /// Number of recovery points.
    pub point_count: u64,
    /// Its journal window in ms, while a lack of room keeps it shorter than the policy says.
    #[serde(default)]
    pub shortened_window_ms: Option<u64>,
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
    /// Completed at the source, not yet sent; `None` while the agent is not connected.
    pub capture_ms: Option<u64>,
    /// Sent, not yet received; `None` while the agent is not connected.
    pub link_ms: Option<u64>,
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
    /// What is going on, as the agent said last; `None` before it said anything.
    pub phase: Option<DiskPhase>,
    /// Why.
    pub reason: String,
    /// Bytes of the present pass that are done.
    pub done_bytes: u64,
    /// Bytes of the present pass.
    pub total_bytes: u64,
    /// Says whether a whole copy is here.
    pub has_copy: bool,
    /// What is addressable.
    pub addressable: Vec<AddressableRange>,
    /// Holes and damage, for people.
    pub damage: Vec<String>,
    /// Stored bytes that its newest state and history need; `None` when that was not worked out.
    #[serde(default)]
    pub needed_bytes: Option<u64>,
    /// Stored bytes that it writes in a day, as it was measured.
    #[serde(default)]
    pub written_per_day_bytes: Option<u64>,
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
/// `DELETE /v1/machines/{machine}/points/{name}` deletes one.
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
    /// Until when it cannot be deleted; `None` when it is not locked.
    pub locked_until: Option<Timestamp>,
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
    /// What is done otherwise than usual.
    #[serde(default)]
    pub options: MountOptions,
}

/// What a mount does otherwise than usual.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MountOptions {
    /// Mounts this partition of the disk.
    pub partition: Option<u32>,
    /// Refuses writes, also to the private copy; journals are replayed into that before.
    pub is_read_only: bool,
    /// Lets programs of the file system take the rights of their owners.
    pub allow_suid: bool,
    /// Lets device nodes of the file system be opened.
    pub allow_dev: bool,
    /// Lets programs of the file system run.
    pub allow_exec: bool,
    /// Name of a new branch; the appliance chooses one otherwise.
    pub branch_name: Option<String>,
    /// The most that a new branch may hold of its own, in bytes.
    pub quota_bytes: Option<u64>,
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
    /// What a person should know of it, such as the partitions found; may be empty.
    pub notes: Vec<String>,
    /// Says whether it is a branch.
    pub is_branch: bool,
    /// The branch's name.
    #[serde(default)]
    pub branch_name: Option<String>,
    /// From request to a readable device, in ms.
    pub device_ms: u64,
    /// From request to the end, in ms.
    pub total_ms: u64,
}

/// `POST /v1/store/collect`: gives back the space of what nobody needs any more.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CollectReport {
    /// Log segments that were moved to the seed store.
    pub destaged: u64,
    /// Seed segments that were rewritten without what nobody needs.
    pub rewritten: u64,
    /// Segments of which nothing was needed.
    pub dropped: u64,
    /// Bytes given back; negative when moving took more than it gave.
    pub freed_bytes: i64,
    /// Bytes written for it.
    pub written_bytes: u64,
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

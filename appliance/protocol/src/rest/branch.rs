//! Branches: writable disks that begin as a state of another one.

use afterimage_blockdev::{HistoryId, Lsn, Timestamp};
use serde::{Deserialize, Serialize};

/// Between disk and name in a reference to a branch: `<machine>/<disk>@branch:<name>`.
pub const BRANCH_MARK: &str = "@branch:";

/// `POST /v1/branches`: forks a branch. `GET` lists [`Branch`]es.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateBranch {
    /// The state that it begins with.
    pub reference: String,
    /// Its name, unique among the branches of the disk; `None` lets the appliance choose.
    pub name: Option<String>,
    /// The most that it may hold of its own, in bytes.
    pub quota_bytes: Option<u64>,
    /// Begins with a point inside an unfinished copy, which is no state of the source.
    #[serde(default)]
    pub allow_incomplete: bool,
}

/// `POST /v1/branches/{history}/quota`: sets or takes away a limit.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetQuota {
    /// The most that it may hold of its own, in bytes; none for no limit.
    pub quota_bytes: Option<u64>,
}

/// `POST /v1/branches/{history}/promotion`: writes the present state of a branch to an image, in
/// the background. The same request goes on with one that was stopped. `DELETE` stops it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Promote {
    /// The image on the appliance's machine: an absolute path.
    pub target: String,
    /// Overwrites what is there, and begins anew.
    pub is_forced: bool,
}

/// One branch. `DELETE /v1/branches/{history}` drops one and its writes.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Branch {
    /// Its history.
    pub history: HistoryId,
    /// Name of the machine.
    pub machine: String,
    /// Name of the disk; empty when nothing is noted of the branch but its history.
    pub disk: String,
    /// Its name.
    pub name: String,
    /// The history forked from.
    pub parent: HistoryId,
    /// The LSN forked from.
    pub base: Lsn,
    /// When it was made.
    pub created: Timestamp,
    /// Size of the disk in bytes.
    pub size_bytes: u64,
    /// What it holds of its own, in bytes; of a closed branch, what it held when it was closed.
    pub used_bytes: u64,
    /// The most that it may hold of its own, in bytes.
    pub quota_bytes: Option<u64>,
    /// Its newest durable LSN.
    pub durable: Lsn,
    /// Mounts, open files and promotions that use it.
    pub users: u64,
    /// The newest promotion.
    pub promotion: Option<Promotion>,
}

/// How far a promotion is.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Promotion {
    /// The image.
    pub target: String,
    /// The LSN of the branch that the image shows.
    pub lsn: Lsn,
    /// What it does.
    pub state: PromotionState,
    /// Everything below this byte of the disk is done, of the pass that is under way.
    pub done_bytes: u64,
    /// Bytes of the disk.
    pub total_bytes: u64,
    /// Why it failed; empty otherwise.
    pub error: String,
}

/// What a promotion does.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PromotionState {
    /// Bytes are written.
    Copying,
    /// All is written; it is read back and compared.
    Verifying,
    /// The image is whole, durable and compared.
    Done,
    /// Somebody stopped it, or the appliance was; the same request goes on with it.
    Stopped,
    /// Something went wrong.
    Failed,
}

impl PromotionState {
    /// Says whether it is under way.
    #[must_use]
    pub fn is_running(self) -> bool {
        matches!(self, Self::Copying | Self::Verifying)
    }
}

//! Branches for others than mounts: sessions that use one as long as they last.

use std::sync::Arc;

use afterimage_blockdev::{BlockCompleter, BlockDevice, BlockOp, Geometry, HistoryId, Token};
use afterimage_protocol::rest::ApiError;

use super::branches::BranchUse;
use super::manager::Mounts;

/// A branch's device while somebody uses it. When the last use goes, what was written is durable.
pub struct LentBranch {
    history: HistoryId,
    device: Arc<dyn BlockDevice>,
    in_use: Option<BranchUse>,
}

impl LentBranch {
    /// The branch's history.
    #[must_use]
    pub fn history(&self) -> HistoryId {
        self.history
    }
}

impl Mounts {
    /// Uses a branch, named as `<machine>/<disk>@branch:<name>`. Waits.
    ///
    /// # Errors
    /// When there is none, or it cannot be opened.
    pub fn lend_branch(&self, reference: &str) -> Result<LentBranch, ApiError> {
        let history = self.branches.find(reference)?;
        let in_use = self.branches.acquire(history)?;
        Ok(LentBranch {
            history,
            device: in_use.device(),
            in_use: Some(in_use),
        })
    }
}

impl BlockDevice for LentBranch {
    fn geometry(&self) -> Geometry {
        self.device.geometry()
    }

    fn gives_buffers_back(&self) -> bool {
        self.device.gives_buffers_back()
    }

    fn submit(&self, token: Token, op: BlockOp, to: Arc<dyn BlockCompleter>) {
        self.device.submit(token, op, to);
    }
}

impl Drop for LentBranch {
    fn drop(&mut self) {
        let in_use = self.in_use.take();
        // The end of a use waits for the medium, which no task of a session may.
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(move || drop(in_use))),
            Err(_) => drop(in_use),
        }
    }
}

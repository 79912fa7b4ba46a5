//! Branches, as the control port speaks of them.

use std::collections::BTreeSet;
use std::path::Path;

use afterimage_blockdev::{HistoryId, Lsn, Timestamp};
use afterimage_protocol::rest::ApiError;
use afterimage_protocol::rest::branch::{Branch, CreateBranch, Promotion};

use super::branches::Known;
use super::manager::Mounts;
use crate::engine::{Command, EngineStatus, HistorySummary, ViewRequest};

impl Mounts {
    /// Forks a branch.
    ///
    /// # Errors
    /// What is wrong with the reference or the name.
    ///
    /// # Durability
    /// On disk when this returns.
    pub fn create_branch(&self, request: &CreateBranch) -> Result<Branch, ApiError> {
        let wanted = ViewRequest {
            reference: request.reference.clone(),
            allow_incomplete: request.allow_incomplete,
        };
        let name = request.name.as_deref();
        let (row, using, _) = self.branches.create(wanted, name, request.quota_bytes)?;
        drop(using);
        let row = self.branches.row(row.history)?;
        let status = self.engine.ask_blocking(Command::Status)?;
        Ok(self.shown(&status, Known { row, users: 0 }))
    }

    /// Lists the branches, those without a name included.
    ///
    /// # Errors
    /// When the engine has stopped.
    pub fn branches(&self) -> Result<Vec<Branch>, ApiError> {
        let status = self.engine.ask_blocking(Command::Status)?;
        let mut noted = BTreeSet::new();
        let mut shown = Vec::new();
        for known in self.branches.list() {
            noted.insert(known.row.history);
            shown.push(self.shown(&status, known));
        }
        for machine in &status.machines {
            let rest = machine.histories.iter();
            let rest = rest.filter(|known| known.is_branch && !noted.contains(&known.history));
            shown.extend(rest.map(|known| nameless(&machine.name, known)));
        }
        shown.sort_by(|a, b| {
            let key = |branch: &Branch| {
                let place = (branch.machine.clone(), branch.disk.clone());
                (place, branch.name.clone())
            };
            key(a).cmp(&key(b))
        });
        Ok(shown)
    }

    fn shown(&self, status: &EngineStatus, known: Known) -> Branch {
        let Known { row, users } = known;
        let machine = status
            .machines
            .iter()
            .find(|machine| machine.machine == row.machine);
        let disk = machine.and_then(|machine| {
            let mut disks = machine.disks.iter();
            disks.find(|disk| disk.disk == row.disk)
        });
        let history = machine.and_then(|machine| {
            let mut histories = machine.histories.iter();
            histories.find(|history| history.history == row.history)
        });
        Branch {
            machine: machine.map_or(row.machine.to_string(), |machine| machine.name.clone()),
            disk: disk.map_or(row.disk.to_string(), |disk| disk.name.clone()),
            durable: history.map(|history| history.durable).unwrap_or_default(),
            promotion: self.promotions.shown(&row),
            history: row.history,
            name: row.name,
            parent: row.parent,
            base: row.lsn,
            created: row.created,
            size_bytes: row.size_bytes,
            used_bytes: row.used_bytes,
            quota_bytes: row.quota_bytes,
            users,
        }
    }

    /// Drops a branch and its writes.
    ///
    /// # Errors
    /// When there is none, or it is in use.
    pub fn drop_branch(&self, history: HistoryId) -> Result<(), ApiError> {
        self.branches.drop_branch(history)?;
        self.promotions.forget(history);
        Ok(())
    }

    /// Sets or takes away a branch's limit.
    ///
    /// # Errors
    /// When there is no such branch.
    pub fn set_quota(&self, history: HistoryId, quota: Option<u64>) -> Result<(), ApiError> {
        self.branches.set_quota(history, quota)
    }

    /// Begins to promote a branch, or goes on.
    ///
    /// # Errors
    /// What is wrong with the image or the branch.
    pub fn promote(
        &self,
        history: HistoryId,
        target: &Path,
        is_forced: bool,
    ) -> Result<Promotion, ApiError> {
        self.promotions.start(history, target, is_forced)
    }

    /// Stops the promotion of a branch.
    ///
    /// # Errors
    /// When there is none.
    pub fn stop_promotion(&self, history: HistoryId) -> Result<(), ApiError> {
        self.promotions.stop(history)
    }
}

/// A branch of which only the history is known.
fn nameless(machine: &str, known: &HistorySummary) -> Branch {
    let (parent, base) = known.parent.unwrap_or((HistoryId::NIL, Lsn::ZERO));
    Branch {
        history: known.history,
        machine: machine.to_owned(),
        disk: String::new(),
        name: known.history.to_string(),
        parent,
        base,
        created: Timestamp::default(),
        size_bytes: 0,
        used_bytes: 0,
        quota_bytes: None,
        durable: known.durable,
        users: 0,
        promotion: None,
    }
}

//! Branches by name: who uses them, and what is noted of them.
//!
//! Invariants
//! * A branch has at most one device, whoever uses it: mounts, files of the tree and promotions
//!   share it, so that all of them see the same bytes.
//! * When its last user goes, what was written is durable before the device is given up.
//! * What is dropped has no user.

use std::collections::BTreeMap;
use std::sync::Arc;

use afterimage_blockdev::{
    BlockDevice, BlockOp, Clock, DiskId, ErrorClass, HistoryId, Lsn, MachineId, wait,
};
use afterimage_protocol::rest::ApiError;
use afterimage_protocol::rest::branch::BRANCH_MARK;
use afterimage_seed::Usage;
use parking_lot::Mutex;

use crate::appliance::api_error;
use crate::catalogue::{BranchRow, Catalogue, PromotionRow};
use crate::engine::{
    BranchOpened, Command, EngineHandle, EngineStatus, ReopenRequest, ViewRequest,
};

/// Most branches of an appliance.
const BRANCHES_MAX: usize = 4096;
/// Longest name in bytes.
const NAME_BYTES_MAX: usize = 128;

/// A branch that is noted.
struct Noted {
    row: Mutex<BranchRow>,
    open: Mutex<Option<Open>>,
}

struct Open {
    device: Arc<dyn BlockDevice>,
    usage: Arc<Usage>,
    users: u64,
}

/// What is known of a branch at one moment.
pub(super) struct Known {
    pub(super) row: BranchRow,
    pub(super) users: u64,
}

/// The branches of this daemon.
pub(super) struct Branches {
    engine: EngineHandle,
    catalogue: Catalogue,
    clock: Arc<dyn Clock>,
    table: Mutex<BTreeMap<HistoryId, Arc<Noted>>>,
}

/// A use of a branch's device. The last one that goes makes all writes durable.
pub(super) struct BranchUse {
    branches: Arc<Branches>,
    history: HistoryId,
    device: Arc<dyn BlockDevice>,
}

impl BranchUse {
    pub(super) fn device(&self) -> Arc<dyn BlockDevice> {
        Arc::clone(&self.device)
    }
}

impl Drop for BranchUse {
    fn drop(&mut self) {
        self.branches.release(self.history);
    }
}

/// A reference to a branch, taken apart: machine, disk and name.
pub(super) fn named(reference: &str) -> Option<(&str, &str, &str)> {
    let (place, name) = reference.split_once(BRANCH_MARK)?;
    let (machine, disk) = place.split_once('/')?;
    Some((machine, disk, name))
}

fn refused(message: impl Into<String>, hint: impl Into<String>) -> ApiError {
    api_error(ErrorClass::Refused, message, hint)
}

fn check_name(name: &str) -> Result<(), ApiError> {
    let is_legal = !name.is_empty()
        && name.len() <= NAME_BYTES_MAX
        && !name.starts_with(['.', '-'])
        && name
            .chars()
            .all(|c| !c.is_control() && !matches!(c, '/' | '@'));
    if is_legal {
        return Ok(());
    }
    Err(refused(
        format!("{name:?} cannot be a branch's name"),
        "use 1 to 128 bytes without '/', '@' and control characters",
    ))
}

impl Branches {
    pub(super) fn load(
        engine: EngineHandle,
        catalogue: Catalogue,
        clock: Arc<dyn Clock>,
    ) -> Result<Arc<Self>, ApiError> {
        let rows = catalogue.branches()?;
        let noted = |row: BranchRow| {
            let open = Mutex::new(None);
            (
                row.history,
                Arc::new(Noted {
                    row: Mutex::new(row),
                    open,
                }),
            )
        };
        Ok(Arc::new(Self {
            engine,
            catalogue,
            clock,
            table: Mutex::new(rows.into_iter().map(noted).collect()),
        }))
    }

    /// Forks a branch, and opens it.
    pub(super) fn create(
        self: &Arc<Self>,
        wanted: ViewRequest,
        name: Option<&str>,
        quota_bytes: Option<u64>,
    ) -> Result<(BranchRow, BranchUse, bool), ApiError> {
        if let Some(name) = name {
            check_name(name)?;
        }
        if self.table.lock().len() >= BRANCHES_MAX {
            return Err(refused(
                format!("there are {BRANCHES_MAX} branches already"),
                "drop some with `aft branch drop`",
            ));
        }
        if let (Some(name), Ok((machine, disk))) = (name, self.disk_of(&wanted.reference)) {
            self.must_be_free(machine, disk, name)?;
        }
        let opened = self
            .engine
            .ask_blocking(|reply| Command::Fork(wanted, reply))??;
        let history = opened.history;
        let resolved = opened.resolved_to_batch_begin;
        opened.usage.set_limit(quota_bytes);
        let chosen = history.to_string().chars().take(8).collect();
        let row = BranchRow {
            history,
            machine: opened.machine,
            disk: opened.disk,
            name: name.map_or(chosen, str::to_owned),
            parent: opened.parent,
            lsn: opened.lsn,
            size_bytes: opened.device.geometry().size_bytes,
            created: self.clock.wall(),
            quota_bytes,
            used_bytes: 0,
            promotion: None,
        };
        match self.keep(row.clone(), opened) {
            Ok(using) => Ok((row, using, resolved)),
            Err(error) => {
                // Nobody could name it.
                let dropped = self
                    .engine
                    .ask_blocking(|reply| Command::DropBranch(history, reply));
                if let Ok(Err(error)) = dropped {
                    tracing::warn!(%error, %history, "a branch without a name stays");
                }
                Err(error)
            }
        }
    }

    fn keep(self: &Arc<Self>, row: BranchRow, opened: BranchOpened) -> Result<BranchUse, ApiError> {
        let mut table = self.table.lock();
        // Somebody else may have taken the name meanwhile.
        free_in(&table, row.machine, row.disk, &row.name)?;
        self.catalogue.put_branch(&row)?;
        let history = row.history;
        let device = Arc::clone(&opened.device);
        let open = Open {
            device: opened.device,
            usage: opened.usage,
            users: 1,
        };
        let noted = Noted {
            row: Mutex::new(row),
            open: Mutex::new(Some(open)),
        };
        table.insert(history, Arc::new(noted));
        Ok(BranchUse {
            branches: Arc::clone(self),
            history,
            device,
        })
    }

    fn must_be_free(&self, machine: MachineId, disk: DiskId, name: &str) -> Result<(), ApiError> {
        free_in(&self.table.lock(), machine, disk, name)
    }

    /// The machine and disk that a reference begins with.
    fn disk_of(&self, reference: &str) -> Result<(MachineId, DiskId), ApiError> {
        let place = reference
            .split_once('@')
            .map_or(reference, |(place, _)| place);
        let (machine, disk) = place.split_once('/').unwrap_or((place, ""));
        let status = self.engine.ask_blocking(Command::Status)?;
        disk_named(&status, machine, disk)
    }

    /// The branch that a reference names.
    pub(super) fn find(self: &Arc<Self>, reference: &str) -> Result<HistoryId, ApiError> {
        let wrong = || {
            refused(
                format!("{reference:?} names no branch"),
                "write it as <machine>/<disk>@branch:<name>",
            )
        };
        let (_, _, name) = named(reference).ok_or_else(wrong)?;
        let (machine, disk) = self.disk_of(reference)?;
        if let Some(history) = self.lookup(machine, disk, name) {
            return Ok(history);
        }
        if let Ok(history) = name.parse() {
            return self.adopt(machine, disk, history);
        }
        let mut names = self.names(machine, disk);
        names.truncate(10);
        let known = if names.is_empty() {
            "it has none".to_owned()
        } else {
            format!("it has {}", names.join(", "))
        };
        Err(refused(
            format!("the disk has no branch {name:?}"),
            format!("{known}; `aft branch list` shows all"),
        ))
    }

    /// The reference of what a branch holds now; `None` when none is named.
    pub(super) fn still(self: &Arc<Self>, reference: &str) -> Result<Option<String>, ApiError> {
        if named(reference).is_none() {
            return Ok(None);
        }
        let history = self.find(reference)?;
        let row = self.row(history)?;
        let using = self.acquire(history)?;
        wait::device(&*using.device(), BlockOp::Flush)
            .map_err(|error| api_error(error.class(), error.to_string(), ""))?;
        let lsn = self.durable(history)?;
        Ok(Some(format!(
            "{}/{}@{history}:lsn:{lsn}",
            row.machine, row.disk
        )))
    }

    /// Notes a branch of which only the history is known, one of an older release for instance.
    fn adopt(
        self: &Arc<Self>,
        machine: MachineId,
        disk: DiskId,
        history: HistoryId,
    ) -> Result<HistoryId, ApiError> {
        if let Ok(row) = self.row(history) {
            if (row.machine, row.disk) == (machine, disk) {
                return Ok(history);
            }
            return Err(refused(
                format!("branch {history} is one of another disk"),
                "`aft branch list` shows it",
            ));
        }
        let request = ReopenRequest {
            history,
            disk,
            limit_bytes: None,
        };
        let opened = self
            .engine
            .ask_blocking(|reply| Command::Reopen(request, reply))??;
        let row = BranchRow {
            history,
            machine: opened.machine,
            disk: opened.disk,
            name: history.to_string(),
            parent: opened.parent,
            lsn: opened.lsn,
            size_bytes: opened.device.geometry().size_bytes,
            created: self.clock.wall(),
            quota_bytes: None,
            used_bytes: opened.usage.used_bytes(),
            promotion: None,
        };
        drop(self.keep(row, opened)?);
        Ok(history)
    }

    /// The branch of a disk with this name.
    pub(super) fn lookup(&self, machine: MachineId, disk: DiskId, name: &str) -> Option<HistoryId> {
        let table = self.table.lock();
        let mut rows = table.values().map(|noted| noted.row.lock());
        let found =
            rows.find(|row| (row.machine, row.disk) == (machine, disk) && row.name == name)?;
        Some(found.history)
    }

    fn names(&self, machine: MachineId, disk: DiskId) -> Vec<String> {
        let rows = self.of_disk(machine, disk);
        rows.into_iter().map(|row| row.name).collect()
    }

    /// The branches of a disk.
    pub(super) fn of_disk(&self, machine: MachineId, disk: DiskId) -> Vec<BranchRow> {
        let all = self.list().into_iter().map(|known| known.row);
        all.filter(|row| (row.machine, row.disk) == (machine, disk))
            .collect()
    }

    fn noted(&self, history: HistoryId) -> Result<Arc<Noted>, ApiError> {
        let found = self.table.lock().get(&history).cloned();
        found.ok_or_else(|| {
            refused(
                format!("there is no branch {history}"),
                "`aft branch list` shows those that there are",
            )
        })
    }

    /// What is noted of a branch.
    pub(super) fn row(&self, history: HistoryId) -> Result<BranchRow, ApiError> {
        Ok(self.noted(history)?.row.lock().clone())
    }

    /// Uses a branch; opens it when nobody does yet.
    pub(super) fn acquire(self: &Arc<Self>, history: HistoryId) -> Result<BranchUse, ApiError> {
        let noted = self.noted(history)?;
        let (disk, limit_bytes) = {
            let row = noted.row.lock();
            (row.disk, row.quota_bytes)
        };
        let mut open = noted.open.lock();
        if open.is_none() {
            let request = ReopenRequest {
                history,
                disk,
                limit_bytes,
            };
            let opened = self
                .engine
                .ask_blocking(|reply| Command::Reopen(request, reply))??;
            *open = Some(Open {
                device: opened.device,
                usage: opened.usage,
                users: 0,
            });
        }
        let Some(found) = open.as_mut() else {
            return Err(api_error(ErrorClass::Retry, "the branch was closed", ""));
        };
        found.users += 1;
        let device = Arc::clone(&found.device);
        Ok(BranchUse {
            branches: Arc::clone(self),
            history,
            device,
        })
    }

    fn release(&self, history: HistoryId) {
        let Ok(noted) = self.noted(history) else {
            return;
        };
        let mut open = noted.open.lock();
        let Some(found) = open.as_mut() else { return };
        found.users = found.users.saturating_sub(1);
        if found.users > 0 {
            return;
        }
        // Held until all is durable: whoever opens it next must find all of it.
        if let Err(error) = wait::device(&*found.device, BlockOp::Flush) {
            tracing::error!(%error, %history, "what was written last to a branch may be lost");
        }
        let used_bytes = found.usage.used_bytes();
        *open = None;
        drop(open);
        let changed = self.change(history, |row| row.used_bytes = used_bytes);
        if let Err(error) = changed {
            tracing::warn!(%error, %history, "what a branch holds is not noted");
        }
    }

    /// Changes what is noted of a branch.
    ///
    /// # Durability
    /// On disk when this returns.
    fn change(
        &self,
        history: HistoryId,
        change: impl FnOnce(&mut BranchRow),
    ) -> Result<BranchRow, ApiError> {
        let noted = self.noted(history)?;
        let mut row = noted.row.lock();
        let mut changed = row.clone();
        change(&mut changed);
        self.catalogue.put_branch(&changed)?;
        *row = changed.clone();
        Ok(changed)
    }

    /// Sets or takes away a limit; it holds from the next write on.
    pub(super) fn set_quota(
        &self,
        history: HistoryId,
        quota_bytes: Option<u64>,
    ) -> Result<(), ApiError> {
        self.change(history, |row| row.quota_bytes = quota_bytes)?;
        if let Some(open) = &*self.noted(history)?.open.lock() {
            open.usage.set_limit(quota_bytes);
        }
        Ok(())
    }

    /// Notes how a promotion is.
    pub(super) fn set_promotion(
        &self,
        history: HistoryId,
        promotion: PromotionRow,
    ) -> Result<(), ApiError> {
        self.change(history, |row| row.promotion = Some(promotion))?;
        Ok(())
    }

    /// Drops a branch and its writes.
    pub(super) fn drop_branch(&self, history: HistoryId) -> Result<(), ApiError> {
        let noted = self.noted(history).ok();
        // Nobody can open it while this is held.
        let open = noted.as_ref().map(|noted| noted.open.lock());
        if let Some(found) = open.as_ref().and_then(|open| open.as_ref()) {
            return Err(api_error(
                ErrorClass::Retry,
                format!("the branch is in use: {} times", found.users),
                "end its mounts and promotion, and close its files",
            ));
        }
        let dropped = self
            .engine
            .ask_blocking(|reply| Command::DropBranch(history, reply))?;
        if let Err(error) = dropped
            && self.durable(history).is_ok()
        {
            return Err(error);
        }
        // Also what was dropped before, by a daemon that died before it was noted.
        self.catalogue.forget_branch(history)?;
        self.table.lock().remove(&history);
        Ok(())
    }

    /// Lists what is known.
    pub(super) fn list(&self) -> Vec<Known> {
        let all: Vec<Arc<Noted>> = self.table.lock().values().cloned().collect();
        let known = all.iter().map(|noted| {
            let mut row = noted.row.lock().clone();
            // One that is just being opened or closed is in use.
            let users = noted.open.try_lock().map_or(1, |open| {
                open.as_ref().map_or(0, |open| {
                    row.used_bytes = open.usage.used_bytes();
                    open.users
                })
            });
            Known { row, users }
        });
        known.collect()
    }

    /// The newest durable LSN of a branch.
    pub(super) fn durable(&self, history: HistoryId) -> Result<Lsn, ApiError> {
        let status = self.engine.ask_blocking(Command::Status)?;
        let mut all = status
            .machines
            .iter()
            .flat_map(|machine| &machine.histories);
        let found = all.find(|known| known.history == history);
        found
            .map(|known| known.durable)
            .ok_or_else(|| refused(format!("there is no history {history}"), ""))
    }
}

fn free_in(
    table: &BTreeMap<HistoryId, Arc<Noted>>,
    machine: MachineId,
    disk: DiskId,
    name: &str,
) -> Result<(), ApiError> {
    let is_taken = table.values().any(|noted| {
        let row = noted.row.lock();
        (row.machine, row.disk) == (machine, disk) && row.name == name
    });
    if is_taken {
        return Err(refused(
            format!("the disk has a branch {name:?} already"),
            "choose another name, or drop that one with `aft branch drop`",
        ));
    }
    Ok(())
}

/// Finds a disk by names or identities.
fn disk_named(
    status: &EngineStatus,
    machine: &str,
    disk: &str,
) -> Result<(MachineId, DiskId), ApiError> {
    let found = status
        .machines
        .iter()
        .find(|known| known.name == machine || known.machine.to_string() == machine);
    let known = found.ok_or_else(|| refused(format!("there is no machine {machine:?}"), ""))?;
    let found = known
        .disks
        .iter()
        .find(|known| known.name == disk || known.disk.to_string() == disk);
    let found =
        found.ok_or_else(|| refused(format!("machine {machine} has no disk {disk:?}"), ""))?;
    Ok((known.machine, found.disk))
}

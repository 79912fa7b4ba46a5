//! The tree of files: `<machine>/<disk>/points/<name>.img`, `.../at/<time>.img`,
//! `.../at/lsn-<N>.img`, `.../branches/<name>.img`, and `.mounts/<id>.img` for the mounts of this
//! daemon.
//!
//! All of it is resolved by the engine when it is asked for. Directories below `at` list nothing:
//! every time and every LSN of the window is there.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::sync::Arc;

use afterimage_blockdev::{BlockDevice, Clock, DiskId, HistoryId, MachineId, PointId, Timestamp};
use afterimage_export::{ListedNode, Node, NodeId, NodeKind, Tree, TreeError};
use afterimage_protocol::rest::ApiError;
use parking_lot::Mutex;

use super::branches::{BranchUse, Branches};
use super::nodes::{Moment, Nodes, Place};
use super::status_cache::{self, StatusCache};
use super::views::{PointHere, Views, gone, refused};
use crate::catalogue::BranchRow;
use crate::engine::{EngineHandle, EngineStatus, HistorySummary};

/// Directory of the files behind mounts; hidden, since they are nobody else's.
pub(super) const MOUNTS_NAME: &str = ".mounts";
const SUFFIX: &str = ".img";
/// Points that are asked for at once: about as many as an answer to the kernel holds.
const POINTS_PAGE: usize = 128;

pub(super) struct DiskTree {
    views: Views,
    status: StatusCache,
    nodes: Mutex<Nodes>,
    mounts: Mutex<HashMap<u64, Arc<dyn BlockDevice>>>,
    branches: Arc<Branches>,
    /// Uses of branches by open files of the tree.
    open: Mutex<HashMap<HistoryId, Vec<BranchUse>>>,
}

impl DiskTree {
    pub(super) fn new(
        engine: EngineHandle,
        clock: Arc<dyn Clock>,
        branches: Arc<Branches>,
    ) -> Self {
        Self {
            status: StatusCache::new(engine.clone(), clock),
            views: Views::new(engine),
            nodes: Mutex::default(),
            mounts: Mutex::default(),
            branches,
            open: Mutex::default(),
        }
    }

    /// Puts the device of a mount into the tree; gives its path below the root.
    pub(super) fn add_mount(&self, id: u64, device: Arc<dyn BlockDevice>) -> String {
        self.mounts.lock().insert(id, device);
        format!("{MOUNTS_NAME}/{id}{SUFFIX}")
    }

    pub(super) fn remove_mount(&self, id: u64) {
        self.mounts.lock().remove(&id);
    }

    fn node_of(
        &self,
        place: &Place,
        kind: NodeKind,
        modified: Timestamp,
    ) -> Result<Node, TreeError> {
        let id = self.nodes.lock().id(place).ok_or(TreeError::Failed {
            errno: libc::EOVERFLOW,
            message: "more disks or points than numbers for files".to_owned(),
        })?;
        Ok(Node { id, kind, modified })
    }

    fn directory(&self, place: &Place, modified: Timestamp) -> Result<Node, TreeError> {
        self.node_of(place, NodeKind::Directory, modified)
    }

    fn read_only(&self, place: &Place, size_bytes: u64, at: Timestamp) -> Result<Node, TreeError> {
        self.node_of(
            place,
            NodeKind::File {
                size_bytes,
                is_read_only: true,
            },
            at,
        )
    }

    fn mount_node(&self, id: u64) -> Result<Node, TreeError> {
        let geometry = self
            .mounts
            .lock()
            .get(&id)
            .ok_or(TreeError::NotFound)?
            .geometry();
        let (size_bytes, is_read_only) = (geometry.size_bytes, geometry.is_read_only);
        let kind = NodeKind::File {
            size_bytes,
            is_read_only,
        };
        self.node_of(&Place::Mount(id), kind, Timestamp::default())
    }

    fn point_node(
        &self,
        machine: MachineId,
        disk: DiskId,
        here: &PointHere,
    ) -> Result<Node, TreeError> {
        let place = Place::Point(machine, disk, here.point.id);
        self.read_only(&place, here.size_bytes, here.point.time)
    }

    fn branch_node(&self, row: &BranchRow) -> Result<Node, TreeError> {
        let kind = NodeKind::File {
            size_bytes: row.size_bytes,
            is_read_only: false,
        };
        let written = self.history(row.history)?.map(|known| known.durable_time);
        let modified = written.unwrap_or_default().max(row.created);
        self.node_of(&Place::Branch(row.history), kind, modified)
    }

    fn history(&self, history: HistoryId) -> Result<Option<HistorySummary>, TreeError> {
        let status = self.status.get().map_err(gone)?;
        let mut all = status.machines.iter().flat_map(|known| &known.histories);
        Ok(all.find(|known| known.history == history).cloned())
    }

    fn moment(&self, machine: MachineId, disk: DiskId, name: &str) -> Result<Node, TreeError> {
        let at = match name.strip_prefix("lsn-") {
            Some(lsn) => format!("lsn:{lsn}"),
            // Only times: a name of a point belongs below `points`.
            None if name.starts_with(|c: char| c.is_ascii_digit()) && name.contains(':') => {
                name.to_owned()
            }
            None => return Err(TreeError::NotFound),
        };
        let view = self.views.view(machine, disk, &at)?;
        let size_bytes = view.device.geometry().size_bytes;
        let (history, lsn, time) = (view.history, view.lsn, view.time);
        let moment = Moment {
            machine,
            disk,
            history,
            lsn,
            time,
            size_bytes,
        };
        self.read_only(&Place::Moment(moment), size_bytes, time)
    }

    fn named(&self, parent: &Place, name: &str) -> Result<Node, TreeError> {
        let status = || self.status.get().map_err(gone);
        match parent {
            Place::Root if name == MOUNTS_NAME => {
                self.directory(&Place::Mounts, Timestamp::default())
            }
            Place::Root => {
                let status = status()?;
                let found = status.machines.iter().find(|machine| machine.name == name);
                let machine = found.ok_or(TreeError::NotFound)?;
                self.directory(&Place::Machine(machine.machine), newest(machine))
            }
            Place::Machine(machine) => {
                let status = status()?;
                let machine = known(&status, *machine)?;
                let found = machine.disks.iter().find(|disk| disk.name == name);
                let disk = found.ok_or(TreeError::NotFound)?.disk;
                self.directory(&Place::Disk(machine.machine, disk), newest(machine))
            }
            Place::Disk(machine, disk) => {
                let place = match name {
                    "points" => Place::Points(*machine, *disk),
                    "at" => Place::At(*machine, *disk),
                    "branches" => Place::Branches(*machine, *disk),
                    _ => return Err(TreeError::NotFound),
                };
                self.place_node(&place)
            }
            Place::Points(machine, disk) => {
                let here = self.views.point_named(*machine, *disk, stem(name)?)?;
                self.point_node(*machine, *disk, &here)
            }
            Place::At(machine, disk) => self.moment(*machine, *disk, stem(name)?),
            Place::Branches(machine, disk) => {
                let found = self.branches.lookup(*machine, *disk, stem(name)?);
                self.place_node(&Place::Branch(found.ok_or(TreeError::NotFound)?))
            }
            Place::Mounts => self.mount_node(stem(name)?.parse().map_err(|_| TreeError::NotFound)?),
            Place::Point(..) | Place::Moment(_) | Place::Mount(_) | Place::Branch(_) => {
                Err(TreeError::NotADirectory)
            }
        }
    }

    fn place_node(&self, place: &Place) -> Result<Node, TreeError> {
        match place {
            Place::Root | Place::Mounts => self.directory(place, Timestamp::default()),
            Place::Machine(machine) => {
                let status = self.status.get().map_err(gone)?;
                self.directory(place, newest(known(&status, *machine)?))
            }
            Place::Disk(machine, disk)
            | Place::Points(machine, disk)
            | Place::At(machine, disk)
            | Place::Branches(machine, disk) => {
                let status = self.status.get().map_err(gone)?;
                let found = status_cache::disk(&status, *machine, *disk);
                let (machine, _) = found.ok_or(TreeError::NotFound)?;
                self.directory(place, newest(machine))
            }
            Place::Point(machine, disk, point) => {
                let here = self.views.point(*machine, *disk, *point)?;
                self.point_node(*machine, *disk, &here)
            }
            Place::Branch(history) => {
                let row = self.branches.row(*history).map_err(no_branch)?;
                self.branch_node(&row)
            }
            Place::Moment(moment) => self.read_only(place, moment.size_bytes, moment.time),
            Place::Mount(id) => self.mount_node(*id),
        }
    }

    fn place(&self, id: NodeId) -> Result<Place, TreeError> {
        self.nodes.lock().place(id).ok_or(TreeError::NotFound)
    }

    fn list_points(
        &self,
        machine: MachineId,
        disk: DiskId,
        after: u64,
        limit: usize,
    ) -> Result<Vec<ListedNode>, TreeError> {
        let mut after = PointId(after);
        loop {
            // A disk that is younger than a point has no state there, so that a page may be empty.
            let (page, last) = self
                .views
                .points(machine, disk, after, limit.min(POINTS_PAGE))?;
            let mut listed = Vec::with_capacity(page.len());
            for here in &page {
                listed.push(ListedNode {
                    name: OsString::from(format!("{}{SUFFIX}", here.point.name)),
                    node: self.point_node(machine, disk, here)?,
                    cursor: here.point.id.0,
                });
            }
            match last {
                Some(last) if listed.is_empty() && last > after => after = last,
                _ => return Ok(listed),
            }
        }
    }

    fn list_all(&self, place: &Place) -> Result<Vec<(String, Node)>, TreeError> {
        Ok(match place {
            Place::Root => {
                let status = self.status.get().map_err(gone)?;
                let nodes = status.machines.iter().map(|machine| {
                    let node = self.directory(&Place::Machine(machine.machine), newest(machine))?;
                    Ok((machine.name.clone(), node))
                });
                nodes.collect::<Result<_, TreeError>>()?
            }
            Place::Machine(machine) => {
                let status = self.status.get().map_err(gone)?;
                let machine = known(&status, *machine)?;
                let nodes = machine.disks.iter().map(|disk| {
                    let place = Place::Disk(machine.machine, disk.disk);
                    Ok((disk.name.clone(), self.directory(&place, newest(machine))?))
                });
                nodes.collect::<Result<_, TreeError>>()?
            }
            Place::Disk(machine, disk) => vec![
                (
                    "at".to_owned(),
                    self.place_node(&Place::At(*machine, *disk))?,
                ),
                (
                    "branches".to_owned(),
                    self.place_node(&Place::Branches(*machine, *disk))?,
                ),
                (
                    "points".to_owned(),
                    self.place_node(&Place::Points(*machine, *disk))?,
                ),
            ],
            Place::Mounts => {
                let mut ids: Vec<u64> = self.mounts.lock().keys().copied().collect();
                ids.sort_unstable();
                let nodes = ids
                    .into_iter()
                    .filter_map(|id| Some((format!("{id}{SUFFIX}"), self.mount_node(id).ok()?)));
                nodes.collect()
            }
            Place::Branches(machine, disk) => {
                let mut rows = self.branches.of_disk(*machine, *disk);
                rows.sort_unstable_by(|a, b| a.name.cmp(&b.name));
                let nodes = rows.iter().filter_map(|row| {
                    // One that is just being dropped is not shown.
                    Some((format!("{}{SUFFIX}", row.name), self.branch_node(row).ok()?))
                });
                nodes.collect()
            }
            Place::At(..) | Place::Points(..) => Vec::new(),
            Place::Point(..) | Place::Moment(_) | Place::Mount(_) | Place::Branch(_) => {
                return Err(TreeError::NotADirectory);
            }
        })
    }
}

impl Tree for DiskTree {
    fn lookup(&self, parent: NodeId, name: &OsStr) -> Result<Node, TreeError> {
        let parent = self.place(parent)?;
        self.named(&parent, name.to_str().ok_or(TreeError::NotFound)?)
    }

    fn node(&self, id: NodeId) -> Result<Node, TreeError> {
        self.place_node(&self.place(id)?)
    }

    fn list(
        &self,
        directory: NodeId,
        after: u64,
        limit: usize,
    ) -> Result<Vec<ListedNode>, TreeError> {
        let place = self.place(directory)?;
        if let Place::Points(machine, disk) = place {
            return self.list_points(machine, disk, after, limit);
        }
        let all = self.list_all(&place)?;
        let skipped = usize::try_from(after).unwrap_or(usize::MAX);
        let listed = all.into_iter().zip(1u64..).skip(skipped).take(limit);
        let node = |((name, node), cursor)| ListedNode {
            name: OsString::from(name),
            node,
            cursor,
        };
        Ok(listed.map(node).collect())
    }

    fn open(&self, file: NodeId, want_write: bool) -> Result<Arc<dyn BlockDevice>, TreeError> {
        let place = self.place(file)?;
        match place {
            Place::Mount(id) => {
                let device = self
                    .mounts
                    .lock()
                    .get(&id)
                    .cloned()
                    .ok_or(TreeError::NotFound)?;
                if want_write && device.geometry().is_read_only {
                    return Err(TreeError::ReadOnly);
                }
                Ok(device)
            }
            Place::Point(..) | Place::Moment(_) if want_write => Err(TreeError::ReadOnly),
            Place::Point(machine, disk, point) => {
                let point = self.views.point(machine, disk, point)?.point;
                Ok(self
                    .views
                    .view_at(machine, disk, point.history, point.lsn)?
                    .device)
            }
            Place::Branch(history) => {
                let using = self.branches.acquire(history).map_err(no_branch)?;
                let device = using.device();
                self.open.lock().entry(history).or_default().push(using);
                Ok(device)
            }
            Place::Moment(moment) => {
                let Moment {
                    machine,
                    disk,
                    history,
                    lsn,
                    ..
                } = moment;
                Ok(self.views.view_at(machine, disk, history, lsn)?.device)
            }
            _ => Err(TreeError::IsADirectory),
        }
    }

    fn close(&self, file: NodeId, device: Arc<dyn BlockDevice>) {
        drop(device);
        if let Ok(Place::Branch(history)) = self.place(file) {
            let mut open = self.open.lock();
            let using = open.get_mut(&history).and_then(Vec::pop);
            if open.get(&history).is_some_and(Vec::is_empty) {
                open.remove(&history);
            }
            drop(open);
            // The last one waits until all is durable; nothing is locked meanwhile.
            drop(using);
        }
    }

    fn attributes(&self, id: NodeId) -> Vec<(String, Vec<u8>)> {
        let named = |name: &str, value: String| (name.to_owned(), value.into_bytes());
        let place = self.place(id);
        let found = place.and_then(|place| match place {
            Place::Point(machine, disk, point) => {
                let here = self.views.point(machine, disk, point)?;
                let (point, epoch) = (here.point, Some(here.epoch));
                Ok((point.history, point.lsn, Some(point.kind), epoch))
            }
            Place::Moment(moment) => {
                let epoch = self.history(moment.history)?.map(|known| known.epoch);
                let kind = Some("moment".to_owned());
                Ok((moment.history, moment.lsn, kind, epoch))
            }
            Place::Branch(history) => {
                let known = self.history(history)?.ok_or(TreeError::NotFound)?;
                let kind = Some("branch".to_owned());
                // Of now: what the status says may be half a second old.
                let durable = self.branches.durable(history).map_err(no_branch)?;
                Ok((history, durable, kind, Some(known.epoch)))
            }
            _ => Err(TreeError::NotFound),
        });
        let Ok((history, lsn, kind, epoch)) = found else {
            return Vec::new();
        };
        let mut attributes = vec![
            named("history", history.to_string()),
            named("lsn", lsn.to_string()),
        ];
        attributes.extend(kind.map(|kind| named("kind", kind)));
        attributes.extend(epoch.map(|epoch| named("epoch", epoch.to_string())));
        attributes
    }

    fn forget(&self, id: NodeId) {
        self.nodes.lock().forget(id);
    }
}

fn known(
    status: &EngineStatus,
    machine: MachineId,
) -> Result<&crate::engine::MachineSummary, TreeError> {
    status_cache::machine(status, machine).ok_or(TreeError::NotFound)
}

fn newest(machine: &crate::engine::MachineSummary) -> Timestamp {
    machine
        .histories
        .iter()
        .map(|history| history.durable_time)
        .max()
        .unwrap_or_default()
}

fn no_branch(error: ApiError) -> TreeError {
    refused(&error)
}

fn stem(name: &str) -> Result<&str, TreeError> {
    name.strip_suffix(SUFFIX)
        .filter(|stem| !stem.is_empty())
        .ok_or(TreeError::NotFound)
}

//! The tree of files: `<machine>/<disk>/points/<name>.img`, `.../at/<time>.img`,
//! `.../at/lsn-<N>.img`, and `.mounts/<id>.img` for the mounts of this daemon.
//!
//! All of it is resolved by the engine when it is asked for. Directories below `at` list nothing:
//! every time and every LSN of the window is there.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::sync::Arc;

use afterimage_blockdev::{BlockDevice, Clock, DiskId, MachineId, PointId, Timestamp};
use afterimage_export::{ListedNode, Node, NodeId, NodeKind, Tree, TreeError};
use afterimage_protocol::rest::server::Point;
use parking_lot::Mutex;

use super::nodes::{Moment, Nodes, Place};
use super::status_cache::{self, StatusCache};
use super::views::{Views, gone, is_shown};
use crate::engine::{EngineHandle, EngineStatus};

/// Directory of the files behind mounts; hidden, since they are nobody else's.
pub(super) const MOUNTS_NAME: &str = ".mounts";
const SUFFIX: &str = ".img";
/// Sizes of points that are remembered; all are dropped when there are more.
const SIZES_MAX: usize = 64 * 1024;

pub(super) struct DiskTree {
    views: Views,
    status: StatusCache,
    nodes: Mutex<Nodes>,
    mounts: Mutex<HashMap<u64, Arc<dyn BlockDevice>>>,
    /// Sizes of a disk at points. They never change: a point is one cut for ever.
    sizes: Mutex<HashMap<(DiskId, PointId), u64>>,
}

impl DiskTree {
    pub(super) fn new(engine: EngineHandle, clock: Arc<dyn Clock>) -> Self {
        Self {
            status: StatusCache::new(engine.clone(), clock),
            views: Views::new(engine),
            nodes: Mutex::default(),
            mounts: Mutex::default(),
            sizes: Mutex::default(),
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
        point: &Point,
    ) -> Result<Node, TreeError> {
        let known = self.sizes.lock().get(&(disk, point.id)).copied();
        let size_bytes = match known {
            Some(size_bytes) => size_bytes,
            None => {
                let view = self
                    .views
                    .view_at(machine, disk, point.history, point.lsn)?;
                let size_bytes = view.device.geometry().size_bytes;
                let mut sizes = self.sizes.lock();
                if sizes.len() >= SIZES_MAX {
                    sizes.clear();
                }
                sizes.insert((disk, point.id), size_bytes);
                size_bytes
            }
        };
        self.read_only(
            &Place::Point(machine, disk, point.id),
            size_bytes,
            point.time,
        )
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
                    _ => return Err(TreeError::NotFound),
                };
                self.place_node(&place)
            }
            Place::Points(machine, disk) => {
                let point = self.views.point_named(*machine, stem(name)?)?;
                self.point_node(*machine, *disk, &point)
            }
            Place::At(machine, disk) => self.moment(*machine, *disk, stem(name)?),
            Place::Mounts => self.mount_node(stem(name)?.parse().map_err(|_| TreeError::NotFound)?),
            Place::Point(..) | Place::Moment(_) | Place::Mount(_) => Err(TreeError::NotADirectory),
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
            | Place::At(machine, disk) => {
                let status = self.status.get().map_err(gone)?;
                let found = status_cache::disk(&status, *machine, *disk);
                let (machine, _) = found.ok_or(TreeError::NotFound)?;
                self.directory(place, newest(machine))
            }
            Place::Point(machine, disk, point) => {
                let point = self.views.point(*machine, *point)?;
                self.point_node(*machine, *disk, &point)
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
            let page = self.views.points(machine, after, limit)?;
            let Some(last) = page.last() else {
                return Ok(Vec::new());
            };
            after = last.id;
            let mut listed = Vec::with_capacity(page.len());
            for point in page.iter().filter(|point| is_shown(point)) {
                // A disk that is younger than the point has no state there.
                if let Ok(node) = self.point_node(machine, disk, point) {
                    let name = OsString::from(format!("{}{SUFFIX}", point.name));
                    listed.push(ListedNode {
                        name,
                        node,
                        cursor: point.id.0,
                    });
                }
            }
            if !listed.is_empty() {
                return Ok(listed);
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
            Place::At(..) | Place::Points(..) => Vec::new(),
            Place::Point(..) | Place::Moment(_) | Place::Mount(_) => {
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
                let point = self.views.point(machine, point)?;
                Ok(self
                    .views
                    .view_at(machine, disk, point.history, point.lsn)?
                    .device)
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

    fn close(&self, _file: NodeId, device: Arc<dyn BlockDevice>) {
        drop(device);
    }

    fn attributes(&self, id: NodeId) -> Vec<(String, Vec<u8>)> {
        let named = |name: &str, value: String| (name.to_owned(), value.into_bytes());
        let (history, lsn, kind) = match self.place(id) {
            Ok(Place::Point(machine, _, point)) => match self.views.point(machine, point) {
                Ok(point) => (point.history, point.lsn, Some(point.kind)),
                Err(_) => return Vec::new(),
            },
            Ok(Place::Moment(moment)) => (moment.history, moment.lsn, None),
            _ => return Vec::new(),
        };
        let mut attributes = vec![
            named("history", history.to_string()),
            named("lsn", lsn.to_string()),
        ];
        attributes.extend(kind.map(|kind| named("kind", kind)));
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

fn stem(name: &str) -> Result<&str, TreeError> {
    name.strip_suffix(SUFFIX)
        .filter(|stem| !stem.is_empty())
        .ok_or(TreeError::NotFound)
}

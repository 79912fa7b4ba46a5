//! Names of the tree as numbers, and back.
//!
//! Invariants
//! * A number means the same for as long as the daemon runs.
//! * What is remembered is bounded by the disks and branches of the store and by what the kernel
//!   itself remembers: points are numbers already, and only names below `at` are kept until the
//!   kernel forgets them.

use std::collections::HashMap;

use afterimage_blockdev::{DiskId, HistoryId, Lsn, MachineId, PointId, Timestamp};
use afterimage_export::NodeId;

const KIND_SHIFT: u32 = 56;
const DISK_SHIFT: u32 = 36;
const POINT_MAX: u64 = (1 << DISK_SHIFT) - 1;
const INDEX_MAX: u64 = (1 << (KIND_SHIFT - DISK_SHIFT)) - 1;

/// What a number of the tree means.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Place {
    Root,
    Machine(MachineId),
    Disk(MachineId, DiskId),
    Points(MachineId, DiskId),
    At(MachineId, DiskId),
    Point(MachineId, DiskId, PointId),
    Moment(Moment),
    Mounts,
    Mount(u64),
    Branches(MachineId, DiskId),
    Branch(HistoryId),
}

/// A state that was named by a time or an LSN, and found.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct Moment {
    pub(super) machine: MachineId,
    pub(super) disk: DiskId,
    pub(super) history: HistoryId,
    pub(super) lsn: Lsn,
    pub(super) time: Timestamp,
    pub(super) size_bytes: u64,
}

/// Remembers what numbers mean.
#[derive(Default)]
pub(super) struct Nodes {
    machines: Register<MachineId>,
    disks: Register<(MachineId, DiskId)>,
    branches: Register<HistoryId>,
    moments: HashMap<u64, Moment>,
    moment_numbers: HashMap<Moment, u64>,
    moment_next: u64,
}

struct Register<T> {
    list: Vec<T>,
    index: HashMap<T, u64>,
}

impl<T> Default for Register<T> {
    fn default() -> Self {
        Self {
            list: Vec::new(),
            index: HashMap::new(),
        }
    }
}

impl<T: Copy + Eq + std::hash::Hash> Register<T> {
    fn number(&mut self, item: T) -> Option<u64> {
        if let Some(number) = self.index.get(&item) {
            return Some(*number);
        }
        let number = u64::try_from(self.list.len())
            .ok()
            .filter(|number| *number <= INDEX_MAX)?;
        self.list.push(item);
        self.index.insert(item, number);
        Some(number)
    }

    fn get(&self, number: u64) -> Option<T> {
        self.list.get(usize::try_from(number).ok()?).copied()
    }
}

fn pack(kind: u64, number: u64) -> NodeId {
    NodeId(kind << KIND_SHIFT | number)
}

impl Nodes {
    /// The number of a place; `None` when there are more disks or points than numbers.
    pub(super) fn id(&mut self, place: &Place) -> Option<NodeId> {
        Some(match place {
            Place::Root => NodeId::ROOT,
            Place::Machine(machine) => pack(1, self.machines.number(*machine)?),
            Place::Disk(machine, disk) => pack(2, self.disks.number((*machine, *disk))?),
            Place::Points(machine, disk) => pack(3, self.disks.number((*machine, *disk))?),
            Place::At(machine, disk) => pack(4, self.disks.number((*machine, *disk))?),
            Place::Point(machine, disk, point) => {
                let disk = self.disks.number((*machine, *disk))?;
                (point.0 <= POINT_MAX).then(|| pack(5, disk << DISK_SHIFT | point.0))?
            }
            Place::Moment(moment) => pack(6, self.moment(*moment)),
            Place::Mounts => pack(7, 0),
            Place::Mount(id) => pack(8, *id),
            Place::Branches(machine, disk) => pack(9, self.disks.number((*machine, *disk))?),
            Place::Branch(history) => pack(10, self.branches.number(*history)?),
        })
    }

    fn moment(&mut self, moment: Moment) -> u64 {
        if let Some(number) = self.moment_numbers.get(&moment) {
            return *number;
        }
        self.moment_next += 1;
        self.moment_numbers.insert(moment, self.moment_next);
        self.moments.insert(self.moment_next, moment);
        self.moment_next
    }

    /// What a number means; `None` when it was never given out, or forgotten.
    pub(super) fn place(&self, id: NodeId) -> Option<Place> {
        if id == NodeId::ROOT {
            return Some(Place::Root);
        }
        let number = id.0 & ((1 << KIND_SHIFT) - 1);
        let disk = || self.disks.get(number);
        Some(match id.0 >> KIND_SHIFT {
            1 => Place::Machine(self.machines.get(number)?),
            2 => disk().map(|(machine, disk)| Place::Disk(machine, disk))?,
            3 => disk().map(|(machine, disk)| Place::Points(machine, disk))?,
            4 => disk().map(|(machine, disk)| Place::At(machine, disk))?,
            5 => {
                let (machine, disk) = self.disks.get(number >> DISK_SHIFT)?;
                Place::Point(machine, disk, PointId(number & POINT_MAX))
            }
            6 => Place::Moment(*self.moments.get(&number)?),
            7 => Place::Mounts,
            8 => Place::Mount(number),
            9 => disk().map(|(machine, disk)| Place::Branches(machine, disk))?,
            10 => Place::Branch(self.branches.get(number)?),
            _ => return None,
        })
    }

    /// The kernel knows a number no longer.
    pub(super) fn forget(&mut self, id: NodeId) {
        if id.0 >> KIND_SHIFT == 6
            && let Some(moment) = self.moments.remove(&(id.0 & ((1 << KIND_SHIFT) - 1)))
        {
            self.moment_numbers.remove(&moment);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_place_survives_its_number_and_moments_are_forgotten() {
        let mut nodes = Nodes::default();
        let (machine, disk) = (MachineId([1; 16]), DiskId([2; 16]));
        let moment = Moment {
            machine,
            disk,
            history: HistoryId([3; 16]),
            lsn: Lsn(9),
            time: Timestamp(8),
            size_bytes: 7,
        };
        let places = [
            Place::Root,
            Place::Machine(machine),
            Place::Disk(machine, disk),
            Place::Points(machine, disk),
            Place::At(machine, disk),
            Place::Point(machine, disk, PointId(POINT_MAX)),
            Place::Moment(moment),
            Place::Mounts,
            Place::Mount(5),
            Place::Branches(machine, disk),
            Place::Branch(HistoryId([4; 16])),
        ];
        for place in places {
            let id = nodes.id(&place).unwrap();
            assert_eq!(nodes.id(&place), Some(id));
            assert_eq!(nodes.place(id), Some(place.clone()));
            nodes.forget(id);
            let is_forgotten = matches!(place, Place::Moment(_));
            assert_eq!(nodes.place(id).is_none(), is_forgotten);
        }
        assert_eq!(
            nodes.id(&Place::Point(machine, disk, PointId(POINT_MAX + 1))),
            None
        );
        assert_eq!(nodes.place(NodeId(11 << KIND_SHIFT)), None);
    }
}

//! Which LSNs of a disk can be shown, as ranges for people.

use afterimage_blockdev::{DiskId, HistoryId, Lsn};

use super::Engine;
use super::state::HistoryEntry;
use super::status::Reach;
use crate::manifest::BatchRecord;

impl Engine {
    /// The ranges of a history and of what it forked off, the oldest first.
    pub(super) fn reaches(&self, disk: DiskId, history: HistoryId) -> Vec<Reach> {
        let mut reaches = Vec::new();
        for (owner, entry, cap) in self.lineage(history, Lsn(u64::MAX)) {
            let last = cap.min(entry.durable);
            let mut own = Vec::new();
            if let Some(first) = self.first_shown(disk, entry) {
                add_whole(entry, owner, disk, (first.max(entry.floor), last), &mut own);
            }
            own.extend(reaches);
            reaches = own;
        }
        reaches
    }

    /// The first LSN of a history's own records at which a whole copy is visible.
    fn first_shown(&self, disk: DiskId, entry: &HistoryEntry) -> Option<Lsn> {
        let is_inherited = |(parent, fork)| self.copied_in_lineage(disk, parent, fork);
        match entry.parent {
            Some((parent, fork)) if is_inherited((parent, fork)) => Some(fork.next()),
            _ => entry.copied_at(disk),
        }
    }
}

/// Adds the parts of a range that lie in no batch of the disk.
fn add_whole(
    entry: &HistoryEntry,
    history: HistoryId,
    disk: DiskId,
    (first, last): (Lsn, Lsn),
    reaches: &mut Vec<Reach>,
) {
    let is_within = |batch: &&BatchRecord| batch.disks.contains(&disk) && batch.begin >= first;
    let mut batches: Vec<_> = entry.batches.iter().filter(is_within).collect();
    batches.sort_by_key(|batch| batch.begin);
    let mut from = first;
    for batch in batches {
        let before = Lsn(batch.begin.0.saturating_sub(1)).min(last);
        if from <= before {
            reaches.push(reach(entry, history, from, before));
        }
        from = if batch.end == Lsn::ZERO {
            Lsn(u64::MAX)
        } else {
            from.max(batch.end)
        };
    }
    if from <= last {
        reaches.push(reach(entry, history, from, last));
    }
}

fn reach(entry: &HistoryEntry, history: HistoryId, first: Lsn, last: Lsn) -> Reach {
    let time = |lsn| entry.time_of(lsn).unwrap_or(entry.durable_time);
    let (first_time, last_time) = (time(first), time(last));
    Reach {
        history,
        first,
        last,
        first_time,
        last_time,
    }
}

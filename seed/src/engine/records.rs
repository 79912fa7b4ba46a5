//! What a frame may say. Its hashes prove who wrote it, not that it makes sense: what the map
//! cannot hold is refused before it is durable, for then it would be too late.

use std::collections::BTreeSet;

use afterimage_blockdev::{DiskId, HistoryId, Lsn, MachineId};
use afterimage_cache::{Frame, RecordHeader, RecordKind};

use super::Engine;
use super::ingest::check_name;
use crate::entry::CELLS_MAX;
use crate::reference::At;

/// Largest disk, in bytes: as many cells as an entry can name.
pub(super) const DISK_BYTES_MAX: u64 = CELLS_MAX * 16384;
/// Disks of one batch; its record has no room for more.
const BATCH_DISKS_MAX: usize = 4096;
/// Batches that are kept of one history, each counted with its disks.
const BATCHES_MAX: usize = 262_144;
/// Disks of one machine.
pub(super) const DISKS_MAX: usize = 4096;
/// Points of one machine.
pub(super) const POINTS_MAX: usize = 250_000;

/// Says whether a disk can have a size.
pub(super) fn is_size(bytes: u64) -> bool {
    bytes > 0 && bytes.is_multiple_of(512) && bytes <= DISK_BYTES_MAX
}

/// The name of a point that a mark carries; empty when it cannot be one.
pub(super) fn mark_name(note: &[u8]) -> String {
    let name = core::str::from_utf8(note).ok();
    let is_legal =
        |name: &&str| check_name(name).is_ok() && matches!(name.parse::<At>(), Ok(At::Name(_)));
    name.filter(is_legal).unwrap_or_default().to_owned()
}

/// The disks that the note of a batch names, each once.
pub(super) fn batch_disks(note: &[u8]) -> Vec<DiskId> {
    let ids = note.as_chunks::<16>().0.iter().map(|id| DiskId(*id));
    let ids: BTreeSet<DiskId> = ids.take(BATCH_DISKS_MAX).collect();
    ids.into_iter().collect()
}

impl Engine {
    /// Why a frame of a machine cannot be taken.
    pub(super) fn refusal_of(
        &self,
        machine: MachineId,
        history: HistoryId,
        frame: &Frame,
    ) -> Option<String> {
        let mut batches = None;
        for record in frame.view().records() {
            let Ok((_, record)) = record else {
                return Some("a record cannot be read".to_owned());
            };
            let header = record.header;
            if let RecordKind::BatchBegin(_) = header.kind {
                let known = || self.histories.get(&history).map(|entry| &entry.batches);
                let count = || {
                    known()
                        .into_iter()
                        .flatten()
                        .map(|b| 1 + b.disks.len())
                        .sum()
                };
                let more = 1 + record.note().len() / 16;
                let sum: usize = *batches.get_or_insert_with(count) + more;
                batches = Some(sum);
                if sum > BATCHES_MAX {
                    return Some(format!("history {history} has too many batches"));
                }
            }
            if let Some(why) = self.refusal_of_record(machine, history, &header) {
                return Some(format!("the record of LSN {}: {why}", header.lsn));
            }
        }
        None
    }

    fn refusal_of_record(
        &self,
        machine: MachineId,
        history: HistoryId,
        header: &RecordHeader,
    ) -> Option<String> {
        if header.lsn == Lsn::ZERO && header.kind != RecordKind::Bulk {
            return Some("no record has this LSN".to_owned());
        }
        if !header.kind.is_of_disk() {
            return None;
        }
        let disk = header.disk;
        let known = self.disks.get(&disk);
        if known.is_none_or(|known| known.machine != machine) {
            return Some(format!("disk {disk} was not declared"));
        }
        if header.kind == RecordKind::Grow {
            let size = self.size_at(disk, history, Lsn(u64::MAX));
            let is_legal = is_size(header.length) && header.length >= size;
            let why = || format!("a disk of {size} bytes cannot grow to {}", header.length);
            return (!is_legal).then(why);
        }
        let end = header.offset.checked_add(header.length);
        let is_within = end.is_some_and(|end| end <= DISK_BYTES_MAX);
        (!is_within).then(|| format!("it ends beyond {DISK_BYTES_MAX} bytes"))
    }

    /// Takes over that disks grew. What is impossible is named, and does not count.
    pub(super) fn grow(&mut self, history: HistoryId, grown: Vec<(DiskId, Lsn, u64)>) {
        for (disk, lsn, size_bytes) in grown {
            let before = Lsn(lsn.0.saturating_sub(1));
            let size = self.size_at(disk, history, before);
            if !is_size(size_bytes) || size_bytes < size {
                self.note_damage(format!(
                    "record {lsn} of history {history} lets disk {disk} grow from {size} to \
                     {size_bytes} bytes, which cannot be; it is passed over"
                ));
                continue;
            }
            if let Some(disk) = self.disks.get_mut(&disk) {
                disk.sizes
                    .retain(|known| (known.0, known.1) != (history, lsn));
                disk.sizes.push((history, lsn, size_bytes));
            }
        }
    }
}

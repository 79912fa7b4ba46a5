//! Branches in a campaign: one request at a time, so that each has an LSN that is known.

use std::sync::Arc;

use afterimage_blockdev::{
    BlockDevice, BlockOp, DiskId, HistoryId, IoBuffer, Lsn, MachineId, Random,
};
use afterimage_seed::BranchDevice;

use super::Campaign;
use crate::store_model::content;
use crate::store_rig::StoreRig;

const SECTOR: u64 = 512;

/// One write of a branch.
#[derive(Clone)]
struct BranchWrite {
    offset: usize,
    data: Vec<u8>,
}

/// A branch and what was written to it, in order of LSN.
#[derive(Clone)]
pub(super) struct BranchRun {
    pub(super) machine: MachineId,
    pub(super) disk: DiskId,
    pub(super) fork: Lsn,
    /// What it began with.
    base: Arc<Vec<u8>>,
    writes: Vec<BranchWrite>,
    /// So many of them were completed before the last flush that completed.
    pub(super) flushed: usize,
    device: Option<Arc<BranchDevice>>,
}

impl core::fmt::Debug for BranchRun {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(
            f,
            "branch of {} at {}, {} flushed:",
            self.disk, self.fork, self.flushed
        )?;
        for write in &self.writes {
            write!(f, " {}+{}", write.offset, write.data.len())?;
        }
        Ok(())
    }
}

impl BranchRun {
    pub(super) fn new(
        machine: MachineId,
        disk: DiskId,
        fork: Lsn,
        base: Vec<u8>,
        device: Arc<BranchDevice>,
    ) -> Self {
        Self {
            machine,
            disk,
            fork,
            base: Arc::new(base),
            writes: Vec::new(),
            flushed: 0,
            device: Some(device),
        }
    }

    /// Its content at an LSN.
    pub(super) fn image(&self, lsn: Lsn) -> Vec<u8> {
        let mut image = self.base.to_vec();
        let count = usize::try_from(lsn.0.saturating_sub(self.fork.0)).expect("few writes");
        for write in self.writes.iter().take(count) {
            image[write.offset..write.offset + write.data.len()].copy_from_slice(&write.data);
        }
        image
    }

    /// Takes note of what a recovery kept; gives back how many writes went.
    pub(super) fn recovered(&mut self, durable: Lsn, seed: u64) -> usize {
        let kept = usize::try_from(durable.0 - self.fork.0).expect("few writes");
        let written = self.writes.len();
        assert!(
            (self.flushed..=written).contains(&kept),
            "seed {seed}: {kept} writes of a branch recovered, {} flushed, {written} written",
            self.flushed
        );
        self.writes.truncate(kept);
        self.flushed = kept;
        self.device = None;
        written - kept
    }

    pub(super) fn size(&self) -> usize {
        self.base.len()
    }
}

impl Campaign {
    /// Writes to a branch, reads it, or flushes it.
    pub(super) fn use_branch(&mut self, rig: &mut StoreRig) {
        let Some((history, device)) = self.some_device() else {
            return;
        };
        let count = 1 + self.random.index(4);
        for _ in 0..count {
            if !self.branch_write(rig, history, &device) {
                return;
            }
        }
        if self.random.chance(0.3) {
            self.branch_read(rig, history, &device);
        }
        if self.random.chance(0.5) {
            let written = self.known.branches[&history].writes.len();
            let Some(result) = rig.perform(&*device, BlockOp::Flush) else {
                return;
            };
            if result.is_ok() {
                let run = self
                    .known
                    .branches
                    .get_mut(&history)
                    .expect("a known branch");
                run.flushed = written;
                self.report.count("branch-flushed");
            } else {
                assert!(rig.failure.is_some(), "seed {}: a flush failed", self.seed);
            }
        }
    }

    fn some_device(&mut self) -> Option<(HistoryId, Arc<BranchDevice>)> {
        let open: Vec<_> = self
            .known
            .branches
            .iter()
            .filter(|(history, _)| !self.known.model.histories[*history].is_dropping)
            .filter_map(|(history, run)| Some((*history, Arc::clone(run.device.as_ref()?))))
            .collect();
        let place = self.random.index(open.len());
        open.into_iter().nth(place)
    }

    fn branch_write(
        &mut self,
        rig: &mut StoreRig,
        history: HistoryId,
        device: &Arc<BranchDevice>,
    ) -> bool {
        let run = &self.known.branches[&history];
        let size = run.size();
        let (offset, len) = some_range(&mut self.random, size);
        let mut data = vec![0; len];
        let is_zero = self.random.chance(0.2);
        if !is_zero {
            let stamp = self.random.next_u64() | 1;
            let blocks = len.div_ceil(4096);
            data.copy_from_slice(&content(&vec![stamp; blocks])[..len]);
        }
        let at = offset as u64;
        let is_fua = self.random.chance(0.2);
        let op = if is_zero {
            let length = len as u64;
            if self.random.chance(0.5) {
                BlockOp::Discard { offset: at, length }
            } else {
                BlockOp::WriteZeroes {
                    offset: at,
                    length,
                    may_unmap: true,
                }
            }
        } else {
            BlockOp::Write {
                offset: at,
                buffer: IoBuffer::copy_of(&data),
                fua: is_fua,
            }
        };
        // It may take effect although it never completes.
        let run = self
            .known
            .branches
            .get_mut(&history)
            .expect("a known branch");
        run.writes.push(BranchWrite { offset, data });
        let written = run.writes.len();
        let slot = StoreRig::submit(&**device, op);
        match rig.wait(&slot) {
            Some(Ok(_)) => {}
            Some(Err(error)) if rig.failure.is_none() => {
                // A part of a block could not be read, so nothing was written.
                assert!(self.is_faulty, "seed {}: {error}", self.seed);
                self.known
                    .branches
                    .get_mut(&history)
                    .expect("a known branch")
                    .writes
                    .pop();
                return false;
            }
            _ => {
                // It may yet take effect, so nothing more can be said of this one.
                self.known
                    .branches
                    .get_mut(&history)
                    .expect("a known branch")
                    .device = None;
                return false;
            }
        }
        if is_fua && !is_zero {
            // Records become durable in order, so all before it are too.
            self.known
                .branches
                .get_mut(&history)
                .expect("a known branch")
                .flushed = written;
        }
        true
    }

    fn branch_read(&mut self, rig: &mut StoreRig, history: HistoryId, device: &Arc<BranchDevice>) {
        let image = self.known.branches[&history].image(Lsn(u64::MAX));
        let (offset, len) = some_range(&mut self.random, image.len());
        let Some(result) = rig.read(&**device as &dyn BlockDevice, offset as u64, len) else {
            return;
        };
        match result {
            Ok(bytes) => assert!(
                bytes[..] == image[offset..offset + len],
                "seed {}: branch {history} reads wrong bytes at {offset}",
                self.seed
            ),
            Err(error) => {
                let is_expected = self.is_faulty || rig.failure.is_some();
                assert!(is_expected, "seed {}: {error}", self.seed);
            }
        }
    }
}

fn some_range(random: &mut Random, size: usize) -> (usize, usize) {
    let unit = if random.chance(0.5) { SECTOR } else { 4096 };
    let units = size as u64 / unit;
    let count = 1 + random.below(units.min(12));
    let first = random.below(units - count + 1);
    let to_usize = |value: u64| usize::try_from(value).expect("a small disk");
    (to_usize(first * unit), to_usize(count * unit))
}

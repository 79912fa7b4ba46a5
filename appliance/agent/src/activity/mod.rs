//! The activity log of a disk (design decision D11): which coarse regions a source may differ in
//! from what the appliance holds, after a death or a power loss.
//!
//! Invariants
//! * A region is marked durably before its first write is given to the source.
//! * It is unmarked only when no write to it is in flight, all its writes are acknowledged, a
//!   flush of the source that was begun after they completed has succeeded, and it is not tainted.
//! * A tainted region may differ although everything is acknowledged; only a finished resync
//!   clears it.
//! * No thread that carries data writes the file: waiting writes share one write and one sync of
//!   the worker.

mod file;
mod regions;
pub mod worker;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use afterimage_blockdev::{DiskId, Lsn};
use parking_lot::Mutex;

use crate::error::AgentError;
use crate::tap::ranges::Resume;
use file::{ActivityFile, Unusable};
use regions::Regions;
pub use regions::UnmarkPlan;
use worker::Bell;

/// Most regions of a disk.
const REGIONS_MAX: u64 = 65_536;
/// Smallest region, in bytes.
const REGION_BYTES_MIN: u64 = 1 << 20;

/// The region size of a disk: the smallest power of two, from 1 MiB, that makes at most 65,536.
#[must_use]
pub fn region_bytes(disk_bytes: u64) -> u64 {
    disk_bytes
        .div_ceil(REGIONS_MAX)
        .next_power_of_two()
        .max(REGION_BYTES_MIN)
}

/// See the module's text.
pub struct Activity {
    disk: DiskId,
    path: PathBuf,
    regions: Mutex<Regions>,
    file: Mutex<ActivityFile>,
    bell: Arc<Bell>,
    acknowledged: Arc<AtomicU64>,
    is_broken: AtomicBool,
}

/// How an activity log was found.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Opened {
    /// Regions that were marked, all of them tainted now.
    pub marked: usize,
    /// Why more is marked than was written to; empty when that is not so.
    pub reason: String,
}

impl Activity {
    /// Opens the log of a disk, or makes it. `is_new` says that the disk was never protected, so
    /// that a missing file means nothing is marked; otherwise it means that all is.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn open(
        path: &Path,
        disk: DiskId,
        disk_bytes: u64,
        is_new: bool,
        bell: Arc<Bell>,
        acknowledged: Arc<AtomicU64>,
    ) -> Result<(Arc<Self>, Opened), AgentError> {
        let wanted = region_bytes(disk_bytes);
        let count = usize::try_from(disk_bytes.div_ceil(wanted).max(1)).unwrap_or(usize::MAX);
        let mut opened = Opened::default();
        let found = if is_new {
            Err(String::new())
        } else {
            read_marks(path, disk, wanted, count)
        };
        let (marks, file, reason) = match found {
            Ok((marks, file, reason)) => (marks, file, reason),
            Err(_) if is_new => (vec![false; count], None, String::new()),
            Err(reason) => (vec![true; count], None, reason),
        };
        opened.reason = reason;
        opened.marked = marks.iter().filter(|is_marked| **is_marked).count();
        let regions = Regions::new(wanted, &marks);
        let file = match file {
            Some(file) => file,
            None => ActivityFile::create(path, disk, wanted, count, &regions.bits())
                .map_err(AgentError::file("write", path))?,
        };
        let this = Self {
            disk,
            path: path.to_owned(),
            regions: Mutex::new(regions),
            file: Mutex::new(file),
            bell,
            acknowledged,
            is_broken: AtomicBool::new(false),
        };
        Ok((Arc::new(this), opened))
    }

    /// The disk.
    #[must_use]
    pub fn disk(&self) -> DiskId {
        self.disk
    }

    /// A write to this range is about to be given to the source. Returns whether that may happen
    /// now; otherwise `who` resumes when all its regions are marked durably.
    pub fn begin<R: Resume + 'static>(&self, range: Range<u64>, who: &Arc<R>) -> bool {
        let may_go = self.regions.lock().begin(&range, || {
            let who: Arc<dyn Resume> = Arc::<R>::clone(who);
            who
        });
        if !may_go {
            self.bell.ring();
        }
        may_go
    }

    /// A write that was begun is over, and is in the log at `lsn` at the latest, if at all.
    pub fn end(&self, range: Range<u64>, lsn: Option<Lsn>) {
        self.regions.lock().end(&range, lsn);
    }

    /// The log lacks what the source has in this range, which is marked.
    pub fn taint(&self, range: &Range<u64>) {
        self.regions.lock().taint(range);
    }

    /// Taints every region that is marked.
    pub fn taint_marked(&self) {
        self.regions.lock().taint_marked();
    }

    /// Marks and taints a range that was never looked at. Durable after the worker's next round.
    pub fn taint_new(&self, range: &Range<u64>) {
        self.regions.lock().taint_new(range);
        self.bell.ring();
    }

    /// Marks and taints the whole disk. Durable after the worker's next round.
    pub fn taint_all(&self) {
        self.regions.lock().taint_all();
        self.bell.ring();
    }

    /// The tainted ranges, joined, in order, not beyond `disk_bytes`.
    #[must_use]
    pub fn tainted(&self, disk_bytes: u64) -> Vec<Range<u64>> {
        self.regions.lock().tainted(disk_bytes)
    }

    /// Says whether any region is tainted.
    #[must_use]
    pub fn is_tainted(&self) -> bool {
        self.regions.lock().is_tainted()
    }

    /// Counts taints; read before [`Activity::tainted`], it tells later taints from those listed.
    #[must_use]
    pub fn taints(&self) -> u64 {
        self.regions.lock().taints()
    }

    /// A resync of these ranges is over and acknowledged. What was tainted after `taints` stays.
    pub fn clear(&self, ranges: &[Range<u64>], taints: u64) {
        let mut regions = self.regions.lock();
        for range in ranges {
            regions.clear(range, taints);
        }
    }

    /// Marked bytes.
    #[must_use]
    pub fn marked_bytes(&self) -> u64 {
        self.regions.lock().marked_bytes()
    }

    /// Says whether the file can no longer be written, so that no bound can be promised.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.is_broken.load(Ordering::Relaxed)
    }

    /// Makes regions for a disk that grows, before anything is written to the new space.
    pub fn grow(&self, disk_bytes: u64) {
        let mut file = self.file.lock();
        let (bits, region_bytes) = {
            let mut regions = self.regions.lock();
            if !regions.grow(disk_bytes) {
                return;
            }
            (regions.bits(), regions.region_bytes())
        };
        let count = bits.len() * 8;
        if count <= file.regions_max() {
            return;
        }
        match ActivityFile::create(&self.path, self.disk, region_bytes, count, &bits) {
            Ok(new) => *file = new,
            Err(error) => {
                tracing::error!(disk = %self.disk, %error, "the activity log cannot be written");
                self.is_broken.store(true, Ordering::Relaxed);
            }
        }
    }

    /// Makes all wanted marks and unmarks durable and lets the waiting writes go.
    pub(crate) fn commit(&self) {
        // The file is held from before the bits are taken, so that older bits never follow newer.
        let mut file = self.file.lock();
        let Some(commit) = self.regions.lock().take_commit(self.is_broken()) else {
            return;
        };
        let result = self.write(&mut file, &commit.blocks, &commit.bits);
        if let Err(error) = &result {
            // The writes go on: refusing them would turn a full disk of ours into a failure of
            // theirs. What is lost is the bound of the next recheck, and that is shown.
            tracing::error!(disk = %self.disk, %error, "the activity log cannot be written");
        }
        self.is_broken.store(result.is_err(), Ordering::Relaxed);
        self.regions.lock().committed();
        drop(file);
        for who in commit.waiting {
            who.resume();
        }
    }

    fn write(&self, file: &mut ActivityFile, blocks: &[usize], bits: &[u8]) -> std::io::Result<()> {
        if self.is_broken() {
            let (region_bytes, regions) = (file.region_bytes(), bits.len() * 8);
            *file = ActivityFile::create(&self.path, self.disk, region_bytes, regions, bits)?;
            return Ok(());
        }
        for block in blocks {
            file.write_block(*block, bits)?;
        }
        if blocks.is_empty() {
            Ok(())
        } else {
            file.sync()
        }
    }

    /// Counts time in rounds of the worker.
    pub(crate) fn advance(&self) {
        self.regions.lock().advance();
    }

    /// The regions that a flush of the source, begun now, would let go: idle for `idle_ticks`, or
    /// the least recently written while more than `marked_bytes_max` is marked.
    #[must_use]
    pub fn plan_unmark(&self, idle_ticks: u64, marked_bytes_max: u64) -> UnmarkPlan {
        let acknowledged = Lsn(self.acknowledged.load(Ordering::Acquire));
        self.regions
            .lock()
            .plan_unmark(acknowledged, idle_ticks, marked_bytes_max)
    }

    /// The flush for this plan has succeeded.
    pub fn unmark(&self, plan: &UnmarkPlan) {
        self.regions.lock().unmark(plan);
    }
}

/// Reads the marks of a file; the file too when it can be used on.
fn read_marks(
    path: &Path,
    disk: DiskId,
    wanted: u64,
    count: usize,
) -> Result<(Vec<bool>, Option<ActivityFile>, String), String> {
    let (file, found) = ActivityFile::open(path, disk).map_err(|unusable| match unusable {
        Unusable::Io(error) => format!("the activity log cannot be read: {error}"),
        Unusable::Content(what) => format!("the activity log is not usable: {what}"),
    })?;
    let is_marked = |region: u64| {
        let byte = usize::try_from(region / 8)
            .ok()
            .and_then(|at| found.bits.get(at));
        byte.is_some_and(|byte| byte >> (region % 8) & 1 == 1)
    };
    let old = file.region_bytes();
    let marks = (0..count as u64).map(|region| {
        let first = region * wanted / old;
        let end = ((region + 1) * wanted).div_ceil(old);
        (first..end).any(is_marked)
    });
    let marks = marks.collect();
    let reason = match found.damaged_blocks {
        0 => String::new(),
        blocks => format!("{blocks} blocks of the activity log are damaged"),
    };
    let is_same = old == wanted && file.regions_max() >= count && found.damaged_blocks == 0;
    Ok((marks, is_same.then_some(file), reason))
}

#[cfg(test)]
mod tests;

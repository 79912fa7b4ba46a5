//! Works a batch off.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use afterimage_blockdev::{BLOCK_BYTES, BlockOp, BlockOutcome, CELL_BYTES, ExtentKind, Lsn, wait};
use afterimage_cache::bytes::is_all_zero;
use afterimage_cache::seal::content_tag;
use afterimage_cache::{RecordHeader, RecordKind};
use afterimage_protocol::message::COMPARE_BLOCKS_MAX;
use afterimage_protocol::sender::Question;

use super::ranges::{join, subtract, total};
use super::read::{read_locked, read_plain};
use super::{Begun, GivenUp, LOOK_AGAIN, plan};
use crate::machine::{Disk, Machine};
use crate::order::Draft;
use crate::pipeline::sealer::{Sealers, effort_for, level_for_cores, seal_bulk};
use crate::tap::Capture;

const BLOCK: u64 = BLOCK_BYTES as u64;
const CELL: u64 = CELL_BYTES as u64;
/// A block that a source cannot give is tried again so late.
const SOURCE_RETRY: Duration = Duration::from_secs(1);

const NEW_EPOCH: &str = "a new epoch began";

/// A question on its way.
struct Asked {
    number: u64,
    range: Range<u64>,
}

/// The state of one batch.
struct Batch {
    begun: Begun,
    /// What was compared or copied, with the count of taints before.
    settled: Vec<(Arc<Disk>, Vec<Range<u64>>, u64)>,
}

/// See the module's text.
pub(super) struct Copier {
    machine: Arc<Machine>,
    sealers: Sealers,
    rate: Rate,
}

impl Copier {
    pub(super) fn new(machine: &Arc<Machine>) -> Self {
        let rate = Rate::new(machine.config().replicate.rate_bytes_per_s);
        Self {
            machine: Arc::clone(machine),
            sealers: machine.sealers(),
            rate,
        }
    }

    /// Copies until every disk of the batch is equal, then ends the batch.
    pub(super) fn copy(&mut self, begun: Begun) -> Result<(), GivenUp> {
        let mut batch = Batch {
            begun,
            settled: Vec::new(),
        };
        let result = self.work(&mut batch);
        for id in &batch.begun.disks {
            if let Some(disk) = self.machine.disk(*id) {
                disk.state.lock().progress.is_running = false;
            }
        }
        self.machine.report_now();
        result
    }

    fn work(&mut self, batch: &mut Batch) -> Result<(), GivenUp> {
        let begun = &batch.begun;
        tracing::info!(batch = %begun.batch, disks = begun.disks.len(), "a copy begins");
        for id in batch.begun.disks.clone() {
            if let Some(disk) = self.machine.disk(id) {
                self.copy_disk(batch, &disk)?;
            }
        }
        loop {
            self.wait_for_bulk(batch)?;
            if !self.machine.order().is_flowing() {
                self.begin_again(batch)?;
            } else if let Some(disk) = self.tainted_since(batch) {
                self.compare_disk(batch, &disk)?;
            } else if let Some(end) = self.end(batch) {
                return self.finish(batch, end);
            }
        }
    }

    fn check(&self, batch: &Batch) -> Result<(), GivenUp> {
        if self.machine.is_stopping() {
            return Err(GivenUp("the agent stops"));
        }
        if self.machine.generation() != batch.begun.generation {
            return Err(GivenUp(NEW_EPOCH));
        }
        Ok(())
    }

    /// Waits until all bulk is durable.
    fn wait_for_bulk(&self, batch: &Batch) -> Result<(), GivenUp> {
        loop {
            let changes = self.machine.outbox().changes();
            self.check(batch)?;
            if self.machine.outbox().bulk_bytes() == 0 {
                return Ok(());
            }
            self.machine.outbox().wait(changes, LOOK_AGAIN);
        }
    }

    /// Waits until the record that begins the batch is durable. What is taken from a seed
    /// ranks there, so it must know of all that came before, and of nothing newer.
    fn wait_for_begin(&self, batch: &Batch) -> Result<(), GivenUp> {
        loop {
            let changes = self.machine.outbox().changes();
            self.check(batch)?;
            if self.machine.acknowledged() >= batch.begun.lsn {
                return Ok(());
            }
            self.machine.outbox().wait(changes, LOOK_AGAIN);
        }
    }

    /// The flow had stopped: another batch takes over, which includes what this one lacks.
    fn begin_again(&self, batch: &mut Batch) -> Result<(), GivenUp> {
        loop {
            let changes = self.machine.outbox().changes();
            self.check(batch)?;
            match plan::begin(&self.machine) {
                Ok(Some(begun)) => {
                    if begun.generation != batch.begun.generation {
                        return Err(GivenUp(NEW_EPOCH));
                    }
                    batch.begun.batch = begun.batch;
                    batch.begun.lsn = begun.lsn;
                    for disk in begun.disks {
                        if !batch.begun.disks.contains(&disk) {
                            batch.begun.disks.push(disk);
                        }
                    }
                    return Ok(());
                }
                Ok(None) => return Ok(()),
                Err(_) => self.machine.outbox().wait(changes, LOOK_AGAIN),
            }
        }
    }

    fn capture_of(disk: &Disk) -> Option<Arc<Capture>> {
        disk.tap
            .as_ref()
            .and_then(|tap| tap.captured_by())
            .map(Arc::clone)
    }

    /// Brings one disk over: marked regions by comparison, the rest of a first copy in full.
    fn copy_disk(&mut self, batch: &mut Batch, disk: &Arc<Disk>) -> Result<(), GivenUp> {
        let Some(capture) = Self::capture_of(disk) else {
            return Ok(());
        };
        let size = capture.source.geometry().size_bytes.next_multiple_of(BLOCK);
        let taints = capture.activity.taints();
        let tainted = capture.activity.tainted(size);
        let (is_copied, is_in_batch, done) = {
            let state = disk.state.lock();
            let answer = state.answer.as_ref();
            let is_in_batch = answer.is_some_and(|answer| answer.is_in_batch);
            let done = answer.map(|answer| answer.bulk_done.clone());
            let is_copied = disk.saved.lock().is_copied;
            (is_copied, is_in_batch, done.unwrap_or_default())
        };
        let (mut fresh, mut seeded) = (Vec::new(), Vec::new());
        if !is_copied {
            let blocks = |(first, count): (u64, u64)| first * BLOCK..(first + count) * BLOCK;
            let mut taken: Vec<_> = done.into_iter().map(blocks).collect();
            if !is_in_batch {
                // Nobody has compared it yet: it is what a seed holds.
                seeded = clipped(core::mem::take(&mut taken), &(0..size), &tainted);
                taken.clone_from(&seeded);
            }
            taken.extend(tainted.iter().cloned());
            fresh = subtract(&(0..size), &join(taken));
            // What passed before capture began must not be lost after it was copied.
            self.flush(batch, &capture)?;
            fresh = used(&capture, fresh);
        }
        self.begin_progress(disk, total(&tainted) + total(&seeded) + total(&fresh));
        self.compare(batch, disk, &capture, &tainted)?;
        if !seeded.is_empty() {
            self.wait_for_begin(batch)?;
            self.compare(batch, disk, &capture, &seeded)?;
        }
        for range in fresh {
            for chunk in self.chunks(&range) {
                self.send(batch, disk, &capture, &chunk, true)?;
                disk.state.lock().progress.done_bytes += chunk.end - chunk.start;
            }
        }
        batch.settled.push((Arc::clone(disk), tainted, taints));
        Ok(())
    }

    fn begin_progress(&self, disk: &Disk, total_bytes: u64) {
        let mut state = disk.state.lock();
        let progress = &mut state.progress;
        progress.is_running = true;
        progress.done_bytes = 0;
        progress.total_bytes = total_bytes;
        progress.since = Some(Instant::now());
        (progress.recheck_read_bytes, progress.recheck_sent_bytes) = (0, 0);
        drop(state);
        self.machine.report_now();
    }

    /// A disk of the batch, or another one, that was tainted while the batch went on.
    fn tainted_since(&self, batch: &Batch) -> Option<Arc<Disk>> {
        let is_new = |disk: &Arc<Disk>| {
            let Some(capture) = Self::capture_of(disk) else {
                return false;
            };
            let seen = batch
                .settled
                .iter()
                .rev()
                .find(|(other, ..)| other.id == disk.id);
            match seen {
                Some((_, _, taints)) => {
                    capture.activity.taints() > *taints && capture.activity.is_tainted()
                }
                None => batch.begun.disks.contains(&disk.id),
            }
        };
        self.machine.disks().into_iter().find(is_new)
    }

    fn compare_disk(&mut self, batch: &mut Batch, disk: &Arc<Disk>) -> Result<(), GivenUp> {
        if !disk.saved.lock().is_copied
            && !batch.settled.iter().any(|(other, ..)| other.id == disk.id)
        {
            return self.copy_disk(batch, disk);
        }
        let Some(capture) = Self::capture_of(disk) else {
            return Ok(());
        };
        let size = capture.source.geometry().size_bytes.next_multiple_of(BLOCK);
        let taints = capture.activity.taints();
        let tainted = capture.activity.tainted(size);
        disk.state.lock().progress.total_bytes += total(&tainted);
        self.compare(batch, disk, &capture, &tainted)?;
        batch.settled.push((Arc::clone(disk), tainted, taints));
        Ok(())
    }

    fn flush(&self, batch: &Batch, capture: &Capture) -> Result<(), GivenUp> {
        loop {
            self.check(batch)?;
            match wait::device(capture.source.as_ref(), BlockOp::Flush) {
                Ok(_) => return Ok(()),
                Err(error) => tracing::error!(%error, "the source cannot be flushed"),
            }
            self.machine
                .outbox()
                .wait(self.machine.outbox().changes(), SOURCE_RETRY);
        }
    }

    fn chunks(&self, range: &Range<u64>) -> Vec<Range<u64>> {
        chunks(range, self.machine.config().replicate.chunk_bytes)
    }

    /// Compares ranges by their tags, and sends what differs.
    fn compare(
        &mut self,
        batch: &Batch,
        disk: &Disk,
        capture: &Capture,
        ranges: &[Range<u64>],
    ) -> Result<(), GivenUp> {
        let mut asked: VecDeque<Asked> = VecDeque::new();
        let step = self.machine.config().replicate.chunk_bytes;
        let step = step.min(COMPARE_BLOCKS_MAX as u64 * BLOCK);
        for range in ranges.iter().flat_map(|range| chunks(range, step)) {
            while asked.len() >= self.machine.config().replicate.questions_max {
                self.take_answer(batch, disk, capture, &mut asked)?;
            }
            asked.push_back(self.ask(batch, disk, capture, range)?);
        }
        while !asked.is_empty() {
            self.take_answer(batch, disk, capture, &mut asked)?;
        }
        Ok(())
    }

    fn ask(
        &mut self,
        batch: &Batch,
        disk: &Disk,
        capture: &Capture,
        range: Range<u64>,
    ) -> Result<Asked, GivenUp> {
        let bytes = self.read(batch, || read_plain(capture, &range))?;
        let Some(key) = self.machine.tag_key() else {
            return Err(GivenUp("the tag key is not known"));
        };
        let tags = bytes
            .chunks_exact(BLOCK_BYTES)
            .map(|block| content_tag(&key, block))
            .collect();
        let first_block = range.start / BLOCK;
        let question = |number| Question {
            number,
            disk: disk.id,
            first_block,
            tags,
        };
        let number = self.machine.outbox().ask(question);
        let mut state = disk.state.lock();
        state.progress.done_bytes += range.end - range.start;
        state.progress.recheck_read_bytes += range.end - range.start;
        Ok(Asked { number, range })
    }

    fn take_answer(
        &mut self,
        batch: &Batch,
        disk: &Disk,
        capture: &Capture,
        asked: &mut VecDeque<Asked>,
    ) -> Result<(), GivenUp> {
        let Some(first) = asked.front() else {
            return Ok(());
        };
        let differs = loop {
            let changes = self.machine.outbox().changes();
            self.check(batch)?;
            if let Some(differs) = self.machine.outbox().take_answer(first.number) {
                break differs;
            }
            self.machine.outbox().wait(changes, LOOK_AGAIN);
        };
        let start = first.range.start;
        asked.pop_front();
        for range in runs(&differs, start) {
            self.send(batch, disk, capture, &range, false)?;
            disk.state.lock().progress.recheck_sent_bytes += range.end - range.start;
        }
        Ok(())
    }

    /// Reads from a source until it gives what is asked for.
    fn read<T>(
        &mut self,
        batch: &Batch,
        read: impl Fn() -> Result<T, afterimage_blockdev::BlockError>,
    ) -> Result<T, GivenUp> {
        loop {
            self.check(batch)?;
            match read() {
                Ok(read) => return Ok(read),
                Err(error) => tracing::error!(%error, "the source cannot be read"),
            }
            self.machine
                .outbox()
                .wait(self.machine.outbox().changes(), SOURCE_RETRY);
        }
    }

    /// Sends a range as bulk. Zero cells are left out when the replica is blank.
    fn send(
        &mut self,
        batch: &Batch,
        disk: &Disk,
        capture: &Capture,
        range: &Range<u64>,
        is_blank: bool,
    ) -> Result<(), GivenUp> {
        self.wait_for_window(batch)?;
        self.rate.spend(range.end - range.start);
        let read = self.read(batch, || read_locked(capture, range))?;
        let mut parts = vec![range.clone()];
        if is_blank {
            parts = without_zero_cells(&read.bytes, range.start);
        }
        let at = |offset: u64| usize::try_from(offset - range.start).expect("within a chunk");
        let record = |part: &Range<u64>| {
            let header = RecordHeader {
                kind: RecordKind::Bulk,
                lsn: read.lsn,
                previous: read.previous,
                time: self.machine.order().captured().1,
                disk: disk.id,
                offset: part.start,
                length: part.end - part.start,
                batch: batch.begun.batch,
                argument: 0,
            };
            (header, &read.bytes[at(part.start)..at(part.end)])
        };
        let records: Vec<_> = parts.iter().map(record).collect();
        if records.is_empty() {
            return Ok(());
        }
        let pipeline = &self.machine.config().pipeline;
        let level = level_for_cores(pipeline.compress_level_max);
        let waiting = self.machine.order().waiting_bytes();
        self.sealers
            .set_effort(effort_for(waiting, pipeline.captured_bytes_max, level));
        let identity = self.machine.order().identity();
        let frame = seal_bulk(&mut self.sealers, identity, records);
        self.machine
            .outbox()
            .push_bulk(batch.begun.generation, batch.begun.lsn, frame);
        Ok(())
    }

    fn wait_for_window(&self, batch: &Batch) -> Result<(), GivenUp> {
        let window = self.machine.config().replicate.window_bytes;
        loop {
            let changes = self.machine.outbox().changes();
            self.check(batch)?;
            if self.machine.outbox().bulk_bytes() < window {
                return Ok(());
            }
            self.machine.outbox().wait(changes, LOOK_AGAIN);
        }
    }

    /// Ends the batch in the order; `None` when nothing flows now.
    fn end(&self, batch: &Batch) -> Option<Lsn> {
        let draft = Draft::note(RecordKind::BatchEnd, batch.begun.batch, 0, Vec::new());
        self.machine.order().append([draft], || ())
    }

    /// Waits until the end is acknowledged, and clears what was tainted.
    fn finish(&self, batch: &Batch, end: Lsn) -> Result<(), GivenUp> {
        loop {
            let changes = self.machine.outbox().changes();
            self.check(batch)?;
            if self.machine.acknowledged() >= end {
                break;
            }
            self.machine.outbox().wait(changes, LOOK_AGAIN);
        }
        for (disk, ranges, taints) in &batch.settled {
            if let Some(capture) = Self::capture_of(disk) {
                capture.activity.clear(ranges, *taints);
            }
            self.machine.note_copied(disk);
        }
        self.machine.save_copied();
        tracing::info!(batch = %batch.begun.batch, "the copy is whole");
        Ok(())
    }
}

/// Cuts a range into chunks that begin at multiples of the chunk size.
fn chunks(range: &Range<u64>, step: u64) -> Vec<Range<u64>> {
    let mut chunks = Vec::new();
    let mut at = range.start;
    while at < range.end {
        let end = ((at / step + 1) * step).min(range.end);
        chunks.push(at..end);
        at = end;
    }
    chunks
}

/// What of some ranges lies within a whole, and not in what is taken already.
fn clipped(ranges: Vec<Range<u64>>, whole: &Range<u64>, taken: &[Range<u64>]) -> Vec<Range<u64>> {
    let within = ranges
        .into_iter()
        .map(|range| range.start..range.end.min(whole.end));
    let parts = join(within.collect());
    parts
        .iter()
        .flat_map(|part| subtract(part, taken))
        .collect()
}

/// The parts of ranges that may hold anything but zeroes, widened to cells.
fn used(capture: &Capture, ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    let size = capture.source.geometry().size_bytes;
    let mut used = Vec::new();
    for range in ranges {
        let unit = u64::from(capture.source.geometry().logical_block_bytes);
        let end = range.end.min(size) / unit * unit;
        let op = BlockOp::Extents {
            offset: range.start,
            length: end - range.start,
        };
        match wait::device(capture.source.as_ref(), op) {
            Ok(BlockOutcome::Extents(extents)) => {
                let data = extents
                    .iter()
                    .filter(|extent| extent.kind == ExtentKind::Data);
                used.extend(data.map(|extent| {
                    let start = (extent.offset / CELL * CELL).max(range.start);
                    let end = (extent.offset + extent.length).next_multiple_of(CELL);
                    start..end.min(range.end)
                }));
            }
            // It is no more than a hint.
            Ok(_) | Err(_) => used.push(range),
        }
    }
    join(used)
}

/// The runs of blocks that differ, as byte ranges.
fn runs(differs: &[bool], start: u64) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    for (at, _) in (start..)
        .step_by(BLOCK_BYTES)
        .zip(differs)
        .filter(|(_, differs)| **differs)
    {
        match runs.last_mut() {
            Some(run) if run.end == at => run.end = at + BLOCK,
            _ => runs.push(at..at + BLOCK),
        }
    }
    runs
}

/// The ranges of the cells that are not all zero.
fn without_zero_cells(bytes: &[u8], start: u64) -> Vec<Range<u64>> {
    let mut parts: Vec<Range<u64>> = Vec::new();
    let end = start + bytes.len() as u64;
    let mut rest = bytes;
    let mut at = start;
    while at < end {
        let next = ((at / CELL + 1) * CELL).min(end);
        let (cell, later) = rest.split_at(usize::try_from(next - at).expect("a cell"));
        rest = later;
        if !is_all_zero(cell) {
            match parts.last_mut() {
                Some(part) if part.end == at => part.end = next,
                _ => parts.push(at..next),
            }
        }
        at = next;
    }
    parts
}

/// Keeps reads of a copy below a rate.
struct Rate {
    bytes_per_s: u64,
    free_at: Instant,
}

impl Rate {
    fn new(bytes_per_s: u64) -> Self {
        Self {
            bytes_per_s,
            free_at: Instant::now(),
        }
    }

    fn spend(&mut self, bytes: u64) {
        if self.bytes_per_s == 0 {
            return;
        }
        let now = Instant::now();
        if self.free_at > now {
            std::thread::sleep(self.free_at - now);
        }
        let cost = Duration::from_nanos(bytes.saturating_mul(1_000_000_000) / self.bytes_per_s);
        self.free_at = self.free_at.max(now) + cost;
    }
}

#[cfg(test)]
mod tests;

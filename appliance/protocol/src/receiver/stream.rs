//! One stream of a connection.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::{
    AgentId, COMPARE_BLOCKS_MAX, DiskDescription, DiskId, Epoch, HistoryId, Lsn, MachineId,
    Refusal, RefusalCode, SourceReport, check_name, damaged, limit,
};
use afterimage_blockdev::ErrorClass;

/// Whose records a stream carries.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StreamIdentity {
    /// The machine.
    pub machine: MachineId,
    /// The history.
    pub history: HistoryId,
    /// Who makes the records.
    pub origin: AgentId,
    /// The writer's epoch.
    pub epoch: Epoch,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Phase {
    Opening,
    Open,
    Refused,
}

#[derive(Debug)]
pub(super) struct Stream {
    pub(super) identity: StreamIdentity,
    pub(super) phase: Phase,
    pub(super) acknowledged: Lsn,
    pub(super) outstanding_bytes: u64,
    /// Last LSN of the newest frame, and whether one came since the stream was opened.
    pub(super) last: Lsn,
    has_frame: bool,
    frames: VecDeque<(Lsn, u64)>,
    bulk: BTreeMap<u64, u64>,
    bulk_last: Option<u64>,
    question_last: Option<u64>,
    disks: BTreeSet<DiskId>,
    credit_bytes_max: u64,
}

impl Stream {
    pub(super) fn new(identity: StreamIdentity) -> Self {
        Self {
            identity,
            phase: Phase::Opening,
            acknowledged: Lsn::ZERO,
            outstanding_bytes: 0,
            last: Lsn::ZERO,
            has_frame: false,
            frames: VecDeque::new(),
            bulk: BTreeMap::new(),
            bulk_last: None,
            question_last: None,
            disks: BTreeSet::new(),
            credit_bytes_max: 0,
        }
    }

    pub(super) fn is_refused(&self) -> bool {
        self.phase == Phase::Refused
    }

    pub(super) fn open(&mut self, durable: Lsn, credit_bytes: u64) {
        self.phase = Phase::Open;
        self.acknowledged = durable;
        self.last = durable;
        self.credit_bytes_max = credit_bytes;
    }

    /// Ends the stream; gives the bytes that were outstanding.
    pub(super) fn refuse(&mut self) -> u64 {
        self.phase = Phase::Refused;
        self.frames.clear();
        self.bulk.clear();
        core::mem::take(&mut self.outstanding_bytes)
    }

    pub(super) fn declare(
        &mut self,
        description: &DiskDescription,
        disks_max: usize,
    ) -> Result<(), Refusal> {
        check_name(&description.name)?;
        let block = description.logical_block_bytes;
        let is_legal = matches!(block, 512 | 4096)
            && description.size_bytes > 0
            && description.size_bytes.is_multiple_of(u64::from(block))
            && !description.disk.is_nil();
        if !is_legal {
            return Err(damaged(format!(
                "disk {:?} of {} bytes in blocks of {block} makes no sense",
                description.name, description.size_bytes
            )));
        }
        self.disks.insert(description.disk);
        if self.disks.len() > disks_max {
            self.disks.remove(&description.disk);
            return Err(limit("disks in a stream", disks_max));
        }
        Ok(())
    }

    /// The first frame after an `Open` may begin below what is durable, since frames are not cut
    /// to where the last connection broke.
    pub(super) fn take_frame(&mut self, first: Lsn, last: Lsn, len: usize) -> Result<(), Refusal> {
        let rises = last > self.last && (first > self.last || !self.has_frame);
        if first > last || first == Lsn::ZERO || !rises {
            return Err(damaged(format!(
                "frame of LSN {first} to {last} does not follow LSN {}",
                self.last
            )));
        }
        let len = self.charge(len)?;
        self.last = last;
        self.has_frame = true;
        self.frames.push_back((last, len));
        Ok(())
    }

    pub(super) fn take_bulk(&mut self, number: u64, len: usize) -> Result<(), Refusal> {
        if self.bulk_last.is_some_and(|last| number <= last) {
            return Err(damaged(format!("bulk frame {number} comes late")));
        }
        let len = self.charge(len)?;
        self.bulk_last = Some(number);
        self.bulk.insert(number, len);
        Ok(())
    }

    fn charge(&mut self, len: usize) -> Result<u64, Refusal> {
        let len = u64::try_from(len).unwrap_or(u64::MAX);
        let after = self.outstanding_bytes.saturating_add(len);
        if self.outstanding_bytes > 0 && after > self.credit_bytes_max {
            return Err(Refusal {
                code: RefusalCode::Limit,
                class: ErrorClass::Refused,
                message: format!(
                    "{after} bytes are on their way, above the credit of {}",
                    self.credit_bytes_max
                ),
                hint: "this is an error of the sending program: report it".to_owned(),
            });
        }
        self.outstanding_bytes = after;
        Ok(len)
    }

    pub(super) fn take_question(
        &mut self,
        number: u64,
        disk: DiskId,
        first_block: u64,
        blocks: usize,
    ) -> Result<(), Refusal> {
        if self.question_last.is_some_and(|last| number <= last) {
            return Err(damaged(format!("question {number} comes late")));
        }
        if !self.disks.contains(&disk) {
            return Err(damaged(format!("disk {disk} was not declared")));
        }
        if blocks == 0 || blocks > COMPARE_BLOCKS_MAX {
            return Err(damaged(format!("a question about {blocks} blocks")));
        }
        let blocks = u64::try_from(blocks).unwrap_or(u64::MAX);
        if first_block.checked_add(blocks).is_none() {
            return Err(damaged("a question beyond the end of numbers"));
        }
        self.question_last = Some(number);
        Ok(())
    }

    pub(super) fn check_report(
        &self,
        report: &SourceReport,
        disks_max: usize,
    ) -> Result<(), Refusal> {
        if report.disks.len() > disks_max {
            return Err(limit("disks in a report", disks_max));
        }
        Ok(())
    }

    /// Counts what is durable as acknowledged; the number never falls.
    pub(super) fn settle(&mut self, durable: Lsn, credit_bytes: u64) -> u64 {
        self.acknowledged = self.acknowledged.max(durable);
        self.credit_bytes_max = self.credit_bytes_max.max(credit_bytes);
        let mut freed_bytes = 0;
        while let Some((last, len)) = self.frames.front().copied() {
            if last > self.acknowledged {
                break;
            }
            self.frames.pop_front();
            freed_bytes += len;
        }
        self.outstanding_bytes -= freed_bytes;
        freed_bytes
    }

    pub(super) fn settle_bulk(&mut self, numbers: &[u64]) -> u64 {
        let freed = numbers.iter().filter_map(|number| self.bulk.remove(number));
        let freed_bytes = freed.sum();
        self.outstanding_bytes -= freed_bytes;
        freed_bytes
    }
}

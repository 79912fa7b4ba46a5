//! Checks a frame: what must be in order, and what must match its hash.

use afterimage_blockdev::{DiskId, Lsn};

use super::{FrameHeader, FrameView, NAME};
use crate::error::Damage;
use crate::lanes::{LANES, Lanes, Message};
use crate::record::{RECORD_HEADER_BYTES, RecordHeader, RecordKind};
use crate::slot::{HashedHead, SlotView};

/// A slot whose content is not what was written, in a frame that is otherwise whole.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DamagedSlot {
    /// Its place among the slots of the frame.
    pub slot: u32,
    /// The record that it belongs to.
    pub lsn: Lsn,
    /// The disk that the record is about.
    pub disk: DiskId,
    /// What is wrong.
    pub damage: Damage,
}

impl FrameView<'_> {
    /// Checks everything: record order and counts, every slot's hash, the frame's hash, padding.
    ///
    /// # Errors
    /// [`Damage`].
    pub fn verify(&self) -> Result<(), Damage> {
        self.check(|slot| Err(slot.damage))
    }

    /// Checks the skeleton: record order and counts, headers, notes, the frame's hash. Slots whose
    /// content or padding is not what was written are named, and harm nothing else.
    ///
    /// # Errors
    /// [`Damage`] when something else is wrong.
    pub fn verify_skeleton(&self) -> Result<Vec<DamagedSlot>, Damage> {
        let mut damaged = Vec::new();
        self.check(|slot| {
            damaged.push(slot);
            Ok(())
        })?;
        Ok(damaged)
    }

    /// What the hash covers behind the header: record headers, notes and slot hashes.
    ///
    /// # Errors
    /// [`Damage`] when the structure is wrong.
    pub(crate) fn hashed_records(&self) -> Result<Vec<u8>, Damage> {
        let history = self.header.identity.history;
        let mut hashed = Vec::new();
        for item in self.records() {
            let (_, record) = item?;
            hashed.extend_from_slice(record.header_bytes);
            hashed.extend_from_slice(record.note());
            for slot in record.slots(history) {
                hashed.extend_from_slice(&slot?.2.header.hash);
            }
        }
        Ok(hashed)
    }

    /// What the hash of the slot at a place of the frame should be, given its bytes.
    pub(crate) fn right_slot_hash(&self, place: usize) -> Option<[u8; 32]> {
        let history = self.header.identity.history;
        for (range, record) in self.records().map_while(Result::ok) {
            let body = range.start + RECORD_HEADER_BYTES;
            for (at, context, slot) in record.slots(history).map_while(Result::ok) {
                if body + at == place {
                    return Some(slot.header.compute_hash(&context, slot.stored));
                }
            }
        }
        None
    }

    fn check(
        &self,
        mut report: impl FnMut(DamagedSlot) -> Result<(), Damage>,
    ) -> Result<(), Damage> {
        let history = self.header.identity.history;
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.header.encode_without_hash());
        let mut order = OrderCheck::new(&self.header);
        let mut slots = SlotCheck::new();
        for item in self.records() {
            let (_, record) = item?;
            order.next(&record.header)?;
            record.verify_header()?;
            record.verify_padding()?;
            hasher.update(record.header_bytes);
            hasher.update(record.note());
            for slot in record.slots(history) {
                let (_, context, slot) = slot?;
                hasher.update(&slot.header.hash);
                let (lsn, disk) = (record.header.lsn, record.header.disk);
                let head = slot.header.hashed_head(&context);
                slots.waiting.push((order.slots, lsn, disk, slot, head));
                if slots.waiting.len() == LANES {
                    slots.check(&mut report)?;
                }
                order.slots += 1;
            }
        }
        slots.check(&mut report)?;
        order.finish()?;
        if *hasher.finalize().as_bytes() != self.header.hash {
            return Err(Damage::Hash { structure: NAME });
        }
        Ok(())
    }
}

/// Checks slots some at a time.
struct SlotCheck<'a> {
    lanes: Lanes,
    waiting: Vec<(u32, Lsn, DiskId, SlotView<'a>, HashedHead)>,
}

impl SlotCheck<'_> {
    fn new() -> Self {
        Self {
            lanes: Lanes::new(),
            waiting: Vec::with_capacity(LANES),
        }
    }

    /// Checks what waits: its hashes, then its padding.
    fn check(
        &mut self,
        mut report: impl FnMut(DamagedSlot) -> Result<(), Damage>,
    ) -> Result<(), Damage> {
        let messages: Vec<Message<'_>> = self
            .waiting
            .iter()
            .map(|(.., slot, head)| Message {
                head,
                rest: slot.stored,
            })
            .collect();
        let mut hashes = [[0; 32]; LANES];
        self.lanes
            .hash(&messages, |place, hash| hashes[place] = hash);
        for ((number, lsn, disk, slot, _), hash) in self.waiting.drain(..).zip(hashes) {
            let is_right = hash == slot.header.hash;
            let checked = if is_right {
                slot.verify_padding()
            } else {
                Err(Damage::Hash { structure: "slot" })
            };
            if let Err(damage) = checked {
                report(DamagedSlot {
                    slot: number,
                    lsn,
                    disk,
                    damage,
                })?;
            }
        }
        Ok(())
    }
}

/// Checks that the records of a frame are in order.
struct OrderCheck {
    header: FrameHeader,
    last: Option<Lsn>,
    records: u32,
    slots: u32,
}

impl OrderCheck {
    fn new(header: &FrameHeader) -> Self {
        Self {
            header: *header,
            last: None,
            records: 0,
            slots: 0,
        }
    }

    fn next(&mut self, record: &RecordHeader) -> Result<(), Damage> {
        let wrong = Damage::Field {
            structure: NAME,
            field: "record order",
        };
        self.records += 1;
        if self.header.is_bulk != (record.kind == RecordKind::Bulk) {
            return Err(wrong);
        }
        let follows = match self.last {
            None => record.lsn == self.header.first,
            Some(last) if self.header.is_bulk => record.lsn >= last,
            Some(last) => record.lsn.0.checked_sub(1) == Some(last.0),
        };
        // An epoch starts a frame, so that the gap before it lies between frames.
        let is_late_start = record.kind == RecordKind::EpochStart && self.last.is_some();
        if !follows || is_late_start {
            return Err(wrong);
        }
        self.last = Some(record.lsn);
        Ok(())
    }

    fn finish(&self) -> Result<(), Damage> {
        let field = |field| Damage::Field {
            structure: NAME,
            field,
        };
        if self.last != Some(self.header.last) {
            return Err(field("last LSN"));
        }
        if self.slots != self.header.slot_count {
            return Err(field("slot count"));
        }
        if self.records != self.header.record_count {
            return Err(field("record count"));
        }
        Ok(())
    }
}

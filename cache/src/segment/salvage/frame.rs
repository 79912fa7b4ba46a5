//! One damaged frame: proves it whole, or keeps the records that are.

use core::ops::Range;
use std::collections::HashSet;

use afterimage_blockdev::Lsn;

use super::slots::{BadSlot, mend_slots};
use super::{Piece, SalvagedRecord, agrees};
use crate::bytes::{array, index, narrow, put, wide};
use crate::frame::{
    DamagedSlot, FRAME_HASH_AT, FRAME_HEADER_BYTES, Frame, FrameHeader, FrameIdentity, FrameView,
};
use crate::record::{RECORD_HEADER_BYTES, RecordHeader, RecordKind, RecordView};
use crate::slot::HASH_AT as SLOT_HASH_AT;

/// Where the identity stands in a frame's header.
const IDENTITY: Range<usize> = 16..72;

/// A record whose header and note match their check.
#[derive(Clone, Debug)]
pub(super) struct FoundRecord {
    /// All of it, padding included.
    pub(super) range: Range<usize>,
    /// Where its body ends, without padding.
    pub(super) body_end: usize,
    pub(super) header: RecordHeader,
    pub(super) slot_count: u16,
}

/// The record at a place of a frame, if one is whole there; its slots may not be.
pub(super) fn record_at(bytes: &[u8], at: usize) -> Option<FoundRecord> {
    let rest = bytes.get(at..)?;
    let (record, len) = RecordView::parse(rest).ok()?;
    record.verify_header().ok()?;
    let body = crate::bytes::get_u32(rest, 72)?;
    Some(FoundRecord {
        range: at..at + len,
        body_end: at + RECORD_HEADER_BYTES + index(body),
        header: record.header,
        slot_count: record.slot_count,
    })
}

/// What lies between a frame's header and its end, in order.
enum Part {
    Record(FoundRecord),
    Gap(Range<usize>),
}

fn parts(bytes: &[u8], header: Option<&FrameHeader>) -> Vec<Part> {
    let mut parts = Vec::new();
    let mut at = FRAME_HEADER_BYTES;
    let mut last: Option<Lsn> = None;
    // Slots hold what their writer chose; so a record behind a gap must also be in order.
    let is_in_order = |record: &FoundRecord, last: Option<Lsn>| {
        let lsn = record.header.lsn;
        last.is_none_or(|last| lsn >= last)
            && header.is_none_or(|header| (header.first..=header.last).contains(&lsn))
    };
    while at < bytes.len() {
        let found = |at| record_at(bytes, at).filter(|record| is_in_order(record, last));
        let start = at;
        let record = loop {
            match found(at) {
                Some(record) => break Some(record),
                None if at + 8 >= bytes.len() => break None,
                None => at += 8,
            }
        };
        let end = record
            .as_ref()
            .map_or(bytes.len(), |record| record.range.start);
        if end > start {
            parts.push(Part::Gap(start..end));
        }
        at = end;
        if let Some(record) = record {
            at = record.range.end;
            last = Some(record.header.lsn);
            parts.push(Part::Record(record));
        }
    }
    parts
}

/// Salvages the frame in a range of the segment. Returns it with the number of slots that it had,
/// as far as that is known. `None` when not even its identity is.
pub(super) fn salvage_frame(
    segment: &[u8],
    span: Range<usize>,
    first_slot: u32,
    seen: &HashSet<FrameIdentity>,
) -> Option<(Piece, Option<u32>)> {
    let offset = wide(span.start);
    let raw = &segment[span];
    if raw.len() < FRAME_HEADER_BYTES || !raw.len().is_multiple_of(8) {
        return None;
    }
    let header = FrameHeader::decode(raw)
        .ok()
        .filter(|header| header.frame_len() == raw.len());
    let parts = parts(raw, header.as_ref());
    let records: Vec<&FoundRecord> = parts
        .iter()
        .filter_map(|part| match part {
            Part::Record(record) => Some(record),
            Part::Gap(_) => None,
        })
        .collect();
    if records.len() == parts.len()
        && let Some((frame, damaged)) = prove(raw, header, &records, seen)
    {
        let slots = frame.header.slot_count;
        let piece = Piece::Whole {
            offset,
            first_slot,
            frame,
            damaged,
        };
        return Some((piece, Some(slots)));
    }
    let identity = identity_of(raw, header.as_ref(), &records, seen)?;
    let kept = keep_records(raw, offset, first_slot, header, identity, &parts);
    let is_empty = matches!(&kept.0, Piece::Part { intact, .. } if intact.is_empty());
    (header.is_some() || !is_empty).then_some(kept)
}

/// Tries headers until the frame's hash fits: the one that is read, the one that the records make
/// with the identity that is read, with each identity seen elsewhere, and with one byte changed.
fn prove(
    raw: &[u8],
    header: Option<FrameHeader>,
    records: &[&FoundRecord],
    seen: &HashSet<FrameIdentity>,
) -> Option<(Frame, Vec<DamagedSlot>)> {
    let made = make_header(raw, records)?;
    let read = header.into_iter().chain([made]);
    if let Some(found) = read
        .into_iter()
        .find_map(|read| try_header(raw, &read, records))
    {
        return Some(found);
    }
    let view = FrameView {
        header: made,
        bytes: raw,
    };
    let hashed = view.hashed_records().ok()?;
    let fits = |candidate: &FrameHeader| agrees(&candidate.hash_with(&hashed), &made.hash);
    let known = seen.iter().map(|identity| FrameHeader {
        identity: *identity,
        ..made
    });
    let right = known.into_iter().find(|known| fits(known)).or_else(|| {
        IDENTITY.into_iter().find_map(|place| {
            (0..=u8::MAX).find_map(|value| {
                let mut bytes = made.encode();
                bytes[place] = value;
                FrameHeader::decode(&bytes).ok().filter(|guess| fits(guess))
            })
        })
    })?;
    try_header(raw, &right, records)
}

/// The header that fits the records, with identity and hash as they are read.
fn make_header(raw: &[u8], records: &[&FoundRecord]) -> Option<FrameHeader> {
    let (first, last) = (records.first()?, records.last()?);
    let mut bytes = [0; FRAME_HEADER_BYTES];
    bytes.copy_from_slice(raw.get(..FRAME_HEADER_BYTES)?);
    let slots: u32 = records.iter().map(|r| u32::from(r.slot_count)).sum();
    let made = FrameHeader {
        identity: FrameHeader::identity_at(&bytes)?,
        first: first.header.lsn,
        last: last.header.lsn,
        is_bulk: first.header.kind == RecordKind::Bulk,
        record_count: narrow(records.len()),
        slot_count: slots,
        body_len: narrow(raw.len() - FRAME_HEADER_BYTES),
        hash: array(raw, FRAME_HASH_AT)?,
    };
    // What can be encoded can be read back.
    FrameHeader::decode(&made.encode()).ok()
}

fn try_header(
    raw: &[u8],
    header: &FrameHeader,
    records: &[&FoundRecord],
) -> Option<(Frame, Vec<DamagedSlot>)> {
    let history = header.identity.history;
    let mut bytes = raw.to_vec();
    put(&mut bytes, 0, &header.encode());
    let mut damaged = Vec::new();
    let mut slot = 0;
    for record in records {
        bytes[record.body_end..record.range.end].fill(0);
        for bad in mend_slots(&mut bytes, record, history)? {
            damaged.push((bad.range.start, named(slot, record, bad)));
        }
        slot += u32::from(record.slot_count);
    }
    if let Some(frame) = settle(&bytes, header) {
        return Some((frame, damaged.into_iter().map(|(_, slot)| slot).collect()));
    }
    // The hash in a slot's header may be what is damaged.
    let places: Vec<usize> = damaged.iter().map(|(at, _)| *at).collect();
    for at in places {
        let mut other = bytes.clone();
        let view = FrameView {
            header: *header,
            bytes: &bytes,
        };
        let right = view.right_slot_hash(at)?;
        put(&mut other, at + SLOT_HASH_AT, &right);
        if let Some(frame) = settle(&other, header) {
            return Some((frame, damaged.into_iter().map(|(_, slot)| slot).collect()));
        }
    }
    None
}

/// The frame, when its hash is right or only damaged itself.
fn settle(bytes: &[u8], header: &FrameHeader) -> Option<Frame> {
    let mut header = *header;
    let view = FrameView { header, bytes };
    let right = header.hash_with(&view.hashed_records().ok()?);
    if !agrees(&right, &header.hash) {
        return None;
    }
    header.hash = right;
    let mut bytes = bytes.to_vec();
    put(&mut bytes, 0, &header.encode());
    let view = FrameView {
        header,
        bytes: &bytes,
    };
    view.verify_skeleton().ok()?;
    Some(Frame { header, bytes })
}

fn named(first: u32, record: &FoundRecord, bad: BadSlot) -> DamagedSlot {
    DamagedSlot {
        slot: first + bad.place,
        lsn: record.header.lsn,
        disk: record.header.disk,
        damage: bad.damage,
    }
}

/// Whose records these are: the header's word when it is known from elsewhere; else the identity
/// seen elsewhere in whose history a slot verifies; else the header's, which nothing contradicts.
fn identity_of(
    raw: &[u8],
    header: Option<&FrameHeader>,
    records: &[&FoundRecord],
    seen: &HashSet<FrameIdentity>,
) -> Option<FrameIdentity> {
    let verifies = |identity: &FrameIdentity| {
        records.iter().any(|record| {
            let Ok((view, _)) = RecordView::parse(&raw[record.range.clone()]) else {
                return false;
            };
            view.slots(identity.history)
                .map_while(Result::ok)
                .any(|(_, context, slot)| slot.verify(&context).is_ok())
        })
    };
    let own = header.map(|header| header.identity);
    if let Some(own) = own.filter(|own| seen.contains(own)) {
        return Some(own);
    }
    let fitting: Vec<_> = seen.iter().filter(|identity| verifies(identity)).collect();
    match fitting.as_slice() {
        [only] => Some(**only),
        [] => own,
        // Two of them cannot be told apart.
        _ => None,
    }
}

/// Keeps the records that are whole, each with the number of its first slot.
fn keep_records(
    raw: &[u8],
    offset: u64,
    first_slot: u32,
    header: Option<FrameHeader>,
    identity: FrameIdentity,
    parts: &[Part],
) -> (Piece, Option<u32>) {
    let mut bytes = raw.to_vec();
    let counts = slot_counts(raw, header.as_ref(), parts);
    let mut kept = Kept::default();
    let mut slot = Some(0u32);
    for (part, count) in parts.iter().zip(counts) {
        if let (Part::Record(record), Some(first)) = (part, slot) {
            bytes[record.body_end..record.range.end].fill(0);
            let bad = mend_slots(&mut bytes, record, identity.history);
            // Without the frame's header a record is only known to be of this history by a slot.
            let is_known =
                |bad: &Vec<BadSlot>| header.is_some() || bad.len() < usize::from(record.slot_count);
            if let Some(bad) = bad.filter(is_known) {
                let named = bad.into_iter().map(|bad| named(first, record, bad));
                kept.damaged.extend(named);
                kept.lsns.push(record.header.lsn);
                kept.intact.push(SalvagedRecord {
                    range: record.range.clone(),
                    first_slot: first_slot.saturating_add(first),
                });
            }
        }
        slot = slot.and_then(|slot| slot.checked_add(count?));
    }
    let lost = lost_lsns(header.as_ref(), parts, &kept.lsns);
    let piece = Piece::Part {
        offset,
        first_slot,
        identity,
        bytes,
        intact: kept.intact,
        lost,
        damaged: kept.damaged,
    };
    (piece, header.map(|header| header.slot_count).or(slot))
}

#[derive(Default)]
struct Kept {
    intact: Vec<SalvagedRecord>,
    lsns: Vec<Lsn>,
    damaged: Vec<DamagedSlot>,
}

/// How many slots each part has: a single gap has what the header says beyond the records; of
/// several gaps, each what can be counted in it.
fn slot_counts(raw: &[u8], header: Option<&FrameHeader>, parts: &[Part]) -> Vec<Option<u32>> {
    let known: u32 = parts
        .iter()
        .map(|part| match part {
            Part::Record(record) => u32::from(record.slot_count),
            Part::Gap(_) => 0,
        })
        .sum();
    let gaps = parts.iter().filter(|p| matches!(p, Part::Gap(_))).count();
    let rest = header.and_then(|header| header.slot_count.checked_sub(known));
    let count = |part: &Part| match part {
        Part::Record(record) => Some(u32::from(record.slot_count)),
        Part::Gap(_) if gaps == 1 => rest,
        Part::Gap(range) => count_slots(raw, range.clone()),
    };
    parts.iter().map(count).collect()
}

/// Counts the slots of one record whose header is lost; `None` unless they fill the gap.
fn count_slots(raw: &[u8], range: Range<usize>) -> Option<u32> {
    let mut at = range.start + RECORD_HEADER_BYTES;
    let mut count = 0;
    while at < range.end {
        let slot = crate::slot::SlotView::parse(&raw[at..range.end]).ok()?;
        at += slot.bytes.len();
        count += 1;
    }
    (at == range.end).then_some(count)
}

/// LSNs of the records that are not kept. In a bulk frame they are not unique: one is named for
/// each gap.
fn lost_lsns(header: Option<&FrameHeader>, parts: &[Part], kept: &[Lsn]) -> Vec<Lsn> {
    let mut lost = Vec::new();
    let mut last = header
        .and_then(|header| header.first.0.checked_sub(1))
        .map(Lsn);
    let is_bulk = header.is_some_and(|header| header.is_bulk);
    for (place, part) in parts.iter().enumerate() {
        match part {
            Part::Record(record) => {
                if !kept.contains(&record.header.lsn) {
                    lost.push(record.header.lsn);
                }
                last = Some(record.header.lsn);
            }
            Part::Gap(range) => {
                let next = parts[place + 1..].iter().find_map(|part| match part {
                    Part::Record(record) => Some(record.header.lsn),
                    Part::Gap(_) => None,
                });
                let end = next.or(header.map(|header| header.last.next()));
                let (Some(after), Some(end)) = (last, end) else {
                    continue;
                };
                if is_bulk {
                    lost.push(after.max(header.map_or(after, |header| header.first)));
                    continue;
                }
                let most = wide(range.len().div_ceil(RECORD_HEADER_BYTES));
                let numbers = (after.0 + 1..end.0).map(Lsn);
                lost.extend(numbers.take(usize::try_from(most).unwrap_or(0)));
            }
        }
    }
    lost
}

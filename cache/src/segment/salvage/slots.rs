//! Tells good slots of a record from bad ones, and finds the good ones behind a bad one.

use core::ops::Range;

use afterimage_blockdev::HistoryId;

use super::frame::FoundRecord;
use crate::bytes::{narrow, put};
use crate::error::Damage;
use crate::record::{RECORD_HEADER_BYTES, cells};
use crate::slot::{
    CIPHER_TAG_BYTES, Codec, HASH_AT, SLOT_BYTES_MAX, SLOT_HEADER_BYTES, SlotContext, SlotView,
    TAG_BYTES,
};

/// What is wrong with one slot of a record.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct BadSlot {
    /// Its place within the record.
    pub(super) place: u32,
    /// Where it lies in the frame's bytes.
    pub(super) range: Range<usize>,
    pub(super) damage: Damage,
}

/// Checks the slots of a record in `bytes`, and mends headers whose lengths are wrong, so that the
/// structure can be walked again. `None` when the slots cannot be told from each other.
pub(super) fn mend_slots(
    bytes: &mut [u8],
    record: &FoundRecord,
    history: HistoryId,
) -> Option<Vec<BadSlot>> {
    if record.slot_count == 0 {
        return Some(Vec::new());
    }
    let header = &record.header;
    let mut contexts = cells(header.offset, header.length)
        .take(usize::from(record.slot_count))
        .map(|(cell, mask)| SlotContext::uniform(header.disk, history, cell, mask, header.lsn))
        .peekable();
    let mut bad = Vec::new();
    let mut at = record.range.start + RECORD_HEADER_BYTES;
    let end = record.body_end;
    let mut place = 0;
    while let Some(context) = contexts.next() {
        let next = contexts.peek();
        let (range, damage) = match check(bytes, at..end, &context) {
            (Some(slot_end), None) => (at..slot_end, None),
            (parsed, Some(damage)) => {
                let slot_end = parsed
                    .filter(|slot_end| is_structured(bytes, *slot_end..end, next))
                    .or_else(|| mend(bytes, at..end, &context, next))?;
                (at..slot_end, Some(damage))
            }
            (None, None) => return None,
        };
        at = range.end;
        if let Some(damage) = damage {
            bad.push(BadSlot {
                place,
                range,
                damage,
            });
        }
        place += 1;
    }
    (at == end).then_some(bad)
}

/// The end of the slot when its structure is right, and what is wrong, if anything is.
fn check(
    bytes: &[u8],
    range: Range<usize>,
    context: &SlotContext,
) -> (Option<usize>, Option<Damage>) {
    let Some(rest) = bytes.get(range.clone()) else {
        let structure = "slot";
        return (None, Some(Damage::Short { structure }));
    };
    match SlotView::parse(rest) {
        Err(damage) => (None, Some(damage)),
        Ok(slot) if slot.header.mask != context.mask => {
            let (structure, field) = ("slot", "block mask");
            (None, Some(Damage::Field { structure, field }))
        }
        Ok(slot) => {
            let checked = slot.verify(context).and_then(|()| slot.verify_padding());
            (Some(range.start + slot.bytes.len()), checked.err())
        }
    }
}

/// Says whether something with the structure of the next slot is here, or the record ends.
fn is_structured(bytes: &[u8], range: Range<usize>, next: Option<&SlotContext>) -> bool {
    match next {
        None => range.is_empty(),
        Some(next) => check(bytes, range, next).0.is_some(),
    }
}

/// Says whether the next slot, a good one, begins here, or the record ends.
fn is_followed(bytes: &[u8], range: Range<usize>, next: Option<&SlotContext>) -> bool {
    match next {
        None => range.is_empty(),
        Some(next) => matches!(check(bytes, range, next), (Some(_), None)),
    }
}

/// Finds the next good slot and gives the bad one before it a header of that length: the one that
/// its hash proves, if there is one.
fn mend(
    bytes: &mut [u8],
    range: Range<usize>,
    context: &SlotContext,
    next: Option<&SlotContext>,
) -> Option<usize> {
    let first = range.start + SLOT_HEADER_BYTES + TAG_BYTES;
    let last = range.end.min(range.start + SLOT_BYTES_MAX);
    let end = if next.is_none() {
        range.end
    } else {
        (first..=last)
            .step_by(8)
            .find(|end| is_followed(bytes, *end..range.end, next))?
    };
    let slot = bytes.get_mut(range.start..end)?;
    let original: [u8; HASH_AT] = slot.get(..HASH_AT)?.try_into().ok()?;
    let mut fallback = None;
    for head in guesses(&original, slot.len(), context) {
        put(slot, 0, &head);
        let Ok(view) = SlotView::parse(slot) else {
            continue;
        };
        if view.bytes.len() != slot.len() || view.header.mask != context.mask {
            continue;
        }
        if view.verify(context).is_ok() {
            return Some(end);
        }
        fallback.get_or_insert(head);
    }
    put(slot, 0, fallback.as_ref().unwrap_or(&original));
    fallback.map(|_| end)
}

/// Headers that a slot of so many bytes could have had.
fn guesses(
    original: &[u8; HASH_AT],
    slot_len: usize,
    context: &SlotContext,
) -> impl Iterator<Item = [u8; HASH_AT]> {
    let blocks = context.mask.count_ones() as usize;
    let header_len = SLOT_HEADER_BYTES + blocks * TAG_BYTES;
    let plain = blocks * afterimage_blockdev::BLOCK_BYTES;
    let mut base = *original;
    base[1] = narrow(blocks).to_le_bytes()[0];
    base[2] = context.mask;
    base[3] = 0;
    put(&mut base, 12, &narrow(plain).to_le_bytes());
    let most = slot_len.saturating_sub(header_len);
    let lengths = [most]
        .into_iter()
        .chain((1..8).map(move |padding| most.saturating_sub(padding)));
    let cipher_lengths = [plain, plain + CIPHER_TAG_BYTES];
    let read = core::iter::once(base);
    let codecs = [Codec::Zstd, Codec::Raw, Codec::Zero];
    let made = lengths.flat_map(move |stored| {
        codecs.into_iter().filter_map(move |codec| {
            let is_legal = match codec {
                Codec::Zero => stored == 0,
                Codec::Raw => cipher_lengths.contains(&stored),
                Codec::Zstd => stored > 0,
            };
            let mut head = base;
            head[0] = codec.code();
            put(&mut head, 4, &narrow(stored).to_le_bytes());
            is_legal.then_some(head)
        })
    });
    read.chain(made)
}

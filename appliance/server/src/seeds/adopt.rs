//! Takes blocks from a seed that a source has too.

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

use afterimage_blockdev::{BLOCK_BYTES, DiskId, SystemEntropy, Timestamp};
use afterimage_bulk::BlockSource;
use afterimage_cache::seal::content_tag;
use afterimage_cache::{
    Effort, Frame, FrameBuilder, FrameIdentity, RecordHeader, RecordKind, Sealer,
};
use afterimage_protocol::receiver::StreamIdentity;

use super::registry::{Active, Begun, Seeds};
use crate::engine::{Command, EngineHandle, StreamKey};
use crate::ingest::EventSlot;

const BLOCK: u64 = BLOCK_BYTES as u64;
/// Plain bytes of a record.
const RECORD_BYTES: usize = 1 << 20;

/// A question of a source.
pub(crate) struct Asked {
    pub(crate) key: StreamKey,
    pub(crate) identity: StreamIdentity,
    pub(crate) disk: DiskId,
    pub(crate) first_block: u64,
    pub(crate) tags: Vec<[u8; 16]>,
    pub(crate) time: Timestamp,
}

/// Blocks that were found in the seed, ready to be stored.
struct Found {
    frames: Vec<Frame>,
    /// Places within the question.
    blocks: Vec<usize>,
}

impl Asked {
    /// Stores what of the blocks that differ the seed has, and clears them in `differs` once that
    /// is durable. What cannot be taken differs still: the source sends it.
    pub(crate) async fn take(
        self,
        seeds: &Seeds,
        engine: &EngineHandle,
        slot: &Weak<EventSlot>,
        differs: &mut [bool],
    ) {
        let active = seeds.active(self.identity.machine, self.disk);
        let begun = active.as_ref().and_then(|active| active.begun);
        let begun = begun.filter(|begun| begun.history == self.identity.history);
        let (Some(active), Some(begun)) = (active, begun) else {
            return;
        };
        let key = self.key;
        let ready = Arc::clone(&active.ready);
        let wanted = differs.to_vec();
        let look = move || find(&active, begun, &self, &wanted);
        let Ok(found) = tokio::task::spawn_blocking(look).await else {
            return;
        };
        let mut waiting = Vec::with_capacity(found.frames.len());
        for frame in found.frames {
            let Some(slot) = slot.upgrade() else { return };
            let (number, durable) = slot.expect_seeded();
            drop(slot);
            let bulk = Command::Bulk(key, number, frame);
            if engine.send(bulk).await.is_err() {
                return;
            }
            waiting.push(durable);
        }
        for durable in waiting {
            // When the stream is over, nobody waits for an answer any more.
            if durable.await.is_err() {
                return;
            }
        }
        for block in &found.blocks {
            if let Some(differs) = differs.get_mut(*block) {
                *differs = false;
            }
        }
        let bytes = found.blocks.len() as u64 * BLOCK;
        ready.taken_bytes.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// Looks for the blocks that differ, and seals those that the seed has.
fn find(active: &Active, begun: Begun, asked: &Asked, differs: &[bool]) -> Found {
    let mut found = Found {
        frames: Vec::new(),
        blocks: Vec::new(),
    };
    let mut sealer = Sealer::new(Some(&active.key), active.tag_key.clone(), &SystemEntropy);
    sealer.set_effort(Effort::Zstd(1));
    for run in runs(differs) {
        let Some(bytes) = read(active, asked.first_block + run.start as u64, run.len()) else {
            continue;
        };
        let is_same = |place: usize| {
            let at = (place - run.start) * BLOCK_BYTES;
            let block = bytes.get(at..at + BLOCK_BYTES);
            let tag = block.map(|block| content_tag(&active.tag_key, block));
            tag.as_ref() == asked.tags.get(place)
        };
        let same: Vec<bool> = run.clone().map(is_same).collect();
        for part in runs(&same) {
            let from = part.start * BLOCK_BYTES;
            let Some(plain) = bytes.get(from..part.end * BLOCK_BYTES) else {
                continue;
            };
            let first = asked.first_block + (run.start + part.start) as u64;
            seal(asked, begun, first * BLOCK, plain, &mut sealer, &mut found);
            found
                .blocks
                .extend(run.start + part.start..run.start + part.end);
        }
    }
    found
}

fn seal(
    asked: &Asked,
    begun: Begun,
    offset: u64,
    plain: &[u8],
    sealer: &mut Sealer,
    found: &mut Found,
) {
    let identity = FrameIdentity {
        machine: asked.identity.machine,
        history: asked.identity.history,
        origin: asked.identity.origin,
        epoch: asked.identity.epoch,
    };
    for (at, bytes) in (offset..)
        .step_by(RECORD_BYTES)
        .zip(plain.chunks(RECORD_BYTES))
    {
        let header = RecordHeader {
            kind: RecordKind::Bulk,
            lsn: begun.lsn,
            previous: begun.lsn,
            time: asked.time,
            disk: asked.disk,
            offset: at,
            length: bytes.len() as u64,
            batch: begun.batch,
            argument: 0,
        };
        let mut builder = FrameBuilder::new(identity, true);
        builder.push_data(&header, bytes, sealer);
        found.frames.push(builder.finish());
    }
}

/// Reads blocks of the seed; `None` where it holds none, or does not verify.
fn read(active: &Active, first_block: u64, count: usize) -> Option<Vec<u8>> {
    let size = active.ready.reader.size_bytes();
    let start = first_block.checked_mul(BLOCK)?;
    let wanted = count.checked_mul(BLOCK_BYTES)?;
    let there = usize::try_from(size.checked_sub(start)?).unwrap_or(usize::MAX);
    let mut bytes = vec![0; wanted];
    let within = bytes.get_mut(..wanted.min(there))?;
    match active.ready.reader.read(start, within) {
        Ok(()) => Some(bytes),
        Err(error) => {
            tracing::warn!(%error, "a part of a seed is not used");
            None
        }
    }
}

/// The runs of places that are true.
fn runs(places: &[bool]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (place, _) in places.iter().enumerate().filter(|(_, is_so)| **is_so) {
        match runs.last_mut() {
            Some(run) if run.end == place => run.end = place + 1,
            _ => runs.push(place..place + 1),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_whole() {
        let places = [true, true, false, true, false, false, true];
        assert_eq!(runs(&places), [0..2, 3..4, 6..7]);
        assert_eq!(runs(&[]), []);
    }
}

//! Second pass: what the commits hold.

use std::collections::HashSet;

use afterimage_blockdev::{IoBuffer, SegmentId, SlotIndex, StorageOp};

use super::{Found, Pass, Step};
use crate::bytes::wide;
use crate::error::Damage;
use crate::frame::{DamagedSlot, Frame};
use crate::log::{FrameLocation, Log, LogOutput, Pending};
use crate::segment::{
    Directory, FoundCommit, Piece, Region, SECTOR, SegmentScan, damage_of_commit, salvage,
};

/// The walk over one segment.
struct Walk<'a> {
    place: usize,
    bytes: &'a [u8],
    scan: SegmentScan<'a>,
    /// Next sequence of this segment.
    next: u64,
    /// Where the present break began, and why.
    broken: Option<(u64, Damage)>,
    /// Where commits were kept that nothing proves.
    unproven: Option<(u64, u64, u64)>,
}

impl Log {
    pub(super) fn walk_next(&mut self, out: &mut Vec<LogOutput>) {
        if let Some(place) = self.recovery.walks.pop_front() {
            self.recovery.at = place;
            self.recovery.step = Step::Open;
            let name = self.file_name(self.recovery.found[place].id);
            self.submit(Pending::Recover, StorageOp::Open { name }, out);
            return;
        }
        if self.recovery.pass == Pass::Walk
            && let Some(gap) = self.recovery.gap.take()
            && gap <= self.recovery.proven
        {
            self.recovery.expected = gap;
            self.plan_walk(Pass::Again);
            self.walk_next(out);
            return;
        }
        self.end_walk(out);
        self.recovered(out);
    }

    /// Durable commits at the very end may be missing with nothing whole behind them.
    fn end_walk(&mut self, out: &mut Vec<LogOutput>) {
        let last = self.recovery.proven;
        if self.recovery.expected > last {
            return;
        }
        let segment = self.recovery.found.last().map_or(SegmentId(0), |f| f.id);
        self.lost(segment, 0, last, damage_of_commit(), out);
    }

    /// Reports what is missing up to a sequence, if anything is, and goes on behind it.
    fn lost(
        &mut self,
        segment: SegmentId,
        offset: u64,
        last_sequence: u64,
        damage: Damage,
        out: &mut Vec<LogOutput>,
    ) {
        let first_sequence = self.recovery.expected;
        if first_sequence > last_sequence {
            return;
        }
        self.recovery.expected = last_sequence + 1;
        out.push(LogOutput::Lost {
            segment,
            offset,
            first_sequence,
            last_sequence,
            damage,
        });
    }

    /// Walks the bytes of the present segment.
    pub(super) fn walk(&mut self, bytes: &[u8], out: &mut Vec<LogOutput>) {
        let place = self.recovery.at;
        let void_from = self.recovery.nexts()[place].unwrap_or(u64::MAX);
        let found = &mut self.recovery.found[place];
        let id = found.id;
        let Some(first) = found.first else { return };
        found.begin_walk();
        found.check_directory(bytes);
        let end = found
            .footer
            .map_or(bytes.len(), |footer| {
                usize::try_from(footer.directory_offset).unwrap_or(bytes.len())
            })
            .min(bytes.len());
        let bytes = &bytes[..end];
        // A segment that is gone.
        if self.recovery.gap.is_none() && first <= self.recovery.proven.saturating_add(1) {
            self.lost(id, 0, first - 1, damage_of_commit(), out);
        }
        let mut walk = Walk {
            place,
            bytes,
            scan: SegmentScan::new(bytes, self.options.store, id),
            next: first,
            broken: None,
            unproven: None,
        };
        let mut until = end;
        while let Some(item) = walk.scan.step() {
            match item {
                Err(end) => {
                    walk.broken.get_or_insert((end.offset, end.damage));
                }
                Ok(commit) if commit.header.sequence >= void_from => {
                    until = usize::try_from(commit.header.offset).unwrap_or(end);
                    break;
                }
                Ok(commit) => self.meet(&mut walk, commit, out),
            }
        }
        let sealed = self.recovery.found[place].footer;
        let known_end = sealed.map_or(void_from - 1, |footer| footer.last_sequence);
        let last = known_end.min(void_from - 1).min(self.recovery.proven);
        self.bridge(&mut walk, until, last, None, out);
        self.note_rewrite(&walk);
    }

    fn meet(&mut self, walk: &mut Walk<'_>, commit: FoundCommit, out: &mut Vec<LogOutput>) {
        let header = commit.header;
        let proven = self.recovery.proven.max(header.durable_through);
        self.recovery.proven = proven;
        for at in &commit.frames {
            if let Some(frame) = walk.scan.frame(*at) {
                self.recovery.identities.insert(frame.header.identity);
            }
        }
        // A torn commit may have a whole skeleton. Only a proven one is kept with bad slots.
        if let Some((_, slot)) = commit.damaged.first()
            && header.sequence > proven
        {
            let damage = slot.damage.clone();
            walk.broken.get_or_insert((header.offset, damage));
            return;
        }
        let until = usize::try_from(header.offset).unwrap_or(walk.bytes.len());
        let before = header.sequence - 1;
        self.bridge(walk, until, before, Some(header.first_slot), out);
        if self.recovery.gap.is_some() {
            return;
        }
        self.keep(walk, &commit, out);
    }

    /// Deals with what is missing before a commit, or at the end of the segment.
    fn bridge(
        &mut self,
        walk: &mut Walk<'_>,
        until: usize,
        last: u64,
        next_slot: Option<u32>,
        out: &mut Vec<LogOutput>,
    ) {
        if walk.next > last || self.recovery.gap.is_some() {
            if next_slot.is_some() {
                walk.broken = None;
            }
            return;
        }
        if last > self.recovery.proven {
            // The last pass has read everything: what is proven is kept, and the log ends there.
            if self.recovery.pass == Pass::Again && walk.next <= self.recovery.proven {
                let proven = self.recovery.proven;
                self.bridge(walk, until, proven, None, out);
            }
            self.recovery.gap = Some(walk.next);
            return;
        }
        let (offset, damage) = walk
            .broken
            .take()
            .unwrap_or((wide(until), damage_of_commit()));
        self.salvage(walk, offset, until, last, next_slot, damage, out);
        walk.next = last + 1;
    }

    #[allow(clippy::too_many_arguments)]
    fn salvage(
        &mut self,
        walk: &mut Walk<'_>,
        offset: u64,
        until: usize,
        last: u64,
        next_slot: Option<u32>,
        damage: Damage,
        out: &mut Vec<LogOutput>,
    ) {
        let found = &self.recovery.found[walk.place];
        let segment = found.id;
        let commits = salvage(&Region {
            bytes: walk.bytes,
            from: usize::try_from(offset).unwrap_or(until),
            to: until,
            identity: found.identity(self.options.store),
            segment_first: found.first.unwrap_or(walk.next),
            first_sequence: walk.next,
            last_sequence: last,
            first_slot: found.next_slot,
            next_slot,
            identities: &self.recovery.identities,
        });
        for commit in commits {
            let is_wanted = commit.sequence >= self.recovery.expected;
            if is_wanted {
                self.lost(segment, offset, commit.sequence - 1, damage.clone(), out);
            }
            let found = &mut self.recovery.found[walk.place];
            found.note(commit.sequence, commit.end, commit.next_slot);
            for piece in commit.pieces {
                let sequence = commit.sequence;
                let mut given = Vec::new();
                self.give_piece(walk.place, sequence, piece, &mut given);
                if is_wanted {
                    out.append(&mut given);
                }
            }
            if !is_wanted {
                continue;
            }
            if commit.is_complete {
                self.recovery.expected = commit.sequence + 1;
                let (offset, damage) = (commit.offset, damage.clone());
                out.push(LogOutput::Mended {
                    segment,
                    offset,
                    damage,
                });
            } else {
                self.lost(segment, commit.offset, commit.sequence, damage.clone(), out);
            }
        }
        if next_slot.is_none() && self.recovery.expected <= last {
            self.recovery.found[walk.place].has_lost_end = true;
        }
        self.lost(segment, offset, last, damage, out);
    }

    fn give_piece(&mut self, place: usize, sequence: u64, piece: Piece, out: &mut Vec<LogOutput>) {
        let found = &mut self.recovery.found[place];
        let location = |offset, first_slot| FrameLocation {
            segment: found.id,
            offset,
            first_slot,
            sequence,
        };
        match piece {
            Piece::Whole {
                offset,
                first_slot,
                frame,
                damaged,
            } => {
                let location = location(offset, first_slot);
                let directory = &mut found.directory;
                directory.note_frame(first_slot, offset, &frame.view());
                found.root.update(&frame.header.hash);
                self.recovery.identities.insert(frame.header.identity);
                let history = frame.header.identity.history;
                out.push(LogOutput::Recovered { location, frame });
                report_slots(location, history, damaged, out);
            }
            Piece::Part {
                offset,
                first_slot,
                identity,
                bytes,
                intact,
                lost,
                damaged,
            } => {
                let location = location(offset, first_slot);
                found
                    .directory
                    .note_records(offset, &bytes, &intact, identity.history);
                out.push(LogOutput::Salvaged {
                    location,
                    identity,
                    bytes,
                    intact,
                    lost,
                });
                report_slots(location, identity.history, damaged, out);
            }
        }
    }

    /// Notes where the slots of a commit lie, and gives its frames back if they are wanted.
    fn keep(&mut self, walk: &mut Walk<'_>, commit: &FoundCommit, out: &mut Vec<LogOutput>) {
        let header = commit.header;
        let end = header.offset + header.length;
        walk.next = header.sequence + 1;
        let is_wanted = header.sequence == self.recovery.expected;
        if header.sequence > self.recovery.proven {
            let from = walk.unproven.map_or(header.offset, |(_, from, _)| from);
            let first = walk.unproven.map_or(header.sequence, |(first, ..)| first);
            walk.unproven = Some((first, from, end));
        }
        let found = &mut self.recovery.found[walk.place];
        found.note(
            header.sequence,
            end,
            Some(header.first_slot + header.slot_count),
        );
        let mut first_slot = header.first_slot;
        for (place, offset) in commit.frames.iter().enumerate() {
            let Some(view) = walk.scan.frame(*offset) else {
                continue;
            };
            let location = FrameLocation {
                segment: found.id,
                offset: *offset,
                first_slot,
                sequence: header.sequence,
            };
            first_slot += view.header.slot_count;
            found.root.update(&view.header.hash);
            if found.is_unsealed {
                found
                    .directory
                    .note_frame(location.first_slot, *offset, &view);
            }
            if !is_wanted {
                continue;
            }
            out.push(LogOutput::Recovered {
                location,
                frame: Frame {
                    header: view.header,
                    bytes: view.bytes.to_vec(),
                },
            });
            let of_frame = commit.damaged.iter().filter(|(of, _)| *of == place);
            let damaged = of_frame.map(|(_, slot)| slot.clone()).collect();
            report_slots(location, view.header.identity.history, damaged, out);
        }
        if is_wanted {
            self.recovery.expected += 1;
        }
    }

    /// Remembers the bytes that must be written once more before they count as durable.
    fn note_rewrite(&mut self, walk: &Walk<'_>) {
        self.recovery.rewrite = None;
        let Some((_, from, end)) = walk.unproven else {
            return;
        };
        let range = usize::try_from(from).ok().zip(usize::try_from(end).ok());
        if let Some(bytes) = range.and_then(|(from, end)| walk.bytes.get(from..end)) {
            self.recovery.rewrite = Some((from, IoBuffer::copy_of(bytes)));
        }
    }
}

fn report_slots(
    location: FrameLocation,
    history: afterimage_blockdev::HistoryId,
    damaged: Vec<DamagedSlot>,
    out: &mut Vec<LogOutput>,
) {
    // One record's slot can be named once only.
    let mut seen = HashSet::new();
    for bad in damaged {
        if seen.insert(bad.slot) {
            out.push(LogOutput::DamagedSlot {
                location,
                slot: SlotIndex(location.first_slot.saturating_add(bad.slot)),
                lsn: bad.lsn,
                disk: bad.disk,
                history,
            });
        }
    }
}

impl Found {
    fn begin_walk(&mut self) {
        self.directory = Directory::default();
        self.root = blake3::Hasher::new();
        self.next_slot = Some(0);
        self.end = SECTOR as u64;
    }

    /// A sealed segment whose directory is damaged gets it again.
    fn check_directory(&mut self, bytes: &[u8]) {
        let Some(footer) = self.footer else { return };
        let at = usize::try_from(footer.directory_offset).unwrap_or(bytes.len());
        let directory = bytes.get(at..).unwrap_or(&[]);
        if let Err(damage) = Directory::decode(directory, &footer) {
            self.damage.get_or_insert((footer.directory_offset, damage));
            self.is_unsealed = true;
        }
    }

    fn note(&mut self, sequence: u64, end: u64, next_slot: Option<u32>) {
        self.last_sequence = self.last_sequence.max(sequence);
        self.end = end;
        self.next_slot = next_slot;
    }
}

//! First pass: what headers and footers say.

use afterimage_blockdev::StorageOp;

use super::{Found, Pass, Step};
use crate::bytes::{is_all_zero, wide};
use crate::error::{CacheError, Damage};
use crate::log::{Log, LogOutput, Pending};
use crate::segment::{FOOTER_BYTES, Footer, SECTOR, SegmentHeader, SegmentScan};

impl Log {
    pub(super) fn survey_next(&mut self, out: &mut Vec<LogOutput>) {
        if let Some(id) = self.recovery.names.pop_front() {
            self.recovery.step = Step::Open;
            let name = self.file_name(id);
            self.recovery.found.push(Found::new(id));
            self.submit(Pending::Recover, StorageOp::Open { name }, out);
            return;
        }
        self.surveyed();
        self.walk_next(out);
    }

    pub(super) fn header_read(&mut self, bytes: &[u8], out: &mut Vec<LogOutput>) {
        let store = self.options.store;
        let Some(found) = self.recovery.found.last_mut() else {
            return;
        };
        match SegmentHeader::decode(bytes) {
            Ok(header) if header.identity.store == store && header.identity.segment == found.id => {
                found.first = Some(header.first_sequence);
                found.generation = header.identity.generation;
            }
            Ok(header) => {
                let (structure, field) = ("log segment header", "identity");
                found.is_stale = header.identity.store == store;
                found.is_foreign = !found.is_stale;
                found.damage = Some((0, Damage::Field { structure, field }));
            }
            Err(damage) => {
                if self.is_newer(&damage, 0, out) {
                    return;
                }
                if let Some(found) = self.recovery.found.last_mut() {
                    found.damage = Some((0, damage));
                }
            }
        }
        let length = self.recovery.found.last().map_or(0, |found| found.length);
        let has_footer = length >= wide(2 * SECTOR) && length.is_multiple_of(wide(SECTOR));
        if has_footer {
            let offset = length - wide(FOOTER_BYTES);
            self.recover_read(Step::Footer, offset, FOOTER_BYTES, out);
        } else {
            self.footer_read(&[], out);
        }
    }

    pub(super) fn footer_read(&mut self, bytes: &[u8], out: &mut Vec<LogOutput>) {
        let store = self.options.store;
        let Some(found) = self.recovery.found.last_mut() else {
            return;
        };
        let (length, id) = (found.length, found.id);
        let at = length.saturating_sub(wide(FOOTER_BYTES));
        match Footer::decode(bytes) {
            Ok(footer)
                if footer.identity.store == store
                    && footer.identity.segment == id
                    && footer.directory_offset + wide(footer.directory_len()) <= at =>
            {
                found.first = found.first.or(Some(footer.first_sequence));
                found.generation = footer.identity.generation;
                found.footer = Some(footer);
                found.is_unsealed = false;
            }
            Ok(_) => {}
            Err(damage) => {
                if self.is_newer(&damage, at, out) {
                    return;
                }
                if let Some(found) = self.recovery.found.last_mut()
                    && Footer::is_likely(bytes)
                {
                    found.damage.get_or_insert((at, damage));
                }
            }
        }
        let is_unknown = self
            .recovery
            .found
            .last()
            .is_some_and(|f| f.first.is_none());
        if is_unknown {
            self.recover_read_all(Step::Probe, length, out);
        } else {
            self.recover_close(out);
        }
    }

    /// A store written by a newer program is refused, not taken for damaged.
    fn is_newer(&mut self, damage: &Damage, offset: u64, out: &mut Vec<LogOutput>) -> bool {
        let Some(found) = self.recovery.found.last() else {
            return false;
        };
        let is_newer = matches!(damage, Damage::Version { .. });
        if is_newer {
            let error = CacheError::Damaged {
                segment: found.id,
                offset,
                damage: damage.clone(),
            };
            self.fail(error, out);
        }
        is_newer
    }

    /// Asks the commits of a segment whose header says nothing.
    pub(super) fn probe(&mut self, bytes: &[u8]) {
        let Some(found) = self.recovery.found.last_mut() else {
            return;
        };
        found.is_blank = is_all_zero(bytes);
        let mut scan = SegmentScan::new(bytes, self.options.store, found.id);
        while let Some(item) = scan.step() {
            if let Ok(commit) = item {
                found.first = Some(commit.header.segment_first);
                found.generation = commit.header.identity.generation;
                return;
            }
        }
        // A file that was to be used again, and was not begun.
        found.is_blank |= found.is_stale;
    }

    /// What headers and footers prove: all before a segment's first commit was durable.
    fn surveyed(&mut self) {
        let recovery = &mut self.recovery;
        for found in &recovery.found {
            let begun = found.first.map_or(0, |first| first.saturating_sub(1));
            let sealed = found.footer.map_or(0, |footer| footer.last_sequence);
            recovery.proven = recovery.proven.max(begun).max(sealed);
        }
        // Segments are given away from the oldest on: what is wanted begins with the first left,
        // unless that is a file of ours in which nothing can be read.
        let is_ours = |found: &&Found| !found.is_blank && !found.is_foreign;
        let first = recovery.found.iter().find(is_ours);
        let begin = first.and_then(|found| found.first).unwrap_or(0);
        recovery.expected = recovery.expected.max(begin);
        self.plan_walk(Pass::Walk);
    }

    /// Walks the segments that hold what is wanted, and those that get a directory.
    pub(super) fn plan_walk(&mut self, pass: Pass) {
        let seals = self.options.seals;
        let recovery = &mut self.recovery;
        recovery.pass = pass;
        let expected = recovery.expected;
        let is_wanted = |(found, next): (&Found, Option<u64>)| {
            let holds_wanted = next.is_none_or(|next| next > expected);
            let is_unsealed = seals && found.is_unsealed && pass == Pass::Walk;
            found.first.is_some() && (holds_wanted || is_unsealed)
        };
        let nexts = recovery.nexts();
        recovery.walks = recovery
            .found
            .iter()
            .zip(nexts)
            .enumerate()
            .filter(|(_, pair)| is_wanted(*pair))
            .map(|(place, _)| place)
            .collect();
    }
}

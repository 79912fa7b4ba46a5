//! Runs for what was taken out of the log: the daemon makes the map anew from the log and from
//! segments of bulk blocks by itself, but from nothing else.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use afterimage_blockdev::{DiskId, HistoryId, Lsn, SegmentId, SlotIndex, StoreId};
use afterimage_seed::entry::{Entry, EntryKind};
use afterimage_seed::manifest::Edit;
use afterimage_seed::run::{RunId, SectionContent, SectionName, encode_run, run_file};
use afterimage_seed::segment::{FOOTERS_BYTES, SeedFooter, seed_file};

use super::place::{make_directory, sync_directory, write_file};
use super::state::NamedSegment;
use super::{Store, file_error, refused};
use crate::error::AftError;

/// Entries of a run, about.
const RUN_ENTRIES: usize = 1 << 20;

type Sections = BTreeMap<(HistoryId, DiskId), Vec<Entry>>;

/// Runs on their way.
pub(super) struct Maps<'a> {
    pub(super) store: &'a Store,
    pub(super) id: StoreId,
    /// The data directory that gets them.
    pub(super) target: &'a Path,
    /// Of others nothing can be shown.
    pub(super) histories: BTreeSet<HistoryId>,
    pub(super) next_run: u32,
    pub(super) edits: Vec<Edit>,
}

impl Maps<'_> {
    /// Writes runs for the slots of destaged segments.
    pub(super) fn write_slots(
        &mut self,
        seeds: &BTreeMap<SegmentId, NamedSegment>,
    ) -> Result<(), AftError> {
        let (mut sections, mut count) = (Sections::new(), 0);
        for (segment, named) in seeds {
            count += self.read_slots(*segment, named.generation, &mut sections)?;
            if count >= RUN_ENTRIES {
                self.write_sections(core::mem::take(&mut sections))?;
                count = 0;
            }
        }
        if count > 0 {
            self.write_sections(sections)?;
        }
        Ok(())
    }

    /// Takes over a run that is laid out already.
    pub(super) fn write_rest(&mut self, run: RunId, bytes: &[u8]) -> Result<(), AftError> {
        let path = self.target.join(run_file(run).to_string());
        // Of an earlier rebuild.
        if fs::read(&path).is_ok_and(|found| found == bytes) {
            let bytes = bytes.len() as u64;
            self.edits.push(Edit::Run { run, bytes });
            return Ok(());
        }
        self.write_run(run, bytes)
    }

    fn read_slots(
        &self,
        segment: SegmentId,
        generation: u32,
        sections: &mut Sections,
    ) -> Result<usize, AftError> {
        let name = seed_file(segment, generation).to_string();
        let bytes = self.store.read(&name)?.unwrap_or_default();
        let ends = bytes.len().saturating_sub(FOOTERS_BYTES);
        let footer = SeedFooter::find(bytes.get(ends..).unwrap_or(&[]), self.id, segment);
        let found = footer.and_then(|footer| {
            let at = usize::try_from(footer.directory_offset).unwrap_or(usize::MAX);
            footer.find_directory(bytes.get(at..).unwrap_or(&[]))
        });
        let (_, entries) = found.map_err(|damage| refused(format!("{name}: {damage}"), ""))?;
        let mut count = 0;
        for found in entries {
            let context = found.context;
            if !self.histories.contains(&context.history) {
                continue;
            }
            count += 1;
            let lsn = context.lsns.iter().copied().max().unwrap_or_default();
            let section = sections.entry((context.history, context.disk));
            section.or_default().push(Entry {
                cell: context.cell,
                lsn,
                mask: context.mask,
                first: 0,
                kind: EntryKind::Data,
                segment,
                slot: SlotIndex(found.slot),
            });
        }
        Ok(count)
    }

    fn write_sections(&mut self, sections: Sections) -> Result<(), AftError> {
        let run = RunId(self.next_run);
        self.next_run = self.next_run.saturating_add(1);
        let contents: Vec<_> = sections
            .into_iter()
            .map(|((history, disk), mut entries)| {
                entries.sort_unstable_by_key(Entry::key);
                let lsns = || entries.iter().map(|entry| entry.lsn);
                let (low, high) = (lsns().min(), lsns().max());
                let is_base_part = false;
                SectionContent {
                    name: SectionName {
                        history,
                        disk,
                        is_base_part,
                    },
                    low: low.unwrap_or(Lsn::ZERO),
                    high: high.unwrap_or(Lsn::ZERO),
                    entries,
                    ranges: Vec::new(),
                    timeline: Vec::new(),
                }
            })
            .collect();
        let (bytes, _) = encode_run(self.id, run, &contents);
        self.write_run(run, &bytes)
    }

    fn write_run(&mut self, run: RunId, bytes: &[u8]) -> Result<(), AftError> {
        let directory = self.target.join("runs");
        make_directory(&directory)?;
        let path = self.target.join(run_file(run).to_string());
        write_file(&path, bytes)?;
        sync_directory(&directory)?;
        let length = fs::metadata(&path).map_err(|error| file_error(&path, &error))?;
        let bytes = length.len();
        self.edits.push(Edit::Run { run, bytes });
        Ok(())
    }
}

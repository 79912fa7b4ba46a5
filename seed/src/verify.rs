//! Reads every byte of a store's files and checks it against what was written. For `aft log
//! verify` and the offline tools: it waits for each read, and so runs on a thread of its own.

use std::collections::HashMap;

use afterimage_blockdev::{
    FileId, FileName, HistoryId, IoBuffer, Lsn, SegmentId, Storage, StorageErrorKind, StorageOp,
    StorageOutcome, StoreId, wait,
};
use afterimage_cache::segment::{Directory, Footer, SECTOR, SegmentScan, segment_file};
use afterimage_cache::{Damage, SlotView};

use crate::engine::StoreFile;
use crate::error::SeedError;
use crate::manifest::{Edit, Found, Walked, manifest_file};
use crate::notes::NotesFile;
use crate::patchwork::Patchwork;
use crate::run::{self, PAGE_BYTES, RunFooter, RunId, decode_page, place_of, run_file};
use crate::segment::{FOOTERS_BYTES, SeedFooter, SlotEntry, check_header, seed_file};

/// Something that is not as it was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DamageReport {
    /// The file.
    pub file: String,
    /// Byte offset.
    pub offset: u64,
    /// What is wrong.
    pub damage: Damage,
    /// The history and LSN from which on views are hurt, where that is known.
    pub hurts: Option<(HistoryId, Lsn)>,
}

/// What a verification found.
#[derive(Clone, Debug, Default)]
pub struct Verification {
    /// Files read.
    pub files: u64,
    /// Slots checked.
    pub slots: u64,
    /// Bytes read.
    pub bytes: u64,
    /// What is damaged.
    pub damage: Vec<DamageReport>,
    /// What the manifest says of seed segments: generation, slots, bytes, root.
    named: HashMap<SegmentId, (u32, u32, u64, [u8; 32])>,
}

impl Verification {
    fn note(&mut self, edit: &Edit) {
        match edit {
            Edit::Segment {
                segment,
                generation,
                slot_count,
                bytes,
                root,
            } => {
                let says = (*generation, *slot_count, *bytes, *root);
                self.named.insert(*segment, says);
            }
            Edit::SegmentDropped { segment } => {
                self.named.remove(segment);
            }
            _ => {}
        }
    }
}

/// Longest file of those that are read whole, in bytes.
const WHOLE_BYTES_MAX: u64 = 4 << 30;

/// Checks one file; adds to `found`. What the manifest says of seed segments is held against them
/// when it is checked first.
///
/// # Errors
/// When the medium fails otherwise than on reading; damage is no error but a finding.
pub fn verify_file(
    storage: &dyn Storage,
    store: StoreId,
    file: StoreFile,
    found: &mut Verification,
) -> Result<(), SeedError> {
    let name = match file {
        StoreFile::Manifest(number) => manifest_file(number),
        StoreFile::Log(segment) => segment_file("log", segment),
        StoreFile::Seed(segment, generation) => seed_file(segment, generation),
        StoreFile::Run(run) => run_file(run),
        StoreFile::Notes(notes) => notes.name(),
    };
    let opened = wait::storage(storage, StorageOp::Open { name: name.clone() });
    let mut check = Check {
        file: name.to_string(),
        store,
        found,
    };
    let (id, length) = match opened {
        Ok(StorageOutcome::Opened { file, length }) => (file, length),
        Ok(_) => return Ok(()),
        Err(error) if matches!(error.kind, StorageErrorKind::NotFound) => {
            let is_replaced = matches!(file, StoreFile::Manifest(_)) && has_newer(storage, &name)?;
            if !is_replaced {
                check.damaged(0, Damage::Missing { structure: "file" }, None);
            }
            return Ok(());
        }
        Err(error) if matches!(error.kind, StorageErrorKind::Io(_)) => {
            check.damaged(0, Damage::Unreadable { structure: "file" }, None);
            return Ok(());
        }
        Err(error) => return Err(error.into()),
    };
    check.found.files += 1;
    let source = Source {
        storage,
        id,
        length,
    };
    match file {
        StoreFile::Run(run) | StoreFile::Notes(NotesFile::Rest(run, _)) => check.run(run, &source),
        _ if length > WHOLE_BYTES_MAX => {
            let (structure, field) = ("file", "length");
            check.damaged(0, Damage::Field { structure, field }, None);
        }
        StoreFile::Manifest(_) => {
            let (bytes, unreadable) = source.read(0, length);
            check.was_read(&bytes, &unreadable);
            for edit in check.manifest(&bytes, &unreadable) {
                check.found.note(&edit);
            }
        }
        // What it says of segments may be older than they are.
        StoreFile::Notes(NotesFile::State(_)) => {
            let (bytes, unreadable) = source.read(0, length);
            check.was_read(&bytes, &unreadable);
            let _edits = check.manifest(&bytes, &unreadable);
        }
        StoreFile::Log(segment) => {
            let bytes = check.read(&source, 0, length);
            check.log(segment, &bytes);
        }
        StoreFile::Seed(segment, generation) => {
            let bytes = check.read(&source, 0, length);
            check.seed((segment, generation), &bytes);
        }
    }
    wait::storage(storage, StorageOp::Close { file: id })?;
    Ok(())
}

/// Says whether a manifest file was replaced since it was listed.
fn has_newer(storage: &dyn Storage, name: &FileName) -> Result<bool, SeedError> {
    let directory = "manifest".to_owned();
    match wait::storage(storage, StorageOp::List { directory })? {
        StorageOutcome::Listed(names) => Ok(names.iter().any(|other| other > name)),
        _ => Ok(false),
    }
}

/// An open file.
struct Source<'a> {
    storage: &'a dyn Storage,
    id: FileId,
    length: u64,
}

impl Source<'_> {
    fn read_once(&self, offset: u64, len: usize) -> Option<IoBuffer> {
        let op = StorageOp::Read {
            file: self.id,
            offset,
            buffer: IoBuffer::zeroed(len),
        };
        match wait::storage(self.storage, op) {
            Ok(StorageOutcome::Read(bytes)) => Some(bytes),
            _ => None,
        }
    }

    /// Reads a range, with zeroes in place of the sectors that cannot be read, and names those.
    fn read(&self, offset: u64, len: u64) -> (IoBuffer, Vec<u64>) {
        let len = usize::try_from(len.min(self.length)).unwrap_or(0);
        let len = len.next_multiple_of(SECTOR).max(SECTOR);
        if let Some(bytes) = self.read_once(offset, len) {
            return (bytes, Vec::new());
        }
        let mut patchwork = Patchwork::new(offset, len);
        while let Some((offset, len)) = patchwork.wanted() {
            if !patchwork.take(self.read_once(offset, len).as_deref()) {
                break;
            }
        }
        patchwork.finish()
    }
}

/// Says whether bytes are there and zero.
fn is_padding(bytes: Option<&[u8]>) -> bool {
    bytes.is_some_and(|bytes| bytes.iter().all(|byte| *byte == 0))
}

/// A footer that is good, and still not this file's.
fn unlike(structure: &'static str) -> Damage {
    Damage::Field {
        structure,
        field: "footer of this file",
    }
}

struct Check<'a> {
    file: String,
    store: StoreId,
    found: &'a mut Verification,
}

impl Check<'_> {
    fn damaged(&mut self, offset: u64, damage: Damage, hurts: Option<(HistoryId, Lsn)>) {
        let file = self.file.clone();
        self.found.damage.push(DamageReport {
            file,
            offset,
            damage,
            hurts,
        });
    }

    fn was_read(&mut self, bytes: &[u8], unreadable: &[u64]) {
        self.found.bytes += bytes.len() as u64;
        for offset in unreadable {
            self.damaged(
                *offset,
                Damage::Unreadable {
                    structure: "sector",
                },
                None,
            );
        }
    }

    fn read(&mut self, source: &Source<'_>, offset: u64, len: u64) -> IoBuffer {
        let (bytes, unreadable) = source.read(offset, len);
        self.was_read(&bytes, &unreadable);
        bytes
    }

    /// The manifest may grow meanwhile: its last commit is not judged, as at a start. Gives back
    /// its edits.
    fn manifest(&mut self, bytes: &[u8], unreadable: &[u64]) -> Vec<Edit> {
        match Found::walk(bytes, unreadable) {
            Walked::Whole(found) => {
                for offset in &found.damaged {
                    let structure = "one copy of a manifest commit";
                    self.damaged(*offset, Damage::Hash { structure }, None);
                }
                return found.edits;
            }
            Walked::Damaged(offset, damage) => self.damaged(offset, damage, None),
            Walked::NotWhole => {
                let structure = "manifest file";
                self.damaged(0, Damage::Short { structure }, None);
            }
            Walked::Newer { found, supported } => {
                let structure = "manifest commit";
                let damage = Damage::Version {
                    structure,
                    found,
                    supported,
                };
                self.damaged(0, damage, None);
            }
        }
        Vec::new()
    }

    fn log(&mut self, segment: SegmentId, bytes: &[u8]) {
        let footer_at = bytes.len().saturating_sub(SECTOR);
        let footer = Footer::decode(&bytes[footer_at..]).ok();
        let footer = footer.filter(|footer| footer.identity.segment == segment);
        let end = footer
            .and_then(|footer| usize::try_from(footer.directory_offset).ok())
            .map_or(bytes.len(), |end| end.min(bytes.len()));
        if let Some(footer) = footer {
            let directory = bytes.get(end..).unwrap_or(&[]);
            if let Err(damage) = afterimage_cache::segment::Directory::decode(directory, &footer) {
                self.damaged(end as u64, damage, None);
            }
        }
        let mut scan = SegmentScan::new(&bytes[..end], self.store, segment);
        if let Err(damage) = scan.header.clone() {
            self.damaged(0, damage, None);
        }
        while let Some(item) = scan.step() {
            match item {
                Ok(commit) => {
                    self.found.slots += u64::from(commit.header.slot_count);
                    for (frame, slot) in &commit.damaged {
                        let at = commit.frames.get(*frame).copied().unwrap_or(0);
                        let history = scan.frame(at).map(|frame| frame.header.identity.history);
                        let hurts = history.map(|history| (history, slot.lsn));
                        self.damaged(at, slot.damage.clone(), hurts);
                    }
                }
                // Beyond the last commit of the active segment there are zeroes or a void tail.
                Err(stop) if stop.resumed.is_none() && footer.is_none() => {}
                Err(stop) => self.damaged(stop.offset, stop.damage, None),
            }
        }
    }

    fn seed(&mut self, (segment, generation): (SegmentId, u32), bytes: &[u8]) {
        let tail_at = bytes.len().saturating_sub(FOOTERS_BYTES);
        let footers = [tail_at, tail_at + SECTOR].map(|at| {
            let found = SeedFooter::decode(bytes.get(at..).unwrap_or(&[]), self.store, segment);
            if let Err(damage) = &found {
                self.damaged(at as u64, damage.clone(), None);
            }
            found.ok()
        });
        if let Err(damage) = check_header(bytes, self.store, segment) {
            self.damaged(0, damage, None);
        }
        let [first, second] = footers;
        let Some(footer) = first.or(second) else {
            return;
        };
        // A reader takes the last good one: two that differ are not of one segment.
        if second.is_some_and(|second| second != footer) {
            self.damaged(tail_at as u64, unlike("seed segment"), None);
        }
        let at = usize::try_from(footer.directory_offset).unwrap_or(bytes.len());
        let again = at.saturating_add(footer.directories_len() / 2);
        if again.saturating_add(footer.directories_len() / 2) != tail_at {
            return self.damaged(tail_at as u64, unlike("seed segment"), None);
        }
        let named = self.found.named.get(&segment);
        let says = (
            generation,
            footer.entry_count,
            bytes.len() as u64,
            footer.root,
        );
        if named.is_some_and(|named| named.0 == generation && *named != says) {
            let (structure, field) = ("seed segment", "root, length or count of slots");
            self.damaged(tail_at as u64, Damage::Field { structure, field }, None);
        }
        let mut found = None;
        for at in [at, again] {
            let one = bytes.get(at..).unwrap_or(&[]);
            let structure = "padding of a seed segment's directory";
            let padding = footer.directory_len()..footer.directories_len() / 2;
            match footer.decode_directory(one) {
                Ok(_) if !is_padding(one.get(padding)) => {
                    self.damaged(at as u64, Damage::Hash { structure }, None);
                }
                Ok(parts) => found = found.or(Some(parts)),
                Err(damage) => self.damaged(at as u64, damage, None),
            }
        }
        let Some((offsets, entries)) = found else {
            return;
        };
        self.slots(
            &offsets,
            &entries,
            footer.root,
            &bytes[..at.min(bytes.len())],
        );
    }

    /// Checks the slots of a seed segment, which lie one behind the other.
    fn slots(&mut self, offsets: &Directory, entries: &[SlotEntry], root: [u8; 32], bytes: &[u8]) {
        let mut hasher = blake3::Hasher::new();
        let mut end = SECTOR;
        for entry in entries {
            self.found.slots += 1;
            hasher.update(&entry.hash);
            let offset = offsets.get(entry.slot).unwrap_or(0);
            let place = usize::try_from(offset).unwrap_or(bytes.len());
            self.gap(bytes, end, place);
            let slot = SlotView::parse(bytes.get(place..).unwrap_or(&[]));
            end = slot
                .as_ref()
                .map_or(place, |slot| place.saturating_add(slot.bytes.len()));
            let result = slot.and_then(|slot| {
                if slot.header.hash != entry.hash {
                    let (structure, field) = ("slot", "hash other than in the directory");
                    return Err(Damage::Field { structure, field });
                }
                slot.verify(&entry.context)
                    .and_then(|()| slot.verify_padding())
            });
            if let Err(damage) = result {
                // Where it ends is not known.
                end = bytes.len();
                let hurts = Some((entry.context.history, entry.context.lsns[0]));
                self.damaged(offset, damage, hurts);
            }
        }
        self.gap(bytes, end, bytes.len());
        if *hasher.finalize().as_bytes() != root {
            let structure = "root of a seed segment";
            self.damaged(bytes.len() as u64, Damage::Hash { structure }, None);
        }
    }

    /// Between slots, and behind the last one, there are zeroes.
    fn gap(&mut self, bytes: &[u8], from: usize, to: usize) {
        if from < to && !is_padding(bytes.get(from..to)) {
            let structure = "padding behind a slot";
            self.damaged(from as u64, Damage::Hash { structure }, None);
        }
    }

    fn run(&mut self, run: RunId, source: &Source<'_>) {
        let page_bytes = PAGE_BYTES as u64;
        let end = source.length.saturating_sub(run::FOOTERS_BYTES as u64);
        let end = end / page_bytes * page_bytes;
        let bytes = self.read(source, end, run::FOOTERS_BYTES as u64);
        let footers = [0, PAGE_BYTES].map(|at| {
            let found = RunFooter::decode(bytes.get(at..).unwrap_or(&[]), self.store, run);
            if let Err(damage) = &found {
                self.damaged(end + at as u64, damage.clone(), None);
            }
            found.ok()
        });
        let header = self.read(source, 0, page_bytes);
        if let Err(damage) = run::check_header(&header, self.store, run) {
            self.damaged(0, damage, None);
        }
        let [first, second] = footers;
        let Some(footer) = first.or(second) else {
            return;
        };
        // A reader takes the last good one: two that differ are not of one run. The pages reach to
        // the tails, and those to the footers: otherwise how many there are is not known.
        let pages = (1 + 2 * u64::from(footer.page_count)) * page_bytes;
        let is_like = second.is_none_or(|second| second == footer)
            && footer.tail_offset == pages
            && pages.checked_add(footer.tails_len()) == Some(end);
        if !is_like {
            return self.damaged(end, unlike("run file"), None);
        }
        self.tails(&footer, source);
        let mut number = 0;
        while number < footer.page_count {
            let width = place_of(number, footer.page_count).adjoining.max(1);
            self.stripe(run, number, width, source);
            number += width;
        }
    }

    fn tails(&mut self, footer: &RunFooter, source: &Source<'_>) {
        let one_len = footer.tails_len() / 2;
        for copy in 0..2 {
            let at = footer.tail_offset + copy * one_len;
            let one = self.read(source, at, one_len);
            let len = usize::try_from(footer.tail_len).unwrap_or(usize::MAX);
            let padding = one.get(len..);
            let padding = padding.and_then(|rest| rest.get(..footer.padding_len()));
            let structure = "padding of a run's tail";
            match footer.decode_tail(&one) {
                Err(damage) => self.damaged(at, damage, None),
                Ok(_) if !is_padding(padding) => {
                    self.damaged(at, Damage::Hash { structure }, None);
                }
                Ok(_) => {}
            }
        }
    }

    /// Checks the pages of a stripe, and their copies, which follow them.
    fn stripe(&mut self, run: RunId, first: u32, width: u32, source: &Source<'_>) {
        let page_bytes = PAGE_BYTES as u64;
        let at = (1 + 2 * u64::from(first)) * page_bytes;
        let bytes = self.read(source, at, 2 * u64::from(width) * page_bytes);
        for (place, number) in (0..2 * width).zip((first..first + width).cycle()) {
            let within = usize::try_from(place).unwrap_or(0) * PAGE_BYTES;
            if let Err(damage) = decode_page(bytes.get(within..).unwrap_or(&[]), run, number) {
                self.damaged(at + within as u64, damage, None);
            }
        }
    }
}

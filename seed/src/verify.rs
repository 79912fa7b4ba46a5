//! Reads every byte of a store's files and checks it against what was written. For `aft log
//! verify` and the offline tools: it waits for each read, and so runs on a thread of its own.

use afterimage_blockdev::{
    FileId, HistoryId, IoBuffer, Lsn, Storage, StorageOp, StorageOutcome, StoreId, wait,
};
use afterimage_cache::segment::{Footer, SECTOR, SegmentScan, segment_file};
use afterimage_cache::{Damage, SlotView};

use crate::engine::StoreFile;
use crate::error::SeedError;
use crate::run::{PAGE_BYTES, RunFooter, decode_page, run_file};
use crate::segment::{FOOTERS_BYTES, SeedFooter, check_header, seed_file};

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
}

/// Checks one file; adds to `found`.
///
/// # Errors
/// When the medium fails; damage is no error but a finding.
pub fn verify_file(
    storage: &dyn Storage,
    store: StoreId,
    file: StoreFile,
    found: &mut Verification,
) -> Result<(), SeedError> {
    let name = match file {
        StoreFile::Log(segment) => segment_file("log", segment),
        StoreFile::Seed(segment) => seed_file(segment),
        StoreFile::Run(run) => run_file(run),
    };
    let StorageOutcome::Opened { file: id, length } =
        wait::storage(storage, StorageOp::Open { name: name.clone() })?
    else {
        return Ok(());
    };
    let bytes = read_all(storage, id, length);
    wait::storage(storage, StorageOp::Close { file: id })?;
    let bytes = bytes?;
    found.files += 1;
    found.bytes += bytes.len() as u64;
    let mut check = Check {
        file: name.to_string(),
        store,
        found,
    };
    match file {
        StoreFile::Log(segment) => check.log(segment, &bytes),
        StoreFile::Seed(segment) => check.seed(segment, &bytes),
        StoreFile::Run(run) => check.run(run, &bytes),
    }
    Ok(())
}

fn read_all(storage: &dyn Storage, file: FileId, length: u64) -> Result<IoBuffer, SeedError> {
    let len = usize::try_from(length)
        .unwrap_or(0)
        .next_multiple_of(SECTOR)
        .max(SECTOR);
    let buffer = IoBuffer::zeroed(len);
    match wait::storage(
        storage,
        StorageOp::Read {
            file,
            offset: 0,
            buffer,
        },
    )? {
        StorageOutcome::Read(bytes) => Ok(bytes),
        _ => Ok(IoBuffer::with_capacity(0)),
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

    fn log(&mut self, segment: afterimage_blockdev::SegmentId, bytes: &[u8]) {
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

    fn seed(&mut self, segment: afterimage_blockdev::SegmentId, bytes: &[u8]) {
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
        let at = usize::try_from(footer.directory_offset).unwrap_or(bytes.len());
        let again = at.saturating_add(footer.directories_len() / 2);
        let mut found = None;
        for at in [at, again] {
            match footer.decode_directory(bytes.get(at..).unwrap_or(&[])) {
                Ok(parts) => found = found.or(Some(parts)),
                Err(damage) => self.damaged(at as u64, damage, None),
            }
        }
        let Some((offsets, entries)) = found else {
            return;
        };
        for (slot, entry) in (0u32..).zip(&entries) {
            self.found.slots += 1;
            let offset = offsets.get(slot).unwrap_or(0);
            let place = usize::try_from(offset).unwrap_or(bytes.len());
            let result = SlotView::parse(bytes.get(place..).unwrap_or(&[])).and_then(|slot| {
                slot.verify(&entry.context)
                    .and_then(|()| slot.verify_padding())
            });
            if let Err(damage) = result {
                let hurts = Some((entry.context.history, entry.context.lsns[0]));
                self.damaged(offset, damage, hurts);
            }
        }
    }

    fn run(&mut self, run: crate::run::RunId, bytes: &[u8]) {
        let footer_at = bytes.len().saturating_sub(PAGE_BYTES);
        let footer = match RunFooter::decode(&bytes[footer_at..], self.store, run) {
            Ok(footer) => footer,
            Err(damage) => return self.damaged(footer_at as u64, damage, None),
        };
        let tail = usize::try_from(footer.tail_offset).unwrap_or(bytes.len());
        if let Err(damage) = footer.decode_tail(bytes.get(tail..).unwrap_or(&[])) {
            self.damaged(tail as u64, damage, None);
        }
        if let Err(damage) = crate::run::check_header(bytes, self.store, run) {
            self.damaged(0, damage, None);
        }
        let pages = (tail / PAGE_BYTES).saturating_sub(1);
        for page in 0..pages {
            let count = footer.page_count.max(1);
            let number = u32::try_from(page).unwrap_or(u32::MAX) % count;
            let at = (page + 1) * PAGE_BYTES;
            if let Err(damage) = decode_page(&bytes[at..], run, number) {
                self.damaged(at as u64, damage, None);
            }
        }
    }
}

//! Map pages: for each block of a 2 MiB region, which slot holds it in one snapshot. Made on first
//! touch from all sections that the snapshot sees, then kept.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use afterimage_blockdev::{CELL_BLOCKS, CellIndex, Lsn};
use parking_lot::Mutex;

use super::Reader;
use super::files::FileKey;
use crate::entry::{Entry, EntryKind, RangeEntry};
use crate::error::SeedError;
use crate::run::{PAGE_BYTES, RunId, decode_page, place_of};
use crate::section::{Section, Snapshot};

/// Blocks of a region: 2 MiB.
pub(crate) const REGION_BLOCKS: u64 = 512;
pub(crate) const REGION_CELLS: u64 = REGION_BLOCKS / CELL_BLOCKS as u64;

/// A snapshot's serial and a region.
pub(crate) type PageKey = (u64, u64);

/// What a block is in a snapshot.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Resolved {
    /// Since when.
    pub(crate) lsn: Lsn,
    /// The slot's segment.
    pub(crate) segment: u32,
    /// The slot.
    pub(crate) slot: u32,
    /// Index of the block within the slot.
    pub(crate) block: u8,
    /// Which layer of the snapshot, counted from 1; 0 when never written.
    pub(crate) layer: u8,
    /// What it is.
    pub(crate) kind: EntryKind,
}

const NEVER: Resolved = Resolved {
    lsn: Lsn(0),
    segment: 0,
    slot: 0,
    block: 0,
    layer: 0,
    kind: EntryKind::Zero,
};

/// One region of a snapshot.
#[derive(Debug)]
pub(crate) struct MapPage {
    pub(crate) blocks: Vec<Resolved>,
}

const PAGE_WEIGHT: usize = 512 * size_of::<Resolved>() + 64;

struct Builder {
    first_cell: CellIndex,
    blocks: Vec<Resolved>,
}

impl Builder {
    fn new(region: u64) -> Self {
        let first_cell = CellIndex(region * REGION_CELLS);
        Self {
            first_cell,
            blocks: vec![NEVER; 512],
        }
    }

    fn end_cell(&self) -> CellIndex {
        CellIndex(self.first_cell.0 + REGION_CELLS)
    }

    /// A nearer layer wins; within a layer the later LSN, and at one LSN the write.
    fn offer(&mut self, place: usize, offered: Resolved) {
        let known = &mut self.blocks[place];
        let wins = known.layer == 0
            || offered.layer < known.layer
            || (offered.layer == known.layer
                && (offered.lsn, offered.kind) > (known.lsn, known.kind));
        if wins {
            *known = offered;
        }
    }

    fn entry(&mut self, layer: u8, cap: Lsn, entry: &Entry) {
        if entry.lsn > cap || entry.cell < self.first_cell || entry.cell >= self.end_cell() {
            return;
        }
        let cell = usize::try_from(entry.cell.0 - self.first_cell.0).unwrap_or(0);
        for within in 0..4u8 {
            let Some(block) = entry.block_in_slot(within) else {
                continue;
            };
            let offered = Resolved {
                lsn: entry.lsn,
                segment: entry.segment.0,
                slot: entry.slot.0,
                block,
                layer,
                kind: entry.kind,
            };
            self.offer(cell * CELL_BLOCKS + usize::from(within), offered);
        }
    }

    fn range(&mut self, layer: u8, cap: Lsn, range: &RangeEntry) {
        if range.lsn > cap {
            return;
        }
        let from = range.first.0.max(self.first_cell.0);
        let to = (range.first.0 + range.count).min(self.end_cell().0);
        for cell in from..to {
            let place = usize::try_from(cell - self.first_cell.0).unwrap_or(0) * CELL_BLOCKS;
            for within in 0..CELL_BLOCKS {
                let offered = Resolved {
                    lsn: range.lsn,
                    layer,
                    kind: range.kind,
                    ..NEVER
                };
                self.offer(place + within, offered);
            }
        }
    }
}

/// One read of adjoining pages of a run file.
#[derive(Clone, Copy)]
struct PageRead {
    run: RunId,
    layer: u8,
    cap: Lsn,
    first_page: u32,
    count: u32,
    /// Pages of the file.
    file_pages: u32,
    /// Not the pages are read, but their copies.
    is_copy: bool,
}

struct Load {
    builder: Mutex<(Builder, Option<SeedError>)>,
    waiting: AtomicUsize,
    #[expect(clippy::type_complexity)]
    done: Mutex<Option<Box<dyn FnOnce(Result<Arc<MapPage>, SeedError>) + Send>>>,
}

impl Reader {
    /// The map page, if it is in memory.
    pub(crate) fn cached_page(&self, snapshot: &Snapshot, region: u64) -> Option<Arc<MapPage>> {
        self.pages.get(&(snapshot.serial, region), |_| PAGE_WEIGHT)
    }

    /// The map page, if no run file has to be read for it.
    pub(crate) fn page_in_memory(&self, snapshot: &Snapshot, region: u64) -> Option<Arc<MapPage>> {
        if let Some(page) = self.cached_page(snapshot, region) {
            return Some(page);
        }
        let (builder, reads) = merge_memory(snapshot, region);
        reads
            .is_empty()
            .then(|| self.keep_page((snapshot.serial, region), builder))
    }

    /// The map page, from memory or from the run files.
    pub(crate) fn map_page(
        self: &Arc<Self>,
        snapshot: &Arc<Snapshot>,
        region: u64,
        done: impl FnOnce(Result<Arc<MapPage>, SeedError>) + Send + 'static,
    ) {
        if let Some(page) = self.cached_page(snapshot, region) {
            return done(Ok(page));
        }
        let (builder, reads) = merge_memory(snapshot, region);
        let key = (snapshot.serial, region);
        if reads.is_empty() {
            return done(Ok(self.keep_page(key, builder)));
        }
        let load = Arc::new(Load {
            builder: Mutex::new((builder, None)),
            waiting: AtomicUsize::new(reads.len()),
            done: Mutex::new(Some(Box::new(done))),
        });
        for read in reads {
            self.read_pages(key, read, Arc::clone(&load));
        }
    }

    fn keep_page(&self, key: PageKey, builder: Builder) -> Arc<MapPage> {
        let page = Arc::new(MapPage {
            blocks: builder.blocks,
        });
        self.pages.insert(key, Arc::clone(&page), PAGE_WEIGHT);
        page
    }

    fn read_pages(self: &Arc<Self>, key: PageKey, read: PageRead, load: Arc<Load>) {
        let reader = Arc::clone(self);
        self.file(FileKey::Run(read.run), move |file| match file {
            Ok(file) => {
                let place = place_of(read.first_page, read.file_pages);
                let offset = if read.is_copy {
                    place.copy
                } else {
                    place.offset
                };
                let len = usize::try_from(read.count).unwrap_or(0) * PAGE_BYTES;
                let again = Arc::clone(&reader);
                reader.read_file(file, offset, len, move |bytes| {
                    let merged = bytes
                        .map_err(SeedError::from)
                        .and_then(|bytes| again.merge_pages(&read, &bytes, &load));
                    match merged {
                        Err(error) if read.count > 1 => {
                            tracing::error!(%error, "map pages are read one by one");
                            again.read_apart(key, read, &load);
                        }
                        Err(error) if !read.is_copy => {
                            tracing::error!(%error, "a map page is damaged; its copy is read");
                            let is_copy = true;
                            again.read_pages(key, PageRead { is_copy, ..read }, load);
                        }
                        merged => again.page_read(key, merged, &load),
                    }
                });
            }
            Err(error) => reader.page_read(key, Err(error), &load),
        });
    }

    /// Reads pages on their own: one bad page hides no other, and no other's copy.
    fn read_apart(self: &Arc<Self>, key: PageKey, read: PageRead, load: &Arc<Load>) {
        let more = usize::try_from(read.count - 1).unwrap_or(0);
        load.waiting.fetch_add(more, Ordering::AcqRel);
        for place in 0..read.count {
            let one = PageRead {
                first_page: read.first_page + place,
                count: 1,
                ..read
            };
            self.read_pages(key, one, Arc::clone(load));
        }
    }

    fn merge_pages(&self, read: &PageRead, bytes: &[u8], load: &Load) -> Result<(), SeedError> {
        let mut decoded = Vec::new();
        for place in 0..read.count {
            let number = read.first_page + place;
            let at = usize::try_from(place).unwrap_or(0) * PAGE_BYTES;
            let entries = decode_page(bytes.get(at..).unwrap_or(&[]), read.run, number).map_err(
                |damage| SeedError::Damaged {
                    file: FileKey::Run(read.run).name().to_string(),
                    offset: place_of(number, read.file_pages).offset,
                    damage,
                },
            )?;
            decoded.extend(entries);
        }
        let mut builder = load.builder.lock();
        for entry in &decoded {
            builder.0.entry(read.layer, read.cap, entry);
        }
        Ok(())
    }

    fn page_read(&self, key: PageKey, result: Result<(), SeedError>, load: &Load) {
        if let Err(error) = result {
            load.builder.lock().1.get_or_insert(error);
        }
        if load.waiting.fetch_sub(1, Ordering::AcqRel) > 1 {
            return;
        }
        let (builder, error) = {
            let mut locked = load.builder.lock();
            (
                core::mem::replace(&mut locked.0, Builder::new(0)),
                locked.1.take(),
            )
        };
        let done = load.done.lock().take();
        if let Some(done) = done {
            match error {
                Some(error) => done(Err(error)),
                None => done(Ok(self.keep_page(key, builder))),
            }
        }
    }
}

/// What the sections in memory say of a region, and the reads that tell the rest.
fn merge_memory(snapshot: &Snapshot, region: u64) -> (Builder, Vec<PageRead>) {
    let mut builder = Builder::new(region);
    let mut reads = Vec::new();
    let (first, end) = (builder.first_cell, builder.end_cell());
    for (place, layer) in snapshot.layers.iter().enumerate() {
        let number = u8::try_from(place + 1).unwrap_or(u8::MAX);
        for section in &layer.sections {
            if section.lsns().0 > layer.cap {
                continue;
            }
            for range in section.ranges() {
                builder.range(number, layer.cap, range);
            }
            for entry in section.entries_in_memory(first, end) {
                builder.entry(number, layer.cap, entry);
            }
            let Section::File { run, table } = &**section else {
                continue;
            };
            for (first_page, count) in table.reads(first, end) {
                reads.push(PageRead {
                    run: *run,
                    layer: number,
                    cap: layer.cap,
                    first_page,
                    count,
                    file_pages: table.file_pages,
                    is_copy: false,
                });
            }
        }
    }
    (builder, reads)
}

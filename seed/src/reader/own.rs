//! Which blocks the nearest history of a snapshot has data for: what a branch holds of its own.
//!
//! The sections of that history name the regions that it touched; only those are resolved.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

use afterimage_blockdev::CellIndex;

use super::Reader;
use super::files::FileKey;
use super::map_page::{REGION_BLOCKS, REGION_CELLS};
use crate::branch::OwnBlocks;
use crate::error::SeedError;
use crate::run::{PAGE_BYTES, RunId, decode_page, place_of};
use crate::section::{Section, Snapshot};

/// Number of the nearest layer in a map page.
const NEAREST: u8 = 1;

type Done = Box<dyn FnOnce(Result<OwnBlocks, SeedError>) + Send>;

/// Pages of a run file that are read at once.
#[derive(Clone, Copy)]
struct Pages {
    run: RunId,
    first: u32,
    count: u32,
    file_pages: u32,
    is_copy: bool,
}

struct Count {
    reader: Arc<Reader>,
    snapshot: Arc<Snapshot>,
    unread: VecDeque<Pages>,
    regions: BTreeSet<u64>,
    own: OwnBlocks,
    done: Done,
}

impl Reader {
    /// Counts the blocks for which the nearest layer of a snapshot has data. One read at a time.
    pub(crate) fn own_blocks(
        self: &Arc<Self>,
        snapshot: &Arc<Snapshot>,
        done: impl FnOnce(Result<OwnBlocks, SeedError>) + Send + 'static,
    ) {
        let mut count = Count {
            reader: Arc::clone(self),
            snapshot: Arc::clone(snapshot),
            unread: VecDeque::new(),
            regions: BTreeSet::new(),
            own: OwnBlocks::default(),
            done: Box::new(done),
        };
        let (first, end) = (CellIndex(0), CellIndex(u64::MAX));
        for section in snapshot.layers.first().iter().flat_map(|l| &l.sections) {
            let entries = section.entries_in_memory(first, end);
            count.note(entries.iter().map(|entry| entry.cell));
            if let Section::File { run, table } = &**section {
                let pages = table.reads(first, end).into_iter();
                count.unread.extend(pages.map(|(first, count)| Pages {
                    run: *run,
                    first,
                    count,
                    file_pages: table.file_pages,
                    is_copy: false,
                }));
            }
        }
        count.read();
    }
}

impl Count {
    fn note(&mut self, cells: impl Iterator<Item = CellIndex>) {
        self.regions.extend(cells.map(|cell| cell.0 / REGION_CELLS));
    }

    fn read(mut self) {
        let Some(pages) = self.unread.pop_front() else {
            return self.resolve();
        };
        let reader = Arc::clone(&self.reader);
        reader.file(FileKey::Run(pages.run), move |file| {
            let file = match file {
                Ok(file) => file,
                Err(error) => return (self.done)(Err(error)),
            };
            let place = place_of(pages.first, pages.file_pages);
            let offset = if pages.is_copy {
                place.copy
            } else {
                place.offset
            };
            let bytes = usize::try_from(pages.count).unwrap_or(0) * PAGE_BYTES;
            let reader = Arc::clone(&self.reader);
            reader.read_file(file, offset, bytes, move |bytes| {
                let read = bytes.map_err(SeedError::from);
                match read.and_then(|bytes| cells(&pages, &bytes)) {
                    Ok(cells) => {
                        self.note(cells.into_iter());
                        self.read();
                    }
                    Err(error) => self.again(pages, error),
                }
            });
        });
    }

    /// Reads pages on their own, and a bad one from its copy.
    fn again(mut self, pages: Pages, error: SeedError) {
        if pages.count > 1 {
            for page in (pages.first..pages.first + pages.count).rev() {
                self.unread.push_front(Pages {
                    first: page,
                    count: 1,
                    ..pages
                });
            }
        } else if !pages.is_copy {
            self.unread.push_front(Pages {
                is_copy: true,
                ..pages
            });
        } else {
            return (self.done)(Err(error));
        }
        self.read();
    }

    /// Resolves region after region; never deeper than one region on the stack.
    fn resolve(mut self) {
        while let Some(region) = self.regions.pop_first() {
            if let Some(page) = self.reader.page_in_memory(&self.snapshot, region) {
                self.add(region, &page.blocks);
                continue;
            }
            let reader = Arc::clone(&self.reader);
            let snapshot = Arc::clone(&self.snapshot);
            reader.map_page(&snapshot, region, move |page| match page {
                Ok(page) => {
                    self.add(region, &page.blocks);
                    self.resolve();
                }
                Err(error) => (self.done)(Err(error)),
            });
            return;
        }
        (self.done)(Ok(self.own));
    }

    fn add(&mut self, region: u64, blocks: &[super::Resolved]) {
        for (place, resolved) in (region * REGION_BLOCKS..).zip(blocks) {
            if resolved.layer == NEAREST && resolved.kind.has_slot() {
                self.own.add(place, 1);
            }
        }
    }
}

fn cells(pages: &Pages, bytes: &[u8]) -> Result<Vec<CellIndex>, SeedError> {
    let mut cells = Vec::new();
    for (place, number) in (pages.first..pages.first + pages.count).enumerate() {
        let page = bytes.get(place * PAGE_BYTES..).unwrap_or(&[]);
        let entries =
            decode_page(page, pages.run, number).map_err(|damage| SeedError::Damaged {
                file: FileKey::Run(pages.run).name().to_string(),
                offset: place_of(number, pages.file_pages).offset,
                damage,
            })?;
        cells.extend(entries.iter().map(|entry| entry.cell));
    }
    Ok(cells)
}

//! Bytes in memory, held by pages; what was never written takes no room and reads as zero.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::convert::to_usize;
use crate::size::BLOCK_BYTES;

/// Bytes of a page.
pub(crate) const PAGE_BYTES: u64 = BLOCK_BYTES as u64;

/// One page. Copies of a file share it until one of them writes.
pub(crate) type Page = [u8; BLOCK_BYTES];

/// The pages that exist, by index. A copy costs nothing until one of the two changes.
#[derive(Clone, Default)]
pub(crate) struct Pages {
    pages: Arc<BTreeMap<u64, Arc<Page>>>,
}

/// The parts of a byte range by page: page index, first byte in the page, and the range's bytes.
fn parts(
    offset: u64,
    length: usize,
) -> impl Iterator<Item = (u64, usize, core::ops::Range<usize>)> {
    let mut done = 0;
    core::iter::from_fn(move || {
        if done == length {
            return None;
        }
        let at = offset + done as u64;
        let within = to_usize(at % PAGE_BYTES);
        let step = (BLOCK_BYTES - within).min(length - done);
        let range = done..done + step;
        done += step;
        Some((at / PAGE_BYTES, within, range))
    })
}

impl Pages {
    /// Number of pages that exist.
    pub(crate) fn count(&self) -> u64 {
        self.pages.len() as u64
    }

    pub(crate) fn page(&self, index: u64) -> Option<&Arc<Page>> {
        self.pages.get(&index)
    }

    /// Puts a whole page in place.
    pub(crate) fn put(&mut self, index: u64, page: Arc<Page>) {
        Arc::make_mut(&mut self.pages).insert(index, page);
    }

    /// How many pages a write to this range would add.
    pub(crate) fn missing(&self, offset: u64, length: usize) -> u64 {
        parts(offset, length)
            .filter(|(index, ..)| !self.pages.contains_key(index))
            .count() as u64
    }

    pub(crate) fn read(&self, offset: u64, out: &mut [u8]) {
        for (index, within, range) in parts(offset, out.len()) {
            let out = &mut out[range];
            match self.pages.get(&index) {
                Some(page) => out.copy_from_slice(&page[within..within + out.len()]),
                None => out.fill(0),
            }
        }
    }

    pub(crate) fn write(&mut self, offset: u64, bytes: &[u8]) {
        let pages = Arc::make_mut(&mut self.pages);
        for (index, within, range) in parts(offset, bytes.len()) {
            let bytes = &bytes[range];
            let page = pages
                .entry(index)
                .or_insert_with(|| Arc::new([0; BLOCK_BYTES]));
            Arc::make_mut(page)[within..within + bytes.len()].copy_from_slice(bytes);
        }
    }

    /// Makes a range read as zero, and gives up the pages that lie within.
    pub(crate) fn zero(&mut self, offset: u64, length: u64) {
        let end = offset.saturating_add(length);
        let inner = offset.div_ceil(PAGE_BYTES)..end / PAGE_BYTES;
        let pages = Arc::make_mut(&mut self.pages);
        if inner.start < inner.end {
            let mut behind = pages.split_off(&inner.start);
            pages.append(&mut behind.split_off(&inner.end));
        }
        let edges = [offset / PAGE_BYTES, end / PAGE_BYTES];
        for index in edges {
            let Some(page) = pages.get_mut(&index) else {
                continue;
            };
            let start = offset.max(index * PAGE_BYTES) - index * PAGE_BYTES;
            let stop = end
                .min((index + 1) * PAGE_BYTES)
                .saturating_sub(index * PAGE_BYTES);
            if start < stop {
                Arc::make_mut(page)[to_usize(start)..to_usize(stop)].fill(0);
            }
        }
    }

    /// Gives up all bytes from `length` on.
    pub(crate) fn truncate(&mut self, length: u64) {
        let kept = length.div_ceil(PAGE_BYTES);
        if self
            .pages
            .last_key_value()
            .is_none_or(|(last, _)| *last < length / PAGE_BYTES)
        {
            return;
        }
        drop(Arc::make_mut(&mut self.pages).split_off(&kept));
        self.zero(length, kept * PAGE_BYTES - length);
    }
}

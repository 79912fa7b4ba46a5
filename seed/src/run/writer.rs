//! Writing a run file from its beginning to its end, with little of it in memory.

use std::collections::VecDeque;

use afterimage_blockdev::{IoBuffer, Lsn, StoreId};

use super::page::encode_page;
use super::tail::encode_end;
use super::{
    PAGE_BYTES, PAGE_ENTRIES, RunId, STRIPE_PAGES, SectionContent, SectionName, SectionTable,
    TimeSample, header,
};
use crate::entry::{Entry, RangeEntry};

/// A run file that is being written. What is ready must be written at its offset, in any order.
///
/// Invariants
/// * Entries come sorted: by cell, then newest first.
/// * Between `begin` and `end` there is one open section.
#[derive(Debug)]
pub struct RunWriter {
    store: StoreId,
    run: RunId,
    sections: Vec<SectionTable>,
    open: Option<SectionTable>,
    entries: Vec<Entry>,
    page_count: u32,
    /// Pages of the stripe that is not whole yet.
    stripe: IoBuffer,
    /// Offset behind all that is ready.
    at: u64,
    ready: VecDeque<(u64, IoBuffer)>,
}

impl RunWriter {
    /// Begins a file.
    #[must_use]
    pub fn new(store: StoreId, run: RunId) -> Self {
        let mut first = IoBuffer::with_capacity(PAGE_BYTES);
        first.extend_from_slice(&header(store, run));
        Self {
            store,
            run,
            sections: Vec::new(),
            open: None,
            entries: Vec::with_capacity(PAGE_ENTRIES),
            page_count: 0,
            stripe: IoBuffer::with_capacity(PAGE_BYTES),
            at: PAGE_BYTES as u64,
            ready: VecDeque::from([(0, first)]),
        }
    }

    /// Begins a section that covers the LSNs from `low` to `high`.
    pub fn begin(&mut self, name: SectionName, low: Lsn, high: Lsn) {
        self.open = Some(SectionTable {
            name,
            first_page: self.page_count,
            file_pages: 0,
            entry_count: 0,
            fences: Vec::new(),
            ranges: Vec::new(),
            timeline: Vec::new(),
            low,
            high,
        });
    }

    /// Adds an entry to the open section.
    pub fn push(&mut self, entry: Entry) {
        self.entries.push(entry);
        if self.entries.len() == PAGE_ENTRIES {
            self.end_page();
        }
    }

    /// Ends the open section. One that holds nothing is left out.
    pub fn end(&mut self, ranges: Vec<RangeEntry>, timeline: Vec<TimeSample>) {
        if !self.entries.is_empty() {
            self.end_page();
        }
        let Some(mut section) = self.open.take() else {
            return;
        };
        section.ranges = ranges;
        section.timeline = timeline;
        let is_empty = section.fences.is_empty() && section.ranges.is_empty();
        if !is_empty || !section.timeline.is_empty() {
            self.sections.push(section);
        }
    }

    fn end_page(&mut self) {
        let page = encode_page(&self.entries, self.run, self.page_count);
        if let (Some(section), Some(first)) = (&mut self.open, self.entries.first()) {
            section.fences.push(first.cell.0);
            section.entry_count += self.entries.len() as u64;
        }
        self.entries.clear();
        self.page_count += 1;
        self.stripe.extend_from_slice(&page);
        if self.page_count.is_multiple_of(STRIPE_PAGES) {
            self.end_stripe();
        }
    }

    fn end_stripe(&mut self) {
        let empty = IoBuffer::with_capacity(PAGE_BYTES);
        let pages = core::mem::replace(&mut self.stripe, empty);
        let again = IoBuffer::copy_of(&pages);
        for part in [pages, again] {
            let offset = self.at;
            self.at += part.len() as u64;
            self.ready.push_back((offset, part));
        }
    }

    /// Takes bytes that can be written, with their offset.
    pub fn take_ready(&mut self) -> Option<(u64, IoBuffer)> {
        self.ready.pop_front()
    }

    /// Ends the file: what is still to be written follows from `take_ready`. Gives back its
    /// sections and its length.
    pub fn finish(&mut self) -> (Vec<SectionTable>, u64) {
        if !self.stripe.is_empty() {
            self.end_stripe();
        }
        let mut sections = core::mem::take(&mut self.sections);
        for section in &mut sections {
            section.file_pages = self.page_count;
        }
        let name = (self.store, self.run);
        let end = encode_end(name, &sections, self.page_count, self.at);
        let offset = self.at;
        self.at += end.len() as u64;
        self.ready.push_back((offset, end));
        (sections, self.at)
    }
}

/// Lays out a whole run file in memory; gives back its sections as well.
#[must_use]
pub fn encode_run(
    store: StoreId,
    run: RunId,
    sections: &[SectionContent],
) -> (IoBuffer, Vec<SectionTable>) {
    let mut writer = RunWriter::new(store, run);
    for section in sections {
        writer.begin(section.name, section.low, section.high);
        for entry in &section.entries {
            writer.push(*entry);
        }
        writer.end(section.ranges.clone(), section.timeline.clone());
    }
    let (tables, len) = writer.finish();
    let mut out = IoBuffer::with_capacity(usize::try_from(len).unwrap_or(0));
    while let Some((_, part)) = writer.take_ready() {
        out.extend_from_slice(&part);
    }
    (out, tables)
}

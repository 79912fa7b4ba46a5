//! Header, directory and footer of one file: what a fast check looks at.

use std::fs::File;
use std::os::unix::fs::FileExt;

use afterimage_blockdev::{SegmentId, StoreId};
use afterimage_cache::segment::{Directory, FOOTER_BYTES, Footer, SegmentHeader};
use afterimage_seed::manifest::SECTOR;
use afterimage_seed::run::{self, RunFooter, RunId, run_file};
use afterimage_seed::segment::{self, SeedFooter, seed_file};

use super::state::NamedSegment;
use super::{Finding, Store, file_error};
use crate::error::AftError;

/// Longest directory or tail that is read at once.
const PART_BYTES_MAX: u64 = 4 << 30;

/// A file of which parts are read, and what is wrong with it.
struct Parts {
    name: String,
    file: File,
    length: u64,
    findings: Vec<Finding>,
}

impl Parts {
    /// Opens a file that is named; `None` when it is missing, which is noted.
    fn open(
        store: &Store,
        name: String,
        findings: &mut Vec<Finding>,
    ) -> Result<Option<Self>, AftError> {
        let path = store.root.join(&name);
        match File::open(&path) {
            Ok(file) => {
                let length = file
                    .metadata()
                    .map_err(|error| file_error(&path, &error))?
                    .len();
                Ok(Some(Self {
                    name,
                    file,
                    length,
                    findings: Vec::new(),
                }))
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                findings.push(Finding::new(name, 0, "the file is missing"));
                Ok(None)
            }
            Err(error) => Err(file_error(&path, &error)),
        }
    }

    fn note(&mut self, offset: u64, what: impl ToString) {
        let found = Finding::new(self.name.clone(), offset, what);
        self.findings.push(found);
    }

    /// Reads a part; what the medium does not give is noted, and the part is empty then.
    fn part(&mut self, offset: u64, len: u64) -> Vec<u8> {
        let end = offset.saturating_add(len).min(self.length);
        let len = end.saturating_sub(offset).min(PART_BYTES_MAX);
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
        if let Err(error) = self.file.read_exact_at(&mut bytes, offset) {
            self.note(offset, format!("it cannot be read: {error}"));
            bytes.clear();
        }
        bytes
    }

    fn has_length(&mut self, expected: u64) {
        if self.length != expected {
            let what = format!("it has {} bytes, and should have {expected}", self.length);
            self.note(expected.min(self.length), what);
        }
    }

    fn end(self, findings: &mut Vec<Finding>) {
        findings.extend(self.findings);
    }
}

/// Looks at a seed segment.
pub(super) fn seed(
    store: &Store,
    id: StoreId,
    (number, named): (SegmentId, &NamedSegment),
    findings: &mut Vec<Finding>,
) -> Result<(), AftError> {
    let name = seed_file(number, named.generation).to_string();
    let Some(mut parts) = Parts::open(store, name, findings)? else {
        return Ok(());
    };
    parts.has_length(named.bytes);
    let sector = SECTOR as u64;
    let header = parts.part(0, sector);
    if let Err(damage) = segment::check_header(&header, id, number) {
        parts.note(0, damage);
    }
    let ends = parts.length.saturating_sub(segment::FOOTERS_BYTES as u64);
    let mut footer = None;
    for at in [ends, ends + sector] {
        match SeedFooter::decode(&parts.part(at, sector), id, number) {
            Ok(found) => footer = Some(found),
            Err(damage) => parts.note(at, damage),
        }
    }
    if let Some(footer) = footer {
        if footer.root != named.root || footer.entry_count != named.slot_count {
            parts.note(ends, "it is not the file that the manifest names");
        }
        let len = footer.directories_len() as u64 / 2;
        for copy in 0..2 {
            let at = footer.directory_offset.saturating_add(copy * len);
            let bytes = parts.part(at, len);
            if let Err(damage) = footer.decode_directory(&bytes) {
                parts.note(at, damage);
            }
        }
    }
    parts.end(findings);
    Ok(())
}

/// Looks at a run.
pub(super) fn run(
    store: &Store,
    id: StoreId,
    (number, bytes): (RunId, u64),
    findings: &mut Vec<Finding>,
) -> Result<(), AftError> {
    let Some(mut parts) = Parts::open(store, run_file(number).to_string(), findings)? else {
        return Ok(());
    };
    parts.has_length(bytes);
    let sector = SECTOR as u64;
    let header = parts.part(0, sector);
    if let Err(damage) = run::check_header(&header, id, number) {
        parts.note(0, damage);
    }
    let ends = parts.length.saturating_sub(run::FOOTERS_BYTES as u64);
    let mut footer = None;
    for at in [ends, ends + sector] {
        match RunFooter::decode(&parts.part(at, sector), id, number) {
            Ok(found) => footer = Some(found),
            Err(damage) => parts.note(at, damage),
        }
    }
    if let Some(footer) = footer {
        let len = footer.tails_len() / 2;
        for copy in 0..2 {
            let at = footer.tail_offset.saturating_add(copy * len);
            let tail = parts.part(at, len);
            if let Err(damage) = footer.decode_tail(&tail) {
                parts.note(at, damage);
            }
        }
    }
    parts.end(findings);
    Ok(())
}

/// What header and footer of a log segment say.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct LogEnds {
    /// Sequence of its first commit; `None` when it was not begun, or the header is damaged.
    pub(super) first: Option<u64>,
    /// Sequence of its last commit; `None` when it is not sealed.
    pub(super) last: Option<u64>,
    /// It waits to be used.
    pub(super) is_spare: bool,
}

/// Looks at a log segment.
pub(super) fn log(
    store: &Store,
    id: StoreId,
    (number, name): (SegmentId, String),
    findings: &mut Vec<Finding>,
) -> Result<LogEnds, AftError> {
    let mut ends = LogEnds {
        first: None,
        last: None,
        is_spare: false,
    };
    let Some(mut parts) = Parts::open(store, name, findings)? else {
        return Ok(ends);
    };
    let sector = SECTOR as u64;
    let header = parts.part(0, sector);
    let is_blank = header.iter().all(|byte| *byte == 0);
    let decoded = SegmentHeader::decode(&header);
    let is_stale = decoded
        .as_ref()
        .is_ok_and(|header| header.identity.segment < number);
    if is_blank || is_stale {
        ends.is_spare = true;
        return Ok(ends);
    }
    match decoded {
        Ok(header) if header.identity.store != id => {
            parts.note(0, "it belongs to another store");
        }
        Ok(header) if header.identity.segment != number => {
            parts.note(0, "its header names another segment");
        }
        Ok(header) => ends.first = Some(header.first_sequence),
        Err(damage) => parts.note(0, damage),
    }
    let at = parts.length.saturating_sub(FOOTER_BYTES as u64);
    let bytes = parts.part(at, FOOTER_BYTES as u64);
    match Footer::decode(&bytes) {
        Ok(footer) if footer.identity.segment == number && footer.identity.store == id => {
            ends.last = Some(footer.last_sequence);
            let len = footer.directory_len() as u64;
            let directory = parts.part(footer.directory_offset, len);
            if let Err(damage) = Directory::decode(&directory, &footer) {
                parts.note(footer.directory_offset, damage);
            }
            if ends
                .first
                .is_some_and(|first| first != footer.first_sequence)
            {
                parts.note(at, "header and footer do not agree");
            }
            ends.first = ends.first.or(Some(footer.first_sequence));
        }
        // The active segment has none; what was one is told by most of its first bytes.
        Err(damage) if is_likely_footer(&bytes) => parts.note(at, damage),
        _ => {}
    }
    parts.end(findings);
    Ok(ends)
}

fn is_likely_footer(bytes: &[u8]) -> bool {
    let equal = b"AILOGEND".iter().zip(bytes).filter(|(a, b)| a == b);
    equal.count() > 4
}

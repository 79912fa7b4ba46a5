//! The notes in `segments/`: what the engine wrote for a rebuild.

use std::collections::BTreeMap;

use afterimage_blockdev::{SegmentId, StoreId};
use afterimage_cache::Damage;
use afterimage_seed::manifest::{Edit, Noted};
use afterimage_seed::notes::NotesFile;
use afterimage_seed::run::{self, PAGE_BYTES, RunFooter, RunId, decode_page, place_of};

use super::chain::Chain;
use super::{Finding, Store};
use crate::error::AftError;

/// What was about to become of a segment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Moving {
    pub(super) segment: SegmentId,
    /// Its last commit, when it was one of the log; 0 otherwise.
    pub(super) last_sequence: u64,
    /// Slots of it that are needed.
    pub(super) needed: u32,
}

/// The newest state.
#[derive(Clone, Debug)]
pub(super) struct Notes {
    pub(super) number: u32,
    pub(super) chain: Chain,
    /// All commits of the manifest below this one are in it.
    pub(super) sequence: u64,
    /// What of the map has no slot, and up to which commit of the log.
    pub(super) rest: Option<(RunId, u64)>,
    pub(super) moving: Vec<Moving>,
}

impl Notes {
    /// Reads the newest state that is whole.
    pub(super) fn newest(
        store: &Store,
        findings: &mut Vec<Finding>,
    ) -> Result<Option<Self>, AftError> {
        for file in files(store)?.into_iter().rev() {
            let NotesFile::State(number) = file else {
                continue;
            };
            let name = file.name().to_string();
            let bytes = store.read(&name)?.unwrap_or_default();
            let chain = Chain::read(name.clone(), &bytes);
            findings.extend(chain.findings.iter().cloned());
            match Self::of(number, chain) {
                Some(notes) => return Ok(Some(notes)),
                None => findings.push(Finding::new(name, 0, "it is no whole state")),
            }
        }
        Ok(None)
    }

    fn of(named: u32, chain: Chain) -> Option<Self> {
        let said = chain.edits().nth(1);
        let Some(Edit::Noted(Noted::Notes {
            number,
            sequence,
            rest,
            rest_through,
        })) = said.filter(|_| chain.is_whole())
        else {
            return None;
        };
        let (number, sequence) = (*number, *sequence);
        let rest = (rest.0 > 0).then_some((*rest, *rest_through));
        let moving = chain.edits().filter_map(|edit| match edit {
            Edit::Noted(Noted::Moving {
                segment,
                last_sequence,
                needed,
            }) => Some(Moving {
                segment: *segment,
                last_sequence: *last_sequence,
                needed: *needed,
            }),
            _ => None,
        });
        let moving = moving.collect();
        (number == named).then_some(Self {
            number,
            chain,
            sequence,
            rest,
            moving,
        })
    }

    /// What was about to become of a seed segment.
    pub(super) fn moving_seed(&self, segment: SegmentId) -> Option<Moving> {
        let is_it = |moving: &&Moving| moving.segment == segment && moving.last_sequence == 0;
        self.moving.iter().find(is_it).copied()
    }

    /// Segments of the log that were about to be destaged, oldest first.
    pub(super) fn moving_log(&self) -> Vec<Moving> {
        let of_log: BTreeMap<u64, Moving> = self
            .moving
            .iter()
            .filter(|moving| moving.last_sequence > 0)
            .map(|moving| (moving.last_sequence, *moving))
            .collect();
        of_log.into_values().collect()
    }
}

/// All files of notes, those of a kind by their numbers.
pub(super) fn files(store: &Store) -> Result<Vec<NotesFile>, AftError> {
    let mut files = store.parsed("segments", NotesFile::parse)?;
    files.sort_unstable();
    Ok(files)
}

/// The newest file of what of the map has no slot.
pub(super) fn newest_rest(store: &Store) -> Result<Option<(RunId, u64)>, AftError> {
    let rests = files(store)?.into_iter().filter_map(|file| match file {
        NotesFile::Rest(run, through) => Some((run, through)),
        NotesFile::State(_) => None,
    });
    Ok(rests.max())
}

/// Reads the run as which the map's rest is laid out; the reason when no part of it may be missed.
pub(super) fn read_rest(
    store: &Store,
    id: StoreId,
    (run, through): (RunId, u64),
) -> Result<Result<Vec<u8>, String>, AftError> {
    let name = NotesFile::Rest(run, through).name().to_string();
    let Some(bytes) = store.read(&name)? else {
        return Ok(Err(format!("{name} is missing")));
    };
    let whole = check_run(&bytes, id, run);
    Ok(whole
        .map(|()| bytes)
        .map_err(|damage| format!("{name}: {damage}")))
}

/// Says whether of each part of a run one copy is good.
fn check_run(bytes: &[u8], store: StoreId, run: RunId) -> Result<(), Damage> {
    let ends = bytes.len().saturating_sub(run::FOOTERS_BYTES);
    let footer = RunFooter::find(bytes.get(ends..).unwrap_or(&[]), store, run)?;
    let at = usize::try_from(footer.tail_offset).unwrap_or(usize::MAX);
    footer.find_tail(bytes.get(at..).unwrap_or(&[]))?;
    for page in 0..footer.page_count {
        let place = place_of(page, footer.page_count);
        let page_at = |offset: u64| {
            let at = usize::try_from(offset).unwrap_or(usize::MAX);
            let end = at.saturating_add(PAGE_BYTES);
            decode_page(bytes.get(at..end).unwrap_or(&[]), run, page)
        };
        page_at(place.offset).or_else(|_| page_at(place.copy))?;
    }
    Ok(())
}

/// Looks at all notes; names what of them is damaged.
pub(super) fn look(
    store: &Store,
    id: StoreId,
    findings: &mut Vec<Finding>,
) -> Result<(), AftError> {
    for file in files(store)? {
        let name = file.name().to_string();
        match file {
            NotesFile::State(number) => {
                let bytes = store.read(&name)?.unwrap_or_default();
                let chain = Chain::read(name.clone(), &bytes);
                findings.extend(chain.findings.iter().cloned());
                let is_named = !chain.findings.is_empty();
                if !is_named && Notes::of(number, chain).is_none() {
                    findings.push(Finding::new(name, 0, "it is no whole state"));
                }
            }
            NotesFile::Rest(run, through) => {
                if let Err(why) = read_rest(store, id, (run, through))? {
                    findings.push(Finding::new(name, 0, why));
                }
            }
        }
    }
    Ok(())
}

//! Whether what is left of a store suffices, and which of its segments count.
//!
//! Invariants
//! * A segment that was rewritten counts only with notes that are at least as new: they know which
//!   points may be shown of what is left in it.
//! * A segment that is missing is passed over only when the notes say that nothing of it is needed.

use std::collections::{BTreeMap, BTreeSet};

use afterimage_blockdev::{Lsn, SegmentId};

use super::evidence::{Evidence, SeedFile};
use super::marks::known_through;
use super::notes::Notes;
use super::refused;
use super::source::Source;
use super::state::{NamedSegment, State};
use crate::error::AftError;

/// Tells a segment of bulk blocks from one of the log.
pub(super) const SEED_BIT: u32 = 1 << 31;
const PUT_BACK: &str = "put its last segments back, then try again";

/// What counts of a store.
pub(super) struct Resolved {
    pub(super) seeds: BTreeMap<SegmentId, NamedSegment>,
    /// All commits of the log up to here lie in seed segments.
    pub(super) released: u64,
}

/// Decides which segments count.
pub(super) fn resolve(
    source: &Source,
    state: &State,
    evidence: &Evidence,
) -> Result<Resolved, AftError> {
    let mut resolved = Resolved {
        seeds: BTreeMap::new(),
        released: state.log_released,
    };
    if source.is_whole {
        for (segment, named) in &state.segments {
            let file = evidence.seed(*segment, named.generation);
            if file.map(|file| file.named) != Some(*named) {
                return Err(missing(*segment));
            }
            resolved.seeds.insert(*segment, *named);
        }
    } else if let Some(notes) = &source.notes {
        needs_no_newer(notes, evidence)?;
        for (segment, named) in &state.segments {
            resolved
                .seeds
                .extend(listed(notes, (*segment, *named), evidence)?);
        }
        add_new_bulk(state, evidence, &mut resolved);
        add_destaged(notes, evidence, &mut resolved)?;
    } else {
        without_notes(state, evidence, &mut resolved)?;
    }
    log_goes_on(state, evidence, resolved.released)?;
    Ok(resolved)
}

fn missing(segment: SegmentId) -> AftError {
    let message = format!(
        "seed segment {segment} is missing or damaged: blocks that only it holds would be shown as \
         zeroes"
    );
    refused(message, "put the file back, then try again")
}

/// Refuses when a segment was rewritten after the newest notes.
fn needs_no_newer(notes: &Notes, evidence: &Evidence) -> Result<(), AftError> {
    for (segment, files) in &evidence.seeds {
        let newest = files.iter().map(|file| file.needs_notes).max();
        if let Some(needed) = newest.filter(|needed| *needed > notes.number) {
            let message = format!(
                "versions were left out of seed segment {segment}, and only notes {needed} or \
                 later ones tell which points may still be shown: the newest ones are {}",
                notes.number
            );
            return Err(refused(message, "put segments/state-*.notes back"));
        }
    }
    Ok(())
}

/// The file that counts of a segment that the notes name; `None` when nothing of it is needed.
fn listed(
    notes: &Notes,
    (segment, named): (SegmentId, NamedSegment),
    evidence: &Evidence,
) -> Result<Option<(SegmentId, NamedSegment)>, AftError> {
    let file = evidence.seed(segment, named.generation);
    if file.is_some_and(|file| file.named == named) {
        return Ok(Some((segment, named)));
    }
    let Some(moving) = notes.moving_seed(segment) else {
        return Err(missing(segment));
    };
    let next = named.generation.saturating_add(1);
    match evidence.seed(segment, next) {
        Some(SeedFile { named, .. }) => Ok(Some((segment, named))),
        None if moving.needed == 0 => Ok(None),
        None => Err(missing(segment)),
    }
}

/// Bulk blocks that came after the newest notes.
fn add_new_bulk(state: &State, evidence: &Evidence, resolved: &mut Resolved) {
    for segment in evidence.seeds.keys() {
        let is_new = segment.0 & SEED_BIT != 0 && segment.0 & !SEED_BIT >= state.next_segment;
        if let Some(file) = evidence.seed(*segment, 0).filter(|_| is_new) {
            resolved.seeds.entry(*segment).or_insert(file.named);
        }
    }
}

/// What was destaged since: the log does not have it any more.
fn add_destaged(
    notes: &Notes,
    evidence: &Evidence,
    resolved: &mut Resolved,
) -> Result<(), AftError> {
    for moving in notes.moving_log() {
        if moving.last_sequence <= resolved.released {
            continue;
        }
        // Those behind it stay as well.
        if evidence.has_commit(moving.last_sequence) {
            break;
        }
        match evidence.seed(moving.segment, 1) {
            Some(file) => {
                resolved.seeds.insert(moving.segment, file.named);
            }
            None if moving.needed == 0 => {}
            None => return Err(missing(moving.segment)),
        }
        resolved.released = moving.last_sequence;
    }
    Ok(())
}

/// Without notes nothing may ever have been left out.
fn without_notes(
    state: &State,
    evidence: &Evidence,
    resolved: &mut Resolved,
) -> Result<(), AftError> {
    let hint = "put segments/state-*.notes back, or name a copy of the newest manifest";
    for (segment, files) in &evidence.seeds {
        let newest = files.iter().max_by_key(|file| file.named.generation);
        let Some(SeedFile { named, .. }) = newest else {
            continue;
        };
        if named.generation > 0 {
            let message = format!(
                "seed segment {segment} was rewritten: versions were left out of it, and only \
                 notes or the newest manifest tell which points may still be shown"
            );
            return Err(refused(message, hint));
        }
        resolved.seeds.insert(*segment, *named);
    }
    for (segment, named) in &state.segments {
        if resolved.seeds.get(segment) != Some(named) {
            return Err(missing(*segment));
        }
    }
    Ok(())
}

/// Refuses when commits of the log are missing.
fn log_goes_on(state: &State, evidence: &Evidence, released: u64) -> Result<(), AftError> {
    let last = evidence.last_sequence.unwrap_or(0).max(released);
    if last < state.checkpoint {
        let message = format!(
            "the log ends at commit {last}, and was applied up to commit {}: what followed is \
             missing",
            state.checkpoint
        );
        return Err(refused(message, PUT_BACK));
    }
    // Of a history that is not known, or was dropped, nothing is shown.
    let known = evidence.in_runs.iter();
    for (history, high) in known.filter(|(history, _)| state.parents.contains_key(history)) {
        let in_log = evidence.histories.get(history).map(|(_, last)| *last);
        let last = in_log.max(state.covered.get(history).copied());
        let last = last.unwrap_or(Lsn::ZERO);
        if *high > last {
            let message = format!(
                "the log ends at LSN {last} of history {history}, and runs hold it up to LSN \
                 {high}: what followed is missing"
            );
            return Err(refused(message, PUT_BACK));
        }
    }
    let first = evidence.begins_behind(released);
    if let Some(first) = first.filter(|first| *first > released.saturating_add(1)) {
        let message = format!(
            "the log begins with commit {first}: those from {} on before it are missing, and \
             nothing tells that they were moved to seed segments",
            released + 1
        );
        return Err(refused(
            message,
            "put its first segments back, then try again",
        ));
    }
    // Of what was moved some may be left.
    let mut gaps = evidence.gaps.iter().filter(|(last, _)| *last > released);
    if let Some((_, first)) = gaps.next() {
        let message = format!("{}: {}", first.file, first.what);
        return Err(refused(message, "put the segment back, then try again"));
    }
    Ok(())
}

/// Refuses when seed segments may be missing of which nothing tells.
pub(super) fn must_know_all_bulk(
    source: &Source,
    state: &State,
    evidence: &Evidence,
) -> Result<(), AftError> {
    let hint = "name a newer copy of the manifest";
    // Notes know of those before.
    let is_noted = source.notes.is_some();
    let first = if is_noted { state.next_segment } else { 1 } | SEED_BIT;
    let highest_named = state.segments.keys().max().map(|id| id.0);
    let readable = evidence.seeds.keys().map(|id| id.0);
    let numbers: BTreeSet<u32> = readable.collect();
    let highest = numbers.last().copied().max(highest_named);
    let gap = (first..=highest.unwrap_or(0)).find(|number| !numbers.contains(number));
    if let Some(number) = gap.filter(|_| !is_noted) {
        let message = format!("seed segment {number} is missing, and nothing says why");
        return Err(refused(message, hint));
    }
    let known = known_through(source.chain.edits());
    for batch in &evidence.batches {
        let known = known.get(&batch.history).copied().unwrap_or(Lsn::ZERO);
        let is_open = batch.end == Lsn::ZERO;
        let may_lack = match gap {
            Some(_) => is_open || batch.end > known,
            // Of an open one nothing is shown yet.
            None if is_open => !is_noted,
            None => batch.end > known,
        };
        if may_lack {
            let message = format!(
                "the copy of LSN {} of history {} is newer than what manifest and notes know, \
                 which is up to LSN {known}: seed segments of it may be missing",
                batch.begin, batch.history
            );
            return Err(refused(message, hint));
        }
    }
    Ok(())
}

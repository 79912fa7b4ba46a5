//! `aft store dump`: what files say, for people and scripts. It prints as it reads: a segment can
//! have millions of slots.

use afterimage_blockdev::SegmentId;
use afterimage_cache::segment::{SegmentScan, segment_file};
use afterimage_seed::entry::EntryKind;
use afterimage_seed::manifest::SECTOR;
use afterimage_seed::run::{self, RunFooter, RunId, SectionTable, decode_page, place_of, run_file};
use afterimage_seed::segment::{FOOTERS_BYTES, SeedFooter, parse_seed_file, seed_file};
use serde_json::{Value, json};

use super::chain::Chain;
use super::check::{log_segments, newest_manifest, state_of};
use super::edits::{describe, hex, line};
use super::state::State;
use super::{Store, refused};
use crate::error::AftError;

/// What is to be shown.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum What {
    /// Edits of the manifest, in order.
    Manifest,
    /// Points.
    Points,
    /// Slots of a seed segment.
    Segment(u32),
    /// Sections of a run.
    Run(u32),
    /// Commits of the log.
    Log,
}

/// Takes one thing at a time: a line for people, and the same for scripts.
type Sink<'a> = dyn FnMut(&str, &Value) + 'a;

/// Shows a part of a store.
///
/// # Errors
/// When there is nothing that can be read.
pub fn dump(store: &Store, what: What, sink: &mut Sink<'_>) -> Result<(), AftError> {
    let chain = newest_manifest(store, &mut Vec::new())?
        .ok_or_else(|| refused("there is no whole manifest", "`aft store check` says why"))?;
    let state = state_of(store, chain.all_edits())?;
    match what {
        What::Manifest => manifest(&chain, sink),
        What::Points => points(&state, sink),
        What::Segment(number) => segment(store, &state, SegmentId(number), sink)?,
        What::Run(number) => one_run(store, &state, RunId(number), sink)?,
        What::Log => log(store, &state, sink)?,
    }
    Ok(())
}

fn manifest(chain: &Chain, sink: &mut Sink<'_>) {
    let read = chain.commits.iter().map(|placed| (placed, true));
    let beyond = chain.beyond.iter().map(|placed| (placed, false));
    for (placed, follows) in read.chain(beyond) {
        for edit in &placed.commit.edits {
            let (name, fields) = describe(edit);
            let value = json!({
                "commit": placed.commit.sequence,
                "offset": placed.offset,
                "is_snapshot": placed.commit.is_snapshot,
                "follows": follows,
                "edit": name,
                "fields": fields,
            });
            let broken = if follows { "" } else { " (behind damage)" };
            let text = format!(
                "{:>8}{broken} {name}: {}",
                placed.commit.sequence,
                line(&fields)
            );
            sink(&text, &value);
        }
    }
    for found in &chain.findings {
        let text = format!("! {} at {}: {}", found.file, found.offset, found.what);
        sink(&text, &json!({ "damage": found }));
    }
}

fn points(state: &State, sink: &mut Sink<'_>) {
    for point in state.points.values() {
        let edit = afterimage_seed::manifest::Edit::Point(point.clone());
        let (_, fields) = describe(&edit);
        sink(&line(&fields), &fields);
    }
}

fn segment(
    store: &Store,
    state: &State,
    number: SegmentId,
    sink: &mut Sink<'_>,
) -> Result<(), AftError> {
    let named = state.segments.get(&number).map(|named| named.generation);
    let found = store.parsed("segments", parse_seed_file)?;
    let of_it = found.into_iter().filter(|(id, _)| *id == number);
    let newest = of_it.map(|(_, generation)| generation).max();
    let Some(generation) = named.or(newest) else {
        let message = format!("there is no seed segment {number}");
        return Err(refused(message, "`aft store dump --manifest` names them"));
    };
    let name = seed_file(number, generation).to_string();
    let bytes = store.read(&name)?.unwrap_or_default();
    let ends = bytes.len().saturating_sub(FOOTERS_BYTES);
    let wrong = |damage| refused(format!("{name}: {damage}"), "`aft store verify` says more");
    let footer =
        SeedFooter::find(bytes.get(ends..).unwrap_or(&[]), state.store, number).map_err(wrong)?;
    let at = usize::try_from(footer.directory_offset).unwrap_or(usize::MAX);
    let (offsets, entries) = footer
        .find_directory(bytes.get(at..).unwrap_or(&[]))
        .map_err(wrong)?;
    for entry in entries {
        let context = &entry.context;
        let fields = json!({
            "slot": entry.slot,
            "offset": offsets.get(entry.slot),
            "disk": context.disk,
            "history": context.history,
            "cell": context.cell.0,
            "mask": context.mask,
            "lsns": context.lsns,
            "hash": hex(&entry.hash),
        });
        sink(&line(&fields), &fields);
    }
    Ok(())
}

fn one_run(
    store: &Store,
    state: &State,
    number: RunId,
    sink: &mut Sink<'_>,
) -> Result<(), AftError> {
    let name = run_file(number).to_string();
    let Some(bytes) = store.read(&name)? else {
        let message = format!("there is no run {}", number.0);
        return Err(refused(message, "`aft store dump --manifest` names them"));
    };
    let wrong = |damage| refused(format!("{name}: {damage}"), "`aft store verify` says more");
    let ends = bytes.len().saturating_sub(run::FOOTERS_BYTES);
    let footer =
        RunFooter::find(bytes.get(ends..).unwrap_or(&[]), state.store, number).map_err(wrong)?;
    let at = usize::try_from(footer.tail_offset).unwrap_or(usize::MAX);
    let sections = footer
        .find_tail(bytes.get(at..).unwrap_or(&[]))
        .map_err(wrong)?;
    for section in sections {
        let kinds = kinds(&bytes, number, &section);
        let fields = json!({
            "history": section.name.history,
            "disk": section.name.disk,
            "is_base_part": section.name.is_base_part,
            "low": section.low,
            "high": section.high,
            "entries": section.entry_count,
            "first_page": section.first_page,
            "pages": section.fences.len(),
            "ranges": section.ranges.len(),
            "samples": section.timeline.len(),
            "bulk": kinds[0],
            "writes": kinds[1],
            "others": kinds[2],
            "damaged_pages": kinds[3],
        });
        sink(&line(&fields), &fields);
    }
    Ok(())
}

/// Entries of a section by kind: bulk, writes, others; and pages that cannot be read.
fn kinds(bytes: &[u8], run: RunId, section: &SectionTable) -> [u64; 4] {
    let mut kinds = [0; 4];
    for page in 0..u32::try_from(section.fences.len()).unwrap_or(u32::MAX) {
        let number = section.first_page.saturating_add(page);
        let place = place_of(number, section.file_pages);
        let copies = [place.offset, place.copy].into_iter().filter_map(|offset| {
            let at = usize::try_from(offset).ok()?;
            decode_page(bytes.get(at..at.checked_add(SECTOR)?)?, run, number).ok()
        });
        let Some(entries) = copies.into_iter().next() else {
            kinds[3] += 1;
            continue;
        };
        for entry in entries {
            match entry.kind {
                EntryKind::Bulk => kinds[0] += 1,
                EntryKind::Data => kinds[1] += 1,
                _ => kinds[2] += 1,
            }
        }
    }
    kinds
}

fn log(store: &Store, state: &State, sink: &mut Sink<'_>) -> Result<(), AftError> {
    for segment in log_segments(store)? {
        let name = segment_file("log", segment).to_string();
        let bytes = store.read(&name)?.unwrap_or_default();
        let mut scan = SegmentScan::new(&bytes, state.store, segment);
        while let Some(item) = scan.step() {
            let Ok(commit) = item else { continue };
            let header = commit.header;
            let frames: Vec<Value> = commit
                .frames
                .iter()
                .filter_map(|at| scan.frame(*at))
                .map(|frame| {
                    let header = frame.header;
                    json!({
                        "machine": header.identity.machine,
                        "history": header.identity.history,
                        "epoch": header.identity.epoch.0,
                        "first": header.first,
                        "last": header.last,
                        "records": header.record_count,
                        "slots": header.slot_count,
                    })
                })
                .collect();
            let value = json!({
                "segment": segment.0,
                "offset": header.offset,
                "commit": header.sequence,
                "durable_through": header.durable_through,
                "first_slot": header.first_slot,
                "slots": header.slot_count,
                "damaged_slots": commit.damaged.len(),
                "frames": frames,
            });
            let frames: Vec<String> = frames
                .iter()
                .map(|frame| format!("  {}", line(frame)))
                .collect();
            let text = format!(
                "segment {} at {}: commit {}, {} slots, {} damaged\n{}",
                segment.0,
                header.offset,
                header.sequence,
                header.slot_count,
                commit.damaged.len(),
                frames.join("\n")
            );
            sink(text.trim_end(), &value);
        }
    }
    Ok(())
}

//! `aft store rebuild`: a manifest and a map from what is left of them, and from segments.
//!
//! Invariants
//! * What is rebuilt is at least as new as the newest rewriting of a segment, and all of what that
//!   left is there. Otherwise points that were dropped, or LSNs below a floor that is not known,
//!   would be shown with other content.
//! * Keys of disks are in manifests and notes only. What has none is left out, and named.
//! * Nothing is removed or overwritten; an old manifest is kept under another name.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use afterimage_blockdev::{DiskId, HistoryId, Lsn, MachineId, PointId, SegmentId, Timestamp};
use afterimage_cache::key;
use afterimage_seed::manifest::{Edit, HistoryState};
use afterimage_seed::run::{RunId, parse_run_file};
use serde::Serialize;

use super::chain::Chain;
use super::check::{check, first_header, state_of};
use super::complete::{Resolved, SEED_BIT, must_know_all_bulk, resolve};
use super::evidence::{Batch, Evidence};
use super::maps::Maps;
use super::marks::{next_point, points_of_marks};
use super::notes::{newest_rest, read_rest};
use super::place::{prepare, write};
use super::source::Source;
use super::state::State;
use super::{Finding, Store, refused};
use crate::error::AftError;

/// What is to be rebuilt, and where.
#[derive(Clone, Debug)]
pub struct Order {
    /// A copy of a manifest file of this store, however old; otherwise what is left of its own.
    pub manifest: Option<PathBuf>,
    /// A new directory; in place when not given.
    pub to: Option<PathBuf>,
}

/// What was rebuilt.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Rebuilt {
    /// The data directory with the new manifest.
    pub directory: PathBuf,
    /// Number of the newest notes, when there are any.
    pub notes: Option<u32>,
    /// Where the old manifest is kept.
    pub kept: Option<PathBuf>,
    /// Edits that were taken over.
    pub edits: usize,
    /// Seed segments that count.
    pub segments: usize,
    /// Points that were taken over.
    pub points: usize,
    /// Points that were made of marks in the log.
    pub points_of_marks: usize,
    /// What could not be rebuilt.
    pub missing: Vec<String>,
    /// Damage that was met; the daemon says at its start what it costs.
    pub findings: Vec<Finding>,
}

/// Rebuilds the manifest of a store. Everything else that is derived the daemon makes at its start.
///
/// # Errors
/// When the result would show something wrong as right, or the medium fails.
pub fn rebuild(store: &Store, order: &Order) -> Result<Rebuilt, AftError> {
    let source = Source::choose(store, order.manifest.as_deref())?;
    let state = state_of(store, source.chain.all_edits())?;
    let named = source.is_whole.then_some(&state.segments);
    let batches = known_batches(&source.chain);
    let evidence = Evidence::gather(store, state.store, named, batches)?;
    let resolved = resolve(&source, &state, &evidence)?;
    if !source.is_whole {
        must_know_all_bulk(&source, &state, &evidence)?;
    }
    let rest = rest(store, &source, &state, resolved.released)?;
    let secret = store.key().map_err(|why| {
        refused(
            format!("store.key: {why}"),
            "put the key of this store back",
        )
    })?;
    let mut rebuilt = Rebuilt {
        findings: findings(&source, &evidence, &resolved),
        notes: source.notes.as_ref().map(|notes| notes.number),
        ..Rebuilt::default()
    };
    let known = Known {
        source: &source.chain,
        evidence: &evidence,
        resolved: &resolved,
    };
    let mut edits = edits(store, &known, &secret, &mut rebuilt)?;
    let target = prepare(store, order)?;
    let mut maps = Maps {
        store,
        id: state.store,
        target: &target,
        histories: histories(&edits),
        next_run: next_run(&edits),
        edits: Vec::new(),
    };
    let destaged = resolved.seeds.iter();
    let destaged = destaged.filter(|(segment, _)| segment.0 & SEED_BIT == 0);
    maps.write_slots(&destaged.map(|(id, named)| (*id, *named)).collect())?;
    if let Some((run, bytes)) = rest {
        maps.write_rest(run, &bytes)?;
    }
    edits.append(&mut maps.edits);
    rebuilt.edits = edits.len();
    rebuilt.segments = resolved.seeds.len();
    write(store, target, (&edits, source.next_sequence), &mut rebuilt)?;
    let checked = match &order.to {
        None => check(store)?,
        Some(to) => check(&Store::open(to)?)?,
    };
    for found in checked.findings {
        if !rebuilt.findings.contains(&found) {
            rebuilt.findings.push(found);
        }
    }
    Ok(rebuilt)
}

/// Damage of what counts. Of what does not, some was never whole.
fn findings(source: &Source, evidence: &Evidence, resolved: &Resolved) -> Vec<Finding> {
    let counts = |segment: SegmentId, generation: u32| {
        let named = resolved.seeds.get(&segment);
        source.notes.is_none() || named.is_some_and(|named| named.generation == generation)
    };
    let of_seeds = evidence.of_seeds.iter();
    let of_seeds = of_seeds.filter(|(segment, generation, _)| counts(*segment, *generation));
    let of_seeds = of_seeds.map(|(_, _, found)| found.clone());
    evidence.findings.iter().cloned().chain(of_seeds).collect()
}

/// What of the map has no slot, when commits of the log are gone that told of it.
fn rest(
    store: &Store,
    source: &Source,
    state: &State,
    released: u64,
) -> Result<Option<(RunId, Vec<u8>)>, AftError> {
    if released == 0 {
        return Ok(None);
    }
    let hint = "if the manifest is whole, afterimaged starts without this and says what is lost";
    let found = source.rest(store)?;
    let Some((run, through)) = found.filter(|(_, through)| *through >= released) else {
        let known = found.map_or(0, |(_, through)| through);
        let message = format!(
            "the log was moved to seed segments up to commit {released}, and notes tell of its \
             zeroes and discards up to commit {known} only: old data would be shown as new"
        );
        return Err(refused(message, hint));
    };
    match read_rest(store, state.store, (run, through))? {
        Ok(bytes) => Ok(Some((run, bytes))),
        Err(why) => {
            let message = format!("{why}: without it old data would be shown as new");
            Err(refused(message, "put the file back, then try again"))
        }
    }
}

/// The batches that edits tell of; those of which the log may tell the end are open.
fn known_batches(chain: &Chain) -> Vec<Batch> {
    let mut batches: BTreeMap<(HistoryId, Lsn), Batch> = BTreeMap::new();
    for edit in chain.all_edits() {
        if let Edit::Batch(batch) = edit {
            let known = Batch {
                history: batch.history,
                batch: batch.batch,
                begin: batch.begin,
                end: batch.end,
                disks: batch.disks.iter().copied().collect(),
            };
            batches.insert((batch.history, batch.begin), known);
        }
    }
    batches.into_values().collect()
}

fn histories(edits: &[Edit]) -> BTreeSet<HistoryId> {
    let mut histories = BTreeSet::new();
    for edit in edits {
        match edit {
            Edit::History { history, .. } => {
                histories.insert(*history);
            }
            Edit::HistoryDropped { history } => {
                histories.remove(history);
            }
            _ => {}
        }
    }
    histories
}

fn next_run(edits: &[Edit]) -> u32 {
    let said = edits.iter().filter_map(|edit| match edit {
        Edit::Store { next_run, .. } => Some(next_run.0),
        _ => None,
    });
    said.max().unwrap_or(1)
}

/// All that edits are made of.
struct Known<'a> {
    source: &'a Chain,
    evidence: &'a Evidence,
    resolved: &'a Resolved,
}

/// The edits of the new manifest.
fn edits(
    store: &Store,
    known: &Known<'_>,
    secret: &[u8; 32],
    rebuilt: &mut Rebuilt,
) -> Result<Vec<Edit>, AftError> {
    let Known {
        source,
        evidence,
        resolved,
    } = known;
    let mut kept: Vec<Edit> = source
        .all_edits()
        .filter(|edit| is_kept(edit))
        .cloned()
        .collect();
    let mut epochs: BTreeMap<HistoryId, HistoryState> = BTreeMap::new();
    let (mut disks, mut machines) = (BTreeSet::new(), BTreeSet::new());
    let mut forks: BTreeMap<HistoryId, Lsn> = BTreeMap::new();
    for edit in source.all_edits() {
        match edit {
            Edit::Disk {
                disk,
                key: number,
                wrapped,
                name,
                ..
            } => {
                if key::unwrap(secret, *disk, *number, wrapped).is_none() {
                    let message = format!("store.key does not open the key of disk {name}");
                    return Err(refused(message, "put the key of this store back"));
                }
                disks.insert(*disk);
            }
            Edit::Machine { machine, .. } => {
                machines.insert(*machine);
            }
            Edit::History { history, fork, .. } => {
                forks.insert(*history, *fork);
            }
            Edit::HistoryDropped { history } => {
                forks.remove(history);
            }
            Edit::HistoryState(state) => {
                epochs.insert(state.history, state.clone());
            }
            _ => {}
        }
    }
    // Of a machine that is not known nothing can be shown.
    kept.retain(|edit| machine_of(edit).is_none_or(|machine| machines.contains(&machine)));
    let applied = State::of(source.all_edits()).checkpoint;
    name_missing(evidence, applied, &forks, &disks, &machines, rebuilt);
    kept.extend(known.covered(&forks, &epochs));
    kept.extend(resolved.seeds.iter().map(|(segment, named)| Edit::Segment {
        segment: *segment,
        generation: named.generation,
        slot_count: named.slot_count,
        bytes: named.bytes,
        root: named.root,
    }));
    let state = State::of(source.all_edits());
    let points = points_of_marks(
        evidence,
        &state,
        &forks,
        &source.edits().cloned().collect::<Vec<_>>(),
    );
    rebuilt.points = state.points.len();
    rebuilt.points_of_marks = points.len();
    kept.extend(points.into_iter().map(Edit::Point));
    let first = first_edit(store, source, &kept)?;
    kept.insert(0, first);
    Ok(kept)
}

impl Known<'_> {
    /// What the map holds before the log is applied. A stale writer stays refused.
    fn covered(
        &self,
        forks: &BTreeMap<HistoryId, Lsn>,
        epochs: &BTreeMap<HistoryId, HistoryState>,
    ) -> Vec<Edit> {
        let released = self.resolved.released;
        let mut lasts = BTreeMap::new();
        let mut edits = Vec::new();
        for (history, state) in epochs {
            let Some(fork) = forks.get(history) else {
                continue;
            };
            let last = match self.evidence.first_behind(*history, released) {
                _ if released == 0 => *fork,
                Some(first) => state.last.min(Lsn(first.0.saturating_sub(1))),
                None => state.last,
            };
            lasts.insert(*history, last);
            let is_first = last <= *fork;
            edits.push(Edit::HistoryState(HistoryState {
                last,
                highest_bulk: Lsn::ZERO,
                time: if is_first { Timestamp(0) } else { state.time },
                ..state.clone()
            }));
        }
        if released == 0 {
            return edits;
        }
        let last_of = |history: HistoryId| lasts.get(&history).copied().unwrap_or(Lsn::ZERO);
        for edit in self.source.all_edits() {
            match edit {
                Edit::Batch(batch) if batch.begin <= last_of(batch.history) => {
                    let mut batch = batch.clone();
                    // Its end comes from the log.
                    if batch.end > last_of(batch.history) {
                        batch.end = Lsn::ZERO;
                    }
                    edits.push(Edit::Batch(batch));
                }
                Edit::Lost { history, last, .. } if *last <= last_of(*history) => {
                    edits.push(edit.clone());
                }
                _ => {}
            }
        }
        edits.push(Edit::Checkpoint {
            log_sequence: released,
        });
        edits.push(Edit::LogReleased {
            log_sequence: released,
        });
        edits
    }
}

/// Says whether an edit still holds when the map is made anew.
fn is_kept(edit: &Edit) -> bool {
    !matches!(
        edit,
        Edit::Store { .. }
            | Edit::Segment { .. }
            | Edit::SegmentDropped { .. }
            | Edit::LogReleased { .. }
            | Edit::Run { .. }
            | Edit::RunDropped { .. }
            | Edit::Checkpoint { .. }
            | Edit::BaseThrough { .. }
            | Edit::HistoryState(_)
            | Edit::Batch(_)
            | Edit::Lost { .. }
            | Edit::Noted(_)
    )
}

/// The machine that must be known before an edit means something.
fn machine_of(edit: &Edit) -> Option<MachineId> {
    match edit {
        Edit::Disk { machine, .. } | Edit::History { machine, .. } => Some(*machine),
        Edit::Point(point) => Some(point.machine),
        _ => None,
    }
}

/// Names what segments hold, and the manifest does not know. Of what had been applied to the map
/// when it was written, it knows that it was dropped.
fn name_missing(
    evidence: &Evidence,
    applied: u64,
    forks: &BTreeMap<HistoryId, Lsn>,
    disks: &BTreeSet<DiskId>,
    machines: &BTreeSet<MachineId>,
    rebuilt: &mut Rebuilt,
) {
    for (history, (machine, _)) in &evidence.histories {
        if !machines.contains(machine) {
            let what = format!("machine {machine}: its name and keys are not known");
            rebuilt.missing.push(what);
        } else if !forks.contains_key(history) && !evidence.wrote_by(*history, applied) {
            let what =
                format!("history {history} of machine {machine}: where it forked is not known");
            rebuilt.missing.push(what);
        }
    }
    for disk in evidence.disks.keys().filter(|disk| !disks.contains(*disk)) {
        let what = format!("disk {disk}: its name and key are not known");
        rebuilt.missing.push(what);
    }
    rebuilt.missing.sort();
    rebuilt.missing.dedup();
}

/// The store's own edit: no number that may have been named is given out again.
fn first_edit(store: &Store, source: &Chain, kept: &[Edit]) -> Result<Edit, AftError> {
    let known = source
        .all_edits()
        .find(|edit| matches!(edit, Edit::Store { .. }));
    let mut first = match (known, first_header(store)?) {
        (Some(known), _) => known.clone(),
        // Segments of the log name the store, too.
        (None, Some(header)) => Edit::Store {
            store: header.identity.store,
            created: header.time,
            next_segment: SegmentId(1),
            next_run: RunId(1),
            next_point: PointId(1),
        },
        (None, None) => return Err(refused("nothing tells which store this is", "")),
    };
    if let Edit::Store {
        next_segment,
        next_run,
        next_point: point,
        ..
    } = &mut first
    {
        let all = || source.all_edits().chain(kept);
        let segments = all().filter_map(|edit| match edit {
            Edit::Store { next_segment, .. } => Some(next_segment.0),
            Edit::Segment { segment, .. } => Some((segment.0 & !SEED_BIT).saturating_add(1)),
            _ => None,
        });
        *next_segment = SegmentId(segments.max().unwrap_or(1));
        let named = all().filter_map(|edit| match edit {
            Edit::Store { next_run, .. } => Some(next_run.0),
            Edit::Run { run, .. } => Some(run.0.saturating_add(1)),
            _ => None,
        });
        let noted = newest_rest(store)?.map(|(run, _)| run);
        let found = store
            .parsed("runs", parse_run_file)?
            .into_iter()
            .chain(noted);
        let found = found.map(|run| run.0.saturating_add(1));
        *next_run = RunId(named.chain(found).max().unwrap_or(1));
        let after = next_point(&all().cloned().collect::<Vec<_>>());
        *point = PointId(after.max(point.0));
    }
    Ok(first)
}

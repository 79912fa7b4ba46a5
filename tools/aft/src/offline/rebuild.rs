//! `aft store rebuild`: a manifest from what is left of one, and from segments.
//!
//! Invariants
//! * Only a store of which every version ever received is still there is rebuilt: the log begins
//!   with its first commit, and no seed segment was rewritten or is missing. Otherwise points that
//!   were dropped, or LSNs below a floor that is not known, would be shown with other content.
//! * Keys of disks are in manifests only. What has none is left out, and named.
//! * Nothing is removed or overwritten; an old manifest is kept under another name.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;

use afterimage_blockdev::{DiskId, HistoryId, Lsn, MachineId, PointId, SegmentId, Timestamp};
use afterimage_cache::{MarkKind, key};
use afterimage_seed::manifest::{Edit, HistoryState, PointKind, PointRecord};
use afterimage_seed::reference::{At, format_time};
use afterimage_seed::run::{RunId, parse_run_file};
use serde::Serialize;

use super::chain::Chain;
use super::check::{check, first_header, newest_manifest, state_of};
use super::evidence::Evidence;
use super::place::write;
use super::state::State;
use super::{Finding, Store, file_error, refused};
use crate::error::AftError;

/// Tells a segment of bulk blocks from one of the log.
const SEED_BIT: u32 = 1 << 31;
/// Longest name of a point that is taken over from a mark.
const NAME_BYTES_MAX: usize = 128;
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
    let source = source(store, order)?;
    let state = state_of(store, source.all_edits())?;
    let is_whole = order.manifest.is_none() && source.is_whole();
    let named = is_whole.then_some(&state.segments);
    let evidence = Evidence::gather(store, state.store, named)?;
    must_be_complete(&state, &evidence, is_whole)?;
    if !is_whole {
        must_know_all_bulk(&source, &state, &evidence)?;
    }
    let secret = store.key().map_err(|why| {
        refused(
            format!("store.key: {why}"),
            "put the key of this store back",
        )
    })?;
    let mut rebuilt = Rebuilt {
        findings: evidence.findings.clone(),
        ..Rebuilt::default()
    };
    let edits = edits(store, &source, &evidence, &secret, &mut rebuilt)?;
    rebuilt.edits = edits.len();
    rebuilt.segments = evidence.seeds.len();
    write(store, order, &edits, &mut rebuilt)?;
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

/// The manifest to begin with.
fn source(store: &Store, order: &Order) -> Result<Chain, AftError> {
    let chain = match &order.manifest {
        Some(path) => {
            let bytes = fs::read(path).map_err(|error| file_error(path, &error))?;
            Some(Chain::read(path.display().to_string(), &bytes))
        }
        None => newest_manifest(store, &mut Vec::new())?,
    };
    let is_usable = |chain: &Chain| chain.all_edits().next().is_some();
    chain.filter(is_usable).ok_or_else(|| {
        refused(
            "there is no manifest to begin with: the keys of the disks are nowhere else",
            "name a copy of a manifest file of this store with --manifest, however old",
        )
    })
}

/// Refuses when versions are gone that only runs and the newest manifest could tell of.
fn must_be_complete(state: &State, evidence: &Evidence, is_whole: bool) -> Result<(), AftError> {
    let daemon = "if the manifest is whole, afterimaged starts without this and says what is lost";
    let (first, last) = (evidence.first_sequence, evidence.last_sequence);
    if last.unwrap_or(0) < state.checkpoint {
        let message = format!(
            "the log ends at commit {}, and was applied up to commit {}: what followed is missing",
            last.unwrap_or(0),
            state.checkpoint
        );
        return Err(refused(
            message,
            "put its last segments back, then try again",
        ));
    }
    for (history, high) in &evidence.in_runs {
        let last = evidence
            .histories
            .get(history)
            .map_or(Lsn::ZERO, |(_, last)| *last);
        if *high > last {
            let message = format!(
                "the log ends at LSN {last} of history {history}, and runs hold it up to LSN \
                 {high}: what followed is missing"
            );
            return Err(refused(
                message,
                "put its last segments back, then try again",
            ));
        }
    }
    if let Some(first) = first.filter(|first| *first > 1 && state.log_released == 0) {
        let message = format!(
            "the log begins with commit {first}: those before it are missing, or were moved to \
             seed segments after this manifest was written"
        );
        return Err(refused(
            message,
            "put its first segments back, then try again",
        ));
    }
    if state.log_released > 0 {
        let message = format!(
            "the log was moved to seed segments up to commit {}: zeroes, discards and sizes of \
             that part are in runs only, so that old data would be shown as new",
            state.log_released
        );
        return Err(refused(message, daemon));
    }
    if let Some(first) = evidence
        .findings
        .iter()
        .find(|f| f.what.contains("are missing"))
    {
        let message = format!("{}: {}", first.file, first.what);
        return Err(refused(message, "put the segment back, then try again"));
    }
    for (segment, named) in &evidence.seeds {
        let is_named = state.segments.get(segment) == Some(named);
        if named.generation > 0 && !(is_whole && is_named) {
            let message = format!(
                "seed segment {segment} was rewritten: versions were left out of it, and only the \
                 newest manifest tells which points may still be shown"
            );
            return Err(refused(message, daemon));
        }
    }
    for (segment, named) in &state.segments {
        if evidence.seeds.get(segment) != Some(named) {
            let message = format!(
                "seed segment {segment} is missing or damaged: blocks that only it holds would \
                 be shown as zeroes"
            );
            return Err(refused(message, "put the file back, then try again"));
        }
    }
    Ok(())
}

/// Refuses when seed segments may be missing of which no manifest tells.
fn must_know_all_bulk(source: &Chain, state: &State, evidence: &Evidence) -> Result<(), AftError> {
    let highest_named = state.segments.keys().max().map_or(SEED_BIT, |id| id.0);
    let numbers: BTreeSet<u32> = evidence.seeds.keys().map(|id| id.0).collect();
    let highest = numbers
        .last()
        .copied()
        .unwrap_or(SEED_BIT)
        .max(highest_named);
    let gap = (SEED_BIT + 1..=highest).find(|number| !numbers.contains(number));
    if let Some(number) = gap {
        let message = format!("seed segment {number} is missing, and nothing says why");
        return Err(refused(message, "name a newer copy of the manifest"));
    }
    let known = known_through(source.edits());
    for batch in &evidence.batches {
        let known = known.get(&batch.history).copied().unwrap_or(Lsn::ZERO);
        if batch.end == Lsn::ZERO || batch.end > known {
            let message = format!(
                "the copy of LSN {} of history {} is newer than this manifest, which knows it up \
                 to LSN {known}: seed segments of it may be missing",
                batch.begin, batch.history
            );
            return Err(refused(message, "name a newer copy of the manifest"));
        }
    }
    Ok(())
}

/// Up to which LSN of each history the edits surely say everything about bulk blocks.
fn known_through<'a>(edits: impl Iterator<Item = &'a Edit>) -> BTreeMap<HistoryId, Lsn> {
    let mut known = BTreeMap::new();
    for edit in edits {
        let (history, lsn) = match edit {
            Edit::HistoryState(state) => (state.history, state.last),
            Edit::Point(point) => (point.history, point.lsn),
            _ => continue,
        };
        let most: &mut Lsn = known.entry(history).or_default();
        *most = lsn.max(*most);
    }
    known
}

/// The edits of the new manifest.
fn edits(
    store: &Store,
    source: &Chain,
    evidence: &Evidence,
    secret: &[u8; 32],
    rebuilt: &mut Rebuilt,
) -> Result<Vec<Edit>, AftError> {
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
    name_missing(evidence, &forks, &disks, &machines, rebuilt);
    // A stale writer stays refused; how far the map goes is told by the log alone.
    kept.extend(epochs.into_values().map(|state| {
        Edit::HistoryState(HistoryState {
            last: forks.get(&state.history).copied().unwrap_or(Lsn::ZERO),
            highest_bulk: Lsn::ZERO,
            time: Timestamp(0),
            ..state
        })
    }));
    kept.extend(evidence.seeds.iter().map(|(segment, named)| Edit::Segment {
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

/// Says whether an edit still holds when the map is made anew.
fn is_kept(edit: &Edit) -> bool {
    matches!(
        edit,
        Edit::Machine { .. }
            | Edit::Disk { .. }
            | Edit::History { .. }
            | Edit::HistoryDropped { .. }
            | Edit::Size { .. }
            | Edit::Point(_)
            | Edit::PointDropped { .. }
            | Edit::Policy { .. }
            | Edit::PointLocked { .. }
            | Edit::Clock(_)
            | Edit::Floor { .. }
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

/// Names what segments hold, and the manifest does not know.
fn name_missing(
    evidence: &Evidence,
    forks: &BTreeMap<HistoryId, Lsn>,
    disks: &BTreeSet<DiskId>,
    machines: &BTreeSet<MachineId>,
    rebuilt: &mut Rebuilt,
) {
    for (history, (machine, _)) in &evidence.histories {
        if !machines.contains(machine) {
            let what = format!("machine {machine}: its name and keys are not known");
            rebuilt.missing.push(what);
        } else if !forks.contains_key(history) {
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

/// Points for the marks of the log that are newer than what the manifest knows.
fn points_of_marks(
    evidence: &Evidence,
    state: &State,
    forks: &BTreeMap<HistoryId, Lsn>,
    edits: &[Edit],
) -> Vec<PointRecord> {
    let known = known_through(edits.iter());
    let mut names: BTreeSet<(MachineId, String)> = state
        .points
        .values()
        .map(|point| (point.machine, point.name.clone()))
        .collect();
    let mut next = state
        .points
        .keys()
        .max()
        .map_or(1, |id| id.0.saturating_add(1));
    next = next.max(next_point(edits));
    let cuts: BTreeSet<_> = state
        .points
        .values()
        .map(|point| (point.history, point.lsn))
        .collect();
    let mut points = Vec::new();
    for mark in &evidence.marks {
        let kind = match mark.kind {
            MarkKind::Crash => PointKind::Crash,
            MarkKind::Application => PointKind::Application,
            MarkKind::Bookmark | MarkKind::Group => PointKind::Bookmark,
            MarkKind::Heartbeat => continue,
        };
        let through = known.get(&mark.history).copied().unwrap_or(Lsn::ZERO);
        // A mark inside a copy is no state of the source.
        let is_inside = evidence.batches.iter().any(|batch| {
            batch.history == mark.history
                && batch.begin <= mark.lsn
                && (batch.end == Lsn::ZERO || batch.end > mark.lsn)
        });
        let is_named = cuts.contains(&(mark.history, mark.lsn));
        if mark.lsn <= through || is_named || is_inside || !forks.contains_key(&mark.history) {
            continue;
        }
        let id = PointId(next);
        next = next.saturating_add(1);
        let generated = format!("{}-{}", kind.name(), format_time(mark.time));
        let given = core::str::from_utf8(&mark.name)
            .ok()
            .filter(|name| is_name(name));
        let mut name = given.map_or_else(|| generated.clone(), str::to_owned);
        if names.contains(&(mark.machine, name.clone())) {
            name = format!("{generated}-{id}");
        }
        names.insert((mark.machine, name.clone()));
        points.push(PointRecord {
            id,
            machine: mark.machine,
            history: mark.history,
            lsn: mark.lsn,
            time: mark.time,
            kind,
            locked_until: Timestamp(0),
            name,
        });
    }
    points
}

fn is_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= NAME_BYTES_MAX
        && !name.starts_with(['.', '-'])
        && !name
            .chars()
            .any(|c| c.is_control() || matches!(c, '/' | '@'))
        && matches!(name.parse::<At>(), Ok(At::Name(_)))
}

fn next_point(edits: &[Edit]) -> u64 {
    let said = edits.iter().filter_map(|edit| match edit {
        Edit::Store { next_point, .. } => Some(next_point.0),
        Edit::Point(point) => Some(point.id.0.saturating_add(1)),
        _ => None,
    });
    said.max().unwrap_or(1)
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
        let found = store.parsed("runs", parse_run_file)?;
        let found = found.into_iter().map(|run| run.0.saturating_add(1));
        *next_run = RunId(named.chain(found).max().unwrap_or(1));
        let after = next_point(&all().cloned().collect::<Vec<_>>());
        *point = PointId(after.max(point.0));
    }
    Ok(first)
}

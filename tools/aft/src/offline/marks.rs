//! Points for marks that are newer than what any manifest or notes tell.

use std::collections::{BTreeMap, BTreeSet};

use afterimage_blockdev::{HistoryId, Lsn, MachineId, PointId, Timestamp};
use afterimage_cache::MarkKind;
use afterimage_seed::manifest::{Edit, Noted, PointKind, PointRecord};
use afterimage_seed::reference::{At, format_time};

use super::evidence::Evidence;
use super::state::State;

/// Longest name of a point that is taken over from a mark.
const NAME_BYTES_MAX: usize = 128;

/// Up to which LSN of each history the edits surely say everything about bulk blocks.
pub(super) fn known_through<'a>(edits: impl Iterator<Item = &'a Edit>) -> BTreeMap<HistoryId, Lsn> {
    let mut known = BTreeMap::new();
    for edit in edits {
        let (history, lsn) = match edit {
            Edit::HistoryState(state) => (state.history, state.last),
            Edit::Point(point) => (point.history, point.lsn),
            Edit::Noted(Noted::Known { history, lsn }) => (*history, *lsn),
            _ => continue,
        };
        let most: &mut Lsn = known.entry(history).or_default();
        *most = lsn.max(*most);
    }
    known
}

/// Points for the marks of the log that are newer than what the manifest knows.
pub(super) fn points_of_marks(
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

/// The next number of a point.
pub(super) fn next_point(edits: &[Edit]) -> u64 {
    let said = edits.iter().filter_map(|edit| match edit {
        Edit::Store { next_point, .. } => Some(next_point.0),
        Edit::Point(point) => Some(point.id.0.saturating_add(1)),
        _ => None,
    });
    said.max().unwrap_or(1)
}

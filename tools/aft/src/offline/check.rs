//! `aft store check`: what can be told without reading every byte.

use afterimage_blockdev::SegmentId;
use afterimage_cache::key;
use afterimage_cache::segment::{SegmentHeader, parse_segment_file, segment_file};
use afterimage_seed::manifest::Edit;
use serde::Serialize;

use super::chain::Chain;
use super::parts::LogEnds;
use super::state::State;
use super::{Finding, Store, notes, parts};
use crate::error::AftError;

/// What a check found.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Checked {
    /// Commits of the manifest.
    pub commits: usize,
    /// Files that count.
    pub files: usize,
    /// Their bytes.
    pub bytes: u64,
    /// Slots in seed segments.
    pub slots: u64,
    /// Points.
    pub points: usize,
    /// What is wrong.
    pub findings: Vec<Finding>,
}

/// Checks the chain of the manifest, that what it names is there, and that the log has no gap.
///
/// # Errors
/// When the medium fails; damage is no error but a finding.
pub fn check(store: &Store) -> Result<Checked, AftError> {
    let mut checked = Checked::default();
    let Some(chain) = newest_manifest(store, &mut checked.findings)? else {
        return Ok(checked);
    };
    look(store, &chain, &mut checked)?;
    Ok(checked)
}

/// Reads the manifest file that counts; says why when there is none.
pub(super) fn newest_manifest(
    store: &Store,
    findings: &mut Vec<Finding>,
) -> Result<Option<Chain>, AftError> {
    let mut torn = None;
    for name in manifest_names(store)?.into_iter().rev() {
        let bytes = store.read(&name)?.unwrap_or_default();
        let chain = Chain::read(name, &bytes);
        // A file whose snapshot was never durable does not count: the one before it does.
        if chain.has_snapshot || !chain.beyond.is_empty() {
            findings.extend(chain.findings.iter().cloned());
            return Ok(Some(chain));
        }
        torn = torn.or(Some(chain.file));
    }
    let what = "there is no whole manifest";
    let file = torn.unwrap_or_else(|| "manifest".to_owned());
    findings.push(Finding::new(file, 0, what));
    Ok(None)
}

/// Names of the manifest files, oldest first.
pub(super) fn manifest_names(store: &Store) -> Result<Vec<String>, AftError> {
    let names = store.names("manifest")?;
    let is_one = |name: &String| {
        name.strip_suffix(".manifest")
            .is_some_and(|digits| digits.len() == 10 && digits.parse::<u32>().is_ok())
    };
    let of_manifest = names.into_iter().filter(is_one);
    Ok(of_manifest.map(|name| format!("manifest/{name}")).collect())
}

pub(super) fn look(store: &Store, chain: &Chain, checked: &mut Checked) -> Result<State, AftError> {
    checked.commits = chain.commits.len();
    let state = state_of(store, chain.all_edits())?;
    checked.points = state.points.len();
    keys(store, chain, &mut checked.findings);
    for (segment, named) in &state.segments {
        checked.bytes += named.bytes;
        checked.slots += u64::from(named.slot_count);
        parts::seed(store, state.store, (*segment, named), &mut checked.findings)?;
    }
    for (run, bytes) in &state.runs {
        checked.bytes += bytes;
        parts::run(store, state.store, (*run, *bytes), &mut checked.findings)?;
    }
    let logs = log_segments(store)?;
    checked.files = state.segments.len() + state.runs.len() + logs.len();
    let mut ends = Vec::new();
    for segment in logs {
        let name = segment_file("log", segment).to_string();
        let length = std::fs::metadata(store.root.join(&name)).map_or(0, |found| found.len());
        checked.bytes += length;
        let found = parts::log(store, state.store, (segment, name), &mut checked.findings)?;
        ends.push((segment, found));
    }
    continuity(&ends, &state, &mut checked.findings);
    notes::look(store, state.store, &mut checked.findings)?;
    Ok(state)
}

/// What edits come to. When the one is lost that names the store, segments of the log do.
pub(super) fn state_of<'a>(
    store: &Store,
    edits: impl Iterator<Item = &'a Edit>,
) -> Result<State, AftError> {
    let mut state = State::of(edits);
    if state.store.is_nil() {
        state.store = first_header(store)?.map_or(state.store, |header| header.identity.store);
    }
    Ok(state)
}

/// The header of the oldest segment of the log of which it can be read.
pub(super) fn first_header(store: &Store) -> Result<Option<SegmentHeader>, AftError> {
    for segment in log_segments(store)? {
        let bytes = store.begin(&segment_file("log", segment).to_string())?;
        if let Ok(header) = SegmentHeader::decode(&bytes) {
            return Ok(Some(header));
        }
    }
    Ok(None)
}

/// Segments of the log, oldest first.
pub(super) fn log_segments(store: &Store) -> Result<Vec<SegmentId>, AftError> {
    let mut segments = store.parsed("log", parse_segment_file)?;
    segments.sort_unstable();
    Ok(segments)
}

/// The key of the store must open the keys of all disks.
fn keys(store: &Store, chain: &Chain, findings: &mut Vec<Finding>) {
    let mut note = |what: String| findings.push(Finding::new("store.key", 0, what));
    let secret = match store.key() {
        Ok(secret) => secret,
        Err(why) => return note(why),
    };
    for edit in chain.all_edits() {
        if let Edit::Disk {
            disk,
            key: number,
            wrapped,
            name,
            ..
        } = edit
        {
            if key::unwrap(&secret, *disk, *number, wrapped).is_none() {
                return note(format!("it does not open the key of disk {name}"));
            }
        }
    }
}

/// Commits must follow each other from segment to segment.
fn continuity(ends: &[(SegmentId, LogEnds)], state: &State, findings: &mut Vec<Finding>) {
    let released = state.log_released;
    let note = |findings: &mut Vec<Finding>, segment: SegmentId, what: String| {
        findings.push(Finding::new(
            segment_file("log", segment).to_string(),
            0,
            what,
        ));
    };
    let begun: Vec<_> = ends.iter().filter(|(_, ends)| !ends.is_spare).collect();
    match begun.first() {
        None if released > 0 || !ends.is_empty() => {}
        None => findings.push(Finding::new("log", 0, "there is no segment of the log")),
        Some((segment, ends)) => {
            if let Some(first) = ends
                .first
                .filter(|first| *first > released.saturating_add(1))
            {
                let lost = released.saturating_add(1);
                let what = format!("commits {lost} to {} before it are missing", first - 1);
                note(findings, *segment, what);
            }
        }
    }
    if let Some((
        segment,
        LogEnds {
            last: Some(last), ..
        },
    )) = begun.last()
    {
        if *last < state.checkpoint {
            let from = last + 1;
            let what = format!(
                "commits {from} to {} behind it are missing",
                state.checkpoint
            );
            note(findings, *segment, what);
        }
    }
    for pair in begun.windows(2) {
        let [(_, before), (segment, after)] = pair else {
            continue;
        };
        let (Some(last), Some(first)) = (before.last, after.first) else {
            continue;
        };
        if first > last.saturating_add(1) {
            let what = format!(
                "commits {} to {} before it are missing",
                last + 1,
                first - 1
            );
            note(findings, *segment, what);
        }
    }
}

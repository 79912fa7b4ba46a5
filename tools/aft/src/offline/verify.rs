//! `aft store verify`: every byte of every file that counts.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use afterimage_blockdev::{RealOptions, RealStorage, Storage};
use afterimage_cache::segment::segment_file;
use afterimage_seed::engine::StoreFile;
use afterimage_seed::run::run_file;
use afterimage_seed::segment::seed_file;
use afterimage_seed::verify::{Verification, verify_file};

use super::check::{Checked, log_segments, look, newest_manifest};
use super::state::State;
use super::{Finding, Store, file_error, notes};
use crate::error::AftError;

/// How far a verification is, and the order to stop. Shared with whoever watches it.
#[derive(Debug, Default)]
pub struct Walk {
    /// Bytes of all files.
    pub total_bytes: AtomicU64,
    /// Bytes that were checked.
    pub done_bytes: AtomicU64,
    /// Somebody asked to stop.
    pub is_stopping: AtomicBool,
}

/// Checks the store, then every byte of it. `None` when it was stopped.
///
/// # Errors
/// When the medium fails; damage is no error but a finding.
pub fn verify(store: &Store, walk: &Walk) -> Result<Option<Checked>, AftError> {
    let mut checked = Checked::default();
    let Some(chain) = newest_manifest(store, &mut checked.findings)? else {
        return Ok(Some(checked));
    };
    let state = look(store, &chain, &mut checked)?;
    walk.total_bytes.store(checked.bytes, Ordering::Relaxed);
    let storage: Arc<dyn Storage> = RealStorage::open(&store.root, RealOptions::default())
        .map_err(|error| file_error(&store.root, &error))?;
    let by_check = checked.findings.clone();
    let mut found = Verification::default();
    for (file, name) in files(store, &chain.file, &state)? {
        if walk.is_stopping.load(Ordering::Relaxed) {
            return Ok(None);
        }
        // A file that is not there was named by the check.
        let Ok(length) = std::fs::metadata(store.root.join(&name)).map(|found| found.len()) else {
            continue;
        };
        if let Err(error) = verify_file(&*storage, state.store, file, &mut found) {
            checked.findings.push(Finding::new(name, 0, error));
        }
        for report in std::mem::take(&mut found.damage) {
            let points = report
                .hurts
                .map_or(Vec::new(), |(history, lsn)| state.points_from(history, lsn));
            let what = report.damage.to_string();
            let is_known = |known: &Finding| {
                known.file == report.file && (known.what == what || known.offset == report.offset)
            };
            if !by_check.iter().any(is_known) {
                checked.findings.push(Finding {
                    file: report.file,
                    offset: report.offset,
                    what,
                    points,
                });
            }
        }
        walk.done_bytes.fetch_add(length, Ordering::Relaxed);
    }
    checked.slots = found.slots;
    Ok(Some(checked))
}

/// All files; the manifest comes first, for it says what the others should be.
fn files(
    store: &Store,
    manifest: &str,
    state: &State,
) -> Result<Vec<(StoreFile, String)>, AftError> {
    let mut files = Vec::new();
    let number = manifest.get(9..19).and_then(|digits| digits.parse().ok());
    files.extend(number.map(|number| (StoreFile::Manifest(number), manifest.to_owned())));
    for segment in log_segments(store)? {
        let name = segment_file("log", segment).to_string();
        // One that waits to be used holds nothing that counts.
        if store.begin(&name)?.iter().any(|byte| *byte != 0) {
            files.push((StoreFile::Log(segment), name));
        }
    }
    for (segment, named) in &state.segments {
        let name = seed_file(*segment, named.generation).to_string();
        files.push((StoreFile::Seed(*segment, named.generation), name));
    }
    for run in state.runs.keys() {
        files.push((StoreFile::Run(*run), run_file(*run).to_string()));
    }
    for file in notes::files(store)? {
        files.push((StoreFile::Notes(file), file.name().to_string()));
    }
    Ok(files)
}

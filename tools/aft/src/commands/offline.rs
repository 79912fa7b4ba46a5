//! `aft store check`, `verify`, `dump` and `rebuild`: on a store whose daemon is stopped.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use afterimage_blockdev::ErrorClass;
use serde_json::Value;

use super::job;
use crate::error::AftError;
use crate::offline::{Checked, Finding, Order, Rebuilt, Store, Walk, What};
use crate::offline::{check, dump, rebuild, verify};
use crate::offline_args::DumpWhat;
use crate::output::{self, Output};

pub(super) fn run_check(data_dir: &Path, output: &Output) -> Result<(), AftError> {
    let checked = check(&Store::open(data_dir)?)?;
    report(&checked, "looked at", output)
}

/// Reads everything on a thread of its own. An interruption ends it behind the present file.
pub(super) async fn run_verify(data_dir: &Path, output: &Output) -> Result<(), AftError> {
    let store = Store::open(data_dir)?;
    let walk = Arc::new(Walk::default());
    let shared = Arc::clone(&walk);
    let stop = || walk.is_stopping.store(true, Ordering::Relaxed);
    let done_and_total = || {
        let bytes = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        (bytes(&walk.done_bytes), bytes(&walk.total_bytes))
    };
    let work = move || verify(&store, &shared);
    let verified = job::watch("reading", output, stop, done_and_total, work).await?;
    match verified? {
        Some(checked) => report(&checked, "read", output),
        None => Err(AftError::new(
            ErrorClass::Retry,
            "interrupted before all was read",
            "",
        )),
    }
}

pub(super) fn run_dump(data_dir: &Path, what: DumpWhat, output: &Output) -> Result<(), AftError> {
    let what = match what {
        DumpWhat { points: true, .. } => What::Points,
        DumpWhat { log: true, .. } => What::Log,
        DumpWhat {
            segment: Some(number),
            ..
        } => What::Segment(number),
        DumpWhat {
            run: Some(number), ..
        } => What::Run(number),
        _ => What::Manifest,
    };
    let mut line = |text: &str, value: &Value| output.line(value, text);
    dump(&Store::open(data_dir)?, what, &mut line)
}

pub(super) fn run_rebuild(data_dir: &Path, order: &Order, output: &Output) -> Result<(), AftError> {
    let rebuilt = rebuild(&Store::open(data_dir)?, order)?;
    output.answer(&rebuilt, || rebuilt_text(&rebuilt));
    if rebuilt.missing.is_empty() && rebuilt.findings.is_empty() {
        return Ok(());
    }
    Err(AftError::new(
        ErrorClass::Operator,
        format!(
            "the store was rebuilt; {} things are missing and {} places damaged",
            rebuilt.missing.len(),
            rebuilt.findings.len()
        ),
        "the list above names them; the daemon says at its start what the damage costs",
    ))
}

fn rebuilt_text(rebuilt: &Rebuilt) -> String {
    let mut text = format!(
        "{}: {} edits, {} seed segments, {} points taken over, {} points made of marks\n",
        rebuilt.directory.display(),
        rebuilt.edits,
        rebuilt.segments,
        rebuilt.points,
        rebuilt.points_of_marks
    );
    if let Some(notes) = rebuilt.notes {
        text.push_str(&format!("the newest notes are {notes}\n"));
    }
    if let Some(kept) = &rebuilt.kept {
        text.push_str(&format!("the old manifest is in {}\n", kept.display()));
    }
    for missing in &rebuilt.missing {
        text.push_str(&format!("- {}\n", output::printable(missing)));
    }
    rebuilt
        .findings
        .iter()
        .for_each(|found| text.push_str(&finding(found)));
    text
}

fn report(checked: &Checked, verb: &str, output: &Output) -> Result<(), AftError> {
    output.answer(checked, || {
        let mut text = format!(
            "{} files with {} and {} slots were {verb}; the manifest has {} commits and {} \
             points\n",
            checked.files,
            output::bytes(checked.bytes),
            checked.slots,
            checked.commits,
            checked.points
        );
        checked
            .findings
            .iter()
            .for_each(|found| text.push_str(&finding(found)));
        text
    });
    match checked.findings.len() {
        0 => Ok(()),
        count => Err(AftError::new(
            ErrorClass::Corrupt,
            format!("{count} places of the store are damaged"),
            "the list above names the points that are hurt, where that is known",
        )),
    }
}

fn finding(found: &Finding) -> String {
    let mut text = format!("! {} at {}: {}", found.file, found.offset, found.what);
    if let Some(first) = found.points.first() {
        let count = found.points.len();
        text.push_str(&format!("; may hurt {count} points, the first is {first}"));
    }
    format!("{}\n", output::printable(&text))
}

//! Where a rebuilt manifest is put.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use afterimage_blockdev::ErrorClass;
use afterimage_seed::manifest::{Edit, encode_state, manifest_file};

use super::check::manifest_names;
use super::rebuild::{Order, Rebuilt};
use super::{Store, file_error, refused};
use crate::error::AftError;

/// Where the new manifest is made.
const FRESH: &str = "manifest.rebuilt";
/// What a copy of the store gets, besides segments.
const COPIED: [&str; 5] = [
    "store.key",
    "catalogue.db",
    "catalogue.db-wal",
    "catalogue.db-shm",
    "ca",
];

/// The directory that is to hold the rebuilt store, with copies of all segments if it is another.
pub(super) fn prepare(store: &Store, order: &Order) -> Result<PathBuf, AftError> {
    let target = match &order.to {
        None => store.root.clone(),
        Some(to) => {
            copy_store(store, to)?;
            to.clone()
        }
    };
    let fresh = target.join(FRESH);
    if fresh.exists() {
        let message = format!("{} is left of a rebuild that was cut off", fresh.display());
        return Err(refused(message, "remove it, then try again"));
    }
    Ok(target)
}

/// Writes the new manifest, whose commits are numbered from `sequence` on, and keeps the old one.
pub(super) fn write(
    store: &Store,
    target: PathBuf,
    (edits, sequence): (&[Edit], u64),
    rebuilt: &mut Rebuilt,
) -> Result<(), AftError> {
    let bytes = encode_state(edits, sequence).map_err(|damage| {
        AftError::new(
            ErrorClass::Corrupt,
            format!("the new manifest: {damage}"),
            "report it",
        )
    })?;
    let names = manifest_names(store)?;
    let numbers = names
        .iter()
        .filter_map(|name| name.get(9..19)?.parse::<u32>().ok());
    let number = numbers.max().unwrap_or(0).saturating_add(1);
    let fresh = target.join(FRESH);
    make_directory(&fresh)?;
    let name = manifest_file(number);
    write_file(&fresh.join(name.base()), &bytes)?;
    sync_directory(&fresh)?;
    let place = target.join("manifest");
    if place.exists() {
        let kept = (1..u32::MAX)
            .map(|number| target.join(format!("manifest.before-rebuild-{number}")))
            .find(|path| !path.exists());
        let kept = kept.ok_or_else(|| refused("there are too many old manifests", ""))?;
        fs::rename(&place, &kept).map_err(|error| file_error(&place, &error))?;
        rebuilt.kept = Some(kept);
    }
    fs::rename(&fresh, &place).map_err(|error| file_error(&fresh, &error))?;
    sync_directory(&target)?;
    rebuilt.directory = target;
    Ok(())
}

/// Copies what is no manifest and no run into a new directory.
fn copy_store(store: &Store, to: &Path) -> Result<(), AftError> {
    let is_empty = match fs::read_dir(to) {
        Ok(mut entries) => entries.next().is_none(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => true,
        Err(error) => return Err(file_error(to, &error)),
    };
    if !is_empty {
        let message = format!("{} is not empty", to.display());
        return Err(refused(message, "name a directory that does not exist"));
    }
    make_directory(to)?;
    for name in ["log", "segments"].into_iter().chain(COPIED) {
        let from = store.root.join(name);
        if from.is_dir() {
            let inner = to.join(name);
            make_directory(&inner)?;
            for file in store.names(name)? {
                copy_file(&from.join(&file), &inner.join(&file))?;
            }
            sync_directory(&inner)?;
        } else if from.exists() {
            copy_file(&from, &to.join(name))?;
        }
    }
    sync_directory(to)
}

pub(super) fn make_directory(path: &Path) -> Result<(), AftError> {
    let mut builder = fs::DirBuilder::new();
    let made = builder.recursive(true).mode(0o700).create(path);
    made.map_err(|error| file_error(path, &error))
}

fn copy_file(from: &Path, to: &Path) -> Result<(), AftError> {
    fs::copy(from, to).map_err(|error| file_error(from, &error))?;
    let synced = File::open(to).and_then(|file| file.sync_all());
    synced.map_err(|error| file_error(to, &error))
}

pub(super) fn write_file(path: &Path, bytes: &[u8]) -> Result<(), AftError> {
    let written = File::create_new(path).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()
    });
    written.map_err(|error| file_error(path, &error))
}

pub(super) fn sync_directory(path: &Path) -> Result<(), AftError> {
    let synced = File::open(path).and_then(|directory| directory.sync_all());
    synced.map_err(|error| file_error(path, &error))
}

//! A whole store of which one file is hostile: it is opened, and every state it names is read.

use std::cell::RefCell;
use std::path::Path;
use std::sync::Arc;

use afterimage_blockdev::simulated::{CompletionOrder, SimulatedOptions, SimulatedStorage};
use afterimage_blockdev::{FileName, Random, Storage, StorageCompleter, StorageOp, Token, wait};
use afterimage_seed::verify::{Verification, verify_file};
use afterimage_seed::{Request, Response};

use super::log::{mend_segment, put_file};
use super::{Target, Verdict};
use crate::crash_store::golden::make_store;
use crate::golden;
use crate::store_rig::{StoreRig, small_store};

/// Directories of a store.
const DIRECTORIES: [&str; 4] = ["log", "manifest", "runs", "segments"];
/// Seeds of stores that are made now, besides the golden one.
const SEEDS: [u64; 3] = [3, 83, 84];
/// Bytes of a disk that are read at most; a hostile one may say any size.
const READ_BYTES_MAX: u64 = 1 << 20;
/// What follows the file: which store, and which of its files.
const TRAILER_BYTES: usize = 2;

pub(super) fn targets() -> Vec<Target> {
    vec![
        Target::new(200, "store", make, run)
            .mended_by(mend)
            .with_memory(96 << 20, 64),
    ]
}

/// Files that the engine wrote, and references to what they show.
pub(super) struct StoreFiles {
    /// By name, with directory.
    pub(super) files: Vec<(String, Vec<u8>)>,
    references: Vec<String>,
}

thread_local! {
    static STORES: RefCell<Vec<StoreFiles>> = const { RefCell::new(Vec::new()) };
}

/// Some stores, made when they are wanted first.
pub(super) fn stores<R>(look: impl FnOnce(&[StoreFiles]) -> R) -> R {
    STORES.with_borrow_mut(|stores| {
        if stores.is_empty() {
            stores.extend(SEEDS.map(new_store));
            // A golden store that cannot be read fails a test of its own.
            let golden = read_store(&golden::directory("store-v1"));
            stores.extend(Some(golden).filter(opens));
        }
        look(stores)
    })
}

/// Says whether a store opens as it is.
fn opens(store: &StoreFiles) -> bool {
    let storage = medium_of(store, usize::MAX, &[]);
    start(&storage).is_ready
}

fn references(expected: &str) -> Vec<String> {
    let first = |line: &str| line.split(' ').next().map(str::to_owned);
    expected.lines().filter_map(first).collect()
}

fn new_store(seed: u64) -> StoreFiles {
    let (storage, expected) = make_store(seed);
    let names = storage.file_names();
    let file = |name: &FileName| (name.to_string(), storage.read_live(name).expect("listed"));
    StoreFiles {
        files: names.iter().map(file).collect(),
        references: references(&expected),
    }
}

fn read_store(from: &Path) -> StoreFiles {
    let mut files = Vec::new();
    for directory in DIRECTORIES {
        for entry in std::fs::read_dir(from.join(directory)).expect("a directory of the store") {
            let path = entry.expect("readable").path();
            let base = path.file_name().and_then(|name| name.to_str());
            let name = format!("{directory}/{}", base.expect("a name"));
            files.push((name, std::fs::read(&path).expect("readable")));
        }
    }
    files.sort();
    let expected = std::fs::read_to_string(from.join("expected.txt")).expect("readable");
    StoreFiles {
        files,
        references: references(&expected),
    }
}

fn make(random: &mut Random) -> Vec<u8> {
    stores(|stores| {
        let which = random.index(stores.len());
        let files = &stores[which].files;
        let file = random.index(files.len());
        let mut bytes = files[file].1.clone();
        let small = |place: usize| u8::try_from(place).expect("few");
        bytes.extend([small(which), small(file)]);
        bytes
    })
}

/// The file, and which store and file the trailer says.
fn split(bytes: &[u8], stores: &[StoreFiles]) -> Option<(usize, usize, usize)> {
    let end = bytes.len().checked_sub(TRAILER_BYTES)?;
    let which = usize::from(bytes[end]) % stores.len();
    let file = usize::from(bytes[end + 1]) % stores[which].files.len();
    Some((end, which, file))
}

fn mend(bytes: &mut Vec<u8>, random: &mut Random) {
    let Some(end) = bytes.len().checked_sub(TRAILER_BYTES) else {
        return;
    };
    let trailer = bytes.split_off(end);
    match bytes.get(..8) {
        Some(b"AILOGSEG") => mend_segment(bytes, random),
        Some(b"AIMANIFE") => super::files::mend_manifest(bytes, random),
        Some(b"AISEEDSG") => super::files::mend_seed_segment(bytes, random),
        Some(b"AIRUNFIL") => {
            let run = afterimage_cache::bytes::get_u32(bytes, 32).unwrap_or(0);
            super::files::mend_run_of(bytes, run, random);
        }
        _ => {}
    }
    bytes.extend(trailer);
}

/// A simulated medium that performs each operation at once.
struct Direct(Arc<SimulatedStorage>);

impl Storage for Direct {
    fn submit(&self, token: Token, op: StorageOp, to: Arc<dyn StorageCompleter>) {
        self.0.submit(token, op, to);
        self.0.run_until_idle();
    }
}

fn medium_of(store: &StoreFiles, hostile: usize, bytes: &[u8]) -> Arc<SimulatedStorage> {
    let options = SimulatedOptions {
        order: CompletionOrder::Submission,
        ..SimulatedOptions::default()
    };
    let storage = SimulatedStorage::new(1, options);
    let direct = Direct(Arc::clone(&storage));
    for (place, (name, content)) in store.files.iter().enumerate() {
        let content = if place == hostile { bytes } else { content };
        put_file(&direct, FileName::new(name), content);
    }
    for directory in DIRECTORIES {
        let directory = directory.to_owned();
        wait::storage(&direct, StorageOp::SyncDirectory { directory }).expect("a medium");
    }
    storage
}

fn start(storage: &Arc<SimulatedStorage>) -> StoreRig {
    let mut rig = StoreRig::new(storage, &StoreRig::new_clock(), small_store(), 1);
    rig.run_until(|rig| rig.is_ready);
    rig
}

fn run(bytes: &[u8]) -> Verdict {
    stores(|stores| {
        let Some((end, which, file)) = split(bytes, stores) else {
            return Verdict::Refused;
        };
        let store = &stores[which];
        let storage = medium_of(store, file, &bytes[..end]);
        let mut rig = start(&storage);
        if !rig.is_ready {
            assert!(rig.failure.is_some(), "the start stalls");
            return Verdict::Refused;
        }
        let mut is_good = true;
        for reference in &store.references {
            is_good &= reads(&mut rig, reference);
        }
        verify(&mut rig, &storage);
        Verdict::of(is_good)
    })
}

/// Reads what a reference shows, as far as it is not too much.
fn reads(rig: &mut StoreRig, reference: &str) -> bool {
    let Some(Ok(taken)) = rig.snapshot(reference, false) else {
        return false;
    };
    let view = rig.view(&taken);
    let geometry = view.geometry();
    let block = u64::from(geometry.logical_block_bytes).max(1);
    let most = geometry.size_bytes.min(READ_BYTES_MAX);
    let len = usize::try_from(most - most % block).expect("at most a mebibyte");
    let last = geometry.size_bytes.saturating_sub(block);
    let is_end_good = matches!(rig.read(&*view, last - last % block, 512), Some(Ok(_)));
    let is_begin_good = matches!(rig.read(&*view, 0, len), Some(Ok(_)));
    is_begin_good && (is_end_good || block > 512)
}

/// Damage is no error of a verification, whatever it finds.
fn verify(rig: &mut StoreRig, storage: &Arc<SimulatedStorage>) {
    let Some(Ok(Response::Files(files))) = rig.ask(Request::Files) else {
        return;
    };
    let direct = Direct(Arc::clone(storage));
    let mut found = Verification::default();
    for file in files {
        let _may_be_gone = verify_file(&direct, rig.engine.store(), file, &mut found);
    }
}

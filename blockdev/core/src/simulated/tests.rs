use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::*;
use crate::buffer::IoBuffer;
use crate::clock::{Clock, Entropy, Timestamp};
use crate::conformance::{self, create, kind, name, open, read, write};
use crate::id::Token;
use crate::random::Random;
use crate::storage::{
    FileId, Storage, StorageCompleter, StorageCompletion, StorageErrorKind, StorageOp,
};
use crate::wait;

/// Performs everything at once, so that the blocking adapters can be used.
struct Prompt(Arc<SimulatedStorage>);

impl Storage for Prompt {
    fn submit(&self, token: Token, op: StorageOp, to: Arc<dyn StorageCompleter>) {
        self.0.submit(token, op, to);
        self.0.run_until_idle();
    }
}

fn prompt(seed: u64) -> Prompt {
    Prompt(SimulatedStorage::new(seed, SimulatedOptions::default()))
}

fn sync(storage: &Prompt, file: FileId) {
    wait::storage(storage, StorageOp::Sync { file }).unwrap();
}

fn sync_names(storage: &Prompt) {
    wait::storage(
        storage,
        StorageOp::SyncDirectory {
            directory: String::new(),
        },
    )
    .unwrap();
}

/// A storage with a durable file `a` of two pages of 1.
fn durable_file(seed: u64) -> (Prompt, FileId) {
    let storage = prompt(seed);
    let file = create(&storage, "a");
    write(&storage, file, 0, &[1; 8192]);
    sync(&storage, file);
    sync_names(&storage);
    (storage, file)
}

#[test]
fn the_simulation_does_what_a_storage_does() {
    for seed in 0..20 {
        conformance::check(&prompt(seed));
    }
}

#[test]
fn synced_data_under_a_synced_name_always_survives() {
    for seed in 0..500 {
        let (storage, file) = durable_file(seed);
        write(&storage, file, 8192, &[2; 4096]);
        let other = create(&storage, "b");
        write(&storage, other, 0, &[3; 4096]);
        sync(&storage, other);
        storage.0.power_cut();
        assert!(matches!(
            kind(&storage, StorageOp::Sync { file }),
            StorageErrorKind::NotOpen
        ));
        let (file, length) = open(&storage, "a");
        assert!(length == 8192 || length == 12288);
        assert_eq!(read(&storage, file, 0, 8192), [1; 8192]);
        for byte in read(&storage, file, 8192, 4096) {
            assert!(byte == 0 || byte == 2);
        }
        if let Some(bytes) = storage.0.read_durable(&name("b")) {
            assert_eq!(
                bytes, [3; 4096],
                "a synced file is whole if its name survived"
            );
        }
    }
}

/// What one cut made of two unsynced overwrites of the durable file.
fn overwritten(storage: &SimulatedStorage) -> Vec<u8> {
    let mut sectors: Vec<u8> = Vec::new();
    for sector in storage.read_durable(&name("a")).unwrap().chunks(512) {
        assert!(
            sector.iter().all(|byte| *byte == sector[0]),
            "a sector is never torn"
        );
        sectors.push(sector[0]);
    }
    sectors
}

#[test]
fn unsynced_writes_meet_every_fate() {
    let (storage, file) = durable_file(1);
    write(&storage, file, 0, &[2; 8192]);
    write(&storage, file, 4096, &[3; 8192]);
    let mut outcomes = BTreeSet::new();
    let mut events = BTreeSet::new();
    for seed in 0..2000 {
        let image = storage.0.power_cut_image(seed);
        outcomes.insert(overwritten(&image));
        events.extend(image.counters().into_keys());
    }
    let sectors = |parts: [u8; 2]| {
        parts
            .iter()
            .flat_map(|part| [*part; 8])
            .collect::<Vec<u8>>()
    };
    assert!(outcomes.contains(&sectors([1, 1])), "all lost");
    assert!(outcomes.contains(&sectors([2, 2])), "the later one lost");
    assert!(
        outcomes.contains(&sectors([1, 3])),
        "the earlier one lost, with the length"
    );
    assert!(outcomes.contains(&sectors([2, 1])), "torn at 4096");
    assert!(
        outcomes.contains(&sectors([2, 3])),
        "all kept, or late content, without the length"
    );
    assert!(
        outcomes
            .iter()
            .any(|sectors| sectors[..8].contains(&1) && sectors[..8].contains(&2))
    );
    for event in [
        "power-cut",
        "write-kept",
        "write-lost",
        "write-torn-512",
        "write-torn-4096",
        "write-late",
        "write-reordered",
        "length-lost",
    ] {
        assert!(events.contains(event), "{event} never happened");
    }
    // The original still stands, and its own sync still holds.
    sync(&storage, file);
    storage.0.power_cut();
    assert_eq!(
        overwritten(&storage.0),
        [sectors([2, 3]), vec![3; 8]].concat()
    );
}

#[test]
fn names_need_a_sync_of_their_directory() {
    let (mut renamed, mut lost, mut kept) = (0, 0, 0);
    for seed in 0..300 {
        let (storage, _) = durable_file(seed);
        let next = create(&storage, "a.next");
        write(&storage, next, 0, &[2; 4096]);
        sync(&storage, next);
        let rename = StorageOp::Rename {
            from: name("a.next"),
            to: name("a"),
        };
        wait::storage(&storage, rename).unwrap();
        let image = storage.0.power_cut_image(seed);
        match image.read_durable(&name("a")).expect("one of the two") {
            bytes if bytes == [1; 8192] => lost += 1,
            bytes if bytes == [2; 4096] => renamed += 1,
            _ => panic!("a mixture"),
        }
        kept += u32::from(image.read_durable(&name("a.next")).is_some());
        sync_names(&storage);
        storage.0.power_cut();
        assert_eq!(storage.0.read_durable(&name("a")).unwrap(), [2; 4096]);
        assert_eq!(storage.0.file_names(), [name("a")]);
    }
    assert!(renamed > 0 && lost > 0 && kept > 0);
}

struct Record(Mutex<Vec<StorageCompletion>>);

impl StorageCompleter for Record {
    fn complete(&self, completion: StorageCompletion) {
        self.0.lock().push(completion);
    }
}

fn record() -> Arc<Record> {
    Arc::new(Record(Mutex::new(Vec::new())))
}

#[test]
fn an_interrupted_sync_promises_nothing_and_completes_never() {
    let (mut whole, mut partial) = (0, 0);
    for seed in 0..200 {
        let (storage, file) = durable_file(seed);
        let to = record();
        let inner = &storage.0;
        inner.stop_after(Some(inner.operations() + 1));
        let buffer = IoBuffer::copy_of(&[2; 8192]);
        inner.submit(
            Token(1),
            StorageOp::Write {
                file,
                offset: 0,
                buffer,
            },
            to.clone(),
        );
        assert_eq!(inner.run_until_idle(), 1);
        inner.submit(Token(2), StorageOp::Sync { file }, to.clone());
        assert!(!inner.run_one() && inner.is_stopped());
        assert_eq!(inner.pending(), 1);
        inner.power_cut();
        assert!(!inner.run_one());
        assert_eq!(to.0.lock().len(), 1);
        assert_eq!(inner.counters()["sync-interrupted"], 1);
        match overwritten(inner) {
            sectors if sectors == [2; 16] => whole += 1,
            _ => partial += 1,
        }
    }
    assert!(whole > 0 && partial > 0);
}

#[test]
fn a_sync_covers_only_what_had_completed_before_it_was_submitted() {
    let mut lost = 0;
    for seed in 0..100 {
        let (storage, file) = durable_file(seed);
        let to = record();
        let buffer = IoBuffer::copy_of(&[2; 8192]);
        storage.0.submit(
            Token(1),
            StorageOp::Write {
                file,
                offset: 0,
                buffer,
            },
            to.clone(),
        );
        storage
            .0
            .submit(Token(2), StorageOp::Sync { file }, to.clone());
        assert_eq!(storage.0.run_until_idle(), 2);
        assert!(
            to.0.lock()
                .iter()
                .all(|completion| completion.result.is_ok())
        );
        lost += u32::from(overwritten(&storage.0.power_cut_image(seed)) != [2; 16]);
    }
    assert!(lost > 0);
}

#[test]
fn the_order_is_random_and_repeats() {
    let run = |seed, order| {
        let options = SimulatedOptions {
            order,
            ..SimulatedOptions::default()
        };
        let storage = SimulatedStorage::new(seed, options);
        let to = record();
        for index in 0..50 {
            storage.submit(
                Token(index),
                StorageOp::Capacity {
                    directory: String::new(),
                },
                to.clone(),
            );
        }
        storage.run_until_idle();
        to.0.lock()
            .iter()
            .map(|completion| completion.token.0)
            .collect::<Vec<_>>()
    };
    let random = run(3, CompletionOrder::Random);
    assert_eq!(random, run(3, CompletionOrder::Random));
    assert_ne!(random, run(4, CompletionOrder::Random));
    assert_eq!(
        run(3, CompletionOrder::Submission),
        (0..50).collect::<Vec<_>>()
    );
    let (storage, file) = durable_file(9);
    write(&storage, file, 0, &[2; 8192]);
    let survivor = |seed| storage.0.power_cut_image(seed).read_durable(&name("a"));
    assert_eq!(survivor(5), survivor(5));
}

#[test]
fn a_failed_sync_poisons_and_its_data_may_never_arrive() {
    let mut lost = 0;
    for seed in 0..100 {
        let (storage, file) = durable_file(seed);
        write(&storage, file, 0, &[2; 8192]);
        storage.0.inject(Fault {
            operation: Some("sync"),
            skip: 0,
            effect: FaultEffect::Io,
            is_permanent: false,
        });
        assert!(matches!(
            kind(&storage, StorageOp::Sync { file }),
            StorageErrorKind::Io(_)
        ));
        let buffer = IoBuffer::zeroed(4096);
        let poisoned = kind(
            &storage,
            StorageOp::Read {
                file,
                offset: 0,
                buffer,
            },
        );
        assert!(matches!(poisoned, StorageErrorKind::Poisoned));
        assert!(matches!(
            kind(&storage, StorageOp::Sync { file }),
            StorageErrorKind::Poisoned
        ));
        wait::storage(&storage, StorageOp::Close { file }).unwrap();
        let (file, _) = open(&storage, "a");
        sync(&storage, file);
        storage.0.power_cut();
        lost += u32::from(overwritten(&storage.0) != [2; 16]);
    }
    assert!(
        lost > 0,
        "a later sync does not bring back what an earlier one lost"
    );
}

#[test]
fn faults_come_when_ordered() {
    let storage = prompt(1);
    let file = create(&storage, "a");
    let write_op = || StorageOp::Write {
        file,
        offset: 0,
        buffer: IoBuffer::zeroed(16384),
    };
    let fault = |skip, effect, is_permanent| Fault {
        operation: Some("write"),
        skip,
        effect,
        is_permanent,
    };
    storage.0.inject(fault(1, FaultEffect::NoSpace, false));
    assert!(wait::storage(&storage, write_op()).is_ok());
    assert!(matches!(
        kind(&storage, write_op()),
        StorageErrorKind::NoSpace
    ));
    assert!(wait::storage(&storage, write_op()).is_ok());
    storage.0.inject(fault(0, FaultEffect::Short, true));
    for _ in 0..3 {
        assert!(matches!(
            kind(&storage, write_op()),
            StorageErrorKind::Io(_)
        ));
    }
    storage.0.clear_faults();
    assert!(wait::storage(&storage, write_op()).is_ok());
    let counters = storage.0.counters();
    assert_eq!(
        (counters["fault-no-space"], counters["fault-short"]),
        (1, 3)
    );
}

#[test]
fn room_ends_and_comes_back() {
    let storage = prompt(1);
    storage.0.set_capacity(8192);
    let file = create(&storage, "a");
    write(&storage, file, 0, &[1; 8192]);
    let more = || StorageOp::Write {
        file,
        offset: 8192,
        buffer: IoBuffer::zeroed(4096),
    };
    assert!(matches!(kind(&storage, more()), StorageErrorKind::NoSpace));
    write(&storage, file, 4096, &[2; 4096]);
    storage.0.set_capacity(12288);
    wait::storage(&storage, more()).unwrap();
    wait::storage(&storage, StorageOp::Remove { name: name("a") }).unwrap();
    let other = create(&storage, "b");
    let op = StorageOp::Write {
        file: other,
        offset: 0,
        buffer: IoBuffer::zeroed(4096),
    };
    assert!(
        matches!(kind(&storage, op), StorageErrorKind::NoSpace),
        "an open file takes room"
    );
    wait::storage(&storage, StorageOp::Close { file }).unwrap();
    write(&storage, other, 0, &[1; 12288]);
}

#[test]
fn a_flipped_byte_stays_flipped() {
    let (storage, file) = durable_file(1);
    assert!(storage.0.flip_byte(&name("a"), 5000));
    assert!(!storage.0.flip_byte(&name("a"), 8192));
    assert!(!storage.0.flip_byte(&name("b"), 0));
    assert_ne!(read(&storage, file, 4096, 4096), [1; 4096]);
    storage.0.power_cut();
    let bytes = storage.0.read_durable(&name("a")).unwrap();
    assert_eq!(bytes.iter().filter(|byte| **byte != 1).count(), 1);
}

/// Crash tests make thousands of images of stores of some megabytes.
#[test]
fn images_are_made_fast() {
    let storage = prompt(1);
    let mut random = Random::new(1);
    for index in 0..16 {
        let file = create(&storage, &format!("dir/file-{index}"));
        for part in 0..4 {
            let mut bytes = vec![0; 256 * 1024];
            random.fill(&mut bytes);
            write(&storage, file, part * 256 * 1024, &bytes);
            if index < 12 {
                sync(&storage, file);
            }
        }
    }
    wait::storage(
        &storage,
        StorageOp::SyncDirectory {
            directory: "dir".to_owned(),
        },
    )
    .unwrap();
    let start = Instant::now();
    for seed in 0..200 {
        let image = storage.0.power_cut_image(seed);
        assert_eq!(image.file_names().len(), 16);
    }
    let took = start.elapsed();
    println!("200 images of 16 MiB took {took:?}");
    assert!(took < Duration::from_secs(20));
}

#[test]
fn the_clock_and_chance_do_as_told() {
    let clock = SimulatedClock::new(Timestamp(1000));
    clock.advance(Duration::from_nanos(5));
    assert_eq!((clock.wall().0, clock.monotonic().0), (1005, 5));
    clock.set_wall(Timestamp(7));
    assert_eq!((clock.wall().0, clock.monotonic().0), (7, 5));
    let (one, two) = (SeededEntropy::new(4), SeededEntropy::new(4));
    assert_eq!(one.identity(), two.identity());
    assert_ne!(one.identity(), one.identity());
}

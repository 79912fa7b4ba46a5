//! Files of an agent's state directory: activity log, counters, JSON, configuration.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use afterimage_agent::activity::worker::Bell;
use afterimage_agent::activity::{Activity, region_bytes};
use afterimage_agent::config::Config;
use afterimage_agent::state::StateDir;
use afterimage_agent::state::counters::{CounterFile, Counters};
use afterimage_agent::state::disks::{SavedDisk, SavedDisks};
use afterimage_agent::state::identity::Identity;
use afterimage_blockdev::{AgentId, DiskId, Epoch, HistoryId, Lsn, MachineId, Random};
use afterimage_cache::bytes::put;
use tempfile::TempDir;

use super::{Target, Verdict};

const DISK: DiskId = DiskId([0xd1; 16]);
const MACHINE: MachineId = MachineId([7; 16]);
/// A disk of so many bytes has several blocks of marks.
const DISK_BYTES: u64 = 33 << 30;
const BLOCK: usize = 4096;

pub(super) fn targets() -> Vec<Target> {
    vec![
        Target::new(600, "activity", make_activity, run_activity)
            .mended_by(mend_activity)
            .with_memory(16 << 20, 64),
        Target::new(20_000, "counters", make_counters, run_counters).mended_by(mend_counters),
        Target::new(8000, "agent-state", make_state, run_state).with_words(&[
            "{",
            "}",
            "[",
            "]",
            ",",
            ":",
            "null",
            "true",
            "-1",
            "1e400",
            "\"\"",
            "\"version\":",
            "\"disks\":[",
            "[[[[[[[[[[[[[[[[[[[[[[[[[",
            "\n[spool]\n",
            "bytes_max = ",
            "\"x",
            "18446744073709551616",
        ]),
    ]
}

thread_local! {
    static DIRECTORY: RefCell<Option<(TempDir, StateDir)>> = const { RefCell::new(None) };
}

/// A state directory in memory, where syncing costs nothing.
fn with_state<R>(work: impl FnOnce(&StateDir) -> R) -> R {
    DIRECTORY.with_borrow_mut(|directory| {
        let (_, state) = directory.get_or_insert_with(|| {
            let memory = Path::new("/dev/shm");
            let parent = if memory.is_dir() {
                memory.to_owned()
            } else {
                std::env::temp_dir()
            };
            let temporary = TempDir::new_in(parent).expect("a temporary directory");
            let state = StateDir::open(temporary.path()).expect("a state directory");
            (temporary, state)
        });
        work(state)
    })
}

fn write(path: &Path, bytes: &[u8]) {
    std::fs::write(path, bytes).expect("the directory can be written");
}

fn read(path: &Path) -> Vec<u8> {
    std::fs::read(path).expect("it was just written")
}

fn put_hash(bytes: &mut [u8], from: usize, len: usize) {
    if bytes.len() >= from + len + 32 {
        let hash = blake3::hash(&bytes[from..from + len]);
        put(bytes, from + len, hash.as_bytes());
    }
}

// --- Activity log --------------------------------------------------------------------------

fn open_activity(path: &Path, is_new: bool) -> (Arc<Activity>, usize, String) {
    let (bell, acknowledged) = (Arc::<Bell>::default(), Arc::<AtomicU64>::default());
    let opened = Activity::open(path, DISK, DISK_BYTES, is_new, bell, acknowledged);
    let (activity, found) = opened.expect("a damaged log is made anew");
    (activity, found.marked, found.reason)
}

fn make_activity(random: &mut Random) -> Vec<u8> {
    with_state(|state| {
        let path = state.path("activity/made");
        let (activity, _, _) = open_activity(&path, true);
        drop(activity);
        let mut bytes = read(&path);
        for block in 1..bytes.len() / BLOCK {
            let marks = &mut bytes[block * BLOCK + 64..block * BLOCK + 4064];
            for _ in 0..random.below(5) {
                let at = random.index(1000);
                random.fill(&mut marks[at..at + 2]);
            }
        }
        mend_activity(&mut bytes, random);
        bytes
    })
}

fn mend_activity(bytes: &mut Vec<u8>, _: &mut Random) {
    put_hash(bytes, 0, 64);
    for at in (BLOCK..bytes.len()).step_by(BLOCK) {
        put_hash(bytes, at, 4064);
    }
}

fn run_activity(bytes: &[u8]) -> Verdict {
    with_state(|state| {
        let path = state.path("activity/disk");
        write(&path, bytes);
        let (activity, marked, reason) = open_activity(&path, false);
        let bytes_of_one = region_bytes(DISK_BYTES);
        assert_eq!(activity.marked_bytes(), marked as u64 * bytes_of_one);
        assert_eq!(
            activity.is_tainted(),
            marked > 0,
            "what was marked must be read again"
        );
        let tainted: u64 = activity
            .tainted(DISK_BYTES)
            .iter()
            .map(|range| range.end - range.start)
            .sum();
        assert_eq!(tainted, activity.marked_bytes());
        drop(activity);
        // Whatever was found, the file says it now.
        let (_, marked_again, reason_again) = open_activity(&path, false);
        assert_eq!((marked_again, reason_again.as_str()), (marked, ""));
        Verdict::of(reason.is_empty())
    })
}

// --- Counters ------------------------------------------------------------------------------

fn some_counters(random: &mut Random) -> Counters {
    Counters {
        epoch: Epoch(random.below(100)),
        reserved: Lsn(random.next_u64()),
        acknowledged: Lsn(random.next_u64()),
        ..Counters::new(MACHINE, HistoryId([2; 16]))
    }
}

fn make_counters(random: &mut Random) -> Vec<u8> {
    with_state(|state| {
        let path = state.path("made");
        write(&path, &[]);
        let fresh = some_counters(random);
        let (mut file, counters) = CounterFile::open(&path, fresh).expect("a new file");
        assert_eq!(counters, fresh);
        for _ in 0..random.below(3) {
            file.save(&some_counters(random))
                .expect("it can be written");
        }
        read(&path)
    })
}

fn mend_counters(bytes: &mut Vec<u8>, _: &mut Random) {
    put_hash(bytes, 0, 128);
    put_hash(bytes, BLOCK, 128);
}

fn run_counters(bytes: &[u8]) -> Verdict {
    with_state(|state| {
        let path = state.path("counters");
        write(&path, bytes);
        let fresh = Counters::new(MACHINE, HistoryId([2; 16]));
        let Ok((mut file, counters)) = CounterFile::open(&path, fresh) else {
            return Verdict::Refused;
        };
        let more = Counters {
            epoch: Epoch(77),
            ..counters
        };
        file.save(&more).expect("it can be written");
        drop(file);
        let (_, again) = CounterFile::open(&path, fresh).expect("it was just saved");
        assert_eq!(again, more, "what was saved last counts");
        Verdict::Accepted
    })
}

// --- JSON and TOML -------------------------------------------------------------------------

fn make_state(random: &mut Random) -> Vec<u8> {
    with_state(|state| match random.below(3) {
        0 => {
            let identity = Identity {
                version: Identity::VERSION,
                agent: AgentId([9; 16]),
                machine: MACHINE,
                machine_name: "web1".to_owned(),
                history: HistoryId([2; 16]),
                server_host: "appliance".to_owned(),
                control_port: 8443,
                data_port: 9443,
            };
            identity.save(state).expect("it can be written");
            read(&state.path("identity.json"))
        }
        1 => {
            let disk = SavedDisk {
                disk: DISK,
                name: "vm".to_owned(),
                source: "/srv/vm.img".to_owned(),
                size_bytes: random.next_u64(),
                logical_block_bytes: 512,
                is_attached: true,
                is_protected: random.chance(0.5),
                is_copied: false,
                shrunk_bytes: random.chance(0.3).then_some(4096),
            };
            let disks = vec![disk; random.index(3)];
            let disks = SavedDisks { version: 1, disks };
            disks.save(state).expect("it can be written");
            read(&state.path("disks.json"))
        }
        _ => Config::default().to_toml().into_bytes(),
    })
}

fn run_state(bytes: &[u8]) -> Verdict {
    with_state(|state| {
        let path = |name: &str| -> PathBuf { state.path(name) };
        for name in ["identity.json", "disks.json", "config.toml"] {
            write(&path(name), bytes);
        }
        let identity = Identity::load(state);
        if let Ok(identity) = &identity {
            identity.save(state).expect("it can be written");
            assert_eq!(Identity::load(state).ok().as_ref(), Some(identity));
        }
        let disks = SavedDisks::load(state);
        if let Ok(disks) = &disks {
            disks.save(state).expect("it can be written");
            assert_eq!(SavedDisks::load(state).ok().as_ref(), Some(disks));
        }
        let config = Config::load(&path("config.toml"));
        if let Ok(config) = &config {
            write(&path("config.toml"), config.to_toml().as_bytes());
            let again = Config::load(&path("config.toml")).ok();
            assert_eq!(again.as_ref(), Some(config));
        }
        Verdict::of(identity.is_ok() || disks.is_ok() || config.is_ok())
    })
}

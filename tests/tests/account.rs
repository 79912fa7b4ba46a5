//! The account of a store against one that is worked out slot by slot from what was written: who
//! needs how many blocks, for every disk and every point.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use afterimage_blockdev::simulated::{SimulatedOptions, SimulatedStorage};
use afterimage_blockdev::{Clock, DiskId, Lsn, PointId, Random, Timestamp};
use afterimage_seed::engine::{PointSpace, SpaceInfo, Use};
use afterimage_seed::retention::Policy;
use afterimage_seed::{Input, Request, Response};
use afterimage_tests::store_model::{Change, Model};
use afterimage_tests::store_rig::{StoreRig, small_store};
use afterimage_tests::store_writer::Writer;

const HOUR: Duration = Duration::from_secs(3600);
const MACHINE: &str = "machine-0";
const CELL: usize = 4;

struct Scene {
    rig: StoreRig,
    writer: Writer,
    model: Model,
    random: Random,
    points: BTreeMap<String, Lsn>,
    locked: BTreeSet<String>,
}

fn start(storage: &Arc<SimulatedStorage>) -> StoreRig {
    let mut options = small_store();
    options.retention_interval = Duration::from_secs(60);
    options.time_grain = Duration::from_secs(1);
    let clock = StoreRig::new_clock();
    let mut rig = StoreRig::new(storage, &clock, options, 7);
    assert!(rig.run_until(|rig| rig.is_ready), "{:?}", rig.failure);
    rig
}

impl Scene {
    fn new(seed: u64) -> Self {
        let storage = SimulatedStorage::new(seed, SimulatedOptions::default());
        let writer = Writer::new(seed, 0, 2, 64);
        let mut model = Model::default();
        writer.declare(&mut model);
        let mut scene = Self {
            rig: start(&storage),
            writer,
            model,
            random: Random::new(seed ^ 0xacc0),
            points: BTreeMap::new(),
            locked: BTreeSet::new(),
        };
        scene.open();
        scene
    }

    fn ask(&mut self, request: Request) -> Response {
        match self.rig.ask(request) {
            Some(Ok(response)) => response,
            other => panic!("{other:?}"),
        }
    }

    fn open(&mut self) {
        let writer = &self.writer;
        let request = Request::OpenStream {
            machine: writer.machine,
            name: writer.name.clone(),
            history: writer.history,
            parent: None,
            origin: writer.origin,
            epoch: writer.epoch,
        };
        let Response::Stream(opened) = self.ask(request) else {
            panic!("no stream");
        };
        self.writer.stream = Some(opened.stream);
        for disk in 0..self.writer.disks.len() {
            let known = &self.writer.disks[disk];
            let request = Request::DeclareDisk {
                stream: opened.stream,
                disk: known.id,
                name: known.name.clone(),
                size_bytes: known.blocks as u64 * 4096,
                logical_block_bytes: 512,
            };
            let Response::Disk(declared) = self.ask(request) else {
                panic!("no disk");
            };
            self.writer.set_keys(disk, &declared.key, opened.tag_key);
        }
        let policy = Policy {
            journal_window: HOUR,
            ..Policy::default()
        };
        let _set = self.ask(Request::SetPolicy {
            machine: MACHINE.to_owned(),
            policy,
            expected: None,
        });
        self.writer.begin_batch(true);
        self.send();
        self.writer.end_batch();
        self.send();
    }

    fn send(&mut self) {
        let stream = self.writer.stream.expect("open");
        while let Some(frame) = self.writer.next_to_send(&mut self.model) {
            self.rig.step(Input::Frame(stream, frame));
        }
        self.rig.run();
    }

    /// Some writes, points, locks and deletions, and time that passes.
    fn work(&mut self) {
        for _ in 0..1 + self.random.below(12) {
            self.writer.set_time(self.rig.clock.wall());
            self.writer.write(6);
            self.send();
            if self.random.chance(0.4) {
                let lsn = self.writer.last;
                let name = format!("point-{lsn}");
                let request = Request::CreatePoint {
                    machine: MACHINE.to_owned(),
                    name: Some(name.clone()),
                    at: Some(format!("lsn:{lsn}").parse().expect("an LSN")),
                };
                let _made = self.ask(request);
                if self.random.chance(0.3) {
                    let year = 365 * 86_400 * 1_000_000_000;
                    let _locked = self.ask(Request::LockPoints {
                        machine: MACHINE.to_owned(),
                        names: vec![name.clone()],
                        until: Timestamp(self.rig.clock.wall().0 + year),
                    });
                    self.locked.insert(name.clone());
                }
                self.points.insert(name, lsn);
            }
            self.rig.pass(Duration::from_secs(self.random.below(1200)));
            self.rig.run();
        }
    }

    fn collect(&mut self) {
        let _done = self.ask(Request::Collect);
        self.rig.run();
    }

    fn floor(&mut self) -> Lsn {
        match self.ask(Request::Info) {
            Response::Info(info) => info.machines[0].histories[0].floor,
            other => panic!("{other:?}"),
        }
    }

    fn space(&mut self) -> SpaceInfo {
        match self.ask(Request::Space) {
            Response::Space(info) => *info,
            other => panic!("{other:?}"),
        }
    }

    fn point_space(&mut self) -> Vec<PointSpace> {
        let request = Request::PointSpace {
            machine: MACHINE.to_owned(),
            after: PointId(0),
            limit: 1000,
        };
        match self.ask(request) {
            Response::PointSpace(points, _) => points,
            other => panic!("{other:?}"),
        }
    }
}

/// Blocks by use, as they should be.
#[derive(Default, Debug, PartialEq, Eq)]
struct Expected {
    current: u64,
    shared: u64,
    alone: BTreeMap<Use, u64>,
    unique: BTreeMap<Lsn, u64>,
}

/// Works an account out, slot by slot and root by root.
fn expected(scene: &Scene, disk: DiskId, floor: Lsn) -> Expected {
    let history = &scene.model.histories[&scene.writer.history];
    let changes: Vec<(Lsn, usize, usize, bool)> = history
        .records
        .iter()
        .filter_map(|record| match &record.change {
            Change::Write {
                disk: of,
                first,
                stamps,
            } if *of == disk => Some((record.lsn, *first, stamps.len(), true)),
            Change::Clear {
                disk: of,
                first,
                count,
            } if *of == disk => Some((record.lsn, *first, *count, false)),
            _ => None,
        })
        .collect();
    let mut found = Expected::default();
    for (place, (lsn, first, count, _)) in changes.iter().enumerate().filter(|(_, c)| c.3) {
        for cell in first / CELL..=(first + count - 1) / CELL {
            let begin = (cell * CELL).max(*first);
            let end = ((cell + 1) * CELL).min(first + count);
            let dies = |block: usize| {
                let later = changes[place + 1..].iter();
                let mut over = later.filter(|(_, f, c, _)| (*f..f + c).contains(&block));
                over.next().map(|change| change.0)
            };
            let deaths: Vec<Option<Lsn>> = (begin..end).map(dies).collect();
            let blocks = (end - begin) as u64;
            if deaths.contains(&None) {
                found.current += blocks;
                continue;
            }
            let last = deaths.into_iter().flatten().max().expect("a block");
            let is_seen = |at: &&Lsn| **at >= *lsn && **at < last;
            let seen: BTreeMap<&String, &Lsn> =
                scene.points.iter().filter(|(_, at)| is_seen(at)).collect();
            let mut uses: BTreeSet<Use> = seen
                .keys()
                .map(|name| {
                    if scene.locked.contains(*name) {
                        Use::Locked
                    } else {
                        Use::Named
                    }
                })
                .collect();
            if last > floor {
                uses.insert(Use::Window);
            }
            match (uses.len(), uses.first()) {
                (0, _) => {}
                (1, Some(used)) => *found.alone.entry(*used).or_default() += blocks,
                _ => found.shared += blocks,
            }
            if seen.len() == 1 && last <= floor {
                let at = seen.values().next().expect("one");
                *found.unique.entry(**at).or_default() += blocks;
            }
        }
    }
    found
}

fn compare(scene: &mut Scene, seed: u64) -> u64 {
    let floor = scene.floor();
    let info = scene.space();
    let mut unique: BTreeMap<Lsn, u64> = BTreeMap::new();
    let mut needed = 0;
    for disk in &info.machines[0].disks {
        let expected = expected(scene, disk.disk, floor);
        let alone = disk.account.alone();
        let found = Expected {
            current: disk.account.current.blocks,
            shared: disk.account.shared.blocks,
            alone: alone.map(|(used, stored)| (used, stored.blocks)).collect(),
            unique: expected.unique.clone(),
        };
        assert_eq!(found, expected, "seed {seed}, disk {}", disk.name);
        for (at, blocks) in expected.unique {
            *unique.entry(at).or_default() += blocks;
        }
        needed += disk.account.needed().bytes;
    }
    let mut found = 0;
    for (point, known) in scene.point_space() {
        let known = known.unwrap_or_default();
        let expected = unique.get(&point.lsn).copied().unwrap_or(0);
        assert_eq!(known.unique.blocks, expected, "seed {seed}, {}", point.name);
        assert!(known.unique.blocks <= known.shown.blocks, "seed {seed}");
        found += expected;
    }
    // Rounding apart, the parts are the whole.
    assert!(needed.abs_diff(info.needed_bytes) < 4096, "seed {seed}");
    let files = info.files;
    let segments = files.log_bytes - files.log_room_bytes + files.seed_bytes;
    let parts = info.needed_bytes + info.reclaimable_bytes;
    let parts = i64::try_from(parts).expect("small") + info.since_bytes;
    assert_eq!(u64::try_from(parts), Ok(segments), "seed {seed}");
    found
}

#[test]
fn accounts_equal_those_worked_out_slot_by_slot() {
    let mut unique = 0;
    for seed in 0..40 {
        let mut scene = Scene::new(seed);
        for _ in 0..4 {
            scene.work();
            scene.collect();
            unique += compare(&mut scene, seed);
            // Points that go give their own back to nobody.
            let names: Vec<String> = scene.points.keys().cloned().collect();
            for name in names {
                if !scene.locked.contains(&name) && scene.random.chance(0.3) {
                    let _done = scene.ask(Request::DeletePoints {
                        machine: MACHINE.to_owned(),
                        names: vec![name.clone()],
                    });
                    scene.points.remove(&name);
                }
            }
        }
    }
    assert!(unique > 1000, "hardly anything was unique: {unique}");
}

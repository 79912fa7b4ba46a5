//! Locks, policies and journal windows of a running engine, with a clock that is set by hand.

use std::sync::Arc;
use std::time::Duration;

use afterimage_blockdev::simulated::{SimulatedClock, SimulatedOptions, SimulatedStorage};
use afterimage_blockdev::{Clock, Lsn, PointId, Timestamp};
use afterimage_seed::engine::{EngineInfo, EngineOptions, PolicyInfo};
use afterimage_seed::manifest::{PointKind, PointRecord};
use afterimage_seed::retention::{LockRule, Policy, Tier};
use afterimage_seed::{Event, Input, Request, Response, SeedError};
use afterimage_tests::store_model::Model;
use afterimage_tests::store_rig::{StoreRig, small_store};
use afterimage_tests::store_writer::Writer;

const HOUR: Duration = Duration::from_secs(3600);
const MINUTE: Duration = Duration::from_secs(60);
const MACHINE: &str = "machine-0";

struct Scene {
    options: EngineOptions,
    rig: StoreRig,
    writer: Writer,
    model: Model,
    storage: Arc<SimulatedStorage>,
    clock: Arc<SimulatedClock>,
}

impl Scene {
    fn new() -> Self {
        Self::with(options())
    }

    fn with(options: EngineOptions) -> Self {
        let storage = SimulatedStorage::new(1, SimulatedOptions::default());
        let clock = StoreRig::new_clock();
        let writer = Writer::new(1, 0, 1, 64);
        let mut model = Model::default();
        writer.declare(&mut model);
        let rig = start(&storage, &clock, &options);
        let mut scene = Self {
            options,
            rig,
            writer,
            model,
            storage,
            clock,
        };
        scene.open();
        scene
    }

    fn open(&mut self) {
        let writer = &self.writer;
        let opened = match self.rig.ask(Request::OpenStream {
            machine: writer.machine,
            name: writer.name.clone(),
            history: writer.history,
            parent: writer.parent,
            origin: writer.origin,
            epoch: writer.epoch,
        }) {
            Some(Ok(Response::Stream(opened))) => opened,
            other => panic!("{other:?}"),
        };
        self.writer.stream = Some(opened.stream);
        self.writer.reopened(opened.durable);
        let disk = &self.writer.disks[0];
        let declared = match self.rig.ask(Request::DeclareDisk {
            stream: opened.stream,
            disk: disk.id,
            name: disk.name.clone(),
            size_bytes: disk.blocks as u64 * 4096,
            logical_block_bytes: 512,
        }) {
            Some(Ok(Response::Disk(declared))) => declared,
            other => panic!("{other:?}"),
        };
        self.writer.set_keys(0, &declared.key, opened.tag_key);
    }

    /// Stops the engine in order and starts another after a while.
    fn restart(&mut self, later: Duration) {
        assert!(self.rig.stop());
        self.clock.advance(later);
        self.rig = start(&self.storage, &self.clock, &self.options);
    }

    fn send(&mut self) {
        let stream = self.writer.stream.expect("open");
        while let Some(frame) = self.writer.next_to_send(&mut self.model) {
            self.rig.step(Input::Frame(stream, frame));
        }
        self.rig.run();
    }

    /// Makes the first copy, whole.
    fn copy(&mut self) {
        self.writer.begin_batch(true);
        self.send();
        self.writer.end_batch();
        self.send();
    }

    /// Writes at the present time; gives back the LSN.
    fn write(&mut self) -> Lsn {
        self.writer.set_time(self.clock.wall());
        self.writer.write(1);
        self.send();
        self.writer.last
    }

    fn point(&mut self, name: &str) -> PointRecord {
        self.point_named(Some(name.to_owned()))
    }

    fn generated_point(&mut self) -> PointRecord {
        self.point_named(None)
    }

    fn point_named(&mut self, name: Option<String>) -> PointRecord {
        let at = format!("lsn:{}", self.writer.last).parse().expect("an LSN");
        let request = Request::CreatePoint {
            machine: MACHINE.to_owned(),
            name,
            at: Some(at),
        };
        match self.rig.ask(request) {
            Some(Ok(Response::Point(point))) => point,
            other => panic!("{other:?}"),
        }
    }

    fn delete(&mut self, names: &[&str]) -> Result<(), String> {
        self.done(Request::DeletePoints {
            machine: MACHINE.to_owned(),
            names: names.iter().map(|name| (*name).to_owned()).collect(),
        })
    }

    fn lock(&mut self, name: &str, until: Timestamp) -> Result<(), String> {
        self.done(Request::LockPoints {
            machine: MACHINE.to_owned(),
            names: vec![name.to_owned()],
            until,
        })
    }

    fn done(&mut self, request: Request) -> Result<(), String> {
        match self.rig.ask(request) {
            Some(Ok(Response::Done)) => Ok(()),
            Some(Err(error)) => Err(format!("{error}; {}", error.hint())),
            other => panic!("{other:?}"),
        }
    }

    fn set(&mut self, policy: Policy) -> Result<PolicyInfo, SeedError> {
        match self.rig.ask(Request::SetPolicy {
            machine: MACHINE.to_owned(),
            policy,
            expected: None,
        }) {
            Some(Ok(Response::Policy(info))) => Ok(info),
            Some(Err(error)) => Err(error),
            other => panic!("{other:?}"),
        }
    }

    fn names(&mut self) -> Vec<String> {
        let request = Request::ListPoints {
            machine: MACHINE.to_owned(),
            after: PointId(0),
            limit: 10_000,
        };
        match self.rig.ask(request) {
            Some(Ok(Response::Points(points, _))) => {
                points.into_iter().map(|point| point.name).collect()
            }
            other => panic!("{other:?}"),
        }
    }

    fn info(&mut self) -> EngineInfo {
        match self.rig.ask(Request::Info) {
            Some(Ok(Response::Info(info))) => info,
            other => panic!("{other:?}"),
        }
    }

    fn wait_for_room(&mut self) {
        for _ in 0..1000 {
            if self.info().paused.is_none() {
                return;
            }
            self.pass(Duration::from_secs(2));
        }
        panic!("ingest stays paused");
    }

    fn pass(&mut self, time: Duration) {
        self.rig.pass(time);
        self.rig.run();
    }

    fn later(&self, time: Duration) -> Timestamp {
        Timestamp(self.clock.wall().0 + u64::try_from(time.as_nanos()).expect("short"))
    }

    fn shows(&mut self, lsn: Lsn) -> Result<Lsn, String> {
        let disk = self.writer.disks[0].id;
        let answer = self
            .rig
            .snapshot(&format!("{MACHINE}/{disk}@lsn:{lsn}"), false);
        let taken = answer.expect("the store runs");
        let taken = taken.map_err(|error| format!("{error}; {}", error.hint()))?;
        Ok(taken.snapshot.lsn)
    }
}

fn options() -> EngineOptions {
    EngineOptions {
        retention_interval: MINUTE,
        time_grain: Duration::from_secs(1),
        ..small_store()
    }
}

fn start(
    storage: &Arc<SimulatedStorage>,
    clock: &Arc<SimulatedClock>,
    options: &EngineOptions,
) -> StoreRig {
    let mut rig = StoreRig::new(storage, clock, options.clone(), 7);
    assert!(rig.run_until(|rig| rig.is_ready), "{:?}", rig.failure);
    rig
}

#[test]
fn a_locked_point_stays_and_one_request_is_all_or_nothing() {
    let mut scene = Scene::new();
    scene.copy();
    for name in ["a", "b", "c"] {
        scene.write();
        scene.point(name);
    }
    let until = scene.later(HOUR);
    scene.lock("b", until).unwrap();
    let refused = scene.delete(&["a", "b", "nothing"]).unwrap_err();
    assert!(refused.contains("\"b\" is locked until"), "{refused}");
    assert!(refused.contains("no point \"nothing\""), "{refused}");
    assert_eq!(scene.names(), ["a", "b", "c"]);
    let shorter = scene.lock("b", scene.later(MINUTE)).unwrap_err();
    assert!(shorter.contains("never shortened"), "{shorter}");
    let past = scene.lock("c", Timestamp(5)).unwrap_err();
    assert!(past.contains("is past"), "{past}");
    let endless = scene.later(HOUR * 24 * 366 * 10);
    assert!(scene.lock("c", endless).is_err());

    scene.restart(HOUR / 2);
    assert!(scene.delete(&["b"]).is_err());
    scene.lock("b", scene.later(HOUR)).unwrap();
    scene.pass(HOUR / 2);
    assert!(scene.delete(&["b"]).is_err(), "its lock was lengthened");
    scene.pass(HOUR / 2);
    scene.delete(&["a", "b", "b"]).unwrap();
    assert_eq!(scene.names(), ["c"]);
    scene.restart(MINUTE);
    assert_eq!(scene.names(), ["c"]);
}

#[test]
fn a_jump_of_the_clock_opens_no_lock_and_thins_nothing_until_it_is_confirmed() {
    let mut scene = Scene::new();
    scene.copy();
    for name in ["a", "b", "c"] {
        scene.write();
        scene.point(name);
    }
    scene.lock("a", scene.later(HOUR)).unwrap();
    let policy = Policy {
        tiers: Vec::new(),
        keep_named: Some(HOUR * 12),
        ..Policy::default()
    };
    scene.set(policy).unwrap();
    scene.clock.set_wall(scene.later(HOUR * 24));
    scene.pass(MINUTE);
    let is_told = |event: &Event| matches!(event, Event::ClockFrozen { .. });
    assert!(scene.rig.events.iter().any(is_told));
    assert!(
        scene
            .info()
            .clock
            .frozen_ahead
            .is_some_and(|ahead| ahead > HOUR * 23)
    );
    let refused = scene.delete(&["a"]).unwrap_err();
    assert!(refused.contains("confirm-clock"), "{refused}");
    scene.restart(MINUTE);
    scene.pass(HOUR * 2);
    assert_eq!(
        scene.names(),
        ["a", "b", "c"],
        "it was thinned by a wrong time"
    );
    assert!(scene.delete(&["a"]).is_err(), "a restart opened it");

    scene.done(Request::ConfirmClock).unwrap();
    assert_eq!(scene.info().clock.frozen_ahead, None);
    // What was in doubt between was not counted, but two hours have really passed.
    scene.pass(MINUTE);
    assert_eq!(scene.names(), ["c"], "the newest one stays");
    scene.restart(MINUTE);
    assert_eq!(scene.info().clock.frozen_ahead, None);
}

#[test]
fn a_policy_locks_new_points_and_survives() {
    let mut scene = Scene::new();
    scene.copy();
    scene.write();
    assert_eq!(scene.point("before").locked_until, Timestamp(0));
    let rule = LockRule {
        duration: HOUR,
        kinds: vec![PointKind::Bookmark],
    };
    let policy = Policy {
        lock: Some(rule),
        ..Policy::default()
    };
    let set = scene.set(policy.clone()).unwrap();
    assert_eq!(set.version, 1);
    let locked = scene.point("after");
    assert_eq!(locked.locked_until, scene.later(HOUR));
    scene.restart(MINUTE);
    let request = Request::GetPolicy {
        machine: MACHINE.to_owned(),
    };
    match scene.rig.ask(request) {
        Some(Ok(Response::Policy(found))) => assert_eq!(found, set),
        other => panic!("{other:?}"),
    }
    assert!(scene.delete(&["after"]).is_err());
    scene.delete(&["before"]).unwrap();
    let senseless = Policy {
        tiers: vec![Tier {
            interval: HOUR,
            keep_for: MINUTE,
        }],
        ..policy
    };
    assert!(scene.set(senseless).is_err());
}

#[test]
fn below_the_window_only_points_are_shown() {
    let mut scene = Scene::new();
    scene.copy();
    let policy = Policy {
        journal_window: HOUR,
        ..Policy::default()
    };
    scene.set(policy).unwrap();
    let mut lsns = Vec::new();
    for hour in 0..4 {
        for _ in 0..4 {
            lsns.push((scene.clock.wall(), scene.write()));
            scene.pass(HOUR / 4);
        }
        if hour == 1 {
            scene.point("kept");
        }
    }
    let named = lsns[7].1;
    let now = scene.clock.wall();
    let window = 3600 * 1_000_000_000;
    // A floor follows in steps of a 32th of the window.
    for (time, lsn) in &lsns {
        let age = now.0 - time.0;
        let shown = scene.shows(*lsn);
        if age <= window || *lsn == named {
            assert_eq!(shown, Ok(*lsn), "{age}");
        } else if age > window + window / 2 {
            let refused = shown.unwrap_err();
            assert!(refused.contains("before the journal window"), "{refused}");
            assert!(refused.contains("the nearest"), "{refused}");
        }
    }
    let info = scene.info();
    let floor = info.machines[0].histories[0].floor;
    assert!(floor > lsns[8].1 && floor <= lsns[12].1, "{floor}");
    let reach = info.machines[0].disks[0].reaches[0];
    assert_eq!(reach.first, floor);
    scene.restart(MINUTE);
    assert_eq!(scene.info().machines[0].histories[0].floor, floor);
    assert!(scene.shows(lsns[2].1).is_err());

    // With nothing more written the newest state stays.
    scene.pass(HOUR * 48);
    scene.pass(MINUTE);
    let last = lsns[15].1;
    assert_eq!(scene.shows(last), Ok(last));
    assert_eq!(scene.shows(named), Ok(named));
    assert!(scene.shows(lsns[14].1).is_err());
}

/// Without room windows give way first, then the oldest points that nobody named or locked; ingest
/// goes on, and what must stay is shown.
#[test]
fn without_room_windows_give_way_before_points_and_locks_hold() {
    let mut scene = Scene::with(EngineOptions {
        budget_bytes: 4 << 20,
        manifest_bytes: 128 << 10,
        window_min: Duration::from_secs(10),
        collect_interval: HOUR * 24,
        ..options()
    });
    scene.copy();
    scene.write();
    scene.point("named");
    scene.write();
    let locked = scene.generated_point();
    scene.lock(&locked.name, scene.later(HOUR * 24)).unwrap();
    let is =
        |wanted: fn(&Event) -> bool| move |scene: &Scene| scene.rig.events.iter().position(wanted);
    let shortened = is(|event| matches!(event, Event::WindowShortened { .. }));
    let yielded = is(|event| matches!(event, Event::PointsYielded { .. }));
    let mut oldest = None;
    for round in 0.. {
        assert!(round < 20_000, "no point was ever given up");
        scene.write();
        scene.wait_for_room();
        if round % 8 == 0 {
            let point = scene.generated_point();
            oldest.get_or_insert(point.name);
        }
        scene.pass(Duration::from_secs(2));
        if yielded(&scene).is_some() {
            break;
        }
    }
    assert!(
        shortened(&scene) < yielded(&scene),
        "points went before the window"
    );
    assert!(shortened(&scene).is_some());
    for _ in 0..100 {
        scene.pass(Duration::from_secs(2));
    }
    let info = scene.info();
    assert_eq!(info.paused, None);
    assert!(info.stored_bytes <= 4 << 20, "{} bytes", info.stored_bytes);
    let window = info.machines[0].shortened_window;
    assert!(window.is_some_and(|window| window < MINUTE), "{window:?}");
    let names = scene.names();
    for name in ["named", &locked.name] {
        assert!(
            names.iter().any(|known| known == name),
            "{name} is gone: {names:?}"
        );
    }
    assert!(!names.contains(&oldest.unwrap()));
    assert_eq!(scene.shows(locked.lsn), Ok(locked.lsn));
    let last = scene.write();
    scene.wait_for_room();
    scene.restart(MINUTE);
    assert_eq!(scene.shows(locked.lsn), Ok(locked.lsn));
    assert_eq!(scene.shows(last), Ok(last));
}

/// The ranges of a disk go through the forks of its history, the oldest first, and each of them is
/// shown as said.
#[test]
fn ranges_go_through_forks() {
    let mut scene = Scene::new();
    scene.copy();
    let mut lasts = Vec::new();
    for _ in 0..3 {
        scene.write();
        let last = scene.write();
        lasts.push((scene.writer.history, last));
        scene
            .writer
            .rescue(scene.writer.history, last, &mut scene.model);
        scene.open();
    }
    let last = scene.write();
    lasts.push((scene.writer.history, last));
    let info = scene.info();
    let reaches = info.machines[0].disks[0].reaches.clone();
    let found: Vec<_> = reaches
        .iter()
        .map(|reach| (reach.history, reach.last))
        .collect();
    assert_eq!(found, lasts);
    for (parent, child) in reaches.iter().zip(&reaches[1..]) {
        assert_eq!(child.first, parent.last.next());
    }
    for reach in &reaches {
        assert_eq!(scene.shows(reach.first), Ok(reach.first));
        assert_eq!(scene.shows(reach.last), Ok(reach.last));
    }
}

//! The work of a generation.

use std::time::Duration;

use afterimage_blockdev::{Clock, HistoryId, Lsn};
use afterimage_seed::engine::{ForkedBranch, StreamEnd};
use afterimage_seed::reference::At;
use afterimage_seed::{Event, Input, Request, Response};

use super::branch::BranchRun;
use super::retain::is_of_window;
use super::{Campaign, Waiting};
use crate::store_model::{History, Point, content};
use crate::store_rig::StoreRig;

impl Campaign {
    /// Gives the engine work until the medium stops, the engine fails, or enough was done.
    pub(super) fn work(&mut self, rig: &mut StoreRig) {
        for machine in 0..self.writers.len() {
            if !self.open(rig, machine) {
                return;
            }
        }
        let steps = 10 + self.random.below(60);
        for _ in 0..steps {
            if !self.work_step(rig) {
                return;
            }
            let operations = self.random.below(12);
            for _ in 0..operations {
                if !rig.run_one() {
                    break;
                }
            }
            self.hear(rig);
            if rig.storage.is_stopped() || rig.failure.is_some() {
                return;
            }
        }
        if self.random.chance(0.5) {
            let time = Duration::from_millis(self.random.below(300));
            rig.pass(time);
            for _ in 0..self.random.below(200) {
                if !rig.run_one() && !rig.wake() {
                    break;
                }
            }
            self.hear(rig);
        }
    }

    /// Does one thing; false when the medium has stopped.
    fn work_step(&mut self, rig: &mut StoreRig) -> bool {
        let machine = self.random.index(self.writers.len());
        match self.random.below(38) {
            0..=12 => self.append(rig, machine),
            13..=16 => self.bulk(rig, machine),
            17 | 18 => self.batch(rig, machine),
            19 | 20 => self.create_point(rig, machine),
            21 => self.drop_points(rig),
            22 => self.fork(rig, machine),
            23..=25 => self.use_branch(rig),
            26 => self.drop_branch(rig),
            27 => {
                let time = Duration::from_millis(self.random.below(120));
                rig.pass(time);
            }
            28 => self.look(rig, machine),
            29 if self.random.chance(0.3) => return self.reopen(rig, machine),
            30 if self.random.chance(0.3) => return self.begin_history(rig, machine),
            31 => {
                // Its end is an event.
                let _id = rig.request(Request::Collect);
            }
            32 | 33 => self.lock_points(rig),
            34 => self.set_policy(rig),
            35 | 36 => self.retain(rig),
            37 => self.drop_points(rig),
            _ => self.append(rig, machine),
        }
        true
    }

    /// Opens the stream of a machine and declares its disks; false when the medium stops first.
    pub(super) fn open(&mut self, rig: &mut StoreRig, machine: usize) -> bool {
        let writer = &self.writers[machine];
        let request = Request::OpenStream {
            machine: writer.machine,
            name: writer.name.clone(),
            history: writer.history,
            parent: writer.parent,
            origin: writer.origin,
            epoch: writer.epoch,
        };
        if !self.known.model.histories.contains_key(&writer.history) {
            writer.declare(&mut self.known.model);
        }
        let Some(answer) = rig.ask(request) else {
            return false;
        };
        let opened = match answer {
            Ok(Response::Stream(opened)) => opened,
            Err(error) if is_of_window(&error) => return self.fork_again(rig, machine),
            other => panic!("seed {}: {other:?} for an open stream", self.seed),
        };
        self.hear(rig);
        let history = self.writers[machine].history;
        self.known.opened.push(history);
        let writer = &mut self.writers[machine];
        writer.stream = Some(opened.stream);
        writer.reopened(opened.durable);
        let model = self
            .known
            .model
            .histories
            .get_mut(&history)
            .expect("declared");
        model.durable = model.durable.max(opened.durable);
        for disk in 0..writer.disks.len() {
            let request = Request::DeclareDisk {
                stream: opened.stream,
                disk: self.writers[machine].disks[disk].id,
                name: self.writers[machine].disks[disk].name.clone(),
                size_bytes: self.writers[machine].disks[disk].blocks as u64 * 4096,
                logical_block_bytes: 512,
            };
            let Some(answer) = rig.ask(request) else {
                return false;
            };
            let declared = match answer {
                Ok(Response::Disk(declared)) => declared,
                other => {
                    panic!("seed {}: {other:?} for a disk", self.seed)
                }
            };
            self.hear(rig);
            self.known
                .declared
                .insert(self.writers[machine].disks[disk].id);
            self.check_declared(machine, disk, &declared);
            self.writers[machine].set_keys(disk, &declared.key, opened.tag_key);
        }
        true
    }

    fn append(&mut self, rig: &mut StoreRig, machine: usize) {
        let records = [1, 3, 8][self.random.index(3)];
        self.writers[machine].write(records);
        self.send(rig, machine);
    }

    /// Hands everything that waits to the stream.
    pub(super) fn send(&mut self, rig: &mut StoreRig, machine: usize) {
        let writer = &mut self.writers[machine];
        let Some(stream) = writer.stream else { return };
        while let Some(frame) = writer.next_to_send(&mut self.known.model) {
            rig.step(Input::Frame(stream, frame));
        }
    }

    fn bulk(&mut self, rig: &mut StoreRig, machine: usize) {
        if !self.writers[machine].is_in_batch() {
            return self.batch(rig, machine);
        }
        for _ in 0..=self.random.index(3) {
            let writer = &mut self.writers[machine];
            let Some(stream) = writer.stream else { return };
            if let Some((number, frame)) = writer.bulk_frame(&mut self.known.model) {
                rig.step(Input::Bulk(stream, number, frame));
            }
        }
    }

    fn batch(&mut self, rig: &mut StoreRig, machine: usize) {
        let writer = &mut self.writers[machine];
        if writer.is_in_batch() {
            // An end says that all bulk before it is acknowledged.
            let history = writer.history;
            let bulk = &self.known.model.histories[&history].bulk;
            if bulk.iter().all(|bulk| bulk.is_acknowledged) {
                writer.end_batch();
                self.report.count("batch-ended");
            }
        } else {
            let (history, durable) = (writer.history, writer.last);
            let is_copied = writer
                .disks
                .iter()
                .all(|disk| self.known.model.is_copied(history, disk.id, durable));
            writer.begin_batch(!is_copied || self.random.chance(0.2));
        }
        self.send(rig, machine);
    }

    fn some_lsn(&mut self, history: HistoryId) -> Lsn {
        let durable = self.known.model.histories[&history].durable;
        if self.random.chance(0.3) {
            durable
        } else {
            Lsn(self.random.below(durable.0 + 1))
        }
    }

    fn create_point(&mut self, rig: &mut StoreRig, machine: usize) {
        let (id, history) = (self.writers[machine].machine, self.writers[machine].history);
        let name = format!("point-{}", self.next_point);
        self.next_point += 1;
        let (at, cut) = if self.random.chance(0.5) {
            let lsn = self.some_lsn(history);
            (Some(At::Lsn(Some(history), lsn)), lsn)
        } else {
            (None, Lsn(u64::MAX))
        };
        let point = Point {
            history,
            lsn: cut,
            is_acknowledged: false,
            is_dropping: false,
        };
        self.known.points.insert((id, name.clone()), point);
        self.point_asked(rig, &(id, name.clone()));
        let machine = self.writers[machine].name.clone();
        let request = rig.request(Request::CreatePoint {
            machine,
            name: Some(name.clone()),
            at,
        });
        self.waiting
            .insert(request, Waiting::Point { machine: id, name });
    }

    fn fork(&mut self, rig: &mut StoreRig, machine: usize) {
        if self.known.branches.len() >= 4 {
            return;
        }
        let id = self.writers[machine].machine;
        let branches: Vec<_> = self
            .known
            .branches
            .iter()
            .filter(|(_, run)| run.machine == id)
            .map(|(history, run)| (*history, run.disk))
            .collect();
        let (history, disk, lsn) = if !branches.is_empty() && self.random.chance(0.4) {
            let (history, disk) = branches[self.random.index(branches.len())];
            (history, disk, self.known.model.histories[&history].durable)
        } else {
            let history = self.writers[machine].history;
            let disks = &self.writers[machine].disks;
            let disk = disks[self.random.index(disks.len())].id;
            (history, disk, self.some_lsn(history))
        };
        let name = self.name_of(id);
        let reference = format!("{name}/{disk}@{history}:lsn:{lsn}");
        let reference = reference.parse().expect("a reference");
        let request = rig.request(Request::Fork {
            reference,
            allow_incomplete: false,
        });
        self.waiting.insert(request, Waiting::Fork { machine });
    }

    fn forked(&mut self, rig: &mut StoreRig, machine: usize, branch: &ForkedBranch) {
        let disk = branch.taken.snapshot.disk;
        let base = match self.known.branches.get(&branch.parent) {
            Some(run) if branch.fork >= run.fork => {
                self.report.count("branch-of-a-branch");
                run.image(branch.fork)
            }
            _ => content(&self.known.model.image(branch.parent, disk, branch.fork)),
        };
        let device = rig.branch(branch);
        let id = self.writers[machine].machine;
        let parent = Some((branch.parent, branch.fork));
        self.known
            .model
            .histories
            .insert(branch.history, History::new(parent, true));
        let run = BranchRun::new(id, disk, branch.fork, base, device);
        self.known.branches.insert(branch.history, run);
        self.known.opened.push(branch.history);
        self.report.count("branch-forked");
    }

    fn drop_branch(&mut self, rig: &mut StoreRig) {
        let place = self.random.index(self.known.branches.len());
        let Some(history) = self.known.branches.keys().nth(place).copied() else {
            return;
        };
        let model = self
            .known
            .model
            .histories
            .get_mut(&history)
            .expect("a known branch");
        if model.is_dropping || self.random.chance(0.5) {
            return;
        }
        model.is_dropping = true;
        let request = rig.request(Request::DropBranch(history));
        self.waiting.insert(request, Waiting::Dropped(history));
    }

    /// What is under way when a stream ends would become durable unseen.
    fn wait_for_bulk(&mut self, rig: &mut StoreRig, machine: usize) -> bool {
        let history = self.writers[machine].history;
        let begun = rig.clock.monotonic();
        loop {
            self.hear(rig);
            let bulk = &self.known.model.histories[&history].bulk;
            if bulk.iter().all(|bulk| bulk.is_acknowledged) {
                return true;
            }
            let waited = rig.clock.monotonic().since(begun);
            let is_over = rig.storage.is_stopped() || waited > rig.patience;
            if is_over || !(rig.run_one() || rig.wake()) {
                return false;
            }
        }
    }

    /// The agent comes again: the same one, or one that was restarted.
    fn reopen(&mut self, rig: &mut StoreRig, machine: usize) -> bool {
        if !self.wait_for_bulk(rig, machine) {
            return false;
        }
        self.restart_writer(machine, 0.5);
        self.open(rig, machine) && {
            self.send(rig, machine);
            self.report.count("stream-reopened");
            true
        }
    }

    /// Restarts an agent by chance: it forgets what was not acknowledged, and begins an epoch.
    pub(super) fn restart_writer(&mut self, machine: usize, chance: f64) {
        let is_restarted = self.random.chance(chance);
        let writer = &mut self.writers[machine];
        let Some(history) = self.known.model.histories.get(&writer.history) else {
            return;
        };
        if !is_restarted || history.frames.is_empty() {
            return;
        }
        let durable = history.durable;
        let highest = history
            .bulk
            .iter()
            .map(|bulk| bulk.lsn)
            .max()
            .unwrap_or_default();
        writer.restart(highest, durable);
        for disk in &mut writer.disks {
            let last = Lsn(u64::MAX);
            disk.blocks = self.known.model.image(writer.history, disk.id, last).len();
        }
        self.report.count("epoch-begun");
    }

    /// The history that a machine began was lost with a crash, and its parent is not kept any more
    /// as far back as its fork.
    fn fork_again(&mut self, rig: &mut StoreRig, machine: usize) -> bool {
        let history = self.writers[machine].history;
        let (parent, fork) = self.writers[machine].parent.expect("a fork was refused");
        assert!(!self.known.opened.contains(&history), "seed {}", self.seed);
        assert!(
            self.is_below_window(rig, parent, fork),
            "seed {}",
            self.seed
        );
        self.known.model.histories.remove(&history);
        self.report.count("history-refused");
        self.rescue(rig, machine, parent)
    }

    /// The machine goes on in a history of its own.
    fn begin_history(&mut self, rig: &mut StoreRig, machine: usize) -> bool {
        if !self.wait_for_bulk(rig, machine) {
            return false;
        }
        self.rescue(rig, machine, self.writers[machine].history)
    }

    fn rescue(&mut self, rig: &mut StoreRig, machine: usize, parent: HistoryId) -> bool {
        let durable = self.known.model.histories[&parent].acknowledged;
        // What was not acknowledged when the floor was asked for cannot be forked off.
        rig.run();
        self.hear(rig);
        let Some(Ok(Response::Info(info))) = rig.ask(Request::Info) else {
            return false;
        };
        self.check_floors(&info);
        let floor = self.floor_of(parent).min(durable);
        let fork = Lsn(floor.0 + self.random.below(durable.0 - floor.0 + 1));
        let writer = &mut self.writers[machine];
        writer.rescue(parent, fork, &mut self.known.model);
        for disk in &mut writer.disks {
            let last = Lsn(u64::MAX);
            // A size never falls, whatever the history.
            let here = self.known.model.image(writer.history, disk.id, last).len();
            disk.blocks = here;
        }
        self.report.count("history-begun");
        self.open(rig, machine)
    }

    /// Takes what the engine said.
    pub(super) fn hear(&mut self, rig: &mut StoreRig) {
        while let Some(event) = rig.events.pop_front() {
            self.event(rig, event);
        }
        let answered: Vec<_> = rig
            .replies
            .keys()
            .filter(|id| self.waiting.contains_key(*id))
            .copied()
            .collect();
        for id in answered {
            let answer = rig.replies.remove(&id);
            if let (Some(waiting), Some(answer)) = (self.waiting.remove(&id), answer) {
                self.answered(rig, waiting, answer);
            }
        }
    }

    fn event(&mut self, rig: &mut StoreRig, event: Event) {
        match event {
            Event::Durable {
                stream, durable, ..
            } => {
                let Some(writer) = self.writers.iter_mut().find(|w| w.stream == Some(stream))
                else {
                    return;
                };
                writer.acknowledged(durable);
                let history = self.known.model.histories.get_mut(&writer.history);
                let history = history.expect("a declared history");
                assert!(
                    durable <= writer.last,
                    "seed {}: durable beyond the end",
                    self.seed
                );
                history.acknowledged = history.acknowledged.max(durable);
                history.durable = history.durable.max(durable);
            }
            Event::BulkDurable { stream, number, .. } => {
                let Some(writer) = self.writers.iter().find(|w| w.stream == Some(stream)) else {
                    return;
                };
                let history = self.known.model.histories.get_mut(&writer.history);
                let bulk = history.expect("a declared history").bulk.iter_mut();
                for bulk in bulk.filter(|bulk| bulk.number == number) {
                    bulk.is_acknowledged = true;
                    self.report.count("bulk-acknowledged");
                }
            }
            Event::PlaceMark {
                stream,
                request,
                name,
                ..
            } => {
                let found = self.writers.iter().position(|w| w.stream == Some(stream));
                let Some(machine) = found else { return };
                let lsn = self.writers[machine].mark(request, &name);
                let key = (self.writers[machine].machine, name);
                if let Some(point) = self.known.points.get_mut(&key) {
                    point.lsn = lsn;
                    point.history = self.writers[machine].history;
                    self.report.count("point-of-a-mark");
                }
                self.send(rig, machine);
            }
            Event::Over { stream, end } => {
                let open = self
                    .writers
                    .iter_mut()
                    .find(|writer| writer.stream == Some(stream));
                if let Some(writer) = open {
                    // Another one was asked for in its place.
                    assert!(end == StreamEnd::Fenced, "seed {}: {end:?}", self.seed);
                    writer.stream = None;
                }
            }
            Event::Paused { .. } => self.report.count("paused"),
            Event::Resumed => self.report.count("resumed"),
            Event::Merged { left_out, .. } => {
                self.report.count("runs-merged");
                self.report.add("entry-left-out", left_out);
            }
            Event::ClockFrozen { .. } => self.report.count("clock-frozen"),
            Event::Thinned { points } => self.thinned(points),
            Event::WindowShortened { .. } => self.report.count("window-shortened"),
            Event::PointsYielded { .. } => self.report.count("points-yielded"),
            Event::MergeGivenUp { .. } => self.report.count("merge-given-up"),
            // No quota is set here.
            Event::MachinePaused { .. }
            | Event::MachineResumed { .. }
            | Event::StreamPaused { .. } => {}
            Event::Collected(done) => {
                self.report.count("collected");
                self.report.add("segment-destaged", done.destaged);
                self.report.add("segment-rewritten", done.rewritten);
                self.report.add("segment-dropped", done.dropped);
            }
        }
    }

    fn answered(
        &mut self,
        rig: &mut StoreRig,
        waiting: Waiting,
        answer: Result<Response, afterimage_seed::SeedError>,
    ) {
        let seed = self.seed;
        let Some((waiting, answer)) = self.retention_answered(waiting, answer) else {
            return;
        };
        match (waiting, answer) {
            (Waiting::Point { machine, name }, Err(error)) if is_of_window(&error) => {
                self.known.points.remove(&(machine, name));
                self.report.count("point-below-window-refused");
            }
            (Waiting::Point { machine, name }, Ok(Response::Point(record))) => {
                assert_eq!(record.name, name, "seed {seed}");
                self.point_made(&(machine, name.clone()), &record);
                let point = self
                    .known
                    .points
                    .get_mut(&(machine, name))
                    .expect("asked for");
                assert_eq!(
                    (record.history, record.lsn),
                    (point.history, point.lsn),
                    "seed {seed}"
                );
                point.is_acknowledged = true;
                self.report.count("point-acknowledged");
            }
            (Waiting::Fork { machine }, Ok(Response::Branch(branch))) => {
                self.forked(rig, machine, &branch);
            }
            (Waiting::Dropped(history), Ok(_)) => {
                self.known.branches.remove(&history);
                self.known.model.histories.remove(&history);
                self.known.opened.retain(|known| *known != history);
                self.report.count("branch-dropped");
            }
            (Waiting::Dropped(history), Err(_)) => {
                // Something depends on it.
                if let Some(model) = self.known.model.histories.get_mut(&history) {
                    model.is_dropping = false;
                }
            }
            (Waiting::Fork { .. }, Err(error)) => {
                let is_incomplete = matches!(error, afterimage_seed::SeedError::Incomplete { .. });
                let is_gone = error.to_string().contains("has no history");
                let is_allowed = is_incomplete || is_gone || is_of_window(&error);
                assert!(is_allowed, "seed {seed}: {error}");
            }
            (_, other) => panic!("seed {seed}: {other:?}"),
        }
    }
}

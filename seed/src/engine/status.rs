//! What people want to know, and the whole state as edits.

use std::time::Duration;

use afterimage_blockdev::{
    AgentId, DiskId, Epoch, HistoryId, Lsn, MachineId, PointId, SegmentId, Timestamp,
};

use super::ingest::history_edit;
use super::retention::ClockInfo;
use super::{Engine, StoreFile};
use crate::manifest::{Edit, HistoryState};
use crate::run::RunId;

/// A range of LSNs in which every one can be mounted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Reach {
    /// The history.
    pub history: HistoryId,
    /// First LSN.
    pub first: Lsn,
    /// Last LSN.
    pub last: Lsn,
    /// Time of the first.
    pub first_time: Timestamp,
    /// Time of the last.
    pub last_time: Timestamp,
}

/// A history.
#[derive(Clone, Debug)]
pub struct HistoryInfo {
    /// Identity.
    pub history: HistoryId,
    /// Parent and fork.
    pub parent: Option<(HistoryId, Lsn)>,
    /// Forked here.
    pub is_branch: bool,
    /// Epoch of the newest writer.
    pub epoch: Epoch,
    /// That writer.
    pub origin: AgentId,
    /// Highest LSN received.
    pub received: Lsn,
    /// Highest durable LSN.
    pub durable: Lsn,
    /// Its time.
    pub durable_time: Timestamp,
    /// A stream is open.
    pub is_open: bool,
    /// First LSN of the journal window that is held.
    pub floor: Lsn,
}

/// A disk.
#[derive(Clone, Debug)]
pub struct DiskInfo {
    /// Identity.
    pub disk: DiskId,
    /// Name.
    pub name: String,
    /// Newest size.
    pub size_bytes: u64,
    /// A whole copy is here.
    pub has_copy: bool,
    /// What can be mounted.
    pub reaches: Vec<Reach>,
    /// Holes, for people.
    pub damage: Vec<String>,
}

/// A machine.
#[derive(Clone, Debug)]
pub struct MachineInfo {
    /// Identity.
    pub machine: MachineId,
    /// Name.
    pub name: String,
    /// The history that agents write.
    pub trunk: HistoryId,
    /// All histories.
    pub histories: Vec<HistoryInfo>,
    /// The disks.
    pub disks: Vec<DiskInfo>,
    /// Number of points.
    pub point_count: u64,
    /// Its journal window, while a lack of room keeps it shorter than the policy says.
    pub shortened_window: Option<Duration>,
}

/// Everything.
#[derive(Clone, Debug)]
pub struct EngineInfo {
    /// Bytes of the store's files.
    pub stored_bytes: u64,
    /// Bytes that waited when this was asked.
    pub queued_bytes: u64,
    /// Ingest waits for room; by the budget, not the medium.
    pub paused: Option<bool>,
    /// The machines.
    pub machines: Vec<MachineInfo>,
    /// Damage that was found, for people.
    pub damage: Vec<String>,
    /// The clock that locks trust.
    pub clock: ClockInfo,
}

impl Engine {
    pub(super) fn info(&self) -> EngineInfo {
        let seeds: u64 = self
            .seed_segments
            .values()
            .map(|segment| segment.bytes)
            .sum();
        let runs: u64 = self.runs.values().sum();
        EngineInfo {
            stored_bytes: self.log.stored_bytes()
                + seeds
                + runs
                + self.notes.stored_bytes()
                + self.manifest.stored_bytes(),
            queued_bytes: self.queued_bytes(),
            paused: self
                .is_paused
                .or(self.bulk.waits_for_room().then_some(false)),
            machines: self
                .machines
                .keys()
                .map(|machine| self.machine_info(*machine))
                .collect(),
            damage: self.damage.clone(),
            clock: self.clock_info(),
        }
    }

    /// The name of a machine that is known.
    #[must_use]
    pub fn name_of(&self, machine: MachineId) -> Option<&str> {
        let state = self.machines.get(&machine)?;
        Some(&state.name)
    }

    fn machine_info(&self, machine: MachineId) -> MachineInfo {
        let state = &self.machines[&machine];
        let of_machine = self
            .histories
            .iter()
            .filter(|(_, entry)| entry.machine == machine);
        MachineInfo {
            machine,
            name: state.name.clone(),
            trunk: state.trunk,
            histories: of_machine
                .map(|(history, entry)| HistoryInfo {
                    history: *history,
                    parent: entry.parent,
                    is_branch: entry.is_branch,
                    epoch: entry.epoch,
                    origin: entry.origin,
                    received: entry.received,
                    durable: entry.durable,
                    durable_time: entry.durable_time,
                    is_open: entry.stream.is_some(),
                    floor: entry.floor,
                })
                .collect(),
            disks: state
                .disks
                .iter()
                .map(|disk| self.disk_info(*disk, state.trunk))
                .collect(),
            point_count: state.points.len() as u64,
            shortened_window: self
                .is_window_shortened(machine)
                .then(|| self.journal_window(machine)),
        }
    }

    fn disk_info(&self, disk: DiskId, trunk: HistoryId) -> DiskInfo {
        let state = &self.disks[&disk];
        let mut damage = Vec::new();
        if let Some(entry) = self.histories.get(&trunk) {
            if self.unread.lost_of(entry.id).is_some() {
                damage.push("a file that may hold blocks of it cannot be read".to_owned());
            }
            for (hurt, first, last) in &entry.lost {
                if *hurt == disk || hurt.is_nil() {
                    damage.push(format!("records {first} to {last} were lost"));
                }
            }
            for hole in entry
                .holes
                .iter()
                .filter(|hole| hole.undecided.contains(&disk))
            {
                damage.push(format!(
                    "records {} to {} may be lost",
                    hole.first, hole.last
                ));
            }
        }
        DiskInfo {
            disk,
            name: state.name.clone(),
            size_bytes: self.size_at(disk, trunk, Lsn(u64::MAX)),
            has_copy: self.copied_in_lineage(disk, trunk, Lsn(u64::MAX)),
            reaches: self.reaches(disk, trunk),
            damage,
        }
    }

    /// Bytes that were received and wait to be written.
    #[must_use]
    pub fn queued_bytes(&self) -> u64 {
        self.log.queued_bytes() + self.bulk.bytes()
    }

    pub(super) fn files(&self) -> Vec<StoreFile> {
        let logs = self.log.segments().into_iter().map(StoreFile::Log);
        let seeds = self.seed_segments.iter();
        let seeds = seeds.map(|(segment, state)| StoreFile::Seed(*segment, state.generation));
        let runs = self.runs.keys().copied().map(StoreFile::Run);
        // First, for it says what the others should be.
        let manifest = core::iter::once(StoreFile::Manifest(self.manifest.number()));
        let others = logs.chain(seeds).chain(runs).chain(self.notes.files());
        manifest.chain(others).collect()
    }

    /// The whole state, for the beginning of a manifest file.
    pub(super) fn whole_state(&self) -> Vec<Edit> {
        let mut edits = vec![Edit::Store {
            store: self.store,
            created: self.created,
            next_segment: SegmentId(self.next_segment),
            next_run: RunId(self.next_run),
            next_point: PointId(self.next_point),
        }];
        for (machine, state) in &self.machines {
            edits.push(Edit::Machine {
                machine: *machine,
                tag_key: state.tag_key,
                holder: state.holder,
                name: state.name.clone(),
            });
        }
        for (disk, state) in &self.disks {
            edits.push(Edit::Disk {
                disk: *disk,
                machine: state.machine,
                size_bytes: state.declared_bytes,
                logical_block_bytes: state.logical_block_bytes,
                key: state.key,
                wrapped: state.wrapped,
                name: state.name.clone(),
            });
        }
        // The trunk comes last of a machine's histories, for the last one named is the trunk.
        let is_trunk = |machine: &MachineId, history: &HistoryId| {
            self.machines
                .get(machine)
                .is_some_and(|state| state.trunk == *history)
        };
        for wants_trunk in [false, true] {
            for (history, entry) in &self.histories {
                if is_trunk(&entry.machine, history) == wants_trunk {
                    let (machine, parent) = (entry.machine, entry.parent);
                    edits.push(history_edit(*history, machine, parent, entry.is_branch));
                }
            }
        }
        edits.extend(
            self.seed_segments
                .iter()
                .map(|(segment, state)| Edit::Segment {
                    segment: *segment,
                    generation: state.generation,
                    slot_count: state.slot_count,
                    bytes: state.bytes,
                    root: state.root,
                }),
        );
        edits.extend(self.runs.iter().map(|(run, bytes)| Edit::Run {
            run: *run,
            bytes: *bytes,
        }));
        edits.extend(self.checkpoint_state());
        for machine in self.machines.values() {
            edits.extend(machine.points.values().cloned().map(Edit::Point));
        }
        edits.extend(self.retention_state());
        edits
    }

    /// What the last run covered: never more, for the log tells the rest.
    fn checkpoint_state(&self) -> Vec<Edit> {
        let mut edits = self.covered.clone();
        edits.push(Edit::Checkpoint {
            log_sequence: self.checkpoint,
        });
        edits.push(Edit::BaseThrough {
            segment: self.base_through,
        });
        if self.log_released > 0 {
            edits.push(Edit::LogReleased {
                log_sequence: self.log_released,
            });
        }
        edits
    }

    /// Notes what a run covers, once it counts.
    pub(super) fn note_covered(&mut self, edits: &[Edit]) {
        for edit in edits {
            match edit {
                Edit::Checkpoint { log_sequence } => self.checkpoint = *log_sequence,
                Edit::BaseThrough { segment } => self.base_through = *segment,
                Edit::HistoryState(state) => {
                    self.covered.retain(|known| !is_state_of(known, state));
                    self.covered.push(edit.clone());
                }
                Edit::Batch(batch) => {
                    // A run's edits name all batches of a history, each with its disks.
                    self.covered.retain(|known| {
                        !matches!(known, Edit::Batch(old)
                            if old.history == batch.history
                                && old.begin == batch.begin
                                && old.disks.iter().all(|disk| batch.disks.contains(disk)))
                    });
                    self.covered.push(edit.clone());
                }
                Edit::HistoryDropped { history } => {
                    self.covered
                        .retain(|known| history_of(known) != Some(*history));
                }
                Edit::Lost { .. } | Edit::Size { .. } if !self.covered.contains(edit) => {
                    self.covered.push(edit.clone());
                }
                _ => {}
            }
        }
    }
}

/// The history that an edit is about.
fn history_of(edit: &Edit) -> Option<HistoryId> {
    match edit {
        Edit::HistoryState(state) => Some(state.history),
        Edit::Batch(batch) => Some(batch.history),
        Edit::Lost { history, .. } | Edit::Size { history, .. } => Some(*history),
        _ => None,
    }
}

fn is_state_of(known: &Edit, state: &HistoryState) -> bool {
    matches!(known, Edit::HistoryState(old) if old.history == state.history)
}

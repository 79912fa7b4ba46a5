//! Quotas: a machine or disk that takes more than it may is thinned, whatever room there is; when
//! nothing of it can go, its ingest waits, and that of all others goes on.
//!
//! Invariants
//! * What a quota counts is what is needed, by the last account and what was stored since; points
//!   go only when an account that is newer than the last step says that it is still too much.
//! * A frame that waits is not taken: it is not received, and its sender keeps it. Frames wait in
//!   order, and no more of them than the stream's credit.

use std::collections::{BTreeMap, VecDeque};

use afterimage_blockdev::{DiskId, HistoryId, Lsn, MachineId, Monotonic};
use afterimage_cache::Frame;

use super::account::{DiskAccount, Use};
use super::forecast::in_words;
use super::pressure::HALVINGS_MAX;
use super::{AfterCommit, Engine, Event, Output, RequestId, Response, StreamNumber};
use crate::error::SeedError;
use crate::manifest::{Edit, QuotaOf};

/// Below this part of a quota windows get longer again.
const EASY: (u64, u64) = (3, 4);
/// A collection for a quota's sake wants so much of it to be new.
const GROWTH_PART: u64 = 16;
/// The wait between looks at a machine that waits doubles so often.
const DOUBLINGS: u32 = 6;

type Answer = Result<Option<Response>, SeedError>;

/// A frame that waits; bulk has a number.
type HeldFrame = (Option<u64>, Frame);

/// A machine that takes too much.
#[derive(Debug)]
struct Held {
    why: String,
    frames: BTreeMap<StreamNumber, VecDeque<HeldFrame>>,
}

/// The quotas, and who waits because of them.
#[derive(Debug, Default)]
pub(super) struct Quotas {
    of: BTreeMap<QuotaOf, u64>,
    held: BTreeMap<MachineId, Held>,
    /// Collections in a row after which a machine had to wait.
    vain: u32,
    next_at: Monotonic,
    /// The number of the last account by which it was decided.
    decided_by: u64,
}

impl Quotas {
    pub(super) fn set(&mut self, of: QuotaOf, bytes: u64) {
        self.next_at = Monotonic(0);
        self.vain = 0;
        if bytes == 0 {
            self.of.remove(&of);
        } else {
            self.of.insert(of, bytes);
        }
    }

    pub(super) fn edits(&self) -> Vec<Edit> {
        let all = self.of.iter();
        all.map(|(of, bytes)| Edit::Quota {
            of: *of,
            bytes: *bytes,
        })
        .collect()
    }

    /// Says whether any machine or disk has one.
    fn limits_machines(&self) -> bool {
        self.of.keys().any(|of| *of != QuotaOf::Store)
    }

    pub(super) fn of_store(&self) -> Option<u64> {
        self.of.get(&QuotaOf::Store).copied()
    }

    pub(super) fn of_machine(&self, machine: MachineId) -> Option<u64> {
        self.of.get(&QuotaOf::Machine(machine)).copied()
    }

    pub(super) fn of_disk(&self, disk: DiskId) -> Option<u64> {
        self.of.get(&QuotaOf::Disk(disk)).copied()
    }

    pub(super) fn why_held(&self, machine: MachineId) -> Option<String> {
        self.held.get(&machine).map(|held| held.why.clone())
    }
}

/// What takes more than it may.
struct Over {
    name: String,
    used: u64,
    quota: u64,
}

impl Engine {
    /// What of a machine is nearest to its quota or farthest beyond, with what it takes; since the
    /// last account, too, if that is wanted.
    fn against_quota(&self, machine: MachineId, counts_new: bool) -> Option<Over> {
        let quotas = &self.space.quotas;
        let state = self.machines.get(&machine)?;
        let account = self.space.account.as_ref()?;
        let used = |disks: &[DiskId]| {
            let new = disks.iter().map(|disk| self.stored_since(*disk));
            let new: u64 = if counts_new { new.sum() } else { 0 };
            account.needed_bytes(disks).saturating_add(new)
        };
        let whole = quotas.of_machine(machine).map(|quota| Over {
            name: format!("machine {}", state.name),
            used: used(&state.disks),
            quota,
        });
        let disks = state.disks.iter().filter_map(|disk| {
            let name = &self.disks.get(disk)?.name;
            Some(Over {
                name: format!("disk {}/{name}", state.name),
                used: used(&[*disk]),
                quota: quotas.of_disk(*disk)?,
            })
        });
        let all = whole.into_iter().chain(disks);
        all.max_by_key(|over| i128::from(over.used) - i128::from(over.quota))
    }

    fn over_quota(&self, machine: MachineId, counts_new: bool) -> Option<Over> {
        let found = self.against_quota(machine, counts_new)?;
        (found.used > found.quota).then_some(found)
    }

    /// Says whether a machine takes so much of its quota that its window stays as short as it is.
    pub(super) fn is_near_quota(&self, machine: MachineId) -> bool {
        let near = |found: Over| found.used > found.quota / EASY.1 * EASY.0;
        self.against_quota(machine, true).is_some_and(near)
    }

    /// Says whether a collection may show that a quota is exceeded, or kept again.
    pub(super) fn quotas_want_sweep(&self) -> bool {
        let quotas = &self.space.quotas;
        if (!quotas.limits_machines() && quotas.held.is_empty()) || quotas.next_at > self.now {
            return false;
        }
        if self.space.account.is_none() || !quotas.held.is_empty() {
            return true;
        }
        self.machines.keys().any(|machine| {
            let known = self.over_quota(*machine, false);
            let grown = self.over_quota(*machine, true).filter(|over| {
                let before = self.against_quota(*machine, false).map_or(0, |o| o.used);
                over.used.saturating_sub(before) > over.quota / GROWTH_PART
            });
            known.or(grown).is_some()
        })
    }

    /// Thins who takes too much by the last account; what cannot be thinned waits.
    pub(super) fn keep_quotas(&mut self, out: &mut Vec<Output>) {
        let accounts = self.space.accounts;
        if accounts == 0 || self.space.quotas.decided_by == accounts {
            return;
        }
        self.space.quotas.decided_by = accounts;
        let machines: Vec<MachineId> = self.machines.keys().copied().collect();
        let mut is_vain = false;
        for machine in machines {
            let Some(over) = self.over_quota(machine, false) else {
                self.let_go_on(machine, out);
                continue;
            };
            if self.thin_machine(machine, out) {
                continue;
            }
            is_vain = true;
            self.make_wait(machine, &over, out);
        }
        self.space.quotas.vain = if is_vain {
            self.space.quotas.vain.saturating_add(1)
        } else {
            0
        };
    }

    /// Takes one step of giving way with a machine alone; false when nothing of it can go.
    fn thin_machine(&mut self, machine: MachineId, out: &mut Vec<Output>) -> bool {
        self.observe_clock(out);
        let halvings = self.halvings.get(&machine).copied().unwrap_or(0);
        if halvings < HALVINGS_MAX && self.journal_window(machine) > self.options.window_min {
            let window = self.shorten_window(machine);
            out.push(Output::Event(Event::WindowShortened { machine, window }));
            self.raise_floors(out);
            return true;
        }
        // At its shortest a window still moves on.
        if self.raise_floors_of(machine, out) {
            return true;
        }
        let points = self.points_to_yield(machine);
        if points.is_empty() {
            return false;
        }
        let count = points.len();
        out.push(Output::Event(Event::PointsYielded { machine, count }));
        self.yield_points(machine, points, out);
        true
    }

    /// Raises all floors that have moved; says whether one of this machine has.
    fn raise_floors_of(&mut self, machine: MachineId, out: &mut Vec<Output>) -> bool {
        let floors = self.floors_to_raise();
        let is_of = |(history, _): &(HistoryId, Lsn)| {
            let entry = self.histories.get(history);
            entry.is_some_and(|entry| entry.machine == machine)
        };
        let has_moved = floors.iter().any(is_of);
        self.raise_floors(out);
        has_moved
    }

    /// When a collection ended: when the next one may be wanted.
    pub(super) fn quotas_swept(&mut self, out: &mut Vec<Output>) {
        let doublings = self.space.quotas.vain.min(DOUBLINGS);
        let wait = self.options.retry * (1 << doublings);
        self.space.quotas.next_at = self.now.after(wait);
        let quotas = &self.space.quotas;
        if quotas.limits_machines() || !quotas.held.is_empty() {
            out.push(Output::WakeAt(self.space.quotas.next_at));
        }
    }

    fn make_wait(&mut self, machine: MachineId, over: &Over, out: &mut Vec<Output>) {
        let known = self.space.account.as_ref().map(|account| &account.disks);
        let disks = self.machines.get(&machine).map(|state| &state.disks);
        let disks = disks.into_iter().flatten();
        let disks: Vec<_> = disks.filter_map(|disk| known?.get(disk)).collect();
        let sum = |of: &dyn Fn(&DiskAccount) -> u64| {
            let bytes = disks.iter().map(|disk| of(disk)).sum();
            in_words(bytes)
        };
        let why = format!(
            "{} takes {} of its quota of {}, and nothing of it can be thinned: its newest state \
             takes {}, locked points alone {}, named points alone {}, the shortest journal window \
             alone {}, and what several of them need {}",
            over.name,
            in_words(over.used),
            in_words(over.quota),
            sum(&|disk| disk.current.bytes),
            sum(&|disk| disk.alone_for(Use::Locked).bytes),
            sum(&|disk| disk.alone_for(Use::Named).bytes),
            sum(&|disk| disk.alone_for(Use::Window).bytes),
            sum(&|disk| disk.shared.bytes),
        );
        let is_new = !self.space.quotas.held.contains_key(&machine);
        let held = self.space.quotas.held.entry(machine).or_insert(Held {
            why: String::new(),
            frames: BTreeMap::new(),
        });
        held.why.clone_from(&why);
        if is_new {
            out.push(Output::Event(Event::MachinePaused { machine, why }));
        }
    }

    /// Lets the frames of a machine in again.
    fn let_go_on(&mut self, machine: MachineId, out: &mut Vec<Output>) {
        let Some(held) = self.space.quotas.held.remove(&machine) else {
            return;
        };
        out.push(Output::Event(Event::MachineResumed { machine }));
        for (stream, frames) in held.frames {
            for (bulk, frame) in frames {
                // A stream that is over has nothing that waits.
                if !self.streams.contains_key(&stream) {
                    break;
                }
                self.take_frame(stream, bulk, frame, out);
            }
        }
    }

    /// Takes a frame, unless its machine waits.
    pub(super) fn take_frame(
        &mut self,
        stream: StreamNumber,
        bulk: Option<u64>,
        frame: Frame,
        out: &mut Vec<Output>,
    ) {
        match self.hold_frame(stream, (bulk, frame), out) {
            None => {}
            Some((Some(number), frame)) => self.bulk_frame(stream, number, &frame, out),
            Some((None, frame)) => self.frame(stream, frame, out),
        }
    }

    /// Keeps a frame back when its machine waits; gives it back otherwise.
    fn hold_frame(
        &mut self,
        stream: StreamNumber,
        frame: HeldFrame,
        out: &mut Vec<Output>,
    ) -> Option<HeldFrame> {
        if self.space.quotas.held.is_empty() {
            return Some(frame);
        }
        let Some(machine) = self.streams.get(&stream).map(|open| open.machine) else {
            return Some(frame);
        };
        let Some(held) = self.space.quotas.held.get_mut(&machine) else {
            return Some(frame);
        };
        let streams = &self.streams;
        held.frames.retain(|stream, _| streams.contains_key(stream));
        let waiting = held.frames.entry(stream).or_default();
        if waiting.is_empty() {
            let why = held.why.clone();
            out.push(Output::Event(Event::StreamPaused { stream, why }));
        }
        waiting.push_back(frame);
        None
    }

    /// What a quota is of: nothing named means the store, a name a machine, with a disk behind a
    /// slash that disk.
    fn quota_of(&self, name: Option<&str>) -> Result<QuotaOf, SeedError> {
        let Some(name) = name else {
            return Ok(QuotaOf::Store);
        };
        let Some((machine, disk)) = name.split_once('/') else {
            return Ok(QuotaOf::Machine(self.machine_named(name)?));
        };
        let machine = self.machine_named(machine)?;
        let disks = self.machines.get(&machine).map(|state| &state.disks);
        let mut disks = disks.into_iter().flatten();
        let is_it = |id: &&DiskId| {
            let known = self.disks.get(*id);
            known.is_some_and(|known| known.name == disk) || id.to_string() == disk
        };
        disks
            .find(is_it)
            .map(|id| QuotaOf::Disk(*id))
            .ok_or_else(|| {
                SeedError::refused(
                    format!("the machine has no disk {disk:?}"),
                    "`aft disk list` shows them",
                )
            })
    }

    pub(super) fn set_quota(
        &mut self,
        id: RequestId,
        name: Option<&str>,
        bytes: Option<u64>,
        out: &mut Vec<Output>,
    ) -> Answer {
        let of = self.quota_of(name)?;
        let bytes = bytes.unwrap_or(0);
        if bytes > 0 {
            self.can_be_kept(of, bytes)?;
        }
        self.space.quotas.set(of, bytes);
        self.limit_budget();
        let after = AfterCommit::Reply(id, Box::new(Response::Done));
        self.commit(vec![Edit::Quota { of, bytes }], after, out);
        Ok(None)
    }

    /// Refuses a quota that what cannot be thinned exceeds already.
    fn can_be_kept(&self, of: QuotaOf, bytes: u64) -> Result<(), SeedError> {
        let Some(account) = &self.space.account else {
            return Ok(());
        };
        let is_meant = |disk: &DiskId| match of {
            QuotaOf::Store => true,
            QuotaOf::Machine(machine) => self.disks.get(disk).is_some_and(|d| d.machine == machine),
            QuotaOf::Disk(meant) => *disk == meant,
        };
        let fixed = account.disks.iter().filter(|(disk, _)| is_meant(disk));
        let fixed = fixed.map(|(_, disk)| disk.current.bytes + disk.alone_for(Use::Locked).bytes);
        let fixed: u64 = fixed.sum();
        if fixed <= bytes {
            return Ok(());
        }
        Err(SeedError::refused(
            format!(
                "the newest state and locked points take {} already, more than {}",
                in_words(fixed),
                in_words(bytes)
            ),
            "choose a larger quota",
        ))
    }
}

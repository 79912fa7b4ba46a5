//! Recovery points: names for cuts. Making one is one manifest commit, whatever their number.

use afterimage_blockdev::{AgentId, HistoryId, Lsn, MachineId, PointId, Timestamp};
use afterimage_cache::MarkKind;

use super::apply::FoundMark;
use super::records::POINTS_MAX;
use super::{AfterCommit, Engine, Event, Output, RequestId, Response, StreamNumber};
use crate::error::SeedError;
use crate::manifest::{Edit, PointKind, PointRecord};
use crate::reference::{At, format_time};
use crate::retention::Lock;

/// Most points of one page.
const PAGE_MAX: usize = 10_000;

type Answer = Result<Option<Response>, SeedError>;

/// A mark that was asked for.
#[derive(Debug)]
pub(super) struct WantedMark {
    pub(super) machine: MachineId,
    pub(super) stream: StreamNumber,
    pub(super) request: Option<RequestId>,
}

impl Engine {
    pub(super) fn machine_named(&self, text: &str) -> Result<MachineId, SeedError> {
        if let Ok(id) = text.parse::<MachineId>() {
            if self.machines.contains_key(&id) {
                return Ok(id);
            }
        }
        let found = self
            .machines
            .iter()
            .find(|(_, machine)| machine.name == text);
        found.map(|(id, _)| *id).ok_or_else(|| {
            let names = self.machines.values().map(|machine| machine.name.as_str());
            SeedError::refused(
                format!("there is no machine {text:?}"),
                nearest(text, names),
            )
        })
    }

    pub(super) fn put_point(&mut self, point: PointRecord) {
        if let Some(machine) = self.machines.get_mut(&point.machine) {
            machine.pending.remove(&point.id);
            machine.names.insert(point.name.clone(), point.id);
            machine.points.insert(point.id, point);
        }
    }

    pub(super) fn forget_point(&mut self, machine: MachineId, point: PointId) {
        if let Some(machine) = self.machines.get_mut(&machine) {
            if let Some(point) = machine.points.remove(&point) {
                machine.names.remove(&point.name);
            }
        }
    }

    pub(super) fn create_point(
        &mut self,
        id: RequestId,
        machine: &str,
        name: Option<String>,
        at: Option<At>,
        out: &mut Vec<Output>,
    ) -> Answer {
        let machine = self.machine_named(machine)?;
        if let Some(name) = &name {
            super::ingest::check_name(name)?;
            let is_taken = self
                .machines
                .get(&machine)
                .is_some_and(|state| state.names.contains_key(name));
            if is_taken {
                return Err(SeedError::refused(
                    format!("there is already a point named {name:?}"),
                    "choose another name, or delete that one",
                ));
            }
            let parsed = name.parse::<At>();
            if !matches!(parsed, Ok(At::Name(_))) {
                return Err(SeedError::refused(
                    format!("{name:?} already means something else"),
                    "choose a name that is no time, age, LSN or `latest`",
                ));
            }
        }
        let Some(state) = self.machines.get(&machine) else {
            return Ok(None);
        };
        let count = state.points.len() + state.pending.len();
        if count >= POINTS_MAX {
            let message = format!("machine {} already has {count} points", state.name);
            return Err(SeedError::refused(
                message,
                "delete some, or keep fewer by its policy",
            ));
        }
        let (trunk, has_disks) = (state.trunk, !state.disks.is_empty());
        if !has_disks {
            let message = format!("machine {} has no protected disk", state.name);
            return Err(SeedError::refused(message, "protect one first"));
        }
        let stream = self.histories.get(&trunk).and_then(|entry| entry.stream);
        if let (None, Some(stream)) = (&at, stream) {
            let request = self.next_mark;
            self.next_mark += 1;
            self.marks.insert(
                request,
                WantedMark {
                    machine,
                    stream,
                    request: Some(id),
                },
            );
            out.push(Output::Event(Event::PlaceMark {
                stream,
                request,
                is_bookmark: true,
                name: name.unwrap_or_default(),
            }));
            return Ok(None);
        }
        let (history, lsn) = self.cut_at(machine, &at.unwrap_or(At::Latest))?;
        let time = self.time_at(history, lsn);
        self.name_cut(
            machine,
            (history, lsn, time),
            PointKind::Bookmark,
            name,
            Some(id),
            out,
        );
        Ok(None)
    }

    /// Names a durable cut.
    fn name_cut(
        &mut self,
        machine: MachineId,
        (history, lsn, time): (HistoryId, Lsn, Timestamp),
        kind: PointKind,
        name: Option<String>,
        request: Option<RequestId>,
        out: &mut Vec<Output>,
    ) {
        let id = PointId(self.next_point);
        self.next_point += 1;
        let kind = self.kind_of_point(history, lsn, kind);
        let is_taken = |name: &String| {
            self.machines
                .get(&machine)
                .is_some_and(|state| state.names.contains_key(name))
        };
        let chosen = name.filter(|name| !name.is_empty() && !is_taken(name));
        let name = chosen.unwrap_or_else(|| {
            let base = generated_name(kind, time);
            if is_taken(&base) {
                format!("{base}-{id}")
            } else {
                base
            }
        });
        let lock = self.lock_of_new(machine, kind, out);
        let locked_until = lock.map_or(Timestamp(0), |lock| lock.until);
        let point = PointRecord {
            id,
            machine,
            history,
            lsn,
            time,
            kind,
            locked_until,
            name,
        };
        // It is listed when it is durable; its name is taken from now on.
        if let Some(state) = self.machines.get_mut(&machine) {
            state.names.insert(point.name.clone(), point.id);
            state.pending.insert(point.id, point.clone());
        }
        let mut edits = vec![Edit::Point(point.clone())];
        if let Some(lock) = lock {
            self.retention.locks.insert(id, lock);
            edits.push(Edit::PointLocked { point: id, lock });
        }
        edits.extend(self.due_clock_edit());
        self.commit(edits, AfterCommit::Point(point, request), out);
    }

    /// The lock that the policy puts on a new point.
    fn lock_of_new(
        &mut self,
        machine: MachineId,
        kind: PointKind,
        out: &mut Vec<Output>,
    ) -> Option<Lock> {
        let duration = self.policy_of(machine).policy.lock_of(kind)?;
        let clock = self.lock_clock(out).ok()?;
        Some(clock.lock_for(duration))
    }

    /// A mark became durable: the point that was asked for, or a crash mark by the timer.
    pub(super) fn mark_is_durable(&mut self, mark: FoundMark, out: &mut Vec<Output>) {
        let kind = match mark.kind {
            MarkKind::Crash => PointKind::Crash,
            MarkKind::Bookmark | MarkKind::Group => PointKind::Bookmark,
            MarkKind::Application => PointKind::Application,
            MarkKind::Heartbeat => return,
        };
        let Some(entry) = self.histories.get(&mark.history) else {
            return;
        };
        let machine = entry.machine;
        let wanted = self.marks.remove(&mark.request);
        let request = wanted
            .filter(|wanted| wanted.machine == machine)
            .and_then(|w| w.request);
        let points = self
            .machines
            .get(&machine)
            .map_or(0, |state| state.points.len());
        if points >= POINTS_MAX {
            tracing::error!(%machine, points, "a mark makes no point: there are too many");
            if let Some(request) = request {
                let message = format!("the machine already has {points} points");
                let error = SeedError::refused(message, "delete some");
                out.push(Output::Reply(request, Err(error)));
            }
            return;
        }
        let cut = (mark.history, mark.lsn, mark.time);
        self.name_cut(machine, cut, kind, Some(mark.name), request, out);
    }

    pub(super) fn kind_of_point(
        &self,
        history: HistoryId,
        lsn: Lsn,
        wanted: PointKind,
    ) -> PointKind {
        let machine = self
            .histories
            .get(&history)
            .and_then(|e| self.machines.get(&e.machine));
        let mut disks = machine.into_iter().flat_map(|machine| &machine.disks);
        if disks.any(|disk| self.open_batch(*disk, history, lsn).is_some()) {
            PointKind::ResyncIncomplete
        } else {
            wanted
        }
    }

    pub(super) fn place_crash_marks(&mut self, out: &mut Vec<Output>) {
        if self.now < self.next_crash_mark {
            out.push(Output::WakeAt(self.next_crash_mark));
            return;
        }
        self.next_crash_mark = self.now.after(self.options.crash_mark_interval);
        let streams: Vec<_> = self
            .streams
            .iter()
            .filter(|(_, stream)| {
                self.histories
                    .get(&stream.history)
                    .is_some_and(|entry| !entry.is_branch)
            })
            .map(|(number, stream)| (*number, stream.machine))
            .collect();
        self.marks
            .retain(|_, wanted| self.streams.contains_key(&wanted.stream));
        for (stream, machine) in streams {
            let request = self.next_mark;
            self.next_mark += 1;
            self.marks.insert(
                request,
                WantedMark {
                    machine,
                    stream,
                    request: None,
                },
            );
            let name = String::new();
            let event = Event::PlaceMark {
                stream,
                request,
                is_bookmark: false,
                name,
            };
            out.push(Output::Event(event));
        }
        out.push(Output::WakeAt(self.next_crash_mark));
    }

    pub(super) fn list_points(
        &self,
        machine: &str,
        after: PointId,
        limit: usize,
    ) -> Result<Response, SeedError> {
        let machine = self.machine_named(machine)?;
        let Some(state) = self.machines.get(&machine) else {
            return Ok(Response::Points(Vec::new(), 0));
        };
        let from = PointId(after.0.saturating_add(1));
        let page = state.points.range(from..).take(limit.min(PAGE_MAX));
        let page = page.map(|(_, point)| self.shown_point(point)).collect();
        Ok(Response::Points(page, state.points.len() as u64))
    }

    pub(super) fn fence(
        &mut self,
        id: RequestId,
        machine: MachineId,
        holder: AgentId,
        out: &mut Vec<Output>,
    ) -> Answer {
        let Some(state) = self.machines.get_mut(&machine) else {
            return Err(SeedError::refused(
                format!("there is no machine {machine}"),
                "",
            ));
        };
        state.holder = holder;
        let (tag_key, name, trunk) = (state.tag_key, state.name.clone(), state.trunk);
        if let Some(entry) = self.histories.get(&trunk) {
            if let Some(stream) = entry.stream.filter(|_| entry.origin != holder) {
                self.end_stream(stream, super::StreamEnd::Fenced, out);
            }
        }
        let edit = Edit::Machine {
            machine,
            tag_key,
            holder,
            name,
        };
        self.commit(
            vec![edit],
            AfterCommit::Reply(id, Box::new(Response::Done)),
            out,
        );
        Ok(None)
    }
}

/// The name of a point that nobody named; its number may follow.
fn generated_name(kind: PointKind, time: Timestamp) -> String {
    format!("{}-{}", kind.name(), format_time(time))
}

/// Says whether nobody named a point.
pub(super) fn is_generated_name(point: &PointRecord) -> bool {
    let base = generated_name(point.kind, point.time);
    let rest = point.name.strip_prefix(&base);
    rest.is_some_and(|rest| rest.is_empty() || rest == format!("-{}", point.id))
}

/// A hint that names what is nearest to what was asked for.
pub(super) fn nearest<'a>(wanted: &str, names: impl Iterator<Item = &'a str>) -> String {
    let best = names.min_by_key(|name| distance(wanted, name));
    best.map_or_else(
        || "there is none yet".to_owned(),
        |name| format!("the nearest one is {name:?}"),
    )
}

/// Number of single-character changes between two texts (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().take(128).collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, left) in a.chars().take(128).enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, right) in b.iter().enumerate() {
            let cost = diagonal + usize::from(left != *right);
            diagonal = row[j + 1];
            row[j + 1] = cost.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

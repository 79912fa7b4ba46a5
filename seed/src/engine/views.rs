//! From a reference to a snapshot, and from a snapshot to a branch.

use std::sync::Arc;

use afterimage_blockdev::{AgentId, DiskId, Epoch, HistoryId, Lsn, MachineId, Timestamp};
use afterimage_cache::DiskKey;

use super::ingest::history_edit;
use super::points::nearest;
use super::state::{HistoryEntry, Stream};
use super::{
    AfterCommit, Engine, ForkedBranch, OpenedStream, Output, RequestId, Response, StreamNumber,
    TakenSnapshot,
};
use crate::error::SeedError;
use crate::manifest::Edit;
use crate::reference::{At, Reference, format_time};
use crate::section::{Layer, Snapshot};

/// Deepest chain of forks.
const LAYERS_MAX: usize = 200;

impl Engine {
    fn disk_named(&self, machine: MachineId, text: &str) -> Result<DiskId, SeedError> {
        let state = &self.machines[&machine];
        let mut disks = state
            .disks
            .iter()
            .filter_map(|id| self.disks.get_key_value(id));
        let is_meant = |(id, disk): &(&DiskId, &super::state::DiskState)| {
            disk.name == text || id.to_string() == text
        };
        if let Some((id, _)) = disks.find(is_meant) {
            return Ok(*id);
        }
        let names = state
            .disks
            .iter()
            .filter_map(|id| self.disks.get(id))
            .map(|disk| disk.name.as_str());
        let message = format!("machine {} has no disk {text:?}", state.name);
        Err(SeedError::refused(message, nearest(text, names)))
    }

    /// The cut that a reference means.
    pub(super) fn cut_at(
        &self,
        machine: MachineId,
        at: &At,
    ) -> Result<(HistoryId, Lsn), SeedError> {
        let state = &self.machines[&machine];
        let trunk = state.trunk;
        let Some(entry) = self.histories.get(&trunk) else {
            let message = format!("machine {} has no history yet", state.name);
            return Err(SeedError::refused(message, "protect a disk first"));
        };
        match at {
            At::Latest => Ok((trunk, entry.durable)),
            At::Lsn(history, lsn) => {
                let history = history.unwrap_or(trunk);
                let known = self
                    .histories
                    .get(&history)
                    .filter(|e| e.machine == machine);
                let Some(known) = known else {
                    let message = format!("machine {} has no history {history}", state.name);
                    return Err(SeedError::refused(message, format!("its trunk is {trunk}")));
                };
                if *lsn > known.durable {
                    return Err(SeedError::refused(
                        format!("LSN {lsn} is not durable yet"),
                        format!("the nearest one is lsn:{}", known.durable),
                    ));
                }
                self.must_be_addressable(machine, (history, *lsn))
            }
            At::Time(time) => {
                let cut = self.cut_at_time(trunk, *time)?;
                self.must_be_addressable(machine, cut)
            }
            At::Ago(age) => {
                let now = self.clock.wall().0;
                let time = now.saturating_sub(afterimage_blockdev::clock::nanoseconds(*age));
                let cut = self.cut_at_time(trunk, Timestamp(time))?;
                self.must_be_addressable(machine, cut)
            }
            At::Name(name) => match state.names.get(name).and_then(|id| state.points.get(id)) {
                Some(point) if self.histories.contains_key(&point.history) => {
                    Ok((point.history, point.lsn))
                }
                _ => Err(SeedError::refused(
                    format!("machine {} has no point {name:?}", state.name),
                    nearest(name, state.names.keys().map(String::as_str)),
                )),
            },
        }
    }

    fn cut_at_time(
        &self,
        trunk: HistoryId,
        time: Timestamp,
    ) -> Result<(HistoryId, Lsn), SeedError> {
        let grain = afterimage_blockdev::clock::nanoseconds(self.options.time_grain);
        let mut first = None;
        for (history, entry, cap) in self.lineage(trunk, Lsn(u64::MAX)) {
            if let Some(lsn) = entry.lsn_at_or_before(time, grain) {
                return Ok((history, lsn.min(cap)));
            }
            first = entry
                .timeline
                .first()
                .or(entry.open_timeline.first())
                .or(first);
        }
        Err(SeedError::refused(
            format!("nothing is known of {}", format_time(time)),
            first.map_or_else(String::new, |first| {
                format!("the nearest time is {}", format_time(first.time))
            }),
        ))
    }

    /// Histories from one up to its oldest ancestor, each with the last LSN of it that is seen.
    pub(super) fn lineage(
        &self,
        history: HistoryId,
        lsn: Lsn,
    ) -> impl Iterator<Item = (HistoryId, &HistoryEntry, Lsn)> {
        let mut at = Some((history, lsn));
        core::iter::from_fn(move || {
            let (history, cap) = at.take()?;
            let entry = self.histories.get(&history)?;
            // LSNs go on in a fork, so that one below the fork means the parent's own.
            at = entry.parent.map(|(parent, fork)| (parent, fork.min(cap)));
            Some((history, entry, cap))
        })
        .take(LAYERS_MAX)
    }

    /// Refuses a fork of a history that no view could look through any more: beyond its farthest
    /// ancestor blocks would read as zeroes.
    pub(super) fn may_have_child(&self, parent: HistoryId) -> Result<(), SeedError> {
        let depth = self.lineage(parent, Lsn(u64::MAX)).count();
        if depth < LAYERS_MAX {
            return Ok(());
        }
        Err(SeedError::refused(
            format!("history {parent} already goes through {depth} forks"),
            "copy what is wanted to a disk of its own, and protect that",
        ))
    }

    /// Says whether a whole copy of a disk is visible at an LSN of a history.
    pub(super) fn copied_in_lineage(&self, disk: DiskId, history: HistoryId, lsn: Lsn) -> bool {
        self.lineage(history, lsn)
            .any(|(_, entry, cap)| entry.copied_at(disk).is_some_and(|end| end <= cap))
    }

    /// The begin of the batch of a disk that is open at an LSN of a history. A batch that ended
    /// after a fork also brought what an unfinished one before the fork lacks.
    pub(super) fn open_batch(&self, disk: DiskId, history: HistoryId, lsn: Lsn) -> Option<Lsn> {
        for (_, entry, cap) in self.lineage(history, lsn) {
            if let Some(batch) = entry.batch_at(disk, cap) {
                return Some(batch.begin);
            }
            if entry.ended_by(disk, cap) {
                return None;
            }
        }
        None
    }

    /// The size of a disk at an LSN of a history.
    pub(super) fn size_at(&self, disk: DiskId, history: HistoryId, lsn: Lsn) -> u64 {
        let Some(state) = self.disks.get(&disk) else {
            return 0;
        };
        self.lineage(history, lsn)
            .find_map(|(history, _, cap)| {
                let sizes = state
                    .sizes
                    .iter()
                    .filter(|known| known.0 == history && known.1 <= cap);
                sizes.max_by_key(|known| known.1).map(|known| known.2)
            })
            .unwrap_or(state.declared_bytes)
    }

    /// The time of an LSN of a history, to the grain of the timeline.
    pub(super) fn time_at(&self, history: HistoryId, lsn: Lsn) -> Timestamp {
        let found = self
            .lineage(history, lsn)
            .find_map(|(_, entry, cap)| entry.time_of(cap));
        let newest = || self.histories.get(&history).map(|entry| entry.durable_time);
        found.or_else(newest).unwrap_or_default()
    }

    /// What a disk consists of at an LSN of a history, as it is.
    pub(super) fn assemble(&mut self, disk: DiskId, history: HistoryId, lsn: Lsn) -> Arc<Snapshot> {
        let mut layers = Vec::new();
        let mut lost = Vec::new();
        let mut at = Some((history, lsn));
        for _ in 0..LAYERS_MAX {
            let Some((history, cap)) = at else { break };
            let Some(entry) = self.histories.get_mut(&history) else {
                break;
            };
            let mut sections = Vec::new();
            if let Some(map) = entry.disks.get_mut(&disk) {
                map.freeze();
                sections.extend(map.sections.iter().cloned());
                sections.extend(map.base_parts.iter().cloned());
                sections.retain(|section| section.lsns().0 <= cap);
            }
            for (hurt, first, last) in &entry.lost {
                if (*hurt == disk || hurt.is_nil()) && *first <= cap {
                    lost.push((history, *first, *last));
                }
            }
            if let Some((first, last)) = self.unread.lost_of(history) {
                lost.push((history, first, last));
            }
            for hole in &entry.holes {
                if hole.undecided.contains(&disk) && hole.first <= cap {
                    lost.push((history, hole.first, hole.last));
                }
            }
            layers.push(Layer {
                history,
                cap,
                sections,
            });
            at = entry.parent.map(|(parent, fork)| (parent, fork.min(cap)));
        }
        let serial = self.next_serial;
        self.next_serial += 1;
        let size_bytes = self.size_at(disk, history, lsn);
        let logical_block_bytes = self
            .disks
            .get(&disk)
            .map_or(4096, |state| state.logical_block_bytes);
        let snapshot = Arc::new(Snapshot {
            serial,
            disk,
            history,
            lsn,
            size_bytes,
            logical_block_bytes,
            layers,
            lost,
        });
        self.keep_snapshot(&snapshot);
        snapshot
    }

    pub(super) fn snapshot(
        &mut self,
        reference: &Reference,
        allow_incomplete: bool,
    ) -> Result<TakenSnapshot, SeedError> {
        let machine = self.machine_named(&reference.machine)?;
        let disk = self.disk_named(machine, &reference.disk)?;
        let (history, asked) = self.cut_at(machine, &reference.at)?;
        let mut lsn = asked;
        if !allow_incomplete {
            lsn = self
                .whole_at(disk, history, asked)
                .ok_or_else(|| SeedError::Incomplete {
                    message: format!(
                        "no whole copy of {}/{} is here at LSN {asked}",
                        reference.machine, reference.disk
                    ),
                    hint: "wait until the initial replication is done (`aft status`), or look at \
                           a later point"
                        .to_owned(),
                })?;
        }
        self.must_be_kept(machine, history, (asked, lsn))?;
        let snapshot = self.assemble(disk, history, lsn);
        Ok(TakenSnapshot {
            snapshot,
            machine,
            time: self.time_at(history, lsn),
            resolved_to_batch_begin: lsn != asked,
            tag_key: self.machines[&machine].tag_key,
        })
    }

    pub(super) fn newest_state(
        &mut self,
        stream: StreamNumber,
        disk: DiskId,
    ) -> Result<TakenSnapshot, SeedError> {
        let Some(open) = self.streams.get(&stream) else {
            return Err(SeedError::refused(
                "the stream is no longer open",
                "open it again",
            ));
        };
        let (machine, history) = (open.machine, open.history);
        let lsn = self.histories[&history].durable;
        let snapshot = self.assemble(disk, history, lsn);
        Ok(TakenSnapshot {
            snapshot,
            machine,
            time: self.histories[&history].durable_time,
            resolved_to_batch_begin: false,
            tag_key: self.machines[&machine].tag_key,
        })
    }

    pub(super) fn fork(
        &mut self,
        id: RequestId,
        reference: &Reference,
        allow_incomplete: bool,
        out: &mut Vec<Output>,
    ) -> Result<Option<Response>, SeedError> {
        let from = self.snapshot(reference, allow_incomplete)?;
        let (disk, parent, fork) = (from.snapshot.disk, from.snapshot.history, from.snapshot.lsn);
        self.may_have_child(parent)?;
        let history = HistoryId(self.entropy.identity());
        let origin = AgentId(self.store.0);
        let epoch = Epoch(1);
        self.put_history(history, from.machine, Some((parent, fork)), true);
        let stream = StreamNumber(self.next_stream);
        self.next_stream += 1;
        let machine = from.machine;
        self.streams.insert(
            stream,
            Stream {
                machine,
                history,
                epoch,
                queued_bytes: 0,
            },
        );
        let Some(entry) = self.histories.get_mut(&history) else {
            return Ok(None);
        };
        entry.epoch = epoch;
        entry.origin = origin;
        entry.stream = Some(stream);
        let snapshot = self.assemble(disk, history, fork);
        let key = self.disk_key(disk)?;
        let tag_key = from.tag_key;
        let branch = ForkedBranch {
            stream: OpenedStream {
                stream,
                durable: fork,
                highest: fork,
                tag_key,
            },
            history,
            taken: TakenSnapshot { snapshot, ..from },
            parent,
            fork,
            key,
            origin,
        };
        let edit = history_edit(history, machine, Some((parent, fork)), true);
        let after = AfterCommit::Reply(id, Box::new(Response::Branch(Box::new(branch))));
        self.commit(vec![edit], after, out);
        Ok(None)
    }

    pub(super) fn disk_key(&self, disk: DiskId) -> Result<DiskKey, SeedError> {
        let missing = || SeedError::WrongStoreKey {
            disk: disk.to_string(),
        };
        let id = self
            .disks
            .get(&disk)
            .map(|state| state.key)
            .ok_or_else(missing)?;
        self.keys
            .keys
            .read()
            .get(&(disk, id))
            .cloned()
            .ok_or_else(missing)
    }

    pub(super) fn drop_branch(
        &mut self,
        id: RequestId,
        history: HistoryId,
        out: &mut Vec<Output>,
    ) -> Result<Option<Response>, SeedError> {
        let is_branch = self
            .histories
            .get(&history)
            .is_some_and(|entry| entry.is_branch);
        if !is_branch {
            let message = format!("{history} is no branch");
            return Err(SeedError::refused(message, "only branches can be dropped"));
        }
        let has_child = self
            .histories
            .values()
            .any(|entry| entry.parent.is_some_and(|(parent, _)| parent == history));
        let has_point = self.machines.values().any(|machine| {
            let mut all = machine.points.values().chain(machine.pending.values());
            all.any(|point| point.history == history)
        });
        if has_child || has_point {
            let message = format!("something still depends on branch {history}");
            return Err(SeedError::refused(
                message,
                "drop its branches and points first",
            ));
        }
        if let Some(stream) = self.histories.get(&history).and_then(|entry| entry.stream) {
            self.close_stream(stream);
        }
        self.histories.remove(&history);
        let edit = Edit::HistoryDropped { history };
        self.note_covered(core::slice::from_ref(&edit));
        self.commit(
            vec![edit],
            AfterCommit::Reply(id, Box::new(Response::Done)),
            out,
        );
        Ok(None)
    }
}

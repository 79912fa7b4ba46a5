//! Streams: who may write a history, and in what order frames are taken.

use afterimage_blockdev::{AgentId, DiskId, Epoch, HistoryId, KeyId, Lsn, MachineId, Token};
use afterimage_cache::log::LogInput;
use afterimage_cache::{DiskKey, Frame, RecordKind};

use super::records::{DISK_BYTES_MAX, DISKS_MAX, is_size};
use super::state::{DiskState, Stream};
use super::{
    AfterCommit, DeclaredDisk, Engine, Event, OpenedStream, Output, RequestId, Response, StreamEnd,
    StreamNumber,
};
use crate::error::SeedError;
use crate::manifest::Edit;

/// Longest name of a machine, disk or point, in bytes.
const NAME_BYTES_MAX: usize = 128;

pub(super) struct Opening {
    pub(super) machine: MachineId,
    pub(super) name: String,
    pub(super) history: HistoryId,
    pub(super) parent: Option<(HistoryId, Lsn)>,
    pub(super) origin: AgentId,
    pub(super) epoch: Epoch,
}

pub(super) struct Declaring {
    pub(super) disk: DiskId,
    pub(super) name: String,
    pub(super) size_bytes: u64,
    pub(super) logical_block_bytes: u32,
}

type Answer = Result<Option<Response>, SeedError>;

/// Accepts a name that people chose.
pub(super) fn check_name(name: &str) -> Result<(), SeedError> {
    let is_legal = !name.is_empty()
        && name.len() <= NAME_BYTES_MAX
        && !name.starts_with('.')
        && !name.starts_with('-')
        && name
            .chars()
            .all(|c| !c.is_control() && !matches!(c, '/' | '@'));
    if is_legal {
        Ok(())
    } else {
        Err(SeedError::refused(
            format!("{name:?} cannot be a name"),
            "use 1 to 128 characters without '/', '@' and control characters",
        ))
    }
}

impl Engine {
    pub(super) fn open_stream(
        &mut self,
        id: RequestId,
        asked: Opening,
        out: &mut Vec<Output>,
    ) -> Answer {
        check_name(&asked.name)?;
        self.may_write(&asked)?;
        let mut edits = Vec::new();
        if !self.machines.contains_key(&asked.machine) {
            let mut tag_key = [0; 32];
            self.entropy.fill(&mut tag_key);
            self.put_machine(asked.machine, tag_key, AgentId::NIL, asked.name.clone());
            let machine = asked.machine;
            let name = asked.name.clone();
            edits.push(Edit::Machine {
                machine,
                tag_key,
                holder: AgentId::NIL,
                name,
            });
        }
        if !self.histories.contains_key(&asked.history) {
            self.put_history(asked.history, asked.machine, asked.parent, false);
            edits.push(history_edit(
                asked.history,
                asked.machine,
                asked.parent,
                false,
            ));
        }
        let stream = StreamNumber(self.next_stream);
        self.next_stream += 1;
        let Some(entry) = self.histories.get_mut(&asked.history) else {
            return Ok(None);
        };
        if entry.epoch != asked.epoch || entry.origin != asked.origin {
            // Durable with the first frame of the epoch; until then the old writer may come back.
            entry.epoch = asked.epoch;
            entry.origin = asked.origin;
        }
        let highest = entry.received.max(entry.highest_bulk);
        let durable = entry.durable;
        let before = entry.stream.replace(stream);
        self.streams.insert(
            stream,
            Stream {
                machine: asked.machine,
                history: asked.history,
                epoch: asked.epoch,
                queued_bytes: 0,
            },
        );
        if let Some(before) = before {
            self.streams.remove(&before);
            out.push(Output::Event(Event::Over {
                stream: before,
                end: StreamEnd::Fenced,
            }));
        }
        let tag_key = self
            .machines
            .get(&asked.machine)
            .map_or([0; 32], |state| state.tag_key);
        let opened = OpenedStream {
            stream,
            durable,
            highest,
            tag_key,
        };
        // Also without edits it must wait for those of an earlier request.
        self.commit(
            edits,
            AfterCommit::Reply(id, Box::new(Response::Stream(opened))),
            out,
        );
        Ok(None)
    }

    /// Says whether an origin may write a history in an epoch.
    fn may_write(&self, asked: &Opening) -> Result<(), SeedError> {
        let fenced = |message: String, hint: &str, is_held| {
            Err(SeedError::Fenced {
                message,
                hint: hint.to_owned(),
                is_held,
            })
        };
        if let Some(machine) = self.machines.get(&asked.machine) {
            if !machine.holder.is_nil() && machine.holder != asked.origin {
                let message = format!("machine {} was moved to another agent", machine.name);
                return fenced(message, "move it back with `aft machine move`", true);
            }
            let is_new = !self.histories.contains_key(&asked.history);
            let has_parent = asked
                .parent
                .is_some_and(|(parent, _)| self.histories.contains_key(&parent));
            if is_new && !machine.trunk.is_nil() && !has_parent {
                return Err(SeedError::refused(
                    format!("machine {} already has another history", machine.name),
                    "enrol the agent as a new machine, or restore its state directory",
                ));
            }
            if let Some((parent, _)) = asked.parent.filter(|_| is_new && has_parent) {
                self.may_have_child(parent)?;
            }
            if let Some(fork) = asked.parent.filter(|_| is_new && has_parent) {
                self.must_be_addressable(asked.machine, fork)?;
            }
        } else {
            let is_taken = self.machines.values().any(|known| known.name == asked.name);
            if is_taken {
                return Err(SeedError::refused(
                    format!("a machine named {:?} is already known", asked.name),
                    "enrol this one under another name",
                ));
            }
        }
        let Some(entry) = self.histories.get(&asked.history) else {
            return Ok(());
        };
        if entry.machine != asked.machine {
            let message = "the history belongs to another machine".to_owned();
            return Err(SeedError::refused(message, "enrol the agent again"));
        }
        let is_same = entry.origin == asked.origin || entry.origin.is_nil();
        let was_moved = self
            .machines
            .get(&asked.machine)
            .is_some_and(|machine| machine.holder == asked.origin);
        if asked.epoch < entry.epoch || (asked.epoch == entry.epoch && !is_same) {
            let message = format!(
                "epoch {} is over; the newest one is {}",
                asked.epoch, entry.epoch
            );
            return fenced(
                message,
                "restart the agent, so that it begins a new epoch",
                false,
            );
        }
        if !is_same && !was_moved {
            let message = format!("agent {} holds this machine", entry.origin);
            return fenced(message, "stop that agent, then `aft machine move`", true);
        }
        Ok(())
    }

    pub(super) fn close_stream(&mut self, stream: StreamNumber) {
        if let Some(closed) = self.streams.remove(&stream) {
            if let Some(entry) = self.histories.get_mut(&closed.history) {
                if entry.stream == Some(stream) {
                    entry.stream = None;
                }
            }
        }
    }

    pub(super) fn declare_disk(
        &mut self,
        id: RequestId,
        stream: StreamNumber,
        asked: Declaring,
        out: &mut Vec<Output>,
    ) -> Answer {
        check_name(&asked.name)?;
        let Some(open) = self.streams.get(&stream) else {
            return Err(SeedError::refused(
                "the stream is no longer open",
                "open it again",
            ));
        };
        let (machine, history) = (open.machine, open.history);
        if !is_size(asked.size_bytes) {
            return Err(SeedError::refused(
                format!("a disk cannot have {} bytes", asked.size_bytes),
                format!("sizes are multiples of 512, up to {DISK_BYTES_MAX}"),
            ));
        }
        let mut edits = Vec::new();
        if let Some(known) = self.disks.get(&asked.disk) {
            let size = self.size_at(asked.disk, history, Lsn(u64::MAX));
            if known.machine != machine {
                let message = "the disk belongs to another machine".to_owned();
                return Err(SeedError::refused(
                    message,
                    "attach it under a new identity",
                ));
            }
            if asked.size_bytes < size {
                return Err(SeedError::refused(
                    format!(
                        "disk {} shrank from {size} to {} bytes",
                        known.name, asked.size_bytes
                    ),
                    "enlarge it again, or attach it as a new disk",
                ));
            }
        } else {
            let is_taken = self
                .disks
                .values()
                .any(|known| known.machine == machine && known.name == asked.name);
            if is_taken {
                return Err(SeedError::refused(
                    format!("the machine already has a disk named {:?}", asked.name),
                    "choose another name",
                ));
            }
            let count = self.machines.get(&machine).map_or(0, |m| m.disks.len());
            if count >= DISKS_MAX {
                let message = format!("the machine already has {count} disks");
                return Err(SeedError::refused(
                    message,
                    "protect others as another machine",
                ));
            }
            edits.push(self.new_disk(machine, &asked));
        }
        let Some(disk) = self.disks.get(&asked.disk) else {
            return Ok(None);
        };
        let key = self.keys.keys.read().get(&(asked.disk, disk.key)).cloned();
        let key = key.ok_or(SeedError::WrongStoreKey {
            disk: asked.disk.to_string(),
        })?;
        let entry = self.histories.get(&history);
        let open_batch = entry.and_then(|entry| entry.batch_at(asked.disk, Lsn(u64::MAX)));
        let map = entry.and_then(|entry| entry.disks.get(&asked.disk));
        let is_copying = entry.is_some_and(|entry| entry.copying_since(asked.disk).is_some());
        let copied = map.filter(|_| is_copying);
        let declared = DeclaredDisk {
            key,
            has_copy: self.copied_in_lineage(asked.disk, history, Lsn(u64::MAX)),
            is_in_batch: open_batch.is_some(),
            bulk_done: copied.map_or(Vec::new(), |map| {
                map.bulk_blocks
                    .iter()
                    .map(|(from, to)| (*from, to - from))
                    .collect()
            }),
        };
        self.commit(
            edits,
            AfterCommit::Reply(id, Box::new(Response::Disk(declared))),
            out,
        );
        Ok(None)
    }

    fn new_disk(&mut self, machine: MachineId, asked: &Declaring) -> Edit {
        let mut secret = [0; 32];
        self.entropy.fill(&mut secret);
        let key = DiskKey {
            id: KeyId(1),
            secret,
        };
        let store_key = &self.options.store_key;
        let wrapped =
            afterimage_cache::key::wrap(store_key, asked.disk, &key, self.entropy.as_ref());
        self.keys.keys.write().insert((asked.disk, key.id), key);
        let state = DiskState {
            machine,
            name: asked.name.clone(),
            declared_bytes: asked.size_bytes,
            logical_block_bytes: asked.logical_block_bytes,
            key: KeyId(1),
            wrapped,
            sizes: Vec::new(),
        };
        self.disks.insert(asked.disk, state);
        if let Some(state) = self.machines.get_mut(&machine) {
            state.disks.push(asked.disk);
        }
        Edit::Disk {
            disk: asked.disk,
            machine,
            size_bytes: asked.size_bytes,
            logical_block_bytes: asked.logical_block_bytes,
            key: KeyId(1),
            wrapped,
            name: asked.name.clone(),
        }
    }

    pub(super) fn end_stream(
        &mut self,
        stream: StreamNumber,
        end: StreamEnd,
        out: &mut Vec<Output>,
    ) {
        self.close_stream(stream);
        out.push(Output::Event(Event::Over { stream, end }));
    }

    /// Says whether an empty segment of the log has room for a frame, its commit and its directory.
    fn fits_segment(&self, header: &afterimage_cache::FrameHeader) -> bool {
        let sealed = afterimage_cache::segment::Directory::sealed_bytes(header.slot_count);
        let around = 3 * afterimage_cache::segment::SECTOR as u64;
        header.frame_len() as u64 + sealed + around <= self.options.segment_bytes
    }

    /// Takes a frame whose hashes were verified.
    pub(super) fn frame(&mut self, stream: StreamNumber, frame: Frame, out: &mut Vec<Output>) {
        let Some(open) = self.streams.get(&stream) else {
            out.push(Output::Event(Event::Over {
                stream,
                end: StreamEnd::Fenced,
            }));
            return;
        };
        let header = frame.header;
        let identity = header.identity;
        let mut is_of_stream = identity.machine == open.machine
            && identity.history == open.history
            && identity.epoch <= open.epoch
            && !header.is_bulk
            && self.fits_segment(&header);
        if let Some(why) = self.refusal_of(open.machine, open.history, &frame) {
            tracing::error!(history = %open.history, %why, "a frame is refused");
            is_of_stream = false;
        }
        let Some(entry) = self
            .histories
            .get_mut(&open.history)
            .filter(|_| is_of_stream)
        else {
            return self.end_stream(stream, StreamEnd::Damaged, out);
        };
        if header.last <= entry.received {
            // Sent again after a lost connection.
            let (durable, queued_bytes) = (entry.durable, open.queued_bytes);
            out.push(Output::Event(Event::Durable {
                stream,
                durable,
                queued_bytes,
            }));
            return;
        }
        let expected = entry.received.next();
        let starts_epoch = starts_epoch(&frame);
        let is_stale = identity.epoch < entry.received_epoch;
        let needs_start = identity.epoch > entry.received_epoch && entry.received_epoch.0 != 0;
        if is_stale || (needs_start && !starts_epoch) {
            return self.end_stream(stream, StreamEnd::Fenced, out);
        }
        let follows = header.first == expected || (starts_epoch && header.first > expected);
        if !follows {
            return self.end_stream(stream, StreamEnd::Gap(expected, header.first), out);
        }
        entry.received = header.last;
        entry.received_epoch = identity.epoch;
        let bytes = frame.bytes.len() as u64;
        if let Some(open) = self.streams.get_mut(&stream) {
            open.queued_bytes += bytes;
        }
        let token = Token(self.next_append);
        self.next_append += 1;
        self.appended.insert(token, (stream, bytes));
        self.log_step(LogInput::Append { token, frame }, out);
    }
}

/// Says whether a frame begins with an epoch's first record.
pub(super) fn starts_epoch(frame: &Frame) -> bool {
    let first = frame.view().records().next();
    matches!(first, Some(Ok((_, record))) if record.header.kind == RecordKind::EpochStart)
}

pub(super) fn history_edit(
    history: HistoryId,
    machine: MachineId,
    parent: Option<(HistoryId, Lsn)>,
    is_branch: bool,
) -> Edit {
    let (parent, fork) = parent.unwrap_or((HistoryId::NIL, Lsn::ZERO));
    Edit::History {
        history,
        machine,
        parent,
        fork,
        is_branch,
    }
}

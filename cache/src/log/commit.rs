//! The write path: commits, syncs, sealing.

use afterimage_blockdev::{FileId, IoBuffer, SegmentId, StorageOp, StorageOutcome};

use super::{
    ActiveSegment, FrameLocation, InFlight, Log, LogOutput, OldSegment, Pending, Phase, SealStep,
    StorageResult, opened,
};
use crate::bytes::wide;
use crate::segment::{
    COMMIT_HEADER_BYTES, CommitHeader, Directory, Footer, SECTOR, SegmentHeader, SegmentIdentity,
    build_commit,
};

/// A full segment on its way to its directory.
#[derive(Debug)]
pub(super) struct Sealing {
    pub(super) identity: SegmentIdentity,
    /// Not open yet when it was found at start.
    pub(super) file: Option<FileId>,
    pub(super) first_sequence: u64,
    pub(super) last_sequence: u64,
    pub(super) end: u64,
    pub(super) sealed_end: u64,
    pub(super) directory: Directory,
    pub(super) root: [u8; 32],
    pub(super) is_begun: bool,
    pub(super) is_sealed: bool,
}

impl Log {
    /// Puts the prepared file to use when there is no active one.
    pub(super) fn activate(&mut self, out: &mut Vec<LogOutput>) {
        if self.active.is_some() || !self.in_flight.is_empty() {
            return;
        }
        let Some((id, file, generation)) = self.prepare.take() else {
            return;
        };
        let identity = SegmentIdentity {
            store: self.options.store,
            segment: id,
            generation,
        };
        self.active = Some(ActiveSegment {
            identity,
            file,
            first_sequence: self.next_sequence,
            write_at: 0,
            slots: 0,
            directory: Directory::default(),
            root: blake3::Hasher::new(),
        });
        self.write_header(out);
    }

    fn write_header(&mut self, out: &mut Vec<LogOutput>) {
        let Some(active) = &self.active else { return };
        let header = SegmentHeader {
            identity: active.identity,
            first_sequence: active.first_sequence,
            time: self.wall,
        };
        // The header is durable before or with the first commit: one sync covers both.
        let op = StorageOp::Write {
            file: active.file,
            offset: 0,
            buffer: header.encode(),
        };
        self.submit(Pending::Header, op, out);
    }

    pub(super) fn header_written(&mut self) {
        if let Some(active) = &mut self.active {
            active.write_at = wide(SECTOR);
        }
    }

    /// Tries what the full medium refused again, after a while.
    pub(super) fn retry_later(&mut self, out: &mut Vec<LogOutput>) {
        self.retry_at = self.now.after(self.options.retry);
        out.push(LogOutput::WakeAt(self.retry_at));
        if !self.is_paused {
            self.is_paused = true;
            out.push(LogOutput::Paused { is_budget: false });
        }
    }

    /// Says whether a write was refused for want of room and has not been tried again.
    pub(super) fn waits_for_room(&self) -> bool {
        self.retries_header || !self.retries.is_empty()
    }

    pub(super) fn write_commits(&mut self, out: &mut Vec<LogOutput>) {
        if self.waits_for_room() {
            if self.retry_at > self.now {
                out.push(LogOutput::WakeAt(self.retry_at));
                return;
            }
            if core::mem::take(&mut self.retries_header) {
                self.write_header(out);
            }
            for sequence in core::mem::take(&mut self.retries) {
                self.rewrite(sequence, out);
            }
        }
        while !self.queue.is_empty() && self.writing() < self.options.commits_in_flight_max {
            if !self.write_commit(out) {
                break;
            }
        }
    }

    fn writing(&self) -> usize {
        self.in_flight
            .iter()
            .filter(|commit| !commit.is_written)
            .count()
    }

    /// How many queued frames go into the next commit.
    fn gather(&self, active: &ActiveSegment) -> usize {
        let (mut count, mut bytes, mut slots) = (0, 0, active.slots);
        for (_, frame) in &self.queue {
            bytes += frame.bytes.len() as u64;
            slots += frame.header.slot_count;
            let length = (bytes + wide(COMMIT_HEADER_BYTES)).next_multiple_of(wide(SECTOR));
            let end = active.write_at + length + Directory::sealed_bytes(slots);
            let is_long = count > 0 && bytes > self.options.commit_bytes_max;
            if is_long || end > self.options.segment_bytes {
                break;
            }
            count += 1;
        }
        count
    }

    /// Writes one commit; false when it must wait.
    fn write_commit(&mut self, out: &mut Vec<LogOutput>) -> bool {
        let Some(active) = self.active.as_ref().filter(|active| active.write_at > 0) else {
            return false;
        };
        let count = self.gather(active);
        if count == 0 {
            assert!(
                active.write_at > wide(SECTOR),
                "a frame of {} bytes does not fit a segment of {} bytes",
                self.queue[0].1.bytes.len(),
                self.options.segment_bytes
            );
            // All of the old file is durable before the new one gets its first commit.
            if self.in_flight.is_empty() {
                self.retire(out);
                self.prepare_next(out);
                self.activate(out);
            }
            return false;
        }
        let frames: Vec<_> = self.queue.drain(..count).collect();
        self.last_data_at = self.now;
        self.last_data_sequence = self.next_sequence;
        self.put_commit(frames, out);
        true
    }

    fn put_commit(
        &mut self,
        frames: Vec<(afterimage_blockdev::Token, crate::frame::Frame)>,
        out: &mut Vec<LogOutput>,
    ) {
        let mut buffer = self
            .spare_buffers
            .pop()
            .unwrap_or_else(|| IoBuffer::zeroed(SECTOR));
        let Some(active) = &mut self.active else {
            return;
        };
        let sequence = self.next_sequence;
        self.next_sequence += 1;
        let mut header = CommitHeader {
            identity: active.identity,
            sequence,
            offset: active.write_at,
            length: 0,
            durable_through: self.durable_through,
            frame_count: 0,
            first_slot: active.slots,
            slot_count: 0,
            segment_first: active.first_sequence,
        };
        let offsets = build_commit(
            &mut header,
            frames.iter().map(|(_, frame)| frame),
            &mut buffer,
        );
        let mut first_slot = active.slots;
        let mut placed = Vec::with_capacity(frames.len());
        for ((token, frame), at) in frames.into_iter().zip(offsets) {
            let offset = header.offset + at;
            let location = FrameLocation {
                segment: active.identity.segment,
                offset,
                first_slot,
                sequence,
            };
            if self.options.seals {
                let directory = &mut active.directory;
                directory.note_frame(first_slot, offset, &frame.view());
            }
            active.root.update(&frame.header.hash);
            first_slot += frame.header.slot_count;
            placed.push((token, location, frame));
        }
        active.slots = first_slot;
        active.write_at += header.length;
        let op = StorageOp::Write {
            file: active.file,
            offset: header.offset,
            buffer,
        };
        self.in_flight.push_back(InFlight {
            sequence,
            offset: header.offset,
            first_slot: header.first_slot,
            carries: header.durable_through,
            frames: placed,
            is_written: false,
        });
        self.submit(Pending::Commit { sequence }, op, out);
    }

    /// Writes a commit again, at its place, after the medium was full.
    fn rewrite(&mut self, sequence: u64, out: &mut Vec<LogOutput>) {
        let Some(active) = &self.active else { return };
        let (file, identity) = (active.file, active.identity);
        let Some(commit) = self
            .in_flight
            .iter()
            .find(|commit| commit.sequence == sequence)
        else {
            return;
        };
        let mut header = CommitHeader {
            identity,
            sequence,
            offset: commit.offset,
            length: 0,
            durable_through: self.durable_through,
            frame_count: 0,
            first_slot: commit.first_slot,
            slot_count: 0,
            segment_first: active.first_sequence,
        };
        let mut buffer = IoBuffer::zeroed(SECTOR);
        build_commit(
            &mut header,
            commit.frames.iter().map(|(_, _, frame)| frame),
            &mut buffer,
        );
        let op = StorageOp::Write {
            file,
            offset: header.offset,
            buffer,
        };
        self.submit(Pending::Commit { sequence }, op, out);
    }

    pub(super) fn commit_written(
        &mut self,
        sequence: u64,
        result: StorageResult,
        out: &mut Vec<LogOutput>,
    ) {
        match result {
            Ok(StorageOutcome::Written(buffer)) => {
                if self.spare_buffers.len() < self.options.commits_in_flight_max {
                    self.spare_buffers.push(buffer);
                }
                if let Some(commit) = self
                    .in_flight
                    .iter_mut()
                    .find(|commit| commit.sequence == sequence)
                {
                    commit.is_written = true;
                }
            }
            Ok(_) => {}
            Err(error) if error.is_no_space() => {
                self.retries.insert(sequence);
                self.retry_later(out);
            }
            Err(error) => self.fail(error.into(), out),
        }
    }

    /// Syncs what is written without a gap, one sync at a time.
    pub(super) fn sync(&mut self, out: &mut Vec<LogOutput>) {
        if self.is_syncing {
            return;
        }
        let through = self
            .in_flight
            .iter()
            .take_while(|commit| commit.is_written)
            .last()
            .map(|commit| commit.sequence);
        let (Some(through), Some(active)) = (through, &self.active) else {
            return;
        };
        let file = active.file;
        self.is_syncing = true;
        self.submit(Pending::Sync { through }, StorageOp::Sync { file }, out);
    }

    pub(super) fn synced(&mut self, through: u64, result: StorageResult, out: &mut Vec<LogOutput>) {
        self.is_syncing = false;
        if let Err(error) = result {
            self.fail(error.into(), out);
            return;
        }
        assert!(through > self.durable_through, "durability only advances");
        self.durable_through = through;
        if !self.unsealed.is_empty() {
            // The new segment's header is durable: what it makes void may be overwritten.
            self.sealing.extend(self.unsealed.drain(..));
            self.seal_next(out);
        }
        self.drop_leftovers(out);
        self.release(out);
        if self.is_paused && !self.waits_for_room() && self.active.is_some() {
            self.is_paused = false;
            out.push(LogOutput::Resumed);
        }
        while self
            .in_flight
            .front()
            .is_some_and(|commit| commit.sequence <= through)
        {
            let Some(commit) = self.in_flight.pop_front() else {
                break;
            };
            self.marked_through = self.marked_through.max(commit.carries);
            for (token, location, frame) in commit.frames {
                self.queue_bytes -= frame.bytes.len() as u64;
                out.push(LogOutput::Durable {
                    token,
                    location,
                    frame,
                });
            }
        }
    }

    /// Writes an empty commit when the last data is durable and nothing says so yet.
    pub(super) fn idle_commit(&mut self, out: &mut Vec<LogOutput>) {
        let is_covered = self.last_data_sequence <= self.marked_through;
        if is_covered || !self.queue.is_empty() || !self.in_flight.is_empty() {
            return;
        }
        let due = self.last_data_at.after(self.options.idle_commit);
        if self.now < due && self.phase == Phase::Running {
            out.push(LogOutput::WakeAt(due));
            return;
        }
        let has_room = self.active.as_ref().is_some_and(|active| {
            active.write_at > 0
                && active.write_at + wide(SECTOR) + Directory::sealed_bytes(active.slots)
                    <= self.options.segment_bytes
        });
        if has_room {
            self.put_commit(Vec::new(), out);
        } else if self
            .active
            .as_ref()
            .is_some_and(|active| active.write_at > 0)
            && self.phase == Phase::Running
        {
            // The footer of the full segment says the same.
            self.retire(out);
        }
    }

    /// Hands the active segment over to sealing.
    fn retire(&mut self, out: &mut Vec<LogOutput>) {
        let Some(active) = self.active.take() else {
            return;
        };
        assert!(
            self.in_flight.is_empty(),
            "a segment is retired when all of it is durable"
        );
        let is_only = self.old.is_empty() && self.sealing.is_empty();
        if active.write_at == wide(SECTOR) && !is_only {
            // Nothing was ever written to it. The last file of all stays: it knows the sequence.
            let name = self.file_name(active.identity.segment);
            self.submit(
                Pending::Release,
                StorageOp::Close { file: active.file },
                out,
            );
            self.submit(Pending::Release, StorageOp::Remove { name }, out);
            return;
        }
        if self.options.seals {
            // Its footer tells that all of it was durable.
            self.marked_through = self.durable_through;
        }
        self.sealing.push_back(Sealing {
            identity: active.identity,
            file: Some(active.file),
            first_sequence: active.first_sequence,
            last_sequence: self.next_sequence - 1,
            end: active.write_at,
            sealed_end: 0,
            directory: active.directory,
            root: *active.root.finalize().as_bytes(),
            is_begun: false,
            is_sealed: false,
        });
        self.seal_next(out);
    }

    pub(super) fn seal_next(&mut self, out: &mut Vec<LogOutput>) {
        let seals = self.options.seals;
        let Some(sealing) = self.sealing.front_mut() else {
            return;
        };
        if sealing.is_begun {
            return;
        }
        sealing.is_begun = true;
        let Some(file) = sealing.file else {
            let id = sealing.identity.segment;
            let name = self.file_name(id);
            self.submit(Pending::Seal(SealStep::Open), StorageOp::Open { name }, out);
            return;
        };
        if !seals {
            self.submit(
                Pending::Seal(SealStep::Close),
                StorageOp::Close { file },
                out,
            );
            return;
        }
        self.write_directory(file, out);
    }

    fn write_directory(&mut self, file: FileId, out: &mut Vec<LogOutput>) {
        let Some(sealing) = self.sealing.front_mut() else {
            return;
        };
        let footer = Footer {
            identity: sealing.identity,
            first_sequence: sealing.first_sequence,
            last_sequence: sealing.last_sequence,
            directory_offset: 0,
            slot_count: 0,
            root: sealing.root,
            directory_hash: [0; 32],
        };
        let offset = sealing.end;
        let buffer = sealing.directory.encode(footer, offset);
        sealing.sealed_end = offset + buffer.len() as u64;
        let op = StorageOp::Write {
            file,
            offset,
            buffer,
        };
        self.submit(Pending::Seal(SealStep::Write), op, out);
    }

    pub(super) fn seal_step(
        &mut self,
        step: SealStep,
        result: StorageResult,
        out: &mut Vec<LogOutput>,
    ) {
        let Some(sealing) = self.sealing.front_mut() else {
            return;
        };
        let (id, length) = (sealing.identity.segment, sealing.sealed_end);
        let outcome = match result {
            Ok(outcome) => outcome,
            // The medium is full: the segment stays without a directory and is walked instead.
            Err(error) if error.is_no_space() && step == SealStep::Write => {
                let close = sealing.file.map(|file| StorageOp::Close { file });
                if let Some(close) = close {
                    self.submit(Pending::Seal(SealStep::Close), close, out);
                }
                return;
            }
            Err(error) => {
                self.fail(error.into(), out);
                return;
            }
        };
        if step == SealStep::Open {
            sealing.file = opened(outcome).map(|(file, _)| file);
        }
        let Some(file) = sealing.file else { return };
        let next = match step {
            SealStep::Open => {
                self.write_directory(file, out);
                return;
            }
            SealStep::Write => (SealStep::Shorten, StorageOp::SetLength { file, length }),
            SealStep::Shorten => (SealStep::Sync, StorageOp::Sync { file }),
            SealStep::Sync => {
                sealing.is_sealed = true;
                (SealStep::Close, StorageOp::Close { file })
            }
            SealStep::Close => {
                self.finish_seal(id, out);
                return;
            }
        };
        self.submit(Pending::Seal(next.0), next.1, out);
    }

    fn finish_seal(&mut self, id: SegmentId, out: &mut Vec<LogOutput>) {
        let Some(sealing) = self.sealing.pop_front() else {
            return;
        };
        let bytes = if sealing.is_sealed {
            sealing.sealed_end
        } else {
            self.options.segment_bytes
        };
        self.old.retain(|old| old.id != id);
        self.old.push_back(OldSegment {
            id,
            generation: sealing.identity.generation,
            last_sequence: sealing.last_sequence,
            bytes,
        });
        self.old.make_contiguous().sort_by_key(|old| old.id);
        if sealing.is_sealed {
            out.push(LogOutput::Sealed { segment: id, bytes });
        }
        self.seal_next(out);
        self.release(out);
    }

    pub(super) fn close_if_done(&mut self, out: &mut Vec<LogOutput>) {
        if self.phase != Phase::Closing
            || !self.queue.is_empty()
            || !self.in_flight.is_empty()
            || self.is_syncing
        {
            return;
        }
        if self
            .active
            .as_ref()
            .is_some_and(|active| active.write_at == 0)
        {
            return;
        }
        if self.active.is_some() {
            self.retire(out);
            return;
        }
        if self.sealing.is_empty() && !self.prepare.is_busy() {
            self.drop_prepared(out);
            if self.pending.is_empty() {
                self.phase = Phase::Closed;
                out.push(LogOutput::Closed);
            }
        }
    }
}

//! What the connection asks of the machine, and tells it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use afterimage_blockdev::{BatchId, KeyId, Lsn};
use afterimage_cache::record::NOTE_BYTES_MAX;
use afterimage_cache::{DiskKey, MarkKind, RecordKind, TagKey};
use afterimage_protocol::message::{DiskDescription, MarkRequestKind, SourceReport};
use afterimage_protocol::sender::{
    DiskAnswer, Question, RecordSource, SenderEvent, SourceBulk, SourceFrame, StreamIdentity,
};
use tokio::sync::Notify;

use super::Machine;
use crate::link::LinkHost;
use crate::link::run::{NextAttempt, SessionEnd};
use crate::order::Draft;
use crate::pipeline::FrameBytes;
use crate::pipeline::store::NextFrame;
use crate::state::disks::save_keys;

/// The machine as the connection sees it.
pub struct Host(pub Arc<Machine>);

/// The machine's records as the sender sees them.
pub struct MachineRecords(Arc<Machine>);

impl RecordSource for MachineRecords {
    type Bytes = FrameBytes;

    fn next_frame(&mut self, after: Lsn) -> Option<SourceFrame<FrameBytes>> {
        match self.0.store.next(after) {
            NextFrame::Ready(frame) => Some(SourceFrame {
                first: frame.header.first,
                last: frame.header.last,
                bytes: FrameBytes(frame),
            }),
            NextFrame::Loading | NextFrame::None => None,
        }
    }

    fn next_bulk(&mut self, number: u64) -> Option<SourceBulk<FrameBytes>> {
        self.0.outbox.next_bulk(number)
    }

    fn next_question(&mut self, number: u64) -> Option<Question> {
        self.0.outbox.next_question(number)
    }
}

impl LinkHost for Host {
    fn identity(&self) -> StreamIdentity {
        let machine = &self.0;
        let identity = machine.order.identity();
        let mut link = machine.link.lock();
        link.is_outdated = false;
        link.declares.clear();
        StreamIdentity {
            program: concat!("afterimage-agent ", env!("CARGO_PKG_VERSION")).to_owned(),
            machine: identity.machine,
            name: machine.identity.machine_name.clone(),
            history: identity.history,
            parent: None,
            origin: identity.origin,
            epoch: identity.epoch,
        }
    }

    fn declared(&self) -> Vec<DiskDescription> {
        let mut disks = self.0.disks();
        disks.retain(|disk| disk.saved.lock().is_protected || disk.state.lock().wants_protection);
        disks.iter().map(|disk| disk.description()).collect()
    }

    fn take_declares(&self) -> Vec<DiskDescription> {
        core::mem::take(&mut self.0.link.lock().declares)
    }

    fn source(&self) -> impl RecordSource<Bytes = FrameBytes> + Send {
        MachineRecords(Arc::clone(&self.0))
    }

    fn event(&self, event: SenderEvent) -> Result<(), SessionEnd> {
        let machine = &self.0;
        match event {
            SenderEvent::Welcome { time } => machine.clock.learn(time),
            SenderEvent::Opened {
                durable,
                highest,
                tag_key,
            } => {
                machine.opened(durable, highest)?;
                machine.keys.set_tag(TagKey(tag_key));
            }
            SenderEvent::Disk(answer) => machine.disk_answered(answer),
            SenderEvent::Streaming => {
                let mut link = machine.link.lock();
                link.is_streaming = true;
                link.reason.clear();
                drop(link);
                tracing::info!(server = machine.identity.data_address(), "connected");
                machine.outbox.nudge();
            }
            SenderEvent::Acknowledged { durable } => {
                machine.note_acknowledged(durable);
                machine.link.lock().reason.clear();
            }
            SenderEvent::BulkAcknowledged { numbers } => machine.outbox.acknowledge(&numbers),
            SenderEvent::Differences { number, differs } => {
                machine.outbox.answer(number, differs);
            }
            SenderEvent::MarkWanted {
                request,
                kind,
                name,
            } => {
                machine.place_mark(request, kind, name);
            }
            SenderEvent::Paused(refusal) => {
                machine.link.lock().reason = format!("the appliance takes nothing: {refusal}");
            }
            SenderEvent::Refused(refusal) => {
                let end = SessionEnd::refused(&refusal);
                machine.link.lock().refusal = Some(refusal);
                machine.outbox.nudge();
                return Err(end);
            }
        }
        Ok(())
    }

    fn sent(&self) {
        self.0.link.lock().has_sent = true;
    }

    fn take_report_due(&self) -> bool {
        self.0.is_report_due.swap(false, Ordering::AcqRel)
    }

    fn report(&self) -> SourceReport {
        self.0.source_report()
    }

    fn stop_reason(&self) -> Option<SessionEnd> {
        let is_outdated = self.0.link.lock().is_outdated;
        let reason = "a new epoch begins".to_owned();
        is_outdated.then_some(SessionEnd {
            reason,
            next: NextAttempt::Now,
        })
    }

    fn wake(&self) -> &Notify {
        &self.0.wake
    }

    fn retry_now(&self) -> &Notify {
        &self.0.retry_now
    }

    fn down(&self, reason: &str) {
        let mut link = self.0.link.lock();
        link.is_streaming = false;
        reason.clone_into(&mut link.reason);
        drop(link);
        for disk in self.0.disks() {
            disk.state.lock().answer = None;
        }
        self.0.outbox.nudge();
    }

    fn is_stopping(&self) -> bool {
        self.0.is_stopping()
    }
}

impl Machine {
    /// Checks that the appliance and this epoch fit together.
    fn opened(&self, durable: Lsn, highest: Lsn) -> Result<(), SessionEnd> {
        let first = Lsn(self.epoch_first.load(Ordering::Acquire));
        let (captured, _) = self.order.captured();
        let has_sent = self.link.lock().has_sent;
        let acknowledged = self.store.holding().acknowledged;
        let conflict = if !has_sent && highest >= first {
            Some("the appliance has newer records of this machine: this agent was set back")
        } else if highest > captured && has_sent {
            Some("the appliance has records that this agent never made")
        } else if acknowledged >= first && durable < acknowledged {
            Some("the appliance has lost records that it had acknowledged")
        } else {
            None
        };
        let Some(reason) = conflict else {
            self.note_acknowledged(durable);
            return Ok(());
        };
        // What was unmarked was unmarked for records that are not there, or for others' records.
        self.taint_everything();
        match self.restart_epoch(reason, highest) {
            Ok(()) => Err(SessionEnd {
                reason: reason.to_owned(),
                next: NextAttempt::Now,
            }),
            Err(error) => Err(SessionEnd {
                reason: error.to_string(),
                next: NextAttempt::Ladder,
            }),
        }
    }

    /// No mark can be trusted: every block is compared.
    fn taint_everything(&self) {
        for disk in self.disks() {
            if let Some(capture) = disk.tap.as_ref().and_then(|tap| tap.captured_by()) {
                capture.activity.taint_all();
                capture.activity.commit();
            }
        }
    }

    fn note_acknowledged(&self, durable: Lsn) {
        self.store.acknowledge(durable);
        self.acknowledged.fetch_max(durable.0, Ordering::AcqRel);
        self.outbox.nudge();
    }

    fn disk_answered(&self, answer: DiskAnswer) {
        let key = DiskKey {
            id: KeyId(answer.key),
            secret: answer.secret,
        };
        let Some(disk) = self.disk(answer.disk) else {
            return;
        };
        self.keys.set_disk(answer.disk, key);
        let ids: Vec<_> = self.disks().iter().map(|disk| disk.id).collect();
        if let Err(error) = save_keys(&self.state, &self.keys, ids) {
            tracing::error!(%error, "a restart captures nothing until the appliance is back");
        }
        disk.state.lock().answer = Some(answer);
        self.outbox.nudge();
    }

    fn place_mark(&self, request: u64, kind: MarkRequestKind, name: String) {
        let kind = match kind {
            MarkRequestKind::Crash => MarkKind::Crash,
            MarkRequestKind::Bookmark => MarkKind::Bookmark,
        };
        let mut note = name.into_bytes();
        note.truncate(NOTE_BYTES_MAX);
        let draft = Draft::note(RecordKind::Mark(kind), BatchId(0), request, note);
        if self.order.append([draft], || ()).is_none() {
            tracing::warn!(request, "no mark can be placed: nothing is recorded now");
        }
    }

    fn source_report(&self) -> SourceReport {
        let (captured, _) = self.order.captured();
        let oldest = self.order.acknowledged(self.acknowledged());
        let holding = self.store.holding();
        let is_flowing = self.order.is_flowing();
        let reports = self
            .disks()
            .into_iter()
            .filter_map(|disk| disk.report(is_flowing));
        SourceReport {
            captured,
            time: self.clock.now(),
            oldest_unacknowledged: oldest,
            buffered_bytes: holding.memory_bytes + self.order.waiting_bytes() as u64,
            spooled_bytes: holding.spooled_bytes,
            disks: reports.collect(),
        }
    }
}

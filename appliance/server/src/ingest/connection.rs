//! One connection: what its reader does with each message.

use std::net::SocketAddr;
use std::sync::{Arc, Weak};
use std::time::Instant;

use afterimage_blockdev::{DiskId, ErrorClass, Lsn, MachineId};
use afterimage_protocol::message::{DiskDescription, FromReceiver, SourceReport, StreamId};
use afterimage_protocol::receiver::{Action, Limits, OpenWanted, Receiver, StreamIdentity};
use afterimage_protocol::{Refusal, RefusalCode};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Semaphore, watch};

use super::accept::{accept, damaged};
use super::grant;
use super::listener::Ingest;
use super::outgoing::{LiveStream, Shared, write_all};
use super::read::{Patience, Read, ReadError, read};
use super::slot::EventSlot;
use crate::appliance::PROGRAM;
use crate::ca::PeerCertificate;
use crate::config::ms;
use crate::daemon::stopped;
use crate::engine::{Command, DiskOpened, EngineGone, OpenDisk, OpenRequest, StreamKey};
use crate::seeds::Asked;

/// Questions of a connection that the engine works on at once.
const COMPARES_MAX: usize = 4;

pub(super) struct Connection {
    ingest: Arc<Ingest>,
    certificate: PeerCertificate,
    peer: SocketAddr,
    shared: Arc<Shared>,
    compares: Arc<Semaphore>,
}

/// The reader goes on, or not.
#[derive(PartialEq, Eq)]
enum Next {
    Read,
    End,
}

impl Connection {
    pub(super) fn new(ingest: Arc<Ingest>, certificate: PeerCertificate, peer: SocketAddr) -> Self {
        let config = &ingest.appliance.config.ingest;
        let limits = Limits {
            streams_max: config.streams_max,
            disks_max: config.disks_max,
        };
        let shared = Arc::new(Shared::new(
            Receiver::new(limits),
            Arc::clone(&ingest.memory),
        ));
        let compares = Arc::new(Semaphore::new(COMPARES_MAX));
        Self {
            ingest,
            certificate,
            peer,
            shared,
            compares,
        }
    }

    /// Serves the connection to its end.
    pub(super) async fn run<S>(self, stream: S, mut stop: watch::Receiver<bool>)
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        let (mut from, to) = tokio::io::split(stream);
        let (shared, ingest) = (Arc::clone(&self.shared), Arc::clone(&self.ingest));
        let mut writer = tokio::spawn(async move { write_all(&shared, &ingest, to).await });
        tokio::select! {
            () = self.read_all(&mut from) => {}
            () = stopped(&mut stop) => self.say_goodbye(),
            ended = &mut writer => {
                if let Ok(Err(error)) = ended {
                    tracing::debug!(peer = %self.peer, %error, "the connection broke");
                }
            }
        }
        self.shared.close();
        if !writer.is_finished()
            && let Err(error) = writer.await
        {
            tracing::error!(peer = %self.peer, %error, "the writer of a connection failed");
        }
        self.end_streams().await;
    }

    fn say_goodbye(&self) {
        let refusal = Refusal {
            code: RefusalCode::ShuttingDown,
            class: ErrorClass::Retry,
            message: "the appliance is going down".to_owned(),
            hint: "connect again later".to_owned(),
        };
        self.shared.send(FromReceiver::Refused {
            stream: None,
            refusal,
        });
    }

    async fn end_streams(&self) {
        let streams = std::mem::take(&mut self.shared.state.lock().streams);
        for stream in streams.into_values() {
            self.ingest.ended(&stream);
            self.close(stream.key).await;
        }
        self.shared.free_all();
    }

    async fn close(&self, key: Option<StreamKey>) {
        self.ingest.close(key).await;
    }

    async fn read_all<R: AsyncRead + Unpin>(&self, from: &mut R) {
        let config = &self.ingest.appliance.config.ingest;
        let patience = Patience {
            idle: ms(config.idle_timeout_ms),
            message: ms(config.message_timeout_ms),
        };
        loop {
            self.shared.has_room().await;
            let step = match read(from, &self.ingest.memory, patience).await {
                Ok(Some(read)) => self.take(read).await,
                Ok(None) => return,
                Err(ReadError::Wire(error)) => {
                    let refusal = damaged(error.to_string());
                    self.shared.send(FromReceiver::Refused {
                        stream: None,
                        refusal,
                    });
                    return;
                }
                Err(error) => {
                    tracing::info!(peer = %self.peer, %error, "the connection ends");
                    return;
                }
            };
            match step {
                Ok(Next::Read) => {}
                Ok(Next::End) | Err(EngineGone) => return,
            }
        }
    }

    async fn take(&self, read: Read<'_>) -> Result<Next, EngineGone> {
        let now = self.ingest.appliance.now();
        let action = {
            let mut state = self.shared.state.lock();
            let action = state.receiver.message(read.message, now, PROGRAM);
            if let Action::Append { bytes, .. } | Action::Bulk { bytes, .. } = &action {
                // From here on the receiver counts these bytes, and gives them back.
                let mut memory = read.memory;
                if let Some(taken) = memory.split(bytes.len()) {
                    taken.forget();
                }
            }
            self.shared.free(&mut state);
            action
        };
        match action {
            Action::None => {}
            Action::Send(message) => self.shared.send(message),
            Action::Open(wanted) => self.open(wanted).await?,
            Action::Declare {
                stream,
                description,
            } => self.declare(stream, description).await?,
            Action::Append {
                stream,
                identity,
                first,
                last,
                bytes,
            } => {
                self.append(stream, identity, (first, last), bytes).await?;
            }
            Action::Bulk {
                stream,
                identity,
                number,
                bytes,
            } => {
                self.bulk(stream, identity, number, bytes).await?;
            }
            Action::Compare {
                stream,
                number,
                disk,
                first_block,
                tags,
            } => {
                self.compare(stream, number, disk, first_block, tags)
                    .await?;
            }
            Action::Report { stream, report } => self.report(stream, report),
            Action::Close { stream } => self.forget(stream).await,
            Action::RefuseStream { stream, message } => {
                tracing::warn!(peer = %self.peer, stream = stream.0, "a stream is refused");
                self.shared.send(message);
                self.forget(stream).await;
            }
            Action::HangUp(message) => {
                if let FromReceiver::Refused { refusal, .. } = &message {
                    let text = format!("{} was refused: {}", self.peer, refusal.message);
                    self.ingest
                        .appliance
                        .events
                        .note("connection-refused", text);
                }
                self.shared.send(message);
                return Ok(Next::End);
            }
        }
        Ok(Next::Read)
    }

    fn key(&self, stream: StreamId) -> Option<StreamKey> {
        self.shared.state.lock().streams.get(&stream)?.key
    }

    /// Drops a stream that the receiver has ended.
    async fn forget(&self, stream: StreamId) {
        let live = self.shared.state.lock().streams.remove(&stream);
        if let Some(live) = live {
            self.ingest.ended(&live);
            self.close(live.key).await;
        }
    }

    async fn refuse(&self, stream: StreamId, refusal: Refusal) {
        tracing::warn!(peer = %self.peer, stream = stream.0, %refusal, "a stream is refused");
        if let Some(live) = self.shared.refuse(stream, refusal) {
            self.ingest.ended(&live);
            self.close(live.key).await;
        }
    }

    async fn open(&self, wanted: OpenWanted) -> Result<(), EngineGone> {
        let (stream, identity) = (wanted.stream, wanted.identity);
        let machine = wanted.name.clone();
        let slot = Arc::new(EventSlot::new(Arc::clone(&self.shared.wake)));
        let live = &self.ingest.appliance.live;
        live.add(identity.origin, identity.machine, &slot);
        if let Err(refusal) = grant::authorize(
            &self.ingest.appliance.catalogue,
            &self.certificate,
            identity,
            &machine,
        )
        .await
        {
            let text = format!("machine {machine} was refused: {}", refusal.message);
            self.ingest.appliance.events.note("machine-refused", text);
            self.refuse(stream, refusal).await;
            return Ok(());
        }
        let live = LiveStream {
            identity,
            key: None,
            slot: Arc::clone(&slot),
        };
        self.shared.state.lock().streams.insert(stream, live);
        let request = OpenRequest {
            machine: identity.machine,
            name: wanted.name,
            history: identity.history,
            parent: wanted.parent,
            origin: identity.origin,
            epoch: identity.epoch,
            events: Arc::<EventSlot>::clone(&slot),
        };
        let engine = &self.ingest.appliance.engine;
        match engine.ask(|reply| Command::Open(request, reply)).await? {
            Err(refusal) => {
                let text = format!("machine {machine} was refused: {}", refusal.message);
                self.ingest.appliance.events.note("machine-refused", text);
                self.refuse(stream, refusal).await;
            }
            Ok(opened) => {
                self.ingest.began();
                let reports = &self.ingest.appliance.reports;
                let delay = Arc::clone(&slot.delay);
                reports.opened(identity.machine, identity.history, opened.key, delay);
                let seeds = &self.ingest.appliance.seeds;
                seeds.opened(identity.machine, &machine, opened.tag_key);
                let credit_bytes = self.ingest.credit_bytes();
                let (durable, highest) = (opened.durable, opened.highest);
                let mut state = self.shared.state.lock();
                if let Some(live) = state.streams.get_mut(&stream) {
                    live.key = Some(opened.key);
                }
                let receiver = &mut state.receiver;
                let message =
                    receiver.opened(stream, durable, highest, credit_bytes, opened.tag_key);
                state.outbox.extend(message);
                self.shared.wake.notify_one();
            }
        }
        Ok(())
    }

    async fn declare(
        &self,
        stream: StreamId,
        description: DiskDescription,
    ) -> Result<(), EngineGone> {
        let Some(key) = self.key(stream) else {
            return Ok(());
        };
        let disk = description.disk;
        let open = OpenDisk {
            stream: key,
            description: description.clone(),
        };
        let engine = &self.ingest.appliance.engine;
        match engine.ask(|reply| Command::Declare(open, reply)).await? {
            Err(refusal) => self.refuse(stream, refusal).await,
            Ok(mut opened) => {
                if let Some(seeded) = self.seeded(stream, &description, &opened) {
                    // What an earlier try brought is compared too: it is here, and not sent again.
                    (opened.is_in_batch, opened.bulk_done) = (false, seeded);
                }
                self.shared.send(FromReceiver::Disk {
                    stream,
                    disk,
                    key: opened.key,
                    secret: opened.secret,
                    has_copy: opened.has_copy,
                    is_in_batch: opened.is_in_batch,
                    bulk_done: opened.bulk_done,
                });
            }
        }
        Ok(())
    }

    fn seeded(
        &self,
        stream: StreamId,
        description: &DiskDescription,
        opened: &DiskOpened,
    ) -> Option<Vec<(u64, u64)>> {
        let machine = self
            .shared
            .state
            .lock()
            .streams
            .get(&stream)?
            .identity
            .machine;
        let seeds = &self.ingest.appliance.seeds;
        seeds.declared(machine, description, opened)
    }

    async fn append(
        &self,
        stream: StreamId,
        identity: StreamIdentity,
        range: (Lsn, Lsn),
        bytes: Vec<u8>,
    ) -> Result<(), EngineGone> {
        let received = Instant::now();
        let frame = match accept(bytes, identity, false) {
            Ok(frame) if (frame.header.first, frame.header.last) == range => frame,
            Ok(_) => {
                let refusal = damaged("a frame has other LSNs than its envelope".to_owned());
                self.refuse(stream, refusal).await;
                return Ok(());
            }
            Err(refusal) => {
                self.refuse(stream, refusal).await;
                return Ok(());
            }
        };
        let (key, slot) = match self.shared.state.lock().streams.get(&stream) {
            Some(live) => (live.key, Arc::clone(&live.slot)),
            None => return Ok(()),
        };
        let Some(key) = key else {
            return Ok(());
        };
        slot.delay.received(frame.header.last, received);
        self.ingest.appliance.seeds.received(identity, &frame);
        self.ingest
            .appliance
            .engine
            .send(Command::Append(key, frame))
            .await
    }

    async fn bulk(
        &self,
        stream: StreamId,
        identity: StreamIdentity,
        number: u64,
        bytes: Vec<u8>,
    ) -> Result<(), EngineGone> {
        match accept(bytes, identity, true) {
            Err(refusal) => self.refuse(stream, refusal).await,
            Ok(frame) => {
                let Some(key) = self.key(stream) else {
                    return Ok(());
                };
                self.ingest
                    .appliance
                    .engine
                    .send(Command::Bulk(key, number, frame))
                    .await?;
            }
        }
        Ok(())
    }

    /// The answer comes by a task of its own, so that frames need not wait for it.
    async fn compare(
        &self,
        stream: StreamId,
        number: u64,
        disk: DiskId,
        first_block: u64,
        tags: Vec<[u8; 16]>,
    ) -> Result<(), EngineGone> {
        let Some(key) = self.key(stream) else {
            return Ok(());
        };
        let place = Arc::clone(&self.compares)
            .acquire_owned()
            .await
            .map_err(|_| EngineGone)?;
        let (reply, answer) = tokio::sync::oneshot::channel();
        let seeded = self.asked_of_seed(stream, key, (disk, first_block), &tags);
        let command = Command::Compare {
            stream: key,
            disk,
            first_block,
            tags,
            reply,
        };
        self.ingest.appliance.engine.send(command).await?;
        let (shared, ingest) = (Arc::clone(&self.shared), Arc::clone(&self.ingest));
        tokio::spawn(async move {
            let Ok(mut answer) = answer.await else { return };
            if let (Ok(differs), Some((asked, slot))) = (&mut answer, seeded) {
                let appliance = &ingest.appliance;
                asked
                    .take(&appliance.seeds, &appliance.engine, &slot, differs)
                    .await;
            }
            let is_same = shared
                .state
                .lock()
                .streams
                .get(&stream)
                .is_some_and(|s| s.key == Some(key));
            match answer {
                // The stream's name may mean another one by now.
                _ if !is_same => {}
                Ok(differs) => shared.send(FromReceiver::Differences {
                    stream,
                    number,
                    differs,
                }),
                Err(refusal) => {
                    if let Some(live) = shared.refuse(stream, refusal) {
                        ingest.ended(&live);
                        let engine = &ingest.appliance.engine;
                        if engine.send(Command::Close(key)).await.is_err() {
                            tracing::debug!("the engine was gone before a stream");
                        }
                    }
                }
            }
            drop(place);
        });
        Ok(())
    }

    /// The question again for the seed of a disk, if there is one.
    fn asked_of_seed(
        &self,
        stream: StreamId,
        key: StreamKey,
        (disk, first_block): (DiskId, u64),
        tags: &[[u8; 16]],
    ) -> Option<(Asked, Weak<EventSlot>)> {
        let (identity, slot) = {
            let state = self.shared.state.lock();
            let live = state.streams.get(&stream)?;
            (live.identity, Arc::downgrade(&live.slot))
        };
        let appliance = &self.ingest.appliance;
        let asked = Asked {
            key,
            identity,
            disk,
            first_block,
            tags: tags.to_vec(),
            time: appliance.now(),
        };
        let is_seeded = appliance.seeds.is_active(identity.machine, disk);
        is_seeded.then_some((asked, slot))
    }

    /// Drops the seeds of disks whose copies are whole.
    fn drop_served_seeds(&self, machine: MachineId, report: &SourceReport) {
        let appliance = &self.ingest.appliance;
        for ((name, disk), taken) in appliance.seeds.served(machine, &report.disks) {
            let text = format!("the seed of {name}/{disk} has served: {taken} bytes were taken");
            appliance.events.note("seed-served", text);
            let seeds = Arc::clone(&appliance.seeds);
            tokio::task::spawn_blocking(move || {
                if let Err(error) = seeds.drop_seed(&name, &disk) {
                    tracing::warn!(%error, "a seed that has served stays");
                }
            });
        }
    }

    fn report(&self, stream: StreamId, report: SourceReport) {
        let now = self.ingest.appliance.now();
        let state = self.shared.state.lock();
        let Some(live) = state.streams.get(&stream) else {
            return;
        };
        let Some(key) = live.key else { return };
        let is_behind = state
            .receiver
            .taken(stream)
            .is_some_and(|taken| report.captured > taken);
        let machine = live.identity.machine;
        drop(state);
        self.drop_served_seeds(machine, &report);
        self.ingest
            .appliance
            .reports
            .reported(machine, key, report, now, is_behind);
    }
}

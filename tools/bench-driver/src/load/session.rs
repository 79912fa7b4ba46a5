//! One connection of the load: TLS and the sender's state machine, as the agent has them.

use std::path::Path;
use std::time::Duration;

use afterimage_agent::link::tls::{agent_config, server_name};
use afterimage_agent::state::StateDir;
use afterimage_agent::state::identity::Identity;
use afterimage_blockdev::{
    BLOCK_BYTES, Clock, DiskId, Entropy, Epoch, HistoryId, Lsn, SystemClock, SystemEntropy,
};
use afterimage_cache::TagKey;
use afterimage_protocol::message::{DiskDescription, ForkPoint, SourceReport};
use afterimage_protocol::sender::{DiskAnswer, Sender, SenderEvent, StreamIdentity};
use afterimage_protocol::wire::{self, PREFIX_BYTES};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{Notify, watch};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::machine::StreamKeys;
use super::pool::{Pool, PoolFrame};
use crate::error::{BenchError, ended};

/// How often the state is reported; the appliance drops who is silent.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);

struct State {
    sender: Sender,
    pool: Pool,
    target: Lsn,
    tag: Option<TagKey>,
    disks: Vec<DiskAnswer>,
    is_closing: bool,
}

/// What a session writes.
pub(crate) struct Opening {
    /// The history; `None` for the one that the agent enrolled with.
    pub(crate) history: Option<HistoryId>,
    /// Where it forked off.
    pub(crate) parent: Option<ForkPoint>,
    /// The writer's epoch.
    pub(crate) epoch: Epoch,
    /// The machine's disks.
    pub(crate) disks: Vec<DiskDescription>,
}

impl Opening {
    /// The first epoch, with disks that nobody knows yet.
    pub(crate) fn new(disks: usize, disk_bytes: u64) -> Self {
        let disk = |number: usize| DiskDescription {
            disk: DiskId(SystemEntropy.identity()),
            name: format!("disk{number}"),
            size_bytes: disk_bytes,
            logical_block_bytes: u32::try_from(BLOCK_BYTES).unwrap_or(u32::MAX),
        };
        Self {
            history: None,
            parent: None,
            epoch: Epoch(1),
            disks: (0..disks).map(disk).collect(),
        }
    }
}

/// See the module's text.
pub(crate) struct Session {
    pub(crate) identity: StreamIdentity,
    state: Mutex<State>,
    wake: Notify,
    durable: watch::Sender<Lsn>,
    is_streaming: watch::Sender<bool>,
}

impl Session {
    /// Connects as the agent whose state directory this is.
    pub(crate) async fn connect(
        directory: &Path,
        opening: &Opening,
    ) -> Result<(Self, TlsStream<TcpStream>), BenchError> {
        let state = StateDir::open(directory)?;
        let known = Identity::load(&state)?;
        let [authority, certificate, key] =
            ["authority.pem", "agent.pem", "agent.key"].map(|name| state.path(name));
        let tls = agent_config(&authority, &certificate, &key)?;
        let address = known.data_address();
        let at = || BenchError::io(format!("connect to {address}"));
        let stream = TcpStream::connect(&address).await.map_err(at())?;
        stream.set_nodelay(true).map_err(at())?;
        let name = server_name(&known.server_host)?;
        let stream = TlsConnector::from(tls)
            .connect(name, stream)
            .await
            .map_err(at())?;
        let identity = StreamIdentity {
            program: concat!("afterimage-bench ", env!("CARGO_PKG_VERSION")).to_owned(),
            machine: known.machine,
            name: known.machine_name,
            history: opening.history.unwrap_or(known.history),
            parent: opening.parent,
            origin: known.agent,
            epoch: opening.epoch,
        };
        let sender = Sender::new(identity.clone(), opening.disks.clone());
        let state = State {
            sender,
            pool: Pool::default(),
            target: Lsn::ZERO,
            tag: None,
            disks: Vec::new(),
            is_closing: false,
        };
        let session = Self {
            identity,
            state: Mutex::new(state),
            wake: Notify::new(),
            durable: watch::Sender::new(Lsn::ZERO),
            is_streaming: watch::Sender::new(false),
        };
        Ok((session, stream))
    }

    /// The keys, as soon as every disk was answered.
    pub(crate) async fn keys(&self) -> Result<StreamKeys, BenchError> {
        let mut is_streaming = self.is_streaming.subscribe();
        let streams = is_streaming.wait_for(|is_streaming| *is_streaming).await;
        streams.map_err(|_| ended(&self.identity.name))?;
        let mut state = self.state.lock();
        let tag = state.tag.take().ok_or_else(|| ended(&self.identity.name))?;
        let disks = std::mem::take(&mut state.disks);
        Ok(StreamKeys { tag, disks })
    }

    /// Begins to send these frames.
    pub(crate) fn send(&self, frames: Vec<PoolFrame>) {
        let mut state = self.state.lock();
        if let Some(last) = frames.last() {
            state.target = last.last();
        }
        state.pool = Pool::new(frames);
        drop(state);
        self.wake.notify_one();
    }

    /// Waits until all that was sent is durable at the appliance.
    pub(crate) async fn acknowledged(&self) -> Result<(), BenchError> {
        let target = self.state.lock().target;
        let mut durable = self.durable.subscribe();
        let reached = durable.wait_for(|durable| *durable >= target).await;
        reached.map(|_| ()).map_err(|_| ended(&self.identity.name))
    }

    /// Frees the frames.
    pub(crate) fn forget(&self) {
        self.state.lock().pool = Pool::default();
        self.wake.notify_one();
    }

    /// Ends the stream in order.
    pub(crate) fn close(&self) {
        let mut state = self.state.lock();
        state.sender.close();
        state.is_closing = true;
        drop(state);
        self.wake.notify_one();
    }

    /// Serves the connection until [`Session::close`].
    pub(crate) async fn run(
        self: std::sync::Arc<Self>,
        stream: TlsStream<TcpStream>,
    ) -> Result<(), BenchError> {
        let (reading, writing) = tokio::io::split(stream);
        tokio::select! {
            result = self.read(reading) => result,
            result = self.write(writing) => result,
        }
    }

    async fn read(&self, mut stream: impl AsyncRead + Unpin) -> Result<(), BenchError> {
        loop {
            let at = || BenchError::io(format!("read from {}'s connection", self.identity.name));
            let mut prefix = [0; PREFIX_BYTES];
            stream.read_exact(&mut prefix).await.map_err(at())?;
            let mut bytes = vec![0; wire::decode_prefix(prefix)?];
            stream.read_exact(&mut bytes).await.map_err(at())?;
            let events = self.state.lock().sender.receive(wire::decode(&bytes)?)?;
            for event in events {
                self.take(event)?;
            }
            self.wake.notify_one();
        }
    }

    fn take(&self, event: SenderEvent) -> Result<(), BenchError> {
        match event {
            SenderEvent::Opened { tag_key, .. } => self.state.lock().tag = Some(TagKey(tag_key)),
            SenderEvent::Disk(answer) => self.state.lock().disks.push(answer),
            SenderEvent::Streaming => {
                self.is_streaming.send_replace(true);
            }
            SenderEvent::Acknowledged { durable } => {
                self.durable.send_replace(durable);
            }
            SenderEvent::Refused(refusal) => {
                let machine = self.identity.name.clone();
                return Err(BenchError::Refused { machine, refusal });
            }
            SenderEvent::Paused(refusal) => eprintln!("paused: {refusal}"),
            _ => {}
        }
        Ok(())
    }

    async fn write(&self, mut stream: impl AsyncWrite + Unpin) -> Result<(), BenchError> {
        let mut ticks = tokio::time::interval(REPORT_INTERVAL);
        loop {
            let at = || BenchError::io(format!("write to {}'s connection", self.identity.name));
            while let Some(outgoing) = self.next() {
                let head = outgoing.head()?;
                stream.write_all(&head).await.map_err(at())?;
                stream.write_all(outgoing.body()).await.map_err(at())?;
            }
            stream.flush().await.map_err(at())?;
            if self.state.lock().is_closing {
                return stream.shutdown().await.map_err(at());
            }
            tokio::select! {
                () = self.wake.notified() => {}
                _ = ticks.tick() => self.report(),
            }
        }
    }

    fn next(&self) -> Option<afterimage_protocol::sender::Outgoing<std::sync::Arc<[u8]>>> {
        let mut state = self.state.lock();
        let State { sender, pool, .. } = &mut *state;
        sender.next(pool)
    }

    fn report(&self) {
        let mut state = self.state.lock();
        if state.sender.is_streaming() {
            let captured = state.sender.sent();
            state.sender.report(SourceReport {
                captured,
                time: SystemClock::default().wall(),
                ..SourceReport::default()
            });
        }
    }
}

//! Accepts agents.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustls::ServerConfig;
use tokio::io::BufReader;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;

use super::connection::Connection;
use super::outgoing::LiveStream;
use crate::appliance::Appliance;
use crate::config::ms;
use crate::daemon::stopped;
use crate::engine::{Command, EngineGone, StreamKey};
use crate::tls;

/// Bytes read from a socket at once. TLS by itself asks for 4 KiB, which costs a system call for
/// each of them.
const READ_AHEAD_BYTES: usize = 256 << 10;
/// A stream's share of the memory is never below this.
const CREDIT_BYTES_MIN: u64 = 1 << 20;

/// What all connections of the data service share.
pub struct Ingest {
    pub(super) appliance: Arc<Appliance>,
    pub(super) memory: Arc<Semaphore>,
    streams_open: AtomicU64,
}

impl Ingest {
    /// Sets the memory aside.
    #[must_use]
    pub fn new(appliance: Arc<Appliance>) -> Arc<Self> {
        let bytes = usize::try_from(appliance.config.ingest.memory_bytes).unwrap_or(usize::MAX);
        let memory = Arc::new(Semaphore::new(bytes.min(Semaphore::MAX_PERMITS)));
        Arc::new(Self {
            appliance,
            memory,
            streams_open: AtomicU64::new(0),
        })
    }

    /// What a stream may have on its way: its share of the memory.
    pub(super) fn credit_bytes(&self) -> u64 {
        let config = &self.appliance.config.ingest;
        let streams = self.streams_open.load(Ordering::Relaxed).max(1);
        config
            .credit_bytes
            .min((config.memory_bytes / streams).max(CREDIT_BYTES_MIN))
    }

    pub(super) fn began(&self) {
        self.streams_open.fetch_add(1, Ordering::Relaxed);
    }

    /// Tells the engine that a stream is over, if it was open there.
    pub(super) async fn close(&self, key: Option<StreamKey>) {
        if let Some(key) = key
            && let Err(EngineGone) = self.appliance.engine.send(Command::Close(key)).await
        {
            tracing::debug!("the engine was gone before a stream");
        }
    }

    /// A stream that may have been open is over.
    pub(super) fn ended(&self, stream: &LiveStream) {
        if let Some(key) = stream.key {
            self.streams_open.fetch_sub(1, Ordering::Relaxed);
            self.appliance.reports.closed(stream.identity.machine, key);
        }
    }
}

/// Serves agents until `stop` turns true; returns when all connections have ended.
pub async fn serve(
    ingest: Arc<Ingest>,
    listener: TcpListener,
    tls: Arc<ServerConfig>,
    mut stop: watch::Receiver<bool>,
) {
    let acceptor = TlsAcceptor::from(tls);
    let config = &ingest.appliance.config.ingest;
    let room = Arc::new(Semaphore::new(config.connections_max));
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
            () = stopped(&mut stop) => break,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of descriptors, for instance: accepting again at once would spin.
                tracing::warn!(%error, "cannot accept a connection");
                sleep(ms(100)).await;
                continue;
            }
        };
        let Ok(place) = Arc::clone(&room).try_acquire_owned() else {
            let max = config.connections_max;
            let text = format!("{peer} was turned away: there are {max} connections already");
            ingest.appliance.events.note("connection-limit", text);
            continue;
        };
        let (ingest, acceptor, stop) = (Arc::clone(&ingest), acceptor.clone(), stop.clone());
        connections.spawn(async move {
            handle(ingest, acceptor, stream, peer, stop).await;
            drop(place);
        });
    }
    while connections.join_next().await.is_some() {}
}

async fn handle(
    ingest: Arc<Ingest>,
    acceptor: TlsAcceptor,
    stream: TcpStream,
    peer: SocketAddr,
    stop: watch::Receiver<bool>,
) {
    let appliance = Arc::clone(&ingest.appliance);
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%peer, %error, "acknowledgements may be late");
    }
    let stream = BufReader::with_capacity(READ_AHEAD_BYTES, stream);
    let patience = ms(appliance.config.ingest.handshake_timeout_ms);
    let stream = match timeout(patience, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            let kind = if tls::is_expired(&error) {
                "certificate-expired"
            } else {
                "handshake-failed"
            };
            let text = format!("{peer} was refused at the data port: {error}");
            appliance.events.note(kind, text);
            return;
        }
        Err(_) => {
            tracing::debug!(%peer, "no handshake in time");
            return;
        }
    };
    let Some(certificate) = tls::peer(stream.get_ref().1) else {
        let text = format!("{peer} has a certificate that names nobody");
        appliance.events.note("handshake-failed", text);
        return;
    };
    Connection::new(ingest, certificate, peer)
        .run(stream, stop)
        .await;
}

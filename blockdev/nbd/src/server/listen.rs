//! Accepts connections, no more than the settings allow.

use core::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use super::Server;
use super::link::Socket;
use crate::export::Peer;

/// Wait after a failed accept, out of descriptors for instance: again at once would spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Says when to stop: when the value turns true, or its owner goes.
#[derive(Clone, Debug)]
pub struct Stopping(pub watch::Receiver<bool>);

impl Stopping {
    pub(super) async fn stopped(&mut self) {
        // The guard in the result must not live on: it would hold up whoever stops.
        let _gone = self.0.wait_for(|stop| *stop).await.is_err();
    }
}

impl Server {
    /// Serves a Unix socket until it is told to stop, and all connections have ended.
    pub async fn serve_unix(self: Arc<Self>, listener: UnixListener, stopping: Stopping) {
        let accept = async || {
            let (stream, _) = listener.accept().await?;
            Ok((Socket::Unix(stream), None))
        };
        self.serve(accept, stopping).await;
    }

    /// Serves a TCP port, with TLS only, until it is told to stop, and all connections have ended.
    ///
    /// # Errors
    /// When the server has no TLS.
    pub async fn serve_tcp(
        self: Arc<Self>,
        listener: TcpListener,
        stopping: Stopping,
    ) -> io::Result<()> {
        if self.tls.is_none() {
            let text = "a TCP port is not served without TLS";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let accept = async || {
            let (stream, address) = listener.accept().await?;
            stream.set_nodelay(true)?;
            Ok((Socket::Tcp(stream), Some(address)))
        };
        self.serve(accept, stopping).await;
        Ok(())
    }

    async fn serve<A>(self: Arc<Self>, accept: impl Fn() -> A, mut stopping: Stopping)
    where
        A: Future<Output = io::Result<(Socket, Option<SocketAddr>)>>,
    {
        let room = Arc::new(Semaphore::new(self.settings.connections_max));
        let mut connections = JoinSet::new();
        loop {
            let accepted = tokio::select! {
                accepted = accept() => accepted,
                Some(_) = connections.join_next() => continue,
                () = stopping.stopped() => break,
            };
            let (socket, address) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept an NBD connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let Ok(place) = Arc::clone(&room).try_acquire_owned() else {
                let max = self.settings.connections_max;
                tracing::warn!(
                    ?address,
                    max,
                    "too many NBD connections; one is turned away"
                );
                continue;
            };
            let peer = Peer {
                address,
                certificate: None,
            };
            let server = Arc::clone(&self);
            let stopping = stopping.clone();
            connections.spawn(async move {
                server.connection(socket, peer, stopping).await;
                drop(place);
            });
        }
        while connections.join_next().await.is_some() {}
    }
}

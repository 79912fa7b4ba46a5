//! The server: one connection is a task that reads and submits, one that writes what could not be
//! sent at once, and short tasks for requests of several steps.

mod commands;
mod connection;
mod link;
mod listen;
mod outbox;
mod pending;
mod transmission;

use std::sync::Arc;
use std::time::Duration;

use rustls::ServerConfig;

use crate::export::Exports;

pub use listen::Stopping;

/// Bounds of a server.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ServerSettings {
    /// Most connections of one listener.
    pub connections_max: usize,
    /// Time from the first byte to the begin of transmission.
    pub handshake_timeout: Duration,
    /// Time for the rest of a request once it has begun.
    pub message_timeout: Duration,
    /// Bytes of requests and replies that a connection may have in memory. One request is always
    /// taken.
    pub in_flight_bytes: usize,
    /// Requests that a connection may have in flight.
    pub in_flight_requests: usize,
    /// Time for the last replies when a session ends.
    pub goodbye: Duration,
}

impl Default for ServerSettings {
    fn default() -> Self {
        Self {
            connections_max: 256,
            handshake_timeout: Duration::from_secs(10),
            message_timeout: Duration::from_secs(30),
            in_flight_bytes: 32 << 20,
            in_flight_requests: 256,
            goodbye: Duration::from_secs(5),
        }
    }
}

/// Serves exports to any number of connections.
pub struct Server {
    exports: Arc<dyn Exports>,
    settings: ServerSettings,
    /// Required on every socket that has it.
    tls: Option<Arc<ServerConfig>>,
}

impl Server {
    /// Makes a server. With `tls` nothing is told on TCP before STARTTLS; without, TCP is not
    /// served at all.
    #[must_use]
    pub fn new(
        exports: Arc<dyn Exports>,
        settings: ServerSettings,
        tls: Option<Arc<ServerConfig>>,
    ) -> Arc<Self> {
        Arc::new(Self {
            exports,
            settings,
            tls,
        })
    }
}

//! Connects, again and again.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use afterimage_blockdev::{Entropy, ErrorClass};
use afterimage_protocol::Refusal;
use afterimage_protocol::message::{DiskDescription, SourceReport};
use afterimage_protocol::sender::{RecordSource, SenderError, SenderEvent, StreamIdentity};
use rustls::ClientConfig;
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsConnector;

use super::http::handshake_error;
use super::ladder::Ladder;
use super::session;
use super::tls::{agent_config, server_name};
use crate::config::{LinkConfig, ms};
use crate::error::AgentError;
use crate::pipeline::FrameBytes;

/// Whom a connection serves. Nothing here waits for the link.
pub trait LinkHost: Send + Sync + 'static {
    /// Who opens the stream.
    fn identity(&self) -> StreamIdentity;
    /// The disks to declare on a new connection.
    fn declared(&self) -> Vec<DiskDescription>;
    /// Disks to declare on this connection, since it was made.
    fn take_declares(&self) -> Vec<DiskDescription>;
    /// Where records come from.
    fn source(&self) -> impl RecordSource<Bytes = FrameBytes> + Send;
    /// What happened on the connection.
    ///
    /// # Errors
    /// When the connection must end because of it.
    fn event(&self, event: SenderEvent) -> Result<(), SessionEnd>;
    /// Frames were given to the connection.
    fn sent(&self);
    /// Says, once, that a report should leave now.
    fn take_report_due(&self) -> bool;
    /// State of the source.
    fn report(&self) -> SourceReport;
    /// Why this connection must end now, if it must.
    fn stop_reason(&self) -> Option<SessionEnd>;
    /// Rung when there may be something to send.
    fn wake(&self) -> &Notify;
    /// Rung when an attempt should be made at once.
    fn retry_now(&self) -> &Notify;
    /// The connection is gone, or could not be made.
    fn down(&self, reason: &str);
    /// The agent stops.
    fn is_stopping(&self) -> bool;
}

/// Why a connection ended.
#[derive(Clone, Debug)]
pub struct SessionEnd {
    /// Why, for people.
    pub reason: String,
    /// When to try again.
    pub next: NextAttempt,
}

/// When to try again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NextAttempt {
    /// At once.
    Now,
    /// On the ladder, or as soon as the appliance's port accepts connections again.
    WhenBack,
    /// On the ladder.
    Ladder,
}

impl SessionEnd {
    /// The connection broke.
    #[must_use]
    pub fn broken(what: &str) -> Self {
        let reason = format!("connection lost: {what}");
        Self {
            reason,
            next: NextAttempt::WhenBack,
        }
    }

    /// The appliance refused.
    #[must_use]
    pub fn refused(refusal: &Refusal) -> Self {
        let next = match refusal.class {
            ErrorClass::Retry => NextAttempt::WhenBack,
            _ => NextAttempt::Ladder,
        };
        Self {
            reason: refusal.to_string(),
            next,
        }
    }

    pub(super) fn from_error(error: &SenderError) -> Self {
        let next = match error.class() {
            ErrorClass::Retry => NextAttempt::WhenBack,
            _ => NextAttempt::Ladder,
        };
        Self {
            reason: error.to_string(),
            next,
        }
    }
}

/// Where the appliance is, and how to be trusted by it.
#[derive(Clone, Debug)]
pub struct Target {
    /// Host.
    pub host: String,
    /// Address of the data port.
    pub address: String,
    /// The authority's certificate.
    pub authority: PathBuf,
    /// The agent's certificate; read for every attempt, since it is renewed.
    pub certificate: PathBuf,
    /// The agent's key.
    pub key: PathBuf,
}

/// How often a port that did not accept is tried.
const PROBE_INTERVAL: Duration = Duration::from_millis(500);
/// A connection that held so long makes the ladder start again.
const STABLE: Duration = Duration::from_secs(5);

/// Keeps a connection until the agent stops.
pub async fn run<H: LinkHost>(
    host: Arc<H>,
    target: Target,
    config: LinkConfig,
    entropy: Arc<dyn Entropy>,
) {
    let mut ladder = Ladder::new(ms(config.retry_base_ms), config.retry_jitter_percent);
    while !host.is_stopping() {
        let began = tokio::time::Instant::now();
        let end = match connect(&target, ms(config.connect_timeout_ms)).await {
            Ok(stream) => session::serve(Arc::clone(&host), stream, &config).await,
            Err(error) => {
                let next = match error.class() {
                    ErrorClass::Retry => NextAttempt::WhenBack,
                    _ => NextAttempt::Ladder,
                };
                SessionEnd {
                    reason: error.to_string(),
                    next,
                }
            }
        };
        if host.is_stopping() {
            return;
        }
        tracing::warn!(reason = %end.reason, "not connected");
        host.down(&end.reason);
        if began.elapsed() >= STABLE {
            ladder.reset();
        }
        match end.next {
            NextAttempt::Now => {}
            next => {
                let wait = ladder.climb(entropy.as_ref());
                let is_back = async {
                    if next == NextAttempt::WhenBack {
                        wait_until_back(&target.address).await;
                    } else {
                        core::future::pending::<()>().await;
                    }
                };
                tokio::select! {
                    () = sleep(wait) => {}
                    () = host.retry_now().notified() => {}
                    () = is_back => {}
                }
            }
        }
    }
}

/// Ends when the port accepts a connection; waits a moment before the first try.
async fn wait_until_back(address: &str) {
    loop {
        sleep(PROBE_INTERVAL).await;
        if let Ok(Ok(_stream)) = timeout(PROBE_INTERVAL, TcpStream::connect(address)).await {
            return;
        }
    }
}

async fn connect(
    target: &Target,
    at_most: Duration,
) -> Result<tokio_rustls::client::TlsStream<TcpStream>, AgentError> {
    let tls: Arc<ClientConfig> = agent_config(&target.authority, &target.certificate, &target.key)?;
    let server = target.address.clone();
    let gone = |what: String| AgentError::Unreachable {
        server: server.clone(),
        what,
    };
    let attempt = async {
        let stream = TcpStream::connect(&server)
            .await
            .map_err(|error| gone(error.to_string()))?;
        stream
            .set_nodelay(true)
            .map_err(|error| gone(error.to_string()))?;
        let name = server_name(&target.host)?;
        let connected = TlsConnector::from(tls).connect(name, stream).await;
        connected.map_err(|error| handshake_error(&server, &error))
    };
    match timeout(at_most, attempt).await {
        Ok(result) => result,
        Err(_) => Err(gone("no answer in time".to_owned())),
    }
}

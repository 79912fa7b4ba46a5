//! The sockets, and the threads behind them.

use std::fs::Permissions;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use afterimage_nbd::server::Stopping;
use afterimage_nbd::{Server, ServerSettings};
use rustls::ServerConfig;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{oneshot, watch};

use super::exports::StoreExports;
use crate::appliance::Appliance;
use crate::config::{Nbd, ms};
use crate::failure::StartError;

/// Time for the last replies when the daemon stops; it has little more itself.
const GOODBYE: Duration = Duration::from_secs(2);

/// The bound sockets.
pub struct NbdListeners {
    local: Option<std::os::unix::net::UnixListener>,
    remote: Option<std::net::TcpListener>,
    /// Port of the TCP socket, as it is bound.
    pub port: Option<u16>,
}

/// Binds what the configuration asks for.
///
/// # Errors
/// [`StartError`].
pub fn listen(config: &Nbd, socket: &Path) -> Result<NbdListeners, StartError> {
    let mut listeners = NbdListeners {
        local: None,
        remote: None,
        port: None,
    };
    let wrong = |error| StartError::file("making", socket, error);
    match std::fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(wrong(error)),
        _ => {}
    }
    if config.is_local {
        let local = std::os::unix::net::UnixListener::bind(socket).map_err(wrong)?;
        std::fs::set_permissions(socket, Permissions::from_mode(0o600)).map_err(wrong)?;
        local.set_nonblocking(true).map_err(wrong)?;
        listeners.local = Some(local);
    }
    if let Some(address) = config.listen {
        let failed = |source| StartError::Listen { address, source };
        let remote = std::net::TcpListener::bind(address).map_err(failed)?;
        remote.set_nonblocking(true).map_err(failed)?;
        listeners.port = Some(remote.local_addr().map_err(failed)?.port());
        listeners.remote = Some(remote);
    }
    Ok(listeners)
}

fn settings(config: &Nbd) -> ServerSettings {
    ServerSettings {
        connections_max: config.connections_max,
        handshake_timeout: ms(config.handshake_timeout_ms),
        message_timeout: ms(config.message_timeout_ms),
        in_flight_bytes: usize::try_from(config.in_flight_bytes).unwrap_or(usize::MAX),
        in_flight_requests: config.in_flight_requests,
        goodbye: GOODBYE,
    }
}

/// Serves NBD until `stop` turns true and all sessions have ended.
pub async fn serve(
    appliance: Arc<Appliance>,
    listeners: NbdListeners,
    tls: Arc<ServerConfig>,
    stop: watch::Receiver<bool>,
) {
    let (ended, wait) = oneshot::channel();
    let started = std::thread::Builder::new()
        .name("nbd".to_owned())
        .spawn(move || {
            if let Err(error) = run(&appliance, listeners, tls, stop) {
                tracing::error!(%error, "NBD is not served");
                let text = format!("NBD is not served: {error}");
                appliance.events.note("nbd-failed", text);
            }
            let _gone = ended.send(());
        });
    match started {
        // An error means that the thread is gone, which is as well.
        Ok(_) => drop(wait.await),
        Err(error) => tracing::error!(%error, "NBD is not served: no thread"),
    }
}

fn run(
    appliance: &Arc<Appliance>,
    listeners: NbdListeners,
    tls: Arc<ServerConfig>,
    stop: watch::Receiver<bool>,
) -> io::Result<()> {
    let config = &appliance.config.nbd;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(config.threads)
        .thread_name("nbd-session")
        .enable_all()
        .build()?;
    let exports = StoreExports::new(Arc::clone(appliance));
    let server = Server::new(exports, settings(config), Some(tls));
    let done = runtime.block_on(async {
        let local = async {
            if let Some(local) = listeners.local {
                let local = UnixListener::from_std(local)?;
                let stopping = Stopping(stop.clone());
                Arc::clone(&server).serve_unix(local, stopping).await;
            }
            io::Result::Ok(())
        };
        let remote = async {
            if let Some(remote) = listeners.remote {
                let remote = TcpListener::from_std(remote)?;
                let stopping = Stopping(stop.clone());
                Arc::clone(&server).serve_tcp(remote, stopping).await?;
            }
            io::Result::Ok(())
        };
        let (local, remote) = tokio::join!(local, remote);
        local.and(remote)
    });
    runtime.shutdown_timeout(GOODBYE);
    done
}

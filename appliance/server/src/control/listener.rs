//! Accepts callers on the local socket and on TLS.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::{Extension, Router};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;

use super::access::Caller;
use crate::appliance::Appliance;
use crate::ca::PeerIdentity;
use crate::config::ms;
use crate::daemon::stopped;
use crate::tls;

/// Serves the local socket until `stop` turns true.
pub async fn serve_local(
    appliance: Arc<Appliance>,
    router: Router,
    listener: UnixListener,
    mut stop: watch::Receiver<bool>,
) {
    let room = Arc::new(Semaphore::new(appliance.config.control.connections_max));
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
            () = stopped(&mut stop) => break,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot accept on the local socket");
                sleep(ms(100)).await;
                continue;
            }
        };
        let Ok(place) = Arc::clone(&room).try_acquire_owned() else {
            tracing::warn!("too many callers on the local socket; one is turned away");
            continue;
        };
        let (appliance, router, stop) = (Arc::clone(&appliance), router.clone(), stop.clone());
        connections.spawn(async move {
            answer(&appliance, router, stream, Caller::Local, stop).await;
            drop(place);
        });
    }
    while connections.join_next().await.is_some() {}
}

/// Serves the control port until `stop` turns true.
pub async fn serve_tls(
    appliance: Arc<Appliance>,
    router: Router,
    listener: TcpListener,
    config: Arc<ServerConfig>,
    mut stop: watch::Receiver<bool>,
) {
    let acceptor = TlsAcceptor::from(config);
    let room = Arc::new(Semaphore::new(appliance.config.control.connections_max));
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
                tracing::warn!(%error, "cannot accept on the control port");
                sleep(ms(100)).await;
                continue;
            }
        };
        let Ok(place) = Arc::clone(&room).try_acquire_owned() else {
            tracing::warn!(%peer, "too many callers on the control port; one is turned away");
            continue;
        };
        let (appliance, router, stop) = (Arc::clone(&appliance), router.clone(), stop.clone());
        let acceptor = acceptor.clone();
        connections.spawn(async move {
            answer_tls(&appliance, router, acceptor, (stream, peer), stop).await;
            drop(place);
        });
    }
    while connections.join_next().await.is_some() {}
}

async fn answer_tls(
    appliance: &Appliance,
    router: Router,
    acceptor: TlsAcceptor,
    (stream, peer): (TcpStream, SocketAddr),
    stop: watch::Receiver<bool>,
) {
    let patience = ms(appliance.config.control.handshake_timeout_ms);
    let stream = match timeout(patience, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            let kind = if tls::is_expired(&error) {
                "certificate-expired"
            } else {
                "handshake-failed"
            };
            let text = format!("{peer} was refused at the control port: {error}");
            appliance.events.note(kind, text);
            return;
        }
        Err(_) => {
            tracing::debug!(%peer, "no handshake in time");
            return;
        }
    };
    let caller = caller(appliance, stream.get_ref().1).await;
    answer(appliance, router, stream, caller, stop).await;
}

async fn caller(appliance: &Appliance, connection: &rustls::ServerConnection) -> Caller {
    if connection.peer_certificates().is_none() {
        return Caller::Anonymous;
    }
    let Some(certificate) = tls::peer(connection) else {
        return Caller::Revoked;
    };
    let asked = certificate.clone();
    let is_valid = appliance
        .catalogue
        .run(move |catalogue| catalogue.is_valid(&asked.serial, &asked.identity))
        .await;
    match (is_valid, certificate.identity) {
        (Ok(true), PeerIdentity::Agent(agent)) => Caller::Agent(agent),
        (Ok(true), PeerIdentity::Admin(name)) => Caller::Admin(name),
        (Ok(false), _) => Caller::Revoked,
        (Err(error), _) => {
            tracing::error!(%error, "a certificate cannot be checked, and counts as revoked");
            Caller::Revoked
        }
    }
}

/// Answers the requests of a connection. At the end of the daemon the present one is answered yet.
async fn answer<S>(
    appliance: &Appliance,
    router: Router,
    stream: S,
    caller: Caller,
    mut stop: watch::Receiver<bool>,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = TowerToHyperService::new(router.layer(Extension(caller)));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(ms(appliance.config.control.handshake_timeout_ms))
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = &mut connection => ended,
        () = stopped(&mut stop) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a caller's connection broke");
    }
}

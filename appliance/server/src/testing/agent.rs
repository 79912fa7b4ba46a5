//! Clients of the data and the control port.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use afterimage_protocol::message::{FromReceiver, FromSender};
use afterimage_protocol::wire;
use axum::body::Body;
use axum::http::{Method, Request, StatusCode};
use http_body_util::BodyExt;
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::{CertificateDer, ServerName};
use serde::Serialize;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tower::ServiceExt;

use super::{Fixture, Identity};
use crate::control::Caller;

const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) fn client_config(
    authority: &CertificateDer<'static>,
    identity: Option<&Identity>,
) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    roots.add(authority.clone()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots);
    Arc::new(match identity {
        None => builder.with_no_client_auth(),
        Some(Identity { certificate, key }) => builder
            .with_client_auth_cert(vec![certificate.clone()], key.clone_key())
            .unwrap(),
    })
}

pub(crate) async fn connect(
    address: SocketAddr,
    config: Arc<ClientConfig>,
) -> std::io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(address).await?;
    let name = ServerName::try_from("localhost").unwrap();
    TlsConnector::from(config).connect(name, stream).await
}

/// A connection to the data port.
pub(crate) struct Wire {
    pub(crate) stream: TlsStream<TcpStream>,
}

impl Wire {
    pub(crate) async fn open(fixture: &Fixture, address: SocketAddr, identity: &Identity) -> Self {
        let config = client_config(fixture.appliance.authority.certificate(), Some(identity));
        Self {
            stream: connect(address, config).await.unwrap(),
        }
    }

    pub(crate) async fn send(&mut self, message: &FromSender) {
        let bytes = wire::encode(message).unwrap();
        self.stream.write_all(&bytes).await.unwrap();
        self.stream.flush().await.unwrap();
    }

    pub(crate) async fn send_raw(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
        self.stream.flush().await.unwrap();
    }

    /// The next message; `None` when the connection has ended.
    pub(crate) async fn next(&mut self) -> Option<FromReceiver> {
        tokio::time::timeout(PATIENCE, async {
            let mut prefix = [0; wire::PREFIX_BYTES];
            self.stream.read_exact(&mut prefix).await.ok()?;
            let mut body = vec![0; wire::decode_prefix(prefix).unwrap()];
            self.stream.read_exact(&mut body).await.ok()?;
            Some(wire::decode(&body).unwrap())
        })
        .await
        .expect("the appliance answers")
    }
}

/// Asks the control port over TLS.
pub(crate) async fn control(
    address: SocketAddr,
    config: Arc<ClientConfig>,
    method: Method,
    path: &str,
    body: &impl Serialize,
) -> std::io::Result<(StatusCode, Value)> {
    let stream = connect(address, config).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .unwrap();
    tokio::spawn(connection);
    let answer = sender.send_request(self::request(method, path, body)).await;
    let answer = answer.map_err(std::io::Error::other)?;
    let status = answer.status();
    let bytes = answer
        .into_body()
        .collect()
        .await
        .map_err(std::io::Error::other)?
        .to_bytes();
    Ok((
        status,
        serde_json::from_slice(&bytes).unwrap_or(Value::Null),
    ))
}

/// Asks as the local socket does, without a socket.
pub(crate) async fn local(
    fixture: &Fixture,
    method: Method,
    path: &str,
    body: &impl Serialize,
) -> (StatusCode, Value) {
    let router = crate::control::router(Arc::clone(&fixture.appliance));
    let router = router.layer(axum::Extension(Caller::Local));
    let answer = router.oneshot(request(method, path, body)).await.unwrap();
    let status = answer.status();
    let bytes = answer.into_body().collect().await.unwrap().to_bytes();
    (
        status,
        serde_json::from_slice(&bytes).unwrap_or(Value::Null),
    )
}

fn request(method: Method, path: &str, body: &impl Serialize) -> Request<Body> {
    Request::builder()
        .method(method)
        .uri(path)
        .header("host", "localhost")
        .header("content-type", "application/json")
        .body(Body::from(serde_json::to_vec(body).unwrap()))
        .unwrap()
}

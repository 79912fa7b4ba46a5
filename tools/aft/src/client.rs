//! One request to the appliance or the agent.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use afterimage_blockdev::ErrorClass;
use afterimage_protocol::rest::ApiError;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use crate::args::Global;
use crate::error::AftError;

/// Longest answer.
const ANSWER_BYTES_MAX: usize = 256 << 20;
const CONNECT_WAIT: Duration = Duration::from_secs(10);

/// Where requests go.
#[derive(Clone, Debug)]
pub enum Client {
    /// A local socket, and the daemon behind it.
    Local {
        /// The socket.
        socket: PathBuf,
        /// The daemon's name.
        daemon: &'static str,
    },
    /// The control port of an appliance elsewhere.
    Remote {
        /// Host and port.
        server: String,
        /// File with certificate, key and authority.
        identity: PathBuf,
    },
}

impl Client {
    /// The appliance.
    #[must_use]
    pub fn server(global: &Global) -> Self {
        match (&global.server, &global.identity) {
            (Some(server), Some(identity)) => Self::Remote {
                server: server.clone(),
                identity: identity.clone(),
            },
            _ => Self::Local {
                socket: global.socket.clone(),
                daemon: "afterimaged",
            },
        }
    }

    /// The agent of this machine.
    #[must_use]
    pub fn agent(global: &Global) -> Self {
        Self::Local {
            socket: global.agent_socket.clone(),
            daemon: "afterimage-agent",
        }
    }

    /// Asks for something.
    ///
    /// # Errors
    /// What keeps it from being answered, or what the answer says.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, AftError> {
        self.request(Method::GET, path, Bytes::new()).await
    }

    /// Orders something.
    ///
    /// # Errors
    /// What keeps it from being answered, or what the answer says.
    pub async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, AftError> {
        let body = serde_json::to_vec(body)
            .map_err(|error| AftError::new(ErrorClass::Refused, error.to_string(), ""))?;
        self.request(Method::POST, path, Bytes::from(body)).await
    }

    /// Ends something.
    ///
    /// # Errors
    /// What keeps it from being answered, or what the answer says.
    pub async fn delete<T: DeserializeOwned>(&self, path: &str) -> Result<T, AftError> {
        self.request(Method::DELETE, path, Bytes::new()).await
    }

    async fn request<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<T, AftError> {
        match self {
            Self::Local { socket, daemon } => {
                let stream = UnixStream::connect(socket)
                    .await
                    .map_err(|error| unreachable_daemon(daemon, socket, &error))?;
                exchange(stream, "localhost", method, path, body).await
            }
            Self::Remote { server, identity } => {
                let stream = connect(server, identity).await?;
                exchange(stream, server, method, path, body).await
            }
        }
    }
}

fn unreachable_daemon(daemon: &str, socket: &Path, error: &io::Error) -> AftError {
    let (class, hint) = match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => (
            ErrorClass::Retry,
            format!("start {daemon}, or name its socket with an option (see --help)"),
        ),
        io::ErrorKind::PermissionDenied => (
            ErrorClass::Operator,
            "run this as root, for instance with sudo".to_owned(),
        ),
        _ => (ErrorClass::Retry, String::new()),
    };
    let why = match error.kind() {
        io::ErrorKind::NotFound => "there is no such socket, so it is not running".to_owned(),
        io::ErrorKind::ConnectionRefused => "nobody listens there".to_owned(),
        _ => error.to_string(),
    };
    AftError::new(
        class,
        format!("cannot reach {daemon} at {}: {why}", socket.display()),
        hint,
    )
}

async fn connect(
    server: &str,
    identity: &Path,
) -> Result<tokio_rustls::client::TlsStream<TcpStream>, AftError> {
    let config = client_config(identity)?;
    let unreachable = |why: String| {
        AftError::new(
            ErrorClass::Retry,
            format!("cannot reach the appliance at {server}: {why}"),
            "look whether afterimaged runs there, and whether its control port is open",
        )
    };
    let host = server.rsplit_once(':').map_or(server, |(host, _)| host);
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let name = ServerName::try_from(host.to_owned()).map_err(|_| {
        AftError::new(
            ErrorClass::Refused,
            format!("{server:?} is no HOST:PORT"),
            "",
        )
    })?;
    let stream = timeout(CONNECT_WAIT, TcpStream::connect(server))
        .await
        .map_err(|_| unreachable("no answer".to_owned()))?
        .map_err(|error| unreachable(error.to_string()))?;
    TlsConnector::from(Arc::new(config)).connect(name, stream).await.map_err(|error| {
        AftError::new(
            ErrorClass::Operator,
            format!("the appliance at {server} and this identity do not fit: {error}"),
            "make another with `aft cert issue-admin` at that appliance, or call it by a name in \
             its certificate",
        )
    })
}

fn client_config(identity: &Path) -> Result<ClientConfig, AftError> {
    let wrong = |why: String| {
        AftError::new(
            ErrorClass::Operator,
            format!("{} is no identity: {why}", identity.display()),
            "make one with `aft cert issue-admin` at the appliance",
        )
    };
    let pem = std::fs::read(identity).map_err(|error| wrong(error.to_string()))?;
    let key = PrivateKeyDer::from_pem_slice(&pem).map_err(|error| wrong(error.to_string()))?;
    let certificates = CertificateDer::pem_slice_iter(&pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| wrong(error.to_string()))?;
    // As written: the admin's certificate first, the authority's second.
    let [own, authority] = <[_; 2]>::try_from(certificates)
        .map_err(|_| wrong("it does not hold two certificates".to_owned()))?;
    let mut roots = RootCertStore::empty();
    roots
        .add(authority)
        .map_err(|error| wrong(error.to_string()))?;
    ClientConfig::builder_with_protocol_versions(&[&rustls::version::TLS13])
        .with_root_certificates(roots)
        .with_client_auth_cert(vec![own], key)
        .map_err(|error| wrong(error.to_string()))
}

async fn exchange<S, T>(
    stream: S,
    host: &str,
    method: Method,
    path: &str,
    body: Bytes,
) -> Result<T, AftError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    T: DeserializeOwned,
{
    let broke = |why: String| {
        AftError::new(
            ErrorClass::Retry,
            format!("the answer did not come: {why}"),
            "try again",
        )
    };
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| broke(error.to_string()))?;
    // Its errors come out of the request too.
    let driver = tokio::spawn(async move { connection.await.is_ok() });
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(hyper::header::HOST, host)
        .header(hyper::header::CONTENT_TYPE, "application/json")
        .body(Full::new(body))
        .map_err(|error| AftError::new(ErrorClass::Refused, error.to_string(), ""))?;
    let response = sender
        .send_request(request)
        .await
        .map_err(|error| broke(error.to_string()))?;
    let status = response.status();
    let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX)
        .collect()
        .await
        .map_err(|error| broke(error.to_string()))?
        .to_bytes();
    driver.abort();
    decode(status, &body)
}

fn decode<T: DeserializeOwned>(status: StatusCode, body: &[u8]) -> Result<T, AftError> {
    let foreign = |error: serde_json::Error| {
        AftError::new(
            ErrorClass::Operator,
            format!("the answer cannot be read: {error}"),
            "aft and the daemon may be of different releases",
        )
    };
    if status.is_success() {
        let body = if body.is_empty() { b"null" } else { body };
        return serde_json::from_slice(body).map_err(foreign);
    }
    match serde_json::from_slice::<ApiError>(body) {
        Ok(error) => Err(AftError(error)),
        Err(_) => Err(AftError::new(
            ErrorClass::Operator,
            format!(
                "the daemon answered {status}: {}",
                String::from_utf8_lossy(body)
            ),
            "aft and the daemon may be of different releases",
        )),
    }
}

/// A part of a path, with all that has a meaning there written as `%XX`.
#[must_use]
pub fn segment(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_survive_as_parts_of_a_path() {
        assert_eq!(segment("web-1.example"), "web-1.example");
        assert_eq!(segment("a b/c?d"), "a%20b%2Fc%3Fd");
        assert_eq!(segment("ü"), "%C3%BC");
    }

    #[test]
    fn an_error_keeps_its_class_and_a_foreign_answer_is_no_success() {
        let body = br#"{"class":"fenced","message":"m","hint":"h"}"#;
        let error = decode::<()>(StatusCode::LOCKED, body).unwrap_err();
        assert_eq!(error.0.class, ErrorClass::Fenced);
        assert!(decode::<()>(StatusCode::BAD_GATEWAY, b"<html>").is_err());
        assert!(decode::<u64>(StatusCode::OK, b"null").is_err());
        assert!(decode::<()>(StatusCode::NO_CONTENT, b"").is_ok());
    }
}

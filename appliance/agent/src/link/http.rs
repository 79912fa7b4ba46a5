//! One request to the appliance's control port.

use std::sync::Arc;
use std::time::Duration;

use afterimage_blockdev::ErrorClass;
use afterimage_protocol::rest::ApiError;
use http_body_util::{BodyExt, Full, Limited};
use hyper::Request;
use hyper::body::Bytes;
use hyper::header::{CONTENT_TYPE, HOST};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::tls::server_name;
use crate::error::AgentError;
use crate::state::identity::address;

/// Longest answer, in bytes.
const ANSWER_BYTES_MAX: usize = 1 << 20;

/// Where the request goes, and how.
#[derive(Clone)]
pub struct ControlPort {
    /// Host.
    pub host: String,
    /// Port.
    pub port: u16,
    /// Whom to trust.
    pub tls: Arc<ClientConfig>,
    /// How long all of it may take.
    pub timeout: Duration,
}

impl ControlPort {
    /// Posts JSON and reads JSON.
    ///
    /// # Errors
    /// `Unreachable`, or what the appliance answers.
    pub async fn post<Q: Serialize, A: DeserializeOwned>(
        &self,
        path: &str,
        question: &Q,
    ) -> Result<A, AgentError> {
        let server = address(&self.host, self.port);
        match tokio::time::timeout(self.timeout, self.exchange(path, question)).await {
            Ok(result) => result,
            Err(_) => Err(AgentError::Unreachable {
                server,
                what: "no answer in time".to_owned(),
            }),
        }
    }

    async fn exchange<Q: Serialize, A: DeserializeOwned>(
        &self,
        path: &str,
        question: &Q,
    ) -> Result<A, AgentError> {
        let server = address(&self.host, self.port);
        let gone = |what: &dyn core::fmt::Display| AgentError::Unreachable {
            server: server.clone(),
            what: what.to_string(),
        };
        let stream = TcpStream::connect(&server)
            .await
            .map_err(|error| gone(&error))?;
        let stream = TlsConnector::from(Arc::clone(&self.tls))
            .connect(server_name(&self.host)?, stream)
            .await
            .map_err(|error| handshake_error(&server, &error))?;
        let (mut requests, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream))
                .await
                .map_err(|error| gone(&error))?;
        let connection = tokio::spawn(connection);
        let body = serde_json::to_vec(question).map_err(|error| gone(&error))?;
        let request = Request::post(path)
            .header(HOST, server.as_str())
            .header(CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(|error| gone(&error))?;
        let answer = requests
            .send_request(request)
            .await
            .map_err(|error| gone(&error))?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), ANSWER_BYTES_MAX);
        let bytes = body
            .collect()
            .await
            .map_err(|error| gone(&error))?
            .to_bytes();
        connection.abort();
        if status.is_success() {
            return serde_json::from_slice(&bytes).map_err(|error| gone(&error));
        }
        let error = serde_json::from_slice(&bytes).unwrap_or_else(|_| ApiError {
            class: ErrorClass::Operator,
            message: format!("{server} answered {status}"),
            hint: "check that this is the control port of afterimaged".to_owned(),
        });
        Err(AgentError::Appliance(error))
    }
}

/// Tells a stranger from a failed connection.
pub(super) fn handshake_error(server: &str, error: &std::io::Error) -> AgentError {
    let cause = error
        .get_ref()
        .and_then(|cause| cause.downcast_ref::<rustls::Error>());
    match cause {
        Some(rustls::Error::InvalidCertificate(cause)) => AgentError::Tls {
            what: format!(
                "{server} is not the appliance that is expected: {cause}; check address and token"
            ),
        },
        Some(rustls::Error::AlertReceived(alert)) => AgentError::Tls {
            what: format!("{server} refuses this agent's certificate: {alert:?}; enrol again"),
        },
        _ => AgentError::Unreachable {
            server: server.to_owned(),
            what: error.to_string(),
        },
    }
}

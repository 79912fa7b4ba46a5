//! Enrolment with a one-time token, and renewal of the certificate.

use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use afterimage_blockdev::{AgentId, Entropy, ErrorClass, HistoryId, MachineId};
use afterimage_protocol::rest::ApiError;
use afterimage_protocol::rest::server::{Enrol, Enrolled, Renew, Renewed};
use afterimage_protocol::rest::token::{TokenText, hex};
use rcgen::{CertificateParams, DnType, KeyPair};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;

use super::http::ControlPort;
use super::tls::{agent_config, enrolment_config};
use crate::error::AgentError;
use crate::state::identity::Identity;
use crate::state::{StateDir, replace};

/// What `enrol` is told.
#[derive(Clone, Debug)]
pub struct EnrolRequest {
    /// Host of the appliance.
    pub host: String,
    /// Its control port.
    pub port: u16,
    /// The token's text.
    pub token: String,
    /// The machine's name.
    pub machine_name: String,
    /// How long it may take.
    pub timeout: Duration,
}

fn refused(message: &str, hint: &str) -> AgentError {
    AgentError::Appliance(ApiError {
        class: ErrorClass::Refused,
        message: message.to_owned(),
        hint: hint.to_owned(),
    })
}

fn crypto(error: &rcgen::Error) -> AgentError {
    AgentError::Tls {
        what: format!("cannot make a certificate request: {error}"),
    }
}

fn signing_request(key: &KeyPair, agent: AgentId) -> Result<String, AgentError> {
    let mut params = CertificateParams::new(Vec::new()).map_err(|error| crypto(&error))?;
    params
        .distinguished_name
        .push(DnType::CommonName, agent.to_string());
    let request = params
        .serialize_request(key)
        .map_err(|error| crypto(&error))?;
    request.pem().map_err(|error| crypto(&error))
}

/// Enrols: makes identities and a key, gets a certificate, and writes all of it down.
///
/// # Errors
/// `AlreadyEnrolled`; `Appliance` for a token that is none, is wrong or has expired; `Tls` for an
/// appliance that did not make the token; `Unreachable`.
pub async fn enrol(
    state: &StateDir,
    request: EnrolRequest,
    entropy: &dyn Entropy,
) -> Result<Identity, AgentError> {
    match Identity::load(state) {
        Err(AgentError::NotEnrolled { .. }) => {}
        Ok(known) => {
            let (path, server) = (state.root().to_owned(), known.control_address());
            return Err(AgentError::AlreadyEnrolled { path, server });
        }
        Err(error) => return Err(error),
    }
    let Some(token) = TokenText::parse(&request.token) else {
        return Err(refused(
            "this is not an enrolment token",
            "copy the token as a whole",
        ));
    };
    let port = ControlPort {
        host: request.host.clone(),
        port: request.port,
        tls: enrolment_config(token.fingerprint)?,
        timeout: request.timeout,
    };
    let (agent, machine) = (AgentId(entropy.identity()), MachineId(entropy.identity()));
    let key = KeyPair::generate().map_err(|error| crypto(&error))?;
    let question = Enrol {
        secret: hex(&token.secret),
        agent,
        machine,
        machine_name: request.machine_name.clone(),
        request_pem: signing_request(&key, agent)?,
    };
    let answer: Enrolled = port.post("/v1/enrol", &question).await?;
    let authority =
        CertificateDer::from_pem_slice(answer.authority_pem.as_bytes()).map_err(|error| {
            AgentError::Tls {
                what: format!("the authority: {error:?}"),
            }
        })?;
    if blake3::hash(&authority) != token.fingerprint {
        return Err(AgentError::Tls {
            what: "the appliance sent another authority than the token names".to_owned(),
        });
    }
    replace(&state.path("agent.key"), key.serialize_pem().as_bytes())?;
    replace(&state.path("agent.pem"), answer.certificate_pem.as_bytes())?;
    replace(
        &state.path("authority.pem"),
        answer.authority_pem.as_bytes(),
    )?;
    let identity = Identity {
        version: Identity::VERSION,
        agent,
        machine,
        machine_name: request.machine_name,
        history: HistoryId(entropy.identity()),
        server_host: request.host,
        control_port: request.port,
        data_port: answer.data_port,
    };
    identity.save(state)?;
    Ok(identity)
}

/// When the certificate on file should be renewed and when it expires, in seconds since the epoch.
///
/// # Errors
/// When the file cannot be read.
pub fn lifetime(certificate: &Path) -> Result<(i64, i64), AgentError> {
    let damaged = |what: String| AgentError::Damaged {
        path: certificate.to_owned(),
        what,
    };
    let der = CertificateDer::from_pem_file(certificate)
        .map_err(|error| damaged(format!("{error:?}")))?;
    let (_, parsed) =
        x509_parser::parse_x509_certificate(&der).map_err(|error| damaged(error.to_string()))?;
    // It may hold from before it was made, for clocks that are behind.
    let made = certificate
        .metadata()
        .and_then(|metadata| metadata.modified());
    let made = made
        .ok()
        .and_then(|made| made.duration_since(UNIX_EPOCH).ok());
    let made = made.and_then(|since| i64::try_from(since.as_secs()).ok());
    let end = parsed.validity().not_after.timestamp();
    let begin = parsed.validity().not_before.timestamp();
    let begin = made.map_or(begin, |made| made.clamp(begin, end.max(begin)));
    Ok((begin + (end - begin) / 3 * 2, end))
}

/// Gets a new certificate for the key on file.
///
/// # Errors
/// As [`enrol`].
pub async fn renew(
    state: &StateDir,
    identity: &Identity,
    timeout: Duration,
) -> Result<(), AgentError> {
    let key_path = state.path("agent.key");
    let pem = std::fs::read_to_string(&key_path).map_err(AgentError::file("read", &key_path))?;
    let key = KeyPair::from_pem(&pem).map_err(|error| crypto(&error))?;
    let certificate = state.path("agent.pem");
    let port = ControlPort {
        host: identity.server_host.clone(),
        port: identity.control_port,
        tls: agent_config(&state.path("authority.pem"), &certificate, &key_path)?,
        timeout,
    };
    let question = Renew {
        request_pem: signing_request(&key, identity.agent)?,
    };
    let answer: Renewed = port.post("/v1/renew", &question).await?;
    replace(&certificate, answer.certificate_pem.as_bytes())
}

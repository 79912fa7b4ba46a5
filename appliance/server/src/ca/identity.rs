//! Who a verified certificate names.

use afterimage_blockdev::AgentId;
use rustls_pki_types::CertificateDer;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

const AGENT: &str = "urn:afterimage:agent:";
const ADMIN: &str = "urn:afterimage:admin:";

/// Who somebody is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum PeerIdentity {
    /// An agent.
    Agent(AgentId),
    /// An admin, with the name given when the certificate was made.
    Admin(String),
}

/// What a certificate says that TLS has verified.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PeerCertificate {
    /// Who it names.
    pub identity: PeerIdentity,
    /// Its serial number.
    pub serial: Vec<u8>,
}

impl PeerCertificate {
    /// Reads a certificate. `None` when it names nobody, or more than one.
    #[must_use]
    pub fn read(certificate: &CertificateDer<'_>) -> Option<Self> {
        let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
        let names = certificate.subject_alternative_name().ok()??;
        let [GeneralName::URI(uri)] = names.value.general_names.as_slice() else {
            return None;
        };
        let identity = match uri.strip_prefix(AGENT) {
            Some(agent) => PeerIdentity::Agent(agent.parse().ok()?),
            None => PeerIdentity::Admin(uri.strip_prefix(ADMIN)?.to_owned()),
        };
        Some(Self {
            identity,
            serial: certificate.raw_serial().to_vec(),
        })
    }
}

pub(super) fn agent_uri(agent: AgentId) -> String {
    format!("{AGENT}{agent}")
}

/// A name as a part of a URN: whatever else than a letter, digit, dot or hyphen becomes a hyphen.
pub(super) fn admin_uri(name: &str) -> String {
    let plain = |c: char| {
        if c.is_ascii_alphanumeric() || c == '.' {
            c
        } else {
            '-'
        }
    };
    format!("{ADMIN}{}", name.chars().map(plain).collect::<String>())
}

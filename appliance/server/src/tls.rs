//! TLS 1.3, and nothing older, with the appliance's own authority on both sides.

use std::sync::Arc;

use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use rustls_pki_types::CertificateDer;

use crate::ca::{Authority, PeerCertificate, ServerIdentity};

/// Whether a client must show a certificate.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ClientAuth {
    /// The data service: nobody unknown gets past the handshake.
    Required,
    /// The control service: enrolment has none yet.
    Optional,
}

/// Makes the TLS settings of a service.
///
/// # Errors
/// When the authority's certificate cannot be an anchor of trust.
pub fn server_config(
    authority: &Authority,
    identity: Arc<ServerIdentity>,
    client_auth: ClientAuth,
) -> Result<Arc<ServerConfig>, rustls::Error> {
    let mut roots = RootCertStore::empty();
    roots.add(authority.certificate().clone())?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider));
    let verifier = match client_auth {
        ClientAuth::Required => verifier,
        ClientAuth::Optional => verifier.allow_unauthenticated(),
    };
    let verifier = verifier
        .build()
        .map_err(|error| rustls::Error::General(error.to_string()))?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(identity);
    // A session that is resumed would outlive its certificate.
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// Reads who the client of a finished handshake is.
#[must_use]
pub fn peer(connection: &rustls::ServerConnection) -> Option<PeerCertificate> {
    let certificate: &CertificateDer<'_> = connection.peer_certificates()?.first()?;
    PeerCertificate::read(certificate)
}

/// Says whether a failed handshake was for a certificate that has expired.
#[must_use]
pub fn is_expired(error: &std::io::Error) -> bool {
    let source = error
        .get_ref()
        .and_then(|source| source.downcast_ref::<rustls::Error>());
    matches!(
        source,
        Some(rustls::Error::InvalidCertificate(
            rustls::CertificateError::Expired | rustls::CertificateError::ExpiredContext { .. }
        ))
    )
}

//! TLS 1.3 towards the appliance: pinned to its own authority, never to public ones. The name in
//! the certificate does not matter, since nobody else holds one of that authority.

use std::path::Path;
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};

use crate::error::AgentError;

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

fn tls(error: impl core::fmt::Display) -> AgentError {
    AgentError::Tls {
        what: error.to_string(),
    }
}

/// The verifier of one authority.
fn verifier_of(authority: CertificateDer<'static>) -> Result<Arc<WebPkiServerVerifier>, Error> {
    let mut roots = RootCertStore::empty();
    roots.add(authority)?;
    WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider())
        .build()
        .map_err(|error| Error::General(error.to_string()))
}

fn ignore_name(result: Result<ServerCertVerified, Error>) -> Result<ServerCertVerified, Error> {
    match result {
        Err(Error::InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        )) => Ok(ServerCertVerified::assertion()),
        other => other,
    }
}

/// Whom an agent trusts.
#[derive(Debug)]
enum Anchor {
    /// This authority.
    Authority(Arc<WebPkiServerVerifier>),
    /// The authority whose certificate has this BLAKE3 hash; it comes with the chain.
    Fingerprint([u8; 32]),
}

#[derive(Debug)]
struct Pinned {
    anchor: Anchor,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let verifier = match &self.anchor {
            Anchor::Authority(verifier) => Arc::clone(verifier),
            Anchor::Fingerprint(fingerprint) => {
                let is_it = |der: &&CertificateDer<'_>| blake3::hash(der) == *fingerprint;
                let authority = intermediates
                    .iter()
                    .find(is_it)
                    .ok_or(Error::InvalidCertificate(CertificateError::UnknownIssuer))?;
                verifier_of(authority.clone().into_owned())?
            }
        };
        ignore_name(verifier.verify_server_cert(
            end_entity,
            intermediates,
            server_name,
            ocsp_response,
            now,
        ))
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.2 is not spoken".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}

type WantsCertificate = rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert>;

fn builder(anchor: Anchor) -> Result<WantsCertificate, AgentError> {
    let provider = provider();
    let pinned = Pinned {
        anchor,
        provider: Arc::clone(&provider),
    };
    Ok(ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(tls)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(pinned)))
}

/// For the first contact: trusts the authority that the token names, shows no certificate.
///
/// # Errors
/// When the settings do not fit together.
pub fn enrolment_config(fingerprint: [u8; 32]) -> Result<Arc<ClientConfig>, AgentError> {
    Ok(Arc::new(
        builder(Anchor::Fingerprint(fingerprint))?.with_no_client_auth(),
    ))
}

/// For all later contacts: trusts the authority on file, shows the agent's certificate.
///
/// # Errors
/// When one of the three files cannot be read or used.
pub fn agent_config(
    authority: &Path,
    certificate: &Path,
    key: &Path,
) -> Result<Arc<ClientConfig>, AgentError> {
    let wrong = |path: &Path, error: rustls_pki_types::pem::Error| match error {
        rustls_pki_types::pem::Error::Io(source) => AgentError::file("read", path)(source),
        error => AgentError::Damaged {
            path: path.to_owned(),
            what: format!("{error:?}"),
        },
    };
    let anchor = CertificateDer::from_pem_file(authority).map_err(|e| wrong(authority, e))?;
    let anchor = Anchor::Authority(verifier_of(anchor).map_err(tls)?);
    let chain = CertificateDer::pem_file_iter(certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| wrong(certificate, error))?;
    let key = PrivateKeyDer::from_pem_file(key).map_err(|error| wrong(key, error))?;
    let config = builder(anchor)?
        .with_client_auth_cert(chain, key)
        .map_err(tls)?;
    Ok(Arc::new(config))
}

/// What the appliance is called in a handshake.
///
/// # Errors
/// When the host is neither a name nor an address.
pub fn server_name(host: &str) -> Result<ServerName<'static>, AgentError> {
    ServerName::try_from(host.to_owned()).map_err(tls)
}

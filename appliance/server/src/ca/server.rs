//! The appliance's own certificate, renewed while it runs.

use std::sync::Arc;
use std::time::Duration;

use afterimage_blockdev::{Clock, Entropy, Timestamp};
use parking_lot::Mutex;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls_pki_types::PrivateKeyDer;

use super::authority::{Authority, CaError, Lifetime};

struct Current {
    key: Arc<CertifiedKey>,
    renew_at: Timestamp,
}

/// Gives each handshake a certificate that holds. It is made anew at every start, and again when
/// two thirds of its lifetime are over; its key never touches a disk.
pub struct ServerIdentity {
    authority: Arc<Authority>,
    names: Vec<String>,
    ttl: Duration,
    clock: Arc<dyn Clock>,
    entropy: Arc<dyn Entropy>,
    current: Mutex<Current>,
}

impl ServerIdentity {
    /// Makes the first certificate.
    ///
    /// # Errors
    /// [`CaError`], when a name is none for instance.
    pub fn new(
        authority: Arc<Authority>,
        names: Vec<String>,
        ttl: Duration,
        clock: Arc<dyn Clock>,
        entropy: Arc<dyn Entropy>,
    ) -> Result<Self, CaError> {
        let current = issue(&authority, &names, ttl, clock.wall(), &*entropy)?;
        Ok(Self {
            authority,
            names,
            ttl,
            clock,
            entropy,
            current: Mutex::new(current),
        })
    }

    fn key(&self) -> Arc<CertifiedKey> {
        let mut current = self.current.lock();
        let now = self.clock.wall();
        if now >= current.renew_at {
            match issue(&self.authority, &self.names, self.ttl, now, &*self.entropy) {
                Ok(new) => *current = new,
                Err(error) => tracing::error!(%error, "the appliance's certificate is not renewed"),
            }
        }
        Arc::clone(&current.key)
    }
}

fn issue(
    authority: &Authority,
    names: &[String],
    ttl: Duration,
    now: Timestamp,
    entropy: &dyn Entropy,
) -> Result<Current, CaError> {
    let lifetime = Lifetime::from_now(now, ttl);
    let (issued, key) = authority.issue_server(names, lifetime, entropy)?;
    let unusable = |_| CaError::Sign {
        source: rcgen::Error::CouldNotParseKeyPair,
    };
    let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(|_| CaError::Sign {
        source: rcgen::Error::CouldNotParseKeyPair,
    })?;
    let key = rustls::crypto::aws_lc_rs::sign::any_supported_type(&key).map_err(unusable)?;
    // The authority's certificate goes along, so that an agent can compare its fingerprint.
    let chain = vec![issued.certificate, authority.certificate().clone()];
    let renew_at = Timestamp(now.0 + (issued.expires.0 - now.0) / 3 * 2);
    Ok(Current {
        key: Arc::new(CertifiedKey::new(chain, key)),
        renew_at,
    })
}

impl ResolvesServerCert for ServerIdentity {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.key())
    }
}

impl std::fmt::Debug for ServerIdentity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServerIdentity")
            .field("names", &self.names)
            .finish_non_exhaustive()
    }
}

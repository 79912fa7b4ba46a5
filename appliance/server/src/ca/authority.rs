//! The authority's key and certificate, and what it signs.

use std::io::{self, Write};
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use afterimage_blockdev::{AgentId, Entropy, ErrorClass, Timestamp, clock::nanoseconds};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData,
    SanType, SerialNumber,
};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;

use super::identity::{admin_uri, agent_uri};

/// Clocks of agents may be behind by this much.
const SKEW: Duration = Duration::from_secs(3600);
/// Lifetime of the authority's own certificate.
const AUTHORITY_TTL: Duration = Duration::from_secs(20 * 365 * 86_400);
const NAME: &str = "Afterimage appliance authority";
const CERTIFICATE_FILE: &str = "authority.pem";
const KEY_FILE: &str = "authority.key";

/// What went wrong with a certificate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CaError {
    /// A file of the authority cannot be read or written.
    #[error("{operation} of {}: {source}", path.display())]
    File {
        /// What was tried.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// Half of the authority is there.
    #[error("{} is missing, while the rest of the authority is there", path.display())]
    Half {
        /// The file that is missing.
        path: PathBuf,
    },
    /// The authority's files are damaged.
    #[error("the authority in {} cannot be used: {source}", path.display())]
    Unusable {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: rcgen::Error,
    },
    /// A signing request is malformed or not signed by its key.
    #[error("the certificate request is not acceptable: {source}")]
    Request {
        /// Why.
        source: rcgen::Error,
    },
    /// A name is no DNS name.
    #[error("{name:?} is neither a DNS name nor an IP address")]
    Name {
        /// The name.
        name: String,
    },
    /// Signing failed.
    #[error("cannot sign a certificate: {source}")]
    Sign {
        /// Why.
        source: rcgen::Error,
    },
}

impl CaError {
    /// How to go on.
    #[must_use]
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::Request { .. } | Self::Name { .. } => ErrorClass::Refused,
            _ => ErrorClass::Operator,
        }
    }
}

/// From when and until when a certificate holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Lifetime {
    /// First instant.
    pub from: Timestamp,
    /// Last instant.
    pub until: Timestamp,
}

impl Lifetime {
    /// From now on for `ttl`, and a little before for clocks that are behind.
    #[must_use]
    pub fn from_now(now: Timestamp, ttl: Duration) -> Self {
        let from = Timestamp(now.0.saturating_sub(nanoseconds(SKEW)));
        Self {
            from,
            until: Timestamp(now.0.saturating_add(nanoseconds(ttl))),
        }
    }
}

/// A certificate that was just signed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Issued {
    /// PEM.
    pub certificate_pem: String,
    /// DER.
    pub certificate: CertificateDer<'static>,
    /// Its serial number.
    pub serial: [u8; 16],
    /// When it expires.
    pub expires: Timestamp,
}

/// The authority.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    certificate_pem: String,
}

impl Authority {
    /// Reads the authority of a data directory, or makes it at the first start.
    ///
    /// # Errors
    /// [`CaError`]. A damaged or half authority is never replaced: all agents rest on it.
    ///
    /// # Durability
    /// Key and certificate are durable when this returns.
    pub fn open(directory: &Path, now: Timestamp, entropy: &dyn Entropy) -> Result<Self, CaError> {
        let (certificate_path, key_path) =
            (directory.join(CERTIFICATE_FILE), directory.join(KEY_FILE));
        match (certificate_path.exists(), key_path.exists()) {
            (true, true) => {}
            // The certificate is written last, so that a key alone was never used.
            (false, _) => Self::create(directory, now, entropy)?,
            (true, false) => return Err(CaError::Half { path: key_path }),
        }
        let read = |path: &Path| {
            std::fs::read_to_string(path).map_err(|source| file_error("reading", path, source))
        };
        Self::from_pem(&read(&certificate_path)?, &read(&key_path)?).map_err(|source| {
            CaError::Unusable {
                path: directory.to_owned(),
                source,
            }
        })
    }

    fn create(directory: &Path, now: Timestamp, entropy: &dyn Entropy) -> Result<(), CaError> {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(|source| file_error("making", directory, source))?;
        let sign = |source| CaError::Sign { source };
        let key = KeyPair::generate().map_err(sign)?;
        let lifetime = Lifetime::from_now(now, AUTHORITY_TTL);
        let mut params = params(lifetime, serial(entropy), NAME);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![
            KeyUsagePurpose::KeyCertSign,
            KeyUsagePurpose::DigitalSignature,
        ];
        let certificate = params.self_signed(&key).map_err(sign)?;
        write_durably(&directory.join(KEY_FILE), key.serialize_pem().as_bytes())?;
        write_durably(
            &directory.join(CERTIFICATE_FILE),
            certificate.pem().as_bytes(),
        )
    }

    fn from_pem(certificate_pem: &str, key_pem: &str) -> Result<Self, rcgen::Error> {
        let key = KeyPair::from_pem(key_pem)?;
        let certificate = CertificateDer::from_pem_slice(certificate_pem.as_bytes())
            .map_err(|_| rcgen::Error::CouldNotParseCertificate)?;
        let issuer = Issuer::from_ca_cert_der(&certificate, key)?;
        Ok(Self {
            issuer,
            certificate,
            certificate_pem: certificate_pem.to_owned(),
        })
    }

    /// The authority's certificate, DER.
    #[must_use]
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// The authority's certificate, PEM.
    #[must_use]
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// What a token carries, so that an agent knows the authority.
    #[must_use]
    pub fn fingerprint(&self) -> [u8; 32] {
        *blake3::hash(&self.certificate).as_bytes()
    }

    /// Signs an agent's request. Only its key counts: what else it asks for is ignored.
    ///
    /// # Errors
    /// [`CaError::Request`], [`CaError::Sign`].
    pub fn sign_agent(
        &self,
        request_pem: &str,
        agent: AgentId,
        lifetime: Lifetime,
        entropy: &dyn Entropy,
    ) -> Result<Issued, CaError> {
        let request = CertificateSigningRequestParams::from_pem(request_pem)
            .map_err(|source| CaError::Request { source })?;
        let name = format!("afterimage agent {agent}");
        self.sign_client(
            &request.public_key,
            &agent_uri(agent),
            &name,
            lifetime,
            entropy,
        )
    }

    /// Makes a key and a certificate for an admin; the key is given as PEM.
    ///
    /// # Errors
    /// [`CaError::Sign`].
    pub fn issue_admin(
        &self,
        name: &str,
        lifetime: Lifetime,
        entropy: &dyn Entropy,
    ) -> Result<(Issued, String), CaError> {
        let key = KeyPair::generate().map_err(|source| CaError::Sign { source })?;
        let uri = admin_uri(name);
        let subject = format!("afterimage admin {name}");
        let issued = self.sign_client(&key, &uri, &subject, lifetime, entropy)?;
        Ok((issued, key.serialize_pem()))
    }

    fn sign_client(
        &self,
        key: &impl PublicKeyData,
        uri: &str,
        subject: &str,
        lifetime: Lifetime,
        entropy: &dyn Entropy,
    ) -> Result<Issued, CaError> {
        let uri = uri.try_into().map_err(|source| CaError::Sign { source })?;
        let names = vec![SanType::URI(uri)];
        let usage = ExtendedKeyUsagePurpose::ClientAuth;
        self.sign(key, names, usage, subject, lifetime, entropy)
    }

    /// Makes a key and a certificate for the appliance's own services.
    ///
    /// # Errors
    /// [`CaError::Name`], [`CaError::Sign`].
    pub fn issue_server(
        &self,
        names: &[String],
        lifetime: Lifetime,
        entropy: &dyn Entropy,
    ) -> Result<(Issued, KeyPair), CaError> {
        let names: Result<Vec<_>, _> = names.iter().map(|name| server_name(name)).collect();
        let key = KeyPair::generate().map_err(|source| CaError::Sign { source })?;
        let usage = ExtendedKeyUsagePurpose::ServerAuth;
        let issued = self.sign(
            &key,
            names?,
            usage,
            "afterimage appliance",
            lifetime,
            entropy,
        )?;
        Ok((issued, key))
    }

    fn sign(
        &self,
        key: &impl PublicKeyData,
        names: Vec<SanType>,
        usage: ExtendedKeyUsagePurpose,
        subject: &str,
        lifetime: Lifetime,
        entropy: &dyn Entropy,
    ) -> Result<Issued, CaError> {
        let serial = serial(entropy);
        let mut params = params(lifetime, serial, subject);
        params.subject_alt_names = names;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        if usage == ExtendedKeyUsagePurpose::ClientAuth {
            // No key here enciphers another, but QEMU takes no certificate without it.
            params.key_usages.push(KeyUsagePurpose::KeyEncipherment);
        }
        params.extended_key_usages = vec![usage];
        params.use_authority_key_identifier_extension = true;
        let certificate = params
            .signed_by(key, &self.issuer)
            .map_err(|source| CaError::Sign { source })?;
        Ok(Issued {
            certificate_pem: certificate.pem(),
            certificate: certificate.der().clone(),
            serial,
            expires: lifetime.until,
        })
    }
}

fn params(lifetime: Lifetime, serial: [u8; 16], subject: &str) -> CertificateParams {
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    let whole = |time: Timestamp| epoch + Duration::from_secs(time.0 / 1_000_000_000);
    let mut params = CertificateParams::default();
    params.not_before = whole(lifetime.from);
    params.not_after = whole(lifetime.until);
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, subject);
    params
}

/// A random serial number that is positive and has no leading zero, so that it has one encoding.
fn serial(entropy: &dyn Entropy) -> [u8; 16] {
    let mut serial = [0; 16];
    entropy.fill(&mut serial);
    serial[0] = serial[0] & 0x3F | 0x40;
    serial
}

fn server_name(name: &str) -> Result<SanType, CaError> {
    if let Ok(address) = name.parse::<IpAddr>() {
        return Ok(SanType::IpAddress(address));
    }
    let is_legal = !name.is_empty()
        && name.len() <= 253
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b".-_*".contains(&byte));
    let wrong = || CaError::Name {
        name: name.to_owned(),
    };
    if !is_legal {
        return Err(wrong());
    }
    name.try_into().map(SanType::DnsName).map_err(|_| wrong())
}

fn file_error(operation: &'static str, path: &Path, source: io::Error) -> CaError {
    CaError::File {
        operation,
        path: path.to_owned(),
        source,
    }
}

/// Writes a secret file beside its place, and renames it: a crash leaves the whole or nothing.
fn write_durably(path: &Path, bytes: &[u8]) -> Result<(), CaError> {
    let wrong = |source| file_error("writing", path, source);
    let directory = path.parent().unwrap_or(Path::new("."));
    let beside = path.with_extension("new");
    if let Err(error) = std::fs::remove_file(&beside)
        && error.kind() != io::ErrorKind::NotFound
    {
        return Err(wrong(error));
    }
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&beside)
        .map_err(wrong)?;
    file.write_all(bytes)
        .and_then(|()| file.sync_all())
        .map_err(wrong)?;
    std::fs::rename(&beside, path).map_err(wrong)?;
    std::fs::File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(wrong)
}

//! TLS on TCP: with the right certificate, with a wrong one, and without.

use std::path::Path;
use std::sync::Arc;

use afterimage_blockdev::{BlockDevice, MemoryDevice};
use afterimage_nbd::ServerSettings;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose,
};
use rustls::RootCertStore;
use rustls::server::WebPkiClientVerifier;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

use crate::rig::{Rig, attempt, export_of, require, run, text};

type Authority = CertifiedIssuer<'static, KeyPair>;

fn authority(name: &str) -> Authority {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

fn leaf(issuer: &Authority, purpose: ExtendedKeyUsagePurpose) -> (rcgen::Certificate, KeyPair) {
    let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    params.extended_key_usages = vec![purpose];
    // As QEMU wants it of every certificate, whatever its key.
    params.key_usages = vec![
        KeyUsagePurpose::DigitalSignature,
        KeyUsagePurpose::KeyEncipherment,
    ];
    let key = KeyPair::generate().unwrap();
    (params.signed_by(&key, issuer).unwrap(), key)
}

fn server_config(issuer: &Authority) -> Arc<rustls::ServerConfig> {
    let (certificate, key) = leaf(issuer, ExtendedKeyUsagePurpose::ServerAuth);
    let mut roots = RootCertStore::empty();
    roots
        .add(CertificateDer::from(issuer.der().to_vec()))
        .unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
            .build()
            .unwrap();
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_client_cert_verifier(verifier)
        .with_single_cert(
            vec![certificate.der().clone()],
            PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
        )
        .unwrap();
    Arc::new(config)
}

/// A directory as QEMU and libnbd want it.
fn credentials(directory: &Path, trusted: &Authority, issuer: &Authority) {
    std::fs::create_dir(directory).unwrap();
    let (certificate, key) = leaf(issuer, ExtendedKeyUsagePurpose::ClientAuth);
    let write = |name: &str, pem: String| std::fs::write(directory.join(name), pem).unwrap();
    write("ca-cert.pem", trusted.pem());
    write("client-cert.pem", certificate.pem());
    write("client-key.pem", key.serialize_pem());
}

fn rig(issuer: &Authority, admits: bool) -> Rig {
    let device = MemoryDevice::new(8 << 20, 512);
    let export = export_of(Arc::clone(&device) as Arc<dyn BlockDevice>);
    let tls = Some(server_config(issuer));
    Rig::with(device, export, admits, tls, ServerSettings::default())
}

fn qemu_arguments(directory: &Path, port: u16, command: &str) -> Vec<String> {
    let object = format!(
        "tls-creds-x509,id=tls0,endpoint=client,dir={}",
        directory.display()
    );
    let disk = format!(
        "driver=nbd,host=localhost,port={port},export=disk,tls-creds=tls0,tls-hostname=localhost"
    );
    ["--object", &object, "--image-opts", "-c", command, &disk]
        .map(str::to_owned)
        .to_vec()
}

fn qemu_io(arguments: &[String]) -> (bool, String) {
    let borrowed: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let output = attempt("qemu-io", &borrowed);
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    (output.status.success() && !text.contains("failed"), text)
}

#[test]
fn the_right_certificate_opens_and_others_do_not() {
    require(&["qemu-io", "nbdcopy", "nbdinfo"]);
    let (ours, theirs) = (authority("ours"), authority("theirs"));
    let rig = rig(&ours, true);
    let port = rig.port.unwrap();
    let right = rig.path("right");
    credentials(&right, &ours, &ours);
    let command = "write -P 5 0 4M";
    let (is_good, said) = qemu_io(&qemu_arguments(&right, port, command));
    assert!(is_good, "{said}");
    let (is_good, said) = qemu_io(&qemu_arguments(&right, port, "read -P 5 0 4M"));
    assert!(is_good, "{said}");
    let uri = format!(
        "nbds://localhost:{port}/disk?tls-certificates={}",
        right.display()
    );
    let copy = text(&rig.path("copy.img"));
    run("nbdcopy", &["-C", "4", &uri, &copy]);
    assert!(std::fs::read(&copy).unwrap() == rig.device.image());
    run("nbdcopy", &["-C", "4", &copy, &uri]);

    let wrong = rig.path("wrong");
    credentials(&wrong, &ours, &theirs);
    let (is_good, said) = qemu_io(&qemu_arguments(&wrong, port, "read 0 512"));
    assert!(!is_good, "a stranger's certificate went through: {said}");
    // And without TLS nothing is told, not even which exports there are.
    let plain = format!("nbd://localhost:{port}");
    let listed = attempt("nbdinfo", &["--list", &plain]);
    assert!(!listed.status.success());
    assert!(!String::from_utf8_lossy(&listed.stdout).contains("disk"));
    let opened = attempt("nbdinfo", &[&format!("{plain}/disk")]);
    assert!(!opened.status.success(), "it went through in the clear");
    // The others still get in.
    let (is_good, said) = qemu_io(&qemu_arguments(&right, port, "read -P 5 0 4M"));
    assert!(is_good, "{said}");
}

#[test]
fn who_is_known_but_not_admitted_gets_a_reason() {
    require(&["qemu-io"]);
    let ours = authority("ours");
    let rig = rig(&ours, false);
    let right = rig.path("right");
    credentials(&right, &ours, &ours);
    let arguments = qemu_arguments(&right, rig.port.unwrap(), "read 0 512");
    let (is_good, said) = qemu_io(&arguments);
    assert!(!is_good && said.contains("nobody is let in"), "{said}");
}

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use afterimage_blockdev::{AgentId, SystemEntropy, Timestamp};

use super::*;
use crate::testing::request;

const NOW: Timestamp = Timestamp(1_800_000_000_000_000_000);

fn authority(directory: &std::path::Path) -> Authority {
    Authority::open(directory, NOW, &SystemEntropy).unwrap()
}

#[test]
fn the_authority_is_made_once_and_its_key_is_secret() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ca");
    let first = authority(&path).fingerprint();
    assert_eq!(authority(&path).fingerprint(), first);
    for file in ["authority.key", "authority.pem"] {
        let mode = std::fs::metadata(path.join(file))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600, "{file}");
    }
}

#[test]
fn a_half_or_damaged_authority_is_never_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    authority(path);
    let certificate = std::fs::read(path.join("authority.pem")).unwrap();
    std::fs::remove_file(path.join("authority.key")).unwrap();
    assert!(matches!(
        Authority::open(path, NOW, &SystemEntropy),
        Err(CaError::Half { .. })
    ));
    std::fs::write(path.join("authority.key"), "nonsense").unwrap();
    assert!(matches!(
        Authority::open(path, NOW, &SystemEntropy),
        Err(CaError::Unusable { .. })
    ));
    assert_eq!(
        std::fs::read(path.join("authority.pem")).unwrap(),
        certificate
    );
}

#[test]
fn a_start_that_died_before_the_certificate_is_made_up_for() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("authority.key"), "half").unwrap();
    std::fs::write(directory.path().join("authority.new"), "half").unwrap();
    authority(directory.path());
}

#[test]
fn certificates_say_who_they_are_for_and_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    let authority = authority(directory.path());
    let lifetime = Lifetime::from_now(NOW, Duration::from_secs(60));
    let agent = AgentId([4; 16]);
    let (_, pem) = request();
    let issued = authority
        .sign_agent(&pem, agent, lifetime, &SystemEntropy)
        .unwrap();
    let read = PeerCertificate::read(&issued.certificate).unwrap();
    assert_eq!(read.identity, PeerIdentity::Agent(agent));
    assert_eq!(read.serial, issued.serial);
    let (issued, _) = authority
        .issue_admin("eve/urn:x", lifetime, &SystemEntropy)
        .unwrap();
    let read = PeerCertificate::read(&issued.certificate).unwrap();
    assert_eq!(read.identity, PeerIdentity::Admin("eve-urn-x".to_owned()));
    assert!(PeerCertificate::read(authority.certificate()).is_none());
}

#[test]
fn wrong_requests_and_names_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let authority = authority(directory.path());
    let lifetime = Lifetime::from_now(NOW, Duration::from_secs(60));
    let error = authority.sign_agent("nonsense", AgentId([4; 16]), lifetime, &SystemEntropy);
    assert!(matches!(error, Err(CaError::Request { .. })));
    let (_, pem) = request();
    let damaged = pem.replacen('A', "B", 3);
    assert!(
        authority
            .sign_agent(&damaged, AgentId([4; 16]), lifetime, &SystemEntropy)
            .is_err()
    );
    for name in ["", "a b", "ü"] {
        let names = [name.to_owned()];
        let error = authority.issue_server(&names, lifetime, &SystemEntropy);
        assert!(matches!(error, Err(CaError::Name { .. })), "{name:?}");
    }
}

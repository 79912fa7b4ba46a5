use afterimage_blockdev::{AgentId, MachineId, Timestamp};

use super::*;
use crate::ca::PeerIdentity;

const NOW: Timestamp = Timestamp(1_000_000);
const LATER: Timestamp = Timestamp(2_000_000);
const AGENT: AgentId = AgentId([1; 16]);
const OTHER: AgentId = AgentId([2; 16]);
const MACHINE: MachineId = MachineId([3; 16]);

fn catalogue(directory: &tempfile::TempDir) -> Catalogue {
    Catalogue::open(&directory.path().join("catalogue.db"), 5).unwrap()
}

fn certificate(serial: u8) -> NewCertificate {
    NewCertificate {
        serial: vec![serial; 16],
        expires: LATER,
    }
}

fn enrol(
    catalogue: &Catalogue,
    token: u8,
    agent: AgentId,
    now: Timestamp,
) -> Result<Enrolment, CatalogueError> {
    let secret = [token; 32];
    catalogue.enrol(&secret, agent, MACHINE, "web", &certificate(token), now)
}

#[test]
fn a_token_is_used_once_and_in_time() {
    let directory = tempfile::tempdir().unwrap();
    let catalogue = catalogue(&directory);
    for token in [1, 2] {
        catalogue.add_token(&[token; 32], NOW, LATER).unwrap();
    }
    assert!(matches!(
        enrol(&catalogue, 9, AGENT, NOW),
        Err(CatalogueError::TokenUnknown)
    ));
    assert!(matches!(
        enrol(&catalogue, 1, AGENT, LATER),
        Err(CatalogueError::TokenExpired)
    ));
    assert_eq!(enrol(&catalogue, 1, AGENT, NOW).unwrap().holder, AGENT);
    assert!(matches!(
        enrol(&catalogue, 1, AGENT, NOW),
        Err(CatalogueError::TokenUsed)
    ));
    assert!(matches!(
        catalogue.check_token(&[1; 32], NOW),
        Err(CatalogueError::TokenUsed)
    ));
    // The machine stays with whoever holds it.
    assert_eq!(enrol(&catalogue, 2, OTHER, NOW).unwrap().holder, AGENT);
    assert_eq!(
        catalogue.grant(MACHINE, OTHER).unwrap(),
        Grant::HeldByOther(AGENT)
    );
}

#[test]
fn a_name_belongs_to_one_machine_until_its_agent_is_revoked() {
    let directory = tempfile::tempdir().unwrap();
    let catalogue = catalogue(&directory);
    for token in [1, 2] {
        catalogue.add_token(&[token; 32], NOW, LATER).unwrap();
    }
    enrol(&catalogue, 1, AGENT, NOW).unwrap();
    let second = MachineId([4; 16]);
    let enrol_second = || catalogue.enrol(&[2; 32], OTHER, second, "web", &certificate(2), NOW);
    let error = enrol_second().unwrap_err();
    let text = format!("{error}; {}", error.hint());
    assert!(
        text.contains("named web") && text.contains(&AGENT.to_string()) && text.contains("revoke"),
        "{text}"
    );
    // Nothing has changed: the token is good, the agent unknown.
    assert_eq!(catalogue.agents().unwrap().len(), 1);
    catalogue.revoke(AGENT, NOW).unwrap();
    assert_eq!(enrol_second().unwrap().holder, OTHER);
    assert_eq!(catalogue.machines().unwrap(), [(second, "web".to_owned())]);
    assert_eq!(catalogue.grant(MACHINE, AGENT).unwrap(), Grant::Nobody);
}

#[test]
fn a_machine_moves_to_an_agent_that_is_known() {
    let directory = tempfile::tempdir().unwrap();
    let catalogue = catalogue(&directory);
    assert_eq!(catalogue.grant(MACHINE, AGENT).unwrap(), Grant::Nobody);
    let error = catalogue.move_machine(MACHINE, OTHER, NOW).unwrap_err();
    assert!(matches!(error, CatalogueError::NoAgent { .. }));
    for (token, agent) in [(1, AGENT), (2, OTHER)] {
        catalogue.add_token(&[token; 32], NOW, LATER).unwrap();
        enrol(&catalogue, token, agent, NOW).unwrap();
    }
    let moved = catalogue.move_machine(MACHINE, OTHER, NOW).unwrap();
    assert_eq!(moved.before, Some(AGENT));
    assert_eq!(catalogue.grant(MACHINE, OTHER).unwrap(), Grant::Held);
    assert_eq!(
        catalogue.grant(MACHINE, AGENT).unwrap(),
        Grant::HeldByOther(OTHER)
    );
    assert_eq!(catalogue.machines().unwrap(), [(MACHINE, "web".to_owned())]);
}

#[test]
fn revoking_ends_all_certificates_of_an_agent_for_good() {
    let directory = tempfile::tempdir().unwrap();
    let catalogue = catalogue(&directory);
    catalogue.add_token(&[1; 32], NOW, LATER).unwrap();
    enrol(&catalogue, 1, AGENT, NOW).unwrap();
    catalogue.renew(AGENT, &certificate(7), NOW).unwrap();
    let identity = PeerIdentity::Agent(AGENT);
    assert!(catalogue.is_valid(&[7; 16], &identity).unwrap());
    assert!(
        !catalogue
            .is_valid(&[7; 16], &PeerIdentity::Agent(OTHER))
            .unwrap()
    );
    assert!(
        !catalogue
            .is_valid(&[7; 16], &PeerIdentity::Admin("x".to_owned()))
            .unwrap()
    );
    assert!(!catalogue.is_valid(&[8; 16], &identity).unwrap());
    assert!(!catalogue.agents().unwrap()[0].is_revoked);
    catalogue.revoke(AGENT, NOW).unwrap();
    assert!(catalogue.agents().unwrap()[0].is_revoked);
    for serial in [1, 7] {
        assert!(!catalogue.is_valid(&[serial; 16], &identity).unwrap());
    }
    let error = catalogue.renew(AGENT, &certificate(8), NOW).unwrap_err();
    assert!(matches!(error, CatalogueError::AgentRevoked { .. }));
    let error = catalogue.revoke(OTHER, NOW).unwrap_err();
    assert!(matches!(error, CatalogueError::NoAgent { .. }));
}

#[test]
fn events_are_bounded_and_all_of_it_survives_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    {
        let catalogue = catalogue(&directory);
        catalogue.add_admin("eve", &certificate(4), NOW).unwrap();
        for number in 0..12 {
            catalogue
                .add_event(NOW, "test", &format!("event {number}"))
                .unwrap();
        }
    }
    let catalogue = catalogue(&directory);
    assert!(
        catalogue
            .is_valid(&[4; 16], &PeerIdentity::Admin("eve".to_owned()))
            .unwrap()
    );
    let events = catalogue.events(0, 100).unwrap();
    let numbers: Vec<u64> = events.iter().map(|event| event.number).collect();
    assert_eq!(numbers, [8, 9, 10, 11, 12]);
    assert_eq!(events[4].text, "event 11");
    assert_eq!(catalogue.events(10, 1).unwrap().len(), 1);
}

#[test]
fn a_newer_catalogue_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    drop(catalogue(&directory));
    let path = directory.path().join("catalogue.db");
    let connection = rusqlite::Connection::open(&path).unwrap();
    connection.pragma_update(None, "user_version", 99).unwrap();
    drop(connection);
    let error = Catalogue::open(&path, 5).map(|_| ()).unwrap_err();
    assert!(matches!(error, CatalogueError::Newer { found: 99, .. }));
    assert!(error.to_string().contains("version 99"));
}

//! Whether a carrier may write for a machine.

use afterimage_blockdev::{AgentId, ErrorClass};
use afterimage_protocol::receiver::StreamIdentity;
use afterimage_protocol::{Refusal, RefusalCode};

use crate::ca::{PeerCertificate, PeerIdentity};
use crate::catalogue::{Catalogue, CatalogueError, Grant};

/// The certificate says who a carrier is; the catalogue, what they may do.
pub(super) async fn authorize(
    catalogue: &Catalogue,
    certificate: &PeerCertificate,
    identity: StreamIdentity,
    machine: &str,
) -> Result<(), Refusal> {
    let PeerIdentity::Agent(agent) = certificate.identity else {
        return Err(no_grant(
            "an admin's certificate may not write change records".to_owned(),
        ));
    };
    if agent != identity.origin {
        return Err(no_grant(format!(
            "agent {agent} may not carry records of agent {}",
            identity.origin
        )));
    }
    let certificate = certificate.clone();
    let grant = catalogue.run(move |catalogue| {
        if !catalogue.is_valid(&certificate.serial, &certificate.identity)? {
            return Ok(None);
        }
        catalogue.grant(identity.machine, agent).map(Some)
    });
    match grant.await {
        Ok(Some(Grant::Held)) => Ok(()),
        Ok(Some(Grant::HeldByOther(holder))) => Err(held_by_other(machine, agent, holder)),
        Ok(Some(Grant::Nobody)) => Err(no_grant(format!(
            "agent {agent} has no grant for machine {machine}"
        ))),
        Ok(None) => Err(revoked(agent)),
        Err(error) => Err(catalogue_failed(&error)),
    }
}

/// The agent's certificates are worthless.
pub(crate) fn revoked(agent: AgentId) -> Refusal {
    Refusal {
        code: RefusalCode::NoGrant,
        class: ErrorClass::Refused,
        message: format!("the certificate of agent {agent} was revoked"),
        hint: "enrol again with an empty state directory, a new token (`aft token create` at the \
               appliance) and another --machine-name; what is kept stays under the old name"
            .to_owned(),
    }
}

fn no_grant(message: String) -> Refusal {
    Refusal {
        code: RefusalCode::NoGrant,
        class: ErrorClass::Refused,
        message,
        hint: "enrol with a new token (`aft token create` at the appliance), or grant the machine \
               with `aft machine move`"
            .to_owned(),
    }
}

/// Another agent holds the machine.
pub(crate) fn held_by_other(machine: &str, agent: AgentId, holder: AgentId) -> Refusal {
    Refusal {
        code: RefusalCode::HeldByOther,
        class: ErrorClass::Refused,
        message: format!("machine {machine} is held by agent {holder}, not by agent {agent}"),
        hint: format!("give it over with `aft machine move {machine} {agent}` at the appliance"),
    }
}

fn catalogue_failed(error: &CatalogueError) -> Refusal {
    Refusal {
        code: RefusalCode::Log,
        class: error.class(),
        message: error.to_string(),
        hint: "look into the log of afterimaged".to_owned(),
    }
}

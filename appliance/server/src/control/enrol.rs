//! Tokens, certificates and agents.

use std::sync::Arc;

use afterimage_blockdev::{AgentId, ErrorClass, MachineId, Timestamp};
use afterimage_protocol::message::NAME_BYTES_MAX;
use afterimage_protocol::rest::server::{
    AdminIdentity, Agent, CreateToken, Enrol, Enrolled, IssueAdmin, Renew, Renewed, Token,
};
use afterimage_protocol::rest::token::{TokenText, parse_hex};
use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::extract::{Path, State};
use axum::http::StatusCode;

use super::access::Caller;
use super::answer::{Answer, Failure};
use crate::appliance::Appliance;
use crate::ca::{Issued, Lifetime};
use crate::catalogue::{CatalogueError, NewCertificate};
use crate::config::ms;
use crate::engine::Command;
use crate::ingest;

type Body<T> = Result<Json<T>, JsonRejection>;

fn seconds(s: u64) -> std::time::Duration {
    ms(s.saturating_mul(1000))
}

fn noted(issued: &Issued) -> NewCertificate {
    NewCertificate {
        serial: issued.serial.to_vec(),
        expires: issued.expires,
    }
}

pub(super) async fn create_token(
    State(appliance): State<Arc<Appliance>>,
    body: Body<CreateToken>,
) -> Answer<Token> {
    let Json(CreateToken { ttl_s }) = body?;
    let max = appliance.config.certificates.token_ttl_max_s;
    if ttl_s == 0 || ttl_s > max {
        return Err(Failure::refused(
            format!("a token may last from 1 to {max} seconds, not {ttl_s}"),
            "certificates.token_ttl_max_s in the configuration sets the limit",
        ));
    }
    let now = appliance.now();
    let expires = Timestamp(now.0.saturating_add(ttl_s.saturating_mul(1_000_000_000)));
    let mut secret = [0; 32];
    appliance.entropy.fill(&mut secret);
    appliance
        .catalogue
        .run(move |catalogue| catalogue.add_token(&secret, now, expires))
        .await?;
    let token = TokenText {
        secret,
        fingerprint: appliance.authority.fingerprint(),
    }
    .text();
    Ok(Json(Token { token, expires }))
}

pub(super) async fn enrol(
    State(appliance): State<Arc<Appliance>>,
    body: Body<Enrol>,
) -> Answer<Enrolled> {
    let Json(request) = body?;
    let agent = request.agent;
    match enrol_now(&appliance, request).await {
        Ok(enrolled) => Ok(Json(enrolled)),
        Err(failure) => {
            let text = format!("the enrolment of agent {agent} was refused: {failure:?}");
            appliance.events.note("enrolment-refused", text);
            Err(failure)
        }
    }
}

async fn enrol_now(appliance: &Appliance, request: Enrol) -> Result<Enrolled, Failure> {
    let Enrol {
        secret,
        agent,
        machine,
        machine_name,
        request_pem,
    } = request;
    let secret = parse_hex(&secret).ok_or_else(|| {
        Failure::refused(
            "the token is malformed",
            CatalogueError::TokenUnknown.hint(),
        )
    })?;
    check_name("machine", &machine_name)?;
    if agent.is_nil() || machine.is_nil() {
        return Err(Failure::refused("agent and machine need an identity", ""));
    }
    let now = appliance.now();
    // Nothing is signed for a token that could not be used.
    appliance
        .catalogue
        .run(move |catalogue| catalogue.check_token(&secret, now))
        .await?;
    check_stored(appliance, machine, &machine_name).await?;
    let lifetime = Lifetime::from_now(now, seconds(appliance.config.certificates.agent_ttl_s));
    let issued = appliance
        .authority
        .sign_agent(&request_pem, agent, lifetime, &*appliance.entropy)
        .map_err(|error| Failure::from(afterimage_protocol::rest::ApiError::from(error)))?;
    let (certificate, name) = (noted(&issued), machine_name.clone());
    let enrolment = appliance
        .catalogue
        .run(move |catalogue| catalogue.enrol(&secret, agent, machine, &name, &certificate, now))
        .await?;
    let text = if enrolment.holder == agent {
        format!("agent {agent} has enrolled for machine {machine_name} ({machine})")
    } else {
        format!(
            "agent {agent} has enrolled; machine {machine_name} ({machine}) stays with agent {}, \
             until `aft machine move {machine_name} {agent}`",
            enrolment.holder
        )
    };
    appliance.events.note("agent-enrolled", text);
    Ok(Enrolled {
        certificate_pem: issued.certificate_pem,
        authority_pem: appliance.authority.certificate_pem().to_owned(),
        data_port: appliance.data_port,
    })
}

/// A name under which records of another machine are kept stays that machine's.
async fn check_stored(
    appliance: &Appliance,
    machine: MachineId,
    name: &str,
) -> Result<(), Failure> {
    let status = appliance.engine.ask(Command::Status).await?;
    let mut stored = status.machines.iter();
    match stored.find(|stored| stored.name == name && stored.machine != machine) {
        None => Ok(()),
        Some(stored) => Err(Failure::refused(
            format!(
                "the appliance keeps another machine named {name} ({})",
                stored.machine
            ),
            "choose another name with --machine-name, or, if it is the same machine, put the \
             state directory of its agent back",
        )),
    }
}

fn check_name(what: &str, name: &str) -> Result<(), Failure> {
    let is_legal = !name.is_empty()
        && name.len() <= NAME_BYTES_MAX
        && !name.starts_with('.')
        && !name.contains(|c: char| c.is_control() || "/@".contains(c));
    if is_legal {
        return Ok(());
    }
    Err(Failure::refused(
        format!("{name:?} is no name of a {what}"),
        "use letters, digits, dots and hyphens",
    ))
}

pub(super) async fn renew(
    State(appliance): State<Arc<Appliance>>,
    caller: Caller,
    body: Body<Renew>,
) -> Answer<Renewed> {
    let Caller::Agent(agent) = caller else {
        return Err(Failure::new(
            StatusCode::UNAUTHORIZED,
            ErrorClass::Refused,
            "only an agent with a valid certificate can renew it",
            CatalogueError::TokenUnknown.hint(),
        ));
    };
    let Json(Renew { request_pem }) = body?;
    let now = appliance.now();
    let lifetime = Lifetime::from_now(now, seconds(appliance.config.certificates.agent_ttl_s));
    let issued = appliance
        .authority
        .sign_agent(&request_pem, agent, lifetime, &*appliance.entropy)
        .map_err(|error| Failure::from(afterimage_protocol::rest::ApiError::from(error)))?;
    let certificate = noted(&issued);
    appliance
        .catalogue
        .run(move |catalogue| catalogue.renew(agent, &certificate, now))
        .await?;
    Ok(Json(Renewed {
        certificate_pem: issued.certificate_pem,
        expires: issued.expires,
    }))
}

pub(super) async fn issue_admin(
    State(appliance): State<Arc<Appliance>>,
    caller: Caller,
    body: Body<IssueAdmin>,
) -> Answer<AdminIdentity> {
    let Json(IssueAdmin { name }) = body?;
    if caller != Caller::Local {
        return Err(Failure::new(
            StatusCode::FORBIDDEN,
            ErrorClass::Refused,
            "admins are made at the appliance itself",
            "run `aft cert issue-admin` there as root",
        ));
    }
    check_name("person", &name)?;
    let now = appliance.now();
    let lifetime = Lifetime::from_now(now, seconds(appliance.config.certificates.admin_ttl_s));
    let (issued, key_pem) = appliance
        .authority
        .issue_admin(&name, lifetime, &*appliance.entropy)
        .map_err(|error| Failure::from(afterimage_protocol::rest::ApiError::from(error)))?;
    let (certificate, admin) = (noted(&issued), name.clone());
    appliance
        .catalogue
        .run(move |catalogue| catalogue.add_admin(&admin, &certificate, now))
        .await?;
    appliance.events.note(
        "admin-issued",
        format!("an admin's certificate was made for {name}"),
    );
    Ok(Json(AdminIdentity {
        certificate_pem: issued.certificate_pem,
        key_pem,
        authority_pem: appliance.authority.certificate_pem().to_owned(),
        expires: issued.expires,
    }))
}

pub(super) async fn agents(State(appliance): State<Arc<Appliance>>) -> Answer<Vec<Agent>> {
    Ok(Json(
        appliance
            .catalogue
            .run(|catalogue| catalogue.agents())
            .await?,
    ))
}

pub(super) async fn revoke(
    State(appliance): State<Arc<Appliance>>,
    caller: Caller,
    Path(agent): Path<String>,
) -> Answer<()> {
    let agent = parse_agent(&agent)?;
    let now = appliance.now();
    appliance
        .catalogue
        .run(move |catalogue| catalogue.revoke(agent, now))
        .await?;
    appliance.live.cut_agent(agent, &ingest::revoked(agent));
    let text = format!("agent {agent} was revoked by {}", caller.name());
    appliance.events.note("agent-revoked", text);
    Ok(Json(()))
}

fn parse_agent(text: &str) -> Result<AgentId, Failure> {
    text.parse()
        .map_err(|error: afterimage_blockdev::id::ParseIdError| {
            Failure::refused(error.to_string(), "`aft agent list` shows the agents")
        })
}

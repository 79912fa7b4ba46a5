//! `aft machine`.

use afterimage_blockdev::{AgentId, ErrorClass};
use afterimage_protocol::rest::server::{MachineStatus, MoveMachine};

use crate::args::MachineCommand;
use crate::client::{Client, segment};
use crate::error::AftError;
use crate::output::Output;

pub(super) async fn run(
    command: MachineCommand,
    server: &Client,
    output: &Output,
) -> Result<(), AftError> {
    match command {
        MachineCommand::List => {
            let machines: Vec<MachineStatus> = server.get("/v1/machines").await?;
            output.answer(&machines, || super::status::machines(&machines));
        }
        MachineCommand::Move { machine, agent } => {
            let agent = parse_agent(&agent)?;
            let path = format!("/v1/machines/{}/move", segment(&machine));
            let () = server.post(&path, &MoveMachine { agent }).await?;
            output.answer(&agent, || {
                format!("machine {machine} belongs to agent {agent}; the one before is fenced")
            });
        }
    }
    Ok(())
}

pub(super) fn parse_agent(text: &str) -> Result<AgentId, AftError> {
    text.parse().map_err(|_| {
        AftError::new(
            ErrorClass::Refused,
            format!("{text:?} is no agent's identity"),
            "`aft agent list` shows the agents",
        )
    })
}

/// The machine that was named, or the only one there is.
pub(super) async fn named_or_only(
    named: Option<String>,
    server: &Client,
) -> Result<String, AftError> {
    if let Some(named) = named {
        return Ok(named);
    }
    let machines: Vec<MachineStatus> = server.get("/v1/machines").await?;
    if let [machine] = machines.as_slice() {
        return Ok(machine.machine.to_string());
    }
    let names: Vec<&str> = machines
        .iter()
        .take(10)
        .map(|machine| machine.name.as_str())
        .collect();
    Err(match names.as_slice() {
        [] => AftError::new(
            ErrorClass::Refused,
            "no machine is protected yet",
            "enrol an agent with a token of `aft token create`",
        ),
        names => AftError::new(
            ErrorClass::Refused,
            format!("there are {} machines; say which", machines.len()),
            format!("machines: {}", names.join(", ")),
        ),
    })
}

//! `aft agent`.

use std::fmt::Write;

use afterimage_protocol::rest::agent::AgentStatus;
use afterimage_protocol::rest::server::Agent;

use super::machine::parse_agent;
use crate::args::AgentCommand;
use crate::client::Client;
use crate::error::AftError;
use crate::output::{self, Output, Table};

pub(super) async fn run(
    command: AgentCommand,
    server: &Client,
    agent: &Client,
    output: &Output,
) -> Result<(), AftError> {
    match command {
        AgentCommand::Status => {
            let status: AgentStatus = agent.get("/v1/status").await?;
            output.answer(&status, || describe(&status));
        }
        AgentCommand::List => {
            let agents: Vec<Agent> = server.get("/v1/agents").await?;
            output.answer(&agents, || table(&agents));
        }
        AgentCommand::Revoke { agent } => {
            let agent = parse_agent(&agent)?;
            let () = server
                .post(
                    &format!("/v1/agents/{agent}/revoke"),
                    &serde_json::Value::Null,
                )
                .await?;
            output.answer(&agent, || format!("agent {agent} is revoked"));
        }
    }
    Ok(())
}

fn describe(status: &AgentStatus) -> String {
    let mut text = String::new();
    let connection = if status.is_connected {
        "connected"
    } else {
        "not connected"
    };
    let reason = match status.reason.as_str() {
        "" => String::new(),
        reason => format!(": {}", output::printable(reason)),
    };
    let behind = status.captured.0.saturating_sub(status.acknowledged.0);
    let _always_ok = writeln!(
        text,
        "agent {}\n  machine       {} ({})\n  appliance     {}, {connection}{reason}\n  \
         history       {}, epoch {}\n  captured      LSN {}\n  acknowledged  LSN {} ({behind} \
         behind)\n  held          {} in memory, {} in the spool\n",
        status.agent,
        output::printable(&status.machine_name),
        status.machine,
        status.server,
        status.history,
        status.epoch,
        status.captured,
        status.acknowledged,
        output::bytes(status.buffered_bytes),
        output::bytes(status.spooled_bytes),
    );
    text.push_str(&super::disk::tapped(&status.disks));
    text
}

fn table(agents: &[Agent]) -> String {
    if agents.is_empty() {
        return "No agent has enrolled yet. `aft token create` lets one.\n".to_owned();
    }
    let mut table = Table::new(&["AGENT", "ENROLLED", "CERTIFICATE UNTIL", "MACHINES"]);
    for agent in agents {
        let machines: Vec<String> = agent.machines.iter().map(ToString::to_string).collect();
        table.row([
            agent.agent.to_string(),
            output::time(agent.enrolled),
            if agent.is_revoked {
                "revoked".to_owned()
            } else {
                output::time(agent.expires)
            },
            if machines.is_empty() {
                "-".to_owned()
            } else {
                machines.join(" ")
            },
        ]);
    }
    table.text()
}

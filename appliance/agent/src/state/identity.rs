//! Who this agent is, and where its appliance is.

use afterimage_blockdev::{AgentId, HistoryId, MachineId};
use serde::{Deserialize, Serialize};

use super::{StateDir, load_json, save_json};
use crate::error::AgentError;

/// Version of `identity.json`.
const VERSION: u16 = 1;

/// Made by `enrol`; never changes afterwards.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// Version of this file.
    pub version: u16,
    /// The agent.
    pub agent: AgentId,
    /// The machine that it writes for.
    pub machine: MachineId,
    /// The machine's name.
    pub machine_name: String,
    /// The history that it writes.
    pub history: HistoryId,
    /// Host of the appliance.
    pub server_host: String,
    /// Its control port.
    pub control_port: u16,
    /// Its data port.
    pub data_port: u16,
}

impl Identity {
    /// The version that this program writes.
    pub const VERSION: u16 = VERSION;

    /// Reads the identity of a state directory.
    ///
    /// # Errors
    /// `NotEnrolled` when there is none.
    pub fn load(state: &StateDir) -> Result<Self, AgentError> {
        let path = state.path("identity.json");
        let missing = || AgentError::NotEnrolled {
            path: state.root().to_owned(),
        };
        let identity: Self = load_json(&path)?.ok_or_else(missing)?;
        if identity.version != VERSION {
            let what = format!("version {} is not known here", identity.version);
            return Err(AgentError::Damaged { path, what });
        }
        Ok(identity)
    }

    /// Writes it.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn save(&self, state: &StateDir) -> Result<(), AgentError> {
        save_json(&state.path("identity.json"), self)
    }

    /// Address of the data port.
    #[must_use]
    pub fn data_address(&self) -> String {
        address(&self.server_host, self.data_port)
    }

    /// Address of the control port.
    #[must_use]
    pub fn control_address(&self) -> String {
        address(&self.server_host, self.control_port)
    }
}

/// Puts host and port together.
#[must_use]
pub fn address(host: &str, port: u16) -> String {
    if host.contains(':') {
        format!("[{host}]:{port}")
    } else {
        format!("{host}:{port}")
    }
}

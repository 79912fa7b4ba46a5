//! The command line.

use std::path::PathBuf;

use afterimage_blockdev::ErrorClass;
use clap::{Parser, Subcommand};

use crate::error::AgentError;

const EXIT_CODES: &str = "\
Exit codes:
  0  done, or stopped in order
  1  failed, and may work at another try
  2  wrong command line or configuration
  3  refused: the same command will be refused again, or another agent runs
  4  a person must act: not root, not enrolled, no FUSE
  6  the state directory is damaged

Log messages go to standard error; AFTERIMAGE_LOG sets their level, as in AFTERIMAGE_LOG=debug.";

/// What the process ends with.
#[must_use]
pub fn exit_code(error: &AgentError) -> u8 {
    match (error, error.class()) {
        (AgentError::Config { .. }, _) => 2,
        (AgentError::Locked { .. } | AgentError::AlreadyEnrolled { .. }, _) => 3,
        (_, ErrorClass::Retry) => 1,
        (_, ErrorClass::Refused | ErrorClass::Fenced) => 3,
        (_, ErrorClass::Operator) => 4,
        (_, ErrorClass::Corrupt) => 6,
    }
}

/// Captures every write of this machine's disks and sends them to an appliance.
#[derive(Parser, Debug)]
#[command(name = "afterimage-agent", version, about, after_help = EXIT_CODES)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Makes this agent known to an appliance, with a token from `aft token create`.
    Enrol(EnrolArgs),
    /// Runs the agent.
    Run(RunArgs),
}

/// Arguments of `enrol`.
#[derive(clap::Args, Debug)]
pub struct EnrolArgs {
    /// The appliance's control port, as HOST or HOST:PORT.
    #[arg(long)]
    pub server: String,
    /// The enrolment token.
    #[arg(long, env = "AFTERIMAGE_TOKEN", hide_env_values = true)]
    pub token: String,
    /// Where the agent keeps what it must know after a restart.
    #[arg(long, default_value = "/var/lib/afterimage-agent")]
    pub state_dir: PathBuf,
    /// Name of this machine; its host name when not given.
    #[arg(long)]
    pub machine_name: Option<String>,
}

/// Arguments of `run`.
#[derive(clap::Args, Debug)]
pub struct RunArgs {
    /// Where the agent keeps what it must know after a restart.
    #[arg(long, default_value = "/var/lib/afterimage-agent")]
    pub state_dir: PathBuf,
    /// The local socket.
    #[arg(long, default_value = "/run/afterimage/agent.sock")]
    pub socket: PathBuf,
    /// Timers and limits, as TOML.
    #[arg(long)]
    pub config: Option<PathBuf>,
    /// Print the configuration with all defaults, and end
    #[arg(long)]
    pub print_config: bool,
}

/// The control port when none is given.
pub const CONTROL_PORT: u16 = 8443;

/// Takes HOST, HOST:PORT, [ADDRESS] or [ADDRESS]:PORT apart; `None` when it is none of them.
#[must_use]
pub fn split_server(text: &str) -> Option<(String, u16)> {
    if let Some(rest) = text.strip_prefix('[') {
        let (host, rest) = rest.split_once(']')?;
        let port = match rest.strip_prefix(':') {
            Some(port) => port.parse().ok()?,
            None if rest.is_empty() => CONTROL_PORT,
            None => return None,
        };
        return Some((host.to_owned(), port));
    }
    match text.rsplit_once(':') {
        Some((host, _)) if host.contains(':') => Some((text.to_owned(), CONTROL_PORT)),
        Some((host, port)) if !host.is_empty() => Some((host.to_owned(), port.parse().ok()?)),
        None if !text.is_empty() => Some((text.to_owned(), CONTROL_PORT)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_are_taken_apart() {
        let split = |text| split_server(text).map(|(host, port)| format!("{host} {port}"));
        assert_eq!(split("host").as_deref(), Some("host 8443"));
        assert_eq!(split("host:1").as_deref(), Some("host 1"));
        assert_eq!(split("::1").as_deref(), Some("::1 8443"));
        assert_eq!(split("[::1]:7").as_deref(), Some("::1 7"));
        assert_eq!(split("host:port"), None);
        assert_eq!(split(""), None);
    }
}

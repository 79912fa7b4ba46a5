//! The command line of `afterimaged`.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Parser;

const EXIT_CODES: &str = "\
Exit codes:
  0  stopped in order
  1  failed, and may work at another try
  2  wrong command line or configuration
  3  another daemon runs on the data directory
  4  a person must act: not root, no FUSE, a port in use, a data directory of a newer format
  6  the data directory is damaged

Log messages go to standard error; AFTERIMAGE_LOG sets their level, as in AFTERIMAGE_LOG=debug.";

/// The appliance: receives change records, keeps them, and shows any disk as it was.
#[derive(Parser, Clone, Debug)]
#[command(name = "afterimaged", version, after_help = EXIT_CODES)]
pub struct Args {
    /// Directory of everything that the appliance keeps
    #[arg(long, value_name = "DIR", default_value = "/var/lib/afterimage")]
    pub data_dir: PathBuf,
    /// Configuration file (TOML); without one all defaults hold
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Address of the data service [default: 0.0.0.0:9443]
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub data_listen: Option<SocketAddr>,
    /// Address of the control service [default: 0.0.0.0:8443]
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub control_listen: Option<SocketAddr>,
    /// Local socket for `aft` [default: <data-dir>/control.sock]
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Print the configuration with all defaults, and end
    #[arg(long)]
    pub print_config: bool,
}

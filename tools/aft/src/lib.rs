//! `aft`: what a person or a script says to the appliance and to the agent of this machine.
//!
//! * [`args`], [`branch_args`], [`files_args`], [`seed_args`]: the command line. [`commands`]: one
//!   file for each noun.
//! * [`offline`], [`offline_args`]: tools for a store whose daemon is stopped.
//! * [`client`]: a request over a local socket or TLS.
//! * [`output`]: tables for people, JSON for scripts, and nothing in between.

pub mod args;
pub mod branch_args;
pub mod client;
pub mod commands;
pub mod error;
pub mod files_args;
pub mod nbd_args;
pub mod offline;
pub mod offline_args;
pub mod output;
pub mod policy_args;
pub mod seed_args;
pub mod space_args;
pub mod vhost_args;

use std::process::ExitCode;

use clap::Parser;

use crate::args::Args;
use crate::output::Output;

/// Runs the program.
#[must_use]
pub fn main() -> ExitCode {
    let args = Args::parse();
    // Only TLS to a remote appliance needs one; a second installation changes nothing.
    let _installed_before = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let runtime = match tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("aft: cannot start: {error}");
            return ExitCode::from(1);
        }
    };
    let output = Output::new(args.global.json);
    match runtime.block_on(commands::run(args, &output)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            output.error(&error);
            error.exit_code()
        }
    }
}

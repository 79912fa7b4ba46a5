//! `afterimaged`: the appliance's daemon.

use std::io::IsTerminal;
use std::process::ExitCode;

use afterimage_server::args::Args;
use afterimage_server::config::Config;
use afterimage_server::failure::StartError;
use afterimage_server::{daemon, engine};
use clap::Parser;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    // One provider for the whole tree, before anything else can choose another.
    if rustls::crypto::aws_lc_rs::default_provider()
        .install_default()
        .is_err()
    {
        eprintln!("afterimaged: another TLS provider was installed first");
        return ExitCode::from(4);
    }
    let args = Args::parse();
    let filter =
        EnvFilter::try_from_env("AFTERIMAGE_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let is_terminal = std::io::stderr().is_terminal();
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(is_terminal)
        .with_writer(std::io::stderr)
        .init();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("afterimaged: {error}");
            error.exit_code()
        }
    }
}

fn run(args: &Args) -> Result<(), StartError> {
    let config = Config::load(args)?;
    if args.print_config {
        print!("{}", config.to_toml());
        return Ok(());
    }
    daemon::run(&args.data_dir, config, |data_dir, config| {
        engine::start(&config.engine_settings(data_dir))
    })
}

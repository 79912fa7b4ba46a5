//! What each command does; one file for each noun.

mod admin;
mod agent;
mod branch;
mod disk;
mod files;
mod job;
mod live_line;
mod machine;
mod mount;
mod nbd;
mod offline;
mod pace;
mod point;
mod points;
mod policy;
mod progress;
mod scrub;
mod seed;
mod space;
mod status;
mod store;
mod vhost;

use clap::CommandFactory;

use crate::args::{Args, Command, Global};
use crate::client::Client;
use crate::error::AftError;
use crate::output::Output;

/// Runs a command.
///
/// # Errors
/// What keeps it from being done.
pub async fn run(args: Args, output: &Output) -> Result<(), AftError> {
    let server = Client::server(&args.global);
    let agent = Client::agent(&args.global);
    let host = host_of(&args.global);
    match args.command {
        Command::Status => status::status(&server, output).await,
        Command::Machine(command) => machine::run(command, &server, output).await,
        Command::Disk(command) => disk::run(command, &server, &agent, output).await,
        Command::Agent(command) => agent::run(command, &server, &agent, output).await,
        Command::Point(command) => point::run(command, &server, output).await,
        Command::Policy(command) => policy::run(command, &server, output).await,
        Command::Space(command) => space::space(command, &server, output).await,
        Command::Quota(command) => space::quota(command, &server, output).await,
        Command::Mount(mount) => mount::mount(mount, &server, output).await,
        Command::Umount {
            target,
            drop_branch,
        } => mount::umount(&target, drop_branch, &server, output).await,
        Command::Branch(command) => branch::run(command, &server, output).await,
        Command::Nbd(command) => nbd::run(command, &server, host.as_deref(), output).await,
        Command::Vhost(command) => vhost::run(command, &server, output).await,
        Command::Files(command) => files::run(command, &server, output).await,
        Command::Mounts => mount::mounts(&server, output).await,
        Command::Store(command) => store::store(command, &server, output).await,
        Command::Log(command) => admin::log(command, &server, output).await,
        Command::Seed(command) => seed::run(command, &server, output).await,
        Command::Token(command) => admin::token(command, &server, output).await,
        Command::Cert(command) => admin::cert(command, &server, output).await,
        Command::Events { after, limit } => admin::events(after, limit, &server, output).await,
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Args::command(), "aft", &mut script);
            output.raw(&script);
            Ok(())
        }
        Command::Man => admin::man(output),
    }
}

/// The machine of an appliance elsewhere.
fn host_of(global: &Global) -> Option<String> {
    let (host, _) = global.server.as_deref()?.rsplit_once(':')?;
    Some(host.to_owned())
}

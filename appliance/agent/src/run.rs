//! Runs the agent, or enrols it.

use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use afterimage_blockdev::{Entropy, ErrorClass, SystemClock, SystemEntropy};
use afterimage_protocol::rest::ApiError;
use tokio::runtime::Builder;
use tokio::signal::unix::{SignalKind, signal};

use crate::cli::{EnrolArgs, RunArgs, split_server};
use crate::config::{Config, ms};
use crate::control::ControlSocket;
use crate::error::AgentError;
use crate::link::enrol::{EnrolRequest, enrol, lifetime, renew};
use crate::link::run::Target;
use crate::machine::Machine;
use crate::machine::host::Host;
use crate::machine::start::Parts;
use crate::state::StateDir;

/// Threads for the connection and the control socket.
const RUNTIME_THREADS: usize = 2;
/// How often the certificate's age is looked at.
const RENEW_LOOK: Duration = Duration::from_secs(3600);
/// How soon a failed renewal is tried again.
const RENEW_RETRY: Duration = Duration::from_secs(60);

/// How long the connection may take to end in order.
const CLOSE_WAIT: Duration = Duration::from_secs(2);

fn runtime() -> Result<tokio::runtime::Runtime, AgentError> {
    Builder::new_multi_thread()
        .worker_threads(RUNTIME_THREADS)
        .enable_all()
        .build()
        .map_err(AgentError::file("start threads in", "/"))
}

fn refused(message: String, hint: &str) -> AgentError {
    let hint = hint.to_owned();
    AgentError::Appliance(ApiError {
        class: ErrorClass::Refused,
        message,
        hint,
    })
}

/// `afterimage-agent enrol`. Returns what to tell the person.
///
/// # Errors
/// See [`enrol`].
pub fn run_enrol(args: &EnrolArgs) -> Result<String, AgentError> {
    let Some((host, port)) = split_server(&args.server) else {
        let message = format!("{:?} is not an address", args.server);
        return Err(refused(message, "give HOST or HOST:PORT"));
    };
    let machine_name = match &args.machine_name {
        Some(name) => name.clone(),
        None => {
            let path = "/proc/sys/kernel/hostname";
            let name = std::fs::read_to_string(path).map_err(AgentError::file("read", path))?;
            name.trim().to_owned()
        }
    };
    crate::machine::check_name(&machine_name)?;
    let state = StateDir::open(&args.state_dir)?;
    let timeout = ms(Config::default().link.connect_timeout_ms);
    let request = EnrolRequest {
        host,
        port,
        token: args.token.clone(),
        machine_name,
        timeout,
    };
    let identity = runtime()?.block_on(enrol(&state, request, &SystemEntropy))?;
    Ok(format!(
        "enrolled machine {} ({}) as agent {} with {}",
        identity.machine_name,
        identity.machine,
        identity.agent,
        identity.control_address()
    ))
}

/// `afterimage-agent run`. Returns after an orderly stop.
///
/// # Errors
/// Whatever keeps the agent from running.
pub fn run_agent(args: &RunArgs) -> Result<(), AgentError> {
    let config = match &args.config {
        Some(path) => Config::load(path)?,
        None => Config::default(),
    };
    if args.print_config {
        print!("{}", config.to_toml());
        return Ok(());
    }
    let is_root = std::fs::metadata("/proc/self").is_ok_and(|owner| owner.uid() == 0);
    if !is_root {
        return Err(AgentError::NotRoot);
    }
    // Before any thread starts: they inherit it.
    if let Err(error) = afterimage_export::set_io_flusher() {
        tracing::warn!(%error, "memory pressure may stall the taps");
    }
    let state = StateDir::open(&args.state_dir)?;
    let runtime = runtime()?;
    let socket = {
        let _entered = runtime.enter();
        ControlSocket::bind(&args.socket)?
    };
    let entropy: Arc<dyn Entropy> = Arc::new(SystemEntropy);
    let clock = Arc::new(SystemClock::default());
    let machine = Machine::start(Parts {
        config,
        state,
        clock,
        entropy: Arc::clone(&entropy),
    })?;
    runtime.block_on(serve(&machine, socket, entropy));
    machine.stop();
    runtime.shutdown_timeout(Duration::from_secs(1));
    Ok(())
}

async fn serve(machine: &Arc<Machine>, socket: ControlSocket, entropy: Arc<dyn Entropy>) {
    let state = machine.state_dir();
    let target = Target {
        host: machine.identity().server_host.clone(),
        address: machine.identity().data_address(),
        authority: state.path("authority.pem"),
        certificate: state.path("agent.pem"),
        key: state.path("agent.key"),
    };
    let host = Arc::new(Host(Arc::clone(machine)));
    let link_config = machine.config().link.clone();
    let link = tokio::spawn(crate::link::run(host, target, link_config, entropy));
    let control = tokio::spawn(socket.serve(Arc::clone(machine)));
    let renewal = tokio::spawn(keep_certificate(Arc::clone(machine)));
    tracing::info!("the agent runs");
    wait_for_signal().await;
    tracing::info!("the agent stops");
    let draining = Arc::clone(machine);
    if tokio::task::spawn_blocking(move || draining.drain())
        .await
        .is_err()
    {
        tracing::error!("the orderly stop failed");
    }
    machine.begin_stop();
    if tokio::time::timeout(CLOSE_WAIT, link).await.is_err() {
        tracing::debug!("the connection did not end in time");
    }
    renewal.abort();
    control.abort();
}

async fn wait_for_signal() {
    let (Ok(mut terminate), Ok(mut interrupt)) = (
        signal(SignalKind::terminate()),
        signal(SignalKind::interrupt()),
    ) else {
        tracing::error!("signals cannot be received");
        return;
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

fn now_s() -> i64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

/// Renews the certificate when two thirds of its life are over.
async fn keep_certificate(machine: Arc<Machine>) {
    let state = machine.state_dir();
    let timeout = ms(machine.config().link.connect_timeout_ms);
    loop {
        let wait = match lifetime(&state.path("agent.pem")) {
            Ok((renew_at, _)) if now_s() < renew_at => {
                let left = u64::try_from(renew_at - now_s()).unwrap_or(0);
                Duration::from_secs(left).min(RENEW_LOOK)
            }
            Ok(_) => match renew(state, machine.identity(), timeout).await {
                Ok(()) => {
                    tracing::info!("the certificate is renewed");
                    Duration::from_secs(1)
                }
                Err(error) => {
                    tracing::warn!(%error, "the certificate is not renewed yet");
                    RENEW_RETRY
                }
            },
            Err(error) => {
                tracing::error!(%error, "the certificate cannot be read");
                RENEW_LOOK
            }
        };
        tokio::time::sleep(wait).await;
    }
}

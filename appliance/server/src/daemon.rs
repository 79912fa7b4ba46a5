//! From the command line to a running appliance, and back.
//!
//! Invariants
//! * Nothing in the data directory is touched before its lock is held.
//! * The stop goes in the order of the data: agents first, then mounts, then the engine.

use std::fs::Permissions;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use afterimage_blockdev::{Clock, DirectoryLock, Entropy, SystemClock, SystemEntropy};
use afterimage_protocol::rest::ApiError;
use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::appliance::{Appliance, PROGRAM};
use crate::ca::{Authority, ServerIdentity};
use crate::catalogue::Catalogue;
use crate::config::{Config, ms};
use crate::control;
use crate::engine::{Command, EngineHandle};
use crate::events::EventLog;
use crate::failure::StartError;
use crate::ingest::{self, Ingest, LiveStreams, Reports};
use crate::mounts::{MountPlaces, Mounts};
use crate::nbd::{self, NbdListeners};
use crate::scrub::Scrub;
use crate::seeds::Seeds;
use crate::tls::{ClientAuth, server_config};
use crate::vhost::VhostSockets;

/// How long connections have to end when the daemon stops.
const GOODBYE: Duration = Duration::from_secs(5);

/// A running engine.
pub type StartedEngine = (EngineHandle, JoinHandle<()>);

/// Runs the daemon until a signal ends it. `start_engine` starts the engine on the data directory.
///
/// # Errors
/// [`StartError`].
pub fn run(
    data_dir: &Path,
    config: Config,
    start_engine: impl FnOnce(&Path, &Config) -> Result<StartedEngine, ApiError>,
) -> Result<(), StartError> {
    check_machine()?;
    // The kernel is told paths below it, and must find them from wherever it stands.
    let absolute = std::path::absolute(data_dir);
    let data_dir = &*absolute.map_err(|error| StartError::file("finding", data_dir, error))?;
    let lock = lock(data_dir)?;
    // Before any thread starts: threads inherit it.
    if let Err(error) = afterimage_export::set_io_flusher() {
        tracing::warn!(%error, "memory pressure may stall mounts: PR_SET_IO_FLUSHER is refused");
    }
    let clock: Arc<dyn Clock> = Arc::new(SystemClock::default());
    let entropy: Arc<dyn Entropy> = Arc::new(SystemEntropy);
    let authority = Authority::open(&data_dir.join("ca"), clock.wall(), &*entropy)?;
    let catalogue = Catalogue::open(&data_dir.join("catalogue.db"), config.control.events_max)?;
    let (engine, thread) = start_engine(data_dir, &config)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("afterimaged")
        .build()
        .map_err(StartError::Runtime)?;
    let parts = Parts {
        data_dir: data_dir.to_owned(),
        config,
        clock,
        entropy,
        authority: Arc::new(authority),
        catalogue,
        engine,
    };
    let result = runtime.block_on(parts.serve(thread));
    runtime.shutdown_timeout(GOODBYE);
    drop(lock);
    result
}

/// Says what the machine lacks, before anything is touched.
fn check_machine() -> Result<(), StartError> {
    // The files of a process below /proc belong to its effective user.
    let me = Path::new("/proc/self");
    let metadata = std::fs::metadata(me).map_err(|error| StartError::file("look", me, error))?;
    if metadata.uid() != 0 {
        return Err(StartError::NotRoot);
    }
    let opened = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/fuse");
    opened
        .map(|_| ())
        .map_err(|source| StartError::NoFuse { source })
}

fn lock(data_dir: &Path) -> Result<DirectoryLock, StartError> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(data_dir)
        .map_err(|error| StartError::file("making", data_dir, error))?;
    match DirectoryLock::acquire(data_dir) {
        Ok(Some(lock)) => Ok(lock),
        Ok(None) => {
            let holder = std::fs::read_to_string(data_dir.join("lock")).unwrap_or_default();
            let holder = match holder.trim() {
                "" => String::new(),
                process => format!(" (process {process})"),
            };
            Err(StartError::Running {
                path: data_dir.to_owned(),
                holder,
            })
        }
        Err(error) => Err(StartError::file("locking", data_dir, error)),
    }
}

/// Waits until the daemon is to stop, or has gone.
pub(crate) async fn stopped(stop: &mut watch::Receiver<bool>) {
    // The guard in the result must not live on: it would hold up whoever stops the daemon.
    let _gone = stop.wait_for(|stop| *stop).await.is_err();
}

struct Parts {
    data_dir: PathBuf,
    config: Config,
    clock: Arc<dyn Clock>,
    entropy: Arc<dyn Entropy>,
    authority: Arc<Authority>,
    catalogue: Catalogue,
    engine: EngineHandle,
}

struct Listeners {
    data: TcpListener,
    control: TcpListener,
    local: UnixListener,
    socket: PathBuf,
    nbd: NbdListeners,
}

impl Parts {
    async fn serve(self, thread: JoinHandle<()>) -> Result<(), StartError> {
        let engine = self.engine.clone();
        let mut ended = tokio::task::spawn_blocking(move || thread.join());
        let served = self.serve_until(&mut ended).await;
        if !ended.is_finished() {
            if let Err(error) = engine.ask(Command::Stop).await {
                tracing::warn!(%error, "the engine did not answer its stop");
            }
            let _joined = ended.await;
        }
        served
    }

    async fn serve_until<E: Future + Unpin>(self, engine_ended: E) -> Result<(), StartError> {
        let mut terminate = signal(SignalKind::terminate()).map_err(StartError::Runtime)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(StartError::Runtime)?;
        let listeners = self.listen().await?;
        let socket = listeners.socket.clone();
        let (stop, stopping) = watch::channel(false);
        let (appliance, mut services) = self.start(listeners, stopping).await?;
        println!(
            "{PROGRAM} is ready: data port {}, control port {}, socket {}",
            appliance.data_port,
            appliance.control_port,
            socket.display()
        );
        let result = tokio::select! {
            _ = terminate.recv() => Ok(()),
            _ = interrupt.recv() => Ok(()),
            _ = engine_ended => Err(StartError::EngineEnded),
        };
        appliance
            .events
            .note("stopped", "the appliance goes down".to_owned());
        stop.send_replace(true);
        let all = async { while services.join_next().await.is_some() {} };
        if timeout(GOODBYE, all).await.is_err() {
            tracing::warn!("some connections did not end in time");
            services.abort_all();
        }
        let ending = Arc::clone(&appliance);
        let ended = tokio::task::spawn_blocking(move || {
            ending.scrub.stop();
            ending.vhost.stop();
            ending.mounts.stop();
        });
        if ended.await.is_err() {
            tracing::error!("ending the scrub and the mounts failed");
        }
        if let Err(error) = std::fs::remove_file(&socket) {
            tracing::debug!(%error, "the local socket stays");
        }
        result
    }

    async fn listen(&self) -> Result<Listeners, StartError> {
        let bind = async |address| {
            TcpListener::bind(address)
                .await
                .map_err(|source| StartError::Listen { address, source })
        };
        let data = bind(self.config.data_listen).await?;
        let control = bind(self.config.control_listen).await?;
        let socket = self.config.socket_path(&self.data_dir);
        let wrong = |error| StartError::file("making", &socket, error);
        // The lock is held: whoever made an old one is dead.
        match std::fs::remove_file(&socket) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(wrong(error));
            }
            _ => {}
        }
        let local = UnixListener::bind(&socket).map_err(wrong)?;
        std::fs::set_permissions(&socket, Permissions::from_mode(0o600)).map_err(wrong)?;
        let nbd_socket = self.config.nbd_socket_path(&self.data_dir);
        let nbd = nbd::listen(&self.config.nbd, &nbd_socket)?;
        Ok(Listeners {
            data,
            control,
            local,
            socket,
            nbd,
        })
    }

    async fn start(
        self,
        listeners: Listeners,
        stopping: watch::Receiver<bool>,
    ) -> Result<(Arc<Appliance>, JoinSet<()>), StartError> {
        let Self {
            data_dir,
            config,
            clock,
            entropy,
            authority,
            catalogue,
            engine,
        } = self;
        let identity = Arc::new(ServerIdentity::new(
            Arc::clone(&authority),
            server_names(&config),
            ms(config.certificates.server_ttl_s.saturating_mul(1000)),
            Arc::clone(&clock),
            Arc::clone(&entropy),
        )?);
        let data_tls = server_config(&authority, Arc::clone(&identity), ClientAuth::Required)?;
        let nbd_tls = server_config(&authority, Arc::clone(&identity), ClientAuth::Required)?;
        let control_tls = server_config(&authority, identity, ClientAuth::Optional)?;
        let port = |listener: &TcpListener| {
            listener
                .local_addr()
                .map(|address| address.port())
                .map_err(StartError::Runtime)
        };
        let (data_port, control_port) = (port(&listeners.data)?, port(&listeners.control)?);
        let mounts = start_mounts(&data_dir, &config, &engine, &catalogue, &clock).await?;
        let seeds = Seeds::open(&data_dir)?;
        let events = EventLog::start(catalogue.clone(), Arc::clone(&clock));
        events.note("started", format!("{PROGRAM} has started"));
        let told = engine.send(Command::NoteTo(events.clone())).await;
        told.map_err(|error| StartError::Runtime(std::io::Error::other(error)))?;
        let scrub = Scrub::start(
            &data_dir,
            config.scrub_settings(),
            engine.clone(),
            events.clone(),
            Arc::clone(&clock),
        );
        let scrub = scrub.map_err(StartError::Runtime)?;
        let appliance = Arc::new(Appliance {
            config,
            data_dir,
            engine,
            catalogue,
            authority,
            clock,
            entropy,
            events,
            reports: Reports::default(),
            live: LiveStreams::default(),
            mounts: Arc::new(mounts),
            scrub,
            seeds: Arc::new(seeds),
            vhost: VhostSockets::default(),
            data_port,
            control_port,
            nbd_port: listeners.nbd.port,
        });
        let router = control::router(Arc::clone(&appliance));
        let mut services = JoinSet::new();
        let ingest = Ingest::new(Arc::clone(&appliance));
        services.spawn(ingest::serve(
            ingest,
            listeners.data,
            data_tls,
            stopping.clone(),
        ));
        let local = control::serve_local(
            Arc::clone(&appliance),
            router.clone(),
            listeners.local,
            stopping.clone(),
        );
        services.spawn(local);
        let watching = control::watch_space(Arc::clone(&appliance), stopping.clone());
        services.spawn(watching);
        services.spawn(nbd::serve(
            Arc::clone(&appliance),
            listeners.nbd,
            nbd_tls,
            stopping.clone(),
        ));
        let remote = control::serve_tls(
            Arc::clone(&appliance),
            router,
            listeners.control,
            control_tls,
            stopping,
        );
        services.spawn(remote);
        Ok((appliance, services))
    }
}

async fn start_mounts(
    data_dir: &Path,
    config: &Config,
    engine: &EngineHandle,
    catalogue: &Catalogue,
    clock: &Arc<dyn Clock>,
) -> Result<Mounts, StartError> {
    let places = MountPlaces {
        root: config.mount_root(data_dir),
        overlays: data_dir.join("overlays"),
    };
    let (engine, clock) = (engine.clone(), Arc::clone(clock));
    let catalogue = catalogue.clone();
    let (settings, backend) = (config.mounts.clone(), config.store.backend.into());
    let started = tokio::task::spawn_blocking(move || {
        Mounts::start(engine, catalogue, clock, places, settings, backend)
    });
    match started.await {
        Ok(mounts) => Ok(mounts?),
        Err(error) => Err(StartError::Runtime(std::io::Error::other(error))),
    }
}

/// The names that agents may call this appliance by.
fn server_names(config: &Config) -> Vec<String> {
    let mut names = config.names.clone();
    names.extend(["localhost", "127.0.0.1", "::1"].map(str::to_owned));
    let mut addresses = vec![config.data_listen.ip(), config.control_listen.ip()];
    addresses.extend(config.nbd.listen.map(|address| address.ip()));
    for address in addresses {
        if !address.is_unspecified() {
            names.push(address.to_string());
        }
    }
    if let Ok(host) = std::fs::read_to_string("/proc/sys/kernel/hostname") {
        let host = host.trim();
        // A host name with other characters is no name that a certificate can carry.
        if !host.is_empty()
            && host
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"-.".contains(&b))
        {
            names.push(host.to_owned());
        }
    }
    names.sort();
    names.dedup();
    names
}

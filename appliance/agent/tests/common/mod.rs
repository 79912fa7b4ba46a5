//! An appliance in memory, and agents against it. It speaks the real protocol over TLS, checks
//! every frame, and keeps the replica as plain bytes.

#![allow(
    dead_code,
    missing_docs,
    unreachable_pub,
    clippy::cast_possible_truncation,
    clippy::unwrap_used
)]

pub mod appliance;
pub mod process;
pub mod replica;
pub mod source;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use afterimage_agent::config::Config;
use afterimage_agent::link;
use afterimage_agent::machine::Machine;
use afterimage_agent::machine::host::Host;
use afterimage_agent::machine::start::Parts;
use afterimage_agent::state::identity::Identity;
use afterimage_agent::state::{StateDir, replace};
use afterimage_blockdev::{AgentId, Entropy, HistoryId, MachineId, SystemClock, SystemEntropy};
use afterimage_protocol::rest::agent::AttachDisk;
pub use appliance::Appliance;

/// Waits for an event that is looked for every few milliseconds.
pub fn until(what: &str, is_so: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    // A channel that nobody sends on: a pause between two looks.
    let (_sender, receiver) = std::sync::mpsc::channel::<()>();
    while !is_so() {
        assert!(Instant::now() < end, "{what} does not come");
        let paused = receiver.recv_timeout(Duration::from_millis(5));
        assert_eq!(paused, Err(RecvTimeoutError::Timeout));
    }
}

pub fn quick_config(root: &Path) -> Config {
    let mut config = Config::default();
    config.paths.link_dir = root.join("links");
    config.link.retry_base_ms = 50;
    config.link.report_interval_ms = 100;
    config.activity.idle_ms = 100;
    config.activity.flush_interval_ms = 50;
    config.state.save_interval_ms = 100;
    config
}

/// A running agent.
pub struct Agent {
    pub machine: Arc<Machine>,
    runtime: Option<tokio::runtime::Runtime>,
}

/// Writes what an enrolment would leave.
pub fn enrol(root: &Path, appliance: &Appliance) -> PathBuf {
    let state_dir = root.join("state");
    let state = StateDir::open(&state_dir).unwrap();
    let (certificate, key) = appliance.issue_client();
    replace(&state.path("agent.key"), key.as_bytes()).unwrap();
    replace(&state.path("agent.pem"), certificate.as_bytes()).unwrap();
    replace(
        &state.path("authority.pem"),
        appliance.authority_pem().as_bytes(),
    )
    .unwrap();
    let entropy = SystemEntropy;
    let identity = Identity {
        version: Identity::VERSION,
        agent: AgentId(entropy.identity()),
        machine: MachineId(entropy.identity()),
        machine_name: "test".to_owned(),
        history: HistoryId(entropy.identity()),
        server_host: "127.0.0.1".to_owned(),
        control_port: 1,
        data_port: appliance.port(),
    };
    identity.save(&state).unwrap();
    state_dir
}

impl Agent {
    pub fn start(state_dir: &Path, config: Config) -> Self {
        let state = StateDir::open(state_dir).unwrap();
        let entropy: Arc<dyn Entropy> = Arc::new(SystemEntropy);
        let clock = Arc::new(SystemClock::default());
        let parts = Parts {
            config: config.clone(),
            state,
            clock,
            entropy: Arc::clone(&entropy),
        };
        let machine = Machine::start(parts).unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let state = machine.state_dir();
        let target = link::run::Target {
            host: "127.0.0.1".to_owned(),
            address: machine.identity().data_address(),
            authority: state.path("authority.pem"),
            certificate: state.path("agent.pem"),
            key: state.path("agent.key"),
        };
        let host = Arc::new(Host(Arc::clone(&machine)));
        runtime.spawn(link::run(host, target, config.link, entropy));
        Self {
            machine,
            runtime: Some(runtime),
        }
    }

    pub fn attach(&self, source: &Path, name: &str) -> PathBuf {
        let source = source.display().to_string();
        let request = AttachDisk {
            source,
            name: name.to_owned(),
        };
        let disk = self.machine.attach(&request).unwrap();
        PathBuf::from(self.machine.show(&disk).device)
    }

    pub fn device(&self, name: &str) -> PathBuf {
        let disk = self.machine.disk_named(name).unwrap();
        PathBuf::from(self.machine.show(&disk).device)
    }

    pub fn connected(&self) {
        until("the connection", || self.machine.is_streaming());
    }

    /// Waits until everything captured is acknowledged.
    pub fn caught_up(&self) {
        until("the last acknowledgement", || {
            let status = self.machine.status();
            status.acknowledged >= status.captured
        });
    }

    pub fn phase(&self, name: &str) -> Option<afterimage_protocol::message::DiskPhase> {
        let disk = self.machine.disk_named(name).unwrap();
        self.machine.show(&disk).phase
    }

    pub fn protected(&self, name: &str) {
        let wanted = Some(afterimage_protocol::message::DiskPhase::Protected);
        until("protection", || self.phase(name) == wanted);
    }

    /// Stops in order.
    pub fn stop(mut self) {
        self.machine.drain();
        self.end();
    }

    fn end(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(Duration::from_secs(5));
            self.machine.stop();
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.end();
    }
}

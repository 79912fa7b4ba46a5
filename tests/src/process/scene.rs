//! An appliance and an agent in a directory of their own, with all that is made there.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use afterimage_protocol::message::DiskPhase;
use afterimage_protocol::rest::agent::{AgentStatus, TappedDisk};
use afterimage_protocol::rest::server::{Event, MachineStatus, ServerStatus};
use serde::de::DeserializeOwned;

use super::api::Api;
use super::daemon::Daemon;
use super::guards::{sparse, sweep};
use super::programs::{Outcome, outcome_of, own};
use super::proxy::Proxy;
use super::view::View;
use super::{until, until_within};

/// Name of the machine in every scene.
pub const MACHINE: &str = "web1";
/// Where the proxy listens, with the appliance's port numbers.
const PROXY_HOST: &str = "127.0.0.2";

/// What differs from the ordinary scene.
#[derive(Clone, Debug, Default)]
pub struct Setup {
    /// Tables of the appliance's configuration after `[store]`, or more settings of that.
    pub server: String,
    /// Tables of the agent's configuration.
    pub agent: String,
    /// The agent reaches the appliance through a [`Proxy`].
    pub is_proxied: bool,
    /// Where the appliance keeps its data, instead of below the scene's directory.
    pub data_dir: Option<PathBuf>,
    /// Where the agent keeps its state, instead of below the scene's directory.
    pub state_dir: Option<PathBuf>,
}

/// See the module's text. Dropping it ends the daemons and takes all away that is below the root.
#[derive(Debug)]
pub struct Scene {
    // Fields are dropped in this order, after `Drop::drop`.
    /// The agent, while it runs.
    pub agent: Option<Daemon>,
    /// The appliance, while it runs.
    pub server: Option<Daemon>,
    /// The network between them, if it was asked for.
    pub proxy: Option<Proxy>,
    /// Where everything is.
    pub root: PathBuf,
    /// The appliance's data.
    pub data_dir: PathBuf,
    /// The agent's state.
    pub state_dir: PathBuf,
    control_port: u16,
    data_port: u16,
    _directory: tempfile::TempDir,
}

fn free_ports() -> (u16, u16) {
    let bind = || TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    let (one, other) = (bind(), bind());
    let port = |listener: &TcpListener| listener.local_addr().expect("an address").port();
    (port(&one), port(&other))
}

const QUICK_AGENT: &str = "\
[link]
retry_base_ms = 50
retry_jitter_percent = 20
silence_ms = 2000
report_interval_ms = 100
[activity]
idle_ms = 500
flush_interval_ms = 200
[state]
save_interval_ms = 200
reserve_lsns = 100000
";

impl Scene {
    /// A directory for a scene, on a real file system: `AFTERIMAGE_TEST_DIR` or the temporary one.
    ///
    /// # Panics
    /// When it cannot be made.
    #[must_use]
    pub fn directory() -> tempfile::TempDir {
        let mut builder = tempfile::Builder::new();
        let builder = builder.prefix("afterimage-");
        match std::env::var_os("AFTERIMAGE_TEST_DIR") {
            Some(parent) => builder.tempdir_in(parent),
            None => builder.tempdir(),
        }
        .expect("a directory")
    }

    /// Starts both daemons, and enrols the agent.
    ///
    /// # Panics
    /// When it does not enrol.
    #[must_use]
    pub fn start(setup: &Setup) -> Self {
        let mut scene = Self::server_only(Self::directory(), setup);
        let token = scene.token();
        let enrolled = scene.enrol(&scene.state_dir, &token);
        assert_eq!(enrolled.code, 0, "{enrolled:?}");
        scene.start_agent();
        scene.connected();
        scene
    }

    /// Starts the appliance.
    ///
    /// # Panics
    /// When it does not start.
    #[must_use]
    pub fn server_only(directory: tempfile::TempDir, setup: &Setup) -> Self {
        let root = directory.path().canonicalize().expect("a path");
        let (control_port, data_port) = free_ports();
        let or = |path: &Option<PathBuf>, name| path.clone().unwrap_or_else(|| root.join(name));
        let host = if setup.is_proxied {
            PROXY_HOST
        } else {
            "127.0.0.1"
        };
        let server = format!(
            "data_listen = \"127.0.0.1:{data_port}\"\n\
             control_listen = \"127.0.0.1:{control_port}\"\n\
             names = [\"{host}\"]\n[store]\nretry_ms = 200\n{}",
            setup.server
        );
        let links = root.join("links");
        let agent = format!(
            "[paths]\nlink_dir = \"{}\"\n{}",
            links.display(),
            merged(QUICK_AGENT, &setup.agent)
        );
        std::fs::write(root.join("server.toml"), server).expect("a configuration");
        std::fs::write(root.join("agent.toml"), agent).expect("a configuration");
        let way = |port| {
            let ends = (format!("{PROXY_HOST}:{port}"), format!("127.0.0.1:{port}"));
            let address = |text: String| text.parse::<SocketAddr>().expect("an address");
            (address(ends.0), address(ends.1))
        };
        let proxy = setup
            .is_proxied
            .then(|| Proxy::start(&[way(control_port), way(data_port)]));
        let mut scene = Self {
            agent: None,
            server: None,
            proxy,
            data_dir: or(&setup.data_dir, "data"),
            state_dir: or(&setup.state_dir, "agent"),
            root,
            control_port,
            data_port,
            _directory: directory,
        };
        scene.start_server();
        scene
    }

    /// Arguments of the appliance.
    #[must_use]
    pub fn server_arguments(&self) -> Vec<String> {
        let text = |path: &Path| path.display().to_string();
        vec![
            "--data-dir".to_owned(),
            text(&self.data_dir),
            "--config".to_owned(),
            text(&self.root.join("server.toml")),
        ]
    }

    /// Starts the appliance without waiting for anything.
    pub fn spawn_server(&mut self) {
        let log = self.root.join("server.log");
        self.server = Some(Daemon::start("afterimaged", &self.server_arguments(), &log));
    }

    /// Starts the appliance, and waits until it answers.
    pub fn start_server(&mut self) {
        self.spawn_server();
        self.server_answers();
    }

    /// Waits until the appliance answers.
    ///
    /// # Panics
    /// When it ends instead.
    pub fn server_answers(&mut self) {
        let api = self.server_api();
        let server = self.server.as_mut().expect("a started appliance");
        until("the appliance's socket", || {
            assert!(server.ended().is_none(), "it ended\n{}", server.tail());
            api.try_get::<ServerStatus>("/v1/status").is_some()
        });
    }

    /// Kills the appliance.
    pub fn kill_server(&mut self) {
        self.server.take().expect("a started appliance").kill();
    }

    /// Stops the appliance in order.
    pub fn stop_server(&mut self) {
        self.server.take().expect("a started appliance").terminate();
    }

    /// Starts the agent, and waits until it answers.
    ///
    /// # Panics
    /// When it ends instead.
    pub fn start_agent(&mut self) {
        let text = |path: &Path| path.display().to_string();
        let arguments = vec![
            "run".to_owned(),
            "--state-dir".to_owned(),
            text(&self.state_dir),
            "--socket".to_owned(),
            text(&self.root.join("agent.sock")),
            "--config".to_owned(),
            text(&self.root.join("agent.toml")),
        ];
        let log = self.root.join("agent.log");
        let mut agent = Daemon::start("afterimage-agent", &arguments, &log);
        let api = self.agent_api();
        until("the agent's socket", || {
            assert!(agent.ended().is_none(), "it ended\n{}", agent.tail());
            api.try_get::<AgentStatus>("/v1/status").is_some()
        });
        self.agent = Some(agent);
    }

    /// Kills the agent.
    pub fn kill_agent(&mut self) {
        self.agent.take().expect("a started agent").kill();
    }

    /// Stops the agent in order.
    pub fn stop_agent(&mut self) {
        self.agent.take().expect("a started agent").terminate();
    }

    /// A fresh enrolment token.
    #[must_use]
    pub fn token(&self) -> String {
        self.aft_ok(&["token", "create"])
            .lines()
            .next()
            .map_or_else(String::new, |line| line.trim().to_owned())
    }

    /// Enrols an agent with a state directory.
    #[must_use]
    pub fn enrol(&self, state_dir: &Path, token: &str) -> Outcome {
        self.enrol_as(state_dir, token, MACHINE)
    }

    /// Enrols an agent for a machine of some name.
    #[must_use]
    pub fn enrol_as(&self, state_dir: &Path, token: &str, machine: &str) -> Outcome {
        let host = if self.proxy.is_some() {
            PROXY_HOST
        } else {
            "127.0.0.1"
        };
        let server = format!("{host}:{}", self.control_port);
        let mut command = Command::new(own("afterimage-agent"));
        command.args(["enrol", "--server", &server, "--token", token]);
        command.args(["--machine-name", machine, "--state-dir"]);
        outcome_of(command.arg(state_dir))
    }

    /// The appliance's port of the data service.
    #[must_use]
    pub fn data_port(&self) -> u16 {
        self.data_port
    }

    /// The appliance's local socket.
    #[must_use]
    pub fn server_api(&self) -> Api {
        Api::new(&self.data_dir.join("control.sock"))
    }

    /// The agent's local socket.
    #[must_use]
    pub fn agent_api(&self) -> Api {
        Api::new(&self.root.join("agent.sock"))
    }

    /// Runs `aft`, whatever comes of it.
    #[must_use]
    pub fn aft(&self, arguments: &[&str]) -> Outcome {
        let mut command = Command::new(own("aft"));
        command
            .env("AFTERIMAGE_SOCKET", self.data_dir.join("control.sock"))
            .env("AFTERIMAGE_AGENT_SOCKET", self.root.join("agent.sock"));
        outcome_of(command.args(arguments))
    }

    /// Runs `aft`, and gives its output.
    ///
    /// # Panics
    /// When it fails.
    #[must_use]
    pub fn aft_ok(&self, arguments: &[&str]) -> String {
        let outcome = self.aft(arguments);
        assert_eq!(
            outcome.code,
            0,
            "aft {arguments:?}: {outcome:?}\n{}",
            self.logs()
        );
        outcome.stdout
    }

    /// Runs `aft --json`.
    ///
    /// # Panics
    /// When it fails, or answers something else.
    #[must_use]
    pub fn aft_json<T: DeserializeOwned>(&self, arguments: &[&str]) -> T {
        let said = self.aft_ok(&[&["--json"], arguments].concat());
        serde_json::from_str(&said).unwrap_or_else(|error| panic!("{arguments:?}: {error}: {said}"))
    }

    /// The ends of both logs, for a test that fails.
    #[must_use]
    pub fn logs(&self) -> String {
        let daemons = [&self.server, &self.agent];
        daemons
            .into_iter()
            .flatten()
            .map(Daemon::tail)
            .collect::<Vec<_>>()
            .join("\n")
    }

    /// The appliance's status.
    #[must_use]
    pub fn status(&self) -> ServerStatus {
        self.server_api().get("/v1/status")
    }

    /// The machine, as the appliance knows it.
    ///
    /// # Panics
    /// When it does not.
    #[must_use]
    pub fn machine(&self) -> MachineStatus {
        let mut machines = self.status().machines;
        let at = machines.iter().position(|machine| machine.name == MACHINE);
        machines.swap_remove(at.expect("the machine"))
    }

    /// What happened at the appliance.
    #[must_use]
    pub fn events(&self) -> Vec<Event> {
        self.server_api().get("/v1/events?after=0&limit=1000")
    }

    /// The agent's status.
    #[must_use]
    pub fn agent_status(&self) -> AgentStatus {
        self.agent_api().get("/v1/status")
    }

    /// A disk, as the agent knows it.
    ///
    /// # Panics
    /// When it does not.
    #[must_use]
    pub fn disk(&self, name: &str) -> TappedDisk {
        let disks = self.agent_status().disks;
        disks
            .into_iter()
            .find(|disk| disk.name == name)
            .expect("the disk")
    }

    /// Waits until the agent is connected.
    pub fn connected(&self) {
        until("the connection", || self.agent_status().is_connected);
    }

    /// Makes a sparse image below the scene's directory.
    #[must_use]
    pub fn image(&self, name: &str, bytes: u64) -> PathBuf {
        let path = self.root.join(name);
        sparse(&path, bytes);
        path
    }

    /// Puts a tap in front of a source; gives its device.
    #[must_use]
    pub fn attach(&self, source: &Path, name: &str) -> PathBuf {
        let source = source.display().to_string();
        let _said = self.aft_ok(&["disk", "attach", &source, "--name", name]);
        self.device(name)
    }

    /// The device of a tap.
    #[must_use]
    pub fn device(&self, name: &str) -> PathBuf {
        PathBuf::from(self.disk(name).device)
    }

    /// Protects a disk, and waits until its first copy is done.
    pub fn protect(&self, name: &str) {
        let _said = self.aft_ok(&["disk", "protect", name]);
        self.protected(name);
    }

    /// Waits until a disk is protected.
    pub fn protected(&self, name: &str) {
        let wanted = Some(DiskPhase::Protected);
        until_within(Duration::from_secs(120), "protection", || {
            self.disk(name).phase == wanted
        });
    }

    /// Waits until all that is captured now is acknowledged; writes may go on.
    pub fn caught_up(&self) {
        self.caught_up_within(super::PATIENCE);
    }

    /// [`Scene::caught_up`] with another limit.
    pub fn caught_up_within(&self, deadline: Duration) {
        let captured = self.agent_status().captured;
        until_within(deadline, "the last acknowledgement", || {
            self.agent_status().acknowledged >= captured
        });
    }

    /// Gives a device with a state of a disk; it goes when it is dropped.
    #[must_use]
    pub fn view(&self, when: &str) -> View {
        View::device(self, when)
    }

    /// Asserts that the newest state of a disk equals its device, byte by byte. Nobody may write.
    pub fn assert_replica_equals(&self, name: &str) {
        self.caught_up();
        let view = self.view(&format!("{MACHINE}/{name}@latest"));
        super::run("blockdev", &["--flushbufs", &self.disk(name).device]);
        super::assert_equal_devices(&self.device(name), &view.device);
    }
}

/// Adds settings to tables that may be there already.
fn merged(base: &str, more: &str) -> String {
    let mut text = base.to_owned();
    for table in more.split("\n[").filter(|table| !table.trim().is_empty()) {
        let (name, body) = table.split_once(']').expect("a table");
        let head = format!("[{}]\n", name.trim_start_matches('['));
        // Settings of the base that are set again go.
        for line in body.lines() {
            let key = line.split(" =").next().unwrap_or_default();
            let is_it = |old: &str| !key.is_empty() && old.starts_with(&format!("{key} ="));
            text = text
                .lines()
                .filter(|old| !is_it(old))
                .map(|old| format!("{old}\n"))
                .collect();
        }
        let body = body.trim();
        if text.contains(&head) {
            text = text.replace(&head, &format!("{head}{body}\n"));
        } else {
            text.push_str(&format!("{head}{body}\n"));
        }
    }
    text
}

impl Drop for Scene {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.logs());
        }
        for place in super::guards::mounts_below(&self.root) {
            if !place.starts_with(&self.data_dir) && !place.starts_with(&self.state_dir) {
                let _gone = outcome_of(Command::new("umount").arg(&place));
            }
        }
        self.agent = None;
        self.server = None;
        self.proxy = None;
        for place in [&self.state_dir, &self.data_dir, &self.root] {
            sweep(place);
        }
    }
}

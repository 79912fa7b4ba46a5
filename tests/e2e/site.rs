//! A site: an appliance and an agent of their own, in a directory of their own.

use std::fs::{self, File};
use std::net::TcpListener;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;

use crate::shell::{all_of, assert_same, clear_below, holds, text, try_run, wait_until};

/// The machine's name at every site.
pub(crate) const MACHINE: &str = "m";

/// Timers for tests; what a test adds stands above them.
const SERVER_TOML: &str = "\
[store]
crash_mark_interval_ms = 1000
retry_ms = 200
segment_bytes = 20971520
";
const AGENT_TOML: &str = "\
[link]
retry_base_ms = 50
connect_timeout_ms = 2000
silence_ms = 3000
report_interval_ms = 100
[activity]
idle_ms = 500
flush_interval_ms = 200
[state]
save_interval_ms = 500
stop_wait_ms = 3000
[spool]
file_bytes = 33554432
";

/// Which of the two daemons.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Daemon {
    Server,
    Agent,
}

impl Daemon {
    fn program(self) -> &'static str {
        match self {
            Self::Server => "afterimaged",
            Self::Agent => "afterimage-agent",
        }
    }
}

/// Where a site keeps things, and how its daemons are set up.
#[derive(Default)]
pub(crate) struct Plan {
    /// The appliance's data directory, if elsewhere than in the site's directory.
    pub(crate) data: Option<PathBuf>,
    /// The agent's state directory, if elsewhere.
    pub(crate) state: Option<PathBuf>,
    /// Lines that are added to `[pipeline]` of the agent.
    pub(crate) pipeline: &'static str,
}

pub(crate) struct Site {
    root: TempDir,
    pub(crate) data: PathBuf,
    pub(crate) state: PathBuf,
    pub(crate) data_port: u16,
    pub(crate) control_port: u16,
    server: Option<Child>,
    agent: Option<Child>,
}

/// Where the programs are.
pub(crate) fn program(name: &str) -> PathBuf {
    let otherwise = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/release");
    let directory = std::env::var_os("AFTERIMAGE_BIN_DIR").map_or_else(otherwise, PathBuf::from);
    let path = directory.join(name);
    assert!(
        path.exists(),
        "{} is missing; run `cargo build --release`",
        path.display()
    );
    path
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
    listener.local_addr().expect("it has an address").port()
}

impl Site {
    /// Makes the directory; nothing runs yet.
    pub(crate) fn new(plan: Plan) -> Self {
        let root = tempfile::Builder::new()
            .prefix("afterimage-e2e.")
            .tempdir_in("/var/tmp")
            .expect("a directory can be made");
        let path = root.path().to_owned();
        fs::write(path.join("server.toml"), SERVER_TOML).expect("the configuration is written");
        let agent = format!(
            "[paths]\nlink_dir = \"{}\"\n{AGENT_TOML}[pipeline]\n{}\n",
            path.join("dev").display(),
            plan.pipeline
        );
        fs::write(path.join("agent.toml"), agent).expect("the configuration is written");
        Self {
            data: plan.data.unwrap_or_else(|| path.join("data")),
            state: plan.state.unwrap_or_else(|| path.join("agent")),
            root,
            data_port: free_port(),
            control_port: free_port(),
            server: None,
            agent: None,
        }
    }

    /// Makes a site whose daemons run, with the agent enrolled and connected.
    pub(crate) fn running(plan: Plan) -> Self {
        let mut site = Self::new(plan);
        site.start(Daemon::Server);
        site.enrol();
        site.start(Daemon::Agent);
        site.wait_connected();
        site
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn slot(&mut self, daemon: Daemon) -> &mut Option<Child> {
        match daemon {
            Daemon::Server => &mut self.server,
            Daemon::Agent => &mut self.agent,
        }
    }

    /// The command that starts a daemon.
    pub(crate) fn command(&self, daemon: Daemon) -> Command {
        let mut command = Command::new(program(daemon.program()));
        match daemon {
            Daemon::Server => command
                .args(["--data-dir", text(&self.data)])
                .args(["--config", text(&self.path("server.toml"))])
                .args(["--data-listen", &format!("127.0.0.1:{}", self.data_port)])
                .args([
                    "--control-listen",
                    &format!("127.0.0.1:{}", self.control_port),
                ])
                .args(["--socket", text(&self.path("control.sock"))]),
            Daemon::Agent => command
                .arg("run")
                .args(["--state-dir", text(&self.state)])
                .args(["--socket", text(&self.path("agent.sock"))])
                .args(["--config", text(&self.path("agent.toml"))]),
        };
        command
    }

    /// Starts a daemon and waits until it answers.
    pub(crate) fn start(&mut self, daemon: Daemon) {
        let log = self.path(daemon.program()).with_extension("log");
        let log = File::options()
            .append(true)
            .create(true)
            .open(log)
            .expect("the log opens");
        let errors = log.try_clone().expect("the log is shared");
        let child = self
            .command(daemon)
            .env("NO_COLOR", "1")
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors)
            .spawn()
            .expect("the daemon starts");
        *self.slot(daemon) = Some(child);
        let question: &[&str] = match daemon {
            Daemon::Server => &["status"],
            Daemon::Agent => &["agent", "status"],
        };
        wait_until(60, "a daemon answers", || {
            let ended = self
                .slot(daemon)
                .as_mut()
                .and_then(|child| child.try_wait().ok()?);
            if let Some(status) = ended {
                panic!(
                    "{} has ended: {status}\n{}",
                    daemon.program(),
                    self.log_of(daemon)
                );
            }
            let output = self.try_aft(question);
            holds(output.status.success(), || all_of(&output))
        });
    }

    /// The last lines of a daemon's log.
    pub(crate) fn log_of(&self, daemon: Daemon) -> String {
        let path = self.path(daemon.program()).with_extension("log");
        let log = fs::read_to_string(path).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }

    /// Kills a daemon without a warning.
    pub(crate) fn kill(&mut self, daemon: Daemon) {
        if let Some(mut child) = self.slot(daemon).take() {
            child.kill().expect("the daemon can be killed");
            let status = child.wait().expect("the daemon has ended");
            assert_eq!(
                status.signal(),
                Some(9),
                "{} had ended before",
                daemon.program()
            );
        }
    }

    /// Stops a daemon in order.
    pub(crate) fn stop(&mut self, daemon: Daemon) -> ExitStatus {
        self.signal(daemon, "TERM");
        let mut child = self.slot(daemon).take().expect("the daemon runs");
        child.wait().expect("the daemon ends")
    }

    /// Sends a signal to a daemon.
    pub(crate) fn signal(&mut self, daemon: Daemon, signal: &str) {
        let id = self
            .slot(daemon)
            .as_ref()
            .expect("the daemon runs")
            .id()
            .to_string();
        crate::shell::run("kill", &["-s", signal, &id]);
    }

    pub(crate) fn is_alive(&mut self, daemon: Daemon) -> bool {
        let child = self.slot(daemon).as_mut();
        child.is_some_and(|child| matches!(child.try_wait(), Ok(None)))
    }

    /// Runs `aft`, whatever it says.
    pub(crate) fn try_aft(&self, arguments: &[&str]) -> Output {
        Command::new(program("aft"))
            .args(arguments)
            .env("AFTERIMAGE_SOCKET", self.path("control.sock"))
            .env("AFTERIMAGE_AGENT_SOCKET", self.path("agent.sock"))
            .stdin(Stdio::null())
            .output()
            .expect("aft runs")
    }

    /// Runs `aft` and returns its answer.
    pub(crate) fn aft(&self, arguments: &[&str]) -> Value {
        let mut all = arguments.to_vec();
        all.push("--json");
        let output = self.try_aft(&all);
        assert!(
            output.status.success(),
            "aft {arguments:?}: {}\n--- afterimaged\n{}\n--- agent\n{}",
            all_of(&output),
            self.log_of(Daemon::Server),
            self.log_of(Daemon::Agent)
        );
        serde_json::from_slice(&output.stdout).expect("aft answers in JSON")
    }

    /// Enrols the agent with a new token.
    pub(crate) fn enrol(&self) {
        let token = self.token("5m");
        let output = self.try_enrol(&self.state, MACHINE, &token);
        assert!(output.status.success(), "{}", all_of(&output));
    }

    pub(crate) fn token(&self, ttl: &str) -> String {
        let token = self.aft(&["token", "create", "--ttl", ttl]);
        token["token"].as_str().expect("a token is text").to_owned()
    }

    pub(crate) fn try_enrol(&self, state: &Path, machine: &str, token: &str) -> Output {
        Command::new(program("afterimage-agent"))
            .arg("enrol")
            .args(["--server", &format!("127.0.0.1:{}", self.control_port)])
            .args(["--state-dir", text(state), "--machine-name", machine])
            .env("AFTERIMAGE_TOKEN", token)
            .stdin(Stdio::null())
            .output()
            .expect("the agent runs")
    }

    pub(crate) fn wait_connected(&self) {
        wait_until(60, "the agent is connected", || {
            let status = self.aft(&["agent", "status"]);
            holds(status["is_connected"] == true, || status.to_string())
        });
    }

    /// Attaches and protects a source; returns when its first copy is done.
    pub(crate) fn protect(&self, source: &Path, name: &str) -> PathBuf {
        self.attach(source, name);
        self.aft(&["disk", "protect", name]);
        self.wait_caught_up();
        self.device(name)
    }

    /// Attaches a source; returns the device to use instead.
    pub(crate) fn attach(&self, source: &Path, name: &str) -> PathBuf {
        self.aft(&["disk", "attach", text(source), "--name", name]);
        self.device(name)
    }

    /// The device of a disk; another one after the agent's death.
    pub(crate) fn device(&self, name: &str) -> PathBuf {
        let disk = self.local_disk(name);
        PathBuf::from(disk["device"].as_str().expect("a device is text"))
    }

    /// What the agent says of a disk.
    pub(crate) fn local_disk(&self, name: &str) -> Value {
        let disks = self.aft(&["disk", "list", "--local"]);
        let found = disks
            .as_array()
            .into_iter()
            .flatten()
            .find(|disk| disk["name"] == name);
        found
            .unwrap_or_else(|| panic!("no disk {name} in {disks}"))
            .clone()
    }

    /// Waits until the appliance has acknowledged all that was captured, and all disks are whole.
    pub(crate) fn wait_caught_up(&self) {
        wait_until(180, "the appliance has everything", || {
            let status = self.aft(&["agent", "status"]);
            let is_whole = status["disks"]
                .as_array()
                .into_iter()
                .flatten()
                .all(|disk| disk["phase"] == "protected" || disk["is_protected"] == false);
            let is_caught_up = status["is_connected"] == true
                && status["captured"] == status["acknowledged"]
                && is_whole;
            holds(is_caught_up, || {
                format!("{status}\n{}", self.log_of(Daemon::Agent))
            })
        });
    }

    /// Highest durable LSN of the machine at the appliance.
    pub(crate) fn durable(&self) -> u64 {
        self.aft(&["machine", "list"])[0]["durable"]
            .as_u64()
            .expect("an LSN is a number")
    }

    /// Shows a state as a device, lets `look` see it, and ends it.
    pub(crate) fn with_view<T>(&self, reference: &str, look: impl FnOnce(&Path) -> T) -> T {
        let mount = self.aft(&["mount", reference, "--device"]);
        let device = PathBuf::from(mount["device"].as_str().expect("a device is text"));
        let seen = look(&device);
        self.umount(&mount);
        seen
    }

    pub(crate) fn umount(&self, mount: &Value) {
        self.aft(&["umount", &mount["id"].to_string()]);
    }

    /// Compares the newest state of a disk with its source.
    pub(crate) fn assert_replica_is(&self, name: &str, source: &Path) {
        self.with_view(&format!("{MACHINE}/{name}@latest"), |view| {
            assert_same(view, source)
        });
    }

    /// Ends everything of this site.
    fn clean(&mut self) {
        for daemon in [Daemon::Agent, Daemon::Server] {
            if let Some(child) = self.slot(daemon) {
                // A stopped process hears nothing but these two.
                let id = child.id().to_string();
                let _output = try_run("kill", &["-s", "CONT", &id]);
                let _output = try_run("kill", &["-s", "KILL", &id]);
                let _status = child.wait();
            }
        }
        for place in [self.root.path(), &self.data, &self.state] {
            clear_below(place);
        }
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- afterimaged\n{}", self.log_of(Daemon::Server));
            eprintln!("--- afterimage-agent\n{}", self.log_of(Daemon::Agent));
        }
        self.clean();
    }
}

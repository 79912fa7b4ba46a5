//! The agent as a process of its own, to be killed.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use afterimage_agent::config::Config;
use afterimage_protocol::message::DiskPhase;
use afterimage_protocol::rest::ApiError;
use afterimage_protocol::rest::agent::{AgentStatus, TappedDisk};

use super::until;

pub struct Process {
    child: Child,
    socket: PathBuf,
}

impl Process {
    pub fn start(root: &Path, state_dir: &Path, config: &Config) -> Self {
        let file = root.join("agent.toml");
        std::fs::write(&file, toml::to_string(config).unwrap()).unwrap();
        let socket = root.join("agent.sock");
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(root.join("agent.log"))
            .unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_afterimage-agent"))
            .arg("run")
            .arg("--state-dir")
            .arg(state_dir)
            .arg("--socket")
            .arg(&socket)
            .arg("--config")
            .arg(&file)
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let this = Self { child, socket };
        until("the agent's socket", || {
            this.try_get("/v1/status").is_some()
        });
        this
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Ends it as a crash would.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Ends it in order.
    pub fn terminate(mut self) {
        let pid = self.child.id().to_string();
        assert!(
            Command::new("kill")
                .args(["-TERM", &pid])
                .status()
                .unwrap()
                .success()
        );
        assert!(self.child.wait().unwrap().success());
    }

    fn try_get(&self, path: &str) -> Option<String> {
        self.request("GET", path, "").ok()?.ok()
    }

    fn request(
        &self,
        method: &str,
        path: &str,
        body: &str,
    ) -> std::io::Result<Result<String, ApiError>> {
        let mut stream = UnixStream::connect(&self.socket)?;
        let length = body.len();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\
             Content-Length: {length}\r\n\r\n{body}"
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_default();
        if head.starts_with("HTTP/1.1 200") {
            return Ok(Ok(body.to_owned()));
        }
        Ok(Err(serde_json::from_str(body)?))
    }

    pub fn status(&self) -> AgentStatus {
        serde_json::from_str(&self.request("GET", "/v1/status", "").unwrap().unwrap()).unwrap()
    }

    pub fn post(&self, path: &str, body: &str) -> Result<String, ApiError> {
        self.request("POST", path, body).unwrap()
    }

    pub fn disk(&self, name: &str) -> TappedDisk {
        let disks = self.status().disks;
        disks.into_iter().find(|disk| disk.name == name).unwrap()
    }

    pub fn attach(&self, source: &Path, name: &str) -> PathBuf {
        let body = format!(r#"{{"source":"{}","name":"{name}"}}"#, source.display());
        let disk: TappedDisk =
            serde_json::from_str(&self.post("/v1/disks", &body).unwrap()).unwrap();
        PathBuf::from(disk.device)
    }

    pub fn connected(&self) {
        until("the connection", || self.status().is_connected);
    }

    pub fn protected(&self, name: &str) {
        until("protection", || {
            self.disk(name).phase == Some(DiskPhase::Protected)
        });
    }

    pub fn caught_up(&self) {
        until("the last acknowledgement", || {
            let status = self.status();
            status.acknowledged >= status.captured
        });
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _gone = self.child.wait();
    }
}

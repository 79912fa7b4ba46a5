//! The daemon as a process: one at a time on a data directory, an orderly stop, and a start after
//! a death that leaves nothing of the dead one behind. Needs root and FUSE.

// Helpers of tests, which clippy takes for a program here.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

const PROGRAM: &str = env!("CARGO_BIN_EXE_afterimaged");

struct Daemon {
    child: Child,
    ready: String,
}

fn command(data_dir: &Path) -> Command {
    let mut command = Command::new(PROGRAM);
    command
        .arg("--data-dir")
        .arg(data_dir)
        .args([
            "--data-listen",
            "127.0.0.1:0",
            "--control-listen",
            "127.0.0.1:0",
        ])
        .env("AFTERIMAGE_LOG", "warn");
    command
}

impl Daemon {
    fn start(data_dir: &Path) -> Self {
        let mut child = command(data_dir).stdout(Stdio::piped()).spawn().unwrap();
        let mut ready = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut ready)
            .unwrap();
        assert!(ready.contains("is ready"), "{ready}");
        Self { child, ready }
    }

    fn signal(&mut self, signal: &str) -> ExitStatus {
        let process = self.child.id().to_string();
        assert!(
            Command::new("kill")
                .args([signal, &process])
                .status()
                .unwrap()
                .success()
        );
        self.child.wait().unwrap()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if self.child.try_wait().unwrap().is_none() {
            self.signal("-TERM");
        }
    }
}

/// Starts a daemon that is to fail; gives its exit code and what it says.
fn fails(command: &mut Command) -> (i32, String) {
    let mut child = command
        .stderr(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut said = String::new();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut said)
        .unwrap();
    (child.wait().unwrap().code().unwrap(), said)
}

fn mounts_below(directory: &Path) -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let directories = table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(PathBuf::from);
    directories
        .filter(|mounted| mounted.starts_with(directory))
        .collect()
}

#[test]
fn a_second_daemon_is_told_of_the_first() {
    let directory = tempfile::tempdir().unwrap();
    let first = Daemon::start(directory.path());
    let (code, said) = fails(&mut command(directory.path()));
    assert_eq!(code, 3, "{said}");
    let process = first.child.id().to_string();
    assert!(
        said.contains("another afterimaged") && said.contains(&process),
        "{said}"
    );
}

#[test]
fn a_stop_leaves_no_mount_and_no_socket() {
    let directory = tempfile::tempdir().unwrap();
    for signal in ["-TERM", "-INT"] {
        let mut daemon = Daemon::start(directory.path());
        assert!(daemon.ready.contains("control.sock"), "{}", daemon.ready);
        assert_eq!(mounts_below(directory.path()).len(), 1);
        assert_eq!(daemon.signal(signal).code(), Some(0));
        assert!(mounts_below(directory.path()).is_empty());
        assert!(!directory.path().join("control.sock").exists());
    }
}

#[test]
fn a_killed_daemon_is_cleaned_up_after() {
    let directory = tempfile::tempdir().unwrap();
    for _ in 0..3 {
        let mut daemon = Daemon::start(directory.path());
        assert_eq!(daemon.signal("-KILL").code(), None);
        assert_eq!(mounts_below(directory.path()).len(), 1);
    }
    drop(Daemon::start(directory.path()));
    assert!(mounts_below(directory.path()).is_empty());
}

#[test]
fn wrong_configurations_and_directories_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("config.toml");
    let data_dir = directory.path().join("data");
    let with = |text: &str| {
        fs::write(&config, text).unwrap();
        fails(command(&data_dir).arg("--config").arg(&config))
    };
    let (code, said) = with("[ingest]\ncredit = 5\n");
    assert!(code == 2 && said.contains("credit"), "{code} {said}");
    let (code, said) = with("[store]\nsegment_bytes = 1\n");
    assert!(
        code == 2 && said.contains("store.segment_bytes is 1"),
        "{code} {said}"
    );
    assert!(
        !data_dir.exists(),
        "nothing is touched before the configuration is right"
    );
    let missing = directory.path().join("missing");
    let (code, said) = fails(command(&data_dir).arg("--config").arg(&missing));
    assert!(code == 2 && said.contains("missing"), "{code} {said}");
    let file = directory.path().join("file");
    fs::write(&file, "").unwrap();
    let (code, said) = fails(&mut command(&file));
    assert!(code == 4 && said.contains("file"), "{code} {said}");
}

#[test]
fn a_port_in_use_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let mut second = Command::new(PROGRAM);
    second
        .arg("--data-dir")
        .arg(directory.path())
        .args(["--data-listen", &address]);
    let (code, said) = fails(&mut second);
    assert!(code == 4 && said.contains(&address), "{code} {said}");
}

#[test]
fn the_configuration_that_is_printed_can_be_read() {
    let directory = tempfile::tempdir().unwrap();
    let printed = Command::new(PROGRAM)
        .arg("--print-config")
        .output()
        .unwrap();
    assert!(printed.status.success());
    let config = directory.path().join("config.toml");
    fs::write(&config, &printed.stdout).unwrap();
    let again = Command::new(PROGRAM)
        .arg("--print-config")
        .arg("--config")
        .arg(&config)
        .output()
        .unwrap();
    assert_eq!(again.stdout, printed.stdout);
}

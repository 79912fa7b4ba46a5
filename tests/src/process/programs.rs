//! Programs that the ring runs.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// How a program ended, and what it said.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Its exit code; -1 after a signal.
    pub code: i32,
    /// What it wrote to standard output.
    pub stdout: String,
    /// What it wrote to standard error.
    pub stderr: String,
}

impl From<Output> for Outcome {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

impl Outcome {
    /// Asserts an exit code and words of the error.
    ///
    /// # Panics
    /// When it ended otherwise.
    pub fn refuses(&self, code: i32, words: &[&str]) {
        println!("  exit {}: {}", self.code, self.stderr.trim());
        assert_eq!(self.code, code, "{self:?}");
        for word in words {
            assert!(self.stderr.contains(word), "{word:?} is not in {self:?}");
        }
    }
}

/// Seconds after which a program is killed: exit code 137 then.
const PROGRAM_SECONDS_MAX: &str = "120";

/// Runs a program to its end, whatever comes of it; a test never waits for one for ever.
///
/// # Panics
/// When it cannot be started.
pub fn outcome_of(command: &mut Command) -> Outcome {
    let mut bounded = Command::new("timeout");
    bounded.args(["--signal=KILL", PROGRAM_SECONDS_MAX]);
    bounded.arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        bounded.env(name, value.unwrap_or_default());
    }
    if let Some(directory) = command.get_current_dir() {
        bounded.current_dir(directory);
    }
    match bounded.output() {
        Ok(output) => output.into(),
        Err(error) => panic!("{command:?} cannot be started: {error}"),
    }
}

/// Runs a program, and gives its output.
///
/// # Panics
/// When it fails.
pub fn run<A: AsRef<OsStr>>(program: &str, arguments: &[A]) -> String {
    run_in(Path::new("/"), program, arguments)
}

/// Runs a program in a directory, and gives its output.
///
/// # Panics
/// When it fails.
pub fn run_in<A: AsRef<OsStr>>(directory: &Path, program: &str, arguments: &[A]) -> String {
    let mut command = Command::new(program);
    command.args(arguments).current_dir(directory);
    let outcome = outcome_of(&mut command);
    assert_eq!(outcome.code, 0, "{command:?}: {outcome:?}");
    outcome.stdout
}

/// Says at once what this machine lacks: a ring that skips proves nothing.
///
/// # Panics
/// When not root, without FUSE or loop devices, or without one of `programs`.
pub fn require(programs: &[&str]) {
    let uid = run("id", &["-u"]);
    assert_eq!(uid.trim(), "0", "the process ring must run as root");
    for device in ["/dev/fuse", "/dev/loop-control"] {
        let is_there = Path::new(device).exists();
        assert!(is_there, "{device} is missing: the process ring needs it");
    }
    let always = [
        "mkfs.ext4",
        "e2fsck",
        "mount",
        "umount",
        "losetup",
        "setpriv",
    ];
    let path = std::env::var_os("PATH").unwrap_or_default();
    for program in always.iter().chain(programs) {
        let is_there = std::env::split_paths(&path).any(|dir| dir.join(program).exists());
        assert!(is_there, "{program} is missing: the process ring needs it");
    }
}

/// One of the project's own programs: beside this test's directory, or in `AFTERIMAGE_BIN_DIR`.
///
/// # Panics
/// When it was not built.
#[must_use]
pub fn own(program: &str) -> PathBuf {
    let directory = std::env::var_os("AFTERIMAGE_BIN_DIR").map_or_else(
        || {
            let test = std::env::current_exe().expect("the test's own path");
            let deps = test.parent().expect("a directory of tests");
            deps.parent().expect("a directory of programs").to_owned()
        },
        PathBuf::from,
    );
    let path = directory.join(program);
    assert!(
        path.exists(),
        "{} is missing: build the workspace's programs with the same profile first",
        path.display()
    );
    path
}

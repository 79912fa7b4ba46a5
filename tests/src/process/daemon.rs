//! One daemon as a process, to be stopped, killed and started again.

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use super::programs::{own, run};

/// A running daemon. Dropping it kills it.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    log: PathBuf,
}

impl Daemon {
    /// Starts one of the project's daemons; what it says goes to the end of `log`.
    ///
    /// # Panics
    /// When it cannot be started.
    #[must_use]
    pub fn start(program: &str, arguments: &[String], log: &Path) -> Self {
        let said = OpenOptions::new().create(true).append(true).open(log);
        let said = said.expect("a log");
        // A test that is killed leaves no daemon behind; the process keeps its id.
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL"])
            .arg(own(program))
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(said.try_clone().expect("a second handle"))
            .stderr(said)
            .spawn();
        Self {
            child: child.expect("a daemon"),
            log: log.to_owned(),
        }
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its exit, if it has ended by itself.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Sends a signal, such as `STOP`.
    pub fn signal(&self, signal: &str) {
        run("kill", &[format!("-{signal}"), self.pid().to_string()]);
    }

    /// Ends it as a crash would.
    ///
    /// # Panics
    /// When it has ended before.
    pub fn kill(&mut self) {
        let ended = self.ended();
        assert!(
            ended.is_none(),
            "ended by itself: {ended:?}\n{}",
            self.tail()
        );
        self.child.kill().expect("a kill");
        self.child.wait().expect("an end");
    }

    /// Ends it in order.
    ///
    /// # Panics
    /// When it fails.
    pub fn terminate(&mut self) {
        self.signal("TERM");
        let ended = self.child.wait().expect("an end");
        assert!(ended.success(), "{ended}\n{}", self.tail());
    }

    /// The end of its log.
    #[must_use]
    pub fn tail(&self) -> String {
        let bytes = std::fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<_> = text.lines().rev().take(20).collect();
        let lines: Vec<_> = lines.into_iter().rev().collect();
        format!("--- {}\n{}", self.log.display(), lines.join("\n"))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _gone = self.child.wait();
    }
}

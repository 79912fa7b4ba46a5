//! A server over a Unix socket in a directory of its own, and programs that are run against it.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::Duration;

use afterimage_blockdev::{BlockDevice, BlockError, MemoryDevice};
use afterimage_nbd::export::MapDone;
use afterimage_nbd::server::Stopping;
use afterimage_nbd::{
    Answer, Contexts, Export, Exports, ExtentMap, ListedExport, MapExtent, Peer, Refusal, Server,
    ServerSettings,
};
use tempfile::TempDir;
use tokio::net::{TcpListener, UnixListener};
use tokio::runtime::Runtime;
use tokio::sync::watch;

/// Which package has a program.
const PACKAGES: [(&str, &str); 9] = [
    ("qemu-img", "qemu-utils"),
    ("qemu-io", "qemu-utils"),
    ("qemu-nbd", "qemu-utils"),
    ("nbdkit", "nbdkit"),
    ("nbdinfo", "libnbd-bin"),
    ("nbdcopy", "libnbd-bin"),
    ("fio", "fio"),
    ("openssl", "openssl"),
    ("/usr/bin/python3", "python3-libnbd"),
];

/// Fails when a program is missing.
pub(crate) fn require(programs: &[&str]) {
    for program in programs {
        let found = Command::new(program).arg("--version").output();
        let package = PACKAGES.iter().find(|(name, _)| name == program);
        let package = package.map_or("a package of its own", |(_, package)| package);
        assert!(found.is_ok(), "{program} is missing: install {package}");
    }
}

/// Fails when Python has no libnbd.
pub(crate) fn require_python() {
    require(&["/usr/bin/python3"]);
    let found = Command::new("/usr/bin/python3")
        .args(["-c", "import nbd"])
        .output();
    let has_it = found.is_ok_and(|output| output.status.success());
    assert!(has_it, "Python has no libnbd: install python3-libnbd");
}

/// Runs a program that must succeed; gives its output.
pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
    let output = attempt(program, arguments);
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs a program, whatever comes of it.
pub(crate) fn attempt(program: &str, arguments: &[&str]) -> Output {
    let run = Command::new(program).args(arguments).output();
    run.unwrap_or_else(|error| panic!("{program}: {error}"))
}

/// A map with two kinds of ranges.
pub(crate) struct Stripes {
    pub(crate) bytes: u64,
}

impl ExtentMap for Stripes {
    fn extents(&self, offset: u64, length: u64, done: MapDone) {
        let mut found: Vec<MapExtent> = Vec::new();
        let (mut at, end) = (offset, offset + length);
        while at < end {
            let stripe = at / self.bytes;
            let next = ((stripe + 1) * self.bytes).min(end);
            found.push(MapExtent {
                length: next - at,
                flags: u32::try_from(stripe % 2).unwrap(),
            });
            at = next;
        }
        done(Result::<_, BlockError>::Ok(found));
    }
}

struct Bitmaps;

const BITMAP: &str = "qemu:dirty-bitmap:monday";

impl Contexts for Bitmaps {
    fn list<'a>(&'a self, prefix: &'a str) -> Answer<'a, Vec<String>> {
        let matches = BITMAP.starts_with(prefix);
        Box::pin(async move { Ok(matches.then(|| BITMAP.to_owned()).into_iter().collect()) })
    }

    fn open<'a>(&'a self, name: &'a str) -> Answer<'a, Option<Arc<dyn ExtentMap>>> {
        Box::pin(async move {
            let map = Arc::new(Stripes { bytes: 1 << 20 });
            Ok((name == BITMAP).then_some(map as Arc<dyn ExtentMap>))
        })
    }
}

/// One disk under the name `disk`, and nothing else.
pub(crate) struct OneDisk {
    pub(crate) export: Arc<Export>,
    /// Certificates are refused.
    pub(crate) admits: bool,
}

impl Exports for OneDisk {
    fn admit<'a>(&'a self, _peer: &'a Peer) -> Answer<'a, ()> {
        Box::pin(async move {
            if self.admits {
                return Ok(());
            }
            Err(Refusal::NotAllowed("nobody is let in".to_owned()))
        })
    }

    fn list<'a>(&'a self, _peer: &'a Peer) -> Answer<'a, Vec<ListedExport>> {
        Box::pin(async {
            Ok(vec![ListedExport {
                name: "disk".to_owned(),
                description: "a disk".to_owned(),
            }])
        })
    }

    fn open<'a>(&'a self, _peer: &'a Peer, name: &'a str) -> Answer<'a, Arc<Export>> {
        Box::pin(async move {
            if name == "disk" {
                return Ok(Arc::clone(&self.export));
            }
            Err(Refusal::Unknown(format!("there is no {name:?}")))
        })
    }
}

pub(crate) fn export_of(device: Arc<dyn BlockDevice>) -> Export {
    Export {
        name: "disk".to_owned(),
        description: "a disk".to_owned(),
        device,
        can_multi_conn: true,
        is_zeroing_fast: true,
        contexts: Arc::new(Bitmaps),
    }
}

/// A server that runs until it is dropped.
pub(crate) struct Rig {
    pub(crate) directory: TempDir,
    pub(crate) device: Arc<MemoryDevice>,
    pub(crate) port: Option<u16>,
    stop: watch::Sender<bool>,
    runtime: Option<Runtime>,
}

impl Rig {
    pub(crate) fn new(bytes: u64) -> Self {
        let device = MemoryDevice::new(bytes, 512);
        let export = export_of(Arc::clone(&device) as Arc<dyn BlockDevice>);
        Self::with(device, export, true, None, ServerSettings::default())
    }

    pub(crate) fn with(
        device: Arc<MemoryDevice>,
        export: Export,
        admits: bool,
        tls: Option<Arc<rustls::ServerConfig>>,
        settings: ServerSettings,
    ) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let exports = Arc::new(OneDisk {
            export: Arc::new(export),
            admits,
        });
        let has_tls = tls.is_some();
        let server = Server::new(exports, settings, tls);
        let (stop, stopping) = watch::channel(false);
        let path = directory.path().join("nbd.sock");
        let port = runtime.block_on(async {
            let listener = UnixListener::bind(&path).unwrap();
            let local = Arc::clone(&server).serve_unix(listener, Stopping(stopping.clone()));
            tokio::spawn(local);
            if !has_tls {
                return None;
            }
            let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
            let port = listener.local_addr().unwrap().port();
            tokio::spawn(server.serve_tcp(listener, Stopping(stopping)));
            Some(port)
        });
        Self {
            directory,
            device,
            port,
            stop,
            runtime: Some(runtime),
        }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join("nbd.sock")
    }

    pub(crate) fn uri(&self) -> String {
        format!("nbd+unix:///disk?socket={}", self.socket().display())
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.stop.send_replace(true);
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(Duration::from_secs(5));
        }
    }
}

/// A path as text.
pub(crate) fn text(path: &Path) -> String {
    path.display().to_string()
}

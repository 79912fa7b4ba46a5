//! A live ext4 disk is protected while a process writes to a database on it; any of its states can
//! be mounted, and the newest equals the source byte by byte.

#![allow(clippy::unwrap_used)]

use std::fs::{File, OpenOptions};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use afterimage_protocol::rest::server::{Mount, Point};
use afterimage_tests::process::{FsMount, MIB, Scene, Setup, View, require, run, until};

/// A process that inserts rows, each in a transaction of its own, and notes those committed.
const PROGRAM: &str = "
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute('pragma journal_mode=wal'); db.execute('pragma synchronous=full')
db.execute('create table t (id integer primary key, text text)')
row = 0
while True:
    row += 1
    db.execute('insert into t values (?, ?)', (row, 'x' * (row % 900)))
    print(row, flush=True)
";

struct Database(Child);

impl Database {
    fn start(path: &Path, log: &Path) -> Self {
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "python3", "-c", PROGRAM])
            .arg(path)
            .stdout(File::create(log).unwrap())
            .stdin(Stdio::null())
            .spawn();
        Self(child.unwrap())
    }

    fn end(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        let _gone = self.0.kill();
        let _gone = self.0.wait();
    }
}

/// Rows whose commit was acknowledged.
fn committed(log: &Path) -> u64 {
    let text = std::fs::read_to_string(log).unwrap();
    let whole = text.rsplit_once('\n').map_or("", |(lines, _)| lines);
    whole
        .lines()
        .next_back()
        .map_or(0, |line| line.parse().unwrap())
}

fn rows(database: &Path) -> u64 {
    let path = database.display().to_string();
    let check = run("sqlite3", &[path.as_str(), "pragma integrity_check"]);
    assert_eq!(check.trim(), "ok", "{path}");
    let count = run(
        "sqlite3",
        &[
            path.as_str(),
            "select count(*), coalesce(max(id), 0) from t",
        ],
    );
    let (count, max) = count.trim().split_once('|').unwrap();
    assert_eq!(count, max, "a row is missing");
    count.parse().unwrap()
}

fn progress(log: &Path, more: u64) -> u64 {
    let wanted = committed(log) + more;
    until("more rows", || committed(log) >= wanted);
    committed(log)
}

#[test]
fn protect_live() {
    require(&["python3", "sqlite3", "blockdev"]);
    let scene = Scene::start(&Setup::default());
    let source = scene.image("disk.img", 512 * MIB);
    let device = scene.attach(&source, "root");
    run("mkfs.ext4", &["-q".as_ref(), device.as_os_str()]);
    let live = FsMount::new(&device, &scene.root.join("live"), "");
    // Something for the first copy to do.
    let mut filler = OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(live.path.join("old"))
        .unwrap();
    std::io::copy(
        &mut std::io::Read::take(File::open("/dev/urandom").unwrap(), 96 * MIB),
        &mut filler,
    )
    .unwrap();
    drop(filler);
    let log = scene.root.join("committed");
    let mut database = Database::start(&live.path.join("db"), &log);
    progress(&log, 50);
    scene.protect("root");
    let protected = Instant::now();
    println!("protected; {} rows by then", committed(&log));

    let before_point = progress(&log, 50);
    let point: Point = scene.aft_json(&["point", "create", "web1", "--name", "first"]);
    let after_point = committed(&log) + 1;
    println!(
        "point first: lsn {}, rows {before_point}..={after_point}",
        point.lsn.0
    );
    progress(&log, 100);
    scene.caught_up();

    // Named, by LSN and by time: the same state.
    let named = View::files(&scene, "web1/root@first");
    let at_point = rows(&named.path().join("db"));
    assert!(
        (before_point..=after_point).contains(&at_point),
        "{at_point}"
    );
    let mut last = at_point;
    for step in 1..=3 {
        let lsn = point.lsn.0 + step * 7;
        let view = View::files(&scene, &format!("web1/root@lsn:{lsn}"));
        let found = rows(&view.path().join("db"));
        println!(
            "lsn {lsn}: {found} rows, device after {} ms, all after {} ms",
            view.mount.device_ms, view.mount.total_ms
        );
        assert!(found >= last, "a later state has fewer rows");
        assert_eq!(view.mount.lsn.0, lsn);
        last = found;
        view.close();
    }
    until("an age of a second", || {
        protected.elapsed() > Duration::from_millis(1200)
    });
    let by_time = View::files(&scene, "web1/root@-1s");
    println!(
        "-1s: lsn {}, {} rows",
        by_time.mount.lsn.0,
        rows(&by_time.path().join("db"))
    );
    by_time.close();
    // A view stays what it is, whatever comes after it.
    assert_eq!(rows(&named.path().join("db")), at_point);
    named.close();

    // A directory of the user's, and `aft umount` by it.
    let place = scene.root.join("mine").display().to_string();
    let mount: Mount = scene.aft_json(&["mount", "web1/root@latest", &place]);
    assert_eq!(mount.directory.as_deref(), Some(place.as_str()));
    let acknowledged = rows(&Path::new(&place).join("db"));
    println!(
        "latest: {acknowledged} rows while {} are committed",
        committed(&log)
    );
    let _said = scene.aft_ok(&["umount", &place]);

    database.end();
    live.umount();
    scene.assert_replica_equals("root");
    let newest = View::files(&scene, "web1/root@latest");
    assert!(
        rows(&newest.path().join("db")) >= committed(&log),
        "a committed row is missing"
    );
    newest.close();
    let verified: afterimage_protocol::rest::server::VerifyReport =
        scene.aft_json(&["log", "verify"]);
    assert!(verified.damage.is_empty(), "{verified:?}");
    println!(
        "rows {}, verified {} slots",
        committed(&log),
        verified.slots
    );
}

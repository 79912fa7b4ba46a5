//! What takes room, how long it lasts, and quotas, with two machines of which one churns.

#![allow(clippy::unwrap_used)]

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use afterimage_protocol::message::DiskPhase;
use afterimage_protocol::rest::agent::AgentStatus;
use afterimage_protocol::rest::server::Event;
use afterimage_protocol::rest::space::{MachineSpace, PointSpaces, SpaceReport};
use afterimage_tests::process::daemon::Daemon;
use afterimage_tests::process::{
    Api, Chance, MIB, Scene, Setup, require, run, until, until_within,
};

const SEGMENT: u64 = 32 * MIB;
/// Bytes of one write, and of the part of the disk that is written.
const PIECE: usize = 64 << 10;
const AREA: u64 = 16 * MIB;
/// Time between two writes: about 3 MiB a second.
const PACE: Duration = Duration::from_millis(20);
const SERVER: &str = "collect_interval_ms = 1000\nretention_interval_ms = 1000\n\
                      window_min_ms = 1000\ncrash_mark_interval_ms = 1000000\n";

fn setup() -> Setup {
    Setup {
        server: format!("segment_bytes = {SEGMENT}\n{SERVER}"),
        ..Setup::default()
    }
}

/// Writes noise to random places of the first part of a device, at a constant pace.
struct Churner {
    end: Option<Sender<()>>,
    written: Arc<AtomicU64>,
    has_failed: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Churner {
    fn start(device: &Path) -> Self {
        let file = OpenOptions::new().write(true).open(device).unwrap();
        let mut noise = vec![0; 8 << 20];
        File::open("/dev/urandom")
            .unwrap()
            .read_exact(&mut noise)
            .unwrap();
        let (end, ended) = channel::<()>();
        let (written, has_failed) = (Arc::<AtomicU64>::default(), Arc::<AtomicBool>::default());
        let (count, failed) = (Arc::clone(&written), Arc::clone(&has_failed));
        let mut chance = Chance::new("churner");
        let begun = Instant::now();
        let thread = std::thread::spawn(move || {
            for number in 1.. {
                let place = usize::try_from(chance.below(8 << 20)).unwrap();
                let from = place.min(noise.len() - PIECE);
                let at = chance.below(AREA / PIECE as u64) * PIECE as u64;
                let is_written = file.write_all_at(&noise[from..from + PIECE], at).is_ok();
                // The writes must reach the tap at this pace, and not when the kernel likes.
                if !is_written || file.sync_data().is_err() {
                    failed.store(true, Ordering::Release);
                    return;
                }
                count.fetch_add(PIECE as u64, Ordering::Release);
                let next = begun + PACE * number;
                let wait = next.saturating_duration_since(Instant::now());
                if ended.recv_timeout(wait) != Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                    return;
                }
            }
        });
        Self {
            end: Some(end),
            written,
            has_failed,
            thread: Some(thread),
        }
    }

    fn written(&self) -> u64 {
        self.written.load(Ordering::Acquire)
    }

    fn stop(mut self) {
        self.end = None;
        self.thread.take().unwrap().join().unwrap();
        assert!(!self.has_failed.load(Ordering::Acquire), "a write failed");
    }
}

impl Drop for Churner {
    fn drop(&mut self) {
        self.end = None;
        if let Some(thread) = self.thread.take() {
            let _ended = thread.join();
        }
    }
}

/// A second machine, `web2`, with an agent of its own.
struct Other {
    _daemon: Daemon,
    socket: PathBuf,
}

impl Other {
    fn start(scene: &Scene) -> Self {
        let root = scene.root.join("second");
        std::fs::create_dir(&root).unwrap();
        let (state, socket) = (root.join("state"), root.join("agent.sock"));
        let config = root.join("agent.toml");
        let first = std::fs::read_to_string(scene.root.join("agent.toml")).unwrap();
        let links = scene.root.join("links").display().to_string();
        let own = root.join("links").display().to_string();
        std::fs::write(&config, first.replace(&links, &own)).unwrap();
        let enrolled = scene.enrol_as(&state, &scene.token(), "web2");
        assert_eq!(enrolled.code, 0, "{enrolled:?}");
        let text = |path: &Path| path.display().to_string();
        let arguments = ["run", "--state-dir", &text(&state), "--socket"];
        let mut arguments: Vec<String> = arguments.iter().map(ToString::to_string).collect();
        arguments.extend([text(&socket), "--config".to_owned(), text(&config)]);
        let daemon = Daemon::start("afterimage-agent", &arguments, &root.join("agent.log"));
        let other = Self {
            _daemon: daemon,
            socket,
        };
        let api = Api::new(&other.socket);
        until("the second agent", || {
            api.try_get::<AgentStatus>("/v1/status").is_some()
        });
        other
    }

    fn status(&self) -> AgentStatus {
        Api::new(&self.socket).get("/v1/status")
    }

    /// Protects an image; gives its device.
    fn protect(&self, scene: &Scene, image: &Path) -> PathBuf {
        let socket = self.socket.display().to_string();
        let image = image.display().to_string();
        let aft = |arguments: &[&str]| {
            let all = [&["--agent-socket", &socket], arguments].concat();
            let _said = scene.aft_ok(&all);
        };
        aft(&["disk", "attach", &image, "--name", "data"]);
        aft(&["disk", "protect", "data"]);
        until_within(Duration::from_secs(120), "protection", || {
            self.status().disks[0].phase == Some(DiskPhase::Protected)
        });
        PathBuf::from(&self.status().disks[0].device)
    }

    fn caught_up(&self) {
        let captured = self.status().captured;
        until("the second machine's acknowledgement", || {
            self.status().acknowledged >= captured
        });
    }
}

fn noise(path: &Path, bytes: u64) {
    let mut noise = vec![0; usize::try_from(bytes).unwrap()];
    File::open("/dev/urandom")
        .unwrap()
        .read_exact(&mut noise)
        .unwrap();
    let file = OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(&noise, 0).unwrap();
    file.sync_all().unwrap();
}

fn report(scene: &Scene) -> SpaceReport {
    scene.aft_json(&["space", "show"])
}

fn machine(report: &SpaceReport, name: &str) -> MachineSpace {
    let mut machines = report.machines.iter();
    machines.find(|known| known.name == name).unwrap().clone()
}

fn sum(rows: &[afterimage_protocol::rest::space::SpaceRow]) -> u64 {
    u64::try_from(rows.iter().map(|row| row.bytes).sum::<i64>()).unwrap()
}

fn row(report: &SpaceReport, kind: &str) -> i64 {
    let mut rows = report.rows.iter();
    rows.find(|row| row.kind == kind).map_or(0, |row| row.bytes)
}

fn collect(scene: &Scene) {
    let _said = scene.aft_ok(&["store", "collect"]);
}

/// What `du` says of the data directory, mounts left out.
fn du(scene: &Scene) -> u64 {
    let directory = scene.data_dir.display().to_string();
    let said = run("du", &["-s", "-x", "--block-size=1", &directory]);
    said.split_whitespace().next().unwrap().parse().unwrap()
}

/// Both machines, protected: the devices of web1/root and web2/data.
fn two_machines(scene: &Scene) -> (PathBuf, Other, PathBuf) {
    let image = scene.image("disk.img", 64 * MIB);
    noise(&image, AREA);
    let device = scene.attach(&image, "root");
    scene.protect("root");
    let other = Other::start(scene);
    let quiet = scene.image("quiet.img", 64 * MIB);
    noise(&quiet, 8 * MIB);
    let quiet = other.protect(scene, &quiet);
    for machine in ["web1", "web2"] {
        let _said = scene.aft_ok(&["policy", "set", machine, "--window", "1h"]);
    }
    (device, other, quiet)
}

/// The rows of the report are all that is there: they are what `du` says, to within one log segment
/// that is being prepared and a megabyte. And each machine's rows are what it needs.
#[test]
fn the_account_agrees_with_du_and_a_restart_forgets_no_churn() {
    require(&["blockdev", "du"]);
    let mut scene = Scene::start(&setup());
    let (device, other, _quiet) = two_machines(&scene);
    let churner = Churner::start(&device);
    until("some churn", || churner.written() > 24 * MIB);
    let _said = scene.aft_ok(&["point", "create", "web1", "--name", "kept"]);
    until("more churn", || churner.written() > 48 * MIB);
    let written = churner.written();
    churner.stop();
    scene.caught_up();
    other.caught_up();
    collect(&scene);
    collect(&scene);
    println!("{}", scene.aft_ok(&["space", "show"]));
    let found = report(&scene);
    assert!(found.account_time.is_some());
    assert_eq!(sum(&found.rows), found.disk_bytes);
    let (du, other_files) = (du(&scene), row(&found, "other-files"));
    let bound = SEGMENT + MIB;
    assert!(du.abs_diff(found.disk_bytes) < MIB, "{du} {found:?}");
    assert!(other_files.unsigned_abs() < bound, "{other_files}");
    for name in ["web1", "web2"] {
        let machine = machine(&found, name);
        assert_eq!(sum(&machine.rows), machine.needed_bytes, "{machine:?}");
    }
    let (churned, quiet) = (machine(&found, "web1"), machine(&found, "web2"));
    // Noise cannot be compressed: the area once, and every write that followed.
    let expected = AREA + written;
    let needed = churned.needed_bytes;
    assert!(
        (expected * 9 / 10..expected * 12 / 10).contains(&needed),
        "{needed} {expected}"
    );
    let current = churned.disks[0].current_bytes;
    assert!(
        (AREA * 9 / 10..AREA * 12 / 10).contains(&current),
        "{current}"
    );
    assert!(
        (8 * MIB..10 * MIB).contains(&quiet.needed_bytes),
        "{quiet:?}"
    );
    let disks = scene.aft_ok(&["disk", "list"]);
    assert!(disks.contains("NEEDS"), "{disks}");
    let before = churned.disks[0].written_per_day_bytes;
    assert!(before > 0, "{churned:?}");
    // It is recorded after a few of the timer's intervals.
    until("the record of the churn", || {
        let report = report(&scene);
        report.forecast.measured_s >= found.forecast.measured_s + 7
    });
    scene.stop_server();
    scene.start_server();
    let later = machine(&report(&scene), "web1").disks[0].written_per_day_bytes;
    assert!(later > before / 3 && later < before * 2, "{before} {later}");
    let said = scene.aft_ok(&["space", "points", "web1"]);
    assert!(said.contains("kept"), "{said}");
}

/// A quota thins the machine that churns and nobody else, when the forecast said so.
#[test]
fn a_quota_thins_only_the_churner_when_the_forecast_said() {
    require(&["blockdev", "du"]);
    let scene = Scene::start(&setup());
    let (device, other, _quiet) = two_machines(&scene);
    let _said = scene.aft_ok(&["point", "create", "web2", "--name", "old"]);
    let churner = Churner::start(&device);
    until("a measured churn", || churner.written() > 16 * MIB);
    collect(&scene);
    let quota = machine(&report(&scene), "web1").needed_bytes / MIB + 64;
    let _said = scene.aft_ok(&["quota", "set", "web1", &format!("{quota}MiB")]);
    let listed = scene.aft_ok(&["quota", "list"]);
    assert!(listed.contains("web1"), "{listed}");
    let begun = Instant::now();
    let forecast = machine(&report(&scene), "web1").forecast.unwrap();
    println!("{}", forecast.text);
    assert!(forecast.text.contains("you can keep"), "{forecast:?}");
    let lasts = Duration::from_secs(forecast.lasts_s.unwrap());
    let status = scene.status();
    let warning = "its quota runs short";
    assert!(
        status.causes.iter().any(|cause| cause.contains(warning)),
        "{status:?}"
    );
    let said = scene.aft_ok(&["status"]);
    assert!(said.contains("space: "), "{said}");
    let shortened = || {
        let events = scene.events();
        let texts = events
            .into_iter()
            .filter(|event| event.kind == "window-shortened");
        texts.map(|event| event.text).collect::<Vec<_>>()
    };
    until_within(Duration::from_secs(120), "the thinning", || {
        !shortened().is_empty()
    });
    let took = begun.elapsed();
    println!("forecast {lasts:?}, and it took {took:?}");
    assert!(
        took > lasts / 2 && took < lasts * 2 + Duration::from_secs(5),
        "{lasts:?} {took:?}"
    );
    // It goes on being thinned, and its quota is kept to within what comes between two looks.
    let until_then = churner.written() + 64 * MIB;
    until_within(Duration::from_secs(120), "more churn", || {
        churner.written() > until_then
    });
    collect(&scene);
    let found = report(&scene);
    println!("{}", scene.aft_ok(&["space", "show"]));
    let told = |event: &Event| event.kind == "space-short" && event.text.contains("web1");
    assert!(scene.events().iter().any(told), "nobody was warned");
    let (churned, quiet) = (machine(&found, "web1"), machine(&found, "web2"));
    assert!(churned.window_s < 3600, "{churned:?}");
    assert!(churned.needed_bytes < quota * MIB * 5 / 4, "{churned:?}");
    assert_eq!(quiet.window_s, 3600, "{quiet:?}");
    assert!(churned.waits.is_none(), "{churned:?}");
    let warned = scene.events().into_iter().position(|event| told(&event));
    let thinned = scene
        .events()
        .into_iter()
        .position(|event| event.kind == "window-shortened");
    assert!(warned < thinned, "it was thinned before it was said");
    let names = shortened();
    assert!(names.iter().all(|text| text.contains("web1")), "{names:?}");
    let points: PointSpaces = scene.aft_json(&["space", "points", "web2"]);
    assert!(points.points.iter().any(|point| point.name == "old"));
    churner.stop();
    other.caught_up();
    scene.assert_replica_equals("root");
}

/// A lock that cannot be carried is refused with the figures; one that was taken before the quota
/// makes the machine wait, and nobody else.
#[test]
fn locks_that_do_not_fit_are_refused_and_a_full_quota_stops_one_machine() {
    require(&["blockdev", "du"]);
    let scene = Scene::start(&setup());
    let (device, other, quiet) = two_machines(&scene);
    let churner = Churner::start(&device);
    until("a measured churn", || churner.written() > 40 * MIB);
    for name in ["first", "second"] {
        let _said = scene.aft_ok(&["point", "create", "web1", "--name", name]);
        let until_then = churner.written() + 20 * MIB;
        until("churn", || churner.written() > until_then);
    }
    collect(&scene);
    let lock = |name: &str| scene.aft(&["point", "lock", "web1", name, "--for", "30d"]);
    let small = format!("{}MiB", AREA / MIB + 12);
    let _said = scene.aft_ok(&["quota", "set", "web1", &small]);
    let refused = lock("first");
    println!("{}", refused.stderr.trim());
    refused.refuses(3, &["nothing was locked", "its quota is", "MiB"]);
    let rule = scene.aft(&["policy", "set", "web1", "--lock", "30d"]);
    rule.refuses(3, &["locked by the policy", "its quota is"]);
    let tiny = scene.aft(&["quota", "set", "web1", "2MiB"]);
    tiny.refuses(3, &["the newest state and locked points take"]);
    let _said = scene.aft_ok(&["quota", "clear", "web1"]);
    let taken = scene.aft(&["point", "create", "web1", "--name", "third"]);
    assert_eq!(taken.code, 0, "{taken:?}");
    let locked = lock("third");
    assert_eq!(locked.code, 0, "{locked:?}");
    collect(&scene);
    let larger = format!("{}MiB", AREA / MIB + 14);
    let _said = scene.aft_ok(&["quota", "set", "web1", &larger]);
    until_within(Duration::from_secs(120), "the wait", || {
        machine(&report(&scene), "web1").waits.is_some()
    });
    let status = scene.status();
    println!("{:?}", status.causes);
    assert_eq!(status.health, "red");
    assert!(
        status
            .causes
            .iter()
            .any(|cause| cause.contains("web1: its ingest waits"))
    );
    assert!(!status.is_ingest_paused, "it is one machine that waits");
    until("something that waits", || {
        let agent = scene.agent_status();
        agent.captured > agent.acknowledged
    });
    noise(&quiet, 4 * MIB);
    other.caught_up();
    let kinds: Vec<String> = scene.events().into_iter().map(|event| event.kind).collect();
    assert!(
        kinds.iter().any(|kind| kind == "machine-paused"),
        "{kinds:?}"
    );
    let _said = scene.aft_ok(&["quota", "set", "web1", "1GiB"]);
    until_within(Duration::from_secs(120), "ingest to go on", || {
        machine(&report(&scene), "web1").waits.is_none()
    });
    churner.stop();
    scene.caught_up();
    scene.assert_replica_equals("root");
}

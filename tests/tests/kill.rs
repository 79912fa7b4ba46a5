//! `kill -9` of the appliance, of the agent and of both, at random instants under load. Writers
//! note outside of the disk what was acknowledged to them; all of that is in the replica
//! afterwards, LSNs only rise, and after an agent's death only marked regions are read.

#![allow(clippy::unwrap_used)]

use std::path::PathBuf;

use afterimage_tests::process::{
    Chance, FsMount, Journal, MIB, Scene, Setup, View, Writers, assert_equal_devices, require,
    rounds, run, until,
};

const DISK_BYTES: u64 = 1024 * MIB;
const WRITERS: u64 = 4;
/// The most that a recheck may read: regions of 1 MiB, of which the writers use a few dozen.
const RECHECK_BYTES_MAX: u64 = DISK_BYTES / 8;

struct Rig {
    scene: Scene,
    live: Option<FsMount>,
    chance: Chance,
    /// What was acknowledged on file systems that were unmounted since.
    journals: Vec<Journal>,
    next_writer: u64,
    epoch: u64,
    durable: u64,
    /// An LSN from before all deaths, and the state that belongs to it.
    known: (u64, PathBuf),
}

impl Rig {
    fn new(test: &str) -> Self {
        require(&["blockdev", "cp"]);
        let chance = Chance::new(test);
        let scene = Scene::start(&Setup::default());
        let source = scene.image("disk.img", DISK_BYTES);
        let device = scene.attach(&source, "root");
        run("mkfs.ext4", &["-q".as_ref(), device.as_os_str()]);
        scene.protect("root");
        scene.caught_up();
        let known = scene.root.join("known.img");
        run(
            "cp",
            &[
                "--sparse=always".as_ref(),
                source.as_os_str(),
                known.as_os_str(),
            ],
        );
        let known = (scene.agent_status().captured.0, known);
        let mut rig = Self {
            scene,
            live: None,
            chance,
            journals: Vec::new(),
            next_writer: 0,
            epoch: 0,
            durable: 0,
            known,
        };
        rig.mount();
        rig
    }

    fn place(&self) -> PathBuf {
        self.scene.root.join("live")
    }

    fn mount(&mut self) {
        let device = self.scene.device("root");
        self.live = Some(FsMount::new(&device, &self.place(), ""));
    }

    fn writers(&mut self) -> Writers {
        let first = self.next_writer;
        self.next_writer += WRITERS;
        Writers::start(&self.place(), first, WRITERS)
    }

    /// Lets the writers go on for a random while; gives what the daemons promised by then.
    fn random_instant(&mut self, writers: &Writers) {
        let more = 1 + self.chance.below(400);
        writers.progress(more);
        let machine = self.scene.machine();
        assert!(machine.durable.0 >= self.durable, "the durable LSN fell");
        self.durable = machine
            .durable
            .0
            .max(self.scene.agent_status().acknowledged.0);
    }

    /// What the appliance has is never less than what it promised.
    fn check_durable(&mut self) {
        let durable = self.scene.machine().durable.0;
        assert!(
            durable >= self.durable,
            "durable {durable}, promised {}",
            self.durable
        );
        self.durable = durable;
    }

    /// All that was acknowledged before the call is in the newest state of the replica.
    fn check_replica(&self, mut journals: Vec<Journal>) {
        journals.extend(self.journals.iter().cloned());
        self.scene.caught_up();
        let view = View::files(&self.scene, "web1/root@latest");
        journals
            .iter()
            .for_each(|journal| journal.check(view.path()));
        view.close();
    }

    /// After an agent's death: the writers were told honestly, and the disk comes back whole.
    fn agent_died(&mut self, writers: Writers) {
        let journals = writers.wait_for_errors();
        self.journals.extend(journals);
        self.live.take().unwrap().umount();
    }

    fn agent_is_back(&mut self) -> u64 {
        self.scene.connected();
        self.scene.protected("root");
        let status = self.scene.agent_status();
        assert!(status.epoch.0 > self.epoch, "a new run is a new epoch");
        assert!(status.captured.0 >= self.durable, "LSNs only rise");
        self.epoch = status.epoch.0;
        let disk = self.scene.disk("root");
        assert!(disk.recheck_read_bytes <= RECHECK_BYTES_MAX, "{disk:?}");
        self.check_durable();
        self.mount();
        self.journals
            .iter()
            .for_each(|journal| journal.check(&self.place()));
        disk.recheck_read_bytes
    }

    fn finish(mut self, acknowledged: u64) {
        self.live.take().unwrap().umount();
        self.scene.assert_replica_equals("root");
        let (lsn, known) = &self.known;
        let view = self.scene.view(&format!("web1/root@lsn:{lsn}"));
        assert_equal_devices(&view.device, known);
        view.close();
        let report: afterimage_protocol::rest::server::VerifyReport =
            self.scene.aft_json(&["log", "verify"]);
        assert!(report.damage.is_empty(), "{report:?}");
        println!(
            "{acknowledged} acknowledged writes; durable lsn {}",
            self.durable
        );
    }
}

#[test]
fn kill_server() {
    let mut rig = Rig::new("kill_server");
    let writers = rig.writers();
    for round in 1..=rounds() {
        rig.random_instant(&writers);
        rig.scene.kill_server();
        // The source does not notice, however long it takes.
        writers.progress(200);
        if rig.chance.below(3) == 0 {
            // Once more, somewhere inside recovery.
            rig.scene.spawn_server();
            let looks = rig.chance.below(30);
            let mut look = 0;
            until("an instant of recovery", || {
                look += 1;
                look > looks
            });
            rig.scene.kill_server();
        }
        rig.scene.start_server();
        rig.scene.connected();
        let so_far = writers.so_far();
        rig.check_replica(so_far);
        rig.check_durable();
        let disk = rig.scene.disk("root");
        assert_eq!(
            disk.recheck_read_bytes, 0,
            "a restarted server causes no resync"
        );
        println!(
            "round {round}: {} writes, durable {}",
            writers.acknowledged(),
            rig.durable
        );
    }
    let acknowledged = writers.acknowledged();
    let (journals, failed) = writers.stop();
    assert_eq!(failed, 0, "the source stays usable");
    rig.check_replica(journals);
    rig.finish(acknowledged);
}

#[test]
fn kill_agent() {
    let mut rig = Rig::new("kill_agent");
    let mut acknowledged = 0;
    for round in 1..=rounds() {
        let writers = rig.writers();
        rig.random_instant(&writers);
        rig.scene.kill_agent();
        acknowledged += writers.acknowledged();
        rig.agent_died(writers);
        rig.scene.start_agent();
        let read = rig.agent_is_back();
        rig.check_replica(Vec::new());
        println!(
            "round {round}: {acknowledged} writes, durable {}, recheck_read_bytes {read}",
            rig.durable
        );
    }
    rig.finish(acknowledged);
}

#[test]
fn kill_both() {
    let mut rig = Rig::new("kill_both");
    let mut acknowledged = 0;
    for round in 1..=rounds() {
        let writers = rig.writers();
        rig.random_instant(&writers);
        let is_agent_first = rig.chance.below(2) == 0;
        if is_agent_first {
            rig.scene.kill_agent();
            rig.scene.kill_server();
        } else {
            rig.scene.kill_server();
            if rig.chance.below(2) == 0 {
                let more = 1 + rig.chance.below(200);
                writers.progress(more);
            }
            rig.scene.kill_agent();
        }
        acknowledged += writers.acknowledged();
        rig.agent_died(writers);
        if rig.chance.below(2) == 0 {
            rig.scene.start_server();
            rig.scene.start_agent();
        } else {
            rig.scene.start_agent();
            rig.scene.start_server();
        }
        let read = rig.agent_is_back();
        rig.check_replica(Vec::new());
        println!(
            "round {round}: {acknowledged} writes, durable {}, recheck_read_bytes {read}",
            rig.durable
        );
    }
    rig.finish(acknowledged);
}

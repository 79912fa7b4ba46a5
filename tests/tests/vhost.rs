//! Disks of virtual machines, from the daemon to a driver that nobody here wrote: points are what
//! the source was, branches keep what a guest wrote, and a guest's death costs nobody else.

#![allow(clippy::unwrap_used)]

// Another test uses more of it.
#[allow(dead_code)]
#[path = "../../blockdev/vhost/tests/driver/guest.rs"]
mod guest;
#[path = "../../blockdev/vhost/tests/driver/stream.rs"]
mod stream;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use afterimage_protocol::rest::vhost::VhostSocket;
use afterimage_tests::process::{MIB, Scene, Setup, run, until};
use guest::{Ask, Guest};
use stream::{SLOT_BYTES, Stream};

const DISK_BYTES: u64 = 16 * MIB;
/// Tells the guest that is to be killed where its disk is.
const SOCKET: &str = "AFTERIMAGE_TEST_SOCKET";
const GOING: &str = "the guest is at work";

/// A protected disk with noise on it and a point; and what the disk was there.
fn scene() -> (Scene, Vec<u8>) {
    let scene = Scene::start(&Setup::default());
    let source = scene.image("disk.img", DISK_BYTES);
    let device = scene.attach(&source, "disk");
    let noise = scene.root.join("noise");
    let bytes: Vec<u8> = (0..3 * MIB)
        .map(|at| u8::try_from((at * 7 + at / 251) % 256).unwrap())
        .collect();
    std::fs::write(&noise, bytes).unwrap();
    let (from, to) = (
        format!("if={}", noise.display()),
        format!("of={}", device.display()),
    );
    run(
        "dd",
        &[&from, &to, "bs=1M", "seek=2", "oflag=direct", "status=none"],
    );
    scene.protect("disk");
    scene.caught_up();
    let made = scene.aft(&["point", "create", "web1", "--name", "then"]);
    assert_eq!(made.code, 0, "{made:?}");
    let kept = std::fs::read(&device).unwrap();
    assert_eq!(kept.len() as u64, DISK_BYTES);
    (scene, kept)
}

fn serve(scene: &Scene, reference: &str, name: &str) -> (PathBuf, VhostSocket) {
    let socket = scene.root.join(name);
    let path = socket.to_str().unwrap().to_owned();
    let served = scene.aft_json(&["vhost", "serve", reference, "--path", &path]);
    (socket, served)
}

fn end(scene: &Scene, socket: &Path) {
    let _said = scene.aft_ok(&["vhost", "end", socket.to_str().unwrap()]);
    assert!(!socket.exists());
}

fn connect(socket: &Path, queues: usize, slots: usize) -> Guest {
    Guest::connect(socket, queues, 256, slots, SLOT_BYTES).unwrap()
}

fn whole_disk(guest: &mut Guest) -> Vec<u8> {
    let mut all = Vec::new();
    for offset in (0..DISK_BYTES).step_by(SLOT_BYTES) {
        let bytes = SLOT_BYTES;
        assert_eq!(guest.one(0, Ask::Read { offset, bytes }).unwrap(), 0);
        all.extend(guest.look(0, bytes).unwrap());
    }
    all
}

fn listed(scene: &Scene) -> Vec<VhostSocket> {
    scene.aft_json(&["vhost", "list"])
}

#[test]
fn a_point_is_a_read_only_disk_and_what_is_wrong_is_refused() {
    let (scene, kept) = scene();
    let (socket, served) = serve(&scene, "web1/disk@then", "then.sock");
    assert!(!served.is_writable);
    assert_eq!(served.size_bytes, DISK_BYTES);
    let mut guest = connect(&socket, 1, 1);
    assert!(whole_disk(&mut guest) == kept, "the point is another one");
    let bytes = 512;
    assert_eq!(guest.one(0, Ask::Write { offset: 0, bytes }).unwrap(), -5);
    let all = listed(&scene);
    assert_eq!(all.len(), 1);
    assert!(all[0].is_connected);

    let path = socket.to_str().unwrap();
    let again = scene.aft(&["vhost", "serve", "web1/disk@then", "--path", path]);
    again.refuses(again.code, &["served already"]);
    let free = scene.root.join("free.sock");
    let free = free.to_str().unwrap();
    for reference in [
        "web1/disk@never",
        "web1/none@latest",
        "web1/disk@branch:none",
    ] {
        let outcome = scene.aft(&["vhost", "serve", reference, "--path", free]);
        assert_ne!(outcome.code, 0, "{reference}");
    }
    drop(guest);
    end(&scene, &socket);
    assert!(listed(&scene).is_empty());
    assert_ne!(scene.aft(&["vhost", "end", path]).code, 0);
}

#[test]
fn a_branch_keeps_what_a_guest_wrote() {
    let (scene, kept) = scene();
    let _made = scene.aft_ok(&["branch", "create", "web1/disk@then", "try"]);
    let (socket, served) = serve(&scene, "web1/disk@branch:try", "try.sock");
    assert!(served.is_writable);
    let mut guest = connect(&socket, 2, 32);
    let mut stream = Stream::new(1, kept.clone(), 2, 16);
    stream.run(&mut guest, 1500);
    assert_eq!(guest.one(0, Ask::Flush).unwrap(), 0);
    drop(guest);
    end(&scene, &socket);

    let (socket, _) = serve(&scene, "web1/disk@branch:try", "again.sock");
    let mut guest = connect(&socket, 1, 1);
    assert!(
        whole_disk(&mut guest) == stream.bytes,
        "the branch is another one"
    );
    drop(guest);
    end(&scene, &socket);
    let (socket, _) = serve(&scene, "web1/disk@then", "then.sock");
    let mut guest = connect(&socket, 1, 1);
    assert!(whole_disk(&mut guest) == kept, "the point has changed");
    drop(guest);
    end(&scene, &socket);
}

#[test]
fn a_guest_that_is_killed_costs_nobody_else() {
    let (scene, kept) = scene();
    let _made = scene.aft_ok(&["branch", "create", "web1/disk@then", "try"]);
    let (socket, _) = serve(&scene, "web1/disk@branch:try", "try.sock");
    let (other, _) = serve(&scene, "web1/disk@then", "then.sock");
    let mut bystander = connect(&other, 1, 1);
    for _ in 0..3 {
        let mut victim = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "guest_at_work", "--ignored", "--nocapture"])
            .env(SOCKET, &socket)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let said = BufReader::new(victim.stdout.take().unwrap());
        let is_going = said.lines().any(|line| line.unwrap().contains(GOING));
        assert!(is_going, "the guest ended by itself");
        victim.kill().unwrap();
        victim.wait().unwrap();
        until("the guest is gone", || {
            let all = listed(&scene);
            let own = all
                .iter()
                .find(|one| one.socket == socket.to_str().unwrap());
            own.is_some_and(|one| !one.is_connected)
        });
        assert!(whole_disk(&mut bystander) == kept);
    }
    let mut next = connect(&socket, 1, 1);
    let bytes = 4096;
    assert_eq!(next.one(0, Ask::Write { offset: 0, bytes }).unwrap(), 0);
    assert_eq!(next.one(0, Ask::Flush).unwrap(), 0);
    drop((next, bystander));
    end(&scene, &socket);
    end(&scene, &other);
}

/// Works until it is killed, by the test above, which starts it.
#[test]
#[ignore = "it is a program of another test"]
fn guest_at_work() {
    let Some(socket) = std::env::var_os(SOCKET) else {
        return;
    };
    let mut guest = connect(Path::new(&socket), 2, 32);
    for round in 0_u64.. {
        for slot in 0..32 {
            let offset = (round * 32 + slot as u64) % (DISK_BYTES / 4096) * 4096;
            let bytes = 4096;
            guest
                .ask(slot % 2, slot, Ask::Write { offset, bytes })
                .unwrap();
        }
        guest.kick(0).unwrap();
        guest.kick(1).unwrap();
        for queue in 0..2 {
            let mut left = 16;
            while left > 0 {
                left -= guest.answers(queue).unwrap().len();
            }
        }
        if round == 8 {
            println!("{GOING}");
        }
    }
}

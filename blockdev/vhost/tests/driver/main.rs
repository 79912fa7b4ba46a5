//! The server with a driver that nobody here wrote.

mod guest;
mod stream;

use std::path::PathBuf;
use std::sync::Arc;

use afterimage_blockdev::MemoryDevice;
use afterimage_vhost::{Server, Settings};
use guest::{Ask, Guest};
use stream::{SLOT_BYTES, Stream};
use tempfile::TempDir;

const DISK_BYTES: usize = 8 << 20;

struct Rig {
    directory: TempDir,
    device: Arc<MemoryDevice>,
    server: Server,
}

impl Rig {
    fn new(settings: Settings) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let device = MemoryDevice::new(DISK_BYTES as u64, 512);
        let path = directory.path().join("disk.sock");
        let server = Server::start(&path, Arc::clone(&device) as _, settings).expect("a server");
        Self {
            directory,
            device,
            server,
        }
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("disk.sock")
    }
}

fn streams(queues: usize, depth: usize, commands: usize) {
    let rig = Rig::new(Settings::default());
    let slots = queues * depth;
    let mut guest = Guest::connect(&rig.socket(), queues, 256, slots, SLOT_BYTES).expect("a guest");
    let seed = (queues * 1000 + depth) as u64;
    let mut stream = Stream::new(seed, vec![0; DISK_BYTES], queues, depth);
    stream.run(&mut guest, commands);
    drop(guest);
    rig.server.end();
    assert!(
        rig.device.image() == stream.bytes,
        "the disk is another one"
    );
}

#[test]
fn one_request_at_a_time_reads_what_was_written() {
    streams(1, 1, 2000);
}

#[test]
fn four_at_a_time_on_each_of_two_queues_read_what_was_written() {
    streams(2, 4, 4000);
}

#[test]
fn sixteen_at_a_time_on_each_of_four_queues_read_what_was_written() {
    streams(4, 16, 6000);
}

#[test]
fn sixty_four_at_a_time_read_what_was_written() {
    streams(1, 64, 6000);
}

#[test]
fn a_guest_learns_size_and_manners_of_its_disk() {
    let rig = Rig::new(Settings::default());
    let guest = Guest::connect(&rig.socket(), 1, 128, 1, SLOT_BYTES).expect("a guest");
    let config = guest.config().expect("a configuration");
    assert_eq!(u64::from(config.capacity), DISK_BYTES as u64 / 512);
    assert_eq!(u32::from(config.blk_size), 512);
    assert_eq!(u32::from(config.seg_max), 126);
    assert_eq!(u16::from(config.num_queues), 4);
    assert!(u32::from(config.max_discard_sectors) > 0);
    assert_eq!(guest.features() & 1 << 5, 0, "not read-only");
    drop(guest);
    rig.server.end();

    let rig = Rig::new(Settings::default());
    rig.device.set_read_only(true);
    let mut guest = Guest::connect(&rig.socket(), 1, 128, 1, SLOT_BYTES).expect("a guest");
    assert_ne!(guest.features() & 1 << 5, 0, "read-only");
    assert_eq!(guest.features() & (1 << 13 | 1 << 14), 0, "no discard");
    let write = Ask::Write {
        offset: 0,
        bytes: 512,
    };
    assert_eq!(guest.one(0, write).expect("an answer"), -5);
    let read = Ask::Read {
        offset: 0,
        bytes: 512,
    };
    assert_eq!(guest.one(0, read).expect("an answer"), 0);
    drop(guest);
    rig.server.end();
}

#[test]
fn what_is_outside_the_disk_is_an_error_and_not_the_end() {
    let rig = Rig::new(Settings::default());
    let mut guest = Guest::connect(&rig.socket(), 1, 128, 1, SLOT_BYTES).expect("a guest");
    let end = DISK_BYTES as u64;
    let outside = [
        Ask::Read {
            offset: end,
            bytes: 512,
        },
        Ask::Read {
            offset: end - 512,
            bytes: 1024,
        },
        Ask::Write {
            offset: u64::MAX - 511,
            bytes: 512,
        },
        Ask::Read {
            offset: 0,
            bytes: 100,
        },
        Ask::Discard {
            offset: end - 512,
            bytes: 1024,
        },
        Ask::Zeroes {
            offset: end,
            bytes: 512,
            may_unmap: false,
        },
    ];
    for ask in outside {
        assert_eq!(guest.one(0, ask).expect("an answer"), -5, "{ask:?}");
    }
    let read = Ask::Read {
        offset: 0,
        bytes: 512,
    };
    assert_eq!(guest.one(0, read).expect("an answer"), 0);
    drop(guest);
    rig.server.end();
}

#[test]
fn a_small_budget_delays_and_loses_nothing() {
    let settings = Settings {
        in_flight_bytes: 4096,
        ..Settings::default()
    };
    let rig = Rig::new(settings);
    let mut guest = Guest::connect(&rig.socket(), 2, 256, 64, SLOT_BYTES).expect("a guest");
    let mut stream = Stream::new(7, vec![0; DISK_BYTES], 2, 32);
    stream.run(&mut guest, 2000);
    drop(guest);
    rig.server.end();
}

#[test]
fn guests_come_and_go_and_only_one_is_served_at_a_time() {
    let rig = Rig::new(Settings::default());
    let first = Guest::connect(&rig.socket(), 1, 128, 1, SLOT_BYTES).expect("a guest");
    assert!(Guest::connect(&rig.socket(), 1, 128, 1, SLOT_BYTES).is_err());
    drop(first);
    // The server may still be seeing the first one off.
    let mut second = loop {
        if let Ok(guest) = Guest::connect(&rig.socket(), 1, 128, 1, SLOT_BYTES) {
            break guest;
        }
        std::thread::yield_now();
    };
    let read = Ask::Read {
        offset: 0,
        bytes: 512,
    };
    assert_eq!(second.one(0, read).expect("an answer"), 0);
    assert_eq!(rig.server.status().connections, 2);
    let socket = rig.socket();
    rig.server.end();
    assert!(!socket.exists(), "the socket's file is gone");
    drop(second);
}

#[test]
fn a_path_that_is_taken_is_refused_and_a_dead_socket_is_not() {
    let rig = Rig::new(Settings::default());
    let start = |path: &std::path::Path| {
        Server::start(path, Arc::clone(&rig.device) as _, Settings::default())
    };
    assert!(start(&rig.socket()).is_err(), "somebody serves it");
    let file = rig.directory.path().join("file");
    std::fs::write(&file, "precious").expect("a file");
    assert!(start(&file).is_err(), "it is no socket");
    assert_eq!(std::fs::read(&file).expect("a file"), b"precious");
    let dead = rig.directory.path().join("dead.sock");
    drop(std::os::unix::net::UnixListener::bind(&dead).expect("a socket"));
    start(&dead).expect("a dead socket is taken over").end();
}

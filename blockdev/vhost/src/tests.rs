//! Guests that lie: each lie is answered with an error, or ends the connection, and costs nobody
//! else anything.

use std::sync::Arc;

use afterimage_blockdev::MemoryDevice;

use crate::harness::{Outcome, run_ring};

const QUEUE_SIZE: u16 = 16;
const AVAILABLE: usize = 0x1000;
const USED: usize = 0x2000;
const HEADER: usize = 0x3000;
const DATA: usize = 0x4000;
const TABLE: usize = 0x7000;
const STATUS: usize = 0x8000;
const MEMORY_BYTES: usize = 0x9000;
const DISK_BYTES: u64 = 1 << 20;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const NO_STATUS: u8 = 0xee;

/// A descriptor: address, length, flags, next.
type Descriptor = (u64, u32, u16, u16);

/// A guest's memory.
struct Image(Vec<u8>);

impl Image {
    fn new() -> Self {
        let mut image = Self(vec![0; MEMORY_BYTES]);
        image.0[STATUS] = NO_STATUS;
        image
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn describe(&mut self, at: usize, list: &[Descriptor]) {
        for (index, (address, length, flags, next)) in list.iter().enumerate() {
            let at = at + index * 16;
            self.put(at, &address.to_le_bytes());
            self.put(at + 8, &length.to_le_bytes());
            self.put(at + 12, &flags.to_le_bytes());
            self.put(at + 14, &next.to_le_bytes());
        }
    }

    fn header(&mut self, kind: u32, sector: u64) {
        self.put(HEADER, &kind.to_le_bytes());
        self.put(HEADER + 8, &sector.to_le_bytes());
    }

    /// Offers chains by their heads, and says how many there are.
    fn offer(&mut self, heads: &[u16], count: u16) {
        for (index, head) in heads.iter().enumerate() {
            self.put(AVAILABLE + 4 + index * 2, &head.to_le_bytes());
        }
        self.put(AVAILABLE + 2, &count.to_le_bytes());
    }

    fn run(self) -> Outcome {
        let device = MemoryDevice::new(DISK_BYTES, 512);
        let addresses = [0, AVAILABLE as u64, USED as u64];
        run_ring(&self.0, addresses, QUEUE_SIZE, device)
    }

    /// The status of the one request, which must have been answered.
    fn status(self) -> u8 {
        match self.run() {
            Outcome::Served(after) => {
                assert_eq!(after[USED + 2], 1, "one answer");
                after[STATUS]
            }
            Outcome::Ended(reason) => panic!("ended: {reason}"),
        }
    }

    fn reason(self) -> String {
        match self.run() {
            Outcome::Ended(reason) => reason,
            Outcome::Served(after) => panic!("served, with status {}", after[STATUS]),
        }
    }
}

/// A header, data of one descriptor, and a status.
fn usual(data: Descriptor) -> Image {
    let mut image = Image::new();
    let header = (HEADER as u64, 16, NEXT, 1);
    image.describe(0, &[header, data, (STATUS as u64, 1, WRITE, 0)]);
    image.offer(&[0], 1);
    image
}

fn request(kind: u32, sector: u64, data: Descriptor) -> u8 {
    let mut image = usual(data);
    image.header(kind, sector);
    image.status()
}

fn readable(bytes: u32) -> Descriptor {
    (DATA as u64, bytes, NEXT, 2)
}

fn writable(bytes: u32) -> Descriptor {
    (DATA as u64, bytes, NEXT | WRITE, 2)
}

#[test]
fn honest_requests_succeed() {
    assert_eq!(request(0, 0, writable(4096)), 0);
    assert_eq!(request(1, 0, readable(4096)), 0);
    assert_eq!(request(4, 0, readable(0)), 0);
    assert_eq!(request(8, 0, writable(20)), 0);
}

#[test]
fn the_serial_number_is_cut_to_what_there_is_room_for() {
    for (room, found) in [(20, 10), (4, 4)] {
        let mut image = usual(writable(room));
        image.header(8, 0);
        let Outcome::Served(after) = image.run() else {
            panic!("not served");
        };
        assert_eq!(&after[DATA..DATA + found], &b"afterimage"[..found]);
        assert_eq!(&after[DATA + found..DATA + 20], &[0; 20][found..]);
    }
}

#[test]
fn unknown_types_are_not_supported() {
    for kind in [2, 3, 5, 14, 16, 0x8000_0000, u32::MAX] {
        assert_eq!(request(kind, 0, writable(512)), 2, "type {kind}");
    }
}

#[test]
fn lengths_and_places_that_do_not_fit_are_errors() {
    let sectors = DISK_BYTES / 512;
    assert_eq!(request(0, 0, writable(0)), 1, "nothing to read");
    assert_eq!(request(0, 0, writable(100)), 1, "no whole sector");
    assert_eq!(request(0, sectors, writable(512)), 1, "behind the end");
    assert_eq!(request(0, sectors - 1, writable(1024)), 1, "over the end");
    assert_eq!(
        request(1, u64::MAX, readable(512)),
        1,
        "an address that wraps"
    );
    assert_eq!(request(1, u64::MAX / 512 + 1, readable(512)), 1);
    assert_eq!(
        request(0, 0, writable(0xffff_fe00)),
        1,
        "more than was offered"
    );
}

#[test]
fn data_outside_the_guests_memory_is_an_error() {
    let far = 1 << 40;
    assert_eq!(request(0, 0, (far, 512, NEXT | WRITE, 2)), 1);
    assert_eq!(request(1, 0, (far, 512, NEXT, 2)), 1);
    assert_eq!(request(1, 0, (u64::MAX - 100, 512, NEXT, 2)), 1);
    let end = MEMORY_BYTES as u64 - 256;
    assert_eq!(request(0, 0, (end, 512, NEXT | WRITE, 2)), 1, "half inside");
    let mut image = Image::new();
    image.describe(0, &[(far, 16, NEXT, 1), (STATUS as u64, 1, WRITE, 0)]);
    image.offer(&[0], 1);
    assert_eq!(image.status(), 1, "no header");
}

#[test]
fn ranges_of_discard_and_zeroes_are_checked() {
    let ranged = |kind: u32, sector: u64, sectors: u32, flags: u32, bytes: u32| {
        let mut image = usual(readable(bytes));
        image.header(kind, 0);
        image.put(DATA, &sector.to_le_bytes());
        image.put(DATA + 8, &sectors.to_le_bytes());
        image.put(DATA + 12, &flags.to_le_bytes());
        image.status()
    };
    for kind in [11, 13] {
        assert_eq!(ranged(kind, 0, 8, 0, 16), 0);
        assert_eq!(ranged(kind, 0, 0, 0, 16), 1, "nothing");
        assert_eq!(ranged(kind, 0, u32::MAX, 0, 16), 1, "more than was offered");
        assert_eq!(ranged(kind, u64::MAX, 8, 0, 16), 1, "an address that wraps");
        assert_eq!(ranged(kind, 0, 8, 2, 16), 2, "an unknown flag");
        assert_eq!(ranged(kind, 0, 8, 0, 15), 1, "no whole range");
        assert_eq!(ranged(kind, 0, 8, 0, 0), 1, "no range");
        assert_eq!(ranged(kind, 0, 8, 0, 33 * 16), 1, "too many ranges");
    }
    assert_eq!(ranged(11, 0, 8, 1, 16), 2, "a discard cannot be unmapped");
    assert_eq!(ranged(13, 0, 8, 1, 16), 0, "zeroes can");
}

#[test]
fn chains_that_do_not_end_end_the_connection() {
    let mut image = Image::new();
    let list = [(HEADER as u64, 16, NEXT, 1), (DATA as u64, 16, NEXT, 0)];
    image.describe(0, &list);
    image.offer(&[0], 1);
    assert!(image.reason().contains("does not end"));

    let mut image = Image::new();
    image.describe(0, &[(HEADER as u64, 16, NEXT, QUEUE_SIZE)]);
    image.offer(&[0], 1);
    assert!(image.reason().contains("leaves its table"));

    let mut image = Image::new();
    image.offer(&[QUEUE_SIZE + 5], 1);
    assert!(image.reason().contains("leaves its table"));
}

#[test]
fn requests_without_a_place_for_the_status_end_the_connection() {
    let mut image = Image::new();
    image.describe(0, &[(HEADER as u64, 16, 0, 0)]);
    image.offer(&[0], 1);
    assert!(image.reason().contains("no place for its status"));

    let mut image = Image::new();
    image.describe(0, &[(HEADER as u64, 16, NEXT, 1), (1 << 40, 1, WRITE, 0)]);
    image.offer(&[0], 1);
    assert!(image.reason().contains("no place for its status"));

    let mut image = Image::new();
    let status = (STATUS as u64, 1, WRITE | NEXT, 1);
    image.describe(0, &[status, (HEADER as u64, 16, 0, 0)]);
    image.offer(&[0], 1);
    assert!(image.reason().contains("behind one to write"));
}

#[test]
fn a_ring_that_says_too_much_ends_the_connection() {
    let mut image = usual(writable(512));
    image.offer(&[0], QUEUE_SIZE + 1);
    assert!(image.reason().contains("more requests"));
    let device = MemoryDevice::new(DISK_BYTES, 512);
    let outside = [0, AVAILABLE as u64, 1 << 40];
    let outcome = run_ring(
        &[0; MEMORY_BYTES],
        outside,
        QUEUE_SIZE,
        Arc::clone(&device) as _,
    );
    assert!(matches!(outcome, Outcome::Ended(reason) if reason.contains("ring is not within")));
}

#[test]
fn indirect_tables_work_and_do_not_nest() {
    let list = [
        (HEADER as u64, 16, NEXT, 1),
        (DATA as u64, 512, NEXT | WRITE, 2),
        (STATUS as u64, 1, WRITE, 0),
    ];
    let mut image = Image::new();
    image.describe(0, &[(TABLE as u64, 48, INDIRECT, 0)]);
    image.describe(TABLE, &list);
    image.offer(&[0], 1);
    assert_eq!(image.status(), 0);

    for (length, first) in [
        (48, (TABLE as u64, 48, INDIRECT, 0)),
        (47, list[0]),
        (0, list[0]),
    ] {
        let mut image = Image::new();
        image.describe(0, &[(TABLE as u64, length, INDIRECT, 0)]);
        image.describe(TABLE, &[first, list[1], list[2]]);
        image.offer(&[0], 1);
        assert!(image.reason().contains("chain"));
    }
}

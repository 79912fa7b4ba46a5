//! Peers that break the rules. A connection may die; the server and the others never.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use afterimage_blockdev::{BlockDevice, BlockOp, IoBuffer, MemoryDevice, Random, wait};
use afterimage_nbd::number::{command_flag, error, option, option_reply};
use afterimage_nbd::option::{ClientOption, ContextQuery, OptionReply};
use afterimage_nbd::reply::ReplyHead;
use afterimage_nbd::request::{Command, Request};
use afterimage_nbd::{ClientOptions, NbdDevice, ServerSettings};

use crate::raw::{Raw, connect, request, wish};
use crate::rig::{Rig, export_of};

const MIB: u64 = 1 << 20;
const OPTION_MAGIC: &[u8] = b"IHAVEOPT";

/// The server still serves somebody else.
fn assert_alive(rig: &Rig) {
    let device = NbdDevice::connect_unix(&rig.socket(), &ClientOptions::new("disk")).unwrap();
    let buffer = IoBuffer::zeroed(4096);
    wait::device(&*device, BlockOp::Read { offset: 0, buffer }).unwrap();
}

/// A connection past the greeting.
fn greeted(rig: &Rig, flags: u8) -> UnixStream {
    let mut stream = connect(&rig.socket());
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).unwrap();
    stream.write_all(&[0, 0, 0, flags]).unwrap();
    stream
}

fn raw_option(number: u32, length: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = OPTION_MAGIC.to_vec();
    for value in [number, length] {
        let little = value.to_le_bytes();
        bytes.extend(little.iter().rev());
    }
    bytes.extend(data);
    bytes
}

fn reply(stream: &mut UnixStream) -> OptionReply {
    let mut bytes = vec![0; 20];
    stream.read_exact(&mut bytes).unwrap();
    loop {
        if let Some((reply, _)) = OptionReply::decode(&bytes).unwrap() {
            return reply;
        }
        let mut more = [0];
        stream.read_exact(&mut more).unwrap();
        bytes.push(more[0]);
    }
}

fn is_closed(stream: &mut UnixStream) -> bool {
    let mut rest = Vec::new();
    // A reset is an end as well; that nothing comes in time is none.
    match stream.read_to_end(&mut rest) {
        Ok(_) => true,
        Err(error) => error.kind() != std::io::ErrorKind::WouldBlock,
    }
}

#[test]
fn options_that_are_wrong_get_an_error_and_the_handshake_goes_on() {
    let rig = Rig::new(MIB);
    let mut stream = greeted(&rig, 3);
    let name = |length: u8| vec![0, 0, 0, length, b'd', 0, 0];
    let query = ContextQuery {
        export: "disk".to_owned(),
        queries: Vec::new(),
    };
    let is_set = true;
    let contexts = ClientOption::MetaContext { query, is_set }.encode();
    let cases = [
        (raw_option(77, 0, &[]), option_reply::ERR_UNSUP),
        (raw_option(77, 5, b"hello"), option_reply::ERR_UNSUP),
        (raw_option(option::LIST, 1, b"x"), option_reply::ERR_INVALID),
        (
            raw_option(option::STARTTLS, 0, &[]),
            option_reply::ERR_POLICY,
        ),
        (raw_option(option::GO, 0, &[]), option_reply::ERR_INVALID),
        (
            raw_option(option::GO, 7, &name(1)),
            option_reply::ERR_UNKNOWN,
        ),
        (
            raw_option(option::GO, 7, &name(200)),
            option_reply::ERR_INVALID,
        ),
        (
            raw_option(option::INFO, 7, &name(0)),
            option_reply::ERR_INVALID,
        ),
        (contexts, option_reply::ERR_INVALID),
        (
            raw_option(option::INFO, 100_000, &vec![0; 100_000]),
            option_reply::ERR_TOO_BIG,
        ),
    ];
    for (bytes, expected) in cases {
        stream.write_all(&bytes).unwrap();
        let reply = reply(&mut stream);
        assert_eq!(reply.kind, expected, "{reply:?}");
        assert!(!reply.data.is_empty(), "an error without a text");
    }
    stream.write_all(&ClientOption::List.encode()).unwrap();
    assert_eq!(reply(&mut stream).server().as_deref(), Some("disk"));
    assert_eq!(reply(&mut stream).kind, option_reply::ACK);
    stream.write_all(&ClientOption::Abort.encode()).unwrap();
    assert_eq!(reply(&mut stream).kind, option_reply::ACK);
    assert!(is_closed(&mut stream));
    assert_alive(&rig);
}

#[test]
fn what_is_no_handshake_ends_only_its_connection() {
    let rig = Rig::new(MIB);
    let cases = [
        raw_option(option::LIST, u32::MAX, &[]),
        raw_option(option::EXPORT_NAME, 5, b"other"),
        raw_option(option::EXPORT_NAME, 100_000, &[]),
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        vec![0xff; 64],
    ];
    for bytes in cases {
        let mut stream = greeted(&rig, 1);
        stream.write_all(&bytes).unwrap();
        assert!(is_closed(&mut stream), "{bytes:?}");
    }
    let mut stream = greeted(&rig, 0x80);
    assert!(is_closed(&mut stream), "unknown flags of a client");
    assert_alive(&rig);
}

#[test]
fn random_handshakes_and_commands_hurt_nobody() {
    let rig = Rig::new(MIB);
    let mut random = Random::new(11);
    for round in 0..300 {
        let mut bytes = vec![0; random.index(600)];
        random.fill(&mut bytes);
        if round % 2 == 0 {
            let mut stream = greeted(&rig, 3);
            let number = u32::try_from(random.below(13)).unwrap();
            let length = u32::try_from(bytes.len()).unwrap();
            // The server may have had enough already.
            let _closed = stream.write_all(&raw_option(number, length, &bytes));
        } else {
            let mut raw = Raw::open(&rig.socket(), &wish("disk", &[], random.chance(0.5)));
            let _closed = raw.stream.write_all(&bytes);
        }
    }
    assert_alive(&rig);
}

#[test]
fn commands_that_are_wrong_get_their_error_and_the_session_goes_on() {
    let rig = Rig::new(64 * MIB);
    let mut raw = Raw::open(&rig.socket(), &wish("disk", &[], false));
    let flagged = |command, flags| Request {
        flags,
        ..request(command, 0, 4096)
    };
    let cases = [
        (request(Command::Unknown(42), 0, 4096), error::EINVAL),
        (request(Command::Read, 64 * MIB, 512), error::EINVAL),
        (request(Command::Read, u64::MAX - 511, 512), error::EINVAL),
        (request(Command::Read, 0, 33 * MIB), error::EINVAL),
        (request(Command::Read, 1, 512), error::EINVAL),
        (request(Command::Read, 0, 0), error::EINVAL),
        (request(Command::Flush, 512, 0), error::EINVAL),
        (request(Command::BlockStatus, 0, 4096), error::EINVAL),
        (request(Command::WriteZeroes, 64 * MIB, 512), error::ENOSPC),
        (flagged(Command::Read, command_flag::NO_HOLE), error::EINVAL),
        (flagged(Command::Trim, 1 << 15), error::EINVAL),
        (
            flagged(Command::Cache, command_flag::PAYLOAD_LEN),
            error::EINVAL,
        ),
    ];
    for (one, code) in cases {
        assert_eq!(raw.perform(&one, &[]), Err(code), "{one:?}");
    }
    // Payloads of refused writes are read and thrown away.
    let long = request(Command::Write, 0, 40 * MIB);
    assert_eq!(raw.perform(&long, &vec![1; 40 << 20]), Err(error::EINVAL));
    let beyond = request(Command::Write, 64 * MIB - 512, 1024);
    assert_eq!(raw.perform(&beyond, &[2; 1024]), Err(error::ENOSPC));
    assert!(rig.device.image().iter().all(|byte| *byte == 0));
    let write = request(Command::Write, 512, 512);
    raw.perform(&write, &[3; 512]).unwrap();
    assert_eq!(rig.device.copy(512, 512), [3; 512]);
    raw.stream.write_all(&[0xee; 28]).unwrap();
    assert!(raw.is_closed(), "a request with another magic");
    assert_alive(&rig);
}

#[test]
fn a_client_that_reads_nothing_stalls_nobody() {
    let rig = Rig::new(64 * MIB);
    let mut image = IoBuffer::zeroed(64 << 20);
    Random::new(3).fill(&mut image);
    let op = BlockOp::Write {
        offset: 0,
        buffer: image,
        fua: false,
    };
    wait::device(&*rig.device, op).unwrap();
    // Several that ask for more than their share and read nothing of it.
    let mut stuck = Vec::new();
    for _ in 0..4 {
        let mut raw = Raw::open(&rig.socket(), &wish("disk", &[], false));
        for number in 0..200 {
            let mut one = request(Command::Read, 0, 4 * MIB);
            one.cookie = number;
            raw.send(&one, &[]);
        }
        stuck.push(raw);
    }
    let device = NbdDevice::connect_unix(&rig.socket(), &ClientOptions::new("disk")).unwrap();
    for number in 0..64 {
        let offset = number * MIB;
        let buffer = IoBuffer::zeroed(1 << 20);
        wait::device(&*device, BlockOp::Read { offset, buffer }).unwrap();
        let buffer = IoBuffer::zeroed(4096);
        let fua = false;
        let op = BlockOp::Write {
            offset,
            buffer,
            fua,
        };
        wait::device(&*device, op).unwrap();
    }
    // And who wakes up gets all of it.
    for mut raw in stuck {
        let (mut answered, mut bytes) = (0, 0);
        while answered < 200 {
            let ReplyHead::Chunk {
                is_last, length, ..
            } = raw.head()
            else {
                panic!("no chunk");
            };
            let payload = raw.take(usize::try_from(length).unwrap());
            bytes += payload.len() - 8;
            answered += usize::from(is_last);
        }
        assert_eq!(bytes, 200 * (4 << 20));
    }
}

#[test]
fn who_says_nothing_is_shown_out() {
    let device = MemoryDevice::new(MIB, 512);
    let export = export_of(Arc::clone(&device) as Arc<dyn BlockDevice>);
    let settings = ServerSettings {
        handshake_timeout: Duration::from_millis(200),
        message_timeout: Duration::from_millis(200),
        connections_max: 2,
        ..ServerSettings::default()
    };
    let rig = Rig::with(device, export, true, None, settings);
    let mut silent = greeted(&rig, 3);
    assert!(is_closed(&mut silent), "a handshake without an end");
    let mut raw = Raw::open(&rig.socket(), &wish("disk", &[], false));
    raw.send(&request(Command::Write, 0, 4096), &[1; 100]);
    assert!(raw.is_closed(), "a payload without an end");
    // One that only waits may wait; with two of them there is no place for a third.
    let first = Raw::open(&rig.socket(), &wish("disk", &[], false));
    let second = Raw::open(&rig.socket(), &wish("disk", &[], false));
    let mut third = connect(&rig.socket());
    assert!(is_closed(&mut third), "a third connection of two");
    drop((first, second));
}

//! The same random commands for our server, qemu-nbd and nbdkit: the same bytes, and the same
//! errors.

use std::path::Path;
use std::process::{Child, Command as Program, Stdio};
use std::time::{Duration, Instant};

use afterimage_blockdev::{BlockOp, IoBuffer, Random, wait};
use afterimage_nbd::number::{command_flag, error};
use afterimage_nbd::request::{Command, Request};
use afterimage_nbd::{ClientOptions, NbdDevice};

use crate::raw::{Raw, request, wish};
use crate::rig::{Rig, require, text};
use crate::transport::exercise;

const SIZE: u64 = 4 << 20;
const COMMANDS: usize = 3000;

/// A server of somebody else.
struct Other(Child);

impl Drop for Other {
    fn drop(&mut self) {
        let _dead = self.0.kill();
        let _reaped = self.0.wait();
    }
}

fn start(program: &str, arguments: &[&str], socket: &Path) -> Other {
    let child = Program::new(program)
        .args(arguments)
        .stderr(Stdio::null())
        .spawn();
    let other = Other(child.unwrap());
    let begun = Instant::now();
    while std::os::unix::net::UnixStream::connect(socket).is_err() {
        assert!(
            begun.elapsed() < Duration::from_secs(20),
            "{program} does not listen"
        );
        std::thread::yield_now();
    }
    other
}

fn qemu_nbd(rig: &Rig, name: &str, size: u64, is_read_only: bool) -> (Other, std::path::PathBuf) {
    let (image, socket) = (rig.path(name), rig.path(&format!("{name}.sock")));
    std::fs::File::create(&image)
        .unwrap()
        .set_len(size)
        .unwrap();
    let (image, path) = (text(&image), text(&socket));
    let mut arguments = vec![
        "-f",
        "raw",
        "-x",
        "disk",
        "-t",
        "-e",
        "4",
        "--discard=unmap",
        "-k",
        &path,
    ];
    if is_read_only {
        arguments.push("-r");
    }
    arguments.push(&image);
    (start("qemu-nbd", &arguments, &socket), socket)
}

fn nbdkit(rig: &Rig, name: &str, size: u64, is_read_only: bool) -> (Other, std::path::PathBuf) {
    let socket = rig.path(&format!("{name}.sock"));
    let (path, size) = (text(&socket), size.to_string());
    let mut arguments = vec!["-f", "-U", &path];
    if is_read_only {
        arguments.push("-r");
    }
    arguments.extend(["memory", &size]);
    (start("nbdkit", &arguments, &socket), socket)
}

/// A random command; every tenth is out of range.
fn some_command(random: &mut Random, number: usize) -> (Request, Vec<u8>) {
    let command = [
        Command::Read,
        Command::Read,
        Command::Write,
        Command::Write,
        Command::Trim,
        Command::WriteZeroes,
        Command::Flush,
        Command::Cache,
        Command::Unknown(99),
    ][random.index(9)];
    let length = 512 * (1 + random.below(256));
    let offset = match random.below(10) {
        0 => SIZE - 512 * random.below(200),
        1 => SIZE * random.below(1 << 20),
        _ => 512 * random.below((SIZE - length) / 512),
    };
    let mut one = request(command, offset, length);
    one.cookie = number as u64;
    let mut payload = Vec::new();
    match command {
        Command::Flush => (one.offset, one.length) = (0, 0),
        Command::Write => {
            payload.resize(usize::try_from(length).unwrap(), 0);
            random.fill(&mut payload);
            if random.chance(0.2) {
                one.flags = command_flag::FUA;
            }
        }
        Command::WriteZeroes if random.chance(0.5) => one.flags = command_flag::NO_HOLE,
        _ => {}
    }
    (one, payload)
}

/// What a read of given-up room shows is the server's own affair: it is made known again.
fn settle(servers: &mut [Raw], one: &Request) {
    if one.command != Command::Trim {
        return;
    }
    let mut zeroes = *one;
    zeroes.command = Command::WriteZeroes;
    for server in servers {
        server.perform(&zeroes, &[]).unwrap();
    }
}

fn compare(is_read_only: bool, seed: u64) {
    let rig = Rig::new(SIZE);
    rig.device.set_read_only(is_read_only);
    let (_qemu, qemu) = qemu_nbd(&rig, "image", SIZE, is_read_only);
    let (_nbdkit, nbdkit) = nbdkit(&rig, "kit", SIZE, is_read_only);
    for allow_extended in [false, true] {
        let wish = wish("disk", &[], allow_extended);
        let mut servers = [&rig.socket(), &qemu, &nbdkit].map(|path| Raw::open(path, &wish));
        let mut random = Random::new(seed);
        let mut failed = 0;
        for number in 0..COMMANDS {
            let (one, payload) = some_command(&mut random, number);
            let answers = servers.each_mut().map(|server| {
                let mut one = one;
                let is_extended = Request::header_bytes(server.agreed.style) == 32;
                if one.command == Command::Write && is_extended {
                    one.flags |= command_flag::PAYLOAD_LEN;
                }
                let answer = server.perform(&one, &payload);
                answer.map(|answer| answer.data)
            });
            let [ours, theirs, third] = &answers;
            assert!(
                class(ours) == class(theirs),
                "{one:?}: ours {:?}, qemu-nbd's {:?}",
                brief(ours),
                brief(theirs)
            );
            assert!(
                ours == third,
                "{one:?}: ours {:?}, nbdkit's {:?}",
                brief(ours),
                brief(third)
            );
            if ours.is_ok() {
                settle(&mut servers, &one);
            } else {
                failed += 1;
            }
        }
        assert!(
            failed > COMMANDS / 20 && failed < COMMANDS,
            "{failed} failed"
        );
        println!("{COMMANDS} commands, {failed} of them refused by all three");
    }
}

/// QEMU tells every request that it refuses with one number, whatever is wrong with it.
fn class(answer: &Result<Vec<u8>, u32>) -> Result<&Vec<u8>, u32> {
    match answer {
        Err(error::EPERM | error::ENOSPC) => Err(error::EINVAL),
        other => other.as_ref().map_err(|code| *code),
    }
}

fn brief(answer: &Result<Vec<u8>, u32>) -> Result<usize, u32> {
    answer.as_ref().map(Vec::len).map_err(|code| *code)
}

#[test]
fn a_writable_disk_is_the_same_behind_three_servers() {
    require(&["qemu-nbd", "nbdkit"]);
    compare(false, 1);
}

#[test]
fn a_read_only_disk_is_the_same_behind_three_servers() {
    require(&["qemu-nbd", "nbdkit"]);
    compare(true, 2);
}

#[test]
fn our_client_uses_other_servers() {
    require(&["qemu-nbd", "nbdkit"]);
    let size = 64 << 20;
    let rig = Rig::new(512);
    let (_qemu, qemu) = qemu_nbd(&rig, "image", size, false);
    let (_nbdkit, nbdkit) = nbdkit(&rig, "kit", size, false);
    for path in [qemu, nbdkit] {
        for allow_extended in [false, true] {
            let mut options = ClientOptions::new("disk");
            options.wish.allow_extended = allow_extended;
            let device = NbdDevice::connect_unix(&path, &options).unwrap();
            exercise(&device);
        }
    }
    // And a read-only one says so.
    let (_only, socket) = qemu_nbd(&rig, "only", size, true);
    let device = NbdDevice::connect_unix(&socket, &ClientOptions::new("disk")).unwrap();
    let op = BlockOp::Write {
        offset: 0,
        buffer: IoBuffer::zeroed(512),
        fua: false,
    };
    assert!(wait::device(&*device, op).is_err());
}

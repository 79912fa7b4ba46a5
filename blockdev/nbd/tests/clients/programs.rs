//! Programs that nobody here wrote, over a Unix socket.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use afterimage_blockdev::{BlockDevice, BlockOp, IoBuffer, Random, wait};

use crate::rig::{Rig, require, require_python, run, text};

const MIB: u64 = 1 << 20;

/// Random data with holes.
fn fill(device: &dyn BlockDevice, seed: u64) {
    let mut random = Random::new(seed);
    let size = device.geometry().size_bytes;
    for at in (0..size).step_by(1 << 16) {
        if random.chance(0.4) {
            let mut buffer = IoBuffer::zeroed(1 << 16);
            random.fill(&mut buffer);
            let op = BlockOp::Write {
                offset: at,
                buffer,
                fua: false,
            };
            wait::device(device, op).unwrap();
        }
    }
}

#[test]
fn qemu_img_sees_size_map_and_bytes() {
    require(&["qemu-img"]);
    let rig = Rig::new(64 * MIB);
    fill(&*rig.device, 1);
    let uri = rig.uri();
    let info = run("qemu-img", &["info", "--output=json", &uri]);
    assert!(info.contains("\"virtual-size\": 67108864"), "{info}");
    let copy = text(&rig.path("copy.img"));
    run("qemu-img", &["convert", "-O", "raw", &uri, &copy]);
    assert!(std::fs::read(&copy).unwrap() == rig.device.image());
    run(
        "qemu-img",
        &["compare", "-f", "raw", "-F", "raw", &uri, &copy],
    );
    let map = run("qemu-img", &["map", "--output=json", &uri]);
    let data = map.matches("\"data\": true").count();
    let zero = map.matches("\"data\": false").count();
    assert!(data > 50 && zero > 50, "{data} and {zero} ranges: {map}");
    let qcow2 = text(&rig.path("copy.qcow2"));
    run("qemu-img", &["convert", "-O", "qcow2", &uri, &qcow2]);
    run("qemu-img", &["check", &qcow2]);
    run("qemu-img", &["compare", &qcow2, &uri]);
    // And back: written through the server.
    let other = Rig::new(64 * MIB);
    let arguments = [
        "convert",
        "-n",
        "-W",
        "-m",
        "8",
        "-O",
        "raw",
        &qcow2,
        &other.uri(),
    ];
    run("qemu-img", &arguments);
    assert!(other.device.image() == rig.device.image());
}

#[test]
fn qemu_io_finds_what_it_wrote() {
    require(&["qemu-io"]);
    let rig = Rig::new(64 * MIB);
    let script = [
        "write -P 7 1M 2M",
        "read -P 7 1M 2M",
        "write -f -P 9 512 512",
        "read -P 9 512 512",
        "write -z 1M 64k",
        "read -P 0 1M 64k",
        "write -z -u 1088k 64k",
        "read -P 0 1088k 64k",
        "discard 2M 64k",
        "read -P 0 2M 64k",
        "read -P 7 2112k 960k",
        "aio_write -P 3 8M 4M",
        "aio_write -P 4 16M 4M",
        "aio_flush",
        "read -P 3 8M 4M",
        "read -P 4 16M 4M",
        "flush",
    ];
    let mut arguments = vec!["-f", "raw"];
    for line in &script {
        arguments.extend(["-c", line]);
    }
    let uri = rig.uri();
    arguments.push(&uri);
    let output = run("qemu-io", &arguments);
    assert!(!output.contains("failed"), "{output}");
}

#[test]
fn nbdinfo_lists_exports_and_maps_of_both_contexts() {
    require(&["nbdinfo"]);
    let rig = Rig::new(8 * MIB);
    let op = BlockOp::Write {
        offset: 2 * MIB,
        buffer: IoBuffer::copy_of(&[7; 65536]),
        fua: false,
    };
    wait::device(&*rig.device, op).unwrap();
    let all = format!("nbd+unix:///?socket={}", rig.socket().display());
    let list = run("nbdinfo", &["--list", &all]);
    assert!(list.contains("export=\"disk\""), "{list}");
    assert!(list.contains("qemu:dirty-bitmap:monday"), "{list}");
    let uri = rig.uri();
    let words = |line: &str| {
        line.split_whitespace()
            .take(3)
            .collect::<Vec<_>>()
            .join(" ")
    };
    let map = run("nbdinfo", &["--map", &uri]);
    let lines: Vec<_> = map.lines().map(words).collect();
    let expected = ["0 2097152 3", "2097152 65536 0", "2162688 6225920 3"];
    assert_eq!(lines, expected, "{map}");
    let map = run("nbdinfo", &["--map=qemu:dirty-bitmap:monday", &uri]);
    let lines: Vec<_> = map.lines().map(words).collect();
    assert_eq!(lines.len(), 8, "{map}");
    assert_eq!(lines[0], "0 1048576 0", "{map}");
    assert_eq!(lines[7], "7340032 1048576 1", "{map}");
    let can = run("nbdinfo", &["--can", "multi-conn", &uri]);
    assert!(can.is_empty(), "{can}");
}

#[test]
fn nbdcopy_copies_both_ways_with_many_connections() {
    require(&["nbdcopy"]);
    let rig = Rig::new(64 * MIB);
    fill(&*rig.device, 2);
    for connections in ["1", "4", "16"] {
        let copy = text(&rig.path(&format!("copy-{connections}")));
        run("nbdcopy", &["-C", connections, &rig.uri(), &copy]);
        assert!(std::fs::read(&copy).unwrap() == rig.device.image());
        let other = Rig::new(64 * MIB);
        fill(&*other.device, 3);
        let arguments = ["--flush", "-C", connections, &copy, &other.uri()];
        run("nbdcopy", &arguments);
        assert!(other.device.image() == rig.device.image(), "{connections}");
    }
}

#[test]
fn fio_verifies_at_every_depth() {
    require(&["fio"]);
    let rig = Rig::new(64 * MIB);
    let uri = format!("--uri={}", rig.uri());
    for depth in ["1", "4", "16", "64"] {
        for bs in ["512", "4k", "192k"] {
            let arguments = [
                "--name=verify",
                "--ioengine=nbd",
                &uri,
                &format!("--iodepth={depth}"),
                "--rw=randwrite",
                &format!("--bs={bs}"),
                "--size=64m",
                "--io_size=8m",
                "--verify=crc32c",
                "--verify_fatal=1",
                "--do_verify=1",
            ];
            run("fio", &arguments);
        }
    }
}

const PYTHON: &str = r#"
import nbd, sys
h = nbd.NBD()
h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
h.add_meta_context("qemu:dirty-bitmap:monday")
h.set_full_info(True)
h.connect_uri(sys.argv[1])
assert h.get_size() == 8 << 20
assert h.get_export_description() == "a disk"
assert h.get_structured_replies_negotiated()
assert h.can_meta_context("qemu:dirty-bitmap:monday")
h.set_strict_mode(0)
h.pwrite(b"\x55" * 65536, 1 << 20, nbd.CMD_FLAG_FUA)
assert h.pread(65536, 1 << 20) == b"\x55" * 65536
chunks = []
def chunk(buffer, offset, status, error):
    chunks.append((offset, len(buffer), status))
h.pread_structured(1 << 20, 1 << 20, chunk)
assert (1 << 20, 65536, nbd.READ_DATA) in chunks, chunks
assert any(status == nbd.READ_HOLE for _, _, status in chunks), chunks
chunks.clear()
h.pread_structured(1 << 20, 1 << 20, chunk, nbd.CMD_FLAG_DF)
assert chunks == [(1 << 20, 1 << 20, nbd.READ_DATA)], chunks
h.zero(65536, 1 << 20, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FAST_ZERO)
h.trim(65536, 1 << 20, nbd.CMD_FLAG_FUA)
h.cache(1 << 20, 0)
h.flush()
seen = {}
def extents(context, offset, entries, error):
    seen[context] = (offset, entries)
h.block_status(4 << 20, 0, extents)
assert seen["base:allocation"] == (0, [4 << 20, 3]), seen
assert seen["qemu:dirty-bitmap:monday"][1][:4] == [1 << 20, 0, 1 << 20, 1], seen
h.block_status(4 << 20, 0, extents, nbd.CMD_FLAG_REQ_ONE)
assert seen["qemu:dirty-bitmap:monday"] == (0, [1 << 20, 0]), seen
import errno
def fails(code, call):
    try:
        call()
    except nbd.Error as error:
        assert error.errnum == code, (error.errnum, code)
        return
    raise AssertionError("it went through")
fails(errno.EINVAL, lambda: h.pread(512, 8 << 20))
fails(errno.ENOSPC, lambda: h.pwrite(b"x" * 512, 8 << 20))
fails(errno.EINVAL, lambda: h.pread(512, 100))
assert h.pread(512, 0) == bytes(512)
h.shutdown()
print("ok")
"#;

#[test]
fn libnbd_from_python_gets_every_command() {
    require_python();
    let rig = Rig::new(8 * MIB);
    let output = run("/usr/bin/python3", &["-c", PYTHON, &rig.uri()]);
    assert_eq!(output, "ok\n");
}

#[test]
fn clients_that_die_half_way_leave_the_others_alone() {
    require(&["nbdcopy", "fio"]);
    let rig = Rig::new(64 * MIB);
    fill(&*rig.device, 4);
    let uri = format!("--uri={}", rig.uri());
    for _ in 0..3 {
        let arguments = [
            "--name=dies",
            "--thread",
            "--randrepeat=0",
            "--refill_buffers",
            "--ioengine=nbd",
            &uri,
            "--iodepth=64",
            "--rw=randrw",
            "--bs=64k",
            "--size=64m",
            "--time_based",
            "--runtime=60",
        ];
        let mut victim = std::process::Command::new("fio")
            .args(arguments)
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        // It is under way once something has changed.
        let before = rig.device.image();
        while rig.device.image() == before {
            std::thread::yield_now();
        }
        victim.kill().unwrap();
        victim.wait().unwrap();
        let copy = text(&rig.path("copy.img"));
        // What the victim had sent before is carried out yet; then nothing changes any more.
        loop {
            let before = rig.device.image();
            run("nbdcopy", &["-C", "4", &rig.uri(), &copy]);
            if rig.device.image() == before {
                assert!(std::fs::read(&copy).unwrap() == before);
                break;
            }
        }
    }
    // And one that dies within a header.
    let mut stream = UnixStream::connect(rig.socket()).unwrap();
    stream.write_all(&[0, 0, 0, 3, b'I', b'H']).unwrap();
    drop(stream);
    let copy = text(&rig.path("last.img"));
    run("nbdcopy", &[&rig.uri(), &copy]);
    assert!(Arc::strong_count(&rig.device) >= 1);
}

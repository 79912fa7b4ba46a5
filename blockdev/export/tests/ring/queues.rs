//! What only rings have: a number of entries.

use std::time::Duration;

use crate::loop_io::attached;
use crate::memory::Memory;
use crate::shelf::{mounted, run};

const MIB: u64 = 1 << 20;
const SOON: Duration = Duration::from_secs(10);

#[test]
fn more_requests_than_entries_wait_their_turn() {
    let disk = Memory::late(64 * MIB, 512);
    let mounted = mounted(&[("disk.img", &disk)]);
    let mut device = attached(&mounted, "disk.img", 512);
    run(
        "fio",
        &[
            "--name=v",
            "--rw=randwrite",
            "--bs=4k",
            "--size=16M",
            "--numjobs=4",
            "--offset_increment=16M",
            "--direct=1",
            "--verify=crc32c",
            "--do_verify=1",
            "--verify_fatal=1",
            "--verify_state_save=0",
            "--ioengine=io_uring",
            "--iodepth=256",
            &format!("--filename={}", device.path().display()),
        ],
    );
    device.detach(SOON).unwrap();
}

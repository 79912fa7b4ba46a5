//! Connections that end while requests are under way.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use afterimage_blockdev::{
    BlockCompleter, BlockCompletion, BlockDevice, BlockErrorKind, BlockOp, Geometry, Token,
};
use afterimage_export::is_mount_point;

use crate::shelf::mounted_on;

const MIB: u64 = 1 << 20;
const SOON: Duration = Duration::from_secs(10);

type Held = (Token, BlockOp, Arc<dyn BlockCompleter>);

/// A device that keeps what it is asked.
struct Stuck(Mutex<Sender<Held>>);

impl BlockDevice for Stuck {
    fn geometry(&self) -> Geometry {
        Geometry {
            size_bytes: MIB,
            logical_block_bytes: 512,
            is_read_only: false,
        }
    }

    fn submit(&self, token: Token, op: BlockOp, to: Arc<dyn BlockCompleter>) {
        self.0.lock().unwrap().send((token, op, to)).unwrap();
    }
}

#[test]
fn a_connection_that_ends_lets_go_of_requests_that_a_device_still_has() {
    let (keep, kept) = channel();
    let stuck: Arc<dyn BlockDevice> = Arc::new(Stuck(Mutex::new(keep)));
    let mut mounted = mounted_on(vec![("stuck.img".to_owned(), stuck)]);
    let path = mounted.file("stuck.img");
    let reader = std::thread::spawn(move || -> io::Result<()> {
        File::open(path)?.read_exact_at(&mut [0; 4096], 0)
    });
    let (token, op, to) = kept.recv_timeout(SOON).unwrap();
    let began = Instant::now();
    // Ends the connection, although somebody has a file of it open.
    let ended = Command::new("umount")
        .arg("-f")
        .arg(mounted.path())
        .output();
    assert!(ended.is_ok());
    assert!(reader.join().unwrap().is_err());
    mounted.mount.unmount().unwrap();
    assert!(!is_mount_point(mounted.path()).unwrap());
    assert!(began.elapsed() < SOON);
    // The device answers at last, and nobody is hurt.
    let result = Err(op.error(BlockErrorKind::Closed));
    to.complete(BlockCompletion { token, result });
}

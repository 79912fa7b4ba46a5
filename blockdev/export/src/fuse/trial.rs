//! Tries the kernel's rings before anything depends on them.
//!
//! The way is young: whether a kernel carries bytes over it rightly is found out, not believed.
//! A tree with a device in memory is mounted where the real one will be, over rings, and from
//! each processor blocks are written and read in many sizes, with answers from the ring's own
//! thread and from another. The first verdict holds for the life of the process, since the
//! kernel does not change under it.

use std::ffi::{OsStr, OsString};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::thread;
use std::time::Duration;

use afterimage_blockdev::{
    BlockCompleter, BlockDevice, BlockOp, Geometry, MemoryDevice, Timestamp, Token,
};
use parking_lot::Mutex;

use super::{FuseMount, FuseOptions, IoUring, Transport, ring};
use super::{ListedNode, Node, NodeId, NodeKind, Tree, TreeError};
use crate::sys;

/// How long a trial may take; it takes some milliseconds where all is well.
const TRIAL_MAX: Duration = Duration::from_secs(10);
/// Bytes of the device that each processor's trial has to itself.
const SHARE_BYTES: u64 = 4 << 20;
/// Sizes of requests that are tried, in bytes.
const SIZES: [usize; 8] = [512, 4096, 700, 65_536, 5000, 1 << 20, 4096, 131_072 + 512];
/// Callers on each processor.
const CALLERS: u64 = 2;
/// Requests that wait for the other thread, at most.
const LATE_MAX: usize = 64;
const FILE: NodeId = NodeId(2);
const NAME: &str = "trial.img";

/// Says whether rings work here, or why not. `directory` is free and empty, before and after.
pub(super) fn verdict(directory: &Path) -> Result<(), String> {
    static VERDICT: Mutex<Option<Result<(), String>>> = Mutex::new(None);
    let mut verdict = VERDICT.lock();
    verdict.get_or_insert_with(|| run(directory)).clone()
}

fn run(directory: &Path) -> Result<(), String> {
    let cpus = ring::online_cpus().map_err(|error| error.to_string())?;
    let size_bytes = SHARE_BYTES * CALLERS * cpus.len() as u64;
    let device = TrialDevice::start(size_bytes).map_err(|error| error.to_string())?;
    let options = FuseOptions {
        source: "afterimage-trial".to_owned(),
        event_threads: 1,
        tree_threads: 1,
        io_uring: IoUring::On,
        ..FuseOptions::default()
    };
    let tree = Arc::new(TrialTree(Arc::clone(&device)));
    let mount = FuseMount::mount_as(tree, directory.to_owned(), &options, true);
    let mut mount = mount.map_err(|error| error.to_string())?;
    if mount.transport() != Transport::IoUring {
        return Err("the kernel refused a ring".to_owned());
    }
    let result = try_all(directory, &cpus, &device.memory);
    if result.is_err() {
        give_up(mount);
        return result;
    }
    mount.unmount().map_err(|error| error.to_string())
}

/// Ends a connection on which nothing can be relied, and waits for nobody.
fn give_up(mut mount: FuseMount) {
    let Ok(path) = sys::c_path(&mount.directory) else {
        return;
    };
    // The first ends the connection, and with it whoever waits in it; it fails while they are
    // still there. The second takes it out of sight.
    for flags in [libc::MNT_FORCE, libc::MNT_DETACH] {
        if let Err(error) = sys::umount(&path, flags | libc::UMOUNT_NOFOLLOW) {
            tracing::debug!(%error, flags, "a failed trial is not unmounted this way");
        }
    }
    drop(mount.serving.take());
}

/// Tries from each processor, all at once, and compares with what the device holds then.
fn try_all(directory: &Path, cpus: &[u16], memory: &MemoryDevice) -> Result<(), String> {
    let (tell, told) = sync_channel(cpus.len() * 2);
    let mut share = 0..;
    for cpu in cpus {
        for _ in 0..CALLERS {
            let (path, tell, cpu) = (directory.join(NAME), tell.clone(), *cpu);
            let start = share.next().unwrap_or(0) * SHARE_BYTES;
            let caller = move || {
                let result = try_from(cpu, &path, start).map_err(|error| error.to_string());
                // Who gave up waiting does not listen.
                let _unheard = tell.send((start, result));
            };
            let caller = thread::Builder::new()
                .name(format!("fuse-trial-{cpu}"))
                .spawn(caller);
            caller.map_err(|error| error.to_string())?;
        }
    }
    drop(tell);
    let mut left = cpus.len() as u64 * CALLERS;
    while left > 0 {
        let answer = told.recv_timeout(TRIAL_MAX);
        let (start, result) = answer.map_err(|_| "a request got no answer".to_owned())?;
        let model = result?;
        if memory.copy(start, model.len()) != model {
            return Err("other bytes were written".to_owned());
        }
        left -= 1;
    }
    Ok(())
}

/// Writes and reads on one processor; gives what the share of the file must hold then.
fn try_from(cpu: u16, path: &Path, start: u64) -> io::Result<Vec<u8>> {
    if let Err(error) = ring::pin(cpu) {
        tracing::debug!(%error, cpu, "a processor is not tried");
    }
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let mut model = vec![0; usize::try_from(SHARE_BYTES).unwrap_or(0)];
    let mut at = 0;
    for (turn, size) in SIZES.iter().cycle().take(3 * SIZES.len()).enumerate() {
        let range = at..at + size;
        let Some(part) = model.get_mut(range) else {
            break;
        };
        for (index, byte) in part.iter_mut().enumerate() {
            *byte = pattern(start, turn, index);
        }
        file.write_all_at(part, start + at as u64)?;
        check(&file, part, start + at as u64)?;
        // What follows begins within a block now and then.
        at += size / 2 + 300;
    }
    file.sync_all()?;
    check(&file, &model, start)?;
    Ok(model)
}

fn pattern(start: u64, turn: usize, index: usize) -> u8 {
    let mixed = (start >> 20)
        .wrapping_add(turn as u64 * 31)
        .wrapping_add(index as u64 * 7)
        .wrapping_add(index as u64 >> 8);
    mixed.to_le_bytes()[0]
}

fn check(file: &File, expected: &[u8], offset: u64) -> io::Result<()> {
    let mut read = vec![0; expected.len()];
    file.read_exact_at(&mut read, offset)?;
    if read == expected {
        Ok(())
    } else {
        Err(io::Error::other("other bytes were read than written"))
    }
}

type Job = (Token, BlockOp, Arc<dyn BlockCompleter>);

/// A device in memory that completes every other request on a thread of its own.
struct TrialDevice {
    memory: Arc<MemoryDevice>,
    late: SyncSender<Job>,
}

impl TrialDevice {
    fn start(size_bytes: u64) -> io::Result<Arc<Self>> {
        let memory = MemoryDevice::new(size_bytes, 512);
        let (late, jobs) = sync_channel::<Job>(LATE_MAX);
        let own = Arc::clone(&memory);
        thread::Builder::new()
            .name("fuse-trial".to_owned())
            .spawn(move || {
                for (token, op, to) in jobs {
                    own.submit(token, op, to);
                }
            })?;
        Ok(Arc::new(Self { memory, late }))
    }
}

impl BlockDevice for TrialDevice {
    fn geometry(&self) -> Geometry {
        self.memory.geometry()
    }

    fn submit(&self, token: Token, op: BlockOp, to: Arc<dyn BlockCompleter>) {
        // The kernel numbers its requests by twos.
        if token.0 & 2 == 0 {
            return self.memory.submit(token, op, to);
        }
        match self.late.try_send((token, op, to)) {
            Ok(()) => {}
            Err(
                TrySendError::Full((token, op, to)) | TrySendError::Disconnected((token, op, to)),
            ) => {
                self.memory.submit(token, op, to);
            }
        }
    }
}

/// One file.
struct TrialTree(Arc<TrialDevice>);

impl Tree for TrialTree {
    fn lookup(&self, parent: NodeId, name: &OsStr) -> Result<Node, TreeError> {
        match parent {
            NodeId::ROOT if name == NAME => self.node(FILE),
            NodeId::ROOT => Err(TreeError::NotFound),
            _ => Err(TreeError::NotADirectory),
        }
    }

    fn node(&self, id: NodeId) -> Result<Node, TreeError> {
        let kind = match id {
            NodeId::ROOT => NodeKind::Directory,
            FILE => NodeKind::File {
                size_bytes: self.0.geometry().size_bytes,
                is_read_only: false,
            },
            _ => return Err(TreeError::NotFound),
        };
        Ok(Node {
            id,
            kind,
            modified: Timestamp(0),
        })
    }

    fn list(
        &self,
        _directory: NodeId,
        after: u64,
        _limit: usize,
    ) -> Result<Vec<ListedNode>, TreeError> {
        if after > 0 {
            return Ok(Vec::new());
        }
        Ok(vec![ListedNode {
            name: OsString::from(NAME),
            node: self.node(FILE)?,
            cursor: 1,
        }])
    }

    fn open(&self, _file: NodeId, _want_write: bool) -> Result<Arc<dyn BlockDevice>, TreeError> {
        Ok(Arc::clone(&self.0) as Arc<dyn BlockDevice>)
    }

    fn close(&self, _file: NodeId, _device: Arc<dyn BlockDevice>) {}

    fn attributes(&self, _id: NodeId) -> Vec<(String, Vec<u8>)> {
        Vec::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_that_arrive_elsewhere_or_otherwise_fail_the_trial() {
        let directory = tempfile::tempdir().expect("a directory");
        let cpus = ring::online_cpus().expect("sysfs");
        let size_bytes = SHARE_BYTES * CALLERS * cpus.len() as u64;
        let file = File::create_new(directory.path().join(NAME)).expect("a file");
        file.set_len(size_bytes).expect("room");
        // Reading the file gives what was written, but the device has seen none of it.
        let memory = MemoryDevice::new(size_bytes, 512);
        let result = try_all(directory.path(), &cpus, &memory);
        assert_eq!(result, Err("other bytes were written".to_owned()));
        let file = File::open(directory.path().join(NAME)).expect("the file");
        assert!(check(&file, &[0x5A; 512], size_bytes - 512).is_err());
        assert!(check(&file, &[0; 512], size_bytes - 512).is_ok());
    }
}

//! Serves a disk in memory as a loop device, to measure what the way to a device costs.
//!
//! ```text
//! transport DIRECTORY auto|on|off SIZE_MIB [THREADS]
//! ```
//!
//! DIRECTORY is empty, and the tree is mounted there. Prints the transport and the loop device's
//! path, and serves until its standard input ends. With THREADS requests are completed by so
//! many threads, otherwise by the thread that brings them. `tools/bench devices.memory` uses it.

use std::error::Error;
use std::ffi::{OsStr, OsString};
use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use afterimage_blockdev::{
    BlockCompleter, BlockCompletion, BlockDevice, BlockError, BlockErrorKind, BlockOp,
    BlockOutcome, Geometry, Timestamp, Token,
};
use afterimage_export::{
    FuseMount, FuseOptions, ListedNode, LoopDevice, LoopOptions, Node, NodeId, NodeKind, Tree,
    TreeError,
};
use parking_lot::{Mutex, RwLock};

/// Bytes under one lock.
const CHUNK: usize = 256 << 10;
/// Requests that wait for a completing thread, at most.
const WAITING_MAX: usize = 4096;
const FILE: NodeId = NodeId(2);
const NAME: &str = "memory.img";

fn main() -> Result<(), Box<dyn Error>> {
    let usage = "transport DIRECTORY auto|on|off SIZE_MIB [THREADS]";
    let mut arguments = std::env::args().skip(1);
    let directory = arguments.next().ok_or(usage)?;
    let directory = Path::new(&directory);
    let io_uring = arguments.next().ok_or(usage)?.parse()?;
    let size_mib: usize = arguments.next().ok_or(usage)?.parse()?;
    let threads: usize = arguments.next().map_or(Ok(0), |text| text.parse())?;
    let memory = Memory::start(size_mib << 20, threads)?;
    let options = FuseOptions {
        source: "afterimage-memory".to_owned(),
        io_uring,
        ..FuseOptions::default()
    };
    let mut mount = FuseMount::mount(Arc::new(OneFile(memory)), directory, options)?;
    let mut device = LoopDevice::attach(&directory.join(NAME), LoopOptions::default())?;
    println!("{:?} {}", mount.transport(), device.path().display());
    std::io::stdin().read_to_end(&mut Vec::new())?;
    device.detach(Duration::from_secs(10))?;
    mount.unmount()?;
    Ok(())
}

type Job = (Token, BlockOp, Arc<dyn BlockCompleter>);

struct Memory {
    chunks: Vec<RwLock<Box<[u8]>>>,
    /// To the completing threads.
    late: Option<SyncSender<Job>>,
}

impl Memory {
    fn start(bytes: usize, threads: usize) -> Result<Arc<Self>, Box<dyn Error>> {
        let (late, jobs) = sync_channel(WAITING_MAX);
        let fill = |chunk: usize| {
            // Nothing is zero, so that all of it is there.
            vec![chunk.to_le_bytes()[0] | 1; CHUNK].into_boxed_slice()
        };
        let memory = Arc::new(Self {
            chunks: (0..bytes.div_ceil(CHUNK))
                .map(|at| RwLock::new(fill(at)))
                .collect(),
            late: (threads > 0).then_some(late),
        });
        let jobs = Arc::new(Mutex::new(jobs));
        for _ in 0..threads {
            let (memory, jobs) = (Arc::clone(&memory), Arc::clone(&jobs));
            std::thread::Builder::new().spawn(move || memory.work(&jobs))?;
        }
        Ok(memory)
    }

    fn work(&self, jobs: &Mutex<Receiver<Job>>) {
        loop {
            let job = jobs.lock().recv();
            let Ok((token, op, to)) = job else { return };
            to.complete(BlockCompletion {
                token,
                result: self.perform(op),
            });
        }
    }

    fn perform(&self, op: BlockOp) -> Result<BlockOutcome, BlockError> {
        op.validate(&self.geometry())?;
        match op {
            BlockOp::Read { offset, mut buffer } => {
                let mut done = 0;
                while done < buffer.len() {
                    let (chunk, at) = place(offset, done)?;
                    let step = (CHUNK - at).min(buffer.len() - done);
                    let bytes = self.chunks[chunk].read();
                    buffer[done..done + step].copy_from_slice(&bytes[at..at + step]);
                    done += step;
                }
                Ok(BlockOutcome::Data(buffer))
            }
            BlockOp::Write { offset, buffer, .. } => {
                let mut done = 0;
                while done < buffer.len() {
                    let (chunk, at) = place(offset, done)?;
                    let step = (CHUNK - at).min(buffer.len() - done);
                    let mut bytes = self.chunks[chunk].write();
                    bytes[at..at + step].copy_from_slice(&buffer[done..done + step]);
                    done += step;
                }
                Ok(BlockOutcome::Written(buffer))
            }
            BlockOp::Flush => Ok(BlockOutcome::Done),
            other => Err(other.error(BlockErrorKind::NotSupported)),
        }
    }
}

/// The chunk of a byte, and its place there.
fn place(offset: u64, done: usize) -> Result<(usize, usize), BlockError> {
    let wrong = |_| BlockOp::Flush.error(BlockErrorKind::Range);
    let at = usize::try_from(offset).map_err(wrong)? + done;
    Ok((at / CHUNK, at % CHUNK))
}

impl BlockDevice for Memory {
    fn geometry(&self) -> Geometry {
        Geometry {
            size_bytes: (self.chunks.len() * CHUNK) as u64,
            logical_block_bytes: 512,
            is_read_only: false,
        }
    }

    fn gives_buffers_back(&self) -> bool {
        true
    }

    fn submit(&self, token: Token, op: BlockOp, to: Arc<dyn BlockCompleter>) {
        let job = match &self.late {
            Some(late) => match late.send((token, op, to)) {
                Ok(()) => return,
                Err(error) => error.0,
            },
            None => (token, op, to),
        };
        let (token, op, to) = job;
        let result = self.perform(op);
        to.complete(BlockCompletion { token, result });
    }
}

struct OneFile(Arc<Memory>);

impl Tree for OneFile {
    fn lookup(&self, _parent: NodeId, name: &OsStr) -> Result<Node, TreeError> {
        if name == NAME {
            self.node(FILE)
        } else {
            Err(TreeError::NotFound)
        }
    }

    fn node(&self, id: NodeId) -> Result<Node, TreeError> {
        let kind = match id {
            NodeId::ROOT => NodeKind::Directory,
            _ => NodeKind::File {
                size_bytes: self.0.geometry().size_bytes,
                is_read_only: false,
            },
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

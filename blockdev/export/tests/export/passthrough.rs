//! Files that the kernel reads and writes itself.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use afterimage_blockdev::{
    BlockCompleter, BlockCompletion, BlockDevice, BlockErrorKind, BlockOp, BlockOutcome, Geometry,
    Timestamp, Token,
};
use afterimage_export::{
    FuseMount, ListedNode, LoopDevice, LoopOptions, Node, NodeId, NodeKind, Tree, TreeError,
};

use crate::shelf::{must_be_root, options, run};
use crate::transport::switch;

const MIB: u64 = 1 << 20;
const SOON: Duration = Duration::from_secs(10);
const FILE: NodeId = NodeId(2);

/// A device that nobody may read or write: the kernel does that, in the file.
#[derive(Default)]
struct Untouched {
    flushes: AtomicUsize,
    others: AtomicUsize,
}

impl BlockDevice for Untouched {
    fn geometry(&self) -> Geometry {
        Geometry {
            size_bytes: 8 * MIB,
            logical_block_bytes: 512,
            is_read_only: false,
        }
    }

    fn submit(&self, token: Token, op: BlockOp, to: Arc<dyn BlockCompleter>) {
        let result = match op {
            BlockOp::Flush => {
                self.flushes.fetch_add(1, Ordering::SeqCst);
                Ok(BlockOutcome::Done)
            }
            other => {
                self.others.fetch_add(1, Ordering::SeqCst);
                Err(other.error(BlockErrorKind::Closed))
            }
        };
        to.complete(BlockCompletion { token, result });
    }
}

/// One file, which is a plain one.
struct Plain {
    path: PathBuf,
    device: Arc<Untouched>,
}

impl Tree for Plain {
    fn lookup(&self, _parent: NodeId, name: &OsStr) -> Result<Node, TreeError> {
        match name.to_str() {
            Some("plain.img") => self.node(FILE),
            _ => Err(TreeError::NotFound),
        }
    }

    fn node(&self, id: NodeId) -> Result<Node, TreeError> {
        let kind = match id {
            NodeId::ROOT => NodeKind::Directory,
            _ => NodeKind::File {
                size_bytes: 8 * MIB,
                is_read_only: false,
            },
        };
        let modified = Timestamp(0);
        Ok(Node { id, kind, modified })
    }

    fn list(&self, _: NodeId, after: u64, _: usize) -> Result<Vec<ListedNode>, TreeError> {
        let entry = ListedNode {
            name: OsString::from("plain.img"),
            node: self.node(FILE)?,
            cursor: 1,
        };
        Ok(if after == 0 { vec![entry] } else { Vec::new() })
    }

    fn open(&self, _file: NodeId, _want_write: bool) -> Result<Arc<dyn BlockDevice>, TreeError> {
        Ok(Arc::clone(&self.device) as Arc<dyn BlockDevice>)
    }

    fn plain_file(&self, _file: NodeId) -> Option<File> {
        OpenOptions::new()
            .read(true)
            .write(true)
            .open(&self.path)
            .ok()
    }

    fn close(&self, _file: NodeId, _device: Arc<dyn BlockDevice>) {}

    fn attributes(&self, _id: NodeId) -> Vec<(String, Vec<u8>)> {
        Vec::new()
    }
}

const MAP_SCRIPT: &str = "import mmap,os,sys\n\
    f=os.open(sys.argv[1],os.O_RDWR)\n\
    m=mmap.mmap(f,8<<20)\n\
    assert m[4096:4100]==b'\\x07'*4, m[4096:4100]\n\
    m[1<<20:(1<<20)+5]=b'mmap!'\n\
    m.flush()\n";

#[test]
fn a_plain_file_is_read_written_and_mapped_without_the_server() {
    must_be_root();
    let _switch = switch();
    let directory = tempfile::tempdir().unwrap();
    let (path, tree) = (
        directory.path().join("image"),
        directory.path().join("tree"),
    );
    fs::create_dir(&tree).unwrap();
    File::create(&path).unwrap().set_len(8 * MIB).unwrap();
    let device = Arc::new(Untouched::default());
    let plain = Arc::new(Plain {
        path: path.clone(),
        device: Arc::clone(&device),
    });
    let mut mount = FuseMount::mount(plain, &tree, options()).unwrap();
    if !mount.has_passthrough() {
        eprintln!("this kernel has no FUSE passthrough: nothing to be tried");
        return;
    }
    let shown = tree.join("plain.img");

    let writer = OpenOptions::new().write(true).open(&shown).unwrap();
    writer.write_all_at(&[7; 10_000], 4096).unwrap();
    writer.sync_all().unwrap();
    assert_eq!(device.flushes.load(Ordering::SeqCst), 1);
    // Another handle of the same file, while the first is open.
    let reader = File::open(&shown).unwrap();
    let mut bytes = [0; 10_000];
    reader.read_exact_at(&mut bytes, 4096).unwrap();
    assert_eq!(bytes, [7; 10_000]);
    drop(reader);
    run("python3", &["-c", MAP_SCRIPT, shown.to_str().unwrap()]);
    let own = File::open(&path).unwrap();
    let mut bytes = [0; 5];
    own.read_exact_at(&mut bytes, MIB).unwrap();
    assert_eq!(&bytes, b"mmap!");
    drop(writer);

    let mut device_over = LoopDevice::attach(&shown, LoopOptions::default()).unwrap();
    let block = OpenOptions::new()
        .read(true)
        .write(true)
        .open(device_over.path())
        .unwrap();
    block.write_all_at(&[9; 4096], 2 * MIB).unwrap();
    block.sync_all().unwrap();
    drop(block);
    device_over.detach(SOON).unwrap();
    own.read_exact_at(&mut bytes, 2 * MIB).unwrap();
    assert_eq!(bytes, [9; 5]);
    assert_eq!(device.others.load(Ordering::SeqCst), 0);
    mount.unmount().unwrap();
}

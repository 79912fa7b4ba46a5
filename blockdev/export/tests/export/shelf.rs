//! A tree of named devices, for these tests: one directory, and a long one below it.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use afterimage_blockdev::{BlockDevice, Timestamp};
use afterimage_export::{
    FuseMount, FuseOptions, ListedNode, Node, NodeId, NodeKind, Tree, TreeError,
};

use crate::memory::Memory;
use crate::transport::{IO_URING, Switch, expected, switch};

/// The directory with many entries.
pub(crate) const MANY: NodeId = NodeId(2);
pub(crate) const MANY_COUNT: u64 = 1000;
const FIRST_FILE: u64 = 10;
const FIRST_OF_MANY: u64 = 10_000;

/// Devices by name.
pub(crate) type Devices = Vec<(String, Arc<dyn BlockDevice>)>;

pub(crate) struct Shelf {
    devices: Devices,
    pub(crate) open_count: Mutex<usize>,
    forgotten: Mutex<Sender<NodeId>>,
}

impl Shelf {
    fn file(&self, index: usize) -> Node {
        let geometry = self.devices[index].1.geometry();
        Node {
            id: NodeId(FIRST_FILE + index as u64),
            kind: NodeKind::File {
                size_bytes: geometry.size_bytes,
                is_read_only: geometry.is_read_only,
            },
            modified: Timestamp(1_700_000_000_000_000_000),
        }
    }

    fn index(&self, id: NodeId) -> Option<usize> {
        let index = usize::try_from(id.0.checked_sub(FIRST_FILE)?).ok()?;
        (index < self.devices.len()).then_some(index)
    }
}

fn directory(id: NodeId) -> Node {
    Node {
        id,
        kind: NodeKind::Directory,
        modified: Timestamp(0),
    }
}

fn one_of_many(index: u64) -> ListedNode {
    let kind = NodeKind::File {
        size_bytes: index * 512,
        is_read_only: true,
    };
    ListedNode {
        name: OsString::from(format!("point-{index:04}.img")),
        node: Node {
            id: NodeId(FIRST_OF_MANY + index),
            kind,
            modified: Timestamp(0),
        },
        cursor: index + 1,
    }
}

impl Tree for Shelf {
    fn lookup(&self, parent: NodeId, name: &OsStr) -> Result<Node, TreeError> {
        let name = name.to_str().ok_or(TreeError::NotFound)?;
        match parent {
            NodeId::ROOT if name == "many" => Ok(directory(MANY)),
            NodeId::ROOT => {
                let index = self.devices.iter().position(|(found, _)| found == name);
                index
                    .map(|index| self.file(index))
                    .ok_or(TreeError::NotFound)
            }
            MANY => (0..MANY_COUNT)
                .map(one_of_many)
                .find(|entry| entry.name == name)
                .map(|entry| entry.node)
                .ok_or(TreeError::NotFound),
            _ => Err(TreeError::NotADirectory),
        }
    }

    fn node(&self, id: NodeId) -> Result<Node, TreeError> {
        if id == NodeId::ROOT || id == MANY {
            return Ok(directory(id));
        }
        if let Some(index) =
            id.0.checked_sub(FIRST_OF_MANY)
                .filter(|index| *index < MANY_COUNT)
        {
            return Ok(one_of_many(index).node);
        }
        self.index(id)
            .map(|index| self.file(index))
            .ok_or(TreeError::NotFound)
    }

    fn list(
        &self,
        directory: NodeId,
        after: u64,
        limit: usize,
    ) -> Result<Vec<ListedNode>, TreeError> {
        let entries: Vec<_> = match directory {
            NodeId::ROOT => (0..)
                .zip(&self.devices)
                .map(|(index, (name, _))| ListedNode {
                    name: OsString::from(name),
                    node: self.file(usize::try_from(index).unwrap()),
                    cursor: index + 1,
                })
                .chain([ListedNode {
                    name: OsString::from("many"),
                    node: self::directory(MANY),
                    cursor: 1_000_000,
                }])
                .collect(),
            MANY => (0..MANY_COUNT).map(one_of_many).collect(),
            _ => return Err(TreeError::NotADirectory),
        };
        Ok(entries
            .into_iter()
            .filter(|entry| entry.cursor > after)
            .take(limit)
            .collect())
    }

    fn open(&self, file: NodeId, want_write: bool) -> Result<Arc<dyn BlockDevice>, TreeError> {
        let index = self.index(file).ok_or(TreeError::IsADirectory)?;
        let device = Arc::clone(&self.devices[index].1);
        if want_write && device.geometry().is_read_only {
            return Err(TreeError::ReadOnly);
        }
        *self.open_count.lock().unwrap() += 1;
        Ok(device)
    }

    fn close(&self, _file: NodeId, _device: Arc<dyn BlockDevice>) {
        *self.open_count.lock().unwrap() -= 1;
    }

    fn attributes(&self, id: NodeId) -> Vec<(String, Vec<u8>)> {
        match self.index(id) {
            Some(index) => vec![
                ("lsn".to_owned(), b"42".to_vec()),
                (
                    "name".to_owned(),
                    self.devices[index].0.clone().into_bytes(),
                ),
            ],
            None => Vec::new(),
        }
    }

    fn forget(&self, id: NodeId) {
        let _unheard = self.forgotten.lock().unwrap().send(id);
    }
}

/// A mounted shelf in a directory of its own.
pub(crate) struct Mounted {
    pub(crate) mount: FuseMount,
    pub(crate) shelf: Arc<Shelf>,
    pub(crate) forgotten: Receiver<NodeId>,
    directory: tempfile::TempDir,
    _switch: Switch,
}

impl Mounted {
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }
}

pub(crate) fn must_be_root() {
    let is_root = std::fs::read_to_string("/proc/self/status")
        .unwrap()
        .lines()
        .any(|line| line.split_whitespace().take(3).eq(["Uid:", "0", "0"]));
    assert!(
        is_root,
        "this test needs root: it mounts and makes loop devices"
    );
}

fn named(devices: &[(&str, &Arc<Memory>)]) -> Devices {
    let named = devices.iter().map(|(name, device)| {
        let device = Arc::clone(device) as Arc<dyn BlockDevice>;
        ((*name).to_owned(), device)
    });
    named.collect()
}

fn shelf_of(devices: Devices) -> (Arc<Shelf>, Receiver<NodeId>) {
    let (sender, forgotten) = channel();
    let shelf = Shelf {
        devices,
        open_count: Mutex::new(0),
        forgotten: Mutex::new(sender),
    };
    (Arc::new(shelf), forgotten)
}

pub(crate) fn shelf(devices: &[(&str, &Arc<Memory>)]) -> (Arc<Shelf>, Receiver<NodeId>) {
    shelf_of(named(devices))
}

pub(crate) fn options() -> FuseOptions {
    FuseOptions {
        io_uring: IO_URING,
        ..FuseOptions::default()
    }
}

pub(crate) fn mounted(devices: &[(&str, &Arc<Memory>)]) -> Mounted {
    mounted_on(named(devices))
}

pub(crate) fn mounted_on(devices: Devices) -> Mounted {
    must_be_root();
    let (shelf, forgotten) = shelf_of(devices);
    let directory = tempfile::tempdir().unwrap();
    let tree: Arc<dyn Tree> = Arc::clone(&shelf) as Arc<dyn Tree>;
    let switch = switch();
    let mount = FuseMount::mount(tree, directory.path(), options()).unwrap();
    assert_eq!(mount.transport(), expected());
    Mounted {
        mount,
        shelf,
        forgotten,
        directory,
        _switch: switch,
    }
}

/// Runs a program; its output, when it succeeds.
pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("{program} is needed for this test: {error}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}\n{text}\n{errors}",
        output.status
    );
    text
}

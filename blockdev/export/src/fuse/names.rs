//! Answers about names, attributes and directories. All of it runs on the tree's own threads.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use afterimage_blockdev::{BlockCompleter, BlockCompletion, BlockDevice, BlockOp, Token, wait};
use fuser::{Errno, FileAttr, FileHandle, FileType, FopenFlags, INodeNo, OpenAccMode, OpenFlags};
use parking_lot::Mutex;

use super::backing::Backings;
use super::file::{OpenFile, OpenFiles};
use super::known::KnownNodes;
use super::reply::Reply;
use super::request::{errno, failed};
use super::tree::{ListedNode, Node, NodeId, NodeKind, Tree, TreeError};
use super::wire::{Fields, Listing};

/// What every extended attribute begins with.
const ATTRIBUTE_PREFIX: &str = "user.afterimage.";
/// Entries asked of a tree at once.
const LIST_PAGE: usize = 128;
/// Cursors of "." and ".."; a tree's own begin behind them.
const CURSOR_SHIFT: u64 = 2;
/// Bytes that `stat` recommends for a request.
const PREFERRED_BYTES: u32 = 1 << 20;

/// How files are opened. Direct I/O keeps the page cache out: a second reader never sees old
/// data of a file that is written, and two opens that resolve to different devices never mix.
/// Whole-block writes need no exclusive lock in the kernel, and closing promises nothing.
const OPEN_FLAGS: FopenFlags = FopenFlags::FOPEN_DIRECT_IO
    .union(FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES)
    .union(FopenFlags::FOPEN_NOFLUSH);

/// How files are opened that the kernel reads and writes itself.
const PASSTHROUGH_FLAGS: FopenFlags =
    FopenFlags::FOPEN_PASSTHROUGH.union(FopenFlags::FOPEN_NOFLUSH);

/// The state that all threads of a mount share.
pub(super) struct Names {
    pub(super) tree: Arc<dyn Tree>,
    pub(super) files: OpenFiles,
    pub(super) known: KnownNodes,
    pub(super) backings: Backings,
    pub(super) lifetime: Duration,
}

/// Turns a tree's refusal into the number to answer.
pub(super) fn refused(error: &TreeError) -> Errno {
    tracing::debug!(%error, "the tree refused");
    errno(error.errno())
}

fn node_id(inode: INodeNo) -> NodeId {
    NodeId(inode.0)
}

fn file_type(kind: NodeKind) -> FileType {
    match kind {
        NodeKind::Directory => FileType::Directory,
        NodeKind::File { .. } => FileType::RegularFile,
    }
}

/// What a file is said to take. What it takes is known only after a look at all of it; one sector
/// less than everything makes tools such as cp and tar look for holes, and none at all would make
/// tar take the whole file for one.
fn sectors(size_bytes: u64) -> u64 {
    let all = size_bytes.div_ceil(512);
    all.saturating_sub(1).max(all.min(1))
}

/// The attributes that the kernel shows; only root may read or write the bytes of a disk.
fn attributes(node: &Node) -> FileAttr {
    let time = UNIX_EPOCH + Duration::from_nanos(node.modified.0);
    let (size, perm, nlink) = match node.kind {
        NodeKind::Directory => (0, 0o755, 2),
        NodeKind::File {
            size_bytes,
            is_read_only: true,
        } => (size_bytes, 0o400, 1),
        NodeKind::File {
            size_bytes,
            is_read_only: false,
        } => (size_bytes, 0o600, 1),
    };
    FileAttr {
        ino: INodeNo(node.id.0),
        size,
        blocks: sectors(size),
        atime: time,
        mtime: time,
        ctime: time,
        crtime: time,
        kind: file_type(node.kind),
        perm,
        nlink,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: PREFERRED_BYTES,
        flags: 0,
    }
}

impl Names {
    pub(super) fn lookup(&self, parent: INodeNo, name: &OsStr, reply: Reply) {
        let answer = self.known.answer();
        match self.tree.lookup(node_id(parent), name) {
            Ok(node) => {
                answer.count(node.id);
                reply.entry(self.lifetime, &attributes(&node));
            }
            Err(error) => reply.error(refused(&error)),
        }
    }

    pub(super) fn forget(&self, inode: INodeNo, count: u64) {
        let id = node_id(inode);
        self.known.forget(id, count, || self.tree.forget(id));
    }

    /// A file that is open has the size of its device, whatever its name has come to mean.
    pub(super) fn describe(&self, inode: INodeNo, file: Option<&OpenFile>) -> Result<Node, Errno> {
        let mut node = self
            .tree
            .node(node_id(inode))
            .map_err(|error| refused(&error))?;
        if let (NodeKind::File { size_bytes, .. }, Some(file)) = (&mut node.kind, file) {
            *size_bytes = file.size_now();
        }
        Ok(node)
    }

    pub(super) fn getattr(&self, inode: INodeNo, handle: Option<FileHandle>, reply: Reply) {
        let file = handle.and_then(|handle| self.files.get(handle));
        match self.describe(inode, file.as_deref().filter(|file| file.node.0 == inode.0)) {
            Ok(node) => reply.attr(self.lifetime, &attributes(&node)),
            Err(errno) => reply.error(errno),
        }
    }

    pub(super) fn open(&self, inode: INodeNo, flags: OpenFlags, reply: Reply) {
        let want_write = flags.acc_mode() != OpenAccMode::O_RDONLY;
        let id = node_id(inode);
        match self.open_device(id, want_write) {
            Ok(device) => {
                let backing = self.backings.get(id, || self.tree.plain_file(id));
                let backing_id = backing.as_ref().map(|backing| backing.id());
                let flags = match backing_id {
                    Some(_) => PASSTHROUGH_FLAGS,
                    None => OPEN_FLAGS,
                };
                match self.files.insert(id, device, want_write, backing) {
                    Ok(handle) => reply.opened(handle, flags, backing_id),
                    Err(device) => {
                        self.tree.close(id, device);
                        reply.error(Errno::ENFILE);
                    }
                }
            }
            Err(errno) => reply.error(errno),
        }
    }

    fn open_device(&self, id: NodeId, want_write: bool) -> Result<Arc<dyn BlockDevice>, Errno> {
        if let Ok(Node {
            kind: NodeKind::File {
                is_read_only: true, ..
            },
            ..
        }) = self.tree.node(id)
            && want_write
        {
            return Err(Errno::EROFS);
        }
        let device = self
            .tree
            .open(id, want_write)
            .map_err(|error| refused(&error))?;
        let geometry = device.geometry();
        if want_write && geometry.is_read_only {
            self.tree.close(id, device);
            return Err(Errno::EROFS);
        }
        if !matches!(geometry.logical_block_bytes, 512 | 1024 | 2048 | 4096) {
            tracing::error!(?geometry, "a device's logical block is of no use");
            self.tree.close(id, device);
            return Err(Errno::EINVAL);
        }
        Ok(device)
    }

    pub(super) fn release(&self, handle: FileHandle) {
        if let Some(file) = self.files.remove(handle) {
            self.close(&file);
        }
    }

    /// Closes what is still open when the kernel is gone.
    pub(super) fn release_all(&self) {
        for file in self.files.drain() {
            self.close(&file);
        }
    }

    fn close(&self, file: &OpenFile) {
        self.tree.close(file.node, Arc::clone(&file.device));
    }

    /// Lists a directory from a cursor on, until `add` says that there is no more room.
    fn list(
        &self,
        directory: INodeNo,
        from: u64,
        mut add: impl FnMut(&ListedNode, u64) -> bool,
    ) -> Result<(), Errno> {
        let id = node_id(directory);
        if from < CURSOR_SHIFT {
            let node = self.tree.node(id).map_err(|error| refused(&error))?;
            for (cursor, name) in [(1, "."), (2, "..")] {
                let entry = ListedNode {
                    name: OsString::from(name),
                    node,
                    cursor,
                };
                if from < cursor && add(&entry, cursor) {
                    return Ok(());
                }
            }
        }
        let mut after = from.saturating_sub(CURSOR_SHIFT);
        loop {
            let page = self
                .tree
                .list(id, after, LIST_PAGE)
                .map_err(|error| refused(&error))?;
            let Some(last) = page.last().map(|entry| entry.cursor) else {
                return Ok(());
            };
            if last <= after || last >= 1 << 62 {
                tracing::error!(after, last, "a directory's cursors do not rise");
                return Err(Errno::EIO);
            }
            for entry in &page {
                if add(entry, entry.cursor.saturating_add(CURSOR_SHIFT)) {
                    return Ok(());
                }
            }
            after = last;
        }
    }

    pub(super) fn readdir(&self, directory: INodeNo, from: u64, room: u32, reply: Reply) {
        let mut listing = Listing::new(room as usize);
        let result = self.list(directory, from, |entry, cursor| {
            let kind = file_type(entry.node.kind);
            let name = entry.name.as_bytes();
            listing.add(None, entry.node.id.0, cursor, kind, name)
        });
        match result {
            Ok(()) => reply.data(listing.bytes()),
            Err(errno) => reply.error(errno),
        }
    }

    pub(super) fn readdirplus(&self, directory: INodeNo, from: u64, room: u32, reply: Reply) {
        let answer = self.known.answer();
        let mut listing = Listing::new(room as usize);
        let result = self.list(directory, from, |entry, cursor| {
            let attributes = attributes(&entry.node);
            let node = Fields::entry(self.lifetime, &attributes);
            let (id, name) = (entry.node.id, entry.name.as_bytes());
            let is_full = listing.add(Some(&node), id.0, cursor, attributes.kind, name);
            // The kernel takes no reference for these two.
            if !is_full && entry.name != "." && entry.name != ".." {
                answer.count(id);
            }
            is_full
        });
        match result {
            Ok(()) => reply.data(listing.bytes()),
            Err(errno) => reply.error(errno),
        }
    }

    pub(super) fn getxattr(&self, inode: INodeNo, name: &OsStr, size: u32, reply: Reply) {
        let wanted = name
            .to_str()
            .and_then(|name| name.strip_prefix(ATTRIBUTE_PREFIX));
        let Some(wanted) = wanted else {
            return reply.error(Errno::NO_XATTR);
        };
        let attributes = self.tree.attributes(node_id(inode));
        match attributes.into_iter().find(|(name, _)| name == wanted) {
            Some((_, value)) => answer_xattr(&value, size, reply),
            None => reply.error(Errno::NO_XATTR),
        }
    }

    pub(super) fn listxattr(&self, inode: INodeNo, size: u32, reply: Reply) {
        let mut names = Vec::new();
        for (name, _) in self.tree.attributes(node_id(inode)) {
            names.extend_from_slice(ATTRIBUTE_PREFIX.as_bytes());
            names.extend_from_slice(name.as_bytes());
            names.push(0);
        }
        answer_xattr(&names, size, reply);
    }

    /// Grows a file; nothing else about a file can be set.
    pub(super) fn resize(
        self: &Arc<Self>,
        token: Token,
        inode: INodeNo,
        handle: Option<FileHandle>,
        size_bytes: u64,
        reply: Reply,
    ) {
        let file = handle.and_then(|handle| self.files.get(handle));
        let file = file.filter(|file| file.node.0 == inode.0 && file.is_writable);
        let node = match self.describe(inode, file.as_deref()) {
            Ok(node) => node,
            Err(errno) => return reply.error(errno),
        };
        let NodeKind::File {
            size_bytes: old_bytes,
            ..
        } = node.kind
        else {
            return reply.error(Errno::EISDIR);
        };
        if size_bytes == old_bytes {
            return reply.attr(self.lifetime, &attributes(&node));
        }
        if size_bytes < old_bytes {
            return reply.error(Errno::EPERM);
        }
        let op = BlockOp::Grow { size_bytes };
        if let Some(file) = file {
            let done = GrowDone {
                reply: Mutex::new(Some((reply, node))),
                lifetime: self.lifetime,
                size_bytes,
                file: Arc::clone(&file),
            };
            let gate = Arc::clone(&file.gate);
            return gate.enter_shared(move || file.device.submit(token, op, Arc::new(done)));
        }
        // By path: nobody may have it open, so that it is opened here, off every data path.
        match self.open_device(node.id, true) {
            Err(errno) => reply.error(errno),
            Ok(device) => {
                let result = wait::device(&*device, op);
                self.tree.close(node.id, device);
                match result {
                    Ok(_) => reply.attr(self.lifetime, &attributes(&resized(node, size_bytes))),
                    Err(error) => reply.error(failed(&error)),
                }
            }
        }
    }
}

fn resized(mut node: Node, new_bytes: u64) -> Node {
    if let NodeKind::File { size_bytes, .. } = &mut node.kind {
        *size_bytes = new_bytes;
    }
    node
}

fn answer_xattr(value: &[u8], size: u32, reply: Reply) {
    match u32::try_from(value.len()) {
        Err(_) => reply.error(Errno::E2BIG),
        Ok(length) if size == 0 => reply.size(length),
        Ok(length) if length > size => reply.error(Errno::ERANGE),
        Ok(_) => reply.data(value),
    }
}

struct GrowDone {
    reply: Mutex<Option<(Reply, Node)>>,
    lifetime: Duration,
    size_bytes: u64,
    file: Arc<OpenFile>,
}

impl BlockCompleter for GrowDone {
    fn complete(&self, completion: BlockCompletion) {
        let Some((reply, node)) = self.reply.lock().take() else {
            return;
        };
        self.file.gate.leave_shared();
        match completion.result {
            Ok(_) => reply.attr(self.lifetime, &attributes(&resized(node, self.size_bytes))),
            Err(error) => reply.error(failed(&error)),
        }
    }
}

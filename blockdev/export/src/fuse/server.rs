//! The kernel's requests, and where each goes: data straight to the device, names to the tree's
//! threads. Nothing here waits for anything but a free place among those threads.

use std::sync::Arc;

use afterimage_blockdev::{ExtentKind, IoBuffer, Token, patience};
use fuser::{Errno, FileHandle, FopenFlags, INodeNo, OpenFlags};

use super::chain;
use super::file::OpenFile;
use super::names::Names;
use super::parse::{Header, Request};
use super::reply::Reply;
use super::request::{self, UnderWay, ZeroKind, errno};
use super::seek::Seek;
use super::wire::u64_at;
use super::workers::Workers;

/// Largest request in bytes; the kernel's own limit of pages per request by default.
pub(super) const REQUEST_BYTES_MAX: u32 = 1 << 20;
/// The block size that `statfs` tells; a loop device takes its discard granularity from it.
const STATFS_BLOCK_BYTES: u32 = 4096;

/// One mounted tree.
pub(super) struct Server {
    pub(super) names: Arc<Names>,
    pub(super) workers: Workers,
    pub(super) under_way: UnderWay,
}

impl Server {
    fn on_tree(&self, job: impl FnOnce(&Arc<Names>) + Send + 'static) {
        let names = Arc::clone(&self.names);
        self.workers.run(move || job(&names));
    }

    /// Ends it, when the kernel sends nothing more.
    pub(super) fn end(mut self) {
        // First, since an open that is under way would come after the closing of all.
        self.workers.stop();
        self.names.release_all();
    }

    /// Serves one request. `data` is what a write writes; `may_wait` says that this thread may
    /// wait for a short read.
    pub(super) fn handle(
        &self,
        header: &Header,
        request: Request<'_>,
        data: Option<IoBuffer>,
        reply: Reply,
        may_wait: bool,
    ) {
        match request {
            Request::Read {
                handle,
                offset,
                length,
            } => self.read(header, handle, (offset, length), reply, may_wait),
            Request::Write {
                handle,
                offset,
                flags,
                ..
            } => {
                let Some(data) = data else {
                    return reply.error(Errno::EINVAL);
                };
                // The kernel leaves it to us to make a direct write on such a file durable.
                let fua = flags & (libc::O_SYNC | libc::O_DSYNC) != 0;
                self.with_file(handle, reply, |file, reply| {
                    let (entered, _) = self.under_way.enter();
                    request::write(file, token(header), offset, data, fua, entered, reply);
                });
            }
            Request::Fsync { handle } => self.with_file(handle, reply, |file, reply| {
                request::flush(&file, token(header), reply);
            }),
            Request::Fallocate {
                handle,
                offset,
                length,
                mode,
            } => self.with_file(handle, reply, |file, reply| {
                match ZeroKind::from_mode(mode) {
                    None => reply.error(Errno::EOPNOTSUPP),
                    Some(kind) => {
                        request::zero(file, token(header), kind, offset, length, reply);
                    }
                }
            }),
            Request::Lseek {
                handle,
                offset,
                whence,
            } => self.with_file(handle, reply, |file, reply| {
                seek(file, token(header), offset, whence, reply);
            }),
            other => self.handle_name(header, other, reply),
        }
    }

    fn handle_name(&self, header: &Header, request: Request<'_>, reply: Reply) {
        let inode = INodeNo(header.inode);
        match request {
            Request::Lookup { name } => {
                let name = name.to_owned();
                self.on_tree(move |names| names.lookup(inode, &name, reply));
            }
            Request::Forget { count } => {
                reply.none();
                self.on_tree(move |names| names.forget(inode, count));
            }
            Request::BatchForget { pairs } => {
                reply.none();
                let pairs = pairs.to_vec();
                self.on_tree(move |names| forget_all(names, &pairs));
            }
            Request::GetAttr { handle } => {
                let handle = handle.map(FileHandle);
                self.on_tree(move |names| names.getattr(inode, handle, reply));
            }
            Request::SetAttr {
                handle,
                size_bytes: Some(size),
                is_more: false,
            } => {
                let (token, handle) = (token(header), handle.map(FileHandle));
                self.on_tree(move |names| names.resize(token, inode, handle, size, reply));
            }
            Request::SetAttr { .. } => reply.error(Errno::EPERM),
            Request::Open { flags } => {
                self.on_tree(move |names| names.open(inode, OpenFlags(flags), reply));
            }
            Request::Release { handle } => self.on_tree(move |names| {
                names.release(FileHandle(handle));
                reply.ok();
            }),
            Request::GetXattr { name, room } => {
                let name = name.to_owned();
                self.on_tree(move |names| names.getxattr(inode, &name, room, reply));
            }
            Request::ListXattr { room } => {
                self.on_tree(move |names| names.listxattr(inode, room, reply));
            }
            Request::OpenDir => reply.opened(FileHandle(0), FopenFlags::empty(), None),
            Request::ReadDir {
                from,
                room,
                is_plus,
            } => {
                let room = room.min(REQUEST_BYTES_MAX);
                self.on_tree(move |names| match is_plus {
                    true => names.readdirplus(inode, from, room, reply),
                    false => names.readdir(inode, from, room, reply),
                });
            }
            Request::StatFs => reply.statfs(STATFS_BLOCK_BYTES),
            Request::Nothing => reply.ok(),
            Request::Refused { errno } => reply.error(Errno::from_i32(errno)),
            _ => reply.error(errno(libc::EIO)),
        }
    }

    fn with_file(&self, handle: u64, reply: Reply, then: impl FnOnce(Arc<OpenFile>, Reply)) {
        match self.names.files.get(FileHandle(handle)) {
            Some(file) => then(file, reply),
            None => reply.error(Errno::EBADF),
        }
    }

    fn read(
        &self,
        header: &Header,
        handle: u64,
        (offset, length): (u64, u32),
        reply: Reply,
        may_wait: bool,
    ) {
        self.with_file(handle, reply, |file, reply| {
            let (entered, is_alone) = self.under_way.enter();
            // More than this has no room in an answer, and the kernel asks for no more.
            let length = length.min(REQUEST_BYTES_MAX);
            let token = token(header);
            let read = || request::read(&file, token, offset, length, entered, reply);
            if is_alone && may_wait {
                patience::with(read);
            } else {
                read();
            }
        });
    }
}

fn token(header: &Header) -> Token {
    Token(header.unique)
}

fn seek(file: Arc<OpenFile>, token: Token, position: u64, whence: i32, reply: Reply) {
    let wanted = match whence {
        libc::SEEK_DATA => ExtentKind::Data,
        libc::SEEK_HOLE => ExtentKind::Zero,
        _ => return reply.error(Errno::EINVAL),
    };
    if position >= file.size_reaching(position.saturating_add(1)) {
        return reply.error(Errno::ENXIO);
    }
    let device = Arc::clone(&file.device);
    let job = Seek::new(file, wanted, position, reply);
    chain::run(device, token, Box::new(job));
}

fn forget_all(names: &Names, pairs: &[u8]) {
    for pair in pairs.chunks_exact(16) {
        if let (Some(inode), Some(count)) = (u64_at(pair, 0), u64_at(pair, 8)) {
            names.forget(INodeNo(inode), count);
        }
    }
}

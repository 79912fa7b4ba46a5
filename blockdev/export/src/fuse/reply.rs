//! The answer to one request, by whichever way the request came.
//!
//! Invariants:
//! * a request is answered exactly once: a reply that is dropped answers `EIO`;
//! * an answer can be given from any thread.

use std::sync::Arc;
use std::time::Duration;

use afterimage_blockdev::IoBuffer;
use fuser::{Errno, FileAttr, FileHandle, FopenFlags};

use super::classic::Channel;
use super::request::IoDone;
use super::ring::Entry;
use super::wire::Fields;

/// Where an answer goes.
pub(super) enum Way {
    /// To the descriptor of `/dev/fuse` that the request was read from.
    Classic(Arc<Channel>),
    /// Into the ring entry that the request came in.
    Ring(Entry),
}

/// The answer that one request awaits.
pub(super) struct Reply {
    unique: u64,
    way: Option<Way>,
}

impl Reply {
    /// To the request that the kernel calls `unique`.
    pub(super) fn new(unique: u64, way: Way) -> Self {
        Self {
            unique,
            way: Some(way),
        }
    }

    /// Ends a request that has no answer.
    pub(super) fn none(mut self) {
        if let Some(Way::Ring(entry)) = self.way.take() {
            // Such requests never come over a ring; its entry must go back all the same.
            entry.answer(self.unique, 0, &[]);
        }
    }

    fn send(&mut self, error: i32, body: &[u8]) {
        match self.way.take() {
            Some(Way::Classic(channel)) => channel.answer(self.unique, error, body),
            Some(Way::Ring(entry)) => entry.answer(self.unique, error, body),
            None => {}
        }
    }

    /// Refuses.
    pub(super) fn error(mut self, errno: Errno) {
        self.send(-errno.code(), &[]);
    }

    /// Says that it is done.
    pub(super) fn ok(mut self) {
        self.send(0, &[]);
    }

    /// Gives bytes.
    pub(super) fn data(mut self, bytes: &[u8]) {
        self.send(0, bytes);
    }

    /// Gives a part of a buffer, which may serve again.
    pub(super) fn data_of(mut self, buffer: IoBuffer, from: usize, length: usize) {
        let end = from.saturating_add(length);
        let Some(way) = self.way.take() else { return };
        match (way, buffer.get(from..end)) {
            (Way::Classic(channel), Some(bytes)) => channel.answer(self.unique, 0, bytes),
            (Way::Ring(entry), Some(_)) => entry.answer_from(self.unique, buffer, from..end),
            (way, None) => {
                self.way = Some(way);
                self.send(-libc::EIO, &[]);
            }
        }
    }

    fn fields(mut self, fields: &Fields) {
        self.send(0, fields.bytes());
    }

    /// Names a node.
    pub(super) fn entry(self, lifetime: Duration, attributes: &FileAttr) {
        self.fields(&Fields::entry(lifetime, attributes));
    }

    /// Describes a node.
    pub(super) fn attr(self, lifetime: Duration, attributes: &FileAttr) {
        self.fields(&Fields::attr(lifetime, attributes));
    }

    /// Gives a handle. With a backing file the kernel reads and writes that one itself.
    pub(super) fn opened(self, handle: FileHandle, flags: FopenFlags, backing: Option<i32>) {
        let fields = Fields::new().u64(handle.0).u32(flags.bits());
        self.fields(&fields.i32(backing.unwrap_or(0)));
    }

    /// Counts bytes written.
    pub(super) fn written(self, length: u32) {
        self.fields(&Fields::new().u32(length).u32(0));
    }

    /// Gives a position in a file.
    pub(super) fn offset(self, position: u64) {
        self.fields(&Fields::new().u64(position));
    }

    /// Gives the size of an attribute.
    pub(super) fn size(self, bytes: u32) {
        self.fields(&Fields::new().u32(bytes).u32(0));
    }

    /// Describes the file system: nothing but its block size.
    pub(super) fn statfs(self, block_bytes: u32) {
        let name_bytes_max = 255;
        let mut fields = Fields::new();
        for _ in 0..5 {
            fields = fields.u64(0);
        }
        fields = fields.u32(block_bytes).u32(name_bytes_max).u32(block_bytes);
        for _ in 0..7 {
            fields = fields.u32(0);
        }
        self.fields(&fields);
    }

    /// A buffer of `bytes` bytes for what will be read; what it holds is of no meaning.
    pub(super) fn buffer(&self, bytes: usize) -> IoBuffer {
        match &self.way {
            Some(Way::Ring(entry)) => entry.buffer(bytes),
            _ => IoBuffer::zeroed(bytes),
        }
    }

    /// Takes a buffer that a device gave back; it may serve again.
    pub(super) fn give_back(&self, buffer: IoBuffer) {
        if let Some(Way::Ring(entry)) = &self.way {
            entry.give_back(buffer);
        }
    }

    /// What takes the completion of this request's one operation.
    pub(super) fn completer(&self) -> Arc<IoDone> {
        match &self.way {
            Some(Way::Ring(entry)) => entry.completer(),
            _ => Arc::default(),
        }
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        self.send(-libc::EIO, &[]);
    }
}

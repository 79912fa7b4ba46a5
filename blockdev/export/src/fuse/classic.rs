//! Requests read from `/dev/fuse`, and answers written to it.
//!
//! Invariant: an answer goes to the descriptor that its request was read from; the kernel looks
//! for it nowhere else.

use std::fs::File;
use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::sync::Arc;

use afterimage_blockdev::IoBuffer;

use super::parse::{Header, Request};
use super::reply::{Reply, Way};
use super::server::{REQUEST_BYTES_MAX, Server};
use super::wire::{IN_HEADER_BYTES, OUT_HEADER_BYTES};

/// Room for the fields before the data of the longest request.
const FIELDS_BYTES: usize = 8192;

/// One descriptor of `/dev/fuse`.
pub(super) struct Channel(File);

impl Channel {
    pub(super) fn new(file: File) -> Arc<Self> {
        Arc::new(Self(file))
    }

    /// Answers a request; `error` is 0 or a negative error number.
    pub(super) fn answer(&self, unique: u64, error: i32, body: &[u8]) {
        let Ok(length) = u32::try_from(OUT_HEADER_BYTES + body.len()) else {
            return self.answer(unique, -libc::EIO, &[]);
        };
        let mut header = [0; OUT_HEADER_BYTES];
        header[..4].copy_from_slice(&length.to_le_bytes());
        header[4..8].copy_from_slice(&error.to_le_bytes());
        header[8..].copy_from_slice(&unique.to_le_bytes());
        let parts = [IoSlice::new(&header), IoSlice::new(body)];
        // The kernel takes all or nothing. It knows a request no longer whose caller was killed.
        if let Err(error) = (&self.0).write_vectored(&parts) {
            tracing::debug!(%error, unique, "an answer was not taken");
        }
    }

    /// Reads the next request; none when the connection has ended.
    fn receive(&self, buffer: &mut IoBuffer) -> io::Result<Option<usize>> {
        loop {
            match (&self.0).read(buffer) {
                Ok(0) => return Ok(None),
                Ok(length) => return Ok(Some(length)),
                // A caller was killed before its request was read, or a signal came.
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
                Err(error) if matches!(error.kind(), ErrorKind::Interrupted) => {}
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock) => {}
                Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }

    /// Serves requests until the connection ends. With `may_wait` another thread takes requests
    /// while this one waits.
    pub(super) fn serve(self: &Arc<Self>, server: &Server, may_wait: bool) -> io::Result<()> {
        let mut buffer = IoBuffer::zeroed(REQUEST_BYTES_MAX as usize + FIELDS_BYTES);
        while let Some(length) = self.receive(&mut buffer)? {
            let message = buffer.get(..length).unwrap_or_default();
            let Some((header, request, rest)) = parse(message) else {
                self.refuse(message);
                continue;
            };
            let reply = Reply::new(header.unique, Way::Classic(Arc::clone(self)));
            let data = match request {
                Request::Write { length, .. } => rest.get(..length).map(IoBuffer::copy_of),
                _ => None,
            };
            server.handle(&header, request, data, reply, may_wait);
        }
        Ok(())
    }

    fn refuse(&self, message: &[u8]) {
        tracing::error!(
            bytes = message.len(),
            "a request of the kernel makes no sense"
        );
        if let Some(header) = Header::parse(message) {
            self.answer(header.unique, -libc::EINVAL, &[]);
        }
    }
}

fn parse(message: &[u8]) -> Option<(Header, Request<'_>, &[u8])> {
    let header = Header::parse(message)?;
    let body = message.get(IN_HEADER_BYTES..)?;
    let (fixed, rest) = body.split_at_checked(header.fixed_bytes())?;
    Some((header, Request::parse(&header, fixed, rest)?, rest))
}

//! Reads requests and starts them.

use std::io;
use std::sync::Arc;

use afterimage_blockdev::{BlockOp, IoBuffer};
use tokio::time::timeout;

use super::ServerSettings;
use super::commands;
use super::link::Link;
use super::outbox::Outbox;
use super::pending::{Pending, Replies, Task};
use crate::export::{Export, ExtentMap};
use crate::number::{command_flag, error};
use crate::reply::{Failure, ReplyStyle};
use crate::request::{self, BadMagic, Bounds, Command, Request, decode_filter};

/// Bytes read from a socket at once.
const READ_AHEAD_BYTES: usize = 256 << 10;
/// Reads from this size on ask first where there is nothing to read.
const SPARSE_BYTES_MIN: usize = 64 << 10;
/// A payload that is to be thrown away and is longer than this ends the session.
const SKIPPED_BYTES_MAX: u64 = 4 << 30;

/// Why a session is over.
#[derive(Debug, thiserror::Error)]
pub(super) enum Ended {
    #[error("the client said goodbye")]
    Disconnect,
    #[error("the client closed the connection")]
    Closed,
    #[error("the client does not read its replies, or is gone")]
    Broken,
    #[error("{0}")]
    Magic(#[from] BadMagic),
    #[error("a request announces {0} bytes that nobody can want")]
    Endless(u64),
    #[error("the rest of a request did not come in time")]
    Slow,
    #[error("the connection broke: {0}")]
    Io(#[from] io::Error),
}

/// The metadata contexts of a session, by their numbers from 1.
pub(super) type Maps = Arc<Vec<Arc<dyn ExtentMap>>>;

pub(super) struct Transmission {
    link: Arc<Link>,
    replies: Arc<Replies>,
    export: Arc<Export>,
    maps: Maps,
    bounds: Bounds,
    settings: ServerSettings,
    input: Vec<u8>,
    start: usize,
    end: usize,
}

impl Transmission {
    pub(super) fn new(
        link: Arc<Link>,
        replies: Arc<Replies>,
        (export, maps): (Arc<Export>, Maps),
        settings: ServerSettings,
        rest: &[u8],
    ) -> Self {
        let geometry = export.device.geometry();
        let bounds = Bounds {
            size_bytes: geometry.size_bytes,
            block_bytes: geometry.logical_block_bytes,
            is_read_only: geometry.is_read_only,
            style: replies.style,
            context_count: maps.len(),
        };
        let mut input = vec![0; READ_AHEAD_BYTES.max(rest.len())];
        input[..rest.len()].copy_from_slice(rest);
        Self {
            link,
            replies,
            export,
            maps,
            bounds,
            settings,
            input,
            start: 0,
            end: rest.len(),
        }
    }

    fn outbox(&self) -> &Outbox {
        &self.replies.outbox
    }

    fn style(&self) -> ReplyStyle {
        self.bounds.style
    }

    /// Serves until the client goes.
    pub(super) async fn run(&mut self) -> Ended {
        loop {
            self.outbox().begin_batch();
            let batch = self.batch().await;
            self.outbox().end_batch();
            if let Err(ended) = batch {
                return ended;
            }
            if let Err(ended) = self.read_more().await {
                return ended;
            }
        }
    }

    /// Starts the requests that are there.
    async fn batch(&mut self) -> Result<(), Ended> {
        loop {
            let here = self.input.get(self.start..self.end).unwrap_or_default();
            let Some(request) = Request::decode(self.style(), here)? else {
                return Ok(());
            };
            self.start += Request::header_bytes(self.style());
            if request.command == Command::Disconnect {
                return Err(Ended::Disconnect);
            }
            self.start_request(request).await?;
        }
    }

    async fn read_more(&mut self) -> Result<(), Ended> {
        self.input.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        let is_begun = self.end > 0;
        let read = self.link.read(&mut self.input[self.end..]);
        let count = if is_begun {
            let read = timeout(self.settings.message_timeout, read).await;
            read.map_err(|_| Ended::Slow)??
        } else {
            read.await?
        };
        if count == 0 {
            return Err(Ended::Closed);
        }
        self.end += count;
        Ok(())
    }

    async fn start_request(&mut self, request: Request) -> Result<(), Ended> {
        let payload = request.payload_bytes(self.style());
        let checked = request::check(&request, &self.bounds);
        if let Err(failed) = checked {
            self.skip(payload).await?;
            self.admit(0).await?;
            let names = (request.cookie, request.offset);
            self.replies.fail(names, 0, &failed);
            return Ok(());
        }
        // Checked: what has a payload in either direction is bounded.
        let length = usize::try_from(request.length).unwrap_or(usize::MAX);
        match request.command {
            Command::Read => self.read(request, length).await,
            Command::Write => self.write(request, length).await,
            Command::Flush => {
                self.admit(0).await?;
                self.submit(request, 0, BlockOp::Flush);
                Ok(())
            }
            Command::BlockStatus if request.has(command_flag::PAYLOAD_LEN) => {
                self.filtered_status(request, length).await
            }
            _ => {
                self.admit(0).await?;
                let task = self.task(&request, 0);
                commands::spawn(task, request, &self.export, &self.maps);
                Ok(())
            }
        }
    }

    fn task(&self, request: &Request, bytes: usize) -> Task {
        Task {
            replies: Arc::clone(&self.replies),
            cookie: request.cookie,
            offset: request.offset,
            bytes,
        }
    }

    async fn read(&mut self, request: Request, length: usize) -> Result<(), Ended> {
        self.admit(length).await?;
        let is_dense = request.has(command_flag::DF);
        if self.style() != ReplyStyle::Simple && !is_dense && length >= SPARSE_BYTES_MIN {
            let task = self.task(&request, length);
            commands::spawn(task, request, &self.export, &self.maps);
            return Ok(());
        }
        let buffer = self.outbox().buffer(length);
        let offset = request.offset;
        self.submit(request, length, BlockOp::Read { offset, buffer });
        Ok(())
    }

    async fn write(&mut self, request: Request, length: usize) -> Result<(), Ended> {
        self.admit(length).await?;
        let mut buffer = self.outbox().buffer(length);
        if let Err(ended) = self.fill(&mut buffer).await {
            // Nobody waits for the answer, but the request was counted.
            let failed = Failure::new(error::EIO, "the payload is cut off");
            let names = (request.cookie, request.offset);
            self.replies.fail(names, length, &failed);
            return Err(ended);
        }
        let op = BlockOp::Write {
            offset: request.offset,
            buffer,
            fua: request.has(command_flag::FUA),
        };
        self.submit(request, length, op);
        Ok(())
    }

    async fn filtered_status(&mut self, request: Request, length: usize) -> Result<(), Ended> {
        self.admit(length).await?;
        let mut payload = IoBuffer::zeroed(length);
        let filled = self.fill(&mut payload).await;
        let task = self.task(&request, length);
        if let Err(ended) = filled {
            task.fail(&Failure::new(error::EIO, "the payload is cut off"));
            return Err(ended);
        }
        let checked = decode_filter(&payload)
            .filter(|(_, ids)| {
                let exists = |id: &u32| {
                    usize::try_from(*id).is_ok_and(|id| (1..=self.maps.len()).contains(&id))
                };
                !ids.is_empty() && ids.iter().all(exists)
            })
            .ok_or_else(|| Failure::new(error::EINVAL, "the list of contexts is malformed"))
            .and_then(|(range, ids)| {
                request::check_range(&request, range, &self.bounds).map(|()| (range, ids))
            });
        match checked {
            Ok((range, ids)) => {
                let asked = Request {
                    length: range,
                    ..request
                };
                commands::spawn_status(task, asked, ids, Arc::clone(&self.maps));
            }
            Err(failed) => task.fail(&failed),
        }
        Ok(())
    }

    fn submit(&self, request: Request, bytes: usize, op: BlockOp) {
        let token = self.replies.note(Pending {
            cookie: request.cookie,
            offset: request.offset,
            length: bytes,
            is_read: request.command == Command::Read,
            is_dense: request.has(command_flag::DF),
            bytes,
        });
        let to = Arc::clone(&self.replies);
        self.export.device.submit(token, op, to);
    }

    async fn admit(&self, bytes: usize) -> Result<(), Ended> {
        if self.outbox().try_admit(bytes) {
            return Ok(());
        }
        self.outbox().end_batch();
        let is_admitted = self.outbox().admit(bytes).await;
        self.outbox().begin_batch();
        if is_admitted {
            Ok(())
        } else {
            Err(Ended::Broken)
        }
    }

    /// Reads the whole of `buffer`.
    async fn fill(&mut self, buffer: &mut [u8]) -> Result<(), Ended> {
        let here = (self.end - self.start).min(buffer.len());
        let (first, mut rest) = buffer.split_at_mut(here);
        first.copy_from_slice(&self.input[self.start..self.start + here]);
        self.start += here;
        if rest.is_empty() {
            return Ok(());
        }
        self.outbox().end_batch();
        while !rest.is_empty() {
            let read = timeout(self.settings.message_timeout, self.link.read(rest)).await;
            match read.map_err(|_| Ended::Slow)?? {
                0 => return Err(Ended::Closed),
                count => rest = rest.get_mut(count..).unwrap_or_default(),
            }
        }
        self.outbox().begin_batch();
        Ok(())
    }

    /// Reads a payload that nobody wants.
    async fn skip(&mut self, bytes: u64) -> Result<(), Ended> {
        if bytes > SKIPPED_BYTES_MAX {
            return Err(Ended::Endless(bytes));
        }
        let mut left = bytes;
        while left > 0 {
            if self.start == self.end {
                self.outbox().end_batch();
                (self.start, self.end) = (0, 0);
                let read = self.link.read(&mut self.input);
                let read = timeout(self.settings.message_timeout, read).await;
                self.end = read.map_err(|_| Ended::Slow)??;
                if self.end == 0 {
                    return Err(Ended::Closed);
                }
                self.outbox().begin_batch();
            }
            let here = usize::try_from(left).unwrap_or(usize::MAX);
            let here = here.min(self.end - self.start);
            self.start += here;
            left -= u64::try_from(here).unwrap_or(0);
        }
        Ok(())
    }
}

//! Requests of several steps, each a task of its own.

use std::sync::Arc;

use afterimage_blockdev::{
    BlockCompleter, BlockCompletion, BlockDevice, BlockError, BlockErrorKind, BlockOp,
    BlockOutcome, Extent, ExtentKind, IoBuffer, Token,
};
use parking_lot::Mutex;
use tokio::sync::oneshot;

use super::outbox::{Body, Frame};
use super::pending::Task;
use super::transmission::Maps;
use crate::export::{Export, ExtentMap, MapExtent};
use crate::number::{command_flag, error};
use crate::reply::{self, Failure, ReplyStyle};
use crate::request::{Command, Request};

/// A read with more holes than this is one piece.
const CHUNKS_MAX: usize = 64;
/// Extents of one reply and context.
const EXTENTS_MAX: usize = 8192;
/// Bytes that a map is asked for at once.
const WINDOW_BYTES: u64 = 64 << 20;
/// Windows of one reply: a client asks again for what lies behind them.
const WINDOWS_MAX: u64 = 1024;
/// Longest extent that compact replies can tell, a multiple of any block.
const COMPACT_EXTENT_BYTES: u64 = (4 << 30) - (1 << 20);
/// Bytes that CACHE reads at once, and in all: it is no more than a hint.
const CACHE_STEP_BYTES: u64 = 1 << 20;
const CACHE_BYTES_MAX: u64 = 64 << 20;

struct Waiter(Mutex<Option<oneshot::Sender<Result<BlockOutcome, BlockError>>>>);

impl BlockCompleter for Waiter {
    fn complete(&self, completion: BlockCompletion) {
        if let Some(sender) = self.0.lock().take() {
            let _gone = sender.send(completion.result);
        }
    }
}

async fn perform(device: &Arc<dyn BlockDevice>, op: BlockOp) -> Result<BlockOutcome, Failure> {
    let (sender, receiver) = oneshot::channel();
    let lost = op.error(BlockErrorKind::Closed);
    device.submit(Token(0), op, Arc::new(Waiter(Mutex::new(Some(sender)))));
    let result = receiver.await.unwrap_or(Err(lost));
    result.map_err(|error| Failure::from(&error))
}

/// Starts a request that was checked.
pub(super) fn spawn(task: Task, request: Request, export: &Arc<Export>, maps: &Maps) {
    let export = Arc::clone(export);
    match request.command {
        Command::Read => {
            tokio::spawn(read(task, request, export));
        }
        Command::BlockStatus => {
            let ids = (1..).take(maps.len()).collect();
            spawn_status(task, request, ids, Arc::clone(maps));
        }
        _ => {
            tokio::spawn(async move {
                let result = change(&request, &export).await;
                task.finish(result);
            });
        }
    }
}

async fn change(request: &Request, export: &Export) -> Result<(), Failure> {
    let (offset, length) = (request.offset, request.length);
    let device = &export.device;
    match request.command {
        Command::Trim => {
            perform(device, BlockOp::Discard { offset, length }).await?;
        }
        Command::WriteZeroes => {
            if request.has(command_flag::FAST_ZERO) && !export.is_zeroing_fast {
                let text = "zeroes are as slow as any write here";
                return Err(Failure::new(error::ENOTSUP, text));
            }
            let may_unmap = !request.has(command_flag::NO_HOLE);
            let op = BlockOp::WriteZeroes {
                offset,
                length,
                may_unmap,
            };
            perform(device, op).await?;
        }
        _ => {
            cache(device, offset, length.min(CACHE_BYTES_MAX)).await?;
        }
    }
    if request.has(command_flag::FUA) && request.command != Command::Cache {
        perform(device, BlockOp::Flush).await?;
    }
    Ok(())
}

async fn cache(device: &Arc<dyn BlockDevice>, mut offset: u64, length: u64) -> Result<(), Failure> {
    let end = offset.saturating_add(length);
    let mut buffer = IoBuffer::with_capacity(0);
    while offset < end {
        let step = CACHE_STEP_BYTES.min(end - offset);
        let bytes = usize::try_from(step).unwrap_or(0);
        if buffer.len() != bytes {
            buffer = IoBuffer::zeroed(bytes);
        }
        match perform(device, BlockOp::Read { offset, buffer }).await? {
            BlockOutcome::Data(read) => buffer = read,
            _ => return Ok(()),
        }
        offset += step;
    }
    Ok(())
}

/// Reads what is there, and tells of the rest that it is a hole.
async fn read(task: Task, request: Request, export: Arc<Export>) {
    let parts = parts(&request, &export.device).await;
    let names = (task.cookie, task.offset);
    let count = parts.len();
    for (number, part) in (1..).zip(parts) {
        let is_last = number == count;
        let releases = is_last.then_some(task.bytes);
        let length = usize::try_from(part.length).unwrap_or(0);
        if part.kind == ExtentKind::Zero {
            let head = reply::hole(task.replies.style, is_last, names, part.offset, length);
            task.replies.outbox.push(Frame {
                head,
                body: Body::Empty,
                releases,
            });
            continue;
        }
        let op = BlockOp::Read {
            offset: part.offset,
            buffer: task.replies.outbox.buffer(length),
        };
        match perform(&export.device, op).await {
            Ok(BlockOutcome::Data(buffer)) if buffer.len() == length => {
                let place = (part.offset, buffer);
                task.replies.data(names, place, (is_last, false), releases);
            }
            Ok(_) => {
                let text = "the device gave another number of bytes";
                return task.fail(&Failure::new(error::EIO, text));
            }
            Err(failed) => return task.fail(&failed),
        }
    }
}

/// The parts of a read. Where the device cannot tell, or there are too many, it is one.
async fn parts(request: &Request, device: &Arc<dyn BlockDevice>) -> Vec<Extent> {
    let (offset, length) = (request.offset, request.length);
    let found = perform(device, BlockOp::Extents { offset, length }).await;
    if let Ok(BlockOutcome::Extents(extents)) = found {
        let mut at = offset;
        let adjoins = extents.iter().all(|extent| {
            let is_next = extent.offset == at && extent.length > 0;
            at = at.saturating_add(extent.length);
            is_next
        });
        if adjoins && at == offset + length && extents.len() <= CHUNKS_MAX {
            return extents;
        }
    }
    vec![Extent {
        offset,
        length,
        kind: ExtentKind::Data,
    }]
}

/// Starts a BLOCK_STATUS for the contexts of these numbers.
pub(super) fn spawn_status(task: Task, request: Request, ids: Vec<u32>, maps: Maps) {
    tokio::spawn(async move {
        let count = ids.len();
        for (number, id) in (1..).zip(ids) {
            let place = usize::try_from(id).unwrap_or(usize::MAX).wrapping_sub(1);
            let Some(map) = maps.get(place) else {
                return task.fail(&Failure::new(error::EINVAL, "there is no such context"));
            };
            let style = task.replies.style;
            let extents = match walk(map, &request, style).await {
                Ok(extents) => extents,
                Err(failed) => return task.fail(&failed),
            };
            let is_last = number == count;
            let names = (task.cookie, task.offset);
            let (head, body) = reply::block_status(style, is_last, names, id, &extents);
            task.replies.outbox.push(Frame {
                head,
                body: Body::Bytes(body),
                releases: is_last.then_some(task.bytes),
            });
        }
    });
}

/// Collects extents from the begin of a range, as many as one reply takes.
async fn walk(
    map: &Arc<dyn ExtentMap>,
    request: &Request,
    style: ReplyStyle,
) -> Result<Vec<(u64, u32)>, Failure> {
    let is_one = request.has(command_flag::REQ_ONE);
    let longest = if style == ReplyStyle::Extended {
        u64::MAX
    } else {
        COMPACT_EXTENT_BYTES
    };
    let end = request.offset.saturating_add(request.length);
    let mut at = request.offset;
    let mut found: Vec<(u64, u32)> = Vec::new();
    for _ in 0..WINDOWS_MAX {
        let window = WINDOW_BYTES.min(end - at);
        for extent in ask(map, at, window).await? {
            match found.last_mut() {
                Some((length, flags)) if *flags == extent.flags => *length += extent.length,
                _ => found.push((extent.length, extent.flags)),
            }
        }
        at += window;
        let has_enough = if is_one {
            found.len() > 1
        } else {
            found.len() >= EXTENTS_MAX || found.first().is_some_and(|one| one.0 >= longest)
        };
        if at >= end || has_enough {
            break;
        }
    }
    found.truncate(if is_one { 1 } else { EXTENTS_MAX });
    Ok(split(found, longest))
}

/// Shortens a list so that no extent is longer than its reply can tell.
fn split(mut found: Vec<(u64, u32)>, longest: u64) -> Vec<(u64, u32)> {
    if let Some(place) = found.iter().position(|one| one.0 > longest) {
        found.truncate(place + 1);
        if let Some(last) = found.last_mut() {
            last.0 = longest;
        }
    }
    found
}

async fn ask(
    map: &Arc<dyn ExtentMap>,
    offset: u64,
    length: u64,
) -> Result<Vec<MapExtent>, Failure> {
    let (sender, receiver) = oneshot::channel();
    let done = move |result| {
        let _gone = sender.send(result);
    };
    map.extents(offset, length, Box::new(done));
    let lost = || Failure::new(error::EIO, "the map of the disk was closed");
    let extents = receiver
        .await
        .map_err(|_| lost())?
        .map_err(|error| Failure::from(&error))?;
    let covered: u64 = extents.iter().map(|extent| extent.length).sum();
    if covered == length && extents.iter().all(|extent| extent.length > 0) {
        Ok(extents)
    } else {
        let text = "the map of the disk has gaps";
        Err(Failure::new(error::EIO, text))
    }
}

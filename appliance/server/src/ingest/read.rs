//! Reads one message, into memory that was set aside for it before.

use std::io;
use std::time::Duration;

use afterimage_protocol::FromSender;
use afterimage_protocol::head::{FrameHead, HEAD_BYTES_MAX};
use afterimage_protocol::wire::{self, PREFIX_BYTES};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::timeout;

/// How long is waited for what.
#[derive(Clone, Copy)]
pub(super) struct Patience {
    pub(super) idle: Duration,
    pub(super) message: Duration,
}

/// A message, and the memory that it holds.
pub(super) struct Read<'a> {
    pub(super) message: FromSender,
    pub(super) memory: SemaphorePermit<'a>,
}

/// Why nothing was read.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReadError {
    #[error("the peer said nothing for {0:?}")]
    Idle(Duration),
    #[error("a message did not end within {0:?}")]
    Slow(Duration),
    #[error("{0}")]
    Wire(#[from] wire::WireError),
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// Reads one message; `None` at the end of the connection.
pub(super) async fn read<'a, R: AsyncRead + Unpin>(
    from: &mut R,
    memory: &'a Semaphore,
    patience: Patience,
) -> Result<Option<Read<'a>>, ReadError> {
    let mut prefix = [0; PREFIX_BYTES];
    let begun = timeout(patience.idle, from.read(&mut prefix[..]))
        .await
        .map_err(|_| ReadError::Idle(patience.idle))??;
    if begun == 0 {
        return Ok(None);
    }
    let slow = |_| ReadError::Slow(patience.message);
    timeout(patience.message, from.read_exact(&mut prefix[begun..]))
        .await
        .map_err(slow)??;
    let len = wire::decode_prefix(prefix)?;
    let wanted = u32::try_from(len).map_err(|_| wire::WireError::TooLong { len })?;
    let memory = memory
        .acquire_many(wanted)
        .await
        .map_err(io::Error::other)?;
    let message = timeout(patience.message, read_body(from, len))
        .await
        .map_err(slow)??;
    Ok(Some(Read { message, memory }))
}

async fn read_body<R: AsyncRead + Unpin>(
    from: &mut R,
    len: usize,
) -> Result<FromSender, ReadError> {
    let mut head = [0; HEAD_BYTES_MAX];
    let head = &mut head[..len.min(HEAD_BYTES_MAX)];
    from.read_exact(head).await?;
    if let Some(frame) = FrameHead::parse(head, len) {
        let bytes = read_rest(from, &head[frame.head_len..], frame.frame_len).await?;
        return Ok(frame.into_message(bytes));
    }
    let bytes = read_rest(from, head, len).await?;
    Ok(wire::decode(&bytes)?)
}

/// Reads until there are `len` bytes, into a buffer of that size that nobody zeroes.
async fn read_rest<R: AsyncRead + Unpin>(
    from: &mut R,
    start: &[u8],
    len: usize,
) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(len);
    bytes.extend_from_slice(start);
    let missing = u64::try_from(len - start.len()).unwrap_or(u64::MAX);
    let mut rest = from.take(missing);
    while bytes.len() < len {
        if rest.read_buf(&mut bytes).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(bytes)
}

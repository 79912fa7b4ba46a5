//! Reads replies and hands them to their requests.

use std::io::{self, Read};

use super::active::Active;
use super::{Agreed, ClientError};
use crate::number::chunk;
use crate::reply::{
    self, BadReply, Failure, MESSAGE_BYTES_MAX, REPLY_HEAD_BYTES_MAX, ReplyHead, ReplyStyle,
};
use crate::request::Command;

/// Most bytes of a chunk of extents.
const STATUS_BYTES_MAX: u64 = 16 << 20;

/// Where requests are found by their cookie.
pub(super) trait Requests {
    /// Takes a request that was sent.
    fn take(&self, cookie: u64) -> Option<Active>;
    /// Puts it back: more of its reply is to come.
    fn put_back(&self, cookie: u64, active: Active);
    /// Its reply is over: it is completed, or its next piece sent.
    fn ended(&self, cookie: u64, active: Active, is_complete: bool);
}

fn bad(what: &'static str) -> ClientError {
    ClientError::BadReply(BadReply { what })
}

/// Reads one reply or chunk; `false` at the end of the stream.
pub(super) fn receive(
    stream: &mut impl Read,
    agreed: &Agreed,
    requests: &impl Requests,
) -> Result<bool, ClientError> {
    let Some(head) = read_head(stream, agreed.style)? else {
        return Ok(false);
    };
    let (ReplyHead::Simple { cookie, .. } | ReplyHead::Chunk { cookie, .. }) = head;
    let Some(mut active) = requests.take(cookie) else {
        return Err(bad("it answers nothing that was asked"));
    };
    let result = match head {
        ReplyHead::Simple { code, .. } => simple(stream, agreed, &mut active, code).map(|()| true),
        ReplyHead::Chunk {
            is_last,
            kind,
            length,
            ..
        } => take_chunk(stream, agreed, &mut active, (kind, length)).map(|()| is_last),
    };
    match result {
        Ok(false) => requests.put_back(cookie, active),
        Ok(true) => match active.end_piece() {
            Ok(is_complete) => requests.ended(cookie, active, is_complete),
            Err(error) => {
                active.lose(error.what);
                return Err(error.into());
            }
        },
        Err(error) => {
            active.lose(&error.to_string());
            return Err(error);
        }
    }
    Ok(true)
}

fn read_head(stream: &mut impl Read, style: ReplyStyle) -> Result<Option<ReplyHead>, ClientError> {
    let mut bytes = [0; REPLY_HEAD_BYTES_MAX];
    let mut have = 0;
    // The shortest head tells by its magic how long it is.
    let mut want = 16;
    loop {
        while have < want {
            match stream.read(bytes.get_mut(have..want).unwrap_or_default()) {
                Ok(0) if have == 0 => return Ok(None),
                Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                Ok(count) => have += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        match reply::decode_head(style, bytes.get(..have).unwrap_or_default())? {
            Some((head, _)) => return Ok(Some(head)),
            None if want < 20 => want = 20,
            None if want < REPLY_HEAD_BYTES_MAX => want = REPLY_HEAD_BYTES_MAX,
            None => return Err(bad("a head without an end")),
        }
    }
}

fn simple(
    stream: &mut impl Read,
    agreed: &Agreed,
    active: &mut Active,
    code: u32,
) -> Result<(), ClientError> {
    if code != 0 {
        active.failure = Some(Failure::new(code, "the server says no more"));
        return Ok(());
    }
    let command = active.command();
    if command == Command::BlockStatus {
        return Err(bad("extents without a chunk"));
    }
    if command == Command::Read {
        if agreed.style != ReplyStyle::Simple {
            return Err(bad("a read without chunks"));
        }
        let (start, piece) = (active.offset + active.done, active.piece);
        stream.read_exact(active.place(start, piece)?)?;
    }
    Ok(())
}

fn take_chunk(
    stream: &mut impl Read,
    agreed: &Agreed,
    active: &mut Active,
    (kind, length): (u16, u64),
) -> Result<(), ClientError> {
    match kind {
        chunk::NONE if length == 0 => Ok(()),
        chunk::OFFSET_DATA => {
            let mut place = [0; 8];
            let data = length
                .checked_sub(8)
                .ok_or_else(|| bad("a chunk without data"))?;
            stream.read_exact(&mut place)?;
            let (offset, _) = reply::decode_place(kind, &place)?;
            stream.read_exact(active.place(offset, data)?)?;
            Ok(())
        }
        chunk::OFFSET_HOLE if length == 12 => {
            let mut place = [0; 12];
            stream.read_exact(&mut place)?;
            let (offset, hole) = reply::decode_place(kind, &place)?;
            active.place(offset, u64::from(hole))?.fill(0);
            Ok(())
        }
        chunk::BLOCK_STATUS | chunk::BLOCK_STATUS_EXT => {
            let is_extended = kind == chunk::BLOCK_STATUS_EXT;
            if is_extended != (agreed.style == ReplyStyle::Extended) {
                return Err(bad("extents of the other kind"));
            }
            let payload = read_payload(stream, length, STATUS_BYTES_MAX)?;
            let (id, extents) = reply::decode_status(is_extended, &payload)?;
            Ok(active.extents(id, &extents)?)
        }
        kind if chunk::is_error(kind) => {
            let most = u64::try_from(2 * MESSAGE_BYTES_MAX + 16).unwrap_or(0) * 32;
            let payload = read_payload(stream, length, most)?;
            let failed = reply::decode_failure(&payload)?;
            active.failure.get_or_insert(failed);
            Ok(())
        }
        _ => Err(bad("a chunk of a kind that was not asked for")),
    }
}

fn read_payload(stream: &mut impl Read, length: u64, most: u64) -> Result<Vec<u8>, ClientError> {
    if length > most {
        return Err(bad("a chunk that is longer than any of use"));
    }
    let mut payload = Vec::new();
    let taken = stream.take(length).read_to_end(&mut payload)?;
    if u64::try_from(taken).ok() == Some(length) {
        Ok(payload)
    } else {
        Err(io::Error::from(io::ErrorKind::UnexpectedEof).into())
    }
}

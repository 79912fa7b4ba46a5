//! The few bytes of a message that come before a frame, so that a receiver reads the frame itself
//! straight into a buffer of its exact size: at half a gigabyte a second a copy is felt.

use afterimage_blockdev::Lsn;

use crate::message::{FromSender, StreamId};

/// As many bytes as a head can have.
pub const HEAD_BYTES_MAX: usize = 64;

/// Place of [`FromSender::Frame`] and [`FromSender::Bulk`] among the messages, as encoded.
const FRAME: u32 = 3;
const BULK: u32 = 4;

/// What comes before a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FrameHead {
    kind: Kind,
    /// Bytes of the head itself.
    pub head_len: usize,
    /// Bytes of the frame.
    pub frame_len: usize,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Frame {
        stream: StreamId,
        first: Lsn,
        last: Lsn,
    },
    Bulk {
        stream: StreamId,
        number: u64,
    },
}

impl FrameHead {
    /// Reads the head of a message of `message_len` bytes. `start` is its first bytes, all of them
    /// or at least [`HEAD_BYTES_MAX`]. `None` when it carries no frame or the lengths disagree; it
    /// is then decoded as a whole, and refused there if need be.
    #[must_use]
    pub fn parse(start: &[u8], message_len: usize) -> Option<Self> {
        let (variant, rest) = postcard::take_from_bytes::<u32>(start).ok()?;
        let (kind, frame_len, rest) = match variant {
            FRAME => {
                type Fields = (StreamId, Lsn, Lsn, usize);
                let ((stream, first, last, len), rest) =
                    postcard::take_from_bytes::<Fields>(rest).ok()?;
                (
                    Kind::Frame {
                        stream,
                        first,
                        last,
                    },
                    len,
                    rest,
                )
            }
            BULK => {
                let ((stream, number, len), rest) =
                    postcard::take_from_bytes::<(StreamId, u64, usize)>(rest).ok()?;
                (Kind::Bulk { stream, number }, len, rest)
            }
            _ => return None,
        };
        let head_len = start.len() - rest.len();
        let is_whole = head_len.checked_add(frame_len) == Some(message_len);
        is_whole.then_some(Self {
            kind,
            head_len,
            frame_len,
        })
    }

    /// Puts head and frame together.
    #[must_use]
    pub fn into_message(self, bytes: Vec<u8>) -> FromSender {
        match self.kind {
            Kind::Frame {
                stream,
                first,
                last,
            } => FromSender::Frame {
                stream,
                first,
                last,
                bytes,
            },
            Kind::Bulk { stream, number } => FromSender::Bulk {
                stream,
                number,
                bytes,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{self, PREFIX_BYTES};

    fn round_trip(message: &FromSender) -> Option<FromSender> {
        let bytes = wire::encode(message).unwrap();
        let body = &bytes[PREFIX_BYTES..];
        let start = &body[..body.len().min(HEAD_BYTES_MAX)];
        let head = FrameHead::parse(start, body.len())?;
        assert_eq!(head.frame_len, body.len() - head.head_len);
        Some(head.into_message(body[head.head_len..].to_vec()))
    }

    #[test]
    fn agrees_with_the_whole_decoder() {
        for len in [0, 1, 63, 64, 65, 200, 70_000] {
            let bytes = vec![7; len];
            let stream = StreamId(u32::MAX);
            let (first, last) = (Lsn(u64::MAX - 1), Lsn(u64::MAX));
            let frame = FromSender::Frame {
                stream,
                first,
                last,
                bytes: bytes.clone(),
            };
            assert_eq!(round_trip(&frame), Some(frame));
            let bulk = FromSender::Bulk {
                stream,
                number: u64::MAX,
                bytes,
            };
            assert_eq!(round_trip(&bulk), Some(bulk));
        }
    }

    #[test]
    fn leaves_other_messages_and_lies_to_the_whole_decoder() {
        let hello = FromSender::Hello {
            version: 1,
            program: "a".repeat(100),
        };
        assert_eq!(round_trip(&hello), None);
        let frame = FromSender::Frame {
            stream: StreamId(1),
            first: Lsn(1),
            last: Lsn(1),
            bytes: vec![0; 100],
        };
        let body = wire::encode(&frame).unwrap()[PREFIX_BYTES..].to_vec();
        assert_eq!(FrameHead::parse(&body[..64], body.len() + 1), None);
        assert_eq!(FrameHead::parse(&body[..64], 64), None);
        assert_eq!(FrameHead::parse(&[], 0), None);
    }
}

//! Where a sender takes its records from, and what it gives to the connection.

use afterimage_blockdev::{DiskId, Lsn};

use crate::message::{FromSender, StreamId};
use crate::wire::{self, WireError};

/// An ordered frame.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SourceFrame<B> {
    /// LSN of its first record.
    pub first: Lsn,
    /// LSN of its last record.
    pub last: Lsn,
    /// The frame.
    pub bytes: B,
}

/// A bulk frame.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SourceBulk<B> {
    /// Its number; rises, and stays the same when the frame is sent again.
    pub number: u64,
    /// LSN of the record that begins its batch.
    pub after: Lsn,
    /// The frame.
    pub bytes: B,
}

/// A comparison that is wanted.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Question {
    /// Its number; rises, and stays the same when it is asked again.
    pub number: u64,
    /// The disk.
    pub disk: DiskId,
    /// First block.
    pub first_block: u64,
    /// Tags of the source's blocks.
    pub tags: Vec<[u8; 16]>,
}

/// Keeps everything until it is acknowledged or answered: a spool, a history, a test's list.
pub trait RecordSource {
    /// How a frame is held.
    type Bytes: AsRef<[u8]>;

    /// The first frame with a record above `after`; `None` when it is not at hand. Frames follow
    /// each other without a gap.
    fn next_frame(&mut self, after: Lsn) -> Option<SourceFrame<Self::Bytes>>;

    /// The first bulk frame above `number` that is not acknowledged.
    fn next_bulk(&mut self, number: u64) -> Option<SourceBulk<Self::Bytes>>;

    /// The first question above `number` that is not answered.
    fn next_question(&mut self, number: u64) -> Option<Question>;
}

/// What goes onto the connection.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outgoing<B> {
    /// A message without a frame.
    Message(FromSender),
    /// An ordered frame, to be written without copying it.
    Frame {
        /// The stream.
        stream: StreamId,
        /// LSN of its first record.
        first: Lsn,
        /// LSN of its last record.
        last: Lsn,
        /// The frame.
        bytes: B,
    },
    /// A bulk frame.
    Bulk {
        /// The stream.
        stream: StreamId,
        /// Named in the acknowledgement.
        number: u64,
        /// The frame.
        bytes: B,
    },
}

impl<B: AsRef<[u8]>> Outgoing<B> {
    /// The bytes before the frame, length prefix included: head and [`Outgoing::body`] together
    /// are the encoded message.
    ///
    /// # Errors
    /// [`WireError::TooLong`].
    pub fn head(&self) -> Result<Vec<u8>, WireError> {
        let none = Vec::new();
        match self {
            Self::Message(message) => wire::encode(message),
            Self::Frame {
                stream,
                first,
                last,
                bytes,
            } => {
                let (stream, first, last) = (*stream, *first, *last);
                let message = FromSender::Frame {
                    stream,
                    first,
                    last,
                    bytes: none,
                };
                wire::encode_before_blob(&message, bytes.as_ref().len())
            }
            Self::Bulk {
                stream,
                number,
                bytes,
            } => {
                let (stream, number) = (*stream, *number);
                let message = FromSender::Bulk {
                    stream,
                    number,
                    bytes: none,
                };
                wire::encode_before_blob(&message, bytes.as_ref().len())
            }
        }
    }

    /// The frame, if there is one.
    #[must_use]
    pub fn body(&self) -> &[u8] {
        match self {
            Self::Message(_) => &[],
            Self::Frame { bytes, .. } | Self::Bulk { bytes, .. } => bytes.as_ref(),
        }
    }
}

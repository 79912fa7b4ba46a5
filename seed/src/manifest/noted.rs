//! What only notes say: no manifest has these.

use afterimage_blockdev::{HistoryId, Lsn, SegmentId};

use super::field::{FieldReader, FieldWriter};
use crate::run::RunId;

/// What only notes say.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Noted {
    /// What notes these are; the second edit of each state.
    Notes {
        /// Their number.
        number: u32,
        /// All commits of the manifest below this one are in it.
        sequence: u64,
        /// The run as which the map's rest is laid out; 0 for none.
        rest: RunId,
        /// Commit of the log up to which that one holds all.
        rest_through: u64,
    },
    /// Of a history everything up to here was decided on.
    Known {
        /// The history.
        history: HistoryId,
        /// The LSN.
        lsn: Lsn,
    },
    /// A segment that is about to be rewritten, destaged or dropped.
    Moving {
        /// The segment.
        segment: SegmentId,
        /// Its last commit, when it is one of the log; 0 otherwise.
        last_sequence: u64,
        /// Slots of it that are needed; without any it is dropped.
        needed: u32,
    },
}

impl Noted {
    /// Appends the fields; gives back the tag.
    pub(super) fn encode(&self, w: &mut FieldWriter) -> u8 {
        match self {
            Self::Notes {
                number,
                sequence,
                rest,
                rest_through,
            } => {
                w.u32(*number).u64(*sequence);
                w.u32(rest.0).u64(*rest_through);
                22
            }
            Self::Known { history, lsn } => {
                w.id(history.0).u64(lsn.0);
                23
            }
            Self::Moving {
                segment,
                last_sequence,
                needed,
            } => {
                w.u32(segment.0).u64(*last_sequence).u32(*needed);
                24
            }
        }
    }

    /// Reads the fields of a tag.
    pub(super) fn decode(tag: u8, r: &mut FieldReader<'_>) -> Option<Self> {
        Some(match tag {
            22 => Self::Notes {
                number: r.u32()?,
                sequence: r.u64()?,
                rest: RunId(r.u32()?),
                rest_through: r.u64()?,
            },
            23 => Self::Known {
                history: HistoryId(r.array()?),
                lsn: Lsn(r.u64()?),
            },
            24 => Self::Moving {
                segment: SegmentId(r.u32()?),
                last_sequence: r.u64()?,
                needed: r.u32()?,
            },
            _ => return None,
        })
    }
}

//! Quotas and measured churn, as fields of edits.

use afterimage_blockdev::{DiskId, MachineId};

use super::field::{FieldReader, FieldWriter};
use crate::retention::{ChurnRecord, Stored};

/// What a quota is of.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum QuotaOf {
    /// All files of the store.
    Store,
    /// What a machine's disks need.
    Machine(MachineId),
    /// What a disk needs.
    Disk(DiskId),
}

impl QuotaOf {
    pub(super) fn encode(self, w: &mut FieldWriter) {
        match self {
            Self::Store => w.u8(1).id([0; 16]),
            Self::Machine(machine) => w.u8(2).id(machine.0),
            Self::Disk(disk) => w.u8(3).id(disk.0),
        };
    }

    pub(super) fn decode(r: &mut FieldReader<'_>) -> Option<Self> {
        let (kind, id): (u8, [u8; 16]) = (r.u8()?, r.array()?);
        match kind {
            1 => (id == [0; 16]).then_some(Self::Store),
            2 => Some(Self::Machine(MachineId(id))),
            3 => Some(Self::Disk(DiskId(id))),
            _ => None,
        }
    }
}

pub(super) fn encode_churn(churn: &ChurnRecord, w: &mut FieldWriter) {
    w.u64(churn.measured_ns).u64(churn.bytes).u64(churn.slots);
    for stored in [churn.data, churn.bulk] {
        w.u64(stored.bytes).u64(stored.blocks);
    }
    for distinct in churn.distinct {
        w.u64(distinct);
    }
}

pub(super) fn decode_churn(r: &mut FieldReader<'_>) -> Option<ChurnRecord> {
    let stored = |r: &mut FieldReader<'_>| {
        Some(Stored {
            bytes: r.u64()?,
            blocks: r.u64()?,
        })
    };
    Some(ChurnRecord {
        measured_ns: r.u64()?,
        bytes: r.u64()?,
        slots: r.u64()?,
        data: stored(r)?,
        bulk: stored(r)?,
        distinct: [r.u64()?, r.u64()?, r.u64()?],
    })
}

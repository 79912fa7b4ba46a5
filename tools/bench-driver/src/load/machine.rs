//! One machine of the load: gives out LSNs and seals its disks' writes.

use afterimage_blockdev::{
    BLOCK_BYTES, BatchId, Clock, DiskId, KeyId, Lsn, Random, SystemClock, SystemEntropy, Timestamp,
};
use afterimage_cache::{
    BatchKind, DiskKey, Effort, Frame, FrameBuilder, FrameIdentity, RecordHeader, RecordKind,
    Sealer, TagKey,
};
use afterimage_protocol::sender::{DiskAnswer, StreamIdentity};

use crate::fill::half_compressible;

/// The only batch: the first copy of disks that are empty.
const BATCH: BatchId = BatchId(1);
/// What an agent with data waiting uses.
const EFFORT: Effort = Effort::Zstd(-1);

/// The keys of a stream.
pub(crate) struct StreamKeys {
    pub(crate) tag: TagKey,
    pub(crate) disks: Vec<DiskAnswer>,
}

struct Disk {
    id: DiskId,
    previous: Lsn,
    sealer: Sealer,
}

/// See the module's text.
pub(crate) struct Machine {
    identity: FrameIdentity,
    disks: Vec<Disk>,
    blocks: u64,
    /// The history's first record.
    first: Lsn,
    next: Lsn,
    time: Timestamp,
    random: Random,
    plain: Vec<u8>,
}

impl Machine {
    pub(crate) fn new(
        stream: &StreamIdentity,
        keys: StreamKeys,
        disk_bytes: u64,
        seed: u64,
    ) -> Self {
        Self {
            identity: identity_of(stream),
            disks: disks_of(keys),
            blocks: disk_bytes / block_bytes(),
            first: Lsn(1),
            next: Lsn(1),
            time: Timestamp(0),
            random: Random::new(seed.wrapping_add(1)),
            plain: vec![0; BLOCK_BYTES],
        }
    }

    /// Goes on in a history that forks off at the last record.
    pub(crate) fn fork(&mut self, stream: &StreamIdentity, keys: StreamKeys) {
        self.identity = identity_of(stream);
        self.disks = disks_of(keys);
        self.first = self.next;
    }

    /// The last record's LSN.
    pub(crate) fn last(&self) -> Lsn {
        Lsn(self.next.0.saturating_sub(1))
    }

    /// Says whether [`Machine::start`] was not yet called.
    pub(crate) fn is_new(&self) -> bool {
        self.next == self.first
    }

    /// The clock of the records that follow.
    pub(crate) fn set_time(&mut self) {
        self.time = self.time.max(SystemClock::default().wall());
    }

    fn header(&mut self, kind: RecordKind) -> RecordHeader {
        let lsn = self.next;
        self.next = lsn.next();
        self.time = Timestamp(self.time.0 + 1);
        RecordHeader {
            kind,
            lsn,
            previous: Lsn::ZERO,
            time: self.time,
            disk: DiskId::NIL,
            offset: 0,
            length: 0,
            batch: BatchId(0),
            argument: 0,
        }
    }

    /// The first frame of a history: an epoch begins, and where there is no parent a first copy of
    /// disks that hold only zeroes.
    pub(crate) fn start(&mut self) -> Frame {
        let mut builder = FrameBuilder::new(self.identity, false);
        let epoch = self.header(RecordKind::EpochStart);
        builder.push_note(&epoch, &[]);
        if self.first > Lsn(1) {
            return builder.finish();
        }
        let note: Vec<u8> = self.disks.iter().flat_map(|disk| disk.id.0).collect();
        for (kind, note) in [
            (RecordKind::BatchBegin(BatchKind::Initial), note.as_slice()),
            (RecordKind::BatchEnd, &[]),
        ] {
            let header = RecordHeader {
                batch: BATCH,
                ..self.header(kind)
            };
            builder.push_note(&header, note);
        }
        builder.finish()
    }

    /// A frame of random 4 KiB writes to random disks.
    pub(crate) fn frame(&mut self, records: usize) -> Frame {
        let mut builder = FrameBuilder::new(self.identity, false);
        for _ in 0..records {
            let place = self.random.index(self.disks.len());
            let offset = self.random.below(self.blocks) * block_bytes();
            let header = self.header(RecordKind::Write);
            half_compressible(&mut self.random, &mut self.plain);
            let disk = &mut self.disks[place];
            let header = RecordHeader {
                previous: disk.previous,
                disk: disk.id,
                offset,
                length: block_bytes(),
                ..header
            };
            disk.previous = header.lsn;
            builder.push_data(&header, &self.plain, &mut disk.sealer);
        }
        builder.finish()
    }
}

fn identity_of(stream: &StreamIdentity) -> FrameIdentity {
    FrameIdentity {
        machine: stream.machine,
        history: stream.history,
        origin: stream.origin,
        epoch: stream.epoch,
    }
}

fn disks_of(keys: StreamKeys) -> Vec<Disk> {
    let disk = |answer: DiskAnswer| {
        let key = DiskKey {
            id: KeyId(answer.key),
            secret: answer.secret,
        };
        let mut sealer = Sealer::new(Some(&key), keys.tag.clone(), &SystemEntropy);
        sealer.set_effort(EFFORT);
        Disk {
            id: answer.disk,
            previous: Lsn::ZERO,
            sealer,
        }
    };
    keys.disks.into_iter().map(disk).collect()
}

/// Bytes of a block, as the records count them.
pub(crate) fn block_bytes() -> u64 {
    u64::try_from(BLOCK_BYTES).unwrap_or(u64::MAX)
}

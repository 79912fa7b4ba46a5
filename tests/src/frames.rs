//! Small frames of several machines, each unlike any other.

use afterimage_blockdev::random::Random;
use afterimage_blockdev::simulated::SeededEntropy;
use afterimage_blockdev::{
    AgentId, BatchId, DiskId, Epoch, HistoryId, KeyId, Lsn, MachineId, Timestamp,
};
use afterimage_cache::seal::Effort;
use afterimage_cache::{
    DiskKey, Frame, FrameBuilder, FrameIdentity, MarkKind, RecordHeader, RecordKind, Sealer, TagKey,
};

/// Bytes of a block.
const BLOCK: usize = 4096;
/// Machines that write at once.
const MACHINES: usize = 3;

struct Machine {
    identity: FrameIdentity,
    disk: DiskId,
    next: Lsn,
    previous: Lsn,
}

/// Makes frames.
pub struct FrameMaker {
    random: Random,
    machines: Vec<Machine>,
    sealer: Sealer,
    made: u64,
}

/// The key of every disk in these tests.
#[must_use]
pub fn disk_key() -> DiskKey {
    DiskKey {
        id: KeyId(1),
        secret: [7; 32],
    }
}

fn identity(random: &mut Random) -> [u8; 16] {
    let mut bytes = [0; 16];
    random.fill(&mut bytes);
    bytes
}

impl FrameMaker {
    /// Starts the sequence of a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let machines = (0..MACHINES)
            .map(|_| Machine {
                identity: FrameIdentity {
                    machine: MachineId(identity(&mut random)),
                    history: HistoryId(identity(&mut random)),
                    origin: AgentId(identity(&mut random)),
                    epoch: Epoch(1 + random.below(9)),
                },
                disk: DiskId(identity(&mut random)),
                next: Lsn(1),
                previous: Lsn::ZERO,
            })
            .collect();
        let mut sealer = Sealer::new(
            Some(&disk_key()),
            TagKey([3; 32]),
            &SeededEntropy::new(random.next_u64()),
        );
        sealer.set_effort(Effort::Zstd(-5));
        Self {
            random,
            machines,
            sealer,
            made: 0,
        }
    }

    /// Makes the next frame, of any machine, with at most so many records.
    pub fn next_frame(&mut self, records_max: u64) -> Frame {
        let which = self.random.index(self.machines.len());
        let count = 1 + self.random.below(records_max);
        let machine = &mut self.machines[which];
        self.made += 1;
        let mut builder = FrameBuilder::new(machine.identity, false);
        for _ in 0..count {
            let mut record = RecordHeader {
                kind: RecordKind::Write,
                lsn: machine.next,
                previous: machine.previous,
                time: Timestamp(self.made),
                disk: machine.disk,
                offset: self.random.below(1000) * BLOCK as u64,
                length: 0,
                batch: BatchId(0),
                argument: self.random.next_u64(),
            };
            machine.next = machine.next.next();
            match self.random.below(8) {
                0 | 1 => {
                    record.kind = RecordKind::Mark(MarkKind::Bookmark);
                    record.disk = DiskId::NIL;
                    record.offset = 0;
                    let len = self.random.index(40);
                    let mut note = vec![0; len];
                    self.random.fill(&mut note);
                    builder.push_note(&record, &note);
                    continue;
                }
                2 => {
                    record.kind = RecordKind::Discard;
                    record.length = (1 + self.random.below(100)) * BLOCK as u64;
                    builder.push_note(&record, &[]);
                }
                _ => {
                    let plain = content(&mut self.random, self.made);
                    record.length = plain.len() as u64;
                    builder.push_data(&record, &plain, &mut self.sealer);
                }
            }
            machine.previous = record.lsn;
        }
        builder.finish()
    }
}

/// Blocks that compress well, or not at all, or are zero.
fn content(random: &mut Random, made: u64) -> Vec<u8> {
    let blocks = 1 + random.index(6);
    let mut plain = vec![0; blocks * BLOCK];
    for block in plain.chunks_mut(BLOCK) {
        match random.below(16) {
            0 => random.fill(block),
            1 => {}
            _ => {
                let len = 64 + random.index(512);
                random.fill(&mut block[..len]);
                block[BLOCK - 8..].copy_from_slice(&made.to_le_bytes());
            }
        }
    }
    plain
}

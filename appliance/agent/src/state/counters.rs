//! The counters that must never go back.
//!
//! The file holds two copies of 4096 bytes; the newer one that is whole counts, and the older one
//! is written over. All integers are little-endian, unused bytes zero.
//!
//! | at | bytes | what |
//! |---|---|---|
//! | 0 | 8 | `AICOUNT\0` |
//! | 8 | 2 | version, 1 |
//! | 10 | 6 | zero |
//! | 16 | 8 | generation |
//! | 24 | 16 | machine |
//! | 40 | 16 | history |
//! | 56 | 8 | epoch |
//! | 64 | 8 | reserved: no LSN from here on was given out |
//! | 72 | 8 | highest LSN acknowledged |
//! | 80 | 8 | latest time of a record, at the last save |
//! | 88 | 8 | appliance time less own wall time, in ns, signed |
//! | 96 | 4 | highest batch |
//! | 100 | 28 | zero |
//! | 128 | 32 | BLAKE3 of bytes 0 to 127 |

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use afterimage_blockdev::{BatchId, Epoch, HistoryId, Lsn, MachineId, Timestamp};
use afterimage_cache::bytes::{array, get_u16, get_u32, get_u64, put};

use crate::error::AgentError;

const COPY: usize = 4096;
const MAGIC: &[u8; 8] = b"AICOUNT\0";
const VERSION: u16 = 1;
const HASH_AT: usize = 128;
/// No agent ever saves so often; below it there is room to count on.
const GENERATION_MAX: u64 = 1 << 62;

/// The counters.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Counters {
    /// The machine.
    pub machine: MachineId,
    /// The history.
    pub history: HistoryId,
    /// Epoch of the newest run.
    pub epoch: Epoch,
    /// No LSN from here on was given out.
    pub reserved: Lsn,
    /// Highest LSN acknowledged.
    pub acknowledged: Lsn,
    /// Latest time of a record.
    pub last_time: Timestamp,
    /// Appliance time less own wall time, in ns.
    pub wall_offset_ns: i64,
    /// Highest batch.
    pub batch: BatchId,
}

impl Counters {
    /// Of a history that nobody has written yet.
    #[must_use]
    pub fn new(machine: MachineId, history: HistoryId) -> Self {
        Self {
            machine,
            history,
            epoch: Epoch(0),
            reserved: Lsn(1),
            acknowledged: Lsn::ZERO,
            last_time: Timestamp(0),
            wall_offset_ns: 0,
            batch: BatchId(0),
        }
    }

    fn encode(&self, generation: u64) -> [u8; COPY] {
        let mut bytes = [0; COPY];
        put(&mut bytes, 0, MAGIC);
        put(&mut bytes, 8, &VERSION.to_le_bytes());
        put(&mut bytes, 16, &generation.to_le_bytes());
        put(&mut bytes, 24, &self.machine.0);
        put(&mut bytes, 40, &self.history.0);
        put(&mut bytes, 56, &self.epoch.0.to_le_bytes());
        put(&mut bytes, 64, &self.reserved.0.to_le_bytes());
        put(&mut bytes, 72, &self.acknowledged.0.to_le_bytes());
        put(&mut bytes, 80, &self.last_time.0.to_le_bytes());
        put(&mut bytes, 88, &self.wall_offset_ns.to_le_bytes());
        put(&mut bytes, 96, &self.batch.0.to_le_bytes());
        let hash = *blake3::hash(&bytes[..HASH_AT]).as_bytes();
        put(&mut bytes, HASH_AT, &hash);
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<(u64, Self)> {
        let is_whole = bytes.get(..8)? == MAGIC
            && get_u16(bytes, 8)? == VERSION
            && blake3::hash(bytes.get(..HASH_AT)?).as_bytes()[..]
                == *bytes.get(HASH_AT..HASH_AT + 32)?;
        if !is_whole {
            return None;
        }
        let counters = Self {
            machine: MachineId(array(bytes, 24)?),
            history: HistoryId(array(bytes, 40)?),
            epoch: Epoch(get_u64(bytes, 56)?),
            reserved: Lsn(get_u64(bytes, 64)?),
            acknowledged: Lsn(get_u64(bytes, 72)?),
            last_time: Timestamp(get_u64(bytes, 80)?),
            wall_offset_ns: i64::from_le_bytes(array(bytes, 88)?),
            batch: BatchId(get_u32(bytes, 96)?),
        };
        let generation = get_u64(bytes, 16).filter(|generation| *generation < GENERATION_MAX)?;
        Some((generation, counters))
    }
}

/// The file of the counters.
#[derive(Debug)]
pub struct CounterFile {
    path: PathBuf,
    file: File,
    generation: u64,
    is_b: bool,
}

impl CounterFile {
    /// Opens the file, or makes it with `fresh`.
    ///
    /// # Errors
    /// `Damaged` when neither copy is whole: to begin anew could give LSNs out twice.
    pub fn open(path: &Path, fresh: Counters) -> Result<(Self, Counters), AgentError> {
        let failed = |operation| AgentError::file(operation, path);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)
            .map_err(failed("open"))?;
        let length = file.metadata().map_err(failed("read"))?.len();
        let mut this = Self {
            path: path.to_owned(),
            file,
            generation: 0,
            is_b: true,
        };
        let mut best: Option<(u64, bool, Counters)> = None;
        let mut is_empty = true;
        for is_b in [false, true] {
            let at = Self::place(is_b);
            if length < at + COPY as u64 {
                continue;
            }
            let mut bytes = vec![0; COPY];
            this.file
                .read_exact_at(&mut bytes, at)
                .map_err(failed("read"))?;
            is_empty &= bytes.iter().all(|byte| *byte == 0);
            if let Some((generation, counters)) = Counters::decode(&bytes)
                && best.is_none_or(|(best, ..)| generation > best)
            {
                best = Some((generation, is_b, counters));
            }
        }
        match best {
            Some((generation, is_b, counters)) => {
                let is_ours = counters.machine == fresh.machine;
                if !is_ours {
                    let what = "it belongs to another machine".to_owned();
                    return Err(AgentError::Damaged {
                        path: path.to_owned(),
                        what,
                    });
                }
                (this.generation, this.is_b) = (generation, is_b);
                Ok((this, counters))
            }
            None if is_empty => {
                this.save(&fresh)?;
                this.save(&fresh)?;
                this.file.sync_all().map_err(failed("write"))?;
                if let Some(directory) = path.parent() {
                    let sync = || File::open(directory)?.sync_all();
                    sync().map_err(failed("write"))?;
                }
                Ok((this, fresh))
            }
            None => {
                let what = "neither of its two copies is whole".to_owned();
                Err(AgentError::Damaged {
                    path: path.to_owned(),
                    what,
                })
            }
        }
    }

    fn place(is_b: bool) -> u64 {
        if is_b { COPY as u64 } else { 0 }
    }

    /// Writes the counters over the older copy.
    ///
    /// # Errors
    /// When they cannot be written; the newer copy still counts.
    ///
    /// # Durability
    /// Durable when this returns.
    pub fn save(&mut self, counters: &Counters) -> Result<(), AgentError> {
        let failed = AgentError::file("write", &self.path);
        let bytes = counters.encode(self.generation + 1);
        let place = Self::place(!self.is_b);
        let write = || {
            self.file.write_all_at(&bytes, place)?;
            self.file.sync_data()
        };
        write().map_err(failed)?;
        self.generation += 1;
        self.is_b = !self.is_b;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fresh() -> Counters {
        Counters::new(MachineId([1; 16]), HistoryId([2; 16]))
    }

    #[test]
    fn the_newer_whole_copy_counts() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("counters");
        let (mut file, counters) = CounterFile::open(&path, fresh()).unwrap();
        let one = Counters {
            reserved: Lsn(100),
            epoch: Epoch(1),
            ..counters
        };
        let two = Counters {
            reserved: Lsn(200),
            wall_offset_ns: -5,
            ..one
        };
        file.save(&one).unwrap();
        file.save(&two).unwrap();
        assert_eq!(CounterFile::open(&path, fresh()).unwrap().1, two);
        // A torn write of the newer copy leaves the older one.
        let place = CounterFile::place(file.is_b);
        file.file.write_all_at(&[0xff; 64], place + 64).unwrap();
        assert_eq!(CounterFile::open(&path, fresh()).unwrap().1, one);
        file.file
            .write_all_at(&[0xff; 64], 4096 - place + 64)
            .unwrap();
        assert!(matches!(
            CounterFile::open(&path, fresh()),
            Err(AgentError::Damaged { .. })
        ));
    }

    /// A forged generation with no room to count on ended the agent at its next save.
    #[test]
    fn a_generation_that_nobody_reaches_is_damage() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("counters");
        let (file, _) = CounterFile::open(&path, fresh()).unwrap();
        for place in [0, COPY as u64] {
            let bytes = fresh().encode(u64::MAX);
            file.file.write_all_at(&bytes, place).unwrap();
        }
        assert!(matches!(
            CounterFile::open(&path, fresh()),
            Err(AgentError::Damaged { .. })
        ));
    }
}

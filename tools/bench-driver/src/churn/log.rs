//! The log of a churn: 16 bytes for each block written, time and block, little-endian.

use std::fs::{File, OpenOptions};
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::Path;

use crate::error::BenchError;

const RECORD_BYTES: usize = 16;

/// One block was written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Record {
    pub(super) time_ns: u64,
    pub(super) block: u64,
}

/// A log that grows.
pub(super) struct Log {
    file: BufWriter<File>,
    last_ns: u64,
}

impl Log {
    /// Opens or makes a log; says how many records it has.
    pub(super) fn append(path: &Path) -> Result<(Self, u64), BenchError> {
        let before = if path.exists() {
            read(path, usize::MAX)?
        } else {
            Vec::new()
        };
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .open(path)
            .map_err(BenchError::io(format!("open {}", path.display())))?;
        let last_ns = before.last().map_or(0, |record| record.time_ns);
        let log = Self {
            file: BufWriter::new(file),
            last_ns,
        };
        Ok((log, u64::try_from(before.len()).unwrap_or(u64::MAX)))
    }

    /// Time of the last record; 0 when there is none.
    pub(super) fn last_time(&self) -> u64 {
        self.last_ns
    }

    pub(super) fn push(&mut self, record: Record) -> Result<(), BenchError> {
        self.last_ns = record.time_ns;
        let mut bytes = [0; RECORD_BYTES];
        let (time, block) = bytes.split_at_mut(RECORD_BYTES / 2);
        time.copy_from_slice(&record.time_ns.to_le_bytes());
        block.copy_from_slice(&record.block.to_le_bytes());
        self.file
            .write_all(&bytes)
            .map_err(BenchError::io("write the log of the churn"))
    }

    pub(super) fn flush(&mut self) -> Result<(), BenchError> {
        self.file
            .flush()
            .map_err(BenchError::io("write the log of the churn"))
    }
}

/// The first records of a log.
pub(super) fn read(path: &Path, at_most: usize) -> Result<Vec<Record>, BenchError> {
    let at = || BenchError::io(format!("read {}", path.display()));
    let mut file = BufReader::new(File::open(path).map_err(at())?);
    let mut records = Vec::new();
    let mut word = [0; RECORD_BYTES / 2];
    while records.len() < at_most {
        match file.read_exact(&mut word) {
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => break,
            result => result.map_err(at())?,
        }
        let time_ns = u64::from_le_bytes(word);
        file.read_exact(&mut word).map_err(at())?;
        let block = u64::from_le_bytes(word);
        records.push(Record { time_ns, block });
    }
    Ok(records)
}

//! Every timer and limit of the agent, with the values that it has when nothing is said.

use std::path::{Path, PathBuf};
use std::time::Duration;

use afterimage_export::IoUring;
use serde::{Deserialize, Serialize};

use crate::error::AgentError;

/// The whole configuration.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Where things are.
    pub paths: Paths,
    /// The devices in front of the sources.
    pub tap: TapConfig,
    /// The activity log.
    pub activity: ActivityConfig,
    /// From records to frames.
    pub pipeline: PipelineConfig,
    /// The spool.
    pub spool: SpoolConfig,
    /// The connection.
    pub link: LinkConfig,
    /// Initial replication and resync.
    pub replicate: ReplicateConfig,
    /// The agent's own counters.
    pub state: StateConfig,
}

/// Where things are.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Paths {
    /// Directory of the stable links to the devices.
    pub link_dir: PathBuf,
}

/// The devices in front of the sources.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TapConfig {
    /// Threads that read requests.
    pub fuse_threads: usize,
    /// Requests in flight in the kernel, over all disks.
    pub fuse_background_max: u16,
    /// Whether requests may come over `io_uring`.
    pub io_uring: IoUring,
    /// Requests given to a source at once.
    pub source_depth: u32,
    /// How long a detach waits for the last user to go.
    pub detach_wait_ms: u64,
    /// How often the sizes of the sources are looked at.
    pub size_check_ms: u64,
}

/// The activity log.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ActivityConfig {
    /// A region is unmarked after so long without a write.
    pub idle_ms: u64,
    /// How often regions are looked at, and the source is flushed when some can be unmarked.
    pub flush_interval_ms: u64,
    /// Marked bytes of one disk above which idle regions are unmarked early.
    pub marked_bytes_max: u64,
}

/// From records to frames.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PipelineConfig {
    /// Bytes of captured writes that wait to be sealed; above it writes wait.
    pub captured_bytes_max: usize,
    /// Bytes of sealed frames in memory; above it frames go to the spool.
    pub sealed_bytes_max: usize,
    /// Threads that seal.
    pub seal_threads: usize,
    /// A frame is closed at about so many bytes.
    pub frame_bytes: usize,
    /// A frame is closed so long after its first record.
    pub frame_gather_us: u64,
    /// Most effort for compression: a zstd level, 1 to 3.
    pub compress_level_max: i32,
}

/// The spool.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SpoolConfig {
    /// Bytes of all files together; 0 means a tenth of the file system.
    pub bytes_max: u64,
    /// Bytes of one file.
    pub file_bytes: u64,
    /// Bytes read ahead of the connection, and bytes on their way to the disk.
    pub read_ahead_bytes: usize,
    /// A spool that writes nothing for so long is given up.
    pub stall_ms: u64,
}

/// The connection.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LinkConfig {
    /// Base of the ladder of waiting times: 1, 2, 4, 8, 10, then 30 times so long.
    pub retry_base_ms: u64,
    /// Share of each wait that is left to chance, in percent.
    pub retry_jitter_percent: u32,
    /// How long connecting may take, handshakes included.
    pub connect_timeout_ms: u64,
    /// The connection is given up after so long without an answer to what was sent.
    pub silence_ms: u64,
    /// How often the state of the source is reported.
    pub report_interval_ms: u64,
}

/// Initial replication and resync.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ReplicateConfig {
    /// Bytes of bulk that are not yet acknowledged.
    pub window_bytes: usize,
    /// Bytes read from the source at once.
    pub chunk_bytes: u64,
    /// Questions that are not yet answered.
    pub questions_max: usize,
    /// Bytes per second read from a source; 0 means as fast as it goes.
    pub rate_bytes_per_s: u64,
}

/// The agent's own counters.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StateConfig {
    /// LSNs that are reserved durably at once.
    pub reserve_lsns: u64,
    /// How often counters are saved.
    pub save_interval_ms: u64,
    /// How long an orderly stop waits for the appliance.
    pub stop_wait_ms: u64,
}

impl Default for Paths {
    fn default() -> Self {
        Self {
            link_dir: PathBuf::from("/run/afterimage/disk"),
        }
    }
}

impl Default for TapConfig {
    fn default() -> Self {
        Self {
            fuse_threads: 2,
            fuse_background_max: 512,
            io_uring: IoUring::Auto,
            source_depth: 256,
            detach_wait_ms: 5_000,
            size_check_ms: 10_000,
        }
    }
}

impl Default for ActivityConfig {
    fn default() -> Self {
        Self {
            idle_ms: 30_000,
            flush_interval_ms: 5_000,
            marked_bytes_max: 16 << 30,
        }
    }
}

impl Default for PipelineConfig {
    fn default() -> Self {
        Self {
            captured_bytes_max: 64 << 20,
            sealed_bytes_max: 64 << 20,
            seal_threads: 2,
            frame_bytes: 1 << 20,
            frame_gather_us: 2_000,
            compress_level_max: 3,
        }
    }
}

impl Default for SpoolConfig {
    fn default() -> Self {
        Self {
            bytes_max: 0,
            file_bytes: 64 << 20,
            read_ahead_bytes: 16 << 20,
            stall_ms: 10_000,
        }
    }
}

impl Default for LinkConfig {
    fn default() -> Self {
        Self {
            retry_base_ms: 60_000,
            retry_jitter_percent: 20,
            connect_timeout_ms: 10_000,
            silence_ms: 30_000,
            report_interval_ms: 1_000,
        }
    }
}

impl Default for ReplicateConfig {
    fn default() -> Self {
        Self {
            window_bytes: 16 << 20,
            chunk_bytes: 1 << 20,
            questions_max: 4,
            rate_bytes_per_s: 0,
        }
    }
}

impl Default for StateConfig {
    fn default() -> Self {
        Self {
            reserve_lsns: 1_000_000,
            save_interval_ms: 5_000,
            stop_wait_ms: 10_000,
        }
    }
}

/// A number of milliseconds.
#[must_use]
pub fn ms(count: u64) -> Duration {
    Duration::from_millis(count)
}

impl Config {
    /// Reads a file.
    ///
    /// # Errors
    /// When it cannot be read, names something unknown, or asks for something impossible.
    pub fn load(path: &Path) -> Result<Self, AgentError> {
        let text = std::fs::read_to_string(path).map_err(AgentError::file("read", path))?;
        let wrong = |what: String| AgentError::Config {
            path: path.to_owned(),
            what,
        };
        let config: Self = toml::from_str(&text).map_err(|error| wrong(error.to_string()))?;
        config.check().map_err(|what| wrong(what.to_owned()))?;
        Ok(config)
    }

    /// Writes it as a file.
    ///
    /// # Panics
    /// Never: every value has a TOML form.
    #[must_use]
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("numbers and paths have a TOML form")
    }

    fn check(&self) -> Result<(), &'static str> {
        let at_least = |is_true: bool, what| if is_true { Ok(()) } else { Err(what) };
        at_least(
            self.tap.fuse_threads > 0,
            "tap.fuse_threads must be at least 1",
        )?;
        at_least(
            self.tap.source_depth > 0,
            "tap.source_depth must be at least 1",
        )?;
        at_least(
            self.tap.size_check_ms > 0,
            "tap.size_check_ms must be above 0",
        )?;
        at_least(
            self.activity.flush_interval_ms > 0,
            "activity.flush_interval_ms must be above 0",
        )?;
        at_least(
            self.pipeline.captured_bytes_max >= 8 << 20,
            "pipeline.captured_bytes_max must be at least 8 MiB",
        )?;
        at_least(
            (1..=8 << 20).contains(&self.pipeline.frame_bytes),
            "pipeline.frame_bytes must be from 1 byte to 8 MiB",
        )?;
        at_least(
            (1..=16).contains(&self.pipeline.seal_threads),
            "pipeline.seal_threads must be from 1 to 16",
        )?;
        at_least(
            self.spool.file_bytes >= 32 << 20,
            "spool.file_bytes must be at least 32 MiB, to hold the longest frame",
        )?;
        at_least(
            self.replicate.chunk_bytes.is_multiple_of(16 << 10)
                && (16 << 10..=4 << 20).contains(&self.replicate.chunk_bytes),
            "replicate.chunk_bytes must be a multiple of 16 KiB, up to 4 MiB",
        )?;
        at_least(
            self.replicate.questions_max > 0,
            "replicate.questions_max must be above 0",
        )?;
        at_least(
            self.link.report_interval_ms > 0,
            "link.report_interval_ms must be above 0",
        )?;
        at_least(
            self.state.reserve_lsns >= 1_000,
            "state.reserve_lsns must be at least 1000",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_legal_and_survive_their_text() {
        let config = Config::default();
        assert_eq!(config.check(), Ok(()));
        assert_eq!(toml::from_str::<Config>(&config.to_toml()).unwrap(), config);
        assert!(toml::from_str::<Config>("[link]\nretry_base = 1\n").is_err());
    }
}

//! The configuration file: every timer and limit of the daemon, all with defaults.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use afterimage_blockdev::Backend;
use afterimage_export::IoUring;
use afterimage_protocol::MESSAGE_BYTES_MAX;
use serde::{Deserialize, Serialize};

use crate::args::Args;
use crate::engine::EngineSettings;
use crate::scrub::ScrubSettings;

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// The file is not TOML, or holds an unknown or ill-typed setting.
    #[error("configuration {} is wrong: {source}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// What is wrong and where.
        source: Box<toml::de::Error>,
    },
    /// A value is outside its range.
    #[error("setting {name} is {value}; it must be {rule}")]
    Range {
        /// The setting.
        name: &'static str,
        /// Its value.
        value: String,
        /// What it must be.
        rule: &'static str,
    },
}

/// All settings. Durations and sizes say their unit at the end of their name.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Address of the data service.
    pub data_listen: SocketAddr,
    /// Address of the control service.
    pub control_listen: SocketAddr,
    /// Local socket; `<data-dir>/control.sock` when not set.
    pub socket: Option<PathBuf>,
    /// Directory of mounts; `<data-dir>/mounts` when not set.
    pub mount_root: Option<PathBuf>,
    /// DNS names and IP addresses of this appliance, for its certificate.
    pub names: Vec<String>,
    /// Certificates and tokens.
    pub certificates: Certificates,
    /// What is kept, and where its limits are.
    pub store: Store,
    /// The data service.
    pub ingest: Ingest,
    /// The control service and the local socket.
    pub control: Control,
    /// Mounts and the tree of files.
    pub mounts: Mounts,
    /// Disks over the network block device protocol.
    pub nbd: Nbd,
}

/// Certificates and tokens.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Certificates {
    /// Lifetime of an agent's certificate.
    pub agent_ttl_s: u64,
    /// Lifetime of an admin's certificate.
    pub admin_ttl_s: u64,
    /// Lifetime of the appliance's own certificate; it is renewed at two thirds of it.
    pub server_ttl_s: u64,
    /// Longest lifetime that a token may be given.
    pub token_ttl_max_s: u64,
}

/// What is kept, and where its limits are.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Store {
    /// Bytes that the store may use; the whole file system when not set.
    pub budget_bytes: Option<u64>,
    /// Part of the budget that ingest never uses.
    pub reserve_percent: u8,
    /// Length of a segment of the log.
    pub segment_bytes: u64,
    /// Map entries in memory at which they are written to a run.
    pub run_flush_entries: usize,
    /// Distance of crash marks.
    pub crash_mark_interval_ms: u64,
    /// Time between two collections of what nobody needs.
    pub collect_interval_ms: u64,
    /// Time from the end of one check of the whole store to the begin of the next; 0: only when
    /// asked for.
    pub scrub_interval_ms: u64,
    /// How much of the medium that check takes.
    pub scrub_bytes_per_second: u64,
    /// Bytes of the log beyond which its oldest segments are moved to the seed store, also within
    /// the journal window; only the window counts when not set.
    pub cache_bytes: Option<u64>,
    /// Shortest journal window that a lack of room leaves.
    pub window_min_ms: u64,
    /// How often points are thinned and journal windows move.
    pub retention_interval_ms: u64,
    /// How long after the last record an idle commit follows.
    pub idle_commit_ms: u64,
    /// Wait before a full medium is tried again.
    pub retry_ms: u64,
    /// `auto`, `io-uring` or `threads`.
    pub backend: BackendChoice,
}

/// How files are read and written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BackendChoice {
    /// `io-uring` where the machine allows it.
    Auto,
    /// Only `io_uring`.
    IoUring,
    /// A few threads.
    Threads,
}

impl From<BackendChoice> for Backend {
    fn from(choice: BackendChoice) -> Self {
        match choice {
            BackendChoice::Auto => Self::Auto,
            BackendChoice::IoUring => Self::IoUring,
            BackendChoice::Threads => Self::Threads,
        }
    }
}

/// The data service.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Ingest {
    /// Bytes of frames that a stream may have on their way, at most.
    pub credit_bytes: u64,
    /// Bytes of messages of all connections that may be in memory; shared out as credit.
    pub memory_bytes: u64,
    /// Most connections.
    pub connections_max: usize,
    /// Most streams of a connection.
    pub streams_max: usize,
    /// Most disks of a stream.
    pub disks_max: usize,
    /// Time for the TLS handshake.
    pub handshake_timeout_ms: u64,
    /// Time for the rest of a message once it has begun, in both directions.
    pub message_timeout_ms: u64,
    /// Time without any message after which a connection is dropped.
    pub idle_timeout_ms: u64,
}

/// The control service and the local socket.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Control {
    /// Most connections, for each of the two.
    pub connections_max: usize,
    /// Time for the TLS handshake, and for the head of a request.
    pub handshake_timeout_ms: u64,
    /// Longest body of a request.
    pub body_bytes_max: usize,
    /// Events that are kept.
    pub events_max: u64,
    /// Age of the newest state above which a machine is not green.
    pub rpo_warning_ms: u64,
    /// The appliance is not green when history must be thinned within so long.
    pub space_warning_s: u64,
}

/// Mounts and the tree of files.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Mounts {
    /// Most mounts.
    pub mounts_max: usize,
    /// Requests that the kernel keeps in flight, over all mounts.
    pub max_background: u16,
    /// Threads that read requests of the kernel.
    pub event_threads: usize,
    /// Whether requests of the kernel may come over `io_uring`.
    pub io_uring: IoUring,
    /// How long an unmount waits for users of the mount.
    pub busy_wait_ms: u64,
}

/// Disks over the network block device protocol.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Nbd {
    /// Serves the Unix socket, for root of this machine.
    pub is_local: bool,
    /// Unix socket; `<data-dir>/nbd.sock` when not set.
    pub socket: Option<PathBuf>,
    /// Address of the TCP port, with TLS and for admins only; none when not set.
    pub listen: Option<SocketAddr>,
    /// Threads that serve all sessions.
    pub threads: usize,
    /// Most connections, for port and socket each.
    pub connections_max: usize,
    /// Bytes of requests and replies that a connection may have in memory.
    pub in_flight_bytes: u64,
    /// Requests that a connection may have in flight.
    pub in_flight_requests: usize,
    /// Time for the handshake, TLS included.
    pub handshake_timeout_ms: u64,
    /// Time for the rest of a request once it has begun.
    pub message_timeout_ms: u64,
    /// Newest points of a machine that a list of exports or of contexts names.
    pub points_listed_max: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            data_listen: SocketAddr::from((Ipv4Addr::UNSPECIFIED, 9443)),
            control_listen: SocketAddr::from((Ipv4Addr::UNSPECIFIED, 8443)),
            socket: None,
            mount_root: None,
            names: Vec::new(),
            certificates: Certificates::default(),
            store: Store::default(),
            ingest: Ingest::default(),
            control: Control::default(),
            mounts: Mounts::default(),
            nbd: Nbd::default(),
        }
    }
}

const DAY_S: u64 = 86_400;

impl Default for Certificates {
    fn default() -> Self {
        Self {
            agent_ttl_s: 30 * DAY_S,
            admin_ttl_s: 365 * DAY_S,
            server_ttl_s: 365 * DAY_S,
            token_ttl_max_s: 7 * DAY_S,
        }
    }
}

impl Default for Store {
    fn default() -> Self {
        Self {
            budget_bytes: None,
            reserve_percent: 5,
            segment_bytes: 64 << 20,
            run_flush_entries: 1 << 20,
            crash_mark_interval_ms: 300_000,
            collect_interval_ms: 600_000,
            window_min_ms: 60_000,
            scrub_interval_ms: 7 * DAY_S * 1000,
            scrub_bytes_per_second: 32 << 20,
            cache_bytes: None,
            retention_interval_ms: 60_000,
            idle_commit_ms: 100,
            retry_ms: 1000,
            backend: BackendChoice::Auto,
        }
    }
}

impl Default for Ingest {
    fn default() -> Self {
        Self {
            credit_bytes: 32 << 20,
            memory_bytes: 128 << 20,
            connections_max: 1024,
            streams_max: 256,
            disks_max: 256,
            handshake_timeout_ms: 10_000,
            message_timeout_ms: 30_000,
            idle_timeout_ms: 30_000,
        }
    }
}

impl Default for Control {
    fn default() -> Self {
        Self {
            connections_max: 256,
            handshake_timeout_ms: 10_000,
            body_bytes_max: 64 << 10,
            events_max: 100_000,
            rpo_warning_ms: 60_000,
            space_warning_s: 7 * DAY_S,
        }
    }
}

impl Default for Mounts {
    fn default() -> Self {
        Self {
            mounts_max: 64,
            max_background: 512,
            event_threads: 2,
            io_uring: IoUring::Auto,
            busy_wait_ms: 5_000,
        }
    }
}

impl Default for Nbd {
    fn default() -> Self {
        Self {
            is_local: true,
            socket: None,
            listen: None,
            threads: 2,
            connections_max: 64,
            in_flight_bytes: 32 << 20,
            in_flight_requests: 256,
            handshake_timeout_ms: 10_000,
            message_timeout_ms: 30_000,
            points_listed_max: 1000,
        }
    }
}

impl Control {
    /// How long before history must be thinned that is said.
    #[must_use]
    pub fn space_warning(&self) -> Duration {
        Duration::from_secs(self.space_warning_s)
    }
}

impl Config {
    /// Reads the file that the command line names, and lets the command line win over it.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn load(args: &Args) -> Result<Self, ConfigError> {
        let mut config = match &args.config {
            None => Self::default(),
            Some(path) => Self::read(path)?,
        };
        if let Some(address) = args.data_listen {
            config.data_listen = address;
        }
        if let Some(address) = args.control_listen {
            config.control_listen = address;
        }
        if let Some(path) = &args.socket {
            config.socket = Some(path.clone());
        }
        config.check()?;
        Ok(config)
    }

    fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        toml::from_str(&text).map_err(|source| ConfigError::Parse {
            path: path.to_owned(),
            source: Box::new(source),
        })
    }

    /// Checks all ranges.
    ///
    /// # Errors
    /// [`ConfigError::Range`], for the first setting that is outside.
    pub fn check(&self) -> Result<(), ConfigError> {
        let (ingest, store, certificates) = (&self.ingest, &self.store, &self.certificates);
        let message_bytes = u64::try_from(MESSAGE_BYTES_MAX).unwrap_or(u64::MAX);
        let memory_bytes_max = 1 << 40;
        let rules = [
            (
                "ingest.memory_bytes",
                ingest.memory_bytes.to_string(),
                (message_bytes..=memory_bytes_max).contains(&ingest.memory_bytes),
                "from 17 MiB to 1 TiB",
            ),
            (
                "ingest.credit_bytes",
                ingest.credit_bytes.to_string(),
                ingest.credit_bytes >= 1 << 20,
                "at least 1 MiB",
            ),
            (
                "store.reserve_percent",
                store.reserve_percent.to_string(),
                store.reserve_percent <= 50,
                "at most 50",
            ),
            (
                "store.segment_bytes",
                store.segment_bytes.to_string(),
                store.segment_bytes >= message_bytes
                    && store.segment_bytes <= 4 << 30
                    && store.segment_bytes.is_multiple_of(4096),
                "a multiple of 4096 from 17 MiB to 4 GiB",
            ),
            (
                "store.crash_mark_interval_ms",
                store.crash_mark_interval_ms.to_string(),
                store.crash_mark_interval_ms >= 1000,
                "at least 1000",
            ),
            (
                "store.retention_interval_ms",
                store.retention_interval_ms.to_string(),
                (1000..=DAY_S * 1000).contains(&store.retention_interval_ms),
                "from 1000 to a day",
            ),
            (
                "store.scrub_bytes_per_second",
                store.scrub_bytes_per_second.to_string(),
                store.scrub_bytes_per_second >= 1 << 20,
                "at least 1 MiB",
            ),
            (
                "certificates.agent_ttl_s",
                certificates.agent_ttl_s.to_string(),
                (60..=3650 * DAY_S).contains(&certificates.agent_ttl_s),
                "from 60 to 3650 days",
            ),
            (
                "certificates.admin_ttl_s",
                certificates.admin_ttl_s.to_string(),
                (60..=3650 * DAY_S).contains(&certificates.admin_ttl_s),
                "from 60 to 3650 days",
            ),
            (
                "certificates.server_ttl_s",
                certificates.server_ttl_s.to_string(),
                (3600..=3650 * DAY_S).contains(&certificates.server_ttl_s),
                "from 3600 to 3650 days",
            ),
        ];
        for (name, value, is_legal, rule) in rules {
            if !is_legal {
                return Err(ConfigError::Range { name, value, rule });
            }
        }
        self.check_not_zero()
    }

    fn check_not_zero(&self) -> Result<(), ConfigError> {
        let (ingest, control) = (&self.ingest, &self.control);
        let settings = [
            ("ingest.connections_max", ingest.connections_max == 0),
            ("ingest.streams_max", ingest.streams_max == 0),
            ("ingest.disks_max", ingest.disks_max == 0),
            (
                "ingest.handshake_timeout_ms",
                ingest.handshake_timeout_ms == 0,
            ),
            ("ingest.message_timeout_ms", ingest.message_timeout_ms == 0),
            ("ingest.idle_timeout_ms", ingest.idle_timeout_ms == 0),
            ("control.connections_max", control.connections_max == 0),
            (
                "control.handshake_timeout_ms",
                control.handshake_timeout_ms == 0,
            ),
            ("control.body_bytes_max", control.body_bytes_max == 0),
            ("control.events_max", control.events_max == 0),
            ("store.run_flush_entries", self.store.run_flush_entries == 0),
            (
                "store.collect_interval_ms",
                self.store.collect_interval_ms == 0,
            ),
            ("store.retry_ms", self.store.retry_ms == 0),
            ("store.idle_commit_ms", self.store.idle_commit_ms == 0),
            ("nbd.threads", self.nbd.threads == 0),
            ("nbd.connections_max", self.nbd.connections_max == 0),
            ("nbd.in_flight_bytes", self.nbd.in_flight_bytes == 0),
            ("nbd.in_flight_requests", self.nbd.in_flight_requests == 0),
            (
                "nbd.handshake_timeout_ms",
                self.nbd.handshake_timeout_ms == 0,
            ),
            ("nbd.message_timeout_ms", self.nbd.message_timeout_ms == 0),
            ("nbd.points_listed_max", self.nbd.points_listed_max == 0),
            ("mounts.mounts_max", self.mounts.mounts_max == 0),
            ("mounts.max_background", self.mounts.max_background == 0),
            ("mounts.event_threads", self.mounts.event_threads == 0),
        ];
        match settings.into_iter().find(|(_, is_zero)| *is_zero) {
            None => Ok(()),
            Some((name, _)) => Err(ConfigError::Range {
                name,
                value: "0".to_owned(),
                rule: "at least 1",
            }),
        }
    }

    /// All settings as a configuration file.
    #[must_use]
    pub fn to_toml(&self) -> String {
        // Plain numbers, texts and tables: there is nothing that TOML could not say.
        toml::to_string(self).unwrap_or_default()
    }

    /// What the engine is started with.
    #[must_use]
    pub fn engine_settings(&self, data_dir: &Path) -> EngineSettings {
        let store = &self.store;
        EngineSettings {
            data_dir: data_dir.to_owned(),
            budget_bytes: store.budget_bytes,
            reserve_percent: store.reserve_percent,
            segment_bytes: store.segment_bytes,
            flush_entries: store.run_flush_entries,
            crash_mark_interval: ms(store.crash_mark_interval_ms),
            collect_interval: ms(store.collect_interval_ms),
            cache_bytes: store.cache_bytes,
            window_min: ms(store.window_min_ms),
            retention_interval: ms(store.retention_interval_ms),
            idle_commit: ms(store.idle_commit_ms),
            retry: ms(store.retry_ms),
            backend: store.backend.into(),
        }
    }

    /// When and how fast the whole store is checked.
    #[must_use]
    pub fn scrub_settings(&self) -> ScrubSettings {
        ScrubSettings {
            interval_ms: self.store.scrub_interval_ms,
            bytes_per_second: self.store.scrub_bytes_per_second,
        }
    }

    /// The local socket.
    #[must_use]
    pub fn socket_path(&self, data_dir: &Path) -> PathBuf {
        self.socket
            .clone()
            .unwrap_or_else(|| data_dir.join("control.sock"))
    }

    /// The Unix socket of disks.
    #[must_use]
    pub fn nbd_socket_path(&self, data_dir: &Path) -> PathBuf {
        let chosen = self.nbd.socket.clone();
        chosen.unwrap_or_else(|| data_dir.join("nbd.sock"))
    }

    /// The directory of mounts.
    #[must_use]
    pub fn mount_root(&self, data_dir: &Path) -> PathBuf {
        self.mount_root
            .clone()
            .unwrap_or_else(|| data_dir.join("mounts"))
    }
}

/// A setting in milliseconds as a duration.
#[must_use]
pub fn ms(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_legal_and_survive_the_file() {
        let config = Config::default();
        config.check().unwrap();
        let text = toml::to_string(&config).unwrap();
        assert_eq!(toml::from_str::<Config>(&text).unwrap(), config);
        assert_eq!(toml::from_str::<Config>("").unwrap(), config);
    }

    #[test]
    fn an_unknown_setting_is_named() {
        let error = toml::from_str::<Config>("[store]\ncrash_mark_interval = 5\n").unwrap_err();
        assert!(error.to_string().contains("crash_mark_interval"), "{error}");
    }

    #[test]
    fn a_value_outside_its_range_is_named() {
        let mut config = Config::default();
        config.store.crash_mark_interval_ms = 999;
        let error = config.check().unwrap_err().to_string();
        assert!(
            error.contains("store.crash_mark_interval_ms is 999"),
            "{error}"
        );
        let mut config = Config::default();
        config.ingest.streams_max = 0;
        assert!(
            config
                .check()
                .unwrap_err()
                .to_string()
                .contains("ingest.streams_max")
        );
    }
}

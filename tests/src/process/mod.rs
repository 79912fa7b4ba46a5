//! The process ring: the real daemons, kernel devices and file systems, driven from outside.
//! Needs root, FUSE, loop devices and the tools that [`require`] names.

pub mod api;
pub mod compare;
pub mod daemon;
pub mod damage;
pub mod guards;
pub mod programs;
pub mod proxy;
pub mod scene;
pub mod view;
pub mod writer;

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

pub use api::Api;
pub use compare::{assert_equal_devices, first_difference};
pub use guards::{FsMount, LoopFile};
pub use programs::{Outcome, require, run, run_in};
pub use proxy::Proxy;
pub use scene::{Scene, Setup};
pub use view::View;
pub use writer::{Journal, Writers};

/// One MiB.
pub const MIB: u64 = 1 << 20;

/// How long the ring waits for something that is to come by itself.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Waits for an event that is looked for every few milliseconds.
///
/// # Panics
/// When it has not come within `deadline`.
pub fn until_within(deadline: Duration, what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + deadline;
    while !is_so() {
        assert!(
            Instant::now() < end,
            "{what} does not come within {deadline:?}"
        );
        pause();
    }
}

/// [`until_within`] the ring's [`PATIENCE`].
///
/// # Panics
/// As there.
pub fn until(what: &str, is_so: impl FnMut() -> bool) {
    until_within(PATIENCE, what, is_so);
}

/// The distance of two looks. Nobody sends on the channel.
fn pause() {
    let (_sender, receiver) = channel::<()>();
    let ended = receiver.recv_timeout(Duration::from_millis(10));
    assert_eq!(ended, Err(RecvTimeoutError::Timeout));
}

/// Rounds of each kind of death: `AFTERIMAGE_ROUNDS`, or 10.
///
/// # Panics
/// When the variable is no number.
#[must_use]
pub fn rounds() -> u64 {
    std::env::var("AFTERIMAGE_ROUNDS").map_or(10, |text| {
        text.parse().expect("AFTERIMAGE_ROUNDS is a number")
    })
}

/// A source of instants and contents. Its seed is printed; `AFTERIMAGE_SEED` sets it.
#[derive(Clone, Debug)]
pub struct Chance(u64);

impl Chance {
    /// Starts from `AFTERIMAGE_SEED`, or from the time.
    ///
    /// # Panics
    /// When the variable is no number.
    #[must_use]
    pub fn new(test: &str) -> Self {
        let seed = std::env::var("AFTERIMAGE_SEED").map_or_else(
            |_| {
                let since = SystemTime::now().duration_since(UNIX_EPOCH);
                u64::from(since.expect("a clock after 1970").subsec_nanos()) + 1
            },
            |text| text.parse().expect("AFTERIMAGE_SEED is a number"),
        );
        println!("{test}: AFTERIMAGE_SEED={seed}");
        Self(seed | 1)
    }

    /// A number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

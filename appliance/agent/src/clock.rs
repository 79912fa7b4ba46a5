//! Appliance time as the agent knows it: its own clock that never steps, and an offset that it
//! learns from the appliance.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use afterimage_blockdev::{Clock, Timestamp};

/// The appliance's clock, seen from here.
pub struct ApplianceClock {
    clock: Arc<dyn Clock>,
    /// Appliance time less own monotonic time, in ns.
    offset: AtomicI64,
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

impl ApplianceClock {
    /// Starts from the own wall clock and what it was off by at last knowledge.
    #[must_use]
    pub fn new(clock: Arc<dyn Clock>, wall_offset_ns: i64) -> Self {
        let wall = signed(clock.wall().0).saturating_add(wall_offset_ns);
        let offset = AtomicI64::new(wall.saturating_sub(signed(clock.monotonic().0)));
        Self { clock, offset }
    }

    /// Appliance time now. May step when the appliance is heard; whoever needs times that never
    /// fall keeps the highest.
    #[must_use]
    pub fn now(&self) -> Timestamp {
        let offset = self.offset.load(Ordering::Relaxed);
        let now = signed(self.clock.monotonic().0).saturating_add(offset);
        Timestamp(u64::try_from(now).unwrap_or(0))
    }

    /// The appliance said that it is `time` now.
    pub fn learn(&self, time: Timestamp) {
        let offset = signed(time.0).saturating_sub(signed(self.clock.monotonic().0));
        self.offset.store(offset, Ordering::Relaxed);
    }

    /// What the own wall clock is off by, in ns, to be remembered.
    #[must_use]
    pub fn wall_offset_ns(&self) -> i64 {
        signed(self.now().0).saturating_sub(signed(self.clock.wall().0))
    }
}

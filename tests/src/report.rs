//! What a campaign of crash images came to.

use std::collections::BTreeMap;
use std::fmt;

/// How many images were checked, and how often each event happened in them.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Crash images that were recovered and compared with the model.
    pub images: u64,
    /// Events by name.
    pub events: BTreeMap<&'static str, u64>,
}

impl Report {
    /// Counts an event.
    pub fn count(&mut self, event: &'static str) {
        self.add(event, 1);
    }

    /// Counts an event several times.
    pub fn add(&mut self, event: &'static str, times: u64) {
        *self.events.entry(event).or_default() += times;
    }

    /// Adds another report.
    pub fn merge(&mut self, other: &Self) {
        self.images += other.images;
        for (event, times) in &other.events {
            self.add(event, *times);
        }
    }

    /// Those of `wanted` that never happened: a campaign without them proves less than it says.
    #[must_use]
    pub fn missing(&self, wanted: &[&'static str]) -> Vec<&'static str> {
        let is_missing = |event: &&&'static str| self.events.get(**event).is_none_or(|n| *n == 0);
        wanted.iter().filter(is_missing).copied().collect()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (event, times) in &self.events {
            writeln!(f, "{times:>12} {event}")?;
        }
        write!(f, "{} crash images", self.images)
    }
}

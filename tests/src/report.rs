//! What a campaign of crash images came to.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fmt;

thread_local! {
    /// Steps on this thread that no report has taken yet: rigs come and go within a campaign.
    static STEPS: Cell<u64> = const { Cell::new(0) };
    /// Turns, likewise.
    static TURNS: Cell<u64> = const { Cell::new(0) };
}

/// Counts one input given to a state machine under test; for rigs.
pub(crate) fn count_step() {
    STEPS.set(STEPS.get() + 1);
}

/// Counts one operation that the simulated medium performed; for rigs. Gives `has_run` back.
pub(crate) fn count_turn(has_run: bool) -> bool {
    TURNS.set(TURNS.get() + u64::from(has_run));
    has_run
}

/// How many images were checked, and how often each event happened in them.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Crash images that were recovered and compared with the model.
    pub images: u64,
    /// Inputs given to the engine or the log, between which the model was kept in step.
    pub steps: u64,
    /// Operations that the simulated medium performed.
    pub turns: u64,
    /// Events by name.
    pub events: BTreeMap<&'static str, u64>,
}

impl Report {
    /// Runs a campaign on this thread and adds the steps that its rigs counted.
    pub fn of(campaign: impl FnOnce() -> Self) -> Self {
        STEPS.set(0);
        TURNS.set(0);
        let mut report = campaign();
        report.steps += STEPS.replace(0);
        report.turns += TURNS.replace(0);
        report
    }

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
        self.steps += other.steps;
        self.turns += other.turns;
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
        writeln!(f, "{} simulation turns", self.turns)?;
        writeln!(f, "{} model steps", self.steps)?;
        write!(f, "{} crash images", self.images)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_has_the_steps_of_its_own_campaign_only() {
        count_step();
        let campaign = |steps| {
            move || {
                (0..steps).for_each(|_| count_step());
                Report::default()
            }
        };
        let mut report = Report::of(campaign(3));
        assert_eq!(report.steps, 3);
        report.merge(&Report::of(campaign(2)));
        assert_eq!(report.steps, 5);
        assert!(report.to_string().contains("5 model steps"), "{report}");
    }
}

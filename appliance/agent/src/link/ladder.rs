//! The ladder of waiting times between attempts (design decision D20): 1, 2, 4, 8, 10, then 30
//! times a base, with some chance, so that many agents do not come at once.

use std::time::Duration;

use afterimage_blockdev::Entropy;

const STEPS: [u32; 6] = [1, 2, 4, 8, 10, 30];

/// See the module's text.
#[derive(Clone, Debug)]
pub struct Ladder {
    base: Duration,
    jitter_percent: u32,
    step: usize,
}

impl Ladder {
    /// A ladder at its first step.
    #[must_use]
    pub fn new(base: Duration, jitter_percent: u32) -> Self {
        Self {
            base,
            jitter_percent: jitter_percent.min(100),
            step: 0,
        }
    }

    /// Goes back to the first step.
    pub fn reset(&mut self) {
        self.step = 0;
    }

    /// How long to wait now; climbs one step. The wait is up to `jitter_percent` shorter.
    pub fn climb(&mut self, entropy: &dyn Entropy) -> Duration {
        let whole = self.base * STEPS[self.step];
        self.step = (self.step + 1).min(STEPS.len() - 1);
        let mut chance = [0; 1];
        entropy.fill(&mut chance);
        let part = u32::from(chance[0]) * self.jitter_percent / 255;
        whole - whole * part / 100
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fixed(u8);

    impl Entropy for Fixed {
        fn fill(&self, bytes: &mut [u8]) {
            bytes.fill(self.0);
        }
    }

    #[test]
    fn it_climbs_stays_on_top_and_starts_again() {
        let mut ladder = Ladder::new(Duration::from_secs(60), 20);
        let minutes = |ladder: &mut Ladder| ladder.climb(&Fixed(0)).as_secs() / 60;
        let waits: Vec<u64> = (0..8).map(|_| minutes(&mut ladder)).collect();
        assert_eq!(waits, [1, 2, 4, 8, 10, 30, 30, 30]);
        ladder.reset();
        assert_eq!(minutes(&mut ladder), 1);
        assert_eq!(
            ladder.climb(&Fixed(255)),
            Duration::from_secs(96),
            "20 % less than 2 min"
        );
    }
}

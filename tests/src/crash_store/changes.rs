//! What changed between two cuts, as the map tells it, against the bytes of both.

use std::sync::Arc;

use afterimage_blockdev::{BlockDevice, Lsn, Random};
use afterimage_seed::ViewDevice;
use afterimage_seed::changed::{ChangedRange, Changes};
use afterimage_seed::engine::TakenSnapshot;
use parking_lot::Mutex;

use super::Campaign;
use crate::store_rig::StoreRig;

const BLOCK: usize = 4096;

impl Campaign {
    /// Compares two cuts of a disk, of one history or of two.
    pub(super) fn check_changes(&mut self, rig: &mut StoreRig) {
        let histories: Vec<_> = self.known.model.histories.keys().copied().collect();
        if histories.is_empty() {
            return;
        }
        // Numbers of its own: what the campaign does next must not depend on this.
        let mut random = Random::new(self.seed ^ self.report.images << 32);
        let one = histories[random.index(histories.len())];
        let other = histories[random.index(histories.len())];
        let (Some(machine), Some(same)) = (self.machine_of(one), self.machine_of(other)) else {
            return;
        };
        if self.writers[machine].machine != self.writers[same].machine {
            return;
        }
        let disks = &self.writers[machine].disks;
        let disk = disks[random.index(disks.len())].id;
        let name = self.writers[machine].name.clone();
        let mut views = Vec::new();
        for history in [one, other] {
            let durable = self.known.model.histories[&history].durable;
            let lsn = Lsn(random.below(durable.0 + 1));
            let reference = format!("{name}/{disk}@{history}:lsn:{lsn}");
            let Some(Ok(taken)) = rig.snapshot(&reference, true) else {
                return;
            };
            self.hear(rig);
            views.push(view(rig, &taken));
        }
        let (since, until) = (&views[0], &views[1]);
        let length = usize::try_from(until.geometry().size_bytes).expect("a small disk");
        let kept = usize::try_from(since.geometry().size_bytes).expect("a small disk");
        let (Some(Ok(old)), Some(Ok(after))) =
            (rig.read(since, 0, kept), rig.read(until, 0, length))
        else {
            return;
        };
        let mut before = old.to_vec();
        before.resize(length, 0);
        let changes = Changes::between(since, until).expect("one disk");
        let Some(ranges) = ask(rig, &changes, length as u64) else {
            return;
        };
        self.compare(&ranges, &before, &after, kept);
    }

    fn compare(&mut self, ranges: &[ChangedRange], before: &[u8], after: &[u8], kept: usize) {
        let seed = self.seed;
        let mut at = 0;
        for range in ranges {
            assert_eq!(range.offset, at as u64, "seed {seed}: a gap");
            let end = at + usize::try_from(range.length).expect("within the disk");
            let (old, new) = (&before[at..end], &after[at..end]);
            if range.is_changed {
                if old != new {
                    self.report.count("change-told");
                }
            } else {
                assert!(end <= kept, "seed {seed}: {range:?} was not there");
                assert!(old == new, "seed {seed}: a change in {range:?} is not told");
                if new
                    .chunks(BLOCK)
                    .any(|block| block.iter().any(|byte| *byte != 0))
                {
                    self.report.count("unchanged-told");
                }
            }
            at = end;
        }
        assert_eq!(at, after.len(), "seed {seed}: the end is missing");
    }
}

fn view(rig: &StoreRig, taken: &TakenSnapshot) -> ViewDevice {
    let reader = rig.engine.reader().expect("the store is open");
    ViewDevice::new(reader, Arc::clone(&taken.snapshot))
}

/// The ranges; `None` when the medium stops before.
fn ask(rig: &mut StoreRig, changes: &Changes, length: u64) -> Option<Vec<ChangedRange>> {
    let answer = Arc::new(Mutex::new(None));
    let to = Arc::clone(&answer);
    changes.ranges(0, length, Box::new(move |result| *to.lock() = Some(result)));
    rig.run_until(|_| answer.lock().is_some());
    let result = answer.lock().take()?;
    Some(result.expect("the map of a good store is readable"))
}

//! Fails the N-th storage operation of a log, for every N.
//!
//! What must hold, whichever operation fails and however:
//! * nothing panics, and nothing is reported durable that a power cut then takes;
//! * a medium that is full pauses the log, which goes on by itself when there is room;
//! * after a failure the log can be opened again at once, also when the failed sync left data in
//!   memory only, and what it then gives back survives the next power cut.

use std::sync::Arc;

use afterimage_blockdev::StorageErrorKind;
use afterimage_blockdev::simulated::{Fault, FaultEffect, SimulatedOptions, SimulatedStorage};
use afterimage_cache::log::{LogInput, LogOptions, LogOutput};
use afterimage_cache::{CacheError, Frame};

use crate::frames::FrameMaker;
use crate::log_rig::{LogRig, small_options};
use crate::report::Report;

/// Events without which a sweep proves too little.
pub const MUST_OCCUR: &[&str] = &[
    "failed",
    "paused",
    "resumed",
    "finished",
    "failed-in-recovery",
    "reopened",
];

/// Frames of one run.
const FRAMES: u64 = 24;

struct Sweep {
    seed: u64,
    options: LogOptions,
    /// The medium before the run, and what is durable on it.
    medium: Arc<SimulatedStorage>,
    before: Vec<Vec<u8>>,
    report: Report,
}

/// What one run came to.
#[derive(Default)]
struct Run {
    /// In append order.
    appended: Vec<Vec<u8>>,
    durable: usize,
    error: Option<CacheError>,
    is_ready: bool,
}

/// Sweeps an empty log, and one that crashed with segments unsealed.
///
/// # Panics
/// When something that must hold does not; the message names seed, operation and fault.
#[must_use]
pub fn fault_sweep(seed: u64) -> Report {
    let options = small_options(128 << 10, true);
    let medium = SimulatedStorage::new(seed, SimulatedOptions::default());
    let mut sweep = Sweep {
        seed,
        options,
        medium,
        before: Vec::new(),
        report: Report::default(),
    };
    sweep.all();
    // The second medium is what a power cut left of a run on the first.
    let (mut rig, run) = sweep.run(None);
    rig.run();
    rig.storage.power_cut();
    sweep.medium = rig.storage;
    sweep.before = run.appended[..run.durable].to_vec();
    sweep.before = sweep.recover(&sweep.medium.power_cut_image(0), "base");
    sweep.medium = sweep.medium.power_cut_image(0);
    sweep.all();
    sweep.report
}

impl Sweep {
    fn all(&mut self) {
        let operations = self.run(None).0.storage.operations();
        for skip in 0..operations {
            for effect in [FaultEffect::Io, FaultEffect::NoSpace, FaultEffect::Short] {
                for is_permanent in [false, true] {
                    self.one(Fault {
                        operation: None,
                        skip,
                        effect,
                        is_permanent,
                    });
                }
            }
        }
    }

    fn run(&self, fault: Option<Fault>) -> (LogRig, Run) {
        let storage = self.medium.power_cut_image(0);
        if let Some(fault) = fault {
            storage.inject(fault);
        }
        let mut rig = LogRig::new(storage, self.options.clone());
        let mut run = Run {
            appended: self.before.clone(),
            ..Run::default()
        };
        rig.step(LogInput::Start { from_sequence: 0 });
        rig.run();
        run.hear(&mut rig, self.before.len());
        if !run.is_ready {
            return (rig, run);
        }
        let mut maker = FrameMaker::new(self.seed);
        for token in 0..FRAMES {
            let frame: Frame = maker.next_frame(6);
            run.appended.push(frame.bytes.clone());
            rig.append(token, frame);
            if token % 3 == 0 {
                rig.run();
            }
        }
        self.settle(&mut rig, &mut run);
        (rig, run)
    }

    /// Runs until nothing moves any more.
    fn settle(&self, rig: &mut LogRig, run: &mut Run) {
        for _ in 0..12 {
            rig.run();
            run.hear(rig, self.before.len());
            if run.error.is_some() || !rig.wake() {
                break;
            }
        }
    }

    fn one(&mut self, fault: Fault) {
        let says = format!("seed {}: {fault:?}", self.seed);
        let (mut rig, mut run) = self.run(Some(fault));
        let was_paused = rig.log.is_paused();
        rig.storage.clear_faults();
        if run.error.is_none() {
            self.settle(&mut rig, &mut run);
        }
        match &run.error {
            Some(error) => {
                self.report.count("failed");
                if !run.is_ready {
                    self.report.count("failed-in-recovery");
                }
                let is_transient = matches!(fault.effect, FaultEffect::NoSpace);
                assert!(!is_transient || is_final(error), "{says}: {error}");
            }
            None => {
                assert!(run.is_ready, "{says}: recovery stalls");
                assert_eq!(
                    run.durable,
                    run.appended.len(),
                    "{says}: not all is durable"
                );
                self.report.count("finished");
                if was_paused {
                    self.report.count("paused");
                    self.report.count("resumed");
                }
                assert!(!rig.log.is_paused(), "{says}: still paused");
            }
        }
        let promised = &run.appended[..run.durable.max(self.before.len())];
        // A power cut right after it.
        let image = rig.storage.power_cut_image(fault.skip);
        let found = self.recover(&image, &says);
        check(&found, promised, &run.appended, &says);
        // Opened again in the same system, and the power cut only then.
        rig.storage.run_until_idle();
        let found = self.recover(&rig.storage, &says);
        check(&found, promised, &run.appended, &says);
        self.report.count("reopened");
        let image = rig.storage.power_cut_image(fault.skip + 1);
        let again = self.recover(&image, &says);
        assert_eq!(found, again, "{says}: what was given back is gone");
        self.report.images += 2;
    }

    /// What a log gives back.
    fn recover(&self, storage: &Arc<SimulatedStorage>, says: &str) -> Vec<Vec<u8>> {
        let mut rig = LogRig::new(Arc::clone(storage), self.options.clone());
        rig.step(LogInput::Start { from_sequence: 0 });
        rig.run();
        let mut found = Vec::new();
        let mut is_ready = false;
        for output in rig.heard() {
            match output {
                LogOutput::Recovered { frame, .. } => found.push(frame.bytes),
                LogOutput::Ready { .. } => is_ready = true,
                LogOutput::Mended { .. } => {}
                other => panic!("{says}: {other:?}"),
            }
        }
        assert!(is_ready, "{says}: recovery stalls");
        found
    }
}

impl Run {
    fn hear(&mut self, rig: &mut LogRig, before: usize) {
        for output in rig.heard() {
            match output {
                LogOutput::Durable { frame, .. } => {
                    self.durable = self.durable.max(before);
                    assert_eq!(frame.bytes, self.appended[self.durable], "durable in order");
                    self.durable += 1;
                }
                LogOutput::Ready { .. } => self.is_ready = true,
                LogOutput::Failed(error) => self.error = Some(error),
                LogOutput::Lost { .. } => panic!("{output:?}"),
                _ => {}
            }
        }
    }
}

fn check(found: &[Vec<u8>], promised: &[Vec<u8>], appended: &[Vec<u8>], says: &str) {
    assert!(found.len() >= promised.len(), "{says}: a promise is broken");
    assert!(appended.starts_with(found), "{says}: not a prefix");
}

/// A sync that fails for want of room has failed; so have operations that need none. All others
/// are tried again.
fn is_final(error: &CacheError) -> bool {
    let CacheError::Storage(error) = error else {
        return false;
    };
    assert!(matches!(
        error.kind,
        StorageErrorKind::NoSpace | StorageErrorKind::Poisoned
    ));
    !matches!(error.operation, "write" | "create" | "capacity")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_failing_operation_breaks_a_promise() {
        let mut report = Report::default();
        for seed in 1..=2 {
            report.merge(&fault_sweep(seed));
        }
        let missing = report.missing(MUST_OCCUR);
        assert!(missing.is_empty(), "never happened: {missing:?}\n{report}");
    }
}

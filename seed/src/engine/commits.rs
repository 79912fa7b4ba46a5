//! Commits of the manifest: what is asked of it, and what it wants.
//!
//! An idle commit follows the last real one: with it behind them, two bad copies of a commit are
//! damage, and not the torn end of what was never acknowledged.

use std::time::Duration;

use super::{AfterCommit, Engine, Output, Owner};
use crate::manifest::{Edit, ManifestOutput};

/// How long after the last real commit the idle one follows.
const PROOF_AFTER: Duration = Duration::from_millis(500);

impl Engine {
    /// Commits edits; `after` happens when they are durable.
    pub(super) fn commit(&mut self, edits: Vec<Edit>, after: AfterCommit, out: &mut Vec<Output>) {
        let number = self.next_commit;
        self.next_commit += 1;
        self.after_commit.insert(number, after);
        self.notes.committing(number, &edits);
        let mut wants = Vec::new();
        self.manifest.commit(number, edits, &mut wants);
        self.manifest_outputs(wants, out);
    }

    pub(super) fn manifest_outputs(&mut self, wants: Vec<ManifestOutput>, out: &mut Vec<Output>) {
        for want in wants {
            match want {
                ManifestOutput::Storage(op) => self.submit(Owner::Manifest, op, out),
                ManifestOutput::Recovered(edits) => {
                    if let Err(error) = self.replay(edits) {
                        self.fail(error, out);
                        return;
                    }
                }
                ManifestOutput::Mended { file, offset } => {
                    self.note_damage(format!("{file} at {offset}: one of two copies; mended"));
                }
                ManifestOutput::Ready { is_new } => self.manifest_ready(is_new, out),
                ManifestOutput::Durable(numbers) => {
                    for number in numbers {
                        self.notes.committed(number, self.now);
                        if let Some(after) = self.after_commit.remove(&number) {
                            self.committed(after, out);
                        }
                    }
                }
                ManifestOutput::WantsSnapshot => {
                    let state = self.whole_state();
                    let mut wants = Vec::new();
                    self.manifest.rotate(state, &mut wants);
                    self.manifest_outputs(wants, out);
                }
                ManifestOutput::NoSpace => {
                    let at = self.now.after(self.options.retry);
                    self.manifest_retry_at = Some(at);
                    self.spend_reserve(out);
                    out.push(Output::WakeAt(at));
                }
                ManifestOutput::Failed(error) => {
                    self.fail(error, out);
                    return;
                }
            }
        }
    }

    pub(super) fn retry_manifest(&mut self, out: &mut Vec<Output>) {
        let Some(at) = self.manifest_retry_at else {
            return;
        };
        if at > self.now {
            out.push(Output::WakeAt(at));
        } else {
            self.manifest_retry_at = None;
            let mut wants = Vec::new();
            self.manifest.retry(&mut wants);
            self.manifest_outputs(wants, out);
        }
    }

    /// Proves the last commit once none has followed it for a while.
    pub(super) fn prove_manifest_when_due(&mut self, out: &mut Vec<Output>) {
        if !self.manifest.is_unproven() || self.manifest.is_busy() {
            self.manifest_proof_at = None;
            return;
        }
        let due = self.now.after(PROOF_AFTER);
        let at = *self.manifest_proof_at.get_or_insert(due);
        if at > self.now {
            out.push(Output::WakeAt(at));
        } else {
            self.manifest_proof_at = None;
            self.prove_manifest(out);
        }
    }

    /// Proves the last commit now, unless commits are on their way.
    pub(super) fn prove_manifest(&mut self, out: &mut Vec<Output>) {
        let mut wants = Vec::new();
        self.manifest.prove(&mut wants);
        self.manifest_outputs(wants, out);
    }
}

//! Counts how often the kernel was told of each node, so that a tree may forget nodes.
//!
//! Invariant: a node is reported forgotten only when no answer that names it is on its way.

use std::collections::HashMap;

use parking_lot::{Mutex, RwLock, RwLockReadGuard};

use super::tree::NodeId;

/// Nodes that the kernel knows. Their number is bounded by the kernel's own cache of names.
#[derive(Default)]
pub(super) struct KnownNodes {
    /// Held shared from before the tree resolves a name until the answer is counted.
    answers: RwLock<()>,
    counts: Mutex<HashMap<NodeId, u64>>,
}

/// Lets nodes be counted; while it lives, none is forgotten.
pub(super) struct Answer<'a> {
    known: &'a KnownNodes,
    _held: RwLockReadGuard<'a, ()>,
}

impl KnownNodes {
    /// Begins an answer, before the tree is asked.
    pub(super) fn answer(&self) -> Answer<'_> {
        Answer {
            known: self,
            _held: self.answers.read(),
        }
    }

    /// Takes `count` references back, and runs `forgotten` when the kernel has none left; no
    /// answer begins before it ends.
    pub(super) fn forget(&self, id: NodeId, count: u64, forgotten: impl FnOnce()) {
        let _alone = self.answers.write();
        let mut counts = self.counts.lock();
        let Some(known) = counts.get_mut(&id) else {
            return;
        };
        *known = known.saturating_sub(count);
        if *known == 0 {
            counts.remove(&id);
            drop(counts);
            forgotten();
        }
    }
}

impl Answer<'_> {
    /// Counts one more reference of the kernel's.
    pub(super) fn count(&self, id: NodeId) {
        *self.known.counts.lock().entry(id).or_default() += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_is_forgotten_with_its_last_reference() {
        let known = KnownNodes::default();
        let answer = known.answer();
        answer.count(NodeId(7));
        answer.count(NodeId(7));
        drop(answer);
        let is_forgotten = |id, count| {
            let mut is_forgotten = false;
            known.forget(id, count, || is_forgotten = true);
            is_forgotten
        };
        assert!(!is_forgotten(NodeId(7), 1));
        assert!(is_forgotten(NodeId(7), 1));
        assert!(!is_forgotten(NodeId(7), 1));
        assert!(!is_forgotten(NodeId(8), 1));
    }
}

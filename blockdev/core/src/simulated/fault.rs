//! Failures on order.

use std::collections::BTreeMap;

use crate::storage::StorageOp;

/// How an operation fails.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FaultEffect {
    /// With `EIO`; nothing was done. A sync may have done a part.
    Io,
    /// With no space; nothing was done. A sync may have done a part.
    NoSpace,
    /// With `EIO`; of a write the first part was done. Of others as `Io`.
    Short,
}

/// Makes an operation fail.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    /// Which operations count, by [`StorageOp::name`]; all of them when `None`.
    pub operation: Option<&'static str>,
    /// How many of these pass before.
    pub skip: u64,
    /// How it fails.
    pub effect: FaultEffect,
    /// All that follow fail too.
    pub is_permanent: bool,
}

/// How often each thing happened, by name.
pub(super) type Counters = BTreeMap<&'static str, u64>;

pub(super) fn count(counters: &mut Counters, event: &'static str) {
    *counters.entry(event).or_default() += 1;
}

/// The faults that are still to come.
#[derive(Clone, Default)]
pub(super) struct Plan {
    faults: Vec<Fault>,
}

impl Plan {
    pub(super) fn add(&mut self, fault: Fault) {
        self.faults.push(fault);
    }

    pub(super) fn clear(&mut self) {
        self.faults.clear();
    }

    /// Counts one operation, and says how it fails, if it does.
    pub(super) fn meet(&mut self, op: &StorageOp) -> Option<FaultEffect> {
        let mut effect = None;
        self.faults.retain_mut(|fault| {
            if fault.operation.is_some_and(|name| name != op.name()) {
                return true;
            }
            if fault.skip > 0 {
                fault.skip -= 1;
                return true;
            }
            effect = effect.or(Some(fault.effect));
            fault.is_permanent
        });
        effect
    }
}

//! Decides when a batch begins, and for which disks.

use std::sync::Arc;

use afterimage_blockdev::DiskId;

use super::{Begun, GivenUp};
use crate::machine::Machine;

/// The batch to work on now, if there is one.
pub(super) fn next(machine: &Machine) -> Option<Begun> {
    if !machine.is_streaming() || !machine.has_answers() {
        return None;
    }
    machine.believe_answers();
    if let Some(begun) = machine.take_begun() {
        return Some(begun);
    }
    begin(machine).ok()?
}

/// Begins a batch for all disks in need; `None` when there are none. Lets the flow begin again when
/// it had stopped and what was held is sent.
pub(super) fn begin(machine: &Machine) -> Result<Option<Begun>, GivenUp> {
    // The batch and the record that begins it are of one epoch.
    let (epoch, generation) = machine.hold_epoch();
    let is_flowing = machine.order().is_flowing();
    if !is_flowing && !machine.can_flow() {
        return Err(GivenUp("what was recorded is not sent yet"));
    }
    let waiting = machine.take_waiting_captures();
    let growing = machine.take_waiting_growths();
    let mut disks = machine.disks_in_need();
    disks.extend(growing.iter().map(|(disk, _)| Arc::clone(disk)));
    disks.extend(waiting.iter().map(|(disk, _)| Arc::clone(disk)));
    disks.extend(machine.disks_in_open_batch());
    let mut seen: Vec<DiskId> = Vec::new();
    disks.retain(|disk| {
        let is_new = !seen.contains(&disk.id);
        seen.push(disk.id);
        is_new
    });
    if disks.is_empty() && is_flowing {
        return Ok(None);
    }
    let batch = machine.next_batch().map_err(|error| {
        tracing::error!(%error, "no batch can begin");
        GivenUp("the counters cannot be saved")
    })?;
    let draft = (!disks.is_empty()).then(|| machine.batch_begin(batch, &disks));
    let lsn = machine.flow_again(draft);
    drop(epoch);
    // From here on every write of these disks comes after the record that begins the batch.
    for (disk, capture) in waiting {
        if let Some(tap) = &disk.tap {
            let (sender, settled) = crossbeam::channel::bounded(1);
            tap.capture(
                capture,
                Box::new(move || {
                    let _gone = sender.send(());
                }),
            );
            // Writes that passed uncaptured end by themselves; bulk is read only afterwards.
            let _disconnected = settled.recv();
        }
    }
    for (disk, size_bytes) in growing {
        machine.grow_in_batch(&disk, size_bytes);
    }
    // Records of growth that found no flow.
    machine.record_growth();
    let disks = disks.iter().map(|disk| disk.id).collect();
    Ok(lsn.map(|lsn| Begun {
        generation,
        batch,
        lsn,
        disks,
    }))
}

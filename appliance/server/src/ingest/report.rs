//! What each machine's agent said last.

use std::collections::HashMap;
use std::sync::Arc;

use afterimage_blockdev::{HistoryId, MachineId, Timestamp};
use afterimage_protocol::message::SourceReport;
use parking_lot::Mutex;

use super::delay::Delay;
use crate::engine::StreamKey;

/// The last report of a machine.
#[derive(Clone, Debug)]
pub struct Reported {
    /// The stream that it came by.
    pub stream: StreamKey,
    /// The history of that stream.
    pub history: HistoryId,
    /// That stream is open.
    pub is_connected: bool,
    /// The report; `None` before the first.
    pub report: Option<SourceReport>,
    /// When it came, on this appliance's clock.
    pub received: Timestamp,
    /// When it came, records were waiting at the source.
    pub is_behind: bool,
    /// How long frames of that stream take here.
    pub delay: Arc<Delay>,
}

/// The last report of every machine; bounded by the number of machines with a grant.
#[derive(Clone, Default)]
pub struct Reports {
    machines: Arc<Mutex<HashMap<MachineId, Reported>>>,
}

impl Reports {
    /// A stream of the machine was opened.
    pub fn opened(
        &self,
        machine: MachineId,
        history: HistoryId,
        stream: StreamKey,
        delay: Arc<Delay>,
    ) {
        let received = Timestamp::default();
        let (is_connected, is_behind, report) = (true, false, None);
        let new = Reported {
            stream,
            history,
            is_connected,
            report,
            received,
            is_behind,
            delay: Arc::clone(&delay),
        };
        let mut machines = self.machines.lock();
        let entry = machines.entry(machine).or_insert_with(|| new.clone());
        // What the last stream said still tells more than nothing.
        if entry.history == history {
            entry.stream = stream;
            entry.is_connected = true;
            entry.delay = delay;
        } else {
            *entry = new;
        }
    }

    /// A stream has brought a report.
    pub fn reported(
        &self,
        machine: MachineId,
        stream: StreamKey,
        report: SourceReport,
        received: Timestamp,
        is_behind: bool,
    ) {
        if let Some(entry) = self.machines.lock().get_mut(&machine)
            && entry.stream == stream
        {
            entry.report = Some(report);
            entry.received = received;
            entry.is_behind = is_behind;
        }
    }

    /// A stream has ended.
    pub fn closed(&self, machine: MachineId, stream: StreamKey) {
        if let Some(entry) = self.machines.lock().get_mut(&machine)
            && entry.stream == stream
        {
            entry.is_connected = false;
        }
    }

    /// The last report of a machine.
    #[must_use]
    pub fn get(&self, machine: MachineId) -> Option<Reported> {
        self.machines.lock().get(&machine).cloned()
    }
}

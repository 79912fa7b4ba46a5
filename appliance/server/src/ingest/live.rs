//! The streams that are open or being opened, so that one whose agent loses its right is cut at
//! once.
//!
//! Invariant: a stream is here before its right is looked up. So whoever takes the right away
//! first, and cuts then, misses none.

use std::sync::{Arc, Weak};

use afterimage_blockdev::{AgentId, MachineId};
use afterimage_protocol::Refusal;
use parking_lot::Mutex;

use super::slot::EventSlot;
use crate::engine::StreamEvents;

struct Live {
    agent: AgentId,
    machine: MachineId,
    slot: Weak<EventSlot>,
}

/// See the module's text. Their number is bounded by those of connections and of streams on each.
#[derive(Clone, Default)]
pub struct LiveStreams {
    streams: Arc<Mutex<Vec<Live>>>,
}

impl LiveStreams {
    pub(super) fn add(&self, agent: AgentId, machine: MachineId, slot: &Arc<EventSlot>) {
        let mut streams = self.streams.lock();
        streams.retain(|live| live.slot.strong_count() > 0);
        streams.push(Live {
            agent,
            machine,
            slot: Arc::downgrade(slot),
        });
    }

    /// Cuts every stream of an agent.
    pub fn cut_agent(&self, agent: AgentId, refusal: &Refusal) {
        self.cut(refusal, |live| live.agent == agent);
    }

    /// Cuts every stream of a machine but those of its holder.
    pub fn cut_machine(&self, machine: MachineId, holder: AgentId, refusal: &Refusal) {
        self.cut(refusal, |live| {
            live.machine == machine && live.agent != holder
        });
    }

    fn cut(&self, refusal: &Refusal, is_meant: impl Fn(&Live) -> bool) {
        let meant: Vec<_> = {
            let streams = self.streams.lock();
            let meant = streams.iter().filter(|live| is_meant(live));
            meant.filter_map(|live| live.slot.upgrade()).collect()
        };
        for slot in meant {
            slot.refused(refusal);
        }
    }
}

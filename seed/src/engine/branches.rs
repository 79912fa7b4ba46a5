//! Branches that are opened again.

use afterimage_blockdev::{AgentId, DiskId, Epoch, HistoryId};

use super::state::Stream;
use super::{
    AfterCommit, Engine, Event, ForkedBranch, OpenedStream, Output, RequestId, Response, StreamEnd,
    StreamNumber, TakenSnapshot,
};
use crate::error::SeedError;

impl Engine {
    /// Opens a branch at its newest durable state, as its one writer. An earlier opening ends.
    pub(super) fn open_branch(
        &mut self,
        id: RequestId,
        history: HistoryId,
        disk: DiskId,
        out: &mut Vec<Output>,
    ) -> Result<Option<Response>, SeedError> {
        let origin = AgentId(self.store.0);
        let no_branch = || {
            let message = format!("there is no branch {history}");
            SeedError::refused(message, "`aft branch list` shows those that there are")
        };
        let found = self.histories.get(&history);
        let entry = found
            .filter(|entry| entry.is_branch)
            .ok_or_else(no_branch)?;
        let (machine, parent) = (entry.machine, entry.parent);
        let (parent, fork) = parent.ok_or_else(no_branch)?;
        let is_known = self
            .disks
            .get(&disk)
            .is_some_and(|state| state.machine == machine);
        if !is_known {
            let message = format!("branch {history} has no disk {disk}");
            return Err(SeedError::refused(message, "it belongs to another machine"));
        }
        if entry.origin != origin && !entry.origin.is_nil() {
            return Err(SeedError::Fenced {
                message: format!("agent {} writes branch {history}", entry.origin),
                hint: "look at it through a view instead".to_owned(),
                is_held: true,
            });
        }
        if entry.received != entry.durable {
            // What is under way would be overwritten by what comes next.
            return Err(SeedError::Busy {
                message: format!("branch {history} is still being written"),
            });
        }
        let durable = entry.durable;
        let snapshot = self.assemble(disk, history, durable);
        let key = self.disk_key(disk)?;
        let tag_key = self.machines[&machine].tag_key;
        let time = self.time_at(history, durable);
        let stream = StreamNumber(self.next_stream);
        self.next_stream += 1;
        let epoch = Epoch(1);
        let Some(entry) = self.histories.get_mut(&history) else {
            return Err(no_branch());
        };
        entry.epoch = entry.epoch.max(epoch);
        entry.origin = origin;
        let time = time.max(entry.durable_time);
        let before = entry.stream.replace(stream);
        self.streams.insert(
            stream,
            Stream {
                machine,
                history,
                epoch,
                queued_bytes: 0,
            },
        );
        if let Some(before) = before {
            self.streams.remove(&before);
            out.push(Output::Event(Event::Over {
                stream: before,
                end: StreamEnd::Fenced,
            }));
        }
        let branch = ForkedBranch {
            stream: OpenedStream {
                stream,
                durable,
                highest: durable,
                tag_key,
            },
            history,
            taken: TakenSnapshot {
                snapshot,
                machine,
                time,
                resolved_to_batch_begin: false,
                tag_key,
            },
            parent,
            fork,
            key,
            origin,
        };
        let after = AfterCommit::Reply(id, Box::new(Response::Branch(Box::new(branch))));
        self.commit(Vec::new(), after, out);
        Ok(None)
    }
}

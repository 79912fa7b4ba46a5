//! Branches of the engine thread, and what directories show of points.

use std::sync::Arc;

use afterimage_blockdev::{BlockDevice, DiskId, MachineId};
use afterimage_protocol::rest::ApiError;
use afterimage_seed::engine::ForkedBranch;
use afterimage_seed::reference::Reference;
use afterimage_seed::{BranchContents, BranchDevice, Request, Response, SeedError, Usage};

use super::answer;
use super::command::{BranchOpened, PointListing, PointsWanted, ReopenRequest, Reply, ViewRequest};
use super::dispatch::unexpected;
use super::inbox::Found;
use super::thread::EngineThread;

type BranchReply = Reply<Result<BranchOpened, ApiError>>;

impl EngineThread {
    pub(super) fn fork(&mut self, request: &ViewRequest, reply: BranchReply) {
        let reference = match request.reference.parse::<Reference>() {
            Ok(reference) => reference,
            Err(error) => {
                let _gone = reply.send(Err(answer::api_error(&error)));
                return;
            }
        };
        let allow_incomplete = request.allow_incomplete;
        self.ask(
            Request::Fork {
                reference,
                allow_incomplete,
            },
            Box::new(move |thread, result| {
                let opened = result.and_then(|response| match response {
                    Response::Branch(branch) => {
                        let usage = Arc::new(Usage::new(None));
                        thread.branch(&branch, BranchContents::none(), usage)
                    }
                    _ => Err(unexpected()),
                });
                let _gone = reply.send(opened.map_err(|error| answer::api_error(&error)));
            }),
        );
    }

    /// Opens a branch again. What it holds is counted first, on the threads that read.
    pub(super) fn reopen(&mut self, request: ReopenRequest, reply: BranchReply) {
        let ReopenRequest {
            history,
            disk,
            limit_bytes,
        } = request;
        self.ask(
            Request::OpenBranch { history, disk },
            Box::new(move |thread, result| {
                let found = result.and_then(|response| match response {
                    Response::Branch(branch) => Ok((branch, thread.reader()?)),
                    _ => Err(unexpected()),
                });
                let (branch, reader) = match found {
                    Ok(found) => found,
                    Err(error) => {
                        let _gone = reply.send(Err(answer::api_error(&error)));
                        return;
                    }
                };
                let inbox = Arc::clone(&thread.inbox);
                let usage = Arc::new(Usage::new(limit_bytes));
                let newest = Arc::clone(&branch.taken.snapshot);
                BranchContents::find(&reader, &newest, move |contents| {
                    inbox.found(Found {
                        branch,
                        contents,
                        usage,
                        reply,
                    });
                });
            }),
        );
    }

    /// Goes on with a branch whose contents were counted.
    pub(super) fn found(&mut self, found: Found) {
        let Found {
            branch,
            contents,
            usage,
            reply,
        } = found;
        let stream = branch.stream.stream;
        let opened = contents.and_then(|contents| self.branch(&branch, contents, usage));
        if opened.is_err() {
            self.ask(Request::CloseStream(stream), Box::new(|_, _| {}));
        }
        let _gone = reply.send(opened.map_err(|error| answer::api_error(&error)));
    }

    fn branch(
        &mut self,
        branch: &ForkedBranch,
        contents: BranchContents,
        usage: Arc<Usage>,
    ) -> Result<BranchOpened, SeedError> {
        let stream = branch.stream.stream;
        let device = BranchDevice::new(
            branch,
            contents,
            Arc::clone(&usage),
            self.reader()?,
            self.sink(stream),
            Arc::clone(&self.clock),
            &*self.entropy,
        );
        self.branches.insert(stream, Arc::downgrade(&device));
        Ok(BranchOpened {
            device: device as Arc<dyn BlockDevice>,
            history: branch.history,
            parent: branch.parent,
            lsn: branch.fork,
            machine: branch.taken.machine,
            disk: branch.taken.snapshot.disk,
            usage,
            resolved_to_batch_begin: branch.taken.resolved_to_batch_begin,
        })
    }

    pub(super) fn point_states(
        &mut self,
        machine: MachineId,
        disk: DiskId,
        wanted: PointsWanted,
        reply: Reply<Result<PointListing, ApiError>>,
    ) {
        let request = match wanted {
            PointsWanted::After(after, limit) => Request::PointStates {
                machine,
                disk,
                after,
                limit,
            },
            PointsWanted::Named(name) => Request::FindPoint {
                machine,
                disk,
                name,
            },
        };
        self.answer(request, reply, |response| match response {
            Response::PointStates(found, last) => {
                let points = found
                    .into_iter()
                    .map(|found| (answer::point(found.point), found.epoch, found.size_bytes));
                let points = points.collect();
                Some(PointListing { points, last })
            }
            _ => None,
        });
    }
}

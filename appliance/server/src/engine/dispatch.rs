//! Carries commands out.

use std::sync::Arc;

use afterimage_blockdev::{BlockDevice, BlockIndex, DiskId, Storage};
use afterimage_cache::TagKey;
use afterimage_protocol::Refusal;
use afterimage_protocol::rest::ApiError;
use afterimage_protocol::rest::server::VerifyReport;
use afterimage_seed::engine::{StoreFile, StreamNumber, TakenSnapshot};
use afterimage_seed::reader::Sink;
use afterimage_seed::reference::At;
use afterimage_seed::verify::{Verification, verify_file};
use afterimage_seed::{Input, Reader, Reference, Request, Response, SeedError, ViewDevice};

use super::answer;
use super::command::{
    Command, DiskOpened, OpenDisk, OpenRequest, PointPage, Reply, StreamKey, StreamOpened,
    ViewOpened, ViewRequest,
};
use super::policy;
use super::space;
use super::thread::{EngineThread, files_of, snapshot_of};

pub(super) fn unexpected() -> SeedError {
    SeedError::Refused {
        message: "the engine answered something else".into(),
        hint: String::new(),
    }
}

fn number(key: StreamKey) -> StreamNumber {
    StreamNumber(key.0)
}

impl EngineThread {
    pub(super) fn command(&mut self, command: Command) {
        match command {
            Command::Open(request, reply) => self.open(request, reply),
            Command::Declare(request, reply) => self.declare(request, reply),
            Command::Append(key, frame) => self.give(Input::Frame(number(key), frame)),
            Command::Bulk(key, bulk, frame) => self.give(Input::Bulk(number(key), bulk, frame)),
            Command::Compare {
                stream,
                disk,
                first_block,
                tags,
                reply,
            } => {
                self.compare(number(stream), disk, first_block, tags, reply);
            }
            Command::Close(key) => {
                self.streams.remove(&number(key));
                self.ask(Request::CloseStream(number(key)), Box::new(|_, _| {}));
            }
            Command::CreatePoint {
                machine,
                name,
                at,
                reply,
            } => {
                let at = match at.as_deref().map(str::parse::<At>).transpose() {
                    Ok(at) => at,
                    Err(error) => {
                        let _gone = reply.send(Err(answer::api_error(&error)));
                        return;
                    }
                };
                self.answer(
                    Request::CreatePoint { machine, name, at },
                    reply,
                    |response| match response {
                        Response::Point(record) => Some(answer::point(record)),
                        _ => None,
                    },
                );
            }
            Command::DeletePoints {
                machine,
                names,
                reply,
            } => {
                self.answer(Request::DeletePoints { machine, names }, reply, done);
            }
            Command::LockPoints {
                machine,
                names,
                until,
                reply,
            } => {
                let request = Request::LockPoints {
                    machine,
                    names,
                    until,
                };
                self.answer(request, reply, done);
            }
            Command::GetPolicy { machine, reply } => {
                self.answer(Request::GetPolicy { machine }, reply, policy::picked);
            }
            Command::SetPolicy {
                machine,
                wanted,
                reply,
            } => match policy::request(machine, wanted) {
                Ok(request) => self.answer(request, reply, policy::picked),
                Err(error) => {
                    let _gone = reply.send(Err(error));
                }
            },
            Command::ConfirmClock(reply) => self.answer(Request::ConfirmClock, reply, done),
            Command::ListPoints {
                machine,
                after,
                limit,
                reply,
            } => {
                self.answer(
                    Request::ListPoints {
                        machine,
                        after,
                        limit,
                    },
                    reply,
                    |response| match response {
                        Response::Points(points, total) => {
                            let points = points.into_iter().map(answer::point).collect();
                            Some(PointPage { points, total })
                        }
                        _ => None,
                    },
                );
            }
            Command::OpenView(request, reply) => self.open_view(&request, reply),
            Command::Fork(request, reply) => self.fork(&request, reply),
            Command::Reopen(request, reply) => self.reopen(request, reply),
            Command::PointStates {
                machine,
                disk,
                wanted,
                reply,
            } => self.point_states(machine, disk, wanted, reply),
            Command::DropBranch(history, reply) => {
                self.answer(Request::DropBranch(history), reply, done);
            }
            Command::Status(reply) => self.ask(
                Request::Info,
                Box::new(move |thread, result| {
                    if let Ok(Response::Info(info)) = result {
                        let (_, free) = super::room(&*thread.storage);
                        let _gone = reply.send(answer::status(info, free));
                    }
                }),
            ),
            Command::Space(reply) => self.space(reply),
            Command::PointSpace {
                machine,
                after,
                limit,
                reply,
            } => {
                let request = Request::PointSpace {
                    machine,
                    after,
                    limit,
                };
                self.answer(request, reply, space::points);
            }
            Command::SetQuota { of, bytes, reply } => {
                self.answer(Request::SetQuota { of, bytes }, reply, done);
            }
            Command::Collect(reply) => {
                self.answer(Request::Collect, reply, |response| match response {
                    Response::Collected(done) => Some(answer::collected(done)),
                    _ => None,
                });
            }
            Command::Verify(reply) => self.verify(reply),
            Command::Files(command) => self.files(command),
            Command::Fence {
                machine,
                origin,
                reply,
            } => {
                self.answer(
                    Request::Fence {
                        machine,
                        holder: origin,
                    },
                    reply,
                    done,
                );
            }
            Command::Stop(reply) => self.stop(reply),
            Command::NoteTo(events) => self.events = Some(events),
        }
    }

    /// Asks the engine and sends what `pick` makes of the answer.
    pub(super) fn answer<T: Send + 'static>(
        &mut self,
        request: Request,
        reply: Reply<Result<T, ApiError>>,
        pick: fn(Response) -> Option<T>,
    ) {
        self.ask(
            request,
            Box::new(move |_, result| {
                let picked = result.and_then(|response| pick(response).ok_or_else(unexpected));
                let _gone = reply.send(picked.map_err(|error| answer::api_error(&error)));
            }),
        );
    }

    fn open(&mut self, request: OpenRequest, reply: Reply<Result<StreamOpened, Refusal>>) {
        let OpenRequest {
            machine,
            name,
            history,
            parent,
            origin,
            epoch,
            events,
        } = request;
        let parent = parent.map(|fork| (fork.history, fork.lsn));
        self.ask(
            Request::OpenStream {
                machine,
                name,
                history,
                parent,
                origin,
                epoch,
            },
            Box::new(move |thread, result| {
                let opened = match result {
                    Ok(Response::Stream(opened)) => {
                        thread.streams.insert(opened.stream, events);
                        Ok(StreamOpened {
                            key: StreamKey(opened.stream.0),
                            durable: opened.durable,
                            highest: opened.highest,
                            tag_key: opened.tag_key,
                        })
                    }
                    Ok(_) => Err(answer::refusal(&unexpected())),
                    Err(error) => Err(answer::refusal(&error)),
                };
                let _gone = reply.send(opened);
            }),
        );
    }

    fn declare(&mut self, request: OpenDisk, reply: Reply<Result<DiskOpened, Refusal>>) {
        let description = request.description;
        let request = Request::DeclareDisk {
            stream: number(request.stream),
            disk: description.disk,
            name: description.name,
            size_bytes: description.size_bytes,
            logical_block_bytes: description.logical_block_bytes,
        };
        self.ask(
            request,
            Box::new(move |_, result| {
                let declared = match result {
                    Ok(Response::Disk(disk)) => Ok(DiskOpened {
                        key: disk.key.id.0,
                        secret: disk.key.secret,
                        has_copy: disk.has_copy,
                        is_in_batch: disk.is_in_batch,
                        bulk_done: disk.bulk_done,
                    }),
                    Ok(_) => Err(answer::refusal(&unexpected())),
                    Err(error) => Err(answer::refusal(&error)),
                };
                let _gone = reply.send(declared);
            }),
        );
    }

    fn compare(
        &mut self,
        stream: StreamNumber,
        disk: DiskId,
        first_block: u64,
        tags: Vec<[u8; 16]>,
        reply: Reply<Result<Vec<bool>, Refusal>>,
    ) {
        self.ask(
            Request::NewestState { stream, disk },
            Box::new(move |thread, result| {
                let taken = result.and_then(|r| snapshot_of(r).ok_or_else(unexpected));
                match taken.and_then(|taken| Ok((taken, thread.reader()?))) {
                    Ok((taken, reader)) => compare_tags(&reader, &taken, first_block, tags, reply),
                    Err(error) => {
                        let _gone = reply.send(Err(answer::refusal(&error)));
                    }
                }
            }),
        );
    }

    fn open_view(&mut self, request: &ViewRequest, reply: Reply<Result<ViewOpened, ApiError>>) {
        let reference = match request.reference.parse::<Reference>() {
            Ok(reference) => reference,
            Err(error) => {
                let _gone = reply.send(Err(answer::api_error(&error)));
                return;
            }
        };
        let allow_incomplete = request.allow_incomplete;
        self.ask(
            Request::Snapshot {
                reference,
                allow_incomplete,
            },
            Box::new(move |thread, result| {
                let opened = result
                    .and_then(|response| snapshot_of(response).ok_or_else(unexpected))
                    .and_then(|taken| Ok(view_of(&taken, thread.reader()?)));
                let _gone = reply.send(opened.map_err(|error| answer::api_error(&error)));
            }),
        );
    }

    fn verify(&mut self, reply: Reply<Result<VerifyReport, ApiError>>) {
        self.ask(
            Request::Files,
            Box::new(move |thread, result| {
                let storage = Arc::clone(&thread.storage) as Arc<dyn Storage>;
                let store = thread.engine.store();
                let points = thread.engine.cuts();
                let pin = thread.engine.pin_files();
                let run = move || {
                    // The files stay until all is read.
                    let _pin = pin;
                    let report = result
                        .map(files_of)
                        .and_then(|files| verify_all(&*storage, store, &files, &points));
                    let _gone = reply.send(report.map_err(|error| answer::api_error(&error)));
                };
                // It reads the whole store, so it gets a thread of its own.
                let spawned = std::thread::Builder::new()
                    .name("verify".to_owned())
                    .spawn(run);
                if let Err(error) = spawned {
                    tracing::error!(%error, "cannot start the verification");
                }
            }),
        );
    }
}

fn done(response: Response) -> Option<()> {
    matches!(response, Response::Done).then_some(())
}

fn view_of(taken: &TakenSnapshot, reader: Arc<Reader>) -> ViewOpened {
    let snapshot = Arc::clone(&taken.snapshot);
    let view = Arc::new(ViewDevice::new(reader, Arc::clone(&snapshot)));
    ViewOpened {
        machine: taken.machine,
        disk: snapshot.disk,
        history: snapshot.history,
        lsn: snapshot.lsn,
        time: taken.time,
        resolved_to_batch_begin: taken.resolved_to_batch_begin,
        device: Arc::clone(&view) as Arc<dyn BlockDevice>,
        view: Some(view),
    }
}

fn compare_tags(
    reader: &Arc<Reader>,
    taken: &TakenSnapshot,
    first_block: u64,
    tags: Vec<[u8; 16]>,
    reply: Reply<Result<Vec<bool>, Refusal>>,
) {
    let count = tags.len();
    let zero = Reader::zero_tag(&TagKey(taken.tag_key));
    let sink = Sink::Tags {
        tags: vec![[0; 16]; count],
        zero,
    };
    let finish = move |result| {
        let differs = match result {
            Ok(Sink::Tags { tags: here, .. }) => here
                .iter()
                .zip(&tags)
                .map(|(here, there)| here != there)
                .collect(),
            // What cannot be read here is sent again: that is the repair.
            _ => vec![true; count],
        };
        let _gone = reply.send(Ok(differs));
    };
    reader.read(
        &taken.snapshot,
        BlockIndex(first_block),
        count,
        sink,
        Box::new(finish),
    );
}

fn verify_all(
    storage: &dyn Storage,
    store: afterimage_blockdev::StoreId,
    files: &[StoreFile],
    points: &[(
        String,
        afterimage_blockdev::HistoryId,
        afterimage_blockdev::Lsn,
    )],
) -> Result<VerifyReport, SeedError> {
    let mut found = Verification::default();
    for file in files {
        verify_file(storage, store, *file, &mut found)?;
    }
    Ok(VerifyReport {
        segments: found.files,
        slots: found.slots,
        bytes: found.bytes,
        damage: found
            .damage
            .iter()
            .map(|report| crate::scrub::describe(report, points))
            .collect(),
    })
}

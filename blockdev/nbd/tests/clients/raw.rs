//! A client that sends whatever a test wants, one request at a time.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use afterimage_nbd::client::{Agreed, Wish, negotiate};
use afterimage_nbd::number::chunk;
use afterimage_nbd::reply::{self, ReplyHead, ReplyStyle};
use afterimage_nbd::request::{Command, Request};

/// How long a server may think.
const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) struct Raw {
    pub(crate) stream: UnixStream,
    pub(crate) agreed: Agreed,
}

/// A reply: bytes of a read, and extents by context.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) data: Vec<u8>,
    pub(crate) extents: Vec<(u32, Vec<(u64, u64)>)>,
    pub(crate) holes: usize,
}

pub(crate) fn wish(export: &str, contexts: &[&str], allow_extended: bool) -> Wish {
    Wish {
        export: export.to_owned(),
        contexts: contexts.iter().map(|name| (*name).to_owned()).collect(),
        allow_extended,
    }
}

pub(crate) fn connect(path: &Path) -> UnixStream {
    let stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

pub(crate) fn request(command: Command, offset: u64, length: u64) -> Request {
    Request {
        flags: 0,
        command,
        cookie: offset ^ length << 20 | 1 << 62,
        offset,
        length,
    }
}

impl Raw {
    pub(crate) fn open(path: &Path, wish: &Wish) -> Self {
        let mut stream = connect(path);
        let agreed = negotiate(&mut stream, wish).unwrap();
        Self { stream, agreed }
    }

    pub(crate) fn send(&mut self, request: &Request, payload: &[u8]) {
        let head = request.encode(self.agreed.style);
        self.stream.write_all(head.as_slice()).unwrap();
        self.stream.write_all(payload).unwrap();
    }

    /// Performs a request; the error is the server's number.
    pub(crate) fn perform(&mut self, request: &Request, payload: &[u8]) -> Result<Answer, u32> {
        self.send(request, payload);
        self.receive(request)
    }

    pub(crate) fn take(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    pub(crate) fn head(&mut self) -> ReplyHead {
        let style = self.agreed.style;
        let mut bytes = self.take(16);
        loop {
            if let Some((head, _)) = reply::decode_head(style, &bytes).unwrap() {
                return head;
            }
            bytes.extend(self.take(4));
        }
    }

    pub(crate) fn receive(&mut self, request: &Request) -> Result<Answer, u32> {
        let mut answer = Answer::default();
        let is_read = request.command == Command::Read;
        let mut failed = None;
        loop {
            match self.head() {
                ReplyHead::Simple { cookie, code } => {
                    assert_eq!(cookie, request.cookie);
                    if code != 0 {
                        return Err(code);
                    }
                    if is_read {
                        assert_eq!(self.agreed.style, ReplyStyle::Simple);
                        answer.data = self.take(usize::try_from(request.length).unwrap());
                    }
                    return Ok(answer);
                }
                ReplyHead::Chunk {
                    cookie,
                    is_last,
                    kind,
                    length,
                } => {
                    assert_eq!(cookie, request.cookie);
                    let payload = self.take(usize::try_from(length).unwrap());
                    if is_read {
                        answer
                            .data
                            .resize(usize::try_from(request.length).unwrap(), 0xee);
                    }
                    self.chunk(request, kind, &payload, &mut answer, &mut failed);
                    if is_last {
                        return failed.map_or(Ok(answer), Err);
                    }
                }
            }
        }
    }

    fn chunk(
        &self,
        request: &Request,
        kind: u16,
        payload: &[u8],
        answer: &mut Answer,
        failed: &mut Option<u32>,
    ) {
        let within = |offset: u64| usize::try_from(offset - request.offset).unwrap();
        match kind {
            chunk::NONE => assert!(payload.is_empty()),
            chunk::OFFSET_DATA => {
                let (offset, _) = reply::decode_place(kind, payload).unwrap();
                let data = &payload[8..];
                answer.data[within(offset)..within(offset) + data.len()].copy_from_slice(data);
            }
            chunk::OFFSET_HOLE => {
                let (offset, length) = reply::decode_place(kind, payload).unwrap();
                let length = usize::try_from(length).unwrap();
                answer.data[within(offset)..within(offset) + length].fill(0);
                answer.holes += 1;
            }
            chunk::BLOCK_STATUS | chunk::BLOCK_STATUS_EXT => {
                let is_extended = self.agreed.style == ReplyStyle::Extended;
                let status = reply::decode_status(is_extended, payload).unwrap();
                answer.extents.push(status);
            }
            _ => *failed = Some(reply::decode_failure(payload).unwrap().code),
        }
    }

    /// Says whether the server has closed the connection.
    pub(crate) fn is_closed(&mut self) -> bool {
        let mut rest = Vec::new();
        match self.stream.read_to_end(&mut rest) {
            Ok(_) => true,
            Err(error) => error.kind() != std::io::ErrorKind::WouldBlock,
        }
    }
}

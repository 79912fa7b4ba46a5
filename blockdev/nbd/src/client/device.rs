//! The device: its queue, its two threads, and its end.
//!
//! Invariants
//! * A cookie names a place and how often it was used, so that a late or invented reply finds
//!   nothing.
//! * No lock is held while a completer is called or a socket is used.
//! * Each request is completed exactly once; when the connection is lost all of them are, and those
//!   that come later at once.

use std::collections::VecDeque;
use std::io::{BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use afterimage_blockdev::{
    BlockCompleter, BlockCompletion, BlockDevice, BlockError, BlockErrorKind, BlockOp, Geometry,
    Token,
};
use parking_lot::{Condvar, Mutex};

use super::active::{Active, Payload, StatusDone, Told, Work, is_known};
use super::receive::{Requests, receive};
use super::{Agreed, ClientError, ClientOptions, negotiate};
use crate::number::flag;
use crate::request::{Command, Request};

const BASE_ALLOCATION: &str = "base:allocation";
const READ_AHEAD_BYTES: usize = 128 << 10;

enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Stream {
    fn shutdown(&self) {
        // One that is closed already is as good.
        let _closed = match self {
            Self::Unix(stream) => stream.shutdown(Shutdown::Both),
            Self::Tcp(stream) => stream.shutdown(Shutdown::Both),
        };
    }
}

#[derive(Default)]
struct Slot {
    uses: u32,
    active: Option<Active>,
    /// The request is with the receiver.
    is_taken: bool,
}

#[derive(Default)]
struct State {
    slots: Vec<Slot>,
    free: Vec<u32>,
    /// Requests without a place.
    overflow: VecDeque<Active>,
    /// Places whose next piece is to be sent.
    queue: VecDeque<u32>,
    /// Why there is no connection any more.
    lost: Option<String>,
    is_closing: bool,
}

struct Shared {
    state: Mutex<State>,
    wake: Condvar,
    agreed: Agreed,
    overflow_max: usize,
    /// The number of `base:allocation`, if it was selected.
    allocation: Option<u32>,
}

/// A disk on an NBD server. Dropping it waits until every request was completed.
pub struct NbdDevice {
    shared: Arc<Shared>,
    stream: Stream,
    geometry: Geometry,
    threads: Vec<JoinHandle<()>>,
}

impl NbdDevice {
    /// Connects to a Unix socket.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn connect_unix(path: &Path, options: &ClientOptions) -> Result<Arc<Self>, ClientError> {
        let mut stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(options.handshake_timeout))?;
        stream.set_write_timeout(Some(options.handshake_timeout))?;
        let agreed = negotiate(&mut stream, &wish(options))?;
        stream.set_read_timeout(None)?;
        stream.set_write_timeout(None)?;
        let halves = (stream.try_clone()?, stream.try_clone()?);
        Self::start(Stream::Unix(stream), halves, agreed, options)
    }

    /// Connects to a TCP address, without TLS: for servers on this machine.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn connect_tcp(
        address: std::net::SocketAddr,
        options: &ClientOptions,
    ) -> Result<Arc<Self>, ClientError> {
        let mut stream = TcpStream::connect_timeout(&address, options.handshake_timeout)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(options.handshake_timeout))?;
        stream.set_write_timeout(Some(options.handshake_timeout))?;
        let agreed = negotiate(&mut stream, &wish(options))?;
        stream.set_read_timeout(None)?;
        stream.set_write_timeout(None)?;
        let halves = (stream.try_clone()?, stream.try_clone()?);
        Self::start(Stream::Tcp(stream), halves, agreed, options)
    }

    fn start<S: Read + Write + Send + 'static>(
        stream: Stream,
        (reading, mut writing): (S, S),
        agreed: Agreed,
        options: &ClientOptions,
    ) -> Result<Arc<Self>, ClientError> {
        let geometry = geometry(&agreed)?;
        let requests_max = u32::try_from(options.requests_max.max(1)).unwrap_or(u32::MAX);
        let allocation = agreed
            .contexts
            .iter()
            .find(|known| known.1 == BASE_ALLOCATION);
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                slots: (0..requests_max).map(|_| Slot::default()).collect(),
                free: (0..requests_max).rev().collect(),
                ..State::default()
            }),
            wake: Condvar::new(),
            allocation: allocation.map(|known| known.0),
            agreed,
            overflow_max: options.overflow_max,
        });
        let sender = Arc::clone(&shared);
        let send = thread::Builder::new()
            .name("nbd-send".to_owned())
            .spawn(move || sender.send_all(&mut writing))?;
        let receiver = Arc::clone(&shared);
        let receive = thread::Builder::new()
            .name("nbd-receive".to_owned())
            .spawn(move || receiver.receive_all(reading))?;
        Ok(Arc::new(Self {
            shared,
            stream,
            geometry,
            threads: vec![send, receive],
        }))
    }

    /// What the server and its export can do.
    #[must_use]
    pub fn agreed(&self) -> &Agreed {
        &self.shared.agreed
    }

    /// Asks for the extents of a context that was wished for: lengths and flags that cover the
    /// range. `done` is called once, on any thread.
    pub fn status(&self, context: &str, offset: u64, length: u64, done: StatusDone) {
        let mut all = self.shared.agreed.contexts.iter();
        let id = all.find(|known| known.1 == context).map(|known| known.0);
        let kind = match id {
            None => Some(BlockErrorKind::NotSupported),
            Some(_) => {
                let op = BlockOp::Extents { offset, length };
                op.validate(&self.geometry).err().map(|error| error.kind)
            }
        };
        let asked = ("block status", offset, length);
        if let Some(kind) = kind {
            return done(Err(BlockError {
                operation: asked.0,
                offset,
                length,
                kind,
            }));
        }
        if length == 0 {
            return done(Ok(Vec::new()));
        }
        let work = Work::Status {
            context: id.unwrap_or(0),
            found: Vec::new(),
        };
        self.shared
            .enqueue(Active::new(work, Told::Status(done), asked));
    }

    /// Ends the connection at once: what is on its way fails.
    pub fn close(&self) {
        self.shared.lose("the connection was closed");
        self.stream.shutdown();
    }
}

fn wish(options: &ClientOptions) -> super::Wish {
    let mut wish = options.wish.clone();
    if !wish.contexts.iter().any(|name| name == BASE_ALLOCATION) {
        wish.contexts.insert(0, BASE_ALLOCATION.to_owned());
    }
    wish
}

fn geometry(agreed: &Agreed) -> Result<Geometry, ClientError> {
    let (smallest, _, _) = agreed.facts.block_bytes;
    let logical_block_bytes = match smallest {
        0..=512 => 512,
        513..=4096 => 4096,
        _ => {
            let text = format!("its smallest request has {smallest} bytes");
            return Err(ClientError::Unusable(text));
        }
    };
    let size_bytes = agreed.facts.size_bytes;
    if !size_bytes.is_multiple_of(u64::from(logical_block_bytes)) {
        let text = format!("{size_bytes} bytes are no whole blocks of {logical_block_bytes}");
        return Err(ClientError::Unusable(text));
    }
    Ok(Geometry {
        size_bytes,
        logical_block_bytes,
        is_read_only: agreed.has(flag::READ_ONLY),
    })
}

fn cookie_of(place: u32, uses: u32) -> u64 {
    u64::from(uses) << 32 | u64::from(place)
}

fn place_of(cookie: u64) -> Option<(usize, u32)> {
    let place = usize::try_from(cookie & u64::from(u32::MAX)).ok()?;
    Some((place, u32::try_from(cookie >> 32).ok()?))
}

impl Shared {
    fn enqueue(&self, active: Active) {
        let mut state = self.state.lock();
        if let Some(why) = state.lost.clone() {
            drop(state);
            return active.lose(&why);
        }
        match state.free.pop() {
            Some(place) => state.begin(place, active),
            None if state.overflow.len() < self.overflow_max => state.overflow.push_back(active),
            None => {
                drop(state);
                return active.lose("too many requests wait for the server");
            }
        }
        drop(state);
        self.wake.notify_one();
    }

    /// Sends until the connection is lost, or all is done and the device is closed.
    fn send_all(&self, stream: &mut impl Write) {
        loop {
            let mut state = self.state.lock();
            let place = loop {
                if state.lost.is_some() {
                    return;
                }
                if let Some(place) = state.queue.pop_front() {
                    break place;
                }
                if state.is_closing && state.is_idle() {
                    drop(state);
                    return self.say_goodbye(stream);
                }
                self.wake.wait(&mut state);
            };
            let Some((request, payload)) = state.next(place, &self.agreed) else {
                continue;
            };
            drop(state);
            let head = request.encode(self.agreed.style);
            let sent = stream.write_all(head.as_slice()).and_then(|()| {
                let Some((buffer, done)) = payload else {
                    return Ok(());
                };
                let from = usize::try_from(done).unwrap_or(usize::MAX);
                let length = usize::try_from(request.length).unwrap_or(usize::MAX);
                let bytes = buffer.get(from..from.saturating_add(length));
                stream.write_all(bytes.unwrap_or_default())
            });
            if let Err(error) = sent {
                return self.lose(&format!("the connection broke: {error}"));
            }
        }
    }

    fn say_goodbye(&self, stream: &mut impl Write) {
        let request = Request {
            flags: 0,
            command: Command::Disconnect,
            cookie: 0,
            offset: 0,
            length: 0,
        };
        // The server may have gone before.
        let _gone = stream.write_all(request.encode(self.agreed.style).as_slice());
        self.lose("the device was closed");
    }

    fn receive_all(&self, stream: impl Read) {
        let mut stream = BufReader::with_capacity(READ_AHEAD_BYTES, stream);
        let why = loop {
            match receive(&mut stream, &self.agreed, self) {
                Ok(true) => {}
                Ok(false) => break "the server closed the connection".to_owned(),
                Err(error) => break error.to_string(),
            }
        };
        self.lose(&why);
    }

    /// Gives all requests up. What the receiver has in hand it gives up itself.
    fn lose(&self, why: &str) {
        let mut state = self.state.lock();
        let why = state.lost.get_or_insert_with(|| why.to_owned()).clone();
        let mut given_up: Vec<Active> = core::mem::take(&mut state.overflow).into();
        given_up.extend(state.slots.iter_mut().filter_map(|slot| slot.active.take()));
        state.queue.clear();
        drop(state);
        self.wake.notify_all();
        for active in given_up {
            active.lose(&why);
        }
    }
}

impl State {
    fn begin(&mut self, place: u32, active: Active) {
        let found = usize::try_from(place)
            .ok()
            .and_then(|at| self.slots.get_mut(at));
        if let Some(slot) = found {
            slot.uses = slot.uses.wrapping_add(1);
            slot.active = Some(active);
            self.queue.push_back(place);
        }
    }

    fn next(&mut self, place: u32, agreed: &Agreed) -> Option<(Request, Option<Payload>)> {
        let slot = self.slots.get_mut(usize::try_from(place).ok()?)?;
        let cookie = cookie_of(place, slot.uses);
        Some(slot.active.as_mut()?.next(cookie, agreed))
    }

    fn is_idle(&self) -> bool {
        self.free.len() == self.slots.len() && self.overflow.is_empty()
    }
}

impl Requests for Shared {
    fn take(&self, cookie: u64) -> Option<Active> {
        let (place, uses) = place_of(cookie)?;
        let mut state = self.state.lock();
        let slot = state.slots.get_mut(place)?;
        let is_meant = slot.uses == uses && slot.active.as_ref().is_some_and(|it| it.is_sent);
        if !is_meant {
            return None;
        }
        slot.is_taken = true;
        slot.active.take()
    }

    fn put_back(&self, cookie: u64, active: Active) {
        let mut state = self.state.lock();
        if let Some(why) = state.lost.clone() {
            drop(state);
            return active.lose(&why);
        }
        let found = place_of(cookie).and_then(|(place, _)| state.slots.get_mut(place));
        if let Some(slot) = found {
            slot.is_taken = false;
            slot.active = Some(active);
        }
    }

    fn ended(&self, cookie: u64, active: Active, is_complete: bool) {
        let Some((index, _)) = place_of(cookie) else {
            return active.lose("a cookie of nothing");
        };
        let place = u32::try_from(index).unwrap_or(u32::MAX);
        let mut state = self.state.lock();
        if !is_complete {
            if state.lost.is_none() {
                if let Some(slot) = state.slots.get_mut(index) {
                    slot.is_taken = false;
                    slot.active = Some(active);
                    state.queue.push_back(place);
                }
                drop(state);
                self.wake.notify_one();
                return;
            }
            let why = state.lost.clone().unwrap_or_default();
            drop(state);
            return active.lose(&why);
        }
        if let Some(slot) = state.slots.get_mut(index) {
            slot.is_taken = false;
        }
        match state.overflow.pop_front() {
            Some(next) => state.begin(place, next),
            None => state.free.push(place),
        }
        drop(state);
        self.wake.notify_one();
        active.complete();
    }
}

impl BlockDevice for NbdDevice {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn submit(&self, token: Token, op: BlockOp, to: Arc<dyn BlockCompleter>) {
        let refuse = |to: Arc<dyn BlockCompleter>, error: BlockError| {
            let result = Err(error);
            to.complete(BlockCompletion { token, result });
        };
        if let Err(error) = op.validate(&self.geometry) {
            return refuse(to, error);
        }
        let agreed = &self.shared.agreed;
        match &op {
            BlockOp::Grow { .. } => {
                let error = op.error(BlockErrorKind::NotSupported);
                return refuse(to, error);
            }
            BlockOp::Flush if !agreed.has(flag::SEND_FLUSH) && !self.geometry.is_read_only => {
                // Then a write is durable when it is answered, or nothing is known.
                let error = op.error(BlockErrorKind::NotSupported);
                return refuse(to, error);
            }
            BlockOp::Write { fua: true, .. } if !agreed.has(flag::SEND_FUA) => {
                let error = op.error(BlockErrorKind::NotSupported);
                return refuse(to, error);
            }
            _ => {}
        }
        let (_, offset, length) = op.describe();
        let is_flush = matches!(op, BlockOp::Flush);
        let is_blind = matches!(op, BlockOp::Extents { .. }) && self.shared.allocation.is_none();
        let reads_only = is_flush && !agreed.has(flag::SEND_FLUSH);
        if reads_only || is_blind || (length == 0 && !is_flush) {
            let result = Ok(at_once(op, is_blind, (offset, length)));
            return to.complete(BlockCompletion { token, result });
        }
        let mut active = Active::of_op(token, op, to);
        if let (Work::Status { context, .. }, Some(id)) = (&mut active.work, self.shared.allocation)
        {
            *context = id;
        }
        if !is_known(&active.work, agreed) {
            active.failure = Some(crate::reply::Failure::new(
                crate::number::error::ENOTSUP,
                "the server does not know this",
            ));
            return active.complete();
        }
        self.shared.enqueue(active);
    }
}

/// The outcome of what needs no server.
fn at_once(
    op: BlockOp,
    is_blind: bool,
    (offset, length): (u64, u64),
) -> afterimage_blockdev::BlockOutcome {
    use afterimage_blockdev::{BlockOutcome, Extent, ExtentKind};
    match op {
        BlockOp::Read { buffer, .. } => BlockOutcome::Data(buffer),
        BlockOp::Extents { .. } if is_blind && length > 0 => BlockOutcome::Extents(vec![Extent {
            offset,
            length,
            kind: ExtentKind::Data,
        }]),
        BlockOp::Extents { .. } => BlockOutcome::Extents(Vec::new()),
        _ => BlockOutcome::Done,
    }
}

impl Drop for NbdDevice {
    fn drop(&mut self) {
        self.shared.state.lock().is_closing = true;
        self.shared.wake.notify_all();
        let me = thread::current().id();
        let mut threads = core::mem::take(&mut self.threads).into_iter();
        // The sender ends when all is done; then nothing more is to be received.
        if let Some(sender) = threads.next()
            && sender.thread().id() != me
        {
            let _panicked = sender.join();
        }
        self.stream.shutdown();
        if let Some(receiver) = threads.next()
            && receiver.thread().id() != me
        {
            let _panicked = receiver.join();
        }
    }
}

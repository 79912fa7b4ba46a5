//! A network between agent and appliance that can be cut: TCP forwarding at another address of
//! this machine.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

const OPEN: u8 = 0;
const CUT: u8 = 1;
const SILENT: u8 = 2;
/// How often a thread looks whether something changed.
const LOOK: Duration = Duration::from_millis(20);

#[derive(Debug, Default)]
struct Shared {
    state: AtomicU8,
    is_over: AtomicBool,
}

impl Shared {
    fn state(&self) -> u8 {
        self.state.load(Ordering::SeqCst)
    }

    fn is_over(&self) -> bool {
        self.is_over.load(Ordering::SeqCst)
    }
}

/// Forwards connections until it is dropped.
#[derive(Debug)]
pub struct Proxy {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Proxy {
    /// Forwards each `(listen, to)`.
    ///
    /// # Panics
    /// When an address is taken.
    #[must_use]
    pub fn start(ways: &[(SocketAddr, SocketAddr)]) -> Self {
        let shared = Arc::new(Shared::default());
        let threads = ways
            .iter()
            .map(|(listen, to)| {
                let listener = TcpListener::bind(listen).expect("an address of the proxy");
                listener.set_nonblocking(true).expect("a listener");
                let (shared, to) = (Arc::clone(&shared), *to);
                std::thread::spawn(move || accept(&listener, to, &shared))
            })
            .collect();
        Self { shared, threads }
    }

    /// Closes all connections, and refuses new ones.
    pub fn cut(&self) {
        self.shared.state.store(CUT, Ordering::SeqCst);
    }

    /// Forwards nothing more and closes nothing: a half-open network.
    pub fn silence(&self) {
        self.shared.state.store(SILENT, Ordering::SeqCst);
    }

    /// Forwards again; what was silenced is lost with its connection, as in a network.
    pub fn heal(&self) {
        self.shared.state.store(OPEN, Ordering::SeqCst);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            let _ended = thread.join();
        }
    }
}

fn accept(listener: &TcpListener, to: SocketAddr, shared: &Arc<Shared>) {
    let mut pumps = Vec::new();
    while !shared.is_over() {
        let Ok((from, _)) = listener.accept() else {
            std::thread::park_timeout(LOOK);
            continue;
        };
        if shared.state() == CUT {
            continue;
        }
        let Ok(onward) = TcpStream::connect(to) else {
            continue;
        };
        let (Ok(from2), Ok(onward2)) = (from.try_clone(), onward.try_clone()) else {
            continue;
        };
        for (source, sink) in [(from, onward), (onward2, from2)] {
            let shared = Arc::clone(shared);
            pumps.push(std::thread::spawn(move || pump(source, sink, &shared)));
        }
    }
    for pump in pumps {
        let _ended = pump.join();
    }
}

/// Copies one direction. A connection that was silenced never speaks again.
fn pump(mut source: TcpStream, mut sink: TcpStream, shared: &Shared) {
    let limits = [
        source.set_nonblocking(false),
        source.set_read_timeout(Some(LOOK)),
        sink.set_write_timeout(Some(Duration::from_secs(5))),
    ];
    let mut was_silenced = limits.iter().any(Result::is_err);
    let mut buffer = vec![0; 1 << 16];
    while !shared.is_over() && shared.state() != CUT {
        was_silenced |= shared.state() == SILENT;
        let count = match source.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if is_timeout(&error) => continue,
            Err(_) => break,
        };
        was_silenced |= shared.state() == SILENT;
        if !was_silenced && sink.write_all(&buffer[..count]).is_err() {
            break;
        }
    }
    let _gone = source.shutdown(Shutdown::Both);
    let _gone = sink.shutdown(Shutdown::Both);
}

fn is_timeout(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{Interrupted, TimedOut, WouldBlock};
    matches!(error.kind(), WouldBlock | TimedOut | Interrupted)
}

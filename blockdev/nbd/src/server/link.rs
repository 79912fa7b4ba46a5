//! A socket, with or without TLS. Reading and writing never wait; waiting is another call.

use std::io::{self, IoSlice, Read, Write};
use std::sync::Arc;

use parking_lot::Mutex;
use rustls::{ServerConfig, ServerConnection};
use tokio::net::{TcpStream, UnixStream};

/// A connected socket.
pub(crate) enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Socket {
    fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.try_read(buffer),
            Self::Tcp(stream) => stream.try_read(buffer),
        }
    }

    fn try_write(&self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.try_write_vectored(parts),
            Self::Tcp(stream) => stream.try_write_vectored(parts),
        }
    }

    async fn readable(&self) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.readable().await,
            Self::Tcp(stream) => stream.readable().await,
        }
    }

    async fn writable(&self) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.writable().await,
            Self::Tcp(stream) => stream.writable().await,
        }
    }
}

/// The socket as TLS wants it.
struct Raw<'a>(&'a Socket);

impl Read for Raw<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.try_read(buffer)
    }
}

impl Write for Raw<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.try_write(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        self.0.try_write(parts)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A way to a peer.
pub(crate) struct Link {
    socket: Socket,
    tls: Option<Mutex<ServerConnection>>,
}

impl Link {
    pub(crate) fn plain(socket: Socket) -> Self {
        Self { socket, tls: None }
    }

    pub(crate) fn is_secure(&self) -> bool {
        self.tls.is_some()
    }

    /// Reads what is there.
    pub(crate) fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let Some(tls) = &self.tls else {
            return self.socket.try_read(buffer);
        };
        let mut tls = tls.lock();
        loop {
            match tls.reader().read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                read => return read,
            }
            if tls.read_tls(&mut Raw(&self.socket))? == 0 {
                return Ok(0);
            }
            let processed = tls.process_new_packets();
            // An alert, or the answer to a change of keys; what does not fit goes with the next
            // write.
            match push(&mut tls, &self.socket) {
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
                _ => {}
            }
            processed.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        }
    }

    /// Waits until some bytes are there, and reads them; 0 at the end.
    pub(crate) async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.try_read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.socket.readable().await?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                read => return read,
            }
        }
    }

    /// Sends what fits.
    pub(crate) fn try_write(&self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        let Some(tls) = &self.tls else {
            return self.socket.try_write(parts);
        };
        let mut tls = tls.lock();
        push(&mut tls, &self.socket)?;
        let written = tls.writer().write_vectored(parts)?;
        // The bytes are taken: that they wait for room is told by the next call.
        match push(&mut tls, &self.socket) {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
            _ => Ok(written),
        }
    }

    /// Sends what TLS has taken but not sent; `WouldBlock` while there is some left.
    pub(crate) fn try_flush(&self) -> io::Result<()> {
        match &self.tls {
            Some(tls) => push(&mut tls.lock(), &self.socket),
            None => Ok(()),
        }
    }

    pub(crate) async fn writable(&self) -> io::Result<()> {
        self.socket.writable().await
    }

    /// Sends all, waiting as long as it takes.
    pub(crate) async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        loop {
            let step = if bytes.is_empty() {
                self.try_flush().map(|()| 0)
            } else {
                self.try_write(&[IoSlice::new(bytes)])
            };
            match step {
                Ok(written) if bytes.is_empty() => {
                    debug_assert_eq!(written, 0);
                    return Ok(());
                }
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => bytes = bytes.get(written..).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.writable().await?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Goes over to TLS; gives the peer's certificate too, if it showed one.
    pub(crate) async fn start_tls(
        self,
        config: Arc<ServerConfig>,
    ) -> io::Result<(Self, Option<Vec<u8>>)> {
        let socket = self.socket;
        let mut tls = ServerConnection::new(config).map_err(io::Error::other)?;
        loop {
            match push(&mut tls, &socket) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    socket.writable().await?;
                    continue;
                }
                pushed => pushed?,
            }
            if !tls.is_handshaking() {
                break;
            }
            match tls.read_tls(&mut Raw(&socket)) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) => {
                    if let Err(error) = tls.process_new_packets() {
                        let _alert = push(&mut tls, &socket);
                        return Err(io::Error::new(io::ErrorKind::InvalidData, error));
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    socket.readable().await?;
                }
                Err(error) => return Err(error),
            }
        }
        let shown = tls.peer_certificates().and_then(|chain| chain.first());
        let certificate = shown.map(|certificate| certificate.as_ref().to_vec());
        let tls = Some(Mutex::new(tls));
        Ok((Self { socket, tls }, certificate))
    }

    /// Tells the peer that nothing more comes. What does not fit is not waited for.
    pub(crate) fn say_goodbye(&self) {
        if let Some(tls) = &self.tls {
            let mut tls = tls.lock();
            tls.send_close_notify();
            let _unsent = push(&mut tls, &self.socket);
        }
    }
}

/// Sends what TLS has ready.
fn push(tls: &mut ServerConnection, socket: &Socket) -> io::Result<()> {
    while tls.wants_write() {
        tls.write_tls(&mut Raw(socket))?;
    }
    Ok(())
}

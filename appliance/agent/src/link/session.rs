//! One connection: messages in, messages out, until it breaks.

use std::sync::Arc;
use std::time::{Duration, Instant};

use afterimage_protocol::message::FromReceiver;
use afterimage_protocol::sender::{Outgoing, RecordSource, Sender};
use afterimage_protocol::wire::{self, PREFIX_BYTES};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::run::{LinkHost, SessionEnd};
use crate::config::{LinkConfig, ms};
use crate::pipeline::FrameBytes;

struct State {
    sender: Sender,
    heard: Instant,
    waits_since: Option<Instant>,
}

struct Session<H> {
    host: Arc<H>,
    state: Mutex<State>,
}

/// Serves a connection until it ends.
pub(super) async fn serve<H, S>(host: Arc<H>, stream: S, config: &LinkConfig) -> SessionEnd
where
    H: LinkHost,
    S: AsyncRead + AsyncWrite + Send + 'static,
{
    let sender = Sender::new(host.identity(), host.declared());
    let state = State {
        sender,
        heard: Instant::now(),
        waits_since: None,
    };
    let session = Arc::new(Session {
        host,
        state: Mutex::new(state),
    });
    let (reading, writing) = tokio::io::split(stream);
    let mut reader = tokio::spawn({
        let session = Arc::clone(&session);
        async move { session.read(reading).await }
    });
    let end = tokio::select! {
        end = &mut reader => end.unwrap_or_else(|_| SessionEnd::broken("the reader failed")),
        end = session.write(writing, config) => end,
    };
    reader.abort();
    end
}

impl<H: LinkHost> Session<H> {
    async fn read(&self, mut stream: impl AsyncRead + Unpin) -> SessionEnd {
        loop {
            match read_message(&mut stream).await {
                Ok(message) => {
                    if let Err(end) = self.take(message) {
                        return end;
                    }
                }
                Err(what) => return SessionEnd::broken(&what),
            }
            self.host.wake().notify_one();
        }
    }

    fn take(&self, message: FromReceiver) -> Result<(), SessionEnd> {
        let result = {
            let mut state = self.state.lock();
            state.heard = Instant::now();
            state.sender.receive(message)
        };
        let events = result.map_err(|error| SessionEnd::from_error(&error))?;
        for event in events {
            self.host.event(event)?;
        }
        Ok(())
    }

    async fn write(&self, mut stream: impl AsyncWrite + Unpin, config: &LinkConfig) -> SessionEnd {
        let mut source = self.host.source();
        let mut ticks = tokio::time::interval(ms(config.report_interval_ms));
        let silence = ms(config.silence_ms);
        loop {
            if let Some(end) = self.host.stop_reason() {
                return end;
            }
            if self.host.is_stopping() {
                return self.close(stream, &mut source, silence).await;
            }
            match self.write_all(&mut stream, &mut source, silence).await {
                Ok(()) => {}
                Err(what) => return SessionEnd::broken(&what),
            }
            tokio::select! {
                () = self.host.wake().notified() => {
                    if self.host.take_report_due() {
                        self.tick();
                    }
                }
                _ = ticks.tick() => {
                    if self.is_silent(silence) {
                        return SessionEnd::broken("the appliance does not answer");
                    }
                    self.tick();
                }
            }
        }
    }

    /// Ends the stream and the connection in order.
    async fn close(
        &self,
        mut stream: impl AsyncWrite + Unpin,
        source: &mut impl RecordSource<Bytes = FrameBytes>,
        silence: Duration,
    ) -> SessionEnd {
        self.state.lock().sender.close();
        let written = self.write_all(&mut stream, source, silence).await;
        let closed = tokio::time::timeout(silence, stream.shutdown()).await;
        if written.is_err() || !matches!(closed, Ok(Ok(()))) {
            tracing::debug!("the connection could not be closed in order");
        }
        SessionEnd::broken("the agent stops")
    }

    /// Writes whatever may be sent now.
    async fn write_all(
        &self,
        stream: &mut (impl AsyncWrite + Unpin),
        source: &mut impl RecordSource<Bytes = FrameBytes>,
        silence: Duration,
    ) -> Result<(), String> {
        let mut is_flushed = true;
        while let Some(outgoing) = self.next(source) {
            is_flushed = false;
            let written = tokio::time::timeout(silence, write_message(stream, &outgoing)).await;
            written
                .map_err(|_| "the appliance takes nothing")?
                .map_err(|e| e.to_string())?;
        }
        if !is_flushed {
            let flushed = tokio::time::timeout(silence, stream.flush()).await;
            flushed
                .map_err(|_| "the appliance takes nothing")?
                .map_err(|e| e.to_string())?;
        }
        Ok(())
    }

    fn next(
        &self,
        source: &mut impl RecordSource<Bytes = FrameBytes>,
    ) -> Option<Outgoing<FrameBytes>> {
        let mut state = self.state.lock();
        for description in self.host.take_declares() {
            state.sender.declare(description);
        }
        let before = state.sender.sent();
        let outgoing = state.sender.next(source);
        if state.sender.sent() != before {
            self.host.sent();
        }
        outgoing
    }

    fn tick(&self) {
        let mut state = self.state.lock();
        if state.sender.is_streaming() {
            state.sender.report(self.host.report());
        }
    }

    /// Something was sent long ago and nothing was heard since.
    fn is_silent(&self, silence: Duration) -> bool {
        let mut state = self.state.lock();
        if !state.sender.is_waiting() {
            state.waits_since = None;
            return false;
        }
        let now = Instant::now();
        let since = *state.waits_since.get_or_insert(now);
        now.duration_since(since.max(state.heard)) > silence
    }
}

async fn read_message(stream: &mut (impl AsyncRead + Unpin)) -> Result<FromReceiver, String> {
    let mut prefix = [0; PREFIX_BYTES];
    stream
        .read_exact(&mut prefix)
        .await
        .map_err(|error| error.to_string())?;
    let length = wire::decode_prefix(prefix).map_err(|error| error.to_string())?;
    let mut bytes = vec![0; length];
    stream
        .read_exact(&mut bytes)
        .await
        .map_err(|error| error.to_string())?;
    wire::decode(&bytes).map_err(|error| error.to_string())
}

async fn write_message(
    stream: &mut (impl AsyncWrite + Unpin),
    outgoing: &Outgoing<FrameBytes>,
) -> std::io::Result<()> {
    let head = outgoing.head().map_err(std::io::Error::other)?;
    stream.write_all(&head).await?;
    stream.write_all(outgoing.body()).await
}

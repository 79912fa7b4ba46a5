//! One connection, from its greeting to its end.

use std::io;
use std::sync::Arc;

use tokio::time::timeout;

use super::Server;
use super::link::{Link, Socket};
use super::listen::Stopping;
use super::outbox::Outbox;
use super::pending::Replies;
use super::transmission::{Ended, Maps, Transmission};
use crate::export::{AllocationMap, Export, ExtentMap, Peer, Refusal};
use crate::negotiation::{CloseReason, Negotiation, Question, Session, Step, TlsPolicy};
use crate::number::flag;
use crate::option::{ContextQuery, ExportFacts, OptionError};
use crate::request::PAYLOAD_BYTES_MAX;

const BASE_ALLOCATION: &str = "base:allocation";
/// What a client does best to ask for at once.
const PREFERRED_BYTES: u32 = 4096;

/// Why there is no transmission.
#[derive(Debug, thiserror::Error)]
enum NoSession {
    #[error("{0}")]
    Closed(CloseReason),
    #[error("the connection broke: {0}")]
    Io(#[from] io::Error),
    #[error("{0}")]
    NoTls(String),
    #[error("the client closed the connection")]
    Gone,
}

/// A handshake and what it has opened so far.
struct Handshake {
    server: Arc<Server>,
    link: Link,
    peer: Peer,
    opened: Option<(String, Arc<Export>)>,
    contexts: Vec<(String, Arc<dyn ExtentMap>)>,
    /// Why the peer gets nothing, which every option is answered with.
    refusal: Option<Refusal>,
}

/// What a handshake ends with.
struct Agreed {
    link: Link,
    session: Session,
    export: Arc<Export>,
    maps: Maps,
}

impl Server {
    /// Serves one connection to its end.
    pub(super) async fn connection(
        self: Arc<Self>,
        socket: Socket,
        peer: Peer,
        mut stopping: Stopping,
    ) {
        let from = peer.address;
        let handshake = Handshake {
            server: Arc::clone(&self),
            link: Link::plain(socket),
            peer,
            opened: None,
            contexts: Vec::new(),
            refusal: None,
        };
        let patience = self.settings.handshake_timeout;
        let agreed = tokio::select! {
            agreed = timeout(patience, handshake.run()) => agreed,
            () = stopping.stopped() => return,
        };
        let agreed = match agreed {
            Ok(Ok(agreed)) => agreed,
            Ok(Err(reason)) => {
                tracing::debug!(?from, %reason, "no NBD session");
                return;
            }
            Err(_) => {
                tracing::debug!(?from, "no NBD session: the handshake took too long");
                return;
            }
        };
        let name = agreed.export.name.clone();
        tracing::info!(?from, export = %name, style = ?agreed.session.style, "NBD session");
        let ended = self.transmit(agreed, stopping).await;
        tracing::info!(?from, export = %name, reason = %ended, "NBD session ended");
    }

    async fn transmit(&self, agreed: Agreed, mut stopping: Stopping) -> Ended {
        let settings = self.settings;
        let link = Arc::new(agreed.link);
        let outbox = Outbox::new(
            Arc::clone(&link),
            settings.in_flight_requests,
            settings.in_flight_bytes,
        );
        let replies = Arc::new(Replies::new(outbox, agreed.session.style));
        let writer = tokio::spawn({
            let replies = Arc::clone(&replies);
            async move { replies.outbox.run().await }
        });
        let ended = {
            let opened = (agreed.export, agreed.maps);
            let (link, replies) = (Arc::clone(&link), Arc::clone(&replies));
            let rest = &agreed.session.rest;
            let mut transmission = Transmission::new(link, replies, opened, settings, rest);
            tokio::select! {
                ended = transmission.run() => ended,
                () = stopping.stopped() => Ended::Disconnect,
            }
        };
        replies.outbox.end_batch();
        if matches!(ended, Ended::Disconnect | Ended::Closed) {
            // What was asked is answered yet, as long as somebody reads it.
            let drained = timeout(settings.goodbye, replies.outbox.drained()).await;
            if drained.is_ok() {
                link.say_goodbye();
            }
        }
        replies.outbox.break_off();
        writer.abort();
        ended
    }
}

impl Handshake {
    async fn run(mut self) -> Result<Agreed, NoSession> {
        let tls = match (&self.server.tls, self.peer.address) {
            (Some(_), Some(_)) => TlsPolicy::Required,
            _ => TlsPolicy::Absent,
        };
        if tls == TlsPolicy::Absent {
            self.admit().await;
        }
        let mut machine = Negotiation::new(tls);
        let mut buffer = vec![0; 16 << 10];
        loop {
            let step = machine.step();
            let output = machine.take_output();
            if !output.is_empty() {
                self.link.write_all(&output).await?;
            }
            match step {
                Step::NeedInput => {
                    let count = self.link.read(&mut buffer).await?;
                    if count == 0 {
                        return Err(NoSession::Gone);
                    }
                    machine.feed(buffer.get(..count).unwrap_or_default());
                }
                Step::Close(reason) => {
                    self.link.say_goodbye();
                    return Err(NoSession::Closed(reason));
                }
                Step::Transmission(session) => return self.agree(session),
                Step::Ask(Question::StartTls) => {
                    self = self.start_tls().await?;
                    machine.tls_started();
                    self.admit().await;
                }
                Step::Ask(question) => self.answer(&mut machine, question).await,
            }
        }
    }

    async fn admit(&mut self) {
        self.refusal = self.server.exports.admit(&self.peer).await.err();
    }

    fn must_be_admitted(&self) -> Result<(), OptionError> {
        match &self.refusal {
            Some(refusal) => Err(OptionError::from(refusal.clone())),
            None => Ok(()),
        }
    }

    /// Goes over to TLS, and forgets what was opened before.
    async fn start_tls(self) -> Result<Self, NoSession> {
        let Some(config) = self.server.tls.clone() else {
            return Err(NoSession::NoTls("there is no TLS here".to_owned()));
        };
        let (link, certificate) = self.link.start_tls(config).await?;
        Ok(Self {
            link,
            peer: Peer {
                certificate,
                ..self.peer
            },
            opened: None,
            contexts: Vec::new(),
            refusal: None,
            server: self.server,
        })
    }

    async fn answer(&mut self, machine: &mut Negotiation, question: Question) {
        match question {
            Question::List => {
                let listed = match self.must_be_admitted() {
                    Ok(()) => {
                        let listed = self.server.exports.list(&self.peer).await;
                        listed.map_err(OptionError::from)
                    }
                    Err(refused) => Err(refused),
                };
                machine.listed(listed);
            }
            Question::Open(name) => {
                let opened = self.open(&name).await;
                machine.opened(opened.map(|export| facts(&export)));
            }
            Question::Contexts { query, is_set } => {
                let found = self.find_contexts(&query, is_set).await;
                machine.contexts(found);
            }
            Question::StartTls => {}
        }
    }

    /// Opens an export; several options for one name mean one opening.
    async fn open(&mut self, name: &str) -> Result<Arc<Export>, OptionError> {
        self.must_be_admitted()?;
        if let Some((known, export)) = &self.opened
            && known == name
        {
            return Ok(Arc::clone(export));
        }
        (self.opened, self.contexts) = (None, Vec::new());
        let export = self.server.exports.open(&self.peer, name).await?;
        self.opened = Some((name.to_owned(), Arc::clone(&export)));
        Ok(export)
    }

    async fn find_contexts(
        &mut self,
        query: &ContextQuery,
        is_set: bool,
    ) -> Result<Vec<String>, OptionError> {
        let export = self.open(&query.export).await?;
        if !is_set {
            return list_contexts(&export, &query.queries).await;
        }
        self.contexts.clear();
        for name in &query.queries {
            if self.contexts.iter().any(|(known, _)| known == name) {
                continue;
            }
            let map = if name == BASE_ALLOCATION {
                let device = Arc::clone(&export.device);
                Some(Arc::new(AllocationMap(device)) as Arc<dyn ExtentMap>)
            } else {
                export.contexts.open(name).await?
            };
            self.contexts.extend(map.map(|map| (name.clone(), map)));
        }
        Ok(self.contexts.iter().map(|(name, _)| name.clone()).collect())
    }

    fn agree(self, session: Session) -> Result<Agreed, NoSession> {
        let Some((_, export)) = self.opened else {
            return Err(NoSession::Gone);
        };
        let map = |name: &String| {
            let found = self.contexts.iter().find(|(known, _)| known == name);
            found.map(|(_, map)| Arc::clone(map))
        };
        let maps = session.contexts.iter().filter_map(map).collect();
        Ok(Agreed {
            link: self.link,
            session,
            export,
            maps: Arc::new(maps),
        })
    }
}

async fn list_contexts(export: &Export, queries: &[String]) -> Result<Vec<String>, OptionError> {
    let mut found: Vec<String> = Vec::new();
    let everything = [String::new()];
    let queries = if queries.is_empty() {
        &everything
    } else {
        queries
    };
    for query in queries {
        // A query without an end, such as `base:`, means all of them.
        if query.is_empty() || query == "base:" || query == BASE_ALLOCATION {
            found.push(BASE_ALLOCATION.to_owned());
        }
        found.extend(export.contexts.list(query).await?);
    }
    found.sort();
    found.dedup();
    Ok(found)
}

fn facts(export: &Export) -> ExportFacts {
    let geometry = export.device.geometry();
    let mut flags = flag::HAS_FLAGS | flag::SEND_CACHE;
    if geometry.is_read_only {
        flags |= flag::READ_ONLY;
    } else {
        flags |= flag::SEND_FLUSH
            | flag::SEND_FUA
            | flag::SEND_TRIM
            | flag::SEND_WRITE_ZEROES
            | flag::SEND_FAST_ZERO;
    }
    if export.can_multi_conn {
        flags |= flag::CAN_MULTI_CONN;
    }
    let smallest = geometry.logical_block_bytes;
    ExportFacts {
        size_bytes: geometry.size_bytes,
        flags,
        block_bytes: (smallest, smallest.max(PREFERRED_BYTES), PAYLOAD_BYTES_MAX),
        name: export.name.clone(),
        description: export.description.clone(),
    }
}

//! From the name of an export to a device.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Weak};

use afterimage_blockdev::{HistoryId, Lsn, PointId};
use afterimage_nbd::{Answer, Contexts, Export, Exports, ListedExport, NoContexts, Peer, Refusal};
use afterimage_protocol::rest::branch::BRANCH_MARK;
use afterimage_protocol::rest::server::Point;
use afterimage_seed::At;
use parking_lot::Mutex;
use rustls_pki_types::CertificateDer;

use super::changes::SincePoints;
use super::refuse::{gone, refusal};
use crate::appliance::Appliance;
use crate::ca::{PeerCertificate, PeerIdentity};
use crate::engine::{Command, EngineHandle, ViewRequest};
use crate::mounts::INCOMPLETE_KIND;

/// Points asked of the engine at once.
const PAGE: usize = 1000;

/// A state of a disk that does not change, or a branch.
#[derive(Clone, PartialEq, Eq, Hash)]
enum Shared {
    /// By its name too: it is told to clients.
    Cut(String, HistoryId, Lsn),
    Branch(HistoryId),
}

/// The exports of this appliance.
pub struct StoreExports {
    appliance: Arc<Appliance>,
    /// What connections have open. One state is one device, whoever shows it.
    open: Mutex<HashMap<Shared, Weak<Export>>>,
}

/// The newest points of a machine, oldest first; at most `limit`.
pub(super) async fn points_of(
    engine: &EngineHandle,
    machine: &str,
    limit: usize,
) -> Result<Vec<Point>, Refusal> {
    let mut newest = VecDeque::new();
    let mut after = PointId(0);
    loop {
        let machine = machine.to_owned();
        let asked = engine.ask(|reply| Command::ListPoints {
            machine,
            after,
            limit: PAGE,
            reply,
        });
        let page = asked
            .await
            .map_err(gone)?
            .map_err(|error| refusal(&error))?;
        let Some(last) = page.points.last().map(|point| point.id) else {
            return Ok(newest.into());
        };
        if last <= after {
            return Ok(newest.into());
        }
        after = last;
        let shown = page
            .points
            .into_iter()
            .filter(|point| point.kind != INCOMPLETE_KIND);
        newest.extend(shown);
        while newest.len() > limit {
            newest.pop_front();
        }
    }
}

/// Says whether a name means the same state for ever.
fn is_fixed(name: &str) -> bool {
    let at = name.split_once('@').and_then(|(_, at)| at.parse().ok());
    matches!(at, Some(At::Name(_) | At::Lsn(..)))
}

impl StoreExports {
    /// Makes the exports of an appliance.
    #[must_use]
    pub fn new(appliance: Arc<Appliance>) -> Arc<Self> {
        Arc::new(Self {
            appliance,
            open: Mutex::default(),
        })
    }

    fn listed_max(&self) -> usize {
        self.appliance.config.nbd.points_listed_max
    }

    async fn may_ask(&self, peer: &Peer) -> Result<(), Refusal> {
        let Some(address) = peer.address else {
            // The Unix socket lets only root in.
            return Ok(());
        };
        let refused = |why: &str| {
            let text = format!("{address} was refused at the NBD port: {why}");
            self.appliance.events.note("nbd-refused", text);
            Refusal::NotAllowed(format!("{why}; use one of `aft cert issue-admin`"))
        };
        let shown = peer.certificate.as_ref();
        let read = shown.and_then(|der| PeerCertificate::read(&CertificateDer::from(&der[..])));
        let Some(certificate) = read else {
            return Err(refused("the certificate names nobody"));
        };
        let PeerIdentity::Admin(_) = certificate.identity else {
            return Err(refused("an agent's certificate does not allow this"));
        };
        let is_valid = self
            .appliance
            .catalogue
            .run(move |catalogue| catalogue.is_valid(&certificate.serial, &certificate.identity))
            .await;
        match is_valid {
            Ok(true) => Ok(()),
            Ok(false) => Err(refused("the certificate was revoked")),
            Err(error) => Err(Refusal::Unavailable(error.to_string())),
        }
    }

    /// Lists what can be opened.
    ///
    /// # Errors
    /// When the engine does not answer.
    pub async fn names(&self) -> Result<Vec<ListedExport>, Refusal> {
        let engine = &self.appliance.engine;
        let status = engine.ask(Command::Status).await.map_err(gone)?;
        let mut all = Vec::new();
        for machine in &status.machines {
            let points = points_of(engine, &machine.machine.to_string(), self.listed_max()).await?;
            for disk in machine.disks.iter().filter(|disk| disk.has_copy) {
                let place = format!("{}/{}", machine.name, disk.name);
                all.push(ListedExport {
                    name: format!("{place}@latest"),
                    description: "the newest state, another one for each connection".to_owned(),
                });
                all.extend(points.iter().map(|point| ListedExport {
                    name: format!("{place}@{}", point.name),
                    description: format!("{} point at LSN {}", point.kind, point.lsn),
                }));
            }
        }
        let mounts = Arc::clone(&self.appliance.mounts);
        let branches = tokio::task::spawn_blocking(move || mounts.branches())
            .await
            .map_err(|error| Refusal::Unavailable(error.to_string()))?
            .map_err(|error| refusal(&error))?;
        let named = branches.iter().filter(|branch| !branch.disk.is_empty());
        all.extend(named.map(|branch| {
            let (machine, disk, name) = (&branch.machine, &branch.disk, &branch.name);
            ListedExport {
                name: format!("{machine}/{disk}{BRANCH_MARK}{name}"),
                description: format!("branch from LSN {}, writable", branch.base),
            }
        }));
        Ok(all)
    }

    async fn view(&self, name: &str) -> Result<Arc<Export>, Refusal> {
        let request = ViewRequest {
            reference: name.to_owned(),
            allow_incomplete: false,
        };
        let engine = &self.appliance.engine;
        let asked = engine.ask(|reply| Command::OpenView(request, reply));
        let view = asked
            .await
            .map_err(gone)?
            .map_err(|error| refusal(&error))?;
        let is_fixed = is_fixed(name);
        let since = SincePoints::new(engine.clone(), &view, self.listed_max());
        let contexts: Arc<dyn Contexts> = match since {
            Some(since) => Arc::new(since),
            None => Arc::new(NoContexts),
        };
        let (history, lsn) = (view.history, view.lsn);
        // The name of this very state, whatever was asked for.
        let exact = match name.split_once('@') {
            _ if is_fixed => name.to_owned(),
            Some((place, _)) => format!("{place}@{history}:lsn:{lsn}"),
            None => format!("{name}@{history}:lsn:{lsn}"),
        };
        let export = Export {
            name: exact.clone(),
            description: format!("{name} at LSN {lsn}"),
            device: view.device,
            can_multi_conn: is_fixed,
            is_zeroing_fast: false,
            contexts,
        };
        Ok(self.share(Shared::Cut(exact, history, lsn), export))
    }

    async fn branch(&self, name: &str) -> Result<Arc<Export>, Refusal> {
        let mounts = Arc::clone(&self.appliance.mounts);
        let reference = name.to_owned();
        let lent = tokio::task::spawn_blocking(move || mounts.lend_branch(&reference))
            .await
            .map_err(|error| Refusal::Unavailable(error.to_string()))?
            .map_err(|error| refusal(&error))?;
        let history = lent.history();
        let export = Export {
            name: name.to_owned(),
            description: format!("branch {history}"),
            device: Arc::new(lent),
            can_multi_conn: true,
            is_zeroing_fast: true,
            contexts: Arc::new(NoContexts),
        };
        Ok(self.share(Shared::Branch(history), export))
    }

    /// Gives what others have open already, if it is the same.
    fn share(&self, key: Shared, export: Export) -> Arc<Export> {
        let mut open = self.open.lock();
        if let Some(known) = open.get(&key).and_then(Weak::upgrade) {
            return known;
        }
        open.retain(|_, export| export.strong_count() > 0);
        let export = Arc::new(export);
        open.insert(key, Arc::downgrade(&export));
        export
    }
}

impl Exports for StoreExports {
    fn admit<'a>(&'a self, peer: &'a Peer) -> Answer<'a, ()> {
        Box::pin(self.may_ask(peer))
    }

    fn list<'a>(&'a self, _peer: &'a Peer) -> Answer<'a, Vec<ListedExport>> {
        Box::pin(self.names())
    }

    fn open<'a>(&'a self, _peer: &'a Peer, name: &'a str) -> Answer<'a, Arc<Export>> {
        Box::pin(async move {
            if name.is_empty() {
                let text = "there is no default export; name one, such as web1/root@latest";
                return Err(Refusal::Unknown(text.to_owned()));
            }
            if name.contains(BRANCH_MARK) {
                return self.branch(name).await;
            }
            self.view(name).await
        })
    }
}

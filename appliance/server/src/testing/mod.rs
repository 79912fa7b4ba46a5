//! Fixtures of this crate's tests: an appliance whose engine is a thread that answers what a test
//! sets up, and clients that speak to it over real TLS.

mod agent;
mod engine;

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use afterimage_blockdev::{
    AgentId, Clock, Entropy, MachineId, Monotonic, SystemClock, SystemEntropy, Timestamp,
};
use rcgen::{CertificateParams, KeyPair};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;

pub(crate) use agent::{Wire, client_config, connect, control, local};
pub(crate) use engine::{BRANCH, FakeEngine, TRUNK, filled, machine, point, read_only};

use crate::appliance::Appliance;
use crate::ca::{Authority, Lifetime, ServerIdentity};
use crate::catalogue::{Catalogue, NewCertificate};
use crate::config::Config;
use crate::events::EventLog;
use crate::ingest::{self, Ingest, LiveStreams, Reports};
use crate::mounts::{MountPlaces, Mounts};
use crate::scrub::Scrub;
use crate::tls::{ClientAuth, server_config};

/// The machine's clock, moved.
pub(crate) struct MovedClock {
    clock: SystemClock,
    ahead_ns: AtomicU64,
}

impl MovedClock {
    pub(crate) fn advance(&self, by: Duration) {
        let by = u64::try_from(by.as_nanos()).unwrap();
        self.ahead_ns.fetch_add(by, Ordering::SeqCst);
    }
}

impl Clock for MovedClock {
    fn monotonic(&self) -> Monotonic {
        self.clock.monotonic()
    }

    fn wall(&self) -> Timestamp {
        Timestamp(self.clock.wall().0 + self.ahead_ns.load(Ordering::SeqCst))
    }
}

/// Who connects: a certificate and its key.
#[derive(Debug)]
pub(crate) struct Identity {
    pub(crate) certificate: CertificateDer<'static>,
    pub(crate) key: PrivateKeyDer<'static>,
}

impl Clone for Identity {
    fn clone(&self) -> Self {
        Self {
            certificate: self.certificate.clone(),
            key: self.key.clone_key(),
        }
    }
}

/// A key of an agent, and its request for a certificate.
pub(crate) fn request() -> (KeyPair, String) {
    let key = KeyPair::generate().unwrap();
    let request = CertificateParams::default()
        .serialize_request(&key)
        .unwrap();
    (key, request.pem().unwrap())
}

pub(crate) fn key_der(key: &KeyPair) -> PrivateKeyDer<'static> {
    PrivateKeyDer::try_from(key.serialize_der()).unwrap()
}

/// An appliance in a directory of its own.
pub(crate) struct Fixture {
    pub(crate) appliance: Arc<Appliance>,
    pub(crate) engine: Arc<FakeEngine>,
    pub(crate) clock: Arc<MovedClock>,
    pub(crate) directory: TempDir,
    identity: Arc<ServerIdentity>,
    pub(crate) stop: watch::Sender<bool>,
}

impl Fixture {
    pub(crate) fn start() -> Self {
        Self::with(Config::default())
    }

    pub(crate) fn with(config: Config) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let data_dir = directory.path();
        let clock = Arc::new(MovedClock {
            clock: SystemClock::default(),
            ahead_ns: AtomicU64::new(0),
        });
        let shared: Arc<dyn Clock> = clock.clone();
        let entropy: Arc<dyn Entropy> = Arc::new(SystemEntropy);
        let authority =
            Arc::new(Authority::open(&data_dir.join("ca"), clock.wall(), &*entropy).unwrap());
        let events_max = config.control.events_max;
        let catalogue = Catalogue::open(&data_dir.join("catalogue.db"), events_max).unwrap();
        let (engine, handle) = FakeEngine::start();
        let places = MountPlaces {
            root: data_dir.join("mounts"),
            overlays: data_dir.join("overlays"),
        };
        let backend = config.store.backend.into();
        let mounts = Mounts::start(
            handle.clone(),
            catalogue.clone(),
            Arc::clone(&shared),
            places,
            config.mounts.clone(),
            backend,
        )
        .unwrap();
        let identity = Arc::new(
            ServerIdentity::new(
                Arc::clone(&authority),
                vec!["localhost".to_owned()],
                Duration::from_secs(86_400),
                Arc::clone(&shared),
                Arc::clone(&entropy),
            )
            .unwrap(),
        );
        let events = EventLog::start(catalogue.clone(), Arc::clone(&shared));
        let scrub = Scrub::start(
            data_dir,
            config.scrub_settings(),
            handle.clone(),
            events.clone(),
            Arc::clone(&shared),
        );
        let appliance = Arc::new(Appliance {
            config,
            data_dir: directory.path().to_owned(),
            engine: handle,
            scrub: scrub.unwrap(),
            events,
            catalogue,
            authority,
            clock: shared,
            entropy,
            reports: Reports::default(),
            live: LiveStreams::default(),
            mounts: Arc::new(mounts),
            seeds: Arc::default(),
            vhost: crate::vhost::VhostSockets::default(),
            data_port: 9443,
            control_port: 8443,
            nbd_port: None,
        });
        let (stop, _) = watch::channel(false);
        Self {
            appliance,
            engine,
            clock,
            directory,
            identity,
            stop,
        }
    }

    /// Starts the data service.
    pub(crate) async fn serve_data(&self) -> (SocketAddr, JoinHandle<()>) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let identity = Arc::clone(&self.identity);
        let tls = server_config(&self.appliance.authority, identity, ClientAuth::Required).unwrap();
        let ingest = Ingest::new(Arc::clone(&self.appliance));
        (
            address,
            tokio::spawn(ingest::serve(ingest, listener, tls, self.stop.subscribe())),
        )
    }

    /// Starts the control service on TLS.
    pub(crate) async fn serve_control(&self) -> SocketAddr {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let identity = Arc::clone(&self.identity);
        let tls = server_config(&self.appliance.authority, identity, ClientAuth::Optional).unwrap();
        let appliance = Arc::clone(&self.appliance);
        let router = crate::control::router(Arc::clone(&appliance));
        let stop = self.stop.subscribe();
        tokio::spawn(crate::control::serve_tls(
            appliance, router, listener, tls, stop,
        ));
        address
    }

    /// Issues and notes an agent's certificate, from now on for `ttl`.
    pub(crate) fn agent(&self, agent: AgentId, ttl: Duration) -> Identity {
        let now = self.appliance.now();
        self.agent_within(agent, Lifetime::from_now(now, ttl))
    }

    pub(crate) fn agent_within(&self, agent: AgentId, lifetime: Lifetime) -> Identity {
        let (key, pem) = request();
        let entropy = &*self.appliance.entropy;
        let issued = self
            .appliance
            .authority
            .sign_agent(&pem, agent, lifetime, entropy)
            .unwrap();
        let noted = NewCertificate {
            serial: issued.serial.to_vec(),
            expires: issued.expires,
        };
        let now = self.appliance.now();
        let (catalogue, secret) = (&self.appliance.catalogue, rand_secret(entropy));
        let until = Timestamp(now.0 + 1_000_000_000_000);
        catalogue.add_token(&secret, now, until).unwrap();
        // A machine of its own, which no test uses.
        let spare = MachineId(agent.0.map(|byte| !byte));
        catalogue
            .enrol(&secret, agent, spare, &spare.to_string(), &noted, now)
            .unwrap();
        Identity {
            certificate: issued.certificate,
            key: key_der(&key),
        }
    }

    /// Waits for an event of a kind; gives its text.
    pub(crate) async fn event(&self, kind: &str) -> String {
        let (catalogue, kind) = (self.appliance.catalogue.clone(), kind.to_owned());
        let found = tokio::time::timeout(Duration::from_secs(20), async move {
            loop {
                let events = catalogue
                    .run(|catalogue| catalogue.events(0, 100))
                    .await
                    .unwrap();
                if let Some(event) = events.into_iter().find(|event| event.kind == kind) {
                    return event.text;
                }
                tokio::task::yield_now().await;
            }
        });
        found.await.expect("the event is noted")
    }

    /// An agent with a certificate and a grant for a machine.
    pub(crate) fn granted(&self, agent: AgentId, machine: MachineId) -> Identity {
        let identity = self.agent(agent, Duration::from_secs(3600));
        let now = self.appliance.now();
        self.appliance
            .catalogue
            .move_machine(machine, agent, now)
            .unwrap();
        identity
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        self.stop.send_replace(true);
        let mounts = Arc::clone(&self.appliance.mounts);
        // The tree asks the engine on threads of its own; a runtime's thread may not wait.
        std::thread::spawn(move || mounts.stop()).join().unwrap();
    }
}

pub(crate) fn rand_secret(entropy: &dyn Entropy) -> [u8; 32] {
    let mut secret = [0; 32];
    entropy.fill(&mut secret);
    secret
}

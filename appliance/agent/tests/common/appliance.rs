//! The port of the appliance.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use afterimage_blockdev::{Clock, ErrorClass, SystemClock};
use afterimage_cache::Frame;
use afterimage_protocol::message::{
    FromReceiver, FromSender, MarkRequestKind, PROTOCOL_VERSION, Refusal, RefusalCode,
    SourceReport, StreamId,
};
use afterimage_protocol::wire::{self, PREFIX_BYTES};
use parking_lot::Mutex;
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use rustls::RootCertStore;
use rustls::server::WebPkiClientVerifier;
use rustls_pki_types::PrivateKeyDer;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{broadcast, mpsc};
use tokio_rustls::TlsAcceptor;

use super::replica::{Replica, Shared, TAG_KEY, disk_secret};

#[derive(Default)]
struct Switches {
    is_cut: AtomicBool,
    is_sink: AtomicBool,
    refuses: Mutex<Option<Refusal>>,
    credit_bytes: AtomicU64,
    report: Mutex<Option<SourceReport>>,
    connections: AtomicU64,
}

pub struct Appliance {
    pub replica: Shared,
    switches: Arc<Switches>,
    cut: broadcast::Sender<()>,
    marks: broadcast::Sender<(u64, MarkRequestKind, String)>,
    port: u16,
    issuer: Issuer<'static, KeyPair>,
    authority_pem: String,
    _runtime: tokio::runtime::Runtime,
}

impl Appliance {
    pub fn start() -> Self {
        let authority_key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        let authority = params.self_signed(&authority_key).unwrap();
        let issuer = Issuer::new(params, authority_key);
        let server_key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["somebody".to_owned()]).unwrap();
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let server = params.signed_by(&server_key, &issuer).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(authority.der().clone()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let verifier =
            WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider));
        let key = PrivateKeyDer::try_from(server_key.serialize_der()).unwrap();
        let chain = vec![server.der().clone(), authority.der().clone()];
        let tls = rustls::ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_client_cert_verifier(verifier.build().unwrap())
            .with_single_cert(chain, key)
            .unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let port = listener.local_addr().unwrap().port();
        let replica = Replica::new();
        let switches: Arc<Switches> = Arc::default();
        switches.credit_bytes.store(8 << 20, Ordering::Relaxed);
        let (cut, marks) = (broadcast::Sender::new(16), broadcast::Sender::new(16));
        let serving = Serving {
            replica: Arc::clone(&replica),
            switches: Arc::clone(&switches),
            cut: cut.clone(),
            marks: marks.clone(),
            tls: TlsAcceptor::from(Arc::new(tls)),
        };
        runtime.spawn(serving.accept(listener));
        let authority_pem = authority.pem();
        Self {
            replica,
            switches,
            cut,
            marks,
            port,
            issuer,
            authority_pem,
            _runtime: runtime,
        }
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn authority_pem(&self) -> &str {
        &self.authority_pem
    }

    pub fn issue_client(&self) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        (certificate.pem(), key.serialize_pem())
    }

    /// Breaks connections and lets none come.
    pub fn cut(&self) {
        self.switches.is_cut.store(true, Ordering::SeqCst);
        let _nobody = self.cut.send(());
    }

    /// Breaks connections.
    pub fn drop_connections(&self) {
        let _nobody = self.cut.send(());
    }

    pub fn heal(&self) {
        self.switches.is_cut.store(false, Ordering::SeqCst);
    }

    pub fn connections(&self) -> u64 {
        self.switches.connections.load(Ordering::SeqCst)
    }

    pub fn set_credit(&self, bytes: u64) {
        self.switches.credit_bytes.store(bytes, Ordering::SeqCst);
    }

    pub fn refuse(&self, code: RefusalCode, class: ErrorClass) {
        let (message, hint) = ("it is refused".to_owned(), "do something".to_owned());
        *self.switches.refuses.lock() = Some(Refusal {
            code,
            class,
            message,
            hint,
        });
    }

    pub fn accept_again(&self) {
        *self.switches.refuses.lock() = None;
    }

    pub fn place_mark(&self, request: u64, name: &str) {
        let mark = (request, MarkRequestKind::Bookmark, name.to_owned());
        assert!(self.marks.send(mark).is_ok(), "somebody is connected");
    }

    /// Only counts frames from now on.
    pub fn become_sink(&self) {
        self.switches.is_sink.store(true, Ordering::SeqCst);
    }

    pub fn report(&self) -> Option<SourceReport> {
        self.switches.report.lock().clone()
    }
}

#[derive(Clone)]
struct Serving {
    replica: Shared,
    switches: Arc<Switches>,
    cut: broadcast::Sender<()>,
    marks: broadcast::Sender<(u64, MarkRequestKind, String)>,
    tls: TlsAcceptor,
}

impl Serving {
    async fn accept(self, listener: TcpListener) {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            if self.switches.is_cut.load(Ordering::SeqCst) {
                continue;
            }
            tokio::spawn(self.clone().serve(stream));
        }
    }

    async fn serve(self, stream: TcpStream) {
        let mut cut = self.cut.subscribe();
        let mut marks = self.marks.subscribe();
        let Ok(stream) = self.tls.accept(stream).await else {
            return;
        };
        self.switches.connections.fetch_add(1, Ordering::SeqCst);
        let (mut reading, writing) = tokio::io::split(stream);
        let (answers, queue) = mpsc::unbounded_channel();
        let writer = tokio::spawn(write(queue, writing));
        loop {
            tokio::select! {
                message = read(&mut reading) => {
                    let Some(message) = message else { break };
                    if !self.take(message, &answers) {
                        break;
                    }
                }
                mark = marks.recv() => {
                    let (request, kind, name) = mark.unwrap();
                    let stream = StreamId(1);
                    let mark = FromReceiver::PlaceMark { stream, request, kind, name };
                    let _gone = answers.send(mark);
                }
                _ = cut.recv() => break,
            }
        }
        drop(answers);
        if !self.switches.is_cut.load(Ordering::SeqCst) {
            let _written = writer.await;
        }
    }

    fn take(&self, message: FromSender, answers: &mpsc::UnboundedSender<FromReceiver>) -> bool {
        let mut replica = self.replica.lock();
        let credit_bytes = self.switches.credit_bytes.load(Ordering::SeqCst);
        let answer = match message {
            FromSender::Hello { .. } => FromReceiver::Welcome {
                version: PROTOCOL_VERSION,
                program: "test".to_owned(),
                time: SystemClock::default().wall(),
            },
            FromSender::Open {
                stream,
                history,
                epoch,
                ..
            } => {
                if let Some(refusal) = self.switches.refuses.lock().clone() {
                    let refused = FromReceiver::Refused {
                        stream: Some(stream),
                        refusal,
                    };
                    let _gone = answers.send(refused);
                    return false;
                }
                assert!(epoch.0 >= replica.epoch, "epochs never fall");
                replica.history = Some(history);
                replica.epoch = epoch.0;
                let (durable, highest) = (replica.durable, replica.highest);
                FromReceiver::Opened {
                    stream,
                    durable,
                    highest,
                    credit_bytes,
                    tag_key: TAG_KEY,
                }
            }
            FromSender::Declare {
                stream,
                description,
            } => {
                replica.declare(description.disk, description.size_bytes);
                let disk = &replica.disks[&description.disk];
                FromReceiver::Disk {
                    stream,
                    disk: description.disk,
                    key: 1,
                    secret: disk_secret(description.disk),
                    has_copy: disk.has_copy,
                    is_in_batch: disk.batch.is_some(),
                    bulk_done: disk.bulk_done.clone(),
                }
            }
            FromSender::Frame {
                stream,
                last,
                bytes,
                ..
            } => {
                if self.switches.is_sink.load(Ordering::SeqCst) {
                    replica.durable = last;
                } else {
                    replica.apply(&Frame::accept(bytes).unwrap());
                }
                FromReceiver::Acknowledged {
                    stream,
                    durable: replica.durable,
                    credit_bytes,
                }
            }
            FromSender::Bulk {
                stream,
                number,
                bytes,
            } => {
                replica.bulk(&Frame::accept(bytes).unwrap());
                FromReceiver::BulkAcknowledged {
                    stream,
                    numbers: vec![number],
                }
            }
            FromSender::Compare {
                stream,
                number,
                disk,
                first_block,
                tags,
            } => {
                let differs = replica.compare(disk, first_block, &tags);
                FromReceiver::Differences {
                    stream,
                    number,
                    differs,
                }
            }
            FromSender::Report { report, .. } => {
                *self.switches.report.lock() = Some(report);
                return true;
            }
            FromSender::Close { .. } => return true,
        };
        answers.send(answer).is_ok()
    }
}

async fn read(stream: &mut (impl AsyncRead + Unpin)) -> Option<FromSender> {
    let mut prefix = [0; PREFIX_BYTES];
    stream.read_exact(&mut prefix).await.ok()?;
    let mut bytes = vec![0; wire::decode_prefix(prefix).unwrap()];
    stream.read_exact(&mut bytes).await.ok()?;
    Some(wire::decode(&bytes).unwrap())
}

async fn write(
    mut queue: mpsc::UnboundedReceiver<FromReceiver>,
    mut stream: impl AsyncWrite + Unpin,
) {
    while let Some(message) = queue.recv().await {
        let bytes = wire::encode(&message).unwrap();
        if stream.write_all(&bytes).await.is_err() || stream.flush().await.is_err() {
            return;
        }
    }
}

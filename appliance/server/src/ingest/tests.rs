use std::time::Duration;

use afterimage_blockdev::{
    AgentId, BatchId, DiskId, Epoch, ErrorClass, HistoryId, Lsn, MachineId, SystemEntropy,
    Timestamp,
};
use afterimage_cache::{
    Frame, FrameBuilder, FrameIdentity, MarkKind, RecordHeader, RecordKind, Sealer, TagKey,
};
use afterimage_protocol::message::{
    DiskDescription, FromReceiver, FromSender, MarkRequestKind, PROTOCOL_VERSION, SourceReport,
    StreamId,
};
use afterimage_protocol::{Refusal, RefusalCode};

use crate::ca::Lifetime;
use crate::config::Config;
use crate::engine::StreamKey;
use crate::testing::{Fixture, Identity, Wire, client_config, connect};

const AGENT: AgentId = AgentId([3; 16]);
const MACHINE: MachineId = MachineId([1; 16]);
const HISTORY: HistoryId = HistoryId([2; 16]);
const DISK: DiskId = DiskId([5; 16]);
const STREAM: StreamId = StreamId(7);
const HOUR: Duration = Duration::from_secs(3600);

fn record(kind: RecordKind, lsn: u64) -> RecordHeader {
    let is_bulk = kind == RecordKind::Bulk;
    RecordHeader {
        kind,
        lsn: Lsn(lsn),
        previous: Lsn(0),
        time: Timestamp(1),
        disk: if is_bulk { DISK } else { DiskId::NIL },
        offset: 0,
        length: if is_bulk { 4096 } else { 0 },
        batch: BatchId(u32::from(is_bulk)),
        argument: 0,
    }
}

fn identity() -> FrameIdentity {
    FrameIdentity {
        machine: MACHINE,
        history: HISTORY,
        origin: AGENT,
        epoch: Epoch(1),
    }
}

fn sealed(identity: FrameIdentity, first: u64, last: u64) -> Frame {
    let mut builder = FrameBuilder::new(identity, false);
    for lsn in first..=last {
        builder.push_note(&record(RecordKind::Mark(MarkKind::Crash), lsn), &[7; 1000]);
    }
    builder.finish()
}

fn frame(first: u64, last: u64) -> FromSender {
    let bytes = sealed(identity(), first, last).bytes;
    FromSender::Frame {
        stream: STREAM,
        first: Lsn(first),
        last: Lsn(last),
        bytes,
    }
}

fn bulk(number: u64) -> FromSender {
    let mut builder = FrameBuilder::new(identity(), true);
    let mut sealer = Sealer::new(None, TagKey([1; 32]), &SystemEntropy);
    builder.push_data(&record(RecordKind::Bulk, 1), &[9; 4096], &mut sealer);
    FromSender::Bulk {
        stream: STREAM,
        number,
        bytes: builder.finish().bytes,
    }
}

fn hello() -> FromSender {
    FromSender::Hello {
        version: PROTOCOL_VERSION,
        program: "test".to_owned(),
    }
}

fn open() -> FromSender {
    FromSender::Open {
        stream: STREAM,
        machine: MACHINE,
        name: "web".to_owned(),
        history: HISTORY,
        parent: None,
        origin: AGENT,
        epoch: Epoch(1),
    }
}

async fn greeted(fixture: &Fixture, address: std::net::SocketAddr, identity: &Identity) -> Wire {
    let mut wire = Wire::open(fixture, address, identity).await;
    wire.send(&hello()).await;
    assert!(matches!(
        wire.next().await,
        Some(FromReceiver::Welcome { .. })
    ));
    wire
}

async fn opened(fixture: &Fixture, address: std::net::SocketAddr, identity: &Identity) -> Wire {
    let mut wire = greeted(fixture, address, identity).await;
    wire.send(&open()).await;
    assert!(matches!(
        wire.next().await,
        Some(FromReceiver::Opened { stream: STREAM, .. })
    ));
    wire
}

async fn refusal(wire: &mut Wire) -> Refusal {
    match wire.next().await {
        Some(FromReceiver::Refused { refusal, .. }) => refusal,
        other => panic!("not a refusal: {other:?}"),
    }
}

/// Says why nothing can be sent or read.
async fn handshake_error(fixture: &Fixture, identity: Option<&Identity>) -> String {
    let (address, _service) = fixture.serve_data().await;
    let config = client_config(fixture.appliance.authority.certificate(), identity);
    match connect(address, config).await {
        Err(error) => error.to_string(),
        // In TLS 1.3 the client is done before the server has looked at its certificate.
        Ok(stream) => {
            let mut wire = Wire { stream };
            let mut byte = [0];
            use tokio::io::AsyncReadExt;
            match wire.stream.read(&mut byte).await {
                Err(error) => error.to_string(),
                Ok(read) => panic!("{read} bytes came"),
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_unknown_gets_past_the_handshake() {
    let fixture = Fixture::start();
    let error = handshake_error(&fixture, None).await;
    assert!(error.to_lowercase().contains("certificate"), "{error}");

    let other = Fixture::start();
    let stranger = other.agent(AGENT, HOUR);
    let error = handshake_error(&fixture, Some(&stranger)).await;
    let is_named = [
        "unknownca",
        "decrypterror",
        "badcertificate",
        "unknown ca",
        "decrypt",
    ];
    let error = error.to_lowercase();
    assert!(is_named.iter().any(|name| error.contains(name)), "{error}");

    let config = client_config(other.appliance.authority.certificate(), Some(&stranger));
    let (address, _service) = fixture.serve_data().await;
    let error = connect(address, config).await.unwrap_err().to_string();
    assert!(error.contains("invalid peer certificate"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_certificate_is_refused_and_named() {
    let fixture = Fixture::start();
    let now = fixture.appliance.now().0;
    let hour = 3_600_000_000_000;
    let lifetime = Lifetime {
        from: Timestamp(now - 2 * hour),
        until: Timestamp(now - hour),
    };
    let expired = fixture.agent_within(AGENT, lifetime);
    let error = handshake_error(&fixture, Some(&expired))
        .await
        .to_lowercase();
    assert!(error.contains("expired"), "{error}");
    let event = fixture.event("certificate-expired").await;
    assert!(event.to_lowercase().contains("expired"), "{event}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_needs_a_grant_of_this_very_agent() {
    let fixture = Fixture::start();
    let (address, _service) = fixture.serve_data().await;
    let stranger = fixture.agent(AGENT, HOUR);
    let mut wire = greeted(&fixture, address, &stranger).await;
    wire.send(&open()).await;
    assert_eq!(refusal(&mut wire).await.code, RefusalCode::NoGrant);

    let other = AgentId([8; 16]);
    fixture.granted(other, MACHINE);
    wire.send(&open()).await;
    let refused = refusal(&mut wire).await;
    assert_eq!(refused.code, RefusalCode::HeldByOther);
    assert!(
        refused.hint.contains("aft machine move web"),
        "{}",
        refused.hint
    );

    let holder = fixture.granted(other, MACHINE);
    let mut wire = greeted(&fixture, address, &holder).await;
    wire.send(&open()).await;
    assert_eq!(refusal(&mut wire).await.code, RefusalCode::NoGrant);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_agent_opens_nothing() {
    let fixture = Fixture::start();
    let (address, _service) = fixture.serve_data().await;
    let agent = fixture.granted(AGENT, MACHINE);
    fixture
        .appliance
        .catalogue
        .revoke(AGENT, fixture.appliance.now())
        .unwrap();
    let mut wire = greeted(&fixture, address, &agent).await;
    wire.send(&open()).await;
    let refused = refusal(&mut wire).await;
    assert!(refused.message.contains("revoked"), "{}", refused.message);
}

/// A stream that is open ends as soon as its right is gone, and the engine hears of it; those of
/// others go on.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_is_cut_when_its_right_is_taken() {
    for is_revoked in [true, false] {
        let fixture = Fixture::start();
        let (address, _service) = fixture.serve_data().await;
        let agent = fixture.granted(AGENT, MACHINE);
        let mut wire = opened(&fixture, address, &agent).await;
        let key = fixture.engine.wait(|told| told.opened.first().copied());
        let (live, other) = (&fixture.appliance.live, AgentId([8; 16]));
        live.cut_agent(other, &super::revoked(other));
        live.cut_machine(MACHINE, AGENT, &super::held_by_other("web", other, AGENT));
        let expected = if is_revoked {
            let refusal = super::revoked(AGENT);
            live.cut_agent(AGENT, &refusal);
            refusal
        } else {
            let refusal = super::held_by_other("web", AGENT, other);
            live.cut_machine(MACHINE, other, &refusal);
            refusal
        };
        assert_eq!(refusal(&mut wire).await, expected);
        fixture
            .engine
            .wait(|told| told.closed.contains(&key).then_some(()));
        let reported = fixture.appliance.reports.get(MACHINE).unwrap();
        assert!(!reported.is_connected);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_durable_is_acknowledged_and_never_before() {
    let fixture = Fixture::start();
    let (address, _service) = fixture.serve_data().await;
    let agent = fixture.granted(AGENT, MACHINE);
    let mut wire = opened(&fixture, address, &agent).await;
    let key = fixture.engine.wait(|told| told.opened.first().copied());

    let description = DiskDescription {
        disk: DISK,
        name: "data".to_owned(),
        size_bytes: 1 << 20,
        logical_block_bytes: 512,
    };
    wire.send(&FromSender::Declare {
        stream: STREAM,
        description,
    })
    .await;
    assert!(matches!(
        wire.next().await,
        Some(FromReceiver::Disk {
            disk: DISK,
            key: 1,
            ..
        })
    ));

    wire.send(&frame(1, 3)).await;
    wire.send(&frame(4, 900)).await;
    wire.send(&bulk(1)).await;
    fixture
        .engine
        .wait(|told| (told.frames.len() == 2 && told.bulk.len() == 1).then_some(()));
    let tags = vec![[0; 16], [1; 16]];
    let (number, disk, first_block) = (1, DISK, 0);
    wire.send(&FromSender::Compare {
        stream: STREAM,
        number,
        disk,
        first_block,
        tags,
    })
    .await;
    // The first thing that comes is the answer: nothing was acknowledged yet.
    let answer = wire.next().await;
    assert!(
        matches!(
            &answer,
            Some(FromReceiver::Differences { differs, .. }) if *differs == [false, true]
        ),
        "{answer:?}"
    );

    let events = fixture.engine.events(key);
    events.durable(Lsn(3), std::time::Instant::now(), 0);
    let acknowledged = wire.next().await;
    assert!(
        matches!(
            acknowledged,
            Some(FromReceiver::Acknowledged {
                durable: Lsn(3),
                ..
            })
        ),
        "{acknowledged:?}"
    );
    events.bulk_durable(1);
    assert_eq!(
        wire.next().await,
        Some(FromReceiver::BulkAcknowledged {
            stream: STREAM,
            numbers: vec![1]
        })
    );
    events.place_mark(42, true, "before");
    let (request, kind, name) = (42, MarkRequestKind::Bookmark, "before".to_owned());
    assert_eq!(
        wire.next().await,
        Some(FromReceiver::PlaceMark {
            stream: STREAM,
            request,
            kind,
            name
        })
    );
    let full = Refusal {
        code: RefusalCode::NoSpace,
        class: ErrorClass::Retry,
        message: "full".to_owned(),
        hint: "make room".to_owned(),
    };
    events.paused(&full);
    assert_eq!(
        wire.next().await,
        Some(FromReceiver::Paused {
            refusal: full.clone()
        })
    );
    events.refused(&full);
    let stream = Some(STREAM);
    assert_eq!(
        wire.next().await,
        Some(FromReceiver::Refused {
            stream,
            refusal: full
        })
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_report_is_kept_and_outlives_its_stream() {
    let fixture = Fixture::start();
    let (address, _service) = fixture.serve_data().await;
    let agent = fixture.granted(AGENT, MACHINE);
    let mut wire = opened(&fixture, address, &agent).await;
    let report = SourceReport {
        captured: Lsn(5),
        ..SourceReport::default()
    };
    wire.send(&FromSender::Report {
        stream: STREAM,
        report: report.clone(),
    })
    .await;
    wire.send(&frame(1, 1)).await;
    let key = fixture
        .engine
        .wait(|told| told.frames.first().map(|frame| frame.0));
    let reported = fixture.appliance.reports.get(MACHINE).unwrap();
    assert_eq!(reported.report, Some(report.clone()));
    assert!(reported.is_connected && reported.is_behind);
    drop(wire);
    fixture
        .engine
        .wait(|told| told.closed.contains(&key).then_some(()));
    let reported = fixture.appliance.reports.get(MACHINE).unwrap();
    assert_eq!(reported.report, Some(report));
    assert!(!reported.is_connected);
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_and_foreign_frames_never_reach_the_engine() {
    let fixture = Fixture::start();
    let (address, _service) = fixture.serve_data().await;
    let agent = fixture.granted(AGENT, MACHINE);
    let whole = sealed(identity(), 1, 2).bytes;
    let mut flipped = whole.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 1;
    let foreign = sealed(
        FrameIdentity {
            machine: MachineId([6; 16]),
            ..identity()
        },
        1,
        2,
    )
    .bytes;
    let newer = sealed(
        FrameIdentity {
            epoch: Epoch(2),
            ..identity()
        },
        1,
        2,
    )
    .bytes;
    let cases = [
        (1, 2, flipped),
        (1, 2, whole[..whole.len() - 8].to_vec()),
        (1, 2, foreign),
        (1, 2, newer),
        (1, 3, whole.clone()),
        (1, 2, Vec::new()),
    ];
    for (first, last, bytes) in cases {
        let mut wire = opened(&fixture, address, &agent).await;
        let (first, last) = (Lsn(first), Lsn(last));
        wire.send(&FromSender::Frame {
            stream: STREAM,
            first,
            last,
            bytes,
        })
        .await;
        assert_eq!(refusal(&mut wire).await.code, RefusalCode::Damaged);
    }
    let mut wire = opened(&fixture, address, &agent).await;
    wire.send(&FromSender::Bulk {
        stream: STREAM,
        number: 1,
        bytes: whole,
    })
    .await;
    assert_eq!(refusal(&mut wire).await.code, RefusalCode::Damaged);
    fixture.engine.wait(|told| {
        assert!(told.frames.is_empty() && told.bulk.is_empty());
        Some(())
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_overruns_its_credit_is_refused_and_gives_its_memory_back() {
    let mut config = Config::default();
    config.ingest.credit_bytes = 1 << 20;
    let fixture = Fixture::with(config);
    let (address, _service) = fixture.serve_data().await;
    let agent = fixture.granted(AGENT, MACHINE);
    // Several times the memory of all connections goes through, all of it refused in the end.
    for round in 0..100 {
        let mut wire = opened(&fixture, address, &agent).await;
        wire.send(&frame(1, 900)).await;
        wire.send(&frame(901, 1800)).await;
        let refused = refusal(&mut wire).await;
        assert_eq!(refused.code, RefusalCode::Limit, "round {round}");
        let key = StreamKey(round + 1);
        fixture
            .engine
            .wait(|told| told.closed.contains(&key).then_some(()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_that_are_no_message_end_the_connection() {
    let fixture = Fixture::start();
    let (address, _service) = fixture.serve_data().await;
    let agent = fixture.granted(AGENT, MACHINE);
    for bytes in [&[0xFF; 64][..], &[1, 0, 0, 0, 99][..], &[0, 0, 0, 0][..]] {
        let mut wire = greeted(&fixture, address, &agent).await;
        wire.send_raw(bytes).await;
        assert_eq!(refusal(&mut wire).await.code, RefusalCode::Damaged);
        assert_eq!(wire.next().await, None);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_peer_is_dropped() {
    let mut config = Config::default();
    config.ingest.idle_timeout_ms = 50;
    let fixture = Fixture::with(config);
    let (address, _service) = fixture.serve_data().await;
    let agent = fixture.granted(AGENT, MACHINE);
    let mut wire = greeted(&fixture, address, &agent).await;
    assert_eq!(wire.next().await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_tells_the_agents_and_closes_their_streams() {
    let fixture = Fixture::start();
    let (address, service) = fixture.serve_data().await;
    let agent = fixture.granted(AGENT, MACHINE);
    let mut wire = opened(&fixture, address, &agent).await;
    let key = fixture.engine.wait(|told| told.opened.first().copied());
    fixture.stop.send_replace(true);
    assert_eq!(refusal(&mut wire).await.code, RefusalCode::ShuttingDown);
    assert_eq!(wire.next().await, None);
    service.await.unwrap();
    fixture
        .engine
        .wait(|told| told.closed.contains(&key).then_some(()));
}

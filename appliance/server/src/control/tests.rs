use std::time::Duration;

use afterimage_blockdev::{AgentId, DiskId, ErrorClass, Lsn, MachineId, Timestamp};
use afterimage_protocol::message::{DiskPhase, DiskReport, SourceReport};
use afterimage_protocol::rest::token::{TokenText, hex};
use afterimage_protocol::{Refusal, RefusalCode};
use axum::http::{Method, StatusCode};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use serde_json::{Value, json};

use super::status::describe;
use crate::engine::StreamKey;
use crate::ingest::{Delay, Reported};
use crate::testing::{
    Fixture, Identity, TRUNK, client_config, control, key_der, local, machine, request,
};

const AGENT: AgentId = AgentId([3; 16]);
const MACHINE: MachineId = MachineId([1; 16]);
const HOUR: Duration = Duration::from_secs(3600);

async fn get(fixture: &Fixture, path: &str) -> Value {
    let (status, answer) = local(fixture, Method::GET, path, &Value::Null).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    answer
}

async fn token(fixture: &Fixture, ttl_s: u64) -> TokenText {
    let body = json!({ "ttl_s": ttl_s });
    let (status, answer) = local(fixture, Method::POST, "/v1/tokens", &body).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    TokenText::parse(answer["token"].as_str().unwrap()).unwrap()
}

fn enrolment(token: &TokenText, request_pem: &str) -> Value {
    json!({
        "secret": hex(&token.secret),
        "agent": AGENT,
        "machine": MACHINE,
        "machine_name": "web",
        "request_pem": request_pem,
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_enrols_once_with_a_token_and_renews_with_its_certificate() {
    let fixture = Fixture::start();
    let address = fixture.serve_control().await;
    let authority = fixture.appliance.authority.certificate().clone();
    let nobody = client_config(&authority, None);
    let token = token(&fixture, 60).await;
    assert_eq!(token.fingerprint, *blake3::hash(&authority).as_bytes());

    let (key, pem) = request();
    let body = enrolment(&token, &pem);
    let post = Method::POST;
    let (status, answer) = control(address, nobody.clone(), post.clone(), "/v1/enrol", &body)
        .await
        .unwrap();
    assert_eq!(status, StatusCode::OK, "{answer}");
    let pem = answer["certificate_pem"].as_str().unwrap();
    let certificate = CertificateDer::from_pem_slice(pem.as_bytes()).unwrap();
    let agent = Identity {
        certificate,
        key: key_der(&key),
    };

    let (status, answer) = control(address, nobody.clone(), post.clone(), "/v1/enrol", &body)
        .await
        .unwrap();
    assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY);
    assert!(
        answer["message"].as_str().unwrap().contains("used before"),
        "{answer}"
    );
    assert_eq!(answer["class"], "refused");

    let (_, pem) = request();
    let body = json!({ "request_pem": pem });
    let agent = client_config(&authority, Some(&agent));
    let (status, answer) = control(address, agent.clone(), post.clone(), "/v1/renew", &body)
        .await
        .unwrap();
    assert_eq!(status, StatusCode::OK, "{answer}");
    let (status, _) = control(address, nobody, post, "/v1/renew", &body)
        .await
        .unwrap();
    assert_eq!(status, StatusCode::UNAUTHORIZED);

    let get = Method::GET;
    let (status, answer) = control(address, agent, get, "/v1/status", &Value::Null)
        .await
        .unwrap();
    assert_eq!(status, StatusCode::FORBIDDEN, "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_unknown_or_malformed_token_is_refused_and_says_what_to_do() {
    let fixture = Fixture::start();
    let address = fixture.serve_control().await;
    let nobody = client_config(fixture.appliance.authority.certificate(), None);
    let expired = token(&fixture, 60).await;
    fixture.clock.advance(Duration::from_secs(61));
    let unknown = TokenText {
        secret: [1; 32],
        ..expired
    };
    let (_, pem) = request();
    let mut malformed = enrolment(&expired, &pem);
    malformed["secret"] = json!("abc");
    let fresh = token(&fixture, 60).await;
    let mut nameless = enrolment(&fresh, &pem);
    nameless["machine_name"] = json!("a/b");
    let cases = [
        (enrolment(&expired, &pem), "has expired"),
        (enrolment(&unknown, &pem), "not known here"),
        (malformed, "malformed"),
        (nameless, "no name of a machine"),
        (
            enrolment(&fresh, "nonsense"),
            "certificate request is not acceptable",
        ),
    ];
    for (body, why) in cases {
        let nobody = nobody.clone();
        let (status, answer) = control(address, nobody, Method::POST, "/v1/enrol", &body)
            .await
            .unwrap();
        assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY);
        assert!(
            answer["message"].as_str().unwrap().contains(why),
            "{answer}"
        );
    }
    // None of these attempts has used up the one that is good.
    let body = enrolment(&fresh, &pem);
    let (status, _) = control(address, nobody, Method::POST, "/v1/enrol", &body)
        .await
        .unwrap();
    assert_eq!(status, StatusCode::OK);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_admins_administer_and_only_root_makes_admins() {
    let fixture = Fixture::start();
    let address = fixture.serve_control().await;
    let authority = fixture.appliance.authority.certificate().clone();
    let body = json!({ "name": "eve" });
    let path = "/v1/certificates/admin";
    let (status, answer) = local(&fixture, Method::POST, path, &body).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    let certificate = answer["certificate_pem"]
        .as_str()
        .unwrap()
        .as_bytes()
        .to_vec();
    let key = answer["key_pem"].as_str().unwrap().as_bytes().to_vec();
    let admin = Identity {
        certificate: CertificateDer::from_pem_slice(&certificate).unwrap(),
        key: PemObject::from_pem_slice(&key).unwrap(),
    };
    let admin = client_config(&authority, Some(&admin));
    let (get, post) = (Method::GET, Method::POST);
    let (status, answer) = control(
        address,
        admin.clone(),
        get.clone(),
        "/v1/status",
        &Value::Null,
    )
    .await
    .unwrap();
    assert_eq!(status, StatusCode::OK, "{answer}");
    let (status, _) = control(address, admin, post, path, &body).await.unwrap();
    assert_eq!(status, StatusCode::FORBIDDEN);

    let nobody = client_config(&authority, None);
    for path in [
        "/v1/status",
        "/v1/machines",
        "/v1/mounts",
        "/v1/agents",
        "/v1/events",
    ] {
        let (status, answer) = control(address, nobody.clone(), get.clone(), path, &Value::Null)
            .await
            .unwrap();
        assert_eq!(status, StatusCode::UNAUTHORIZED, "{path}");
        assert!(
            answer["hint"]
                .as_str()
                .unwrap()
                .contains("aft cert issue-admin")
        );
    }
    let revoked = fixture.agent(AGENT, HOUR);
    fixture
        .appliance
        .catalogue
        .revoke(AGENT, fixture.appliance.now())
        .unwrap();
    let revoked = client_config(&authority, Some(&revoked));
    let body = json!({ "request_pem": request().1 });
    let (status, _) = control(address, revoked, Method::POST, "/v1/renew", &body)
        .await
        .unwrap();
    assert_eq!(status, StatusCode::UNAUTHORIZED);
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_requests_are_answered_with_what_is_wrong() {
    let fixture = Fixture::start();
    let (get, post) = (Method::GET, Method::POST);
    let cases = [
        (
            &get,
            "/v1/nothing",
            Value::Null,
            StatusCode::NOT_FOUND,
            "no such request",
        ),
        (
            &get,
            "/v1/tokens",
            Value::Null,
            StatusCode::METHOD_NOT_ALLOWED,
            "this method",
        ),
        (
            &post,
            "/v1/tokens",
            json!({}),
            StatusCode::UNPROCESSABLE_ENTITY,
            "ttl_s",
        ),
        (
            &post,
            "/v1/tokens",
            json!({ "ttl_s": 0 }),
            StatusCode::UNPROCESSABLE_ENTITY,
            "from 1",
        ),
        (
            &post,
            "/v1/mounts",
            json!({ "x": 1 }),
            StatusCode::UNPROCESSABLE_ENTITY,
            "unknown field",
        ),
        (
            &get,
            "/v1/events?after=x",
            Value::Null,
            StatusCode::BAD_REQUEST,
            "parameters",
        ),
        (
            &get,
            "/v1/machines/no/disks",
            Value::Null,
            StatusCode::NOT_FOUND,
            "no machine",
        ),
    ];
    for (method, path, body, status, why) in cases {
        let (found, answer) = local(&fixture, method.clone(), path, &body).await;
        assert_eq!(found, status, "{path}: {answer}");
        assert!(
            answer["message"].as_str().unwrap().contains(why),
            "{path}: {answer}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn points_are_made_listed_by_pages_and_deleted() {
    let fixture = Fixture::start();
    let path = "/v1/machines/web/points";
    for name in ["one", "two", "three"] {
        let body = json!({ "name": name, "at": null });
        let (status, answer) = local(&fixture, Method::POST, path, &body).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
    }
    let page = get(&fixture, &format!("{path}?after=1&limit=1")).await;
    assert_eq!(page["total"], 3);
    assert_eq!(page["points"][0]["name"], "two");
    assert_eq!(page["points"].as_array().unwrap().len(), 1);
    let two = format!("{path}/two");
    let (status, _) = local(&fixture, Method::DELETE, &two, &Value::Null).await;
    assert_eq!(status, StatusCode::OK);
    let (status, answer) = local(&fixture, Method::DELETE, &two, &Value::Null).await;
    assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY);
    assert_eq!(answer["hint"], "the nearest is latest");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_move_changes_the_grant_and_fences_the_old_writer() {
    let fixture = Fixture::start();
    let other = AgentId([8; 16]);
    fixture.granted(AGENT, MACHINE);
    fixture.agent(other, HOUR);
    fixture.engine.knows.lock().machines = vec![machine(Lsn(5), Timestamp(1))];
    let body = json!({ "agent": other });
    let path = "/v1/machines/web/move";
    let (status, answer) = local(&fixture, Method::POST, path, &body).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    fixture
        .engine
        .wait(|told| (told.fenced == [(MACHINE, other)]).then_some(()));
    let grant = fixture.appliance.catalogue.grant(MACHINE, AGENT).unwrap();
    assert_eq!(grant, crate::catalogue::Grant::HeldByOther(other));

    let body = json!({ "agent": AgentId([77; 16]) });
    let (status, answer) = local(&fixture, Method::POST, path, &body).await;
    assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY);
    assert!(
        answer["message"]
            .as_str()
            .unwrap()
            .contains("has enrolled here"),
        "{answer}"
    );
    let (status, answer) = local(&fixture, Method::POST, "/v1/machines/wbe/move", &body).await;
    assert_eq!(status, StatusCode::NOT_FOUND);
    assert!(answer["hint"].as_str().unwrap().contains("web"), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn health_has_causes() {
    let fixture = Fixture::start();
    let status = get(&fixture, "/v1/status").await;
    assert_eq!(status["health"], "green");
    let mut web = machine(Lsn(5), fixture.appliance.now());
    fixture.engine.knows.lock().machines = vec![web.clone()];
    let status = get(&fixture, "/v1/status").await;
    assert_eq!(status["health"], "yellow");
    assert!(
        status["causes"][0]
            .as_str()
            .unwrap()
            .contains("not connected"),
        "{status}"
    );
    web.disks[0].damage = vec!["LSN 3 is damaged".to_owned()];
    fixture.engine.knows.lock().machines = vec![web];
    fixture.engine.knows.lock().paused = Some(Refusal {
        code: RefusalCode::NoSpace,
        class: ErrorClass::Retry,
        message: "the disk is full".to_owned(),
        hint: "make room".to_owned(),
    });
    let status = get(&fixture, "/v1/status").await;
    assert_eq!(status["health"], "red");
    assert_eq!(status["is_ingest_paused"], true);
    let causes = status["causes"].to_string();
    assert!(causes.contains("the disk is full; make room"), "{causes}");
    assert!(causes.contains("LSN 3 is damaged"), "{causes}");
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_found_by_a_check_is_an_event() {
    let fixture = Fixture::start();
    fixture.engine.knows.lock().damage = vec!["slot 7".to_owned()];
    let path = "/v1/log/verify";
    let (status, answer) = local(&fixture, Method::POST, path, &Value::Null).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(answer["damage"][0], "slot 7");
    assert!(fixture.event("damage-found").await.contains("1 damaged"));
}

mod rpo {
    use super::*;

    const S: u64 = 1_000_000_000;

    fn reported(report: SourceReport, is_behind: bool) -> Reported {
        Reported {
            stream: StreamKey(1),
            history: TRUNK,
            is_connected: true,
            received: Timestamp(report.time.0 + S / 100),
            report: Some(report),
            is_behind,
            delay: std::sync::Arc::new(Delay::new(std::time::Instant::now())),
        }
    }

    #[test]
    fn an_idle_source_counts_from_its_report() {
        let web = machine(Lsn(5), Timestamp(10 * S));
        let report = SourceReport {
            captured: Lsn(5),
            time: Timestamp(100 * S),
            ..SourceReport::default()
        };
        let reported = reported(report, false);
        let status = describe(&web, Some(&reported), Timestamp(101 * S));
        assert_eq!(status.rpo_ms, Some(1000));
        assert_eq!(status.lag.capture_ms, Some(0));
        assert_eq!(status.lag.link_ms, Some(10));
    }

    #[test]
    fn a_source_that_is_behind_counts_from_the_newest_durable_record() {
        let web = machine(Lsn(5), Timestamp(90 * S));
        let report = SourceReport {
            captured: Lsn(9),
            time: Timestamp(100 * S),
            oldest_unacknowledged: Some(Timestamp(91 * S)),
            ..SourceReport::default()
        };
        let reported = reported(report, true);
        let status = describe(&web, Some(&reported), Timestamp(101 * S));
        assert_eq!(status.rpo_ms, Some(11_000));
        assert_eq!(status.lag.capture_ms, Some(9000));
    }

    #[test]
    fn nothing_is_claimed_before_there_is_a_whole_copy() {
        let mut web = machine(Lsn(5), Timestamp(90 * S));
        web.disks[0].addressable.clear();
        let status = describe(&web, None, Timestamp(101 * S));
        assert_eq!(status.rpo_ms, None);
        assert_eq!(status.lag.capture_ms, None);
        assert!(!status.is_connected);
    }

    #[test]
    fn what_was_said_of_another_history_says_nothing() {
        let web = machine(Lsn(5), Timestamp(90 * S));
        let disks = vec![DiskReport {
            disk: DiskId([5; 16]),
            phase: DiskPhase::Protected,
            reason: String::new(),
            done_bytes: 0,
            total_bytes: 0,
        }];
        let time = Timestamp(100 * S);
        let report = SourceReport {
            captured: Lsn(1),
            time,
            disks,
            ..SourceReport::default()
        };
        let mut reported = reported(report, false);
        let now = Timestamp(101 * S);
        let status = describe(&web, Some(&reported), now);
        assert_eq!(status.disks[0].phase, Some(DiskPhase::Protected));
        reported.history = afterimage_blockdev::HistoryId([99; 16]);
        let status = describe(&web, Some(&reported), now);
        assert_eq!(status.disks[0].phase, None);
        assert_eq!(status.rpo_ms, Some(11_000));
    }
}

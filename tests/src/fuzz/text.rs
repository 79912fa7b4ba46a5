//! What people and programs write: references, times, file names, tokens, JSON of the control port.

use afterimage_blockdev::{FileName, Random, SegmentId, Timestamp};
use afterimage_cache::segment::{parse_segment_file, segment_file};
use afterimage_protocol::rest::token::{TokenText, hex, parse_hex};
use afterimage_protocol::rest::{ApiError, agent, server, time};
use afterimage_seed::manifest::manifest_file;
use afterimage_seed::notes::NotesFile;
use afterimage_seed::reference::{At, Reference, format_time, parse_time};
use afterimage_seed::run::{RunId, parse_run_file, run_file};
use afterimage_seed::segment::{parse_seed_file, seed_file};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{Target, Verdict};

const MILLISECOND_NS: u64 = 1_000_000;

pub(super) fn targets() -> Vec<Target> {
    vec![
        Target::new(200_000, "reference", make_reference, run_reference).with_words(&[
            "@",
            "/",
            "-",
            ":",
            "lsn:",
            ":lsn:",
            "latest",
            "90s",
            "3d",
            "1e308",
            ".5",
            "999999999",
            "2026-11-21T10:00:00Z",
            "T23:59:60",
            "+23:59",
            "-00:01",
            "9999-12-31",
            "é",
            "\u{0}",
            "18446744073709551615",
            "00000000-0000-0000-0000-000000000001",
        ]),
        Target::new(200_000, "time", make_time, run_time).with_words(&[
            "0000",
            "9999",
            "1969",
            "2554",
            "02-29",
            "T24",
            ":60",
            ".999999999",
            "Z",
            "+23:59",
            "-23:59",
            "é",
            "0000000000",
        ]),
        Target::new(200_000, "file-name", make_name, run_name).with_words(&[
            "/",
            ".",
            "..",
            "-",
            "_",
            ".log",
            ".seed",
            ".run",
            ".manifest",
            "4294967296",
            "A",
        ]),
        Target::new(200_000, "token", make_token, run_token)
            .with_words(&[".", " ", "\n", "+", "00", "é"]),
        Target::new(60_000, "rest", make_rest, run_rest)
            .with_memory(1 << 20, 256)
            .with_words(&[
                "{",
                "}",
                "[",
                "]",
                ",",
                ":",
                "\"",
                "null",
                "true",
                "-1",
                "1e400",
                "0.1",
                "18446744073709551616",
                "\"\\ud800\"",
                "\\u0000",
                "[[[[[[[[[[[[[[[[[[[[[[[[",
                "\"name\":",
                "\"ttl_s\":",
                "\"reference\":",
                "\"source\":",
            ]),
    ]
}

fn pick<'a>(words: &[&'a str], random: &mut Random) -> &'a str {
    words[random.index(words.len())]
}

fn as_text(bytes: &[u8]) -> Option<&str> {
    core::str::from_utf8(bytes).ok()
}

// --- References and times ------------------------------------------------------------------

fn make_reference(random: &mut Random) -> Vec<u8> {
    let place = pick(&["web1/vm", "w/x", "0/1", "db.1/sda-2"], random);
    let when = match random.below(8) {
        0 => String::from("@latest"),
        1 => format!("@lsn:{}", random.next_u64()),
        2 => format!(
            "@00000000-0000-0000-0000-000000000001:lsn:{}",
            random.below(99)
        ),
        3 => format!(
            "@-{}{}",
            random.below(1000),
            pick(&["ms", "s", "m", "h", "d"], random)
        ),
        4 => format!("@{}", format_time(Timestamp(random.next_u64()))),
        5 => String::from("@before-upgrade"),
        6 => format!("@-{}.{}s", random.below(100), random.below(100)),
        _ => String::new(),
    };
    format!("{place}{when}").into_bytes()
}

fn run_reference(bytes: &[u8]) -> Verdict {
    let Some(text) = as_text(bytes) else {
        return Verdict::Refused;
    };
    let Ok(reference) = text.parse::<Reference>() else {
        return Verdict::Refused;
    };
    let place = format!("{}/{}", reference.machine, reference.disk);
    assert!(
        text.starts_with(&place),
        "the names are those that were given"
    );
    let when = text[place.len()..].strip_prefix('@');
    match &reference.at {
        At::Latest => assert!(when.is_none_or(|when| when == "latest")),
        At::Name(name) => assert_eq!(when, Some(name.as_str())),
        At::Lsn(_, lsn) => assert!(
            when.is_some_and(|when| when.contains("lsn"))
                && when.is_some_and(|when| when.ends_with(&lsn.to_string())
                    || when.contains('+')
                    || when.contains(":0")
                    || when.contains("-0"))
        ),
        At::Time(_) | At::Ago(_) => assert!(when.is_some()),
    }
    Verdict::Accepted
}

fn make_time(random: &mut Random) -> Vec<u8> {
    let at = Timestamp(random.next_u64());
    let mut text = if random.chance(0.5) {
        format_time(at)
    } else {
        time::format_rfc3339(at)
    };
    // A zone far from both ends of what a time can be.
    if random.chance(0.3) && at.0 > 1 << 60 && at.0 < 1 << 63 {
        text.pop();
        text.push_str(pick(&["+00:00", "-05:30", "+23:59"], random));
    }
    text.into_bytes()
}

fn run_time(bytes: &[u8]) -> Verdict {
    let Some(at) = as_text(bytes).and_then(parse_time) else {
        return Verdict::Refused;
    };
    // Both writers and the reader agree.
    assert_eq!(parse_time(&time::format_rfc3339(at)), Some(at));
    let whole = Timestamp(at.0 / MILLISECOND_NS * MILLISECOND_NS);
    assert_eq!(parse_time(&format_time(at)), Some(whole));
    Verdict::Accepted
}

// --- File names ----------------------------------------------------------------------------

fn make_name(random: &mut Random) -> Vec<u8> {
    let number = u32::try_from(random.next_u64() >> 32).expect("32 bits");
    let name = match random.below(6) {
        4 => NotesFile::State(number).name(),
        5 => NotesFile::Rest(RunId(number), random.next_u64()).name(),
        0 => segment_file("log", SegmentId(number)),
        1 => seed_file(SegmentId(number), 0),
        2 => run_file(RunId(number)),
        _ => manifest_file(number),
    };
    name.as_str().as_bytes().to_vec()
}

fn run_name(bytes: &[u8]) -> Verdict {
    let Some(name) = as_text(bytes).and_then(FileName::parse) else {
        return Verdict::Refused;
    };
    let parts = [name.directory(), name.base()];
    assert!(
        parts
            .iter()
            .all(|part| !part.split('/').any(|part| part == ".."))
    );
    // Two names never mean one file.
    if let Some(segment) = parse_segment_file(&name) {
        assert_eq!(segment_file("log", segment).base(), name.base());
    }
    if let Some((segment, generation)) = parse_seed_file(&name) {
        assert_eq!(seed_file(segment, generation).base(), name.base());
    }
    if let Some(notes) = NotesFile::parse(&name) {
        assert_eq!(notes.name().base(), name.base());
    }
    if let Some(run) = parse_run_file(&name) {
        assert_eq!(parse_run_file(&run_file(run)), Some(run));
    }
    Verdict::Accepted
}

// --- Tokens and JSON -----------------------------------------------------------------------

fn make_token(random: &mut Random) -> Vec<u8> {
    let mut token = TokenText {
        secret: [0; 32],
        fingerprint: [0; 32],
    };
    random.fill(&mut token.secret);
    random.fill(&mut token.fingerprint);
    format!("{}{}", token.text(), pick(&["", "\n", " "], random)).into_bytes()
}

fn run_token(bytes: &[u8]) -> Verdict {
    let Some(text) = as_text(bytes) else {
        return Verdict::Refused;
    };
    let Some(token) = TokenText::parse(text) else {
        return Verdict::Refused;
    };
    assert_eq!(token.text(), text.trim().to_lowercase());
    assert_eq!(parse_hex(&hex(&token.secret)), Some(token.secret));
    Verdict::Accepted
}

const ID: &str = "00000000-0000-0000-0000-00000000000a";

fn make_rest(random: &mut Random) -> Vec<u8> {
    let number = random.below(1 << 40);
    let bodies = [
        format!("{{\"ttl_s\":{number}}}"),
        "{\"request_pem\":\"-----BEGIN CERTIFICATE REQUEST-----\\n\"}".to_owned(),
        "{\"name\":\"admin\"}".to_owned(),
        "{\"name\":\"p1\",\"at\":\"lsn:5\"}".to_owned(),
        "{\"name\":null,\"at\":null}".to_owned(),
        "{\"source\":\"/srv/vm.img\",\"name\":\"vm\"}".to_owned(),
        "{\"class\":\"refused\",\"message\":\"no\",\"hint\":\"\"}".to_owned(),
        "{\"reference\":\"a/b@latest\",\"directory\":null,\"device_only\":true,\
         \"is_branch\":false,\"allow_incomplete\":false}"
            .to_owned(),
        format!("{{\"segments\":1,\"slots\":{number},\"bytes\":3,\"damage\":[\"a\",\"b\"]}}"),
        format!("{{\"number\":{number},\"time\":5,\"kind\":\"x\",\"text\":\"y\"}}"),
        format!("{{\"agent\":\"{ID}\"}}"),
    ];
    let known = bodies.iter().filter(|body| reads_as_any(body.as_bytes()));
    let known: Vec<_> = known.collect();
    known[random.index(known.len())].clone().into_bytes()
}

/// Reads a type; what is read is written and read again.
fn reads<T: Serialize + DeserializeOwned + PartialEq>(bytes: &[u8]) -> bool {
    let Ok(value) = serde_json::from_slice::<T>(bytes) else {
        return false;
    };
    let again = serde_json::to_vec(&value).expect("it came as JSON");
    let read: Result<T, _> = serde_json::from_slice(&again);
    assert!(read.is_ok_and(|read| read == value), "the value comes back");
    true
}

fn reads_as_any(bytes: &[u8]) -> bool {
    let readers: [fn(&[u8]) -> bool; 16] = [
        reads::<server::CreateToken>,
        reads::<server::Renew>,
        reads::<server::IssueAdmin>,
        reads::<server::MoveMachine>,
        reads::<server::Enrol>,
        reads::<server::CreatePoint>,
        reads::<server::CreateMount>,
        reads::<server::Mount>,
        reads::<server::Event>,
        reads::<server::Points>,
        reads::<server::ServerStatus>,
        reads::<server::VerifyReport>,
        reads::<agent::AttachDisk>,
        reads::<agent::ProtectDisk>,
        reads::<agent::AgentStatus>,
        reads::<ApiError>,
    ];
    // All of them read it, whoever comes first.
    readers.iter().filter(|reads| reads(bytes)).count() > 0
}

fn run_rest(bytes: &[u8]) -> Verdict {
    Verdict::of(reads_as_any(bytes))
}

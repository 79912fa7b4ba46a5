//! NBD: what a client says in the handshake and after it, and what a server answers.

use afterimage_blockdev::Random;
use afterimage_nbd::client::{ClientNegotiation, ClientStep, Wish};
use afterimage_nbd::export::ListedExport;
use afterimage_nbd::negotiation::{Negotiation, Question, Step, TlsPolicy};
use afterimage_nbd::number::{chunk, command_flag};
use afterimage_nbd::option::{ClientOption, ContextQuery, ExportFacts, OptionError};
use afterimage_nbd::reply::{self, Failure, ReplyHead, ReplyStyle};
use afterimage_nbd::request::{self, Bounds, Command, Request, decode_filter};

use super::{Target, Verdict};

const SIZE: u64 = 1 << 30;
const WORDS: &[&str] = &["IHAVEOPT", "disk", "base:allocation", "qemu:dirty-bitmap:a"];
const STYLES: [ReplyStyle; 3] = [
    ReplyStyle::Simple,
    ReplyStyle::Structured,
    ReplyStyle::Extended,
];

pub(super) fn targets() -> Vec<Target> {
    vec![
        Target::new(100_000, "nbd-handshake", make_handshake, run_handshake).with_words(WORDS),
        Target::new(200_000, "nbd-commands", make_commands, run_commands),
        Target::new(100_000, "nbd-server", make_server, run_server).with_words(WORDS),
        Target::new(200_000, "nbd-replies", make_replies, run_replies),
    ]
}

fn facts() -> ExportFacts {
    ExportFacts {
        size_bytes: SIZE,
        flags: 1,
        block_bytes: (512, 4096, 32 << 20),
        name: "disk".to_owned(),
        description: "a disk".to_owned(),
    }
}

// --- What a client says in the handshake ---------------------------------------------------

fn make_handshake(random: &mut Random) -> Vec<u8> {
    let mut bytes = vec![0, 0, 0, 3];
    let query = ContextQuery {
        export: "disk".to_owned(),
        queries: vec!["base:allocation".to_owned(), "qemu:".to_owned()],
    };
    for _ in 0..random.below(6) {
        let option = match random.below(6) {
            0 => ClientOption::List,
            1 => ClientOption::StructuredReply,
            2 => ClientOption::ExtendedHeaders,
            3 => ClientOption::Info {
                name: "disk".to_owned(),
                wanted: vec![0, 1, 2, 3],
                is_go: false,
            },
            4 => ClientOption::StartTls,
            _ => ClientOption::MetaContext {
                query: query.clone(),
                is_set: random.chance(0.5),
            },
        };
        bytes.extend(option.encode());
    }
    let wanted = vec![3];
    let (name, is_go) = ("disk".to_owned(), true);
    bytes.extend(
        ClientOption::Info {
            name,
            wanted,
            is_go,
        }
        .encode(),
    );
    bytes
}

/// Accepted when it comes to transmission.
fn run_handshake(bytes: &[u8]) -> Verdict {
    let mut machine = Negotiation::new(TlsPolicy::Absent);
    for part in bytes.chunks(50) {
        machine.feed(part);
        loop {
            match machine.step() {
                Step::NeedInput => break,
                Step::Close(_) => return Verdict::Refused,
                Step::Transmission(session) => {
                    assert!(session.contexts.len() <= 2, "contexts that nobody has");
                    return Verdict::Accepted;
                }
                Step::Ask(Question::List) => machine.listed(Ok(vec![ListedExport {
                    name: "disk".to_owned(),
                    description: String::new(),
                }])),
                Step::Ask(Question::Open(name)) => machine.opened(if name == "disk" {
                    Ok(facts())
                } else {
                    Err(OptionError::new(0x8000_0006, "there is none"))
                }),
                Step::Ask(Question::Contexts { query, .. }) => {
                    machine.contexts(Ok(query.queries.into_iter().take(2).collect()));
                }
                Step::Ask(Question::StartTls) => panic!("TLS where there is none"),
            }
        }
    }
    Verdict::Refused
}

// --- What it says after it -----------------------------------------------------------------

fn bounds(style: ReplyStyle) -> Bounds {
    Bounds {
        size_bytes: SIZE,
        block_bytes: 512,
        is_read_only: false,
        style,
        context_count: 2,
    }
}

fn make_commands(random: &mut Random) -> Vec<u8> {
    let style = STYLES[random.index(3)];
    let mut bytes = vec![
        STYLES
            .iter()
            .position(|known| *known == style)
            .map_or(0, byte),
    ];
    for _ in 0..1 + random.below(5) {
        let commands = [
            Command::Read,
            Command::Trim,
            Command::Cache,
            Command::WriteZeroes,
            Command::BlockStatus,
        ];
        let command = commands[random.index(5)];
        let request = Request {
            flags: 0,
            command,
            cookie: random.next_u64(),
            offset: 512 * random.below(1000),
            length: 512 * (1 + random.below(1000)),
        };
        bytes.extend(request.encode(style).as_slice());
    }
    if style == ReplyStyle::Extended {
        let request = Request {
            flags: command_flag::PAYLOAD_LEN,
            command: Command::BlockStatus,
            cookie: 1,
            offset: 0,
            length: 16,
        };
        bytes.extend(request.encode(style).as_slice());
        bytes.extend([0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 1, 0, 0, 0, 2]);
    }
    bytes
}

fn byte(place: usize) -> u8 {
    place.to_le_bytes()[0]
}

/// Accepted when every request is whole and legal.
fn run_commands(bytes: &[u8]) -> Verdict {
    let Some((first, mut rest)) = bytes.split_first() else {
        return Verdict::Refused;
    };
    let style = STYLES[usize::from(*first) % 3];
    let bounds = bounds(style);
    while !rest.is_empty() {
        let Ok(Some(request)) = Request::decode(style, rest) else {
            return Verdict::Refused;
        };
        assert_eq!(
            Request::decode(style, request.encode(style).as_slice()),
            Ok(Some(request)),
            "a request is written as it was read"
        );
        rest = &rest[Request::header_bytes(style)..];
        let checked = request::check(&request, &bounds);
        let payload = request.payload_bytes(style);
        if checked.is_ok() && matches!(request.command, Command::Read | Command::Write) {
            assert!(request.length <= u64::from(request::PAYLOAD_BYTES_MAX));
            assert!(request.offset + request.length <= SIZE, "beyond the end");
        }
        let Some((data, after)) = usize::try_from(payload)
            .ok()
            .and_then(|length| rest.split_at_checked(length))
        else {
            return Verdict::Refused;
        };
        rest = after;
        if checked.is_err() {
            return Verdict::Refused;
        }
        if request.command == Command::BlockStatus && payload > 0 {
            let Some((length, ids)) = decode_filter(data) else {
                return Verdict::Refused;
            };
            assert!(ids.len() <= request::CONTEXTS_MAX);
            if request::check_range(&request, length, &bounds).is_err() {
                return Verdict::Refused;
            }
        }
    }
    Verdict::Accepted
}

// --- What a server says in the handshake ---------------------------------------------------

/// What our own server sends to our own client.
fn make_server(random: &mut Random) -> Vec<u8> {
    let mut server = Negotiation::new(TlsPolicy::Absent);
    let mut client = ClientNegotiation::new(wish(random.chance(0.7)));
    let mut all = vec![u8::from(random.chance(0.5))];
    loop {
        let said = server.take_output();
        all.extend(&said);
        client.feed(&said);
        let step = client.step().expect("our server is legal");
        if matches!(step, ClientStep::Agreed(_)) {
            all[0] = 0;
            return all;
        }
        server.feed(&client.take_output());
        loop {
            match server.step() {
                Step::Ask(Question::Open(_)) => server.opened(Ok(facts())),
                Step::Ask(Question::Contexts { query, .. }) => server.contexts(Ok(query.queries)),
                _ => break,
            }
        }
    }
}

fn wish(allow_extended: bool) -> Wish {
    Wish {
        export: "disk".to_owned(),
        contexts: vec!["base:allocation".to_owned()],
        allow_extended,
    }
}

/// Accepted when the client comes to an agreement.
fn run_server(bytes: &[u8]) -> Verdict {
    let bytes = bytes.get(1..).unwrap_or_default();
    let verdicts = [true, false].map(|allow_extended| {
        let mut client = ClientNegotiation::new(wish(allow_extended));
        let mut rest = bytes;
        loop {
            match client.step() {
                Err(_) => return false,
                Ok(ClientStep::Agreed(agreed)) => {
                    assert!(agreed.facts.block_bytes.0.is_power_of_two());
                    return true;
                }
                Ok(ClientStep::Need(count)) => {
                    let Some((part, after)) = rest.split_at_checked(count) else {
                        return false;
                    };
                    client.feed(part);
                    rest = after;
                }
            }
        }
    });
    Verdict::of(verdicts.contains(&true))
}

// --- What it answers after it --------------------------------------------------------------

fn make_replies(random: &mut Random) -> Vec<u8> {
    let style = STYLES[random.index(3)];
    let mut bytes = vec![
        STYLES
            .iter()
            .position(|known| *known == style)
            .map_or(0, byte),
    ];
    for _ in 0..1 + random.below(4) {
        let names = (random.next_u64(), 4096);
        let (head, body) = match random.below(4) {
            0 => (reply::done(style, names.0, names.1), Vec::new()),
            1 if style != ReplyStyle::Simple => {
                let extents = [(4096, 3), (1 << 20, 0)];
                reply::block_status(style, true, names, 1, &extents)
            }
            2 if style != ReplyStyle::Simple => {
                (reply::hole(style, false, names, 4096, 512), Vec::new())
            }
            3 if style != ReplyStyle::Simple => {
                (reply::data(style, true, names, 4096, 100), vec![7; 100])
            }
            _ => reply::failure(style, names.0, names.1, &Failure::new(22, "it is wrong")),
        };
        bytes.extend(head.as_slice());
        bytes.extend(body);
    }
    bytes
}

/// Accepted when every reply is whole and makes sense by itself.
fn run_replies(bytes: &[u8]) -> Verdict {
    let Some((first, mut rest)) = bytes.split_first() else {
        return Verdict::Refused;
    };
    let style = STYLES[usize::from(*first) % 3];
    while !rest.is_empty() {
        let Ok(Some((head, length))) = reply::decode_head(style, rest) else {
            return Verdict::Refused;
        };
        rest = &rest[length..];
        let ReplyHead::Chunk { kind, length, .. } = head else {
            continue;
        };
        let Some((payload, after)) = usize::try_from(length)
            .ok()
            .and_then(|length| rest.split_at_checked(length))
        else {
            return Verdict::Refused;
        };
        rest = after;
        let is_extended = kind == chunk::BLOCK_STATUS_EXT;
        let is_good = match kind {
            chunk::NONE => payload.is_empty(),
            chunk::OFFSET_DATA | chunk::OFFSET_HOLE => reply::decode_place(kind, payload).is_ok(),
            chunk::BLOCK_STATUS | chunk::BLOCK_STATUS_EXT => {
                reply::decode_status(is_extended, payload).is_ok()
            }
            kind if chunk::is_error(kind) => reply::decode_failure(payload).is_ok(),
            _ => false,
        };
        if !is_good {
            return Verdict::Refused;
        }
    }
    Verdict::Accepted
}

use super::*;
use crate::option::OptionReply;

const CLIENT_FLAGS: [u8; 4] = [0, 0, 0, 3];

fn begun(tls: TlsPolicy) -> Negotiation {
    let mut machine = Negotiation::new(tls);
    assert_eq!(machine.take_output().len(), 18);
    machine.feed(&CLIENT_FLAGS);
    assert_eq!(machine.step(), Step::NeedInput);
    machine
}

/// The kinds of all replies that are there.
fn kinds(machine: &mut Negotiation) -> Vec<u32> {
    let output = machine.take_output();
    let mut rest = &output[..];
    let mut kinds = Vec::new();
    while let Some((reply, length)) = OptionReply::decode(rest).unwrap() {
        kinds.push(reply.kind);
        rest = &rest[length..];
    }
    assert!(rest.is_empty());
    kinds
}

fn contexts(is_set: bool) -> ClientOption {
    let query = ContextQuery {
        export: "disk".to_owned(),
        queries: vec!["base:allocation".to_owned()],
    };
    ClientOption::MetaContext { query, is_set }
}

fn go(name: &str) -> ClientOption {
    ClientOption::Info {
        name: name.to_owned(),
        wanted: Vec::new(),
        is_go: true,
    }
}

#[test]
fn nothing_is_told_before_tls_and_nothing_remembered_after_it() {
    let mut machine = begun(TlsPolicy::Required);
    for option in [
        ClientOption::List,
        ClientOption::StructuredReply,
        contexts(true),
        go("disk"),
    ] {
        machine.feed(&option.encode());
        assert_eq!(machine.step(), Step::NeedInput);
        assert_eq!(kinds(&mut machine), [option_reply::ERR_TLS_REQD]);
    }
    machine.feed(&ClientOption::StartTls.encode());
    assert_eq!(machine.step(), Step::Ask(Question::StartTls));
    assert_eq!(kinds(&mut machine), [option_reply::ACK]);
    // As if it had been agreed on by whoever sits between.
    machine.style = ReplyStyle::Structured;
    machine.contexts = Some(("disk".to_owned(), vec!["base:allocation".to_owned()]));
    machine.tls_started();
    machine.feed(&contexts(true).encode());
    machine.feed(&ClientOption::StartTls.encode());
    assert_eq!(machine.step(), Step::NeedInput);
    let expected = [option_reply::ERR_INVALID, option_reply::ERR_INVALID];
    assert_eq!(kinds(&mut machine), expected);
    machine.feed(&go("disk").encode());
    assert_eq!(machine.step(), Step::Ask(Question::Open("disk".to_owned())));
    machine.opened(Ok(ExportFacts::default()));
    let Step::Transmission(session) = machine.step() else {
        panic!("no transmission");
    };
    assert_eq!(session, Session::default());
}

#[test]
fn what_comes_in_the_clear_behind_starttls_ends_the_session() {
    let mut machine = begun(TlsPolicy::Required);
    let both = [ClientOption::StartTls.encode(), ClientOption::List.encode()];
    machine.feed(&both.concat());
    assert!(matches!(
        machine.step(),
        Step::Close(CloseReason::Broken(_))
    ));
    assert!(kinds(&mut machine).is_empty());
}

#[test]
fn contexts_belong_to_the_export_that_they_were_selected_for() {
    for (name, count) in [("disk", 1), ("other", 0)] {
        let mut machine = begun(TlsPolicy::Absent);
        machine.feed(&ClientOption::StructuredReply.encode());
        machine.feed(&contexts(true).encode());
        assert!(matches!(
            machine.step(),
            Step::Ask(Question::Contexts { is_set: true, .. })
        ));
        machine.contexts(Ok(vec!["base:allocation".to_owned()]));
        machine.feed(&go(name).encode());
        assert_eq!(machine.step(), Step::Ask(Question::Open(name.to_owned())));
        machine.opened(Ok(ExportFacts::default()));
        let Step::Transmission(session) = machine.step() else {
            panic!("no transmission");
        };
        assert_eq!(session.contexts.len(), count, "{name}");
    }
}

#[test]
fn the_old_way_of_opening_has_its_zeroes_unless_the_client_does_without() {
    for (flags, length) in [(1, 8 + 2 + 124), (3, 8 + 2)] {
        let mut machine = Negotiation::new(TlsPolicy::Absent);
        let _greeting = machine.take_output();
        machine.feed(&[0, 0, 0, flags]);
        machine.feed(&ClientOption::ExportName("disk".to_owned()).encode());
        machine.feed(b"and more");
        assert_eq!(machine.step(), Step::Ask(Question::Open("disk".to_owned())));
        machine.opened(Ok(ExportFacts::default()));
        assert_eq!(machine.take_output().len(), length);
        let Step::Transmission(session) = machine.step() else {
            panic!("no transmission");
        };
        assert_eq!(session.rest, b"and more");
    }
}

//! What `aft` says and returns when nobody answers, and when somebody answers with an error.

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Output};

fn aft(socket: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_aft"))
        .env_remove("AFTERIMAGE_SERVER")
        .arg("--socket")
        .arg(socket)
        .arg("--agent-socket")
        .arg(socket)
        .args(arguments)
        .output()
        .expect("aft runs")
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Answers one request with these bytes.
fn answering(socket: &Path, status: &str, body: &str) -> std::thread::JoinHandle<String> {
    let listener = UnixListener::bind(socket).expect("the socket can be made");
    let answer = format!(
        "HTTP/1.1 {status}\r\ncontent-length: {}\r\ncontent-type: application/json\r\n\r\n{body}",
        body.len()
    );
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("aft connects");
        let mut request = Vec::new();
        let mut byte = [0];
        while !request.ends_with(b"\r\n\r\n") && stream.read(&mut byte).expect("a request") == 1 {
            request.push(byte[0]);
        }
        stream.write_all(answer.as_bytes()).expect("aft reads");
        String::from_utf8_lossy(&request).into_owned()
    })
}

#[test]
fn a_daemon_that_does_not_run_is_named_with_what_to_do() {
    let directory = tempfile::tempdir().expect("a directory");
    let socket = directory.path().join("socket");
    let output = aft(&socket, &["status"]);
    assert_eq!(output.status.code(), Some(1));
    let text = said(&output);
    assert!(
        text.contains("cannot reach afterimaged") && text.contains("start afterimaged"),
        "{text}"
    );
    let output = aft(&socket, &["agent", "status"]);
    assert!(
        said(&output).contains("start afterimage-agent"),
        "{}",
        said(&output)
    );
    // A socket whose daemon has died.
    drop(UnixListener::bind(&socket).expect("the socket can be made"));
    let output = aft(&socket, &["mounts"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        said(&output).contains("nobody listens"),
        "{}",
        said(&output)
    );
}

#[test]
fn every_class_of_error_has_its_exit_code() {
    let classes = [
        ("retry", 1),
        ("refused", 3),
        ("operator", 4),
        ("fenced", 5),
        ("corrupt", 6),
    ];
    for (class, code) in classes {
        let directory = tempfile::tempdir().expect("a directory");
        let socket = directory.path().join("socket");
        let body = format!(r#"{{"class":"{class}","message":"what and why","hint":"do this"}}"#);
        let daemon = answering(&socket, "503 Service Unavailable", &body);
        let output = aft(&socket, &["mount", "web/data@latest"]);
        assert_eq!(output.status.code(), Some(code), "{}", said(&output));
        assert_eq!(said(&output), "aft: what and why\n     do this\n");
        let request = daemon.join().expect("the daemon answers");
        assert!(request.starts_with("POST /v1/mounts HTTP/1.1"), "{request}");
    }
}

#[test]
fn scripts_get_json_and_wrong_command_lines_code_2() {
    let directory = tempfile::tempdir().expect("a directory");
    let socket = directory.path().join("socket");
    let daemon = answering(&socket, "200 OK", "[]");
    let output = aft(&socket, &["--json", "mounts"]);
    daemon.join().expect("the daemon answers");
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    assert_eq!(output.stdout, b"[]\n");
    for wrong in [
        &["nonsense"][..],
        &["mount"],
        &["mount", "x", "dir", "--device"],
        &["--server", "h:1", "status"],
    ] {
        assert_eq!(aft(&socket, wrong).status.code(), Some(2), "{wrong:?}");
    }
}

#[test]
fn completions_and_the_manual_need_no_daemon() {
    let socket = Path::new("/no/such/socket");
    for (arguments, word) in [
        (&["completions", "bash"][..], "_aft"),
        (&["man"], ".TH aft"),
    ] {
        let output = aft(socket, arguments);
        assert_eq!(output.status.code(), Some(0));
        assert!(
            String::from_utf8_lossy(&output.stdout).contains(word),
            "{arguments:?}"
        );
    }
}

//! Wrong input gets a clear error and its exit code, and nothing is lost.

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use crate::shell::{self, all_of, fill_random, holds, sparse, text, wait_until};
use crate::site::{Daemon, MACHINE, Plan, Site};

fn assert_says(output: &Output, code: i32, words: &[&str]) {
    let said = all_of(output);
    assert_eq!(output.status.code(), Some(code), "{said}");
    for word in words {
        assert!(said.contains(word), "nothing of {word:?} in: {said}");
    }
    assert!(!said.contains("panicked"), "{said}");
    println!("{}", said.lines().skip(1).collect::<Vec<_>>().join("\n"));
}

fn protected() -> (Site, std::path::PathBuf) {
    let site = Site::running(Plan::default());
    let source = site.path("source.img");
    sparse(&source, 64);
    shell::run("mkfs.ext4", &["-q", "-F", text(&source)]);
    site.protect(&source, "d");
    (site, source)
}

#[test]
#[ignore = "needs root and release binaries: tools/check input"]
fn tokens_that_are_wrong_expired_or_used() {
    let site = Site::running(Plan::default());
    let elsewhere = site.path("agent2");
    let expired = site.token("1s");
    let wrong = format!("{}{}", "0".repeat(64), &site.token("1m")[64..]);
    let output = site.try_enrol(&elsewhere, "other", &wrong);
    assert_says(&output, 1, &["token", "aft token create"]);
    let output = site.try_enrol(&elsewhere, "other", "nonsense");
    assert_says(&output, 1, &["token"]);
    // A token of another appliance: its fingerprint is of another authority.
    let foreign = format!("{}.{}", &site.token("1m")[..64], "ab".repeat(32));
    let output = site.try_enrol(&elsewhere, "other", &foreign);
    assert_eq!(output.status.code(), Some(1), "{}", all_of(&output));
    std::thread::sleep(Duration::from_millis(1100));
    let output = site.try_enrol(&elsewhere, "other", &expired);
    assert_says(&output, 1, &["expired", "aft token create"]);
    let once = site.token("1m");
    let output = site.try_enrol(&elsewhere, "other", &once);
    assert!(output.status.success(), "{}", all_of(&output));
    let output = site.try_enrol(&site.path("agent3"), "third", &once);
    assert_says(&output, 1, &["used", "aft token create"]);
    let output = site.try_enrol(&elsewhere, "other", &site.token("1m"));
    assert_says(&output, 1, &["enrolled", "--state-dir"]);
}

/// A certificate that was revoked is told so; with an unknown one there is no talking at all.
#[test]
#[ignore = "needs root and release binaries: tools/check input"]
fn certificates_that_are_revoked_or_foreign() {
    let (mut site, _) = protected();
    let agent = site.aft(&["agent", "status"])["agent"]
        .as_str()
        .expect("an id")
        .to_owned();
    site.aft(&["agent", "revoke", &agent]);
    site.kill(Daemon::Agent);
    site.start(Daemon::Agent);
    wait_until(20, "the agent says why it is not connected", || {
        let status = site.aft(&["agent", "status"]);
        let reason = status["reason"].to_string();
        let is_told = status["is_connected"] == false && reason.contains("revoked");
        holds(is_told, || status.to_string())
    });
    println!("{}", site.aft(&["agent", "status"])["reason"]);
    let other = Site::running(Plan::default());
    let file = other.path("admin.pem");
    other.aft(&["cert", "issue-admin", "somebody", "--out", text(&file)]);
    let server = format!("127.0.0.1:{}", site.control_port);
    let output = site.try_aft(&["status", "--server", &server, "--identity", text(&file)]);
    assert!(!output.status.success(), "{}", all_of(&output));
    println!("{}", all_of(&output));
    let server = format!("127.0.0.1:{}", other.control_port);
    let output = other.try_aft(&["status", "--server", &server, "--identity", text(&file)]);
    assert!(output.status.success(), "{}", all_of(&output));
}

/// A second agent with the identity of the machine is fenced, or fences the first by an order.
#[test]
#[ignore = "needs root and release binaries: tools/check input"]
fn a_second_agent_for_a_machine() {
    let (mut site, _) = protected();
    let second = site.path("agent2");
    let token = site.token("1m");
    fs::create_dir(&second).expect("the directory is made");
    let output = site.try_enrol(&second, MACHINE, &token);
    // Another machine of the same name cannot be told apart in references.
    assert_says(&output, 1, &[MACHINE]);
    let first = site.aft(&["agent", "status"])["agent"]
        .as_str()
        .expect("an id")
        .to_owned();
    let output = site.try_enrol(&second, "second", &site.token("1m"));
    assert!(output.status.success(), "{}", all_of(&output));
    let agents = site.aft(&["agent", "list"]);
    let other = agents
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|agent| agent["agent"].as_str())
        .find(|agent| *agent != first)
        .expect("two agents are enrolled")
        .to_owned();
    site.aft(&["machine", "move", MACHINE, &other]);
    wait_until(20, "the first agent is told that it is fenced", || {
        let status = site.aft(&["agent", "status"]);
        holds(
            status["is_connected"] == false && status["reason"] != "",
            || status.to_string(),
        )
    });
    println!("{}", site.aft(&["agent", "status"])["reason"]);
    assert!(site.is_alive(Daemon::Agent), "the source goes on");
}

#[test]
#[ignore = "needs root and release binaries: tools/check input"]
fn a_disk_that_shrank() {
    let (mut site, source) = protected();
    site.aft(&["disk", "detach", "d"]);
    let file = fs::File::options()
        .write(true)
        .open(&source)
        .expect("the source opens");
    file.set_len(32 << 20).expect("it shrinks");
    let output = site.try_aft(&["disk", "attach", text(&source), "--name", "d"]);
    assert_says(&output, 4, &["shrank", "67108864", "33554432"]);
    file.set_len(64 << 20).expect("it grows back");
    site.attach(&source, "d");
    assert!(site.is_alive(Daemon::Agent));
}

#[test]
#[ignore = "needs root and release binaries: tools/check input"]
fn references_that_do_not_exist() {
    let (site, _) = protected();
    site.aft(&["point", "create", MACHINE, "--name", "before-upgrade"]);
    let refuse = |reference: &str, words: &[&str]| {
        let output = site.try_aft(&["mount", reference]);
        assert_says(&output, 3, words);
    };
    refuse("m/d@before-upgrad", &["before-upgrad", "before-upgrade"]);
    refuse("m/e@latest", &["\"e\"", "d"]);
    refuse("n/d@latest", &["\"n\"", "m"]);
    refuse("m/d@lsn:99999999", &["99999999", "lsn:"]);
    refuse("m/d@1999-01-01T00:00:00Z", &["nearest"]);
    refuse("no reference", &["machine/disk@name"]);
    let output = site.try_aft(&["umount", "77"]);
    assert_says(&output, 3, &["aft mounts"]);
    let output = site.try_aft(&["mount"]);
    assert_eq!(output.status.code(), Some(2), "{}", all_of(&output));
}

#[test]
#[ignore = "needs root and release binaries: tools/check input"]
fn a_mount_directory_that_is_busy() {
    let (site, _) = protected();
    let directory = site.path("busy");
    fs::create_dir(&directory).expect("the directory is made");
    fs::write(directory.join("file"), "mine").expect("a file is in it");
    let output = site.try_aft(&["mount", "m/d@latest", text(&directory)]);
    assert_says(&output, 3, &["not empty", "empty directory"]);
    assert_eq!(
        fs::read(directory.join("file")).ok().as_deref(),
        Some(&b"mine"[..])
    );
    let free = site.path("free");
    let mount = site.aft(&["mount", "m/d@latest", text(&free)]);
    let output = site.try_aft(&["mount", "m/d@latest", text(&free)]);
    assert_says(&output, 3, &["free", "busy"]);
    // A file that is open keeps the mount; then it ends.
    let open = fs::File::open(free.join("lost+found")).expect("the directory opens");
    let output = site.try_aft(&["umount", &mount["id"].to_string()]);
    assert_says(&output, 4, &[]);
    drop(open);
    site.umount(&mount);
    assert_eq!(site.aft(&["mounts"]).as_array().map(Vec::len), Some(0));
}

fn run_server(site: &Site) -> Output {
    let mut command = site.command(Daemon::Server);
    command
        .stdin(Stdio::null())
        .env("NO_COLOR", "1")
        .output()
        .expect("the daemon runs")
}

#[test]
#[ignore = "needs root and release binaries: tools/check input"]
fn a_data_directory_that_is_in_use_or_of_a_newer_format() {
    let (mut site, source) = protected();
    assert_says(
        &run_server(&site),
        3,
        &["another afterimaged", "--data-dir"],
    );
    site.stop(Daemon::Agent);
    site.stop(Daemon::Server);
    let catalogue = site.data.join("catalogue.db");
    let before = fs::read(&catalogue).expect("the catalogue is there");
    let mut newer = before.clone();
    // Bytes 60 to 63 of an SQLite file are its user version, big-endian.
    newer[60..64].copy_from_slice(&[0, 0, 0, 99]);
    fs::write(&catalogue, &newer).expect("it is written");
    assert_says(&run_server(&site), 4, &["99", "this release knows up to"]);
    fs::write(&catalogue, &before).expect("it is written back");
    let manifests: Vec<_> = fs::read_dir(site.data.join("manifest"))
        .expect("the directory is there")
        .map(|entry| entry.expect("an entry").path())
        .collect();
    assert!(!manifests.is_empty());
    site.start(Daemon::Server);
    site.start(Daemon::Agent);
    site.wait_connected();
    site.wait_caught_up();
    site.assert_replica_is("d", &source);
}

fn run_with(site: &Site, setup: &str, daemon: Daemon) -> Output {
    let command = site.command(daemon);
    let program = text(Path::new(command.get_program())).to_owned();
    let arguments: Vec<&str> = command
        .get_args()
        .map(|argument| argument.to_str().expect("UTF-8"))
        .collect();
    Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c"])
        .arg(format!("{setup} && exec \"$0\" \"$@\""))
        .arg(program)
        .args(arguments)
        .env("NO_COLOR", "1")
        .stdin(Stdio::null())
        .output()
        .expect("unshare runs")
}

#[test]
#[ignore = "needs root and release binaries: tools/check input"]
fn without_root_fuse_or_loop() {
    let mut site = Site::new(Plan::default());
    let command = site.command(Daemon::Server);
    let output = Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .arg(command.get_program())
        .args(["--data-dir", "/nonexistent/data"])
        .output()
        .expect("setpriv runs");
    assert_says(&output, 4, &["root"]);
    assert_says(
        &run_with(&site, "mount -t tmpfs none /dev", Daemon::Server),
        4,
        &["FUSE"],
    );
    // Loop devices are needed only when something is shown: what is wrong is said then.
    site.start(Daemon::Server);
    site.enrol();
    let output = run_with(&site, "mount -t tmpfs none /dev", Daemon::Agent);
    assert_says(&output, 1, &["/dev/fuse", "modprobe fuse"]);
    site.start(Daemon::Agent);
    site.wait_connected();
    let source = site.path("source.img");
    sparse(&source, 16);
    fill_random(&source, 16);
    site.protect(&source, "d");
}

#[test]
#[ignore = "needs root and release binaries: tools/check input"]
fn sources_that_cannot_be_tapped() {
    let (site, source) = protected();
    let refuse = |path: &Path, name: &str, code: i32, words: &[&str]| {
        let output = site.try_aft(&["disk", "attach", text(path), "--name", name]);
        assert_says(&output, code, words);
    };
    refuse(&source, "again", 3, &["attached as d"]);
    refuse(&site.path("missing.img"), "x", 3, &["missing.img"]);
    refuse(&site.path("mnt/.."), "x", 3, &[]);
    refuse(Path::new("/dev/null"), "x", 3, &["neither"]);
    let other = site.path("other.img");
    sparse(&other, 16);
    refuse(&other, "d", 3, &["attached already"]);
    refuse(&other, "a/b", 3, &["not a name"]);
    // A disk in use is not detached.
    let directory = site.path("mnt");
    let mount = shell::Mount::new(&site.device("d"), &directory);
    let output = site.try_aft(&["disk", "detach", "d"]);
    assert_says(&output, 4, &["in use", "unmount"]);
    mount.end();
    site.aft(&["disk", "detach", "d"]);
    let output = site.try_aft(&["disk", "protect", "d"]);
    assert_says(&output, 3, &["no disk named d"]);
}

#[test]
#[ignore = "needs root and release binaries: tools/check input"]
fn daemons_that_do_not_run_and_wrong_configurations() {
    let site = Site::new(Plan::default());
    let output = site.try_aft(&["status"]);
    assert_says(&output, 1, &["afterimaged", "start"]);
    fs::write(site.path("server.toml"), "[store]\nsegment_byte = 1\n").expect("it is written");
    assert_says(&run_server(&site), 2, &["segment_byte"]);
    fs::write(site.path("server.toml"), "[store]\nreserve_percent = 80\n").expect("it is written");
    assert_says(
        &run_server(&site),
        2,
        &["store.reserve_percent", "at most 50"],
    );
}

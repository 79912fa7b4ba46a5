//! Wrong input: a clear error with the documented exit code, and nothing is lost or done by halves.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::process::Command;

use afterimage_protocol::message::DiskPhase;
use afterimage_protocol::rest::server::Agent;
use afterimage_tests::process::programs::{outcome_of, own};
use afterimage_tests::process::{FsMount, MIB, Outcome, Scene, Setup, View, require, run, until};

fn daemon(program: &str, arguments: &[String]) -> Outcome {
    outcome_of(Command::new(own(program)).args(arguments))
}

fn agent_run(state_dir: &Path, root: &Path) -> Outcome {
    let text = |path: &Path| path.display().to_string();
    let arguments = [
        "run".to_owned(),
        "--state-dir".to_owned(),
        text(state_dir),
        "--socket".to_owned(),
        text(&root.join("other.sock")),
        "--config".to_owned(),
        text(&root.join("agent.toml")),
    ];
    daemon("afterimage-agent", &arguments)
}

#[test]
fn tokens_and_certificates() {
    require(&[]);
    let mut scene = Scene::start(&Setup::default());
    let fresh = |name: &str| scene.root.join(name);
    let said = scene.enrol(&fresh("a1"), "not-a-token");
    said.refuses(3, &["token"]);
    // One use only.
    let token = scene.token();
    let first = scene.enrol_as(&fresh("a2"), &token, "web2");
    assert_eq!(first.code, 0, "{first:?}");
    scene
        .enrol_as(&fresh("a3"), &token, "web3")
        .refuses(3, &["token"]);
    assert!(
        !fresh("a3").join("agent.pem").exists(),
        "nothing is enrolled by halves"
    );
    // Enrolled already.
    let token = scene.token();
    scene
        .enrol_as(&fresh("a2"), &token, "web2")
        .refuses(3, &["already"]);
    // A name that another machine has: one that sends, and one that has only enrolled.
    let token = scene.token();
    let (same, sooner) = (fresh("a7"), fresh("a8"));
    scene
        .enrol_as(&same, &token, "web1")
        .refuses(3, &["machine named web1", "--machine-name"]);
    scene.enrol_as(&same, &token, "web2").refuses(
        3,
        &["machine named web2", "--machine-name", "aft agent revoke"],
    );
    assert!(!same.join("agent.pem").exists(), "nothing by halves");
    // The token is good still, and a name whose agent was revoked is free again.
    let agents: Vec<Agent> = scene.aft_json(&["agent", "list"]);
    let own_id = scene.agent_status().agent;
    let other = agents.iter().find(|agent| agent.agent != own_id).unwrap();
    let _said = scene.aft_ok(&["agent", "revoke", &other.agent.to_string()]);
    let freed = scene.enrol_as(&sooner, &token, "web2");
    assert_eq!(freed.code, 0, "{freed:?}");
    // Expired: a token of one second, used when the appliance's own clock says so.
    let said = scene.aft_ok(&["token", "create", "--ttl", "1s"]);
    let token = said.trim().to_owned();
    let made = std::time::Instant::now();
    until("the token's end", || {
        made.elapsed() > std::time::Duration::from_millis(1500)
    });
    scene
        .enrol_as(&fresh("a4"), &token, "web4")
        .refuses(3, &["expired"]);
    // A token of another appliance: its authority is another, and nothing is sent to it.
    let other = Scene::server_only(Scene::directory(), &Setup::default());
    scene
        .enrol_as(&fresh("a5"), &other.token(), "web5")
        .refuses(4, &["not the appliance"]);
    // An agent with another appliance's certificate.
    let enrolled = other.enrol(&fresh("a6"), &other.token());
    assert_eq!(enrolled.code, 0, "{enrolled:?}");
    scene.stop_agent();
    for name in ["agent.pem", "agent.key"] {
        let keep = scene.state_dir.join(format!("{name}.kept"));
        fs::rename(scene.state_dir.join(name), keep).unwrap();
        fs::copy(scene.root.join("a6").join(name), scene.state_dir.join(name)).unwrap();
    }
    scene.start_agent();
    until("a reason", || {
        let reason = scene.agent_status().reason;
        !reason.is_empty() && reason != "not connected yet"
    });
    let status = scene.agent_status();
    println!("  wrong certificate: {}", status.reason);
    assert!(!status.is_connected);
    scene.stop_agent();
    for name in ["agent.pem", "agent.key"] {
        let keep = scene.state_dir.join(format!("{name}.kept"));
        fs::rename(keep, scene.state_dir.join(name)).unwrap();
    }
    scene.start_agent();
    scene.connected();
}

#[test]
fn a_second_agent_is_fenced() {
    require(&["cp"]);
    let mut scene = Scene::start(&Setup::default());
    let source = scene.image("disk.img", 64 * MIB);
    let _device = scene.attach(&source, "disk");
    scene.protect("disk");
    // The machine is given away: its agent is fenced and says so; given back, it goes on.
    let token = scene.token();
    let enrolled = scene.enrol_as(&scene.root.join("second"), &token, "web2");
    assert_eq!(enrolled.code, 0, "{enrolled:?}");
    let agents: Vec<Agent> = scene.aft_json(&["agent", "list"]);
    let own_id = scene.agent_status().agent;
    let other = agents
        .iter()
        .find(|agent| agent.agent != own_id)
        .unwrap()
        .agent
        .to_string();
    let _said = scene.aft_ok(&["machine", "move", "web1", &other]);
    cut(&scene, &format!("held by agent {other}"));
    let _said = scene.aft_ok(&["machine", "move", "web1", &own_id.to_string()]);
    scene.stop_agent();
    scene.start_agent();
    scene.connected();
    scene.protected("disk");
    scene.assert_replica_equals("disk");
    // A stream that is open ends with its agent's right, and the agent says why.
    let _said = scene.aft_ok(&["agent", "revoke", &own_id.to_string()]);
    cut(&scene, "was revoked");
    let said = scene.aft_ok(&["agent", "status"]);
    assert!(said.contains("was revoked"), "{said}");
}

/// Waits until the agent has lost its connection, and asserts the reason.
fn cut(scene: &Scene, why: &str) {
    until("the cut", || !scene.agent_status().is_connected);
    let reason = scene.agent_status().reason;
    println!("  cut: {reason}");
    assert!(reason.contains(why), "{reason}");
    until("the appliance to know", || !scene.machine().is_connected);
}

#[test]
fn disks_and_references() {
    require(&["blockdev"]);
    let mut scene = Scene::start(&Setup::default());
    let source = scene.image("disk.img", 64 * MIB);
    let device = scene.attach(&source, "root");
    run("mkfs.ext4", &["-q".as_ref(), device.as_os_str()]);
    scene.protect("root");
    let point = scene.aft(&["point", "create", "web1", "--name", "before-upgrade"]);
    assert_eq!(point.code, 0, "{point:?}");
    let place = scene.root.join("view").display().to_string();
    let mount = |reference: &str| scene.aft(&["mount", reference, &place]);
    // The nearest that exists is named.
    mount("web1/root@before-upgrad").refuses(3, &["before-upgrade"]);
    mount("web1/rot@latest").refuses(3, &["root"]);
    mount("web2/root@latest").refuses(3, &["web1"]);
    mount("web1/root@lsn:99999999").refuses(3, &["lsn"]);
    mount("web1/root@2001-01-01T00:00:00Z").refuses(3, &[]);
    mount("web1").refuses(3, &[]);
    scene.aft(&["mount"]).refuses(2, &["REF"]);
    scene.aft(&["umount", "17"]).refuses(3, &["17"]);
    scene
        .aft(&["point", "create", "web1", "--name", "before-upgrade"])
        .refuses(3, &["before-upgrade"]);
    scene
        .aft(&["point", "delete", "web1", "never"])
        .refuses(3, &["never"]);
    // Directories that are not free.
    let busy = scene.root.join("busy");
    fs::create_dir(&busy).unwrap();
    fs::write(busy.join("mine"), "kept").unwrap();
    let text = busy.display().to_string();
    let full = scene.aft(&["mount", "web1/root@latest", &text]);
    assert!(
        full.code != 0 && full.stderr.contains("not empty"),
        "{full:?}"
    );
    let live = FsMount::new(&device, &scene.root.join("live"), "");
    let text = live.path.display().to_string();
    let mounted = scene.aft(&["mount", "web1/root@latest", &text]);
    assert!(
        mounted.code != 0 && mounted.stderr.contains(&text),
        "{mounted:?}"
    );
    assert!(
        scene
            .server_api()
            .get::<Vec<afterimage_protocol::rest::server::Mount>>("/v1/mounts")
            .is_empty()
    );
    // A view in use is not taken away from its user.
    let view = View::files(&scene, "web1/root@latest");
    let user = std::fs::File::open(view.path().join("lost+found")).unwrap();
    let number = view.mount.id.to_string();
    let used = scene.aft(&["umount", &number]);
    println!("  in use: exit {} {}", used.code, used.stderr.trim());
    assert!(used.code == 1 || used.code == 4, "{used:?}");
    drop(user);
    view.close();
    // Sources.
    let attach = |source: &Path, name: &str| {
        scene.aft(&[
            "disk",
            "attach",
            &source.display().to_string(),
            "--name",
            name,
        ])
    };
    let again = attach(&source, "again");
    assert!(
        again.code != 0 && again.stderr.contains("attached as root"),
        "{again:?}"
    );
    let missing = attach(Path::new("/no/such/image"), "none");
    assert!(
        missing.code != 0 && missing.stderr.contains("/no/such/image"),
        "{missing:?}"
    );
    let in_use = scene.aft(&["disk", "detach", "root"]);
    assert!(
        in_use.code != 0 && in_use.stderr.contains("in use"),
        "{in_use:?}"
    );
    live.umount();
    // A disk that shrank stays out, and is not touched.
    scene.stop_agent();
    let file = fs::File::options().write(true).open(&source).unwrap();
    file.set_len(32 * MIB).unwrap();
    scene.start_agent();
    let disk = scene.disk("root");
    println!("  shrunk: {}", disk.reason);
    assert!(disk.reason.contains("shrank"), "{disk:?}");
    assert_eq!(disk.phase, Some(DiskPhase::SourceError));
    assert!(disk.device.is_empty(), "nothing can be written");
    let view = View::files(&scene, "web1/root@before-upgrade");
    view.close();
}

#[test]
fn daemons() {
    require(&["setpriv", "unshare"]);
    let mut scene = Scene::start(&Setup::default());
    let pid = scene.server.as_ref().unwrap().pid().to_string();
    daemon("afterimaged", &scene.server_arguments()).refuses(3, &["another afterimaged", &pid]);
    agent_run(&scene.state_dir, &scene.root).refuses(3, &["another agent"]);
    agent_run(&scene.root.join("empty"), &scene.root).refuses(4, &["enrol"]);
    // Not root.
    let unprivileged = |program: &str, arguments: &[String]| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
        outcome_of(
            command
                .arg(program_copy(&scene.root, program))
                .args(arguments),
        )
    };
    unprivileged("afterimaged", &scene.server_arguments()).refuses(4, &["root"]);
    let run_agent = ["run".to_owned()];
    unprivileged("afterimage-agent", &run_agent).refuses(4, &["root"]);
    // Nobody there.
    let socket = scene.root.join("nowhere.sock").display().to_string();
    scene
        .aft(&["--socket", &socket, "status"])
        .refuses(1, &["nowhere.sock"]);
    // No FUSE, and no loop: a name space with an empty /dev.
    scene.stop_agent();
    scene.stop_server();
    let bare = |arguments: &str| {
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c"]);
        outcome_of(command.arg(format!(
            "mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && exec {arguments}"
        )))
    };
    let server = format!(
        "{} {}",
        own("afterimaged").display(),
        scene.server_arguments().join(" ")
    );
    bare(&server).refuses(4, &["FUSE"]);
    // A data directory of a newer format is left as it is.
    let manifests = fs::read_dir(scene.data_dir.join("manifest")).unwrap();
    let newest = manifests.map(|entry| entry.unwrap().path()).max().unwrap();
    let before = fs::read(&newest).unwrap();
    let mut newer = before.clone();
    let commits = before
        .windows(8)
        .enumerate()
        .filter(|(_, bytes)| *bytes == b"AIMANIFE");
    for (at, _) in commits {
        newer[at + 8..at + 10].copy_from_slice(&999_u16.to_le_bytes());
    }
    fs::write(&newest, &newer).unwrap();
    daemon("afterimaged", &scene.server_arguments()).refuses(4, &["999"]);
    assert_eq!(fs::read(&newest).unwrap(), newer, "nothing was changed");
    fs::write(&newest, before).unwrap();
    scene.start_server();
    scene.start_agent();
    scene.connected();
}

/// Where somebody else than root may run it.
fn program_copy(root: &Path, program: &str) -> std::path::PathBuf {
    use std::os::unix::fs::PermissionsExt;
    let copy = root.join(program);
    fs::copy(own(program), &copy).unwrap();
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(root, fs::Permissions::from_mode(0o755)).unwrap();
    copy
}

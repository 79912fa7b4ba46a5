//! `aft files`: single files of a disk as it was, also of a file system that means no good.

#![allow(clippy::unwrap_used)]

use std::ffi::OsStr;
use std::fs::{self, File, Metadata};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use afterimage_protocol::rest::server::Mount;
use afterimage_tests::process::programs::own;
use afterimage_tests::process::{FsMount, MIB, Scene, Setup, require, run};
use serde_json::Value;

const BEFORE: &str = "web1/disk@before";
const AFTER: &str = "web1/disk@after";
const ODD: &[u8] = b"no-utf8-\xff\xfe";

struct Rig {
    scene: Scene,
    live: Option<FsMount>,
}

impl Rig {
    /// A file system with all kinds of files, and a point of it.
    fn new(kind: &str) -> Self {
        let scene = Scene::start(&Setup::default());
        let image = scene.image("disk.img", 320 * MIB);
        let device = scene.attach(&image, "disk");
        let node = device.display().to_string();
        let words: &[&str] = match kind {
            "ext4" => &["-q", "-F"],
            _ => &["-q", "-f", "-s", "size=512"],
        };
        run(&format!("mkfs.{kind}"), &[words, &[&node]].concat());
        scene.protect("disk");
        let live = FsMount::new(&device, &scene.root.join("live"), "");
        let live = Some(live);
        let rig = Self { scene, live };
        rig.fill();
        rig.point("before");
        rig
    }

    fn place(&self) -> PathBuf {
        self.live.as_ref().unwrap().path.clone()
    }

    fn fill(&self) {
        let root = self.place();
        fs::create_dir_all(root.join("d/inner/deep")).unwrap();
        fs::write(root.join("d/plain"), "plain text\n").unwrap();
        let sparse = File::create(root.join("d/sparse")).unwrap();
        sparse.set_len(64 * MIB).unwrap();
        sparse.write_all_at(&[1; 8192], 32 * MIB).unwrap();
        drop(sparse);
        fs::write(root.join("d/tool"), "#!/bin/sh\n").unwrap();
        fs::set_permissions(root.join("d/tool"), fs::Permissions::from_mode(0o4751)).unwrap();
        run(
            "chown",
            &["1234:4321".as_ref(), root.join("d/tool").as_os_str()],
        );
        // chown takes the bit away.
        fs::set_permissions(root.join("d/tool"), fs::Permissions::from_mode(0o4751)).unwrap();
        let plain = root.join("d/plain");
        run(
            "setfattr",
            &[
                "-n",
                "user.note",
                "-v",
                "kept",
                &plain.display().to_string(),
            ],
        );
        fs::hard_link(&plain, root.join("d/linked")).unwrap();
        symlink("/etc/passwd", root.join("out")).unwrap();
        symlink("../../../..", root.join("d/up")).unwrap();
        symlink("/etc", root.join("d/etc")).unwrap();
        fs::write(root.join("line\nbreak\u{1b}[31m"), "odd").unwrap();
        fs::write(root.join(OsStr::from_bytes(ODD)), "odder").unwrap();
        run("mkfifo", &[root.join("d/pipe")]);
        run(
            "touch",
            &[
                "-d",
                "2001-02-03T04:05:06.789Z",
                &plain.display().to_string(),
            ],
        );
        self.sync();
    }

    fn sync(&self) {
        run("sync", &["-f".as_ref(), self.place().as_os_str()]);
        self.scene.caught_up();
    }

    fn point(&self, name: &str) {
        let made = self.scene.aft(&["point", "create", "web1", "--name", name]);
        assert_eq!(made.code, 0, "{made:?}");
    }

    fn lines(&self, arguments: &[&str]) -> Vec<Value> {
        let said = self
            .scene
            .aft_ok(&[&["--json", "files"], arguments].concat());
        said.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    fn nothing_stays(&self) {
        let mounts: Vec<Mount> = self.scene.aft_json(&["mounts"]);
        assert!(mounts.is_empty(), "{mounts:?}");
    }
}

fn raw(rig: &Rig, arguments: &[&str]) -> (i32, Vec<u8>) {
    let socket = rig.scene.data_dir.join("control.sock");
    let output = Command::new(own("aft"))
        .env("AFTERIMAGE_SOCKET", socket)
        .args(arguments)
        .output()
        .unwrap();
    (output.status.code().unwrap(), output.stdout)
}

/// What a copy must keep of a file.
fn kept(metadata: &Metadata) -> (u32, u32, u32, u64, i64, i64) {
    // What a directory itself takes is its file system's business.
    let bytes = if metadata.is_dir() { 0 } else { metadata.len() };
    (
        metadata.mode(),
        metadata.uid(),
        metadata.gid(),
        bytes,
        metadata.mtime(),
        metadata.mtime_nsec(),
    )
}

#[test]
fn files_are_listed_and_brought_back_as_they_were() {
    require(&["setfattr", "getfattr", "mkfifo", "tar", "cp"]);
    let rig = Rig::new("ext4");
    let listed = rig.lines(&["ls", BEFORE]);
    let path = |line: &Value| line["path"].as_str().unwrap().to_owned();
    let names: Vec<String> = listed.iter().map(path).collect();
    assert!(
        names.contains(&"line\nbreak\u{1b}[31m".to_owned()),
        "{names:?}"
    );
    let odd = listed
        .iter()
        .find(|line| !line["path_hex"].is_null())
        .unwrap();
    let hex: String = ODD.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(odd["path_hex"], hex);
    // Nothing of a name reaches the terminal as more than a name.
    let plain = rig.scene.aft_ok(&["files", "ls", "-l", BEFORE]);
    assert!(
        plain.contains("line?break?[31m") && !plain.contains('\u{1b}'),
        "{plain}"
    );
    assert!(plain.contains("lrwxrwxrwx"), "{plain}");
    assert!(plain.contains("out -> /etc/passwd"), "{plain}");
    let long = rig.scene.aft_ok(&["files", "ls", "-l", BEFORE, "/d/tool"]);
    assert!(long.contains("-rwsr-x--x  1234  4321"), "{long}");
    let all = rig.lines(&["ls", "-R", BEFORE]);
    let all: Vec<String> = all.iter().map(path).collect();
    assert!(all.contains(&"d/inner/deep".to_owned()), "{all:?}");
    assert!(
        !all.iter().any(|path| path.starts_with("d/etc/")),
        "{all:?}"
    );

    // A file, and a tree.
    let target = rig.scene.root.join("restored");
    let text = target.display().to_string();
    let _said = rig.scene.aft_ok(&["files", "get", BEFORE, "/d", &text]);
    for name in ["", "plain", "sparse", "tool", "inner/deep", "up", "pipe"] {
        let (here, there) = (rig.place().join("d").join(name), target.join(name));
        let here = fs::symlink_metadata(here).unwrap();
        let there = fs::symlink_metadata(there).unwrap();
        assert_eq!(kept(&here), kept(&there), "{name}");
    }
    assert_eq!(
        fs::read_to_string(target.join("plain")).unwrap(),
        "plain text\n"
    );
    let holes = fs::metadata(target.join("sparse")).unwrap().blocks() * 512;
    assert!(holes < MIB, "{holes}");
    run(
        "cmp",
        &[rig.place().join("d/sparse"), target.join("sparse")],
    );
    let plain = target.join("plain").display().to_string();
    assert_eq!(
        run("getfattr", &["--only-values", "-n", "user.note", &plain]),
        "kept"
    );
    let inode = |name: &str| fs::metadata(target.join(name)).unwrap().ino();
    assert_eq!(inode("plain"), inode("linked"), "hard links stay links");
    assert_eq!(
        fs::read_link(target.join("etc")).unwrap(),
        Path::new("/etc")
    );
    // Into a directory that is there; never over something.
    let into = rig.scene.root.join("into");
    fs::create_dir(&into).unwrap();
    let into_text = into.display().to_string();
    let _said = rig
        .scene
        .aft_ok(&["files", "get", BEFORE, "d/plain", &into_text]);
    assert_eq!(
        fs::read_to_string(into.join("plain")).unwrap(),
        "plain text\n"
    );
    rig.scene
        .aft(&["files", "get", BEFORE, "d/plain", &into_text])
        .refuses(3, &["is there already"]);
    // A link that somebody put there is not written through.
    symlink("/nowhere", into.join("tool")).unwrap();
    rig.scene
        .aft(&["files", "get", BEFORE, "d/tool", &into_text])
        .refuses(3, &["is there already"]);

    // Standard output.
    let (code, bytes) = raw(&rig, &["files", "get", BEFORE, "/d/plain", "-"]);
    assert_eq!((code, bytes.as_slice()), (0, b"plain text\n".as_slice()));
    let (code, archive) = raw(&rig, &["files", "get", BEFORE, "/d", "-"]);
    assert_eq!(code, 0);
    let tar = rig.scene.root.join("d.tar");
    assert!(archive.len() < 200_000, "{}", archive.len());
    fs::write(&tar, archive).unwrap();
    let names = run("tar", &["-tf".as_ref(), tar.as_os_str()]);
    assert!(
        names.contains("d/inner/deep/") && names.contains("d/sparse"),
        "{names}"
    );

    // Nothing leads out.
    for (path, words) in [
        ("/out/x", vec!["symbolic link", "not followed"]),
        ("/d/up/etc/passwd", vec!["symbolic link", "not followed"]),
        ("/d/../../etc/passwd", vec!["no path from the root"]),
        ("/none", vec!["cannot find", "aft files ls"]),
    ] {
        rig.scene
            .aft(&["files", "get", BEFORE, path, "-"])
            .refuses(3, &words);
    }
    rig.scene
        .aft(&["files", "get", BEFORE, "/out", "-"])
        .refuses(3, &["has no bytes"]);
    let link = rig.scene.root.join("link");
    let _said = rig
        .scene
        .aft_ok(&["files", "get", BEFORE, "/out", &link.display().to_string()]);
    assert_eq!(fs::read_link(&link).unwrap(), Path::new("/etc/passwd"));
    rig.scene
        .aft(&["files", "ls", "web1/disk@never"])
        .refuses(3, &["no point \"never\""]);
    rig.nothing_stays();
}

fn changes(kind: &str) {
    require(&["setfattr", "mkfs.xfs"]);
    let mut rig = Rig::new(kind);
    let root = rig.place();
    fs::write(root.join("d/plain"), "plain TEXT\n").unwrap();
    fs::write(root.join("d/new"), vec![1; 5000]).unwrap();
    fs::create_dir(root.join("fresh")).unwrap();
    fs::write(root.join("fresh/one"), "1").unwrap();
    fs::remove_file(root.join("d/tool")).unwrap();
    fs::set_permissions(root.join("d/inner"), fs::Permissions::from_mode(0o700)).unwrap();
    File::options()
        .append(true)
        .open(root.join("d/sparse"))
        .unwrap()
        .set_len(65 * MIB)
        .unwrap();
    fs::remove_file(root.join("d/etc")).unwrap();
    symlink("/usr", root.join("d/etc")).unwrap();
    rig.sync();
    rig.point("after");
    let lines = rig.lines(&["diff", BEFORE, "@after"]);
    let (summary, lines) = lines.split_last().unwrap();
    let shown: Vec<String> = lines
        .iter()
        .map(|line| {
            let what = line["what"].as_array().cloned().unwrap_or_default();
            let what: Vec<&str> = what.iter().filter_map(Value::as_str).collect();
            format!(
                "{} {} {}",
                line["change"].as_str().unwrap(),
                line["path"].as_str().unwrap(),
                what.join(",")
            )
        })
        .collect();
    println!("{shown:#?}");
    for expected in [
        "added d/new ",
        "added fresh ",
        "added fresh/one ",
        "removed d/tool ",
        "changed d/plain content",
        "changed d/linked content",
        "changed d/inner mode",
        "changed d/sparse size",
        "changed d/etc target",
    ] {
        assert!(shown.iter().any(|line| line == expected), "{expected}");
    }
    assert_eq!(shown.len(), 9, "nothing else changed");
    assert_eq!(summary["added"], 3);
    assert_eq!(summary["added_bytes"], 5001);
    assert_eq!(summary["removed"], 1);
    let text = rig.scene.aft_ok(&["files", "diff", BEFORE, AFTER, "/d"]);
    assert!(text.contains("removed d/tool 10 bytes"), "{text}");
    assert!(text.contains("67108864 -> 68157440 bytes (size)"), "{text}");
    assert!(!text.contains("fresh"), "{text}");
    let same = rig.lines(&["diff", BEFORE, BEFORE, "--content"]);
    assert_eq!(same.len(), 1, "{same:?}");
    rig.nothing_stays();
    rig.live.take().unwrap().umount();
}

#[test]
fn what_changed_on_ext4_is_shown() {
    changes("ext4");
}

#[test]
fn what_changed_on_xfs_is_shown() {
    changes("xfs");
}

/// A directory whose block is damaged is named; the rest is there, and nothing stays.
#[test]
fn a_damaged_file_system_is_told_from_an_empty_one() {
    require(&["debugfs"]);
    let scene = Scene::start(&Setup::default());
    let image = scene.image("disk.img", 32 * MIB);
    let files = scene.root.join("files");
    fs::create_dir_all(files.join("bad")).unwrap();
    fs::write(files.join("bad/file"), "x").unwrap();
    fs::write(files.join("good"), "y").unwrap();
    let (from, to) = (files.display().to_string(), image.display().to_string());
    run(
        "mkfs.ext4",
        &[
            "-q",
            "-F",
            "-b",
            "1024",
            "-O",
            "metadata_csum",
            "-d",
            &from,
            &to,
        ],
    );
    let block = run("debugfs", &["-R", "blocks /bad", &to]);
    let block: u64 = block.trim().parse().unwrap();
    let file = fs::OpenOptions::new().write(true).open(&image).unwrap();
    file.write_all_at(&[0xA5; 1024], block * 1024).unwrap();
    file.sync_all().unwrap();
    drop(file);
    let _device = scene.attach(&image, "disk");
    scene.protect("disk");
    scene.caught_up();
    scene
        .aft(&["files", "ls", "web1/disk@latest", "/bad"])
        .refuses(6, &["cannot list \"bad\"", "another point"]);
    let all = scene.aft(&["files", "ls", "-R", "web1/disk@latest"]);
    println!("{all:?}");
    assert!(all.stdout.contains("good"), "{all:?}");
    all.refuses(6, &["cannot list \"bad\"", "could not be read"]);
    let target = scene.root.join("back").display().to_string();
    scene
        .aft(&["files", "get", "web1/disk@latest", "/bad", &target])
        .refuses(6, &["not all of \"bad\" came back"]);
    let mounts: Vec<Mount> = scene.aft_json(&["mounts"]);
    assert!(mounts.is_empty(), "{mounts:?}");
}

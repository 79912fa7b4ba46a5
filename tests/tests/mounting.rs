//! What is on a disk is told and mounted as it should be: partitions of both tables, members of
//! LVM and md, containers, file systems beside their live originals; and what is shown of a disk
//! in the tree is skipped over by tools where it has holes.

#![allow(clippy::unwrap_used)]

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use afterimage_protocol::rest::server::Mount;
use afterimage_tests::process::{
    FsMount, LoopFile, MIB, Scene, Setup, assert_equal_devices, guards::sparse, require, run, until,
};

/// A disk without a tap's history: its image is protected as it is.
fn protected(image: &Path, scene: &Scene) -> PathBuf {
    let device = scene.attach(image, "disk");
    scene.protect("disk");
    scene.caught_up();
    device
}

/// Makes a partition table by sfdisk's words.
fn table(image: &Path, bytes: u64, script: &str) {
    sparse(image, bytes);
    let mut child = Command::new("sfdisk")
        .args(["-q", &image.display().to_string()])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    input.write_all(script.as_bytes()).unwrap();
    drop(input);
    assert!(child.wait().unwrap().success());
}

/// Makes something in a file of its own, and puts it into a disk at a sector.
fn put(scene: &Scene, image: &Path, sector: u64, bytes: u64, make: impl FnOnce(&Path)) {
    let part = scene.root.join("part.img");
    sparse(&part, bytes);
    make(&part);
    run(
        "dd",
        &[
            &format!("if={}", part.display()),
            &format!("of={}", image.display()),
            &format!("seek={sector}"),
            "bs=512",
            "conv=notrunc,sparse",
            "status=none",
        ],
    );
}

fn with_file(kind: &'static str, words: &'static [&'static str], text: &str) -> impl FnOnce(&Path) {
    let (text, kind) = (text.to_owned(), kind);
    move |part| {
        let place = part.display().to_string();
        run(&format!("mkfs.{kind}"), &[words, &[&place]].concat());
        let device = LoopFile::new(part);
        let directory = part.with_extension("mounted");
        let mounted = FsMount::new(&device.device, &directory, "");
        fs::write(mounted.path.join("which"), text).unwrap();
        mounted.umount();
    }
}

fn mount(scene: &Scene, arguments: &[&str]) -> Mount {
    scene.aft_json(&[&["mount"], arguments].concat())
}

fn which(mount: &Mount) -> String {
    fs::read_to_string(Path::new(mount.directory.as_ref().unwrap()).join("which")).unwrap()
}

fn umount(scene: &Scene, mount: &Mount) {
    let _said = scene.aft_ok(&["umount", &mount.id.to_string()]);
}

#[test]
fn every_kind_of_partition_is_named_and_the_wanted_one_is_mounted() {
    require(&[
        "sfdisk",
        "mkfs.xfs",
        "mkfs.vfat",
        "mkswap",
        "pvcreate",
        "cryptsetup",
    ]);
    let scene = Scene::start(&Setup::default());
    let image = scene.root.join("disk.img");
    let sizes: [u64; 7] = [32, 320, 16, 16, 16, 16, 32];
    let mut script = "label: gpt\n".to_owned();
    let mut starts = Vec::new();
    let mut next = 2048;
    for size in sizes {
        script.push_str(&format!("start={next}, size={}\n", size * 2048));
        starts.push(next);
        next += size * 2048;
    }
    table(&image, (next + 4096) * 512, &script);
    let part = |number: usize, make: Box<dyn FnOnce(&Path)>| {
        put(&scene, &image, starts[number], sizes[number] * MIB, make);
    };
    part(
        0,
        Box::new(with_file("ext4", &["-q", "-F", "-L", "root"], "one")),
    );
    part(
        1,
        Box::new(with_file("xfs", &["-q", "-s", "size=512"], "two")),
    );
    part(2, Box::new(|part| drop(run("mkfs.vfat", &[part]))));
    part(
        3,
        Box::new(|part| drop(run("mkswap", &["-q".as_ref(), part.as_os_str()]))),
    );
    part(
        4,
        Box::new(|part| {
            let device = LoopFile::new(part);
            let config = "devices{use_devicesfile=0} activation{udev_sync=0 udev_rules=0}";
            let node = device.device.display().to_string();
            run("pvcreate", &["-qq", "-ff", "-y", "--config", config, &node]);
        }),
    );
    part(
        5,
        Box::new(|part| {
            let key = part.with_extension("key");
            fs::write(&key, "secret").unwrap();
            let (key, part) = (key.display().to_string(), part.display().to_string());
            let quick = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"];
            let words = ["luksFormat", "--batch-mode", "--key-file", &key, &part];
            run("cryptsetup", &[&words[..], &quick].concat());
        }),
    );
    // Not every kernel has md; these are the fields that tell a member of version 1.2.
    part(
        6,
        Box::new(|part| {
            let file = OpenOptions::new().write(true).open(part).unwrap();
            file.write_all_at(&0xA92B_4EFCu32.to_le_bytes(), 4096)
                .unwrap();
            file.write_all_at(&1u32.to_le_bytes(), 4100).unwrap();
        }),
    );
    let _device = protected(&image, &scene);
    let reference = "web1/disk@latest";
    scene.aft(&["mount", reference]).refuses(
        3,
        &[
            "3 of its partitions can be mounted",
            "partition 1 holds ext4 (32 MiB, \"root\")",
            "partition 2 holds xfs",
            "partition 3 holds vfat",
            "partition 4 holds swap",
            "partition 5 holds an LVM2 physical volume",
            "partition 6 holds a LUKS container",
            "partition 7 holds an md RAID member",
            "--partition",
        ],
    );
    for (number, text) in [("1", "one"), ("2", "two")] {
        let shown = mount(&scene, &[reference, "--partition", number]);
        assert_eq!(which(&shown), text);
        umount(&scene, &shown);
    }
    for (number, words) in [
        ("4", vec!["partition 4 holds swap", "holds no files"]),
        ("5", vec!["LVM2", "--device --partition 5", "vgimportclone"]),
        (
            "6",
            vec!["LUKS", "--device --partition 6", "cryptsetup open"],
        ),
        (
            "7",
            vec!["md RAID", "--device --partition 7", "mdadm --assemble"],
        ),
        ("9", vec!["no partition 9", "partition 1 holds ext4"]),
    ] {
        scene
            .aft(&["mount", reference, "--partition", number])
            .refuses(3, &words);
    }
    // As a device: nodes of all partitions, but of none that this machine might take up by itself.
    let shown = mount(&scene, &[reference, "--device"]);
    let node = |number: u32| PathBuf::from(format!("{}p{number}", shown.device));
    for number in [1, 2, 3, 4, 6] {
        assert!(node(number).exists(), "{number}: {:?}", shown.notes);
    }
    for number in [5, 7] {
        assert!(!is_known(&node(number)), "{number}");
    }
    assert!(
        shown
            .notes
            .iter()
            .any(|note| note.contains("vgimportclone"))
    );
    umount(&scene, &shown);
    assert!(!is_known(&node(1)), "no partition stays");
    let shown = mount(&scene, &[reference, "--device", "--partition", "5"]);
    assert!(shown.device.ends_with("p5"), "{}", shown.device);
    let mut label = [0; 8];
    File::open(&shown.device)
        .unwrap()
        .read_exact_at(&mut label, 512)
        .unwrap();
    assert_eq!(&label, b"LABELONE");
    umount(&scene, &shown);
    scene.assert_replica_equals("disk");
}

/// Says whether the kernel knows a partition; a node without one may stay in `/dev`.
fn is_known(node: &Path) -> bool {
    Path::new("/sys/class/block")
        .join(node.file_name().unwrap())
        .exists()
}

#[test]
fn logical_partitions_of_an_mbr_are_mounted() {
    require(&["sfdisk", "mkfs.ext4"]);
    let scene = Scene::start(&Setup::default());
    let image = scene.root.join("disk.img");
    let script = "label: dos\n\
        start=2048, size=32768, type=83\n\
        start=40960, size=122880, type=5\n\
        start=43008, size=32768, type=83\n\
        start=83968, size=32768, type=83\n";
    table(&image, 96 * MIB, script);
    for (sector, text) in [(2048, "first"), (43_008, "fifth"), (83_968, "sixth")] {
        put(
            &scene,
            &image,
            sector,
            16 * MIB,
            with_file("ext4", &["-q", "-F"], text),
        );
    }
    let _device = protected(&image, &scene);
    let reference = "web1/disk@latest";
    scene
        .aft(&["mount", reference])
        .refuses(3, &["MBR", "partition 5", "partition 6"]);
    for (number, text) in [("1", "first"), ("5", "fifth"), ("6", "sixth")] {
        let shown = mount(&scene, &[reference, "--partition", number]);
        assert_eq!(which(&shown), text);
        umount(&scene, &shown);
    }
    scene
        .aft(&["mount", reference, "--partition", "2"])
        .refuses(3, &["no partition 2"]);
}

fn options_of(directory: &str) -> String {
    let table = fs::read_to_string("/proc/self/mounts").unwrap();
    let mut lines = table.lines();
    let line = lines.find(|line| line.contains(directory)).unwrap();
    line.split(' ').nth(3).unwrap().to_owned()
}

#[test]
fn what_a_copy_may_do_is_what_was_allowed() {
    require(&[]);
    let scene = Scene::start(&Setup::default());
    let image = scene.image("disk.img", 32 * MIB);
    run(
        "mkfs.ext4",
        &["-q".as_ref(), "-F".as_ref(), image.as_os_str()],
    );
    let _device = protected(&image, &scene);
    let has = |shown: &Mount, option: &str| {
        let options = options_of(shown.directory.as_ref().unwrap());
        options.split(',').any(|found| found == option)
    };
    let shown = mount(&scene, &["web1/disk@latest"]);
    for option in ["nosuid", "nodev", "noexec", "rw"] {
        assert!(has(&shown, option), "{option}");
    }
    umount(&scene, &shown);
    let shown = mount(
        &scene,
        &["web1/disk@latest", "--allow", "suid,exec", "--read-only"],
    );
    for (option, is_there) in [
        ("nosuid", false),
        ("nodev", true),
        ("noexec", false),
        ("ro", true),
    ] {
        assert_eq!(has(&shown, option), is_there, "{option}");
    }
    let place = Path::new(shown.directory.as_ref().unwrap());
    assert!(fs::write(place.join("file"), "").is_err());
    umount(&scene, &shown);
}

/// The original is mounted and written all the time; several states of it are mounted beside it.
fn beside(kind: &str, words: &[&str]) {
    require(&["mkfs.xfs", "mkfs.btrfs"]);
    let scene = Scene::start(&Setup::default());
    let image = scene.image("disk.img", 320 * MIB);
    let device = scene.attach(&image, "disk");
    let node = device.display().to_string();
    run(&format!("mkfs.{kind}"), &[words, &[&node]].concat());
    scene.protect("disk");
    let live = FsMount::new(&device, &scene.root.join("live"), "");
    let write = |name: &str| {
        fs::write(live.path.join(name), name.repeat(10_000)).unwrap();
        run("sync", &["-f".as_ref(), live.path.as_os_str()]);
        scene.caught_up();
    };
    write("first");
    let point = scene.aft(&["point", "create", "web1", "--name", "one"]);
    assert_eq!(point.code, 0, "{point:?}");
    write("second");
    // Not synced, so that there is a journal to replay.
    fs::write(live.path.join("unsynced"), "x").unwrap();
    scene.caught_up();
    let old = mount(&scene, &["web1/disk@one"]);
    let new = mount(&scene, &["web1/disk@latest"]);
    write("third");
    let (old_place, new_place) = (
        old.directory.clone().unwrap(),
        new.directory.clone().unwrap(),
    );
    let has = |place: &str, name: &str| Path::new(place).join(name).exists();
    assert!(has(&old_place, "first") && !has(&old_place, "second"));
    assert!(has(&new_place, "second") && !has(&new_place, "third"));
    for place in [&old_place, &new_place] {
        let text = fs::read_to_string(Path::new(place).join("first")).unwrap();
        assert_eq!(text, "first".repeat(10_000));
        fs::write(Path::new(place).join("mine"), "private").unwrap();
    }
    assert!(!live.path.join("mine").exists());
    println!(
        "{kind}: beside the live original: {:?} and {:?}",
        old.notes, new.notes
    );
    umount(&scene, &old);
    umount(&scene, &new);
    write("fourth");
    live.umount();
    scene.assert_replica_equals("disk");
}

#[test]
fn ext4_beside_its_live_original() {
    beside("ext4", &["-q", "-F"]);
}

#[test]
fn xfs_beside_its_live_original() {
    beside("xfs", &["-q", "-f", "-s", "size=512"]);
}

#[test]
fn btrfs_beside_its_live_original() {
    beside("btrfs", &["-q", "-f"]);
}

/// What a file takes on its medium, in bytes.
fn held(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}

#[test]
fn tools_skip_the_holes_of_files_of_the_tree() {
    require(&["qemu-img", "tar", "cp", "getfattr", "cmp"]);
    let scene = Scene::start(&Setup::default());
    let image = scene.image("disk.img", 512 * MIB);
    let file = OpenOptions::new().write(true).open(&image).unwrap();
    let data: Vec<u8> = (0..3 * MIB)
        .map(|at| u8::try_from(at % 251).unwrap())
        .collect();
    for at in [0, 100, 300, 509] {
        file.write_all_at(&data, at * MIB).unwrap();
    }
    file.sync_all().unwrap();
    let device = protected(&image, &scene);
    let point = scene.aft(&["point", "create", "web1", "--name", "kept"]);
    assert_eq!(point.code, 0, "{point:?}");
    let lsn = {
        let shown = scene.view("web1/disk@kept");
        let lsn = shown.mount.lsn;
        shown.close();
        lsn
    };
    let tree = scene.data_dir.join("mounts/fuse/web1/disk");
    let files = [
        tree.join("points/kept.img"),
        tree.join(format!("at/lsn-{lsn}.img")),
    ];
    for (number, path) in files.iter().enumerate() {
        let text = path.display().to_string();
        assert_eq!(fs::metadata(path).unwrap().len(), 512 * MIB);
        let mut sizes = Vec::new();
        for (tool, words) in [
            ("cp", vec!["cp", "--sparse=auto", "IN", "OUT"]),
            (
                "qemu-img",
                vec!["qemu-img", "convert", "-f", "raw", "-O", "raw", "IN", "OUT"],
            ),
            (
                "tar",
                vec![
                    "sh",
                    "-c",
                    "tar -cSf - -C / \"${0#/}\" | tar -xOSf - > OUT",
                    "IN",
                ],
            ),
        ] {
            let out = scene.root.join(format!("copy-{number}-{tool}"));
            let place = out.display().to_string();
            let words: Vec<String> = words
                .iter()
                .map(|word| word.replace("OUT", &place).replace("IN", &text))
                .collect();
            let begun = Instant::now();
            run(&words[0], &words[1..]);
            let took = begun.elapsed();
            run("cmp", &[out.as_os_str(), image.as_os_str()]);
            println!("{tool}: {} bytes held after {took:?}", held(&out));
            sizes.push((tool, held(&out)));
            fs::remove_file(&out).unwrap();
        }
        for (tool, size) in sizes {
            // What tar writes to a pipe has no holes any more.
            assert!(tool == "tar" || size < 16 * MIB, "{tool}: {size}");
        }
        let archive = scene.root.join("archive.tar");
        let place = archive.display().to_string();
        run(
            "tar",
            &["-cSf", &place, "-C", "/", text.trim_start_matches('/')],
        );
        println!(
            "tar's archive: {} bytes",
            fs::metadata(&archive).unwrap().len()
        );
        assert!(fs::metadata(&archive).unwrap().len() < 16 * MIB);
        for (name, is_there) in [("history", true), ("lsn", true), ("epoch", true)] {
            let name = format!("user.afterimage.{name}");
            let value = run("getfattr", &["--only-values", "-n", &name, &text]);
            assert_eq!(!value.is_empty(), is_there, "{name}");
        }
        let value = run(
            "getfattr",
            &["--only-values", "-n", "user.afterimage.lsn", &text],
        );
        assert_eq!(value, lsn.to_string());
    }
    // What is open stays what it was, whatever is written since.
    let open = File::open(&files[0]).unwrap();
    let other = OpenOptions::new().write(true).open(&device).unwrap();
    other.write_all_at(&[0xEE; 4096], 0).unwrap();
    other.sync_all().unwrap();
    scene.caught_up();
    let mut first = vec![0; 4096];
    open.read_exact_at(&mut first, 0).unwrap();
    assert_eq!(first, data[..4096]);
    let mut newest = vec![0; 4096];
    let now = scene.machine().durable;
    let path = tree.join(format!("at/lsn-{now}.img"));
    File::open(path)
        .unwrap()
        .read_exact_at(&mut newest, 0)
        .unwrap();
    assert_eq!(newest, [0xEE; 4096]);
}

#[test]
fn a_view_of_a_dead_daemon_fails_at_once_goes_and_comes_back() {
    require(&["cmp", "cp"]);
    let mut scene = Scene::start(&Setup::default());
    let image = scene.image("disk.img", 64 * MIB);
    run(
        "mkfs.ext4",
        &["-q".as_ref(), "-F".as_ref(), image.as_os_str()],
    );
    let device = protected(&image, &scene);
    let live = FsMount::new(&device, &scene.root.join("live"), "");
    let bytes: Vec<u8> = (0..4_000_000u32).flat_map(u32::to_le_bytes).collect();
    fs::write(live.path.join("file"), &bytes).unwrap();
    live.umount();
    scene.caught_up();
    let point = scene.aft(&["point", "create", "web1", "--name", "kept"]);
    assert_eq!(point.code, 0, "{point:?}");
    let before = scene.root.join("before.img");
    let shown = scene.view("web1/disk@kept");
    run("cp", &[shown.device.as_os_str(), before.as_os_str()]);
    let mounted = mount(&scene, &["web1/disk@kept"]);
    let place = PathBuf::from(mounted.directory.as_ref().unwrap());
    let open = File::open(place.join("file")).unwrap();
    scene.kill_server();
    let begun = Instant::now();
    let mut buffer = vec![0; 1 << 20];
    let error = open.read_exact_at(&mut buffer, 8 << 20).unwrap_err();
    let waited = begun.elapsed();
    println!("the read ends after {waited:?}: {error}");
    assert!(waited < Duration::from_secs(1), "{waited:?}");
    assert!(
        File::open(&shown.device).is_err() || {
            let device = File::open(&shown.device).unwrap();
            device.read_exact_at(&mut buffer, 32 << 20).is_err()
        }
    );
    drop(open);
    scene.start_server();
    until("what the dead daemon left is gone", || {
        !Path::new("/sys/block")
            .join(shown.device.file_name().unwrap())
            .join("loop")
            .exists()
            && !fs::read_to_string("/proc/self/mounts")
                .unwrap()
                .contains(&place.display().to_string())
    });
    let again = scene.view("web1/disk@kept");
    assert_equal_devices(&again.device, &before);
    again.close();
    let mounted = mount(&scene, &["web1/disk@kept"]);
    let place = PathBuf::from(mounted.directory.as_ref().unwrap());
    assert!(fs::read(place.join("file")).unwrap() == bytes);
    umount(&scene, &mounted);
    scene.assert_replica_equals("disk");
}

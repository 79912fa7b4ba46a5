//! These need root, FUSE, loop devices and the tools that make file systems.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command as Program;

use afterimage_blockdev::{ErrorClass, Lsn, Timestamp};
use afterimage_protocol::rest::server::{CreateMount, MountOptions};

use crate::testing::{BRANCH, Fixture, filled, machine, point, read_only};

const REFERENCE: &str = "web/data@latest";

fn run(program: &str, arguments: &[&str]) {
    let output = Program::new(program).args(arguments).output().unwrap();
    assert!(
        output.status.success(),
        "{program}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

fn image(directory: &Path, mib: u64, make: impl FnOnce(&str)) -> Vec<u8> {
    let path = directory.join("image");
    fs::File::create(&path).unwrap().set_len(mib << 20).unwrap();
    make(path.to_str().unwrap());
    let bytes = fs::read(&path).unwrap();
    fs::remove_file(path).unwrap();
    bytes
}

fn ext4(directory: &Path) -> Vec<u8> {
    image(directory, 16, |path| run("mkfs.ext4", &["-q", "-F", path]))
}

fn want() -> CreateMount {
    CreateMount {
        reference: REFERENCE.to_owned(),
        directory: None,
        device_only: false,
        is_branch: false,
        allow_incomplete: false,
        options: MountOptions::default(),
    }
}

fn at(directory: &Path) -> CreateMount {
    CreateMount {
        directory: Some(directory.to_str().unwrap().to_owned()),
        ..want()
    }
}

fn show(fixture: &Fixture, content: &[u8]) {
    let view = read_only(content);
    fixture
        .engine
        .knows
        .lock()
        .views
        .insert(REFERENCE.to_owned(), view);
}

fn mounted(directory: &Path) -> Option<String> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let wanted = format!(" {} ", directory.display());
    table
        .lines()
        .find(|line| line.contains(&wanted))
        .map(str::to_owned)
}

fn fixture() -> (Fixture, PathBuf) {
    let fixture = Fixture::start();
    let directory = fixture.directory.path().to_owned();
    (fixture, directory)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_system_is_mounted_writable_and_the_view_is_never_written() {
    tokio::task::block_in_place(|| {
        let (fixture, directory) = fixture();
        let content = ext4(&directory);
        show(&fixture, &content);
        let place = directory.join("a/b");
        let mount = fixture.appliance.mounts.create(&at(&place)).unwrap();
        assert_eq!(mount.filesystem.as_deref(), Some("ext4"));
        assert_eq!(mount.lsn, Lsn(77));
        let line = mounted(&place).unwrap();
        for option in ["nosuid", "nodev", "noexec"] {
            assert!(line.contains(option), "{line}");
        }
        fs::write(place.join("file"), "written to the private copy").unwrap();
        assert_eq!(
            fixture.appliance.mounts.list(),
            std::slice::from_ref(&mount)
        );
        fixture.appliance.mounts.remove(mount.id, false).unwrap();
        assert!(mounted(&place).is_none());
        assert!(!place.exists(), "a directory that was made goes again");
        let again = fixture.appliance.mounts.create(&at(&place)).unwrap();
        assert!(
            !place.join("file").exists(),
            "the private copy was lost with its mount"
        );
        fixture.appliance.mounts.remove(again.id, false).unwrap();
        assert_eq!(fs::read_dir(directory.join("overlays")).unwrap().count(), 0);
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_branch_is_written_and_can_be_dropped() {
    tokio::task::block_in_place(|| {
        let (fixture, directory) = fixture();
        let branch = filled(&ext4(&directory));
        {
            let mut knows = fixture.engine.knows.lock();
            knows.machines = vec![machine(Lsn(77), Timestamp(0))];
            knows.branches.insert(REFERENCE.to_owned(), branch);
        }
        let wanted = CreateMount {
            is_branch: true,
            ..want()
        };
        let mounts = &fixture.appliance.mounts;
        let mount = mounts.create(&wanted).unwrap();
        let place = PathBuf::from(mount.directory.clone().unwrap());
        fs::write(place.join("file"), "kept").unwrap();
        mounts.remove(mount.id, false).unwrap();
        let name = mount.branch_name.unwrap();
        let listed = mounts.branches().unwrap();
        assert_eq!((&listed[0].name, listed[0].users), (&name, 0));
        let again = CreateMount {
            reference: format!("web/data@branch:{name}"),
            ..want()
        };
        let mount = mounts.create(&again).unwrap();
        let error = mounts.drop_branch(BRANCH).unwrap_err();
        assert!(error.message.contains("in use"), "{error}");
        assert_eq!(mount.history, BRANCH);
        assert_eq!(
            fs::read_to_string(place.parent().unwrap().join(format!("{}/file", mount.id))).unwrap(),
            "kept"
        );
        mounts.remove(mount.id, true).unwrap();
        fixture
            .engine
            .wait(|told| (told.dropped == [BRANCH]).then_some(()));
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_is_given_writable_and_private() {
    tokio::task::block_in_place(|| {
        let (fixture, _) = fixture();
        let content = vec![0xAB; 1 << 20];
        show(&fixture, &content);
        let mount = fixture
            .appliance
            .mounts
            .create(&CreateMount {
                device_only: true,
                ..want()
            })
            .unwrap();
        assert!(mount.directory.is_none() && mount.device.starts_with("/dev/loop"));
        assert!(mount.notes[0].contains("private copy"));
        let device = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(&mount.device)
            .unwrap();
        device.write_all_at(&[1; 4096], 8192).unwrap();
        device.sync_all().unwrap();
        let mut bytes = [0; 8192];
        device.read_exact_at(&mut bytes, 4096).unwrap();
        assert_eq!((bytes[0], bytes[4096]), (0xAB, 1));
        let error = fixture.appliance.mounts.remove(mount.id, true).unwrap_err();
        assert!(error.message.contains("not a branch"));
        drop(device);
        fixture.appliance.mounts.remove(mount.id, false).unwrap();
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_mounted_says_why_and_leaves_nothing_behind() {
    tokio::task::block_in_place(|| {
        let (fixture, directory) = fixture();
        let mounts = &fixture.appliance.mounts;
        let error = mounts.create(&want()).unwrap_err();
        assert_eq!(error.hint, "the nearest is latest");
        show(&fixture, &vec![0; 1 << 20]);
        let error = mounts.create(&want()).unwrap_err();
        assert!(error.hint.contains("--device"), "{error}");
        show(&fixture, &ext4(&directory));
        let full = directory.join("full");
        fs::create_dir(&full).unwrap();
        fs::write(full.join("file"), "").unwrap();
        for (place, why) in [
            (full.clone(), "not empty"),
            (full.join("file"), "not a directory"),
            (PathBuf::from("/proc"), "busy"),
            (PathBuf::from("relative"), "not an absolute path"),
        ] {
            let error = mounts.create(&at(&place)).unwrap_err();
            assert!(error.message.contains(why), "{error}");
            assert_eq!(error.class, ErrorClass::Refused);
        }
        let both = CreateMount {
            device_only: true,
            ..at(&full)
        };
        assert!(mounts.create(&both).is_err());
        assert!(mounts.list().is_empty());
        assert_eq!(
            mounts.remove(1, false).unwrap_err().class,
            ErrorClass::Refused
        );
        assert_eq!(
            fs::read_dir(directory.join("mounts/fuse/.mounts"))
                .unwrap()
                .count(),
            0
        );
        assert_eq!(fs::read_dir(directory.join("mounts")).unwrap().count(), 1);
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mount_in_use_stays_until_it_is_free() {
    tokio::task::block_in_place(|| {
        let mut config = crate::config::Config::default();
        config.mounts.busy_wait_ms = 20;
        config.mounts.mounts_max = 1;
        let fixture = Fixture::with(config);
        show(&fixture, &ext4(fixture.directory.path()));
        let mounts = &fixture.appliance.mounts;
        let mount = mounts.create(&want()).unwrap();
        let place = PathBuf::from(mount.directory.clone().unwrap());
        let file = fs::File::create(place.join("file")).unwrap();
        let error = mounts.remove(mount.id, false).unwrap_err();
        assert_eq!(error.class, ErrorClass::Retry);
        assert!(error.message.contains("busy"), "{error}");
        assert!(mounted(&place).is_some());
        let error = mounts.create(&want()).unwrap_err();
        assert!(error.message.contains("1 mounts already"), "{error}");
        drop(file);
        mounts.remove(mount.id, false).unwrap();
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn the_only_file_system_of_a_partition_table_is_mounted() {
    tokio::task::block_in_place(|| {
        let (fixture, directory) = fixture();
        let filesystem = ext4(&directory);
        let script = directory.join("script");
        fs::write(
            &script,
            "label: gpt\nstart=2048, size=2048\nstart=4096, size=32768\n",
        )
        .unwrap();
        let shell = |path: &str| {
            let line = format!("sfdisk -q {path} < {}", script.display());
            run("sh", &["-c", &line]);
        };
        let mut disk = image(&directory, 24, shell);
        disk[4096 * 512..][..filesystem.len()].copy_from_slice(&filesystem);
        show(&fixture, &disk);
        let mounts = &fixture.appliance.mounts;
        let mount = mounts.create(&want()).unwrap();
        assert_eq!(mount.filesystem.as_deref(), Some("ext4"));
        assert_eq!(mount.notes.len(), 3, "{:?}", mount.notes);
        assert_eq!(mount.notes[2], "partition 2 is mounted");
        mounts.remove(mount.id, false).unwrap();

        let mut two = disk.clone();
        two[2048 * 512..][..1 << 20].copy_from_slice(&filesystem[..1 << 20]);
        show(&fixture, &two);
        let error = mounts.create(&want()).unwrap_err();
        assert!(error.message.contains("2 of its partitions"), "{error}");
        assert!(mounts.list().is_empty());
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn points_and_moments_are_files() {
    tokio::task::block_in_place(|| {
        let (fixture, directory) = fixture();
        let content = vec![7; 1 << 20];
        let (web, data) = (machine(Lsn(99), Timestamp(5)), read_only(&content));
        let (id, disk) = (web.machine, web.disks[0].disk);
        {
            let mut knows = fixture.engine.knows.lock();
            let mut bad = point(3, "half");
            bad.kind = "resync-incomplete".to_owned();
            knows.points = vec![point(1, "one"), point(2, "two"), bad];
            for at in ["lsn:10", "lsn:20", "lsn:77"] {
                let reference = format!("{id}/{disk}@{}:{at}", web.trunk);
                knows.views.insert(reference, data.clone());
            }
            for at in ["lsn:77", "2026-07-31T12:00:00Z"] {
                knows
                    .views
                    .insert(format!("{id}/{disk}@{at}"), data.clone());
            }
            knows.machines = vec![web];
        }
        let root = directory.join("mounts/fuse");
        let names = |path: &str| {
            let entries = fs::read_dir(root.join(path)).unwrap();
            let mut names: Vec<_> = entries
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect();
            names.sort();
            names
        };
        assert_eq!(names(""), ["web"]);
        assert_eq!(names("web"), ["data"]);
        assert_eq!(names("web/data"), ["at", "branches", "points"]);
        assert_eq!(names("web/data/points"), ["one.img", "two.img"]);
        assert!(names("web/data/at").is_empty());
        for file in [
            "points/one.img",
            "at/lsn-77.img",
            "at/2026-07-31T12:00:00Z.img",
        ] {
            let path = root.join("web/data").join(file);
            assert_eq!(fs::metadata(&path).unwrap().len(), 1 << 20, "{file}");
            assert!(fs::read(&path).unwrap() == content, "{file}");
            assert!(
                fs::OpenOptions::new().write(true).open(&path).is_err(),
                "{file}"
            );
        }
        for missing in [
            "points/half.img",
            "points/three.img",
            "points/one",
            "at/latest.img",
            "x",
        ] {
            assert!(!root.join("web/data").join(missing).exists(), "{missing}");
        }
        assert!(!root.join("nobody").exists());
    });
}

/// Resident memory of this process, in bytes.
fn resident_bytes() -> u64 {
    let text = fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = text.split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_thousand_points_are_listed_page_by_page() {
    const COUNT: u64 = 100_000;
    tokio::task::block_in_place(|| {
        let (fixture, directory) = fixture();
        {
            let mut knows = fixture.engine.knows.lock();
            knows.machines = vec![machine(Lsn(99), Timestamp(5))];
            knows.points = (1..=COUNT)
                .map(|id| point(id, &format!("point-{id:06}")))
                .collect();
            knows.point_bytes = Some(7 << 30);
        }
        let points = directory.join("mounts/fuse/web/data/points");
        let before = resident_bytes();
        let begun = std::time::Instant::now();
        let mut count = 0;
        for (number, entry) in (1..).zip(fs::read_dir(&points).unwrap()) {
            let name = entry.unwrap().file_name();
            assert_eq!(name.to_str(), Some(&*format!("point-{number:06}.img")));
            count += 1;
        }
        assert_eq!(count, COUNT);
        let took = begun.elapsed();
        let grown = resident_bytes().saturating_sub(before);
        println!("{COUNT} points listed in {took:?}, {grown} bytes more in use");
        assert!(took < std::time::Duration::from_secs(20), "{took:?}");
        assert!(grown < 64 << 20, "{grown}");
        // The last one is found by its name, without a walk.
        let file = points.join(format!("point-{COUNT:06}.img"));
        assert_eq!(fs::metadata(file).unwrap().len(), 7 << 30);
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_takes_everything_away_and_a_start_cleans_up_after_a_dead_daemon() {
    tokio::task::block_in_place(|| {
        let (fixture, directory) = fixture();
        show(&fixture, &ext4(&directory));
        let place = directory.join("place");
        fixture.appliance.mounts.create(&at(&place)).unwrap();
        fixture.appliance.mounts.stop();
        assert!(mounted(&place).is_none());
        assert!(mounted(&directory.join("mounts/fuse")).is_none());
        let error = fixture.appliance.mounts.create(&want()).unwrap_err();
        assert_eq!(error.class, ErrorClass::Retry);
    });
}

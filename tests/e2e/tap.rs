//! Every path that data takes is verified at depth: a protected disk, its views and its branches.

use std::path::{Path, PathBuf};

use crate::shell::{self, Loop, Mount, assert_same, fio_verify, sparse, text};
use crate::site::{MACHINE, Plan, Site};

const DEPTHS: [u32; 4] = [1, 4, 16, 64];

fn branch(site: &Site, reference: &str) -> (serde_json::Value, PathBuf) {
    let mount = site.aft(&["mount", reference, "--rw", "--device"]);
    let device = PathBuf::from(mount["device"].as_str().expect("a device is text"));
    (mount, device)
}

fn make_and_check(device: &Path, directory: &Path) {
    shell::run("mkfs.ext4", &["-q", "-F", text(device)]);
    let mount = Mount::new(device, directory);
    shell::run("cp", &["-a", "/usr/share/zoneinfo", text(directory)]);
    shell::run("sync", &["-f", text(directory)]);
    shell::run(
        "diff",
        &[
            "-r",
            "/usr/share/zoneinfo",
            text(&directory.join("zoneinfo")),
        ],
    );
    mount.end();
    shell::run("fsck.ext4", &["-fn", text(device)]);
}

/// Writes through the tap are read back right at every depth, and the view is the same.
#[test]
#[ignore = "needs root and release binaries: tools/check tap"]
fn fio_verifies_a_protected_disk_and_its_view() {
    let site = Site::running(Plan::default());
    let source = site.path("source.img");
    sparse(&source, 256);
    let device = site.protect(&source, "d");
    for depth in DEPTHS {
        fio_verify(&device, 4096, depth, 128);
        site.wait_caught_up();
        site.assert_replica_is("d", &source);
        println!("depth {depth}: verified");
    }
}

/// A branch is a disk of its own; what is written there changes neither trunk nor point.
#[test]
#[ignore = "needs root and release binaries: tools/check tap"]
fn fio_verifies_a_branch() {
    let site = Site::running(Plan::default());
    let source = site.path("source.img");
    sparse(&source, 256);
    let device = site.protect(&source, "d");
    fio_verify(&device, 4096, 16, 64);
    site.wait_caught_up();
    site.aft(&["point", "create", MACHINE, "--name", "p"]);
    for depth in DEPTHS {
        let (mount, device) = branch(&site, &format!("{MACHINE}/d@p"));
        assert_same(&device, &source);
        fio_verify(&device, 4096, depth, 128);
        site.aft(&["umount", &mount["id"].to_string(), "--drop-branch"]);
        println!("depth {depth}: verified");
    }
    site.with_view(&format!("{MACHINE}/d@p"), |view| assert_same(view, &source));
}

/// A private copy over a view takes writes, and forgets them.
#[test]
#[ignore = "needs root and release binaries: tools/check tap"]
fn fio_verifies_a_private_copy() {
    let site = Site::running(Plan::default());
    let source = site.path("source.img");
    sparse(&source, 128);
    let device = site.protect(&source, "d");
    fio_verify(&device, 4096, 16, 64);
    site.wait_caught_up();
    site.aft(&["point", "create", MACHINE, "--name", "p"]);
    for depth in DEPTHS {
        let reference = format!("{MACHINE}/d@p");
        site.with_view(&reference, |view| fio_verify(view, 4096, depth, 64));
        site.with_view(&reference, |view| assert_same(view, &source));
    }
}

#[test]
#[ignore = "needs root and release binaries: tools/check tap"]
fn mkfs_and_fsck_through_a_protected_disk_and_a_branch() {
    let site = Site::running(Plan::default());
    let source = site.path("source.img");
    sparse(&source, 256);
    let device = site.protect(&source, "d");
    make_and_check(&device, &site.path("mnt"));
    site.wait_caught_up();
    site.assert_replica_is("d", &source);
    let shown = site.aft(&["mount", &format!("{MACHINE}/d@latest")]);
    let directory = PathBuf::from(shown["directory"].as_str().expect("a directory is text"));
    shell::run(
        "diff",
        &[
            "-r",
            "/usr/share/zoneinfo",
            text(&directory.join("zoneinfo")),
        ],
    );
    site.umount(&shown);
    let (mount, device) = branch(&site, &format!("{MACHINE}/d@latest"));
    make_and_check(&device, &site.path("mnt"));
    site.umount(&mount);
    site.assert_replica_is("d", &source);
}

/// Sectors of 512 bytes: writes smaller than the grain, an odd size, and XFS, which is mounted
/// beside its live original.
#[test]
#[ignore = "needs root and release binaries: tools/check tap"]
fn small_sectors_odd_sizes_and_xfs() {
    let site = Site::running(Plan::default());
    let file = site.path("backing.img");
    let image = std::fs::File::create(&file).expect("the image can be made");
    image
        .set_len((400 << 20) + 3 * 512)
        .expect("the image has its length");
    let below = Loop::attach(&file, 512);
    let device = site.protect(&below.device, "d");
    let sector = shell::run("blockdev", &["--getss", text(&device)]);
    assert_eq!(sector, "512", "the source's sectors are kept");
    let size = shell::run("blockdev", &["--getsize64", text(&device)]);
    assert_eq!(size, ((400 << 20) + 3 * 512).to_string());
    for depth in DEPTHS {
        fio_verify(&device, 512, depth, 8);
    }
    site.wait_caught_up();
    compare_sizes(&site, &below.device);
    shell::run("mkfs.xfs", &["-q", "-f", "-s", "size=512", text(&device)]);
    let directory = site.path("mnt");
    let mount = Mount::new(&device, &directory);
    shell::run("cp", &["-a", "/usr/share/zoneinfo", text(&directory)]);
    shell::run("sync", &["-f", text(&directory)]);
    site.wait_caught_up();
    // The live original, with the same identity, is still mounted.
    let shown = site.aft(&["mount", &format!("{MACHINE}/d@latest")]);
    let copy = PathBuf::from(shown["directory"].as_str().expect("a directory is text"));
    shell::run(
        "diff",
        &["-r", "/usr/share/zoneinfo", text(&copy.join("zoneinfo"))],
    );
    site.umount(&shown);
    mount.end();
    site.wait_caught_up();
    compare_sizes(&site, &below.device);
    shell::run("xfs_repair", &["-n", text(&device)]);
    site.aft(&["disk", "detach", "d"]);
}

/// The view may be padded to whole blocks; what the source has must be the same.
fn compare_sizes(site: &Site, source: &Path) {
    site.with_view(&format!("{MACHINE}/d@latest"), |view| {
        let bytes = shell::run("blockdev", &["--getsize64", text(source)]);
        shell::run("cmp", &["-n", &bytes, text(view), text(source)]);
    });
}

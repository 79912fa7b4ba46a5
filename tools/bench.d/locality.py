"""The churn generator's locality beside recorded writes of PostgreSQL and of a package upgrade.

Both run on ext4 on a loop device of 4 GiB, whose writes the kernel's block tracepoints record.
PostgreSQL: pgbench, scale 50, four clients for 60 s, a checkpoint each 30 s. Package upgrade: a
minimal Debian as debootstrap makes it from the release alone, then the upgrade to what its updates
hold, then every package of it once more, which is what an upgrade of all of them writes. What
cannot run here is named, and its figure fails.

Of each trace, and of as many writes by the generator over as much filled space: distinct 64 KiB
clusters in each 1,000 blocks written (the figure; no reach was set), distinct blocks of all
written, and the share of writes that go to the most written tenth of the blocks.
"""

import array
import os
import shutil
import subprocess
import time
from collections import Counter
from pathlib import Path

from blocktrace import recording
from errors import BenchError
from meter import GIB, MIB
from report import Figure, median, say
from rig import Rig, run as command
from space import churn_command
from unit import Unit

KEYS = {"postgres": "space.locality.postgres", "upgrade": "space.locality.upgrade"}
CLUSTER_BLOCKS = 16
PART = 1000
APT_FILES = [Path("/etc/apt/sources.list"), Path("/etc/apt/sources.list.d")]
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
QUIET = {"PATH": PATH, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"}


def run(settings, wanted, report):
    failed = {}
    for name, work in (("postgres", postgres), ("upgrade", upgrade)):
        if KEYS[name] not in wanted:
            continue
        try:
            with Rig(settings) as rig:
                blocks, used = work(rig)
                show(rig, name, blocks, used, report)
        except BenchError as error:
            failed[name] = error
            say(f"   {KEYS[name]} cannot be had: {error}")
    if failed:
        raise BenchError(f"not recorded: {', '.join(failed)}")


def show(rig, name, blocks, used, report):
    if len(blocks) < PART:
        raise BenchError(f"only {len(blocks)} blocks were written")
    generated = generate(rig, used, len(blocks))
    for who, trace in ((name, blocks), ("generator", generated)):
        one = described(trace)
        say(f"   {who}: {len(trace)} blocks written over {used // MIB} MiB used;"
            f" {one['distinct']:.2f} of them distinct, {one['clusters']:.0f} clusters in each"
            f" {PART}, {one['hot']:.2f} of the writes to the most written tenth")
    report.add(Figure(KEYS[name], described(generated)["clusters"], "clusters", None, "higher",
                      described(blocks)["clusters"], f"recorded from {name}"))


def described(blocks):
    counts = Counter(blocks)
    tenth = sorted(counts.values(), reverse=True)[:max(1, len(counts) // 10)]
    parts = [blocks[at:at + PART] for at in range(0, len(blocks) - PART + 1, PART)]
    clusters = [len({block // CLUSTER_BLOCKS for block in part}) for part in parts]
    return {"distinct": len(counts) / len(blocks), "clusters": median(clusters),
            "hot": sum(tenth) / len(blocks)}


def generate(rig, filled, count):
    log = rig.directory / "generated.log"
    command(*churn_command(rig.settings.bin / "afterimage-bench", filled, "ordinary", count, 1,
                           log))
    words = array.array("Q")
    words.frombytes(log.read_bytes())
    return list(words[1::2][:count])


def file_system(rig):
    """An ext4 on a loop device, mounted; gives device and directory."""
    image = rig.directory / "system.img"
    with open(image, "wb") as file:
        file.truncate(4 * GIB)
    device = rig.loop(image)
    command("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", device)
    root = rig.directory / "system"
    root.mkdir()
    command("mount", device, root)
    rig.callback(command, "umount", root)
    return device, root


def used_bytes(root):
    return shutil.disk_usage(root).used


def postgres(rig):
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    if not programs:
        raise BenchError("PostgreSQL is not installed")
    bin_directory = programs[-1].parent
    device, root = file_system(rig)
    data, sockets = root / "data", rig.directory / "pg"
    for directory in (data, sockets):
        directory.mkdir()
        shutil.chown(directory, "postgres", "postgres")
    # The user must be able to reach both.
    for parent in (rig.directory, rig.directory.parent):
        os.chmod(parent, 0o711)

    def as_postgres(program, *words):
        return command("runuser", "-u", "postgres", "--", bin_directory / program, *words, cwd="/")

    as_postgres("initdb", "-D", data, "-A", "trust", "--no-sync")
    log = open(rig.directory / "postgres.log", "wb")
    server = subprocess.Popen(
        ["runuser", "-u", "postgres", "--", str(bin_directory / "postgres"), "-D", str(data), "-k",
         str(sockets), "-h", "", "-c", "checkpoint_timeout=30s"],
        stdout=log, stderr=log, start_new_session=True)
    log.close()
    try:
        connect = ["-h", sockets, "-U", "postgres"]
        ready_by = time.monotonic() + 60
        while subprocess.run([str(bin_directory / "pg_isready"), *map(str, connect)],
                             capture_output=True, check=False).returncode != 0:
            if server.poll() is not None or time.monotonic() > ready_by:
                raise BenchError(f"PostgreSQL: {Path(log.name).read_text()[-500:]}")
            time.sleep(0.1)
        scale = rig.settings.pick(50, 2)
        as_postgres("pgbench", *connect, "-q", "-i", "-s", scale, "postgres")
        with recording(rig, device) as blocks:
            as_postgres("pgbench", *connect, "-c", 4, "-j", 2, "-T", rig.settings.pick(60, 8),
                        "postgres")
        return blocks, used_bytes(root)
    finally:
        server.terminate()
        server.wait()


def upgrade(rig):
    if shutil.which("debootstrap") is None:
        command("apt-get", "-qq", "install", "--no-install-recommends", "debootstrap", env=QUIET)
    suite = next((line.partition("=")[2].strip() for line in
                  Path("/etc/os-release").read_text().splitlines()
                  if line.startswith("VERSION_CODENAME=")), "")
    if not suite:
        raise BenchError("this system has no Debian release to make one like it from")
    device, root = file_system(rig)
    command("debootstrap", "--variant=minbase", suite, root, *mirror(), env=QUIET)
    for source in APT_FILES:
        if source.is_dir():
            for file in source.glob("debian*"):
                shutil.copy(file, root / "etc/apt/sources.list.d")
        elif source.exists():
            shutil.copy(source, root / "etc/apt/sources.list")
    shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")

    def inside(*words):
        return command("chroot", root, *words, env=QUIET)

    inside("apt-get", "-qq", "update")
    used = used_bytes(root)
    with recording(rig, device) as blocks:
        inside("apt-get", "-qq", "-y", "dist-upgrade")
        names = inside("dpkg-query", "-W", "-f", "${Package}\n").split()
        inside("apt-get", "-qq", "-y", "--reinstall", "install", *names)
    say(f"   {len(names)} packages were upgraded or unpacked anew")
    return blocks, used


def mirror():
    """The first archive that this system itself uses."""
    for path in APT_FILES:
        for file in sorted(path.glob("debian*")) if path.is_dir() else [path]:
            if not file.exists():
                continue
            for line in file.read_text().splitlines():
                words = line.split()
                if words[:1] == ["URIs:"] and len(words) > 1:
                    return [words[1]]
                if words[:1] == ["deb"]:
                    return [word for word in words if "://" in word][:1]
    return []


UNIT = Unit("space.locality", list(KEYS.values()), run)

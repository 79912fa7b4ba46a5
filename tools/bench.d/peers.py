"""The hundredth point here and in what others use: qcow2 chains, XFS reflinks, btrfs snapshots.

The same for all: a disk of 4 GiB, every block of it written; then a hundred times 1,000 random
4 KiB writes by fio at depth 16 with a sync, and a point. Only the point is timed. One at a time, on
the same disk; XFS and btrfs lie on a loop device with direct I/O of their own. What counts is the
median of the last five points. Shown besides: the list, the first byte of oldest and newest,
random reads there, the rate of random writes before and after, and ten deletions.

A hundred is as far as they go within a name's time: each point of theirs costs more than the one
before.
"""

import shutil
import time

from errors import BenchError
from meter import GIB, MIB, fio
from peer_files import Btrfs, Xfs
from peer_qcow2 import Qcow2
from replica import DISK
from report import Figure, median, say
from rig import MACHINE, Rig, run as command
from unit import Unit

KEY, REACH = "points.peers.hundredth", 0.02
PACKAGES = {"qemu-storage-daemon": "qemu-utils", "mkfs.xfs": "xfsprogs",
            "mkfs.btrfs": "btrfs-progs"}
PEERS = [Qcow2, Xfs, Btrfs]
LAST = 5
DELETED = 10


def run(settings, _wanted, report):
    install()
    points = settings.pick(100, 8)
    writes = settings.pick(1000, 50)
    hundredths, failed = {}, {}
    for peer in PEERS:
        missing = [tool for tool in peer.TOOLS if shutil.which(tool) is None]
        if missing:
            say(f"   {peer.NAME} is skipped: there is no {', '.join(missing)}")
            continue
        try:
            with Rig(settings) as rig:
                hundredths[peer.NAME] = one_peer(rig, peer, points, writes)
        except BenchError as error:
            failed[peer.NAME] = error
            say(f"   {peer.NAME} failed: {error}")
    ours = our_points(settings, points, writes)
    if not hundredths:
        raise BenchError(f"{KEY}: no peer runs here")
    best = min(hundredths, key=hundredths.get)
    report.add(Figure(KEY, ours, "ms", REACH, "lower", hundredths[best], f"best peer: {best}"))
    if failed:
        raise BenchError(f"{', '.join(failed)} did not run")


def install():
    wanted = sorted({package for tool, package in PACKAGES.items() if shutil.which(tool) is None})
    if wanted and shutil.which("apt-get"):
        try:
            command("apt-get", "-qq", "install", "--no-install-recommends", *wanted,
                    env={"DEBIAN_FRONTEND": "noninteractive", "PATH": "/usr/sbin:/usr/bin:/sbin:"
                         "/bin"})
        except BenchError as error:
            say(f"   {', '.join(wanted)} cannot be installed: {error}")


def one_peer(rig, kind, points, writes):
    size = rig.settings.pick(4 * GIB, 64 * MIB)
    runtime_s = rig.settings.pick(4, 1)
    peer = kind(rig, size)
    before = peer.random_writes(runtime_s)
    times = []
    for number in range(points):
        peer.write(writes)
        began = time.monotonic()
        peer.point(number)
        times.append((time.monotonic() - began) * 1000)
    list_ms = timed(peer.list)
    first = {where: median([peer.first_byte_ms(number) for _ in range(rig.settings.rounds)])
             for where, number in (("oldest", 0), ("newest", points - 1))}
    reads = {where: median([peer.random_reads(number, runtime_s)
                            for _ in range(rig.settings.rounds)])
             for where, number in (("oldest", 0), ("newest", points - 1))}
    after = peer.random_writes(runtime_s)
    deleted = timed(lambda: peer.delete(points // 2, min(DELETED, points // 4)))
    say(f"   {kind.NAME}: point, ms: {curve(times)}; list {list_ms:.1f} ms; first byte, ms: oldest"
        f" {first['oldest']:.0f}, newest {first['newest']:.0f}")
    say(f"   {kind.NAME}: random reads, IOPS: oldest {reads['oldest']:.0f}, newest"
        f" {reads['newest']:.0f}; random writes {before:.0f} before, {after:.0f} after; ten"
        f" deleted in {deleted:.0f} ms")
    return median(times[-LAST:])


def our_points(settings, points, writes):
    with Rig(settings) as rig:
        rig.start_server()
        rig.start_agent()
        device = rig.attach(rig.image("disk.img", settings.pick(4 * GIB, 64 * MIB)), DISK)
        rig.protect(DISK)
        times = []
        for number in range(points):
            write(device, writes)
            _, spent_ms = rig.timed("POST", f"/v1/machines/{MACHINE}/points",
                                    {"name": f"bench-{number}", "at": None})
            times.append(spent_ms)
        say(f"   afterimage: point, ms: {curve(times)}")
        return median(times[-LAST:])


def write(filename, count):
    fio(filename, ("randwrite", "4k", 16), number_ios=count, end_fsync=1)


def timed(what):
    began = time.monotonic()
    what()
    return (time.monotonic() - began) * 1000


def curve(times):
    """First, then at each quarter, then the longest."""
    places = sorted({0, len(times) // 4, len(times) // 2, len(times) * 3 // 4, len(times) - 1})
    parts = [f"{place + 1}: {times[place]:.1f}" for place in places]
    return ", ".join(parts) + f", longest {max(times):.1f}"


UNIT = Unit("points.peers", [KEY], run)

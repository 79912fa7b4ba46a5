"""A view of the newest state against a loop device over a raw copy.

Cold: the daemon was just restarted, so no map page is in memory. Warm: the whole view was read
once through the same daemon, and compared with the raw copy on the way. The kernel's caches are
dropped before every run on either side. The agent is stopped: nothing but the reader runs.
"""

import shutil

from errors import BenchError
from meter import GIB, MIB, Cpu, drop_caches, fio
from replica import REFERENCE, make
from report import Figure, median, say
from rig import Rig
from unit import Unit

PATTERNS = ["randread_qd1", "randread_qd32", "seqread_1m"]
REACH = {
    "cold": dict.fromkeys(PATTERNS, 0.4),
    "warm": {"randread_qd1": 0.55, "randread_qd32": 0.7, "seqread_1m": 0.7},
}
COMPARED_BYTES = 1 << 20


def run(settings, wanted, report):
    with Rig(settings) as rig:
        image, _ = make(rig, settings.pick(512 * MIB, 8 * MIB))
        rig.stop_agent()
        copy = rig.directory / "raw.img"
        shutil.copyfile(image, copy)
        raw = rig.loop(copy)
        for state, measure in (("cold", cold), ("warm", warm)):
            patterns = [name for name in PATTERNS if f"read.{state}.{name}" in wanted]
            if not patterns:
                continue
            for pattern, rounds in measure(rig, raw, patterns):
                key = f"read.{state}.{pattern}"
                report.add(figure(key, pattern, REACH[state][pattern], rounds))


def cold(rig, raw, patterns):
    for pattern in patterns:
        rounds = {"ours": [], "raw": []}
        for _ in range(rig.settings.rounds):
            rounds["raw"].append(one_run(rig, raw, pattern))
            rig.stop_server()
            rig.start_server()
            with rig.view(f"{REFERENCE}@latest") as device:
                rounds["ours"].append(one_run(rig, device, pattern))
        yield pattern, rounds


def warm(rig, raw, patterns):
    with rig.view(f"{REFERENCE}@latest") as device:
        compare(raw, device)
        say("   the view equals the raw copy; its map pages are in memory")
        for pattern in patterns:
            rounds = {"ours": [], "raw": []}
            for _ in range(rig.settings.rounds):
                rounds["raw"].append(one_run(rig, raw, pattern))
                rounds["ours"].append(one_run(rig, device, pattern))
            yield pattern, rounds


def compare(one, other):
    """Reads both from begin to end; what is fast and wrong is not measured."""
    with open(one, "rb") as left, open(other, "rb") as right:
        while True:
            at = left.tell()
            block = left.read(COMPARED_BYTES)
            if block != right.read(COMPARED_BYTES):
                raise BenchError(f"{other} differs from {one} within {COMPARED_BYTES} of {at}")
            if not block:
                return


def one_run(rig, device, pattern):
    drop_caches()
    cpu = Cpu()
    done = fio(device, pattern, rig.settings.pick(3, 1))
    done.cpu_s_per_gib = cpu.stop().per_gib(done.bytes)
    return done


def figure(key, pattern, reach, rounds):
    is_sequential = pattern.startswith("seq")

    def value(name):
        return median([run.mib_per_s if is_sequential else run.iops for run in rounds[name]])

    def cpu(name):
        return median([run.cpu_s_per_gib for run in rounds[name]])

    return Figure(key, value("ours"), "MiB/s" if is_sequential else "IOPS", reach, "higher",
                  value("raw"), "loop over a raw copy", (cpu("ours"), cpu("raw")))


UNIT = Unit("read", [f"read.{state}.{pattern}" for state in REACH for pattern in PATTERNS], run)

"""How long a recovery point takes to make, and what a thousand of them do to ingest.

Between two points lie 64 random writes of 4 KiB to the tapped device. The 99th percentile is over
the points that follow when so many exist already. Each is asked for over the local socket, by a
connection that is open.
"""

import json
import math

from meter import GIB, MIB, Cpu, drop_caches, fio, seconds_until_now
from replica import make
from report import Figure, median, say
from rig import MACHINE, Rig, run as command
from unit import Unit

COUNTS = [10, 1000, 10000]
REACH_MS = 5
REACH_INGEST = 0.95
KEYS = {count: f"point.create_p99_ms.{count}" for count in COUNTS}
INGEST = "point.ingest_after_1000"


def run(settings, wanted, report):
    window = settings.pick(200, 10)
    quick = {10: 10, 1000: 20, 10000: 40}
    last = max((count for count in COUNTS if KEYS[count] in wanted), default=0)
    if INGEST in wanted:
        last = max(last, 1000)
    with Rig(settings) as rig:
        _, device = make(rig, 0)
        size = settings.pick(4 * GIB, 128 * MIB)
        maker = Maker(rig, device, size)
        before = [ingest(rig, device) for _ in range(settings.rounds)] if INGEST in wanted else []
        for count in [count for count in COUNTS if count <= last]:
            maker.make_until(settings.pick(count, quick[count]))
            existing, times = maker.count, maker.make(window)
            say(f"   {existing} points exist: median {median(times):.2f} ms,"
                f" p99 {percentile(times, 99):.2f} ms, longest {max(times):.2f} ms")
            if KEYS[count] in wanted:
                report.add(Figure(KEYS[count], percentile(times, 99), "ms", REACH_MS, "lower"))
            if count == 1000 and INGEST in wanted:
                after = [ingest(rig, device) for _ in range(settings.rounds)]
                report.add(compared(before, after))


def compared(before, after):
    def middle(rounds, field):
        return median([one[field] for one in rounds])

    return Figure(INGEST, middle(after, "mib_per_s"), "MiB/s", REACH_INGEST, "higher",
                  middle(before, "mib_per_s"), "before the first point",
                  (middle(after, "cpu"), middle(before, "cpu")))


def ingest(rig, device, seconds=None):
    """Random writes until all of them are acknowledged."""
    drop_caches()
    cpu = Cpu()
    done = fio(device, "randwrite_qd32", seconds or rig.settings.pick(4, 1))
    rig.drained()
    seconds = seconds_until_now(done)
    return {"mib_per_s": done.bytes / MIB / seconds, "cpu": cpu.stop().per_gib(done.bytes)}


def percentile(values, percent):
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


class Maker:
    """Makes points, and counts them."""

    def __init__(self, rig, device, size, depth=1, writes=64):
        self.rig, self.device, self.size = rig, device, size
        self.depth, self.writes = depth, writes
        self.count = 0

    def make_until(self, count):
        if count > self.count:
            self.make(count - self.count)

    def make(self, count):
        """Gives the time of each, in milliseconds."""
        answer = command(
            self.rig.settings.bin / "afterimage-bench", "points", "--device", self.device,
            "--size-bytes", self.size, "--socket", self.rig.socket, "--machine", MACHINE,
            "--first", self.count, "--count", count, "--writes", self.writes,
            "--depth", self.depth)
        self.count += count
        return [us / 1000 for us in json.loads(answer)["create_us"]]


UNIT = Unit("point", [*KEYS.values(), INGEST], run)

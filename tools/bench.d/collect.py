"""A thousand points of the middle are deleted in one request, and their space comes back.

The journal window is 5 seconds and no tier keeps anything, so that only named points hold history.
The points lie 64 random 4 KiB writes apart, all in the same 32 MiB: a thousand of them together
pin 64,000 versions, and without them their interval pins 8,192 at most, what its last point shows.
The difference must come back. A version counts with 2 KiB, the half of it that is random. Space
is back when nine tenths of that are, by the blocks that the data directory takes.

Four times a thousand: first with nothing else going on, then three times with ingest meanwhile,
while the appliance collects again and again; before each of those, ingest alone.
"""

import threading
import time

from errors import BenchError
from meter import MIB
from point import Maker, ingest
from replica import DISK, make
from report import Figure, median, say
from rig import MACHINE, Rig, wait_for
from unit import Unit

DELETE, BACK, MEANWHILE = "gc.delete_1000_ms", "gc.space_back_s", "gc.ingest_meanwhile"
REACH_DELETE_MS, REACH_MEANWHILE = 10, 0.85
WINDOW_S = 5
WRITES = 64
BLOCK = 4096
RANDOM_BYTES = 2048
BACK_SHARE = 0.9
COLLECTIONS_MAX = 10


def run(settings, wanted, report):
    middle = settings.pick(1000, 100)
    region = settings.pick(32 * MIB, 4 * MIB)
    segment = settings.pick(64 * MIB, 17 * MIB)
    rounds = settings.rounds if MEANWHILE in wanted else 0
    config = f"[store]\nretention_interval_ms = 1000\nsegment_bytes = {segment}\n"
    with Rig(settings, config) as rig:
        _, device = make(rig, 0)
        rig.set_policy(WINDOW_S, [])
        maker = Maker(rig, device, region, depth=16, writes=WRITES)
        maker.make((rounds + 1) * middle + middle // 5)
        say(f"   {maker.count} points exist")
        victims = [f"bench-{number}" for number in range(middle // 10, maker.count)]
        rest(rig)
        spent_ms = [delete(rig, [victims.pop(0) for _ in range(middle)])]
        if BACK in wanted:
            seconds = space_back(rig, expected_bytes(middle, region))
            report.add(Figure(BACK, seconds, "s", None, "lower"))
        alone, meanwhile = [], []
        for _ in range(rounds):
            alone.append(ingest(rig, device, settings.pick(8, 1)))
            rest(rig)
            with Collecting(rig) as collecting:
                spent_ms.append(delete(rig, [victims.pop(0) for _ in range(middle)]))
                meanwhile.append(ingest(rig, device, settings.pick(8, 1)))
            say(f"   ingest alone {alone[-1]['mib_per_s']:.0f} MiB/s, meanwhile"
                f" {meanwhile[-1]['mib_per_s']:.0f}; {collecting.shown()}")
            if collecting.is_idle():
                raise BenchError(f"{MEANWHILE}: nothing was collected during ingest")
        say(f"   {middle} points deleted in {', '.join(f'{ms:.1f}' for ms in spent_ms)} ms")
        if DELETE in wanted:
            report.add(Figure(DELETE, median(spent_ms), "ms", REACH_DELETE_MS, "lower"))
        if MEANWHILE in wanted:
            report.add(compared(alone, meanwhile))


def delete(rig, names):
    _, spent_ms = rig.timed("POST", f"/v1/machines/{MACHINE}/deletions", {"names": names})
    return spent_ms


def expected_bytes(points, region):
    """What a number of points next to each other pin, less what stays pinned without them."""
    def distinct(writes):
        blocks = region // BLOCK
        return blocks * (1 - (1 - 1 / blocks) ** writes)

    return int((points * distinct(WRITES) - distinct(points * WRITES)) * RANDOM_BYTES)


def rest(rig):
    """Waits until the window has left all that was written, and collects it."""
    def is_left():
        disks = rig.ask("GET", f"/v1/machines/{MACHINE}/disks")
        reach = next(disk for disk in disks if disk["name"] == DISK)["addressable"]
        # The window moves in steps of its 32nd part, and an idle source moves its end no more.
        return reach and reach[-1]["last_time"] - reach[-1]["first_time"] < WINDOW_S / 16 * 1e9

    rig.drained()
    wait_for("the journal window to pass", is_left, seconds=60, every_s=0.2)
    collect_all(rig)


def collect_all(rig):
    """Collects until a collection finds nothing."""
    for _ in range(COLLECTIONS_MAX):
        done = rig.collect()
        if not done["destaged"] and not done["rewritten"] and not done["dropped"]:
            return
    say(f"   after {COLLECTIONS_MAX} collections there still was something to collect: {done}")


def space_back(rig, expected):
    """Seconds from now until the data directory is smaller by what must come back."""
    before, began = rig.stored_bytes(), time.monotonic()
    reports = []
    for _ in range(COLLECTIONS_MAX):
        reports.append(rig.collect())
        back = before - rig.stored_bytes()
        if back >= expected * BACK_SHARE:
            seconds = time.monotonic() - began
            say(f"   {back / MIB:.0f} MiB are back after {seconds:.2f} s, {expected / MIB:.0f} were"
                f" pinned; {shown(reports)}")
            return seconds
    raise BenchError(f"{BACK}: after {COLLECTIONS_MAX} collections {back / MIB:.0f} MiB came back,"
                     f" of {expected / MIB:.0f} that the points pinned; {shown(reports)}")


def shown(reports):
    def total(name):
        return sum(one[name] for one in reports)

    return (f"{len(reports)} collections destaged {total('destaged')} segments, rewrote"
            f" {total('rewritten')}, dropped {total('dropped')}, wrote"
            f" {total('written_bytes') / MIB:.0f} MiB")


class Collecting:
    """Collects again and again, until the end of its block."""

    def __init__(self, rig):
        self.rig, self.reports, self.error = rig, [], None
        self.is_over = threading.Event()
        self.thread = threading.Thread(target=self._work)

    def _work(self):
        try:
            while not self.is_over.is_set():
                self.reports.append(self.rig.collect())
                self.is_over.wait(0.1)
        except (BenchError, OSError) as error:
            self.error = error

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_exception):
        self.is_over.set()
        self.thread.join()
        if self.error:
            raise BenchError(f"collecting failed: {self.error}")

    def shown(self):
        return shown(self.reports)

    def is_idle(self):
        return not any(one["destaged"] + one["rewritten"] + one["dropped"]
                       for one in self.reports)


def compared(alone, meanwhile):
    def middle(rounds, field):
        return median([one[field] for one in rounds])

    return Figure(MEANWHILE, middle(meanwhile, "mib_per_s"), "MiB/s", REACH_MEANWHILE, "higher",
                  middle(alone, "mib_per_s"), "ingest alone",
                  (middle(meanwhile, "cpu"), middle(alone, "cpu")))


UNIT = Unit("gc", [DELETE, BACK, MEANWHILE], run)

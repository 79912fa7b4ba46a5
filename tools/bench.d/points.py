"""A hundred, 4,320 and a hundred thousand recovery points of one machine with one disk.

Between two points lie 64 random writes of 4 KiB to the tapped device, 16 of them in flight; all
have completed before the point is asked for. At each count: how long the 200 points that follow
take to make; a page of the list at its begin, middle and end, and the count of all; the first byte
of a view of the newest, a middle and the oldest point; random reads there; and ingest, against
ingest before the first point.

`points.make_flat` is the 99th percentile at the highest count over that at the lowest. Nothing is
said in the issue about what still is flat; 1.5 is our reading.
"""

import time

from errors import BenchError
from meter import GIB, MIB, Cpu, drop_caches, fio
from mount import first_byte_ms
from point import Maker, ingest, percentile
from replica import REFERENCE, make
from report import Figure, median, say
from rig import MACHINE, Rig
from unit import Unit

COUNTS = [100, 4320, 100_000]
QUICK = {100: 10, 4320: 40, 100_000: 80}
WHERE = ["newest", "middle", "oldest"]
REACH = {
    "make_p99_ms": 2,
    "list_page_ms": 20,
    "count_all_ms": 100,
    "mount_newest_ms": 200,
    "mount_middle_ms": 200,
    "mount_oldest_ms": 200,
}
FLAT, REACH_FLAT = "points.make_flat", 1.5
REACH_READ, REACH_INGEST = 0.8, 0.95
PAGE = 1000
CHUNK = 10_000
# Setting up and looking at the points take the rest of a name's 15 minutes.
MAKING_S_MAX = 11 * 60


def key(name, count):
    return f"points.{name}.{count}"


KEYS = [*(key(name, count) for count in COUNTS
          for name in [*REACH, "read_oldest", "ingest"]), FLAT]


def run(settings, wanted, report):
    counts = [count for count in COUNTS if any(one.endswith(f".{count}") for one in wanted)]
    if FLAT in wanted:
        counts = [COUNTS[0], COUNTS[-1], *counts]
    making = {}
    with Rig(settings) as rig:
        _, device = make(rig, 0)
        maker = Maker(rig, device, settings.pick(4 * GIB, 128 * MIB), depth=16)
        before = None
        if any(key("ingest", count) in wanted for count in counts):
            before = [ingest(rig, device) for _ in range(settings.rounds)]
        for count in sorted(set(counts)):
            grow(maker, settings.pick(count, QUICK[count]))
            making[count] = make_more(maker, settings.pick(200, 10))
            figures(rig, device, maker, count, making[count], before, wanted, report)
    if FLAT in wanted:
        report.add(Figure(FLAT, percentile(making[COUNTS[-1]], 99), "ms", REACH_FLAT, "lower",
                          percentile(making[COUNTS[0]], 99), f"p99 with {COUNTS[0]} points"))


def grow(maker, count):
    """Makes points until so many exist, and shows the curve."""
    began, first = time.monotonic(), maker.count
    while maker.count < count:
        make_more(maker, min(CHUNK, count - maker.count))
        spent_s = time.monotonic() - began
        whole_s = spent_s * (count - first) / (maker.count - first)
        if whole_s > MAKING_S_MAX:
            raise BenchError(
                f"{count} points would take {whole_s / 60:.0f} minutes to make, and a name has 15;"
                f" {maker.count} were made, {1000 * spent_s / (maker.count - first):.1f} ms each"
                " with the writes between them")


def make_more(maker, count):
    times = maker.make(count)
    say(f"   points {maker.count - count} to {maker.count}: p50 {median(times):.2f} ms,"
        f" p99 {percentile(times, 99):.2f} ms, longest {max(times):.2f} ms")
    return times


def figures(rig, device, maker, count, times, before, wanted, report):
    values = {"make_p99_ms": percentile(times, 99), **listed(rig, maker.count)}
    names = {"newest": f"bench-{maker.count - 1}", "middle": f"bench-{maker.count // 2}",
             "oldest": "bench-0"}
    values |= {f"mount_{where}_ms": value for where, value in mounted(rig, names).items()}
    for name, value in values.items():
        if key(name, count) in wanted:
            report.add(Figure(key(name, count), value, "ms", REACH[name], "lower"))
    if key("read_oldest", count) in wanted:
        report.add(read_there(rig, names, key("read_oldest", count)))
    if key("ingest", count) in wanted:
        after = [ingest(rig, device) for _ in range(rig.settings.rounds)]
        report.add(compared(key("ingest", count), before, after))


def listed(rig, count):
    """The slowest of pages at begin, middle and end; the count; and, shown only, all pages."""
    path = f"/v1/machines/{MACHINE}/points"
    began, last, pages, found, ids = time.monotonic(), 0, 0, 0, []
    while True:
        page, _ = rig.timed("GET", f"{path}?after={last}&limit={PAGE}")
        if not page["points"]:
            break
        found, pages = found + len(page["points"]), pages + 1
        last = page["points"][-1]["id"]
        ids.append(last)
    all_ms = (time.monotonic() - began) * 1000
    places = [0, ids[len(ids) // 2 - 1] if len(ids) > 1 else 0, ids[-2] if len(ids) > 1 else 0]
    page_ms = [median([rig.timed("GET", f"{path}?after={after}&limit={PAGE}")[1]
                       for _ in range(5)]) for after in places]
    counted = [rig.timed("GET", f"{path}?after=0&limit=1") for _ in range(5)]
    totals = {answer["total"] for answer, _ in counted}
    # Crash marks add to the points that were asked for.
    if found < count or min(totals) < found:
        raise BenchError(f"{count} points were made, {found} were listed, {totals} counted")
    count_ms = median([ms for _, ms in counted])
    say(f"   {found} points: pages of {PAGE} at begin, middle, end"
        f" {', '.join(f'{ms:.1f}' for ms in page_ms)} ms; all {pages} pages {all_ms:.0f} ms")
    return {"list_page_ms": max(page_ms), "count_all_ms": count_ms}


def mounted(rig, names):
    times = {where: [] for where in WHERE}
    for _ in range(rig.settings.rounds):
        for where in WHERE:
            times[where].append(first_byte_ms(rig, names[where]))
    shown = "; ".join(f"{where} {', '.join(f'{ms:.0f}' for ms in times[where])}"
                      for where in WHERE)
    say(f"   first byte of a view, ms: {shown}")
    return {where: median(times[where]) for where in WHERE}


def read_there(rig, names, name):
    """Random reads at depth 32; the three places take turns."""
    rounds = {where: [] for where in WHERE}
    for _ in range(rig.settings.rounds):
        for where in WHERE:
            with rig.view(f"{REFERENCE}@{names[where]}") as device:
                drop_caches()
                cpu = Cpu()
                done = fio(device, "randread_qd32", rig.settings.pick(3, 1))
                done.cpu_s_per_gib = cpu.stop().per_gib(done.bytes)
                rounds[where].append(done)
    iops = {where: median([one.iops for one in rounds[where]]) for where in WHERE}
    cpu = {where: median([one.cpu_s_per_gib for one in rounds[where]]) for where in WHERE}
    say("   random reads, IOPS: " + ", ".join(f"{where} {iops[where]:.0f}" for where in WHERE))
    return Figure(name, iops["oldest"], "IOPS", REACH_READ, "higher", iops["newest"],
                  "newest point", (cpu["oldest"], cpu["newest"]))


def compared(name, before, after):
    def middle(rounds, field):
        return median([one[field] for one in rounds])

    return Figure(name, middle(after, "mib_per_s"), "MiB/s", REACH_INGEST, "higher",
                  middle(before, "mib_per_s"), "before the first point",
                  (middle(after, "cpu"), middle(before, "cpu")))


UNIT = Unit("points", KEYS, run)

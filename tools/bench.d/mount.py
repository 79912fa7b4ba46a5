"""From the request for a view to the first byte read from its device."""

import mmap
import os
import time

from meter import MIB, drop_caches
from replica import DISK, REFERENCE, make
from report import Figure, median, say
from rig import MACHINE, Rig
from unit import Unit

WHERE = ["newest", "middle", "oldest"]
REACH_MS = 200
ROUNDS = 5
FIRST_BYTES = 4096


def run(settings, wanted, report):
    with Rig(settings) as rig:
        make(rig, settings.pick(1024 * MIB, 8 * MIB))
        rig.stop_agent()
        disks = rig.ask("GET", f"/v1/machines/{MACHINE}/disks")
        reach = next(disk for disk in disks if disk["name"] == DISK)["addressable"]
        first, last = reach[0]["first"], reach[-1]["last"]
        say(f"   LSN {first} to {last} can be mounted")
        lsn = {"newest": last, "middle": (first + last) // 2, "oldest": first}
        at = {where: f"lsn:{number}" for where, number in lsn.items()}
        # The first mount of a daemon loads code; it is shown, not counted.
        say(f"   first mount: {first_byte_ms(rig, at['newest']):.0f} ms")
        times = {where: [] for where in WHERE}
        for _ in range(ROUNDS):
            for where in WHERE:
                times[where].append(first_byte_ms(rig, at[where]))
        for where in WHERE:
            key = f"mount.first_byte_ms.{where}"
            if key in wanted:
                say(f"   {where}: {', '.join(f'{ms:.0f}' for ms in times[where])} ms")
                report.add(Figure(key, median(times[where]), "ms", REACH_MS, "lower"))


def first_byte_ms(rig, at):
    """`at` is a point's name, or `lsn:N`."""
    drop_caches()
    buffer = mmap.mmap(-1, FIRST_BYTES)
    began = time.monotonic()
    with rig.view(f"{REFERENCE}@{at}") as path:
        device = os.open(path, os.O_RDONLY | os.O_DIRECT)
        try:
            os.preadv(device, [buffer], 0)
            return (time.monotonic() - began) * 1000
        finally:
            os.close(device)


UNIT = Unit("mount", [f"mount.first_byte_ms.{where}" for where in WHERE], run)

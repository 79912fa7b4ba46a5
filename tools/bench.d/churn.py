"""Ten minutes of random writes at the highest rate into a store that cannot hold them.

Working set 8 GiB, the store capped at 24 GiB, the default policy, whose window of a day would need
far more: so the window must shrink, segments must be destaged and garbage collected while it goes
on. Every second the acknowledged LSN, the resident memory of both daemons, what the agent holds
unacknowledged and what the store takes are looked at. The last minute is compared with the second:
the first one fills what is empty.

`churn.debt_s` is how long the appliance still works once no more writes come.
"""

import threading
import time
from http.client import HTTPException
from pathlib import Path

from errors import BenchError
from meter import GIB, MIB, Cpu, drop_caches, fio, settle_s
from replica import DISK
from report import Figure, median, say
from rig import Rig
from unit import Unit

RATE, MEMORY = "churn.last_minute", "churn.server_memory"
BUDGET, UNACKNOWLEDGED, DEBT = "churn.stored", "churn.unacknowledged_mib", "churn.debt_s"
# "No slower" and "flat", less what two minutes of one run differ by anyway.
REACH_RATE, REACH_MEMORY = 0.95, 1.05
REACH_UNACKNOWLEDGED_MIB, REACH_DEBT_S = 128, 60
# Ingest that is refused for so long is a store that is full, not one that makes room.
PAUSED_S_MAX = 20
BLOCK = 4096
PAGE = 4096


def run(settings, wanted, report):
    minute = settings.pick(60, 6)
    budget = settings.pick(24 * GIB, 768 * MIB)
    segment = settings.pick(64 * MIB, 17 * MIB)
    config = f"[store]\nbudget_bytes = {budget}\nsegment_bytes = {segment}\nwindow_min_ms = 1000\n"
    with Rig(settings, config) as rig:
        rig.start_server()
        rig.start_agent()
        device = rig.attach(rig.image("disk.img", settings.pick(8 * GIB, 256 * MIB)), DISK)
        rig.protect(DISK)
        say(f"   a working set of {settings.pick(8192, 256)} MiB is protected")
        drop_caches()
        cpu = Cpu(server=rig.server.pid, agent=rig.agent.pid)
        watch = Watch(rig)
        try:
            with watch:
                done = fio(device, "randwrite_qd32", 10 * minute, started=watch.started)
        finally:
            # It explains why fio failed, if both did.
            watch.raise_error()
        rig.drained()
        cpu.stop()
        say(f"   {done.bytes / GIB:.1f} GiB in {done.seconds:.0f} s; {cpu.shown(done.bytes)}")
        debt_s = settle_s(rig.server.pid, at_most_s=600)
        minutes = watch.minutes(minute)
        for number, one in enumerate(minutes, 1):
            say(f"   minute {number}: {one['mib_per_s']:.0f} MiB/s, server"
                f" {one['server_mib']:.0f} MiB, agent {one['agent_mib']:.0f} MiB, unacknowledged"
                f" {one['unacknowledged_mib']:.0f} MiB, store {one['stored_mib']:.0f} MiB,"
                f" addressable back {one['window_s']:.0f} s, paused {one['paused_s']} s")
        figures(watch, minutes, budget, debt_s, cpu.per_gib(done.bytes), wanted, report)


def figures(watch, minutes, budget, debt_s, cpu, wanted, report):
    if len(minutes) < 3:
        raise BenchError(f"only {len(minutes)} minutes were seen, of 10")
    second, last = minutes[1], minutes[-1]
    peak = max(sample["stored"] for sample in watch.samples)
    unacknowledged = max(sample["unacknowledged"] for sample in watch.samples)
    all_figures = [
        Figure(RATE, last["mib_per_s"], "MiB/s", REACH_RATE, "higher", second["mib_per_s"],
               "second minute", (cpu, None)),
        Figure(MEMORY, last["server_mib"], "MiB", REACH_MEMORY, "lower", second["server_mib"],
               "second minute"),
        Figure(BUDGET, peak / GIB, "GiB", 1, "lower", budget / GIB, "its cap"),
        Figure(UNACKNOWLEDGED, unacknowledged / MIB, "MiB", REACH_UNACKNOWLEDGED_MIB, "lower"),
        Figure(DEBT, debt_s, "s", REACH_DEBT_S, "lower"),
    ]
    for figure in all_figures:
        if figure.key in wanted:
            report.add(figure)


def resident_mib(pid):
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE / MIB


class Watch:
    """Looks once a second, from another thread.

    When the store takes nothing more it ends the writer.
    """

    def __init__(self, rig):
        self.rig, self.samples, self.error, self.fio = rig, [], None, None
        self.is_over = threading.Event()
        self.thread = threading.Thread(target=self._work)
        self.paused_since = None

    def started(self, process):
        self.fio = process
        self.thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_exception):
        self.is_over.set()
        if self.fio:
            self.thread.join()

    def raise_error(self):
        if self.error:
            raise BenchError(self.error)

    def _work(self):
        began = time.monotonic()
        while not self.is_over.wait(max(0.0, began + len(self.samples) - time.monotonic())):
            try:
                self.samples.append(self._sample(began))
            except (BenchError, OSError, HTTPException, LookupError, StopIteration) as error:
                self.error = self.error or f"cannot look at the daemons: {error}"
                return

    def _sample(self, began):
        agent, server = self.rig.agent_status(), self.rig.ask("GET", "/v1/status")
        now = time.monotonic() - began
        self._note_pause(now, server)
        disk = next(disk for machine in server["machines"] for disk in machine["disks"])
        reach = disk["addressable"][-1:]
        return {
            "at": now,
            "acknowledged": agent["acknowledged"],
            "unacknowledged": agent["buffered_bytes"] + agent["spooled_bytes"],
            "server_mib": resident_mib(self.rig.server.pid),
            "agent_mib": resident_mib(self.rig.agent.pid),
            "stored": server["stored_bytes"],
            "window_s": sum(one["last_time"] - one["first_time"] for one in reach) / 1e9,
            "is_paused": server["is_ingest_paused"],
        }

    def _note_pause(self, now, server):
        if not server["is_ingest_paused"]:
            self.paused_since = None
            return
        self.paused_since = now if self.paused_since is None else self.paused_since
        if now - self.paused_since > PAUSED_S_MAX:
            causes = "; ".join(server["causes"]) or "no cause is given"
            self.error = (f"after {self.paused_since:.0f} s the store took nothing more for"
                          f" {PAUSED_S_MAX} s instead of shrinking the window: {causes}")
            self.fio.terminate()
            raise BenchError(self.error)

    def minutes(self, length):
        """What whole minutes looked like."""
        found = []
        for number in range(10):
            part = [one for one in self.samples
                    if number * length <= one["at"] < (number + 1) * length]
            if len(part) < 2:
                break
            first, last = part[0], part[-1]
            written = (last["acknowledged"] - first["acknowledged"]) * BLOCK
            found.append({
                "mib_per_s": written / MIB / (last["at"] - first["at"]),
                "unacknowledged_mib": max(one["unacknowledged"] for one in part) / MIB,
                "stored_mib": max(one["stored"] for one in part) / MIB,
                "paused_s": sum(one["is_paused"] for one in part),
                **{name: median([one[name] for one in part])
                   for name in ("server_mib", "agent_mib", "window_s")},
            })
        return found


UNIT = Unit("churn", [RATE, MEMORY, BUDGET, UNACKNOWLEDGED, DEBT], run)

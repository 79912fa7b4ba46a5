"""What history costs: bytes on disk and bytes written, against what a policy needs.

Time is compressed, for the appliance's clock cannot be driven from outside: a day is 60 seconds,
so the journal window of a day is 60 s, hourly points for a week are one each 3 s for 420 s (2.5 s
rounded up), and daily ones one each 60 s. A crash mark is made each second, which is the shortest
distance there is; points every five minutes for a day lie within the window and pin nothing.

The churn's generator (`afterimage-bench churn`) states its locality in its source. Each version's
content follows from a number, so that later it is known what any set of points and a window need:
every version that a point shows, that the begin of the window shows, or that was written since.
All contents differ. They are compressed by zstd at its default level, each 4 KiB for itself.

`space.week.*`: an 8 GiB disk, half of it filled (a 128th of 1 TiB with 512 GiB filled), 50 GiB a
day scaled alike, for seven days; looked at after the days five, six and seven.
`space.amplification.*`: bytes that the daemon wrote (`/proc/PID/io`), collecting included, over
the zstd-compressed bytes of the writes alone, in a store whose cap is such that what is needed
takes 75 % of it; three times 80 s, after 60 s that fill it.
"""

import json
import time
from pathlib import Path

from errors import BenchError
from meter import GIB, MIB, Cpu
from replica import DISK
from report import Figure, median, say
from rig import MACHINE, Rig, run as command
from unit import Unit

WEEK = "space.week.ratio"
REACH_WEEK = 1.3
AMPLIFICATION = {"ordinary": 1.6, "uniform": 2.2}
FULL = 0.75
BLOCK = 4096
SAMPLED_ONE_OF = 4
POINTS_PAGE = 1000


class Churned:
    """A protected disk under the generator's churn, with the log of it."""

    def __init__(self, rig, size, filled, pattern, rate):
        self.rig, self.filled, self.pattern, self.rate = rig, filled, pattern, rate
        self.log = rig.directory / "churn.log"
        image = rig.image("disk.img", size, is_filled=False)
        command(self.driver, "fill", "--file", image, "--bytes", filled)
        rig.start_server()
        rig.start_agent()
        self.device = rig.attach(image, DISK)
        rig.protect(DISK)
        say(f"   a disk of {size // MIB} MiB is protected, {filled // MIB} MiB of it are filled")

    @property
    def driver(self):
        return self.rig.settings.bin / "afterimage-bench"

    def churn(self, seconds):
        """Gives the number of blocks written."""
        answer = command(*churn_command(self.driver, self.filled, self.pattern, self.rate, seconds,
                                        self.log), "--device", self.device)
        self.rig.drained()
        self.refuse_pause()
        return json.loads(answer)["blocks"]

    def refuse_pause(self):
        status = self.rig.ask("GET", "/v1/status")
        if status["is_ingest_paused"]:
            raise BenchError("the store is full and ingest waits: " + "; ".join(status["causes"]))

    def moment(self, window_s):
        """What is on disk now, and what decides about what is needed now."""
        self.rig.collect()
        now_ns = time.time_ns()
        times = point_times(self.rig)
        return {"stored": self.rig.stored_bytes(), "points": times,
                "window_ns": now_ns - int(window_s * 1e9),
                "records": self.log.stat().st_size // 16}

    def needed(self, moment):
        return needed(self.driver, self.log, self.filled, moment)


def churn_command(driver, filled, pattern, rate, seconds, log):
    return [driver, "churn", "--filled-bytes", filled, "--pattern", pattern, "--rate", rate,
            "--seconds", seconds, "--log", log]


def needed(driver, log, filled, moment):
    answer = command(
        driver, "needed", "--log", log, "--filled-bytes", filled, "--window-ns",
        moment["window_ns"], "--records", moment["records"], "--one-of", SAMPLED_ONE_OF,
        input=json.dumps(moment["points"]))
    return json.loads(answer)


def point_times(rig):
    times, last = [], 0
    while True:
        page = rig.ask("GET", f"/v1/machines/{MACHINE}/points?after={last}&limit={POINTS_PAGE}")
        if not page["points"]:
            return times
        times += [point["time"] for point in page["points"]]
        last = page["points"][-1]["id"]


def config(segment, **more):
    settings = {"crash_mark_interval_ms": 1000, "retention_interval_ms": 1000,
                "collect_interval_ms": 5000, "segment_bytes": segment, **more}
    return "[store]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items())


def run_week(settings, _wanted, report):
    day_s = settings.pick(60, 8)
    days = settings.pick(7, 3)
    size = settings.pick(8 * GIB, 256 * MIB)
    # 50 GiB a day for 1 TiB.
    rate = max(1, size * 50 // 1024 // BLOCK // day_s)
    segment = settings.pick(32 * MIB, 17 * MIB)
    # The longest that the hourly tier reaches back is the week.
    tiers = [(settings.pick(3, 1), 7 * day_s), (day_s, 30 * day_s)]
    with Rig(settings, config(segment)) as rig:
        churned = Churned(rig, size, size // 2, "ordinary", rate)
        rig.set_policy(day_s, tiers)
        moments, cpu, blocks = [], Cpu(), 0
        for day in range(1, days + 1):
            blocks += churned.churn(day_s)
            if day > days - settings.rounds:
                moments.append(churned.moment(day_s))
        spent = cpu.stop().per_gib(blocks * BLOCK)
        say(f"   {rate} blocks a second for {days} days of {day_s} s: {blocks * BLOCK // MIB} MiB")
        ratios = []
        for moment in moments:
            need = churned.needed(moment)
            moment["needed"] = need["compressed_bytes"]
            ratios.append(moment["stored"] / moment["needed"])
            say(f"   {moment['stored'] / MIB:.0f} MiB on disk; {len(moment['points'])} points and"
                f" the window need {need['versions']} versions, {moment['needed'] / MIB:.0f} MiB:"
                f" {ratios[-1]:.3f}")
        middle = moments[ratios.index(sorted(ratios)[len(ratios) // 2])]
        report.add(Figure(WEEK, middle["stored"] / MIB, "MiB", REACH_WEEK, "lower",
                          middle["needed"] / MIB, "needed versions, zstd", (spent, None)))
        show_files(rig)


def show_files(rig):
    """Which parts of the data directory take how much."""
    lines = command("du", "-xB1", "--max-depth=1", rig.data).splitlines()
    parts = [(int(size), Path(path).name) for size, path in (line.split("\t") for line in lines)]
    say("   " + ", ".join(f"{name} {size / MIB:.1f} MiB" for size, name in sorted(parts)[::-1]))


def run_amplification(pattern):
    def run(settings, _wanted, report):
        size = settings.pick(2 * GIB, 192 * MIB)
        rate = settings.pick(4000, 400)
        window_s, tiers = 10, [(3, 60), (60, 600)]
        segment = 17 * MIB
        lead_s, part_s = settings.pick(60, 15), settings.pick(80, 10)
        planned = plan(settings, size, pattern, rate, window_s, tiers)
        budget = int(planned / FULL)
        say(f"   {planned / MIB:.0f} MiB will be needed, the cap is {budget / MIB:.0f} MiB")
        with Rig(settings, config(segment, budget_bytes=budget)) as rig:
            churned = Churned(rig, size, size, pattern, rate)
            rig.set_policy(window_s, tiers)
            churned.churn(lead_s)
            rounds = [one_part(churned, part_s) for _ in range(settings.rounds)]
            moment = churned.moment(window_s)
            need = churned.needed(moment)
        say(f"   at the end {moment['stored'] / MIB:.0f} MiB on disk, needed"
            f" {need['compressed_bytes'] / MIB:.0f}, which is"
            f" {100 * need['compressed_bytes'] / budget:.0f} % of the cap")
        mean = need["compressed_bytes"] / need["versions"]
        for one in rounds:
            one["compressed"] = one["blocks"] * mean
            say(f"   {one['written'] / MIB:.0f} MiB written for {one['compressed'] / MIB:.0f}:"
                f" {one['written'] / one['compressed']:.3f}")
        rounds.sort(key=lambda one: one["written"] / one["compressed"])
        middle = rounds[len(rounds) // 2]
        report.add(Figure(f"space.amplification.{pattern}", middle["written"] / MIB, "MiB",
                          AMPLIFICATION[pattern], "lower", middle["compressed"] / MIB,
                          "same writes, zstd", (median([one["cpu"] for one in rounds]), None)))
    return run


def plan(settings, size, pattern, rate, window_s, tiers):
    """Bytes that will be needed once the tiers are full: the same churn without a device."""
    log = settings.directory / "plan.log"
    driver = settings.bin / "afterimage-bench"
    seconds = tiers[0][1] + window_s + 10
    try:
        answer = command(*churn_command(driver, size, pattern, rate, seconds, log))
        begin_ns = json.loads(answer)["first_ns"]
        end_ns = begin_ns + seconds * 10**9
        points = [end_ns - ago * 10**9 for interval, keep in tiers
                  for ago in range(0, min(keep, seconds), interval)]
        moment = {"window_ns": end_ns - window_s * 10**9, "records": log.stat().st_size // 16,
                  "points": points}
        return needed(driver, log, size, moment)["compressed_bytes"]
    finally:
        log.unlink(missing_ok=True)


def one_part(churned, seconds):
    """Churn, and then a collection, so that no part leaves its garbage to the next."""
    pid = churned.rig.server.pid
    cpu, before = Cpu(), written_bytes(pid)
    blocks = churned.churn(seconds)
    churned.rig.collect()
    written = written_bytes(pid) - before
    if written < blocks * BLOCK // 4:
        raise BenchError(f"the system counts {written} bytes written by the daemon for {blocks}"
                         " blocks; its accounting cannot be used")
    return {"blocks": blocks, "written": written, "cpu": cpu.stop().per_gib(blocks * BLOCK)}


def written_bytes(pid):
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    except OSError as error:
        raise BenchError(f"the kernel counts no bytes written by a process: {error}") from None
    return next(int(line.split()[1]) for line in lines if line.startswith("write_bytes:"))


UNITS = [
    Unit("space.week", [WEEK], run_week),
    *(Unit(f"space.amplification.{pattern}", [f"space.amplification.{pattern}"],
           run_amplification(pattern)) for pattern in AMPLIFICATION),
]

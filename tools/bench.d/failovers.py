"""A hundred failovers, each nested in the one before: fork, write, drop the parent's points.

Two machines write the same blocks in the same order, one of them in a single history, the other in
a hundred, each a fork of the one before at its newest record, whose last point is deleted when the
child has one of its own. The journal window is a second and no tier keeps anything. When all is
collected, the abandoned histories should cost neither room nor reading time.
"""

from collect import collect_all
from meter import GIB, MIB, drop_caches, fio
from report import Figure, median, say
from rig import Rig, run as command, wait_for
from unit import Unit

READ, SPACE = "failovers.randread_qd32", "failovers.space"
REACH_READ, REACH_SPACE = 0.9, 1.1
WARM, NESTED, FRESH = "warm", "nested", "fresh"
WINDOW_S = 1


def run(settings, wanted, report):
    count, writes = settings.pick(100, 10), settings.pick(4000, 500)
    size = settings.pick(GIB, 64 * MIB)
    segment = settings.pick(64 * MIB, 17 * MIB)
    config = f"[store]\nretention_interval_ms = 1000\nsegment_bytes = {segment}\n"
    with Rig(settings, config) as rig:
        rig.start_server()
        grown = {}
        # The first one pays for what a store has once.
        for machine, histories in ((WARM, 1), (FRESH, 1), (NESTED, count)):
            before = rig.stored_bytes()
            state = rig.directory / machine
            rig.enrol(state, machine)
            command(settings.bin / "afterimage-bench", "failovers", "--agent", state, "--socket",
                    rig.socket, "--disk-bytes", size, "--histories", histories, "--writes",
                    count * writes // histories)
            rest(rig, machine)
            grown[machine] = rig.stored_bytes() - before
            say(f"   {machine}: {histories} histories, {count * writes} writes,"
                f" {grown[machine] / MIB:.0f} MiB at rest")
        report_both(rig, wanted, report, grown)


def report_both(rig, wanted, report, grown):
    if READ in wanted:
        with rig.view(f"{NESTED}/disk0@latest") as nested, rig.view(
                f"{FRESH}/disk0@latest") as fresh:
            iops = {nested: [], fresh: []}
            for _ in range(rig.settings.rounds):
                for device in (fresh, nested):
                    drop_caches()
                    iops[device].append(fio(device, "randread_qd32", rig.settings.pick(5, 1)).iops)
            report.add(Figure(READ, median(iops[nested]), "IOPS", REACH_READ, "higher",
                              median(iops[fresh]), "a disk of one history"))
    if SPACE in wanted:
        report.add(Figure(SPACE, grown[NESTED] / MIB, "MiB", REACH_SPACE, "lower",
                          grown[FRESH] / MIB, "a disk of one history"))


def rest(rig, machine):
    """Waits until the window has left all that was written, and collects it."""
    policy = {"journal_window_s": WINDOW_S, "tiers": []}
    rig.ask("POST", f"/v1/machines/{machine}/policy", {"policy": policy, "expected_version": None})

    def is_left():
        disks = rig.ask("GET", f"/v1/machines/{machine}/disks")
        reach = disks[0]["addressable"]
        return reach and reach[-1]["last_time"] - reach[-1]["first_time"] < WINDOW_S / 4 * 1e9

    wait_for("the journal window to pass", is_left, seconds=60, every_s=0.2)
    collect_all(rig)


UNIT = Unit("failovers", [READ, SPACE], run)

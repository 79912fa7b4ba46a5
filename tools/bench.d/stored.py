"""Bytes on disk that small changes cost, all of the data directory counted.

The daemon is stopped in order before the directory is looked at, so that runs and manifest are
there. Log segments have a fixed length; three times 40 MiB are changed and the growth over all of
them counts, so that no single one happens to fit into what was allocated before.
"""

from meter import MIB, Cpu, fio
from replica import make
from report import Figure, median, say
from rig import Rig, run as command
from unit import Unit

KEY = "stored.random_4k"
REACH = 1.1


def run(settings, _wanted, report):
    changed = settings.pick(40 * MIB, 4 * MIB)
    with Rig(settings) as rig:
        _, device = make(rig, 0)
        sizes = [stored_bytes(rig)]
        spent = []
        for _ in range(settings.rounds):
            cpu = Cpu()
            fio(device, "randwrite_qd32", io_size=changed)
            rig.drained()
            spent.append(cpu.stop().per_gib(changed))
            sizes.append(stored_bytes(rig))
        total = settings.rounds * changed
        for before, after in zip(sizes, sizes[1:]):
            say(f"   {changed // MIB} MiB changed, {(after - before) / MIB:.1f} MiB more on disk")
        report.add(Figure(KEY, (sizes[-1] - sizes[0]) / MIB, "MiB", REACH, "lower", total / MIB,
                          "bytes changed", (median(spent), None)))


def stored_bytes(rig):
    """Bytes of the data directory at rest; the daemon and its agent go on afterwards."""
    rig.stop_server()
    size = int(command("du", "-sB1", rig.data).split()[0])
    rig.start_server()
    rig.reconnected()
    return size


UNIT = Unit("stored", [KEY], run)

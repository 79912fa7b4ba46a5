"""What the way to a device costs: a disk in memory behind a loop device, over both transports.

`/dev/fuse` and `io_uring` run side by side and take turns, round by round. The kernel's switch for
`io_uring` is on only while the second one is mounted, and as it was before afterwards: a
connection keeps what it began with.
"""

import contextlib
import subprocess
from pathlib import Path

from errors import BenchError
from meter import Cpu, fio
from report import Figure, median, say
from unit import Unit

SWITCH = Path("/sys/module/fuse/parameters/enable_uring")
SIZE_MIB = 512
PATTERNS = {
    "randread_4k_qd1": "randread_qd1",
    "randread_4k_qd32": "randread_qd32",
    "randwrite_4k_qd1": "randwrite_qd1",
    "randwrite_4k_qd32": "randwrite_qd32",
    "seqread_1m": "seqread_1m",
    "seqwrite_1m": "seqwrite_1m",
}
TRANSPORTS = {"classic": ("off", "Classic"), "ring": ("auto", "IoUring")}
REACH = {"randread_4k_qd1": 3, "randwrite_4k_qd1": 3, "randread_4k_qd32": 1,
         "randwrite_4k_qd32": 1, "seqread_1m": None, "seqwrite_1m": None}


def run(settings, wanted, report):
    with contextlib.ExitStack() as stack:
        devices = {}
        for transport in TRANSPORTS:
            devices[transport] = stack.enter_context(memory(settings, transport))
        for name, pattern in PATTERNS.items():
            keys = {transport: f"devices.memory.{transport}.{name}" for transport in TRANSPORTS}
            if not wanted.intersection(keys.values()):
                continue
            rounds = {transport: [] for transport in TRANSPORTS}
            for _ in range(settings.rounds):
                for transport, (device, pid) in devices.items():
                    rounds[transport].append(one_run(settings, device, pid, pattern))
            for figure in figures(keys, name, rounds):
                if figure.key in wanted:
                    report.add(figure)


@contextlib.contextmanager
def switched_on():
    """Holds the kernel's switch on."""
    if not SWITCH.exists():
        raise BenchError(f"this kernel has no {SWITCH}: Linux 6.14 brought it")
    before = SWITCH.read_text().strip()
    SWITCH.write_text("Y")
    try:
        yield
    finally:
        SWITCH.write_text(before)


@contextlib.contextmanager
def memory(settings, transport):
    """Serves a disk; gives the loop device and the server's process."""
    option, expected = TRANSPORTS[transport]
    directory = settings.directory / f"memory-{transport}"
    directory.mkdir()
    program = settings.bin / "examples" / "transport"
    with switched_on() if transport == "ring" else contextlib.nullcontext():
        process = subprocess.Popen([program, directory, option, str(SIZE_MIB)], text=True,
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        answer = process.stdout.readline().split()
    try:
        if len(answer) != 2 or answer[0] != expected:
            raise BenchError(f"the disk in memory is not served over {expected}: {answer}")
        say(f"   {transport}: {answer[1]}")
        yield answer[1], process.pid
    finally:
        # It ends with its input.
        process.stdin.close()
        if process.wait(60) != 0:
            say(f"   {transport}: the server ended with status {process.returncode}")
        directory.rmdir()


def one_run(settings, device, pid, pattern):
    cpu = Cpu(server=pid)
    done = fio(device, pattern, settings.pick(3, 1))
    done.cpu_s_per_gib = cpu.stop().per_gib(done.bytes)
    return done


def figures(keys, name, rounds):
    is_sequential = name.startswith("seq")
    unit = "MiB/s" if is_sequential else "IOPS"

    def value(transport):
        return median([run.mib_per_s if is_sequential else run.iops for run in rounds[transport]])

    def cpu(transport):
        return median([run.cpu_s_per_gib for run in rounds[transport]])

    yield Figure(keys["classic"], value("classic"), unit, None, "higher",
                 cpu=(cpu("classic"), None))
    yield Figure(keys["ring"], value("ring"), unit, REACH[name], "higher", value("classic"),
                 "over /dev/fuse", (cpu("ring"), cpu("classic")))


UNIT = Unit("devices.memory", [f"devices.memory.{transport}.{name}" for transport in TRANSPORTS
                               for name in PATTERNS], run)

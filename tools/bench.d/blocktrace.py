"""Which blocks of a device are written, as the kernel's block tracepoints tell it.

Invariants
* The recording has a tracing instance of its own: no other user of tracing is disturbed.
* Lost events fail the recording; a part of a trace is no trace.
"""

import contextlib
import os
import re
from pathlib import Path

from errors import BenchError
from rig import run as command

BUFFER_KIB = 64 << 10
SECTORS_PER_BLOCK = 8
EVENT = re.compile(r"block_rq_complete: \d+,\d+ (\w+) \(.*?\) (\d+) \+ (\d+)")


@contextlib.contextmanager
def recording(rig, device):
    """Gives a list that holds, after the block, each 4 KiB block written, in order."""
    root = rig.directory / "tracing"
    root.mkdir(exist_ok=True)
    try:
        command("mount", "-t", "tracefs", "tracefs", root)
    except BenchError as error:
        raise BenchError(f"block writes cannot be recorded here: {error}") from None
    blocks = []
    instance = root / "instances" / f"bench-{os.getpid()}"
    try:
        instance.mkdir()
        try:
            event = instance / "events" / "block" / "block_rq_complete"
            number = os.stat(device).st_rdev
            kernel_number = os.major(number) << 20 | os.minor(number)
            (instance / "buffer_size_kb").write_text(str(BUFFER_KIB))
            (event / "filter").write_text(f"dev == {kernel_number}")
            (event / "enable").write_text("1")
            yield blocks
            os.sync()
            (event / "enable").write_text("0")
            refuse_loss(instance)
            with open(instance / "trace", encoding="ascii", errors="replace") as lines:
                for line in lines:
                    blocks.extend(written(line))
        finally:
            instance.rmdir()
    finally:
        command("umount", root)


def refuse_loss(instance):
    for stats in instance.glob("per_cpu/cpu*/stats"):
        for line in stats.read_text().splitlines():
            name, _, value = line.partition(":")
            if name in ("overrun", "commit overrun", "dropped events") and int(value):
                raise BenchError(f"the kernel lost {value.strip()} events of the recording")


def written(line):
    match = EVENT.search(line)
    # Discards and flushes carry no data.
    if not match or "W" not in match[1] or "D" in match[1]:
        return []
    first, count = int(match[2]), int(match[3])
    if count == 0:
        return []
    last = (first + count - 1) // SECTORS_PER_BLOCK
    return range(first // SECTORS_PER_BLOCK, last + 1)

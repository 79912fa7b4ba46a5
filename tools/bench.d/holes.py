"""Is punching holes a cheaper way to give back dead slots than rewriting their segment?

A segment of 64 MiB with slots as long as compressed 4 KiB blocks become, of which a share lives.
Once every dead range is punched out, as far as whole blocks of the file system lie in it; once the
living slots are written to a new file. Both end with a sync. The figure is what holes give back of
what a rewritten segment gives back; beside it is said how long both took, and into how many pieces
the file falls. Spread: each slot lives or dies by itself, as under random writes. Clustered: 32
neighbours live or die together.
"""

import ctypes
import os
import random
import time

from errors import BenchError
from meter import MIB
from report import Figure, median, say
from unit import Unit

SPREAD, CLUSTERED = "gc.holes.spread", "gc.holes.clustered"
REACH = 0.9
SEGMENT = 64 * MIB
HEADER = 128
SLOT_MIN, SLOT_MAX = 1024, 3072
NEIGHBOURS = {SPREAD: 1, CLUSTERED: 32}
LIVING = [0.5, 0.25, 0.1]
BLOCK = 4096
KEEP_SIZE, PUNCH_HOLE = 1, 2


def run(settings, wanted, report):
    for key in (SPREAD, CLUSTERED):
        if key not in wanted:
            continue
        rounds = {share: [] for share in LIVING}
        for number in range(settings.rounds):
            for share in LIVING:
                rounds[share].append(one(settings, key, share, number))
        for share in LIVING:
            punched, rewritten, punch_s, rewrite_s, pieces = (
                median([each[field] for each in rounds[share]]) for field in range(5))
            say(f"   {key}, {share:.0%} live: holes give {punched / MIB:.1f} MiB back in"
                f" {punch_s * 1000:.0f} ms, with {pieces:.0f} holes; a rewrite"
                f" {rewritten / MIB:.1f} MiB in {rewrite_s * 1000:.0f} ms")
        half = rounds[LIVING[0]]
        report.add(Figure(key, median([each[0] for each in half]) / MIB, "MiB", REACH, "higher",
                          median([each[1] for each in half]) / MIB, "a rewritten segment"))


def one(settings, key, share, number):
    """Bytes that holes and a rewrite give back, the seconds of each, and the holes."""
    chance = random.Random(number)
    slots, at = [], BLOCK
    while at < settings.pick(SEGMENT, 8 * MIB):
        length = HEADER + chance.randrange(SLOT_MIN, SLOT_MAX)
        slots.append((at, length))
        at += length
    lives = []
    while len(lives) < len(slots):
        lives += [chance.random() < share] * NEIGHBOURS[key]
    path, other = settings.directory / "segment", settings.directory / "rewritten"
    path.write_bytes(chance.randbytes(at))
    sync(path)
    before = taken(path)
    began = time.monotonic()
    rewrite(path, other, [slot for slot, is_live in zip(slots, lives) if is_live])
    rewrite_s = time.monotonic() - began
    rewritten = before - taken(other)
    began = time.monotonic()
    holes = punch(path, dead_ranges(slots, lives))
    punch_s = time.monotonic() - began
    punched = before - taken(path)
    path.unlink()
    other.unlink()
    return punched, rewritten, punch_s, rewrite_s, holes


def rewrite(path, other, slots):
    content = path.read_bytes()
    with other.open("wb") as file:
        file.write(content[:BLOCK])
        file.write(b"".join(content[at:at + length] for at, length in slots))
        file.flush()
        os.fsync(file.fileno())


def dead_ranges(slots, lives):
    """Adjoining dead slots, as ranges of whole blocks."""
    begin = end = None
    for (at, length), is_live in zip(slots, lives):
        if is_live:
            if begin is not None:
                yield begin, end
            begin = None
        else:
            begin, end = at if begin is None else begin, at + length
    if begin is not None:
        yield begin, end


def punch(path, ranges):
    fallocate = ctypes.CDLL(None, use_errno=True).fallocate
    fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
    holes = 0
    with path.open("r+b") as file:
        for begin, end in ranges:
            first, last = -(-begin // BLOCK) * BLOCK, end // BLOCK * BLOCK
            if first >= last:
                continue
            if fallocate(file.fileno(), KEEP_SIZE | PUNCH_HOLE, first, last - first) != 0:
                raise BenchError(f"{path}: no hole: {os.strerror(ctypes.get_errno())}")
            holes += 1
        os.fsync(file.fileno())
    return holes


def sync(path):
    with path.open("rb") as file:
        os.fsync(file.fileno())


def taken(path):
    return path.stat().st_blocks * 512


UNIT = Unit("gc.holes", [SPREAD, CLUSTERED], run)

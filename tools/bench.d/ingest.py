"""What the appliance takes in: from a load generator, and from a tapped device.

`ingest.server_*`: every machine of the load is an agent that enrolled with a token of its own and
has a TLS connection of its own. 8 disks are 8 machines with one disk each; 256 disks are 32
machines with 8 disks each. A frame holds what a machine writes within an agent's gathering time of
2 ms, if all of them together write 1 GiB/s: 64 records with 8 machines, 16 with 32.

Slots are bound to their LSN, so no frame can be sent twice, and a minute of frames does not fit
into memory. So the load comes in rounds: frames are sealed into memory while the appliance is
idle, then sent as fast as it takes them, then fio writes to the same disk, and so on, in one
growing store, until the time of sending alone is a minute. The time of a round ends when
everything is acknowledged *and* the appliance has come to rest: what it would have had to catch up
with counts.

`ingest.end_to_end`: from the first write of fio until the appliance has acknowledged the last.
`memory.*`: peaks, the highest of all ingest runs of the same call. Alone it is that of end_to_end.
"""

import json
import subprocess
from pathlib import Path

from errors import BenchError
from meter import GIB, MIB, Cpu, drop_caches, fio, peak_mib, seconds_until_now, settle_s
from report import Figure, median, say
from rig import Rig
from unit import Unit

SEQUENTIAL = ("write", "1M", 8)
END_TO_END = "ingest.end_to_end"
MEMORY = {"server": "memory.server_mib", "agent": "memory.agent_mib"}
REACH_MEMORY_MIB = 512
# A name may take 40 GiB; fio's file and the zeroed segments ahead need some of it.
FRAMES_BYTES_MAX = 33 * GIB
SUSTAINED_S = 60


class Shape:
    """Which machines the load consists of."""

    def __init__(self, machines, disks, frame_records, disk_bytes, reach):
        self.machines, self.disks = machines, disks
        self.frame_records, self.disk_bytes = frame_records, disk_bytes
        self.reach = reach


SHAPES = {
    "ingest.server_8disks": Shape(8, 1, 64, 64 * GIB, 0.5),
    "ingest.server_256disks": Shape(32, 8, 16, 16 * GIB, 0.4),
}


class Load:
    """The load generator, driven line by line."""

    def __init__(self, rig, shape):
        agents = rig.directory / "agents"
        for number in range(shape.machines):
            name = f"load{number:03}"
            rig.enrol(agents / name, name)
        log = open(rig.directory / "load.log", "ab")
        self.log = Path(log.name)
        self.process = subprocess.Popen(
            [str(word) for word in (
                rig.settings.bin / "afterimage-bench", "load", "--agents", agents, "--disks",
                shape.disks, "--disk-bytes", shape.disk_bytes, "--frame-records",
                shape.frame_records)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            start_new_session=True)
        log.close()
        rig.callback(self.end)
        self.answer()

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise BenchError(f"the load generator ended: {self.log.read_text()[-2000:]}")
        return json.loads(line)

    def ask(self, command):
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self.answer()

    def end(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            try:
                pipe.close()
            except OSError:
                pass


def memory_for_frames():
    """Bytes of frames that may be held: half of what is free."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024 // 2
    raise BenchError("/proc/meminfo does not say what is available")


def run_server(key):
    def run(settings, wanted, report):
        shape = SHAPES[key]
        with Rig(settings) as rig:
            file = rig.image("fio.dat", settings.pick(4 * GIB, 128 * MIB))
            rig.start_server()
            load = Load(rig, shape)
            say(f"   {shape.machines} machines with {shape.disks} disks each are connected")
            rounds, baseline = measure(rig, load, file)
            report.note_memory("server", peak_mib(rig.server.pid))
            report.add(Figure(
                key, median([one["mib_per_s"] for one in rounds]), "MiB/s", shape.reach,
                "higher", median([one.mib_per_s for one in baseline]),
                "fio 1 MiB sequential direct write",
                (median([one["cpu"] for one in rounds]),
                 median([one.cpu_s_per_gib for one in baseline]))))
    return run


def measure(rig, load, file):
    """Rounds of both sides, by turns."""
    settings = rig.settings
    warm_up = one_round(rig, load, settings.pick(GIB, 64 * MIB))
    say(f"   to begin with, {warm_up['mib_per_s']:.0f} MiB/s (not counted)")
    frames_per_byte = warm_up["frame_bytes"] / warm_up["user_bytes"]
    wanted_s = SUSTAINED_S / settings.rounds + 1
    user_bytes = int(min(warm_up["mib_per_s"] * MIB * wanted_s,
                         memory_for_frames() / frames_per_byte,
                         FRAMES_BYTES_MAX / settings.rounds / frames_per_byte))
    user_bytes = settings.pick(user_bytes, 64 * MIB)
    rounds, baseline, sent_s, frames = [], [], 0, 0
    while True:
        drop_caches()
        cpu = Cpu()
        done = fio(file, SEQUENTIAL, settings.pick(5, 1))
        done.cpu_s_per_gib = cpu.stop().per_gib(done.bytes)
        baseline.append(done)
        one = one_round(rig, load, user_bytes)
        rounds.append(one)
        sent_s += one["elapsed_s"]
        frames += one["frame_bytes"]
        say(f"   round {len(rounds)}: {one['mib_per_s']:.0f} MiB/s over {one['elapsed_s']:.1f} s,"
            f" then {one['settle_s']:.1f} s to rest; fio {done.mib_per_s:.0f} MiB/s; {one['who']}")
        if len(rounds) < settings.rounds:
            continue
        if settings.is_quick or sent_s >= SUSTAINED_S:
            break
        if frames + one["frame_bytes"] > FRAMES_BYTES_MAX:
            say(f"   40 GiB are used up: {sent_s:.0f} s of ingest, not {SUSTAINED_S}")
            break
    return rounds, baseline


def one_round(rig, load, user_bytes):
    prepared = load.ask(f"prepare {user_bytes}")
    say(f"   sealed {prepared['user_bytes'] / GIB:.2f} GiB in {prepared['elapsed_s']:.1f} s:"
        f" {prepared['frames']} frames, {prepared['frame_bytes'] / GIB:.2f} GiB")
    drop_caches()
    settle_s(rig.server.pid)
    cpu = Cpu(server=rig.server.pid, generator=load.process.pid)
    one = load.ask("replay")
    one["settle_s"] = settle_s(rig.server.pid)
    rig.caught_up()
    cpu.stop()
    one["mib_per_s"] = one["user_bytes"] / MIB / (one["elapsed_s"] + one["settle_s"])
    one["cpu"] = cpu.per_gib(one["user_bytes"])
    one["who"] = cpu.shown(one["user_bytes"])
    return one


def run_end_to_end(settings, wanted, report):
    with Rig(settings) as rig:
        rig.start_server()
        rig.start_agent()
        size = settings.pick(4 * GIB, 128 * MIB)
        raw = rig.loop(rig.image("raw.img", size))
        device = rig.attach(rig.image("ours.img", size), "ours")
        rig.protect("ours")
        say("   ours is protected")
        rounds = {"ours": [], "raw": []}
        for _ in range(settings.rounds):
            rounds["raw"].append(write_through(rig, raw, settings.pick(8, 1), is_ours=False))
            runtime_s = settings.pick(SUSTAINED_S // settings.rounds, 1)
            one = write_through(rig, device, runtime_s, is_ours=True)
            rounds["ours"].append(one)
            say(f"   {one['mib_per_s']:.0f} MiB/s over {one['elapsed_s']:.1f} s, fio itself saw"
                f" {one['fio_mib_per_s']:.0f}; {one['who']}")
        rig.caught_up()
        report.note_memory("server", peak_mib(rig.server.pid))
        report.note_memory("agent", peak_mib(rig.agent.pid))

        def middle(side, field):
            return median([one[field] for one in rounds[side]])

        if END_TO_END in wanted:
            report.add(Figure(
                END_TO_END, middle("ours", "mib_per_s"), "MiB/s", 0.5, "higher",
                middle("raw", "mib_per_s"), "same fio on loop over the raw file",
                (middle("ours", "cpu"), middle("raw", "cpu"))))
        # All other ingest runs of this call were before.
        for who, key in MEMORY.items():
            if key in wanted:
                report.add(Figure(key, report.memory_mib[who], "MiB", REACH_MEMORY_MIB, "lower"))


def write_through(rig, device, runtime_s, is_ours):
    """Random writes; ours end when the appliance owes no acknowledgement."""
    drop_caches()
    cpu = Cpu(server=rig.server.pid, agent=rig.agent.pid)
    done = fio(device, "randwrite_qd32", runtime_s)
    elapsed_s = done.seconds
    if is_ours:
        rig.drained()
        elapsed_s = seconds_until_now(done)
    cpu.stop()
    return {
        "mib_per_s": done.bytes / MIB / elapsed_s,
        "fio_mib_per_s": done.mib_per_s,
        "elapsed_s": elapsed_s,
        "cpu": cpu.per_gib(done.bytes),
        "who": cpu.shown(done.bytes),
    }


UNITS = [
    *(Unit(key, [key], run_server(key)) for key in SHAPES),
    Unit(END_TO_END, [END_TO_END, *MEMORY.values()], run_end_to_end),
]

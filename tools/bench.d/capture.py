"""The tapped device: against the same device without capture, and against a plain loop device.

The three devices take turns; after each run of ours the appliance acknowledges everything before
the next run begins, and the processor time of that is counted.
"""

from meter import GIB, MIB, Cpu, drop_caches, fio
from report import Figure, median, say
from rig import Rig
from unit import Unit

PATTERNS = ["randwrite_qd1", "randwrite_qd32", "seqwrite_1m"]
REACH = {"passthrough": 0.85, "raw": 0.6}
BASELINE = {
    "passthrough": "same tap without capture",
    "raw": "loop over the raw file",
}


def run(settings, wanted, report):
    with Rig(settings) as rig:
        rig.start_server()
        rig.start_agent()
        size = settings.pick(2 * GIB, 128 * MIB)
        devices = {
            "raw": rig.loop(rig.image("raw.img", size)),
            "passthrough": rig.attach(rig.image("passthrough.img", size), "passthrough"),
            "ours": rig.attach(rig.image("ours.img", size), "ours"),
        }
        rig.protect("ours")
        say("   ours is protected")
        for pattern in PATTERNS:
            keys = {side: f"capture.{side}.{pattern}" for side in REACH}
            if not wanted & set(keys.values()):
                continue
            rounds = {side: [] for side in devices}
            for _ in range(settings.rounds):
                for side, device in devices.items():
                    rounds[side].append(one_run(rig, device, pattern))
            for side, key in keys.items():
                if key in wanted:
                    report.add(figure(key, pattern, side, rounds))


def one_run(rig, device, pattern):
    drop_caches()
    cpu = Cpu()
    done = fio(device, pattern, rig.settings.pick(4, 1))
    rig.drained()
    done.cpu_s_per_gib = cpu.stop().per_gib(done.bytes)
    return done


def figure(key, pattern, side, rounds):
    is_sequential = pattern.startswith("seq")

    def value(name):
        return median([run.mib_per_s if is_sequential else run.iops for run in rounds[name]])

    def cpu(name):
        return median([run.cpu_s_per_gib for run in rounds[name]])

    return Figure(key, value("ours"), "MiB/s" if is_sequential else "IOPS", REACH[side], "higher",
                  value(side), BASELINE[side], (cpu("ours"), cpu(side)))


UNIT = Unit("capture", [f"capture.{side}.{pattern}" for side in REACH for pattern in PATTERNS],
            run)

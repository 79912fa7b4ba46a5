"""What is measured with: fio, and the processor time of machine and processes."""

import json
import os
import re
import subprocess
import tempfile
import time
from pathlib import Path

from errors import BenchError

MIB = 1 << 20
GIB = 1 << 30
TICKS_PER_S = os.sysconf("SC_CLK_TCK")

PATTERNS = {
    "randwrite_qd1": ("randwrite", "4k", 1),
    "randwrite_qd32": ("randwrite", "4k", 32),
    "seqwrite_1m": ("write", "1M", 8),
    "randread_qd1": ("randread", "4k", 1),
    "randread_qd32": ("randread", "4k", 32),
    "seqread_1m": ("read", "1M", 8),
}


def engine():
    """io_uring, as the product uses it itself, or libaio where the machine forbids it."""
    setting = Path("/proc/sys/kernel/io_uring_disabled")
    is_forbidden = setting.exists() and setting.read_text().strip() == "2"
    return "libaio" if is_forbidden else "io_uring"


class FioRun:
    """What one run of fio did."""

    def __init__(self, job):
        side = job["write"] if job["write"]["io_bytes"] else job["read"]
        self.bytes = side["io_bytes"]
        self.seconds = side["runtime"] / 1000
        self.iops = side["iops"]
        self.mib_per_s = self.bytes / MIB / self.seconds
        self.ended = None
        self.cpu_s_per_gib = None


def fio(filename, pattern, runtime_s=None, started=None, **options):
    """Runs fio with direct I/O and half-compressible data that is new in every request.

    `started` is given the process, for who may want to end it early.
    """
    rw, block, depth = PATTERNS.get(pattern, pattern)
    command = [
        "fio", "--name=bench", f"--filename={filename}", f"--rw={rw}", f"--bs={block}",
        f"--iodepth={depth}", f"--ioengine={engine()}", "--direct=1", "--randrepeat=0",
        "--buffer_compress_percentage=50", "--refill_buffers", "--output-format=json",
    ]
    if runtime_s is not None:
        command += ["--time_based", f"--runtime={runtime_s}"]
    command += [f"--{name}={value}" for name, value in options.items()]
    with tempfile.TemporaryDirectory() as directory:
        # Fio itself still tidies up after its last write; it leaves the answer in a file.
        command.append("--exec_postrun=date +%s.%N")
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                              cwd=directory) as process:
            if started:
                started(process)
            output, complaints = process.communicate()
        ended = Path(directory, "bench.postrun.txt")
        ended = float(ended.read_text()) if ended.exists() else None
    try:
        # Warnings may come before the JSON.
        job = json.loads(output[output.index("{"):])["jobs"][0]
    except (ValueError, KeyError, IndexError):
        raise BenchError(f"fio failed: {complaints or output}") from None
    if process.returncode != 0 or job["error"] != 0:
        raise BenchError(f"fio failed on {filename}: {complaints}")
    result = FioRun(job)
    result.ended = ended
    return result


def seconds_until_now(done):
    """From the first request of a run to now."""
    if done.ended is None:
        raise BenchError("fio did not say when it ended")
    return done.seconds + max(0, time.time() - done.ended)


def drop_caches():
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def cpu_of_machine():
    """Seconds that all cores were busy since the start, whoever it was for."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    user, nice, system, _idle, _iowait, irq, softirq = (int(field) for field in fields[:7])
    return (user + nice + system + irq + softirq) / TICKS_PER_S


def cpu_of(pid):
    """Seconds that a process and its threads ran."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def peak_mib(pid):
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) / 1024


class Cpu:
    """Processor time between here and `stop`: of the machine, and of some processes."""

    def __init__(self, **pids):
        self.pids = pids
        self.machine = cpu_of_machine()
        self.processes = {name: cpu_of(pid) for name, pid in pids.items()}

    def stop(self):
        self.machine = cpu_of_machine() - self.machine
        for name, pid in self.pids.items():
            self.processes[name] = cpu_of(pid) - self.processes[name]
        return self

    def per_gib(self, count):
        return self.machine / (count / GIB)

    def shown(self, count):
        parts = [f"{name} {value / (count / GIB):.2f}" for name, value in self.processes.items()]
        return f"CPU s/GiB: machine {self.per_gib(count):.2f}, of it " + ", ".join(parts)


def settle_s(pid, quiet_s=0.5, at_most_s=60):
    """Waits until a process has nothing left to do; says how long it still worked."""
    began = worked = time.monotonic()
    ticks = cpu_of(pid)
    while time.monotonic() - worked < quiet_s:
        time.sleep(0.05)
        now = cpu_of(pid)
        # Idle timers cost a tick now and then.
        if now - ticks > 1 / TICKS_PER_S:
            worked = time.monotonic()
        ticks = now
        if time.monotonic() - began > at_most_s:
            raise BenchError(f"process {pid} did not come to rest within {at_most_s} s")
    return worked - began

"""Points as a chain of qcow2 overlays under qemu-storage-daemon.

The live end of the chain is an NBD export, which fio writes to itself: qemu's FUSE export is not
safe above depth 1. A point makes an empty overlay and tells the daemon to go on in it, as one does
for a running guest. Old points are opened from their files, which nobody writes any more.
"""

import json
import socket
import subprocess
import time

from errors import BenchError
from meter import drop_caches, engine
from rig import run as command, wait_for

OVERLAY = "cluster_size=64k,extended_l2=on,lazy_refcounts=on"


class Qmp:
    """The daemon's control socket."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(120)
        self.socket.connect(str(path))
        self.lines = self.socket.makefile("r")
        self.lines.readline()
        self.ask("qmp_capabilities")

    def ask(self, execute, **arguments):
        request = json.dumps({"execute": execute, "arguments": arguments})
        self.socket.sendall(request.encode() + b"\n")
        for line in self.lines:
            answer = json.loads(line)
            if "error" in answer:
                raise BenchError(f"qemu: {execute}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]
        raise BenchError(f"qemu-storage-daemon ended during {execute}")

    def close(self):
        self.lines.close()
        self.socket.close()


class Qcow2:
    """See the module's text. The rig undoes it."""

    NAME = "qcow2 chain"
    TOOLS = ["qemu-storage-daemon", "qemu-img", "qemu-nbd", "qemu-io"]

    def __init__(self, rig, size):
        self.rig = rig
        self.directory = rig.directory / "peer"
        self.directory.mkdir()
        command("qemu-img", "create", "-q", "-f", "qcow2", "-o", OVERLAY, self.path(0), size)
        self.live_socket = self.directory / "live.sock"
        control = self.directory / "qmp.sock"
        daemon = self.start(
            "qemu-storage-daemon",
            "--blockdev", self.node(0),
            "--nbd-server", f"addr.type=unix,addr.path={self.live_socket},max-connections=0",
            "--export", "type=nbd,id=live,node-name=d0,name=live,writable=on",
            "--chardev", f"socket,path={control},server=on,wait=off,id=c",
            "--monitor", "chardev=c")
        self.wait_for(daemon, control)
        self.qmp = Qmp(control)
        self.rig.callback(self.qmp.close)
        self.live = f"nbd+unix:///live?socket={self.live_socket}"
        nbd(self.live, "write", "1M", 8, size=size)

    def path(self, number):
        return self.directory / f"{number}.qcow2"

    def node(self, number):
        node = {"driver": "qcow2", "node-name": f"d{number}", "l2-cache-size": 32 << 20,
                "file": {"driver": "file", "filename": str(self.path(number)),
                         "cache": {"direct": True, "no-flush": False}, "aio": "io_uring"}}
        if engine() != "io_uring":
            node["file"]["aio"] = "threads"
        return json.dumps(node)

    def start(self, *arguments):
        process = subprocess.Popen([str(word) for word in arguments], stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE, text=True, start_new_session=True)
        self.rig.callback(process.stderr.close)
        self.rig.callback(process.wait)
        self.rig.callback(process.kill)
        return process

    @staticmethod
    def wait_for(process, path):
        def is_there():
            if process.poll() is not None:
                raise BenchError(f"{process.args[0]} ended: {process.stderr.read()[-500:]}")
            return path.exists()

        wait_for(f"{process.args[0]} to start", is_there, seconds=30)

    def write(self, count):
        nbd(self.live, "randwrite", "4k", 16, number_ios=count, end_fsync=1)

    def random_writes(self, seconds):
        drop_caches()
        return nbd(self.live, "randwrite", "4k", 32, time_based=1, runtime=seconds)

    def point(self, number):
        """Makes file `number` the point, and goes on in the next."""
        overlay = self.path(number + 1)
        command("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b",
                self.path(number), "-o", OVERLAY, overlay, self.size())
        added = json.loads(self.node(number + 1)) | {"backing": None}
        self.qmp.ask("blockdev-add", **added)
        self.qmp.ask("blockdev-snapshot", node=f"d{number}", overlay=f"d{number + 1}")

    def size(self):
        if not hasattr(self, "size_bytes"):
            shown = command("qemu-img", "info", "-U", "--output=json", self.path(0))
            self.size_bytes = json.loads(shown)["virtual-size"]
        return self.size_bytes

    def list(self):
        """Every point of the newest."""
        newest = max(int(path.stem) for path in self.directory.glob("*.qcow2"))
        command("qemu-img", "info", "-U", "--backing-chain", "--output=json", self.path(newest))

    def first_byte_ms(self, number):
        drop_caches()
        began = time.monotonic()
        command("qemu-io", "-r", "-U", "-f", "qcow2", "-c", "read 0 4k", self.path(number))
        return (time.monotonic() - began) * 1000

    def random_reads(self, number, seconds):
        drop_caches()
        path = self.directory / f"old-{number}-{time.monotonic_ns()}.sock"
        server = self.start("qemu-nbd", "--read-only", "--persistent", "--shared=0", "-f", "qcow2",
                            "--cache=none", "--socket", path, self.path(number))
        self.wait_for(server, path)
        try:
            return nbd(f"nbd+unix:///?socket={path}", "randread", "4k", 32, time_based=1,
                       runtime=seconds)
        finally:
            server.kill()
            server.wait()

    def delete(self, first, count):
        """Each is merged into the one that follows it, which then stands on the one before."""
        for number in range(first, first + count):
            job = f"job{number}"
            self.qmp.ask("block-stream", **{
                "device": f"d{number + 1}", "base-node": f"d{first - 1}", "job-id": job})
            self.await_job(job)

    def await_job(self, job):
        def is_over():
            return job not in {one["id"] for one in self.qmp.ask("query-jobs")
                               if one["status"] not in ("concluded", "null")}

        wait_for(f"qemu's {job}", is_over, seconds=120, every_s=0.01)


def nbd(uri, rw, block, depth, **options):
    """Runs fio over NBD; gives IOPS."""
    done = subprocess.run(
        ["fio", "--name=bench", "--ioengine=nbd", f"--uri={uri}", f"--rw={rw}", f"--bs={block}",
         f"--iodepth={depth}", "--randrepeat=0", "--buffer_compress_percentage=50",
         "--refill_buffers", "--output-format=json",
         *(f"--{name}={value}" for name, value in options.items())],
        capture_output=True, text=True, check=False)
    try:
        job = json.loads(done.stdout[done.stdout.index("{"):])["jobs"][0]
    except (ValueError, LookupError):
        raise BenchError(f"fio over NBD failed: {done.stderr or done.stdout}") from None
    if done.returncode != 0 or job["error"] != 0:
        raise BenchError(f"fio over NBD failed: {done.stderr}")
    return (job["write"] if "write" in rw else job["read"])["iops"]

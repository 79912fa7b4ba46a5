"""One appliance with an agent, in a directory of its own, and the devices around them.

Invariants
* Everything that was started or attached is on the stack of things to undo, in reverse order.
* Only processes and loop devices of this rig are touched.
"""

import contextlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import meter
from errors import BenchError

MACHINE = "bench"
PATIENCE_S = 600
FREE_BYTES_MIN = 42 << 30


class Settings:
    """Where things are, and how much is done."""

    def __init__(self, root, directory, is_quick):
        self.bin = root / "target" / "release"
        self.directory = directory
        self.is_quick = is_quick
        self.rounds = 3

    def pick(self, full, quick):
        return quick if self.is_quick else full


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a local socket."""

    def __init__(self, path):
        super().__init__("localhost", timeout=PATIENCE_S)
        self.path = str(path)

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(*command, **options):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True,
                          **options)
    if done.returncode != 0:
        raise BenchError(f"{' '.join(map(str, command))}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def wait_for(what, condition, seconds=PATIENCE_S, every_s=0.02):
    until = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > until:
            raise BenchError(f"waited {seconds} s in vain for {what}")
        time.sleep(every_s)


class Rig(contextlib.ExitStack):
    """See the module's text. Use it as a context."""

    def __init__(self, settings, config=""):
        super().__init__()
        self.settings, self.config = settings, config
        self.directory = settings.directory / "rig"
        self.data = self.directory / "data"
        self.socket = self.data / "control.sock"
        self.agent_socket = self.directory / "agent.sock"
        self.agent_state = self.directory / "agent"
        self.data_port, self.control_port = free_port(), free_port()
        self.server = self.agent = None
        free = shutil.disk_usage(settings.directory).free
        if not settings.is_quick and free < FREE_BYTES_MIN:
            raise BenchError(f"{settings.directory} has {free >> 30} GiB free; a name may need 40")
        self.directory.mkdir()
        self.callback(shutil.rmtree, self.directory, ignore_errors=True)
        self.callback(self._unmount_left_behind)

    def _unmount_left_behind(self):
        """A daemon that was killed leaves its mounts."""
        for line in Path("/proc/mounts").read_text().splitlines():
            place = line.split()[1]
            if place.startswith(f"{self.directory}/"):
                subprocess.run(["umount", "--lazy", place], check=False)

    # --- Processes ---------------------------------------------------------------------------

    def _start(self, name, ready, *arguments):
        log = self.directory / f"{name}.log"
        with open(log, "ab") as out:
            process = subprocess.Popen(
                [str(word) for word in arguments], stdout=out, stderr=out, cwd="/",
                start_new_session=True)

        def is_ready():
            if process.poll() is not None:
                raise BenchError(f"{name} ended: {log.read_text()[-2000:]}")
            return ready()

        try:
            wait_for(f"{name} to start", is_ready, seconds=60)
        except BenchError:
            self._stop(process)
            raise
        return process

    @staticmethod
    def _stop(process):
        if process is None or process.poll() is not None:
            return
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def start_server(self):
        def answers():
            with contextlib.suppress(OSError, http.client.HTTPException):
                return self.ask("GET", "/v1/status") is not None
            return False

        config = self.directory / "server.toml"
        config.write_text(self.config)
        self.server = self._start(
            "afterimaged", answers, self.settings.bin / "afterimaged", "--config", config,
            "--data-dir", self.data, "--data-listen", f"127.0.0.1:{self.data_port}",
            "--control-listen", f"127.0.0.1:{self.control_port}")
        self.callback(self._stop, self.server)

    def stop_server(self):
        self._stop(self.server)

    def enrol(self, state, machine):
        token = run(self.settings.bin / "aft", "--socket", self.socket, "token", "create")
        run(self.settings.bin / "afterimage-agent", "enrol", "--server",
            f"127.0.0.1:{self.control_port}", "--token", token.split()[0], "--state-dir", state,
            "--machine-name", machine)

    def start_agent(self):
        """Enrols this machine and starts its agent."""
        self.enrol(self.agent_state, MACHINE)
        config = self.directory / "agent.toml"
        config.write_text(f'[paths]\nlink_dir = "{self.directory / "links"}"\n')

        def is_connected():
            return self.agent_socket.exists() and self.agent_status()["is_connected"]

        self.agent = self._start(
            "afterimage-agent", is_connected, self.settings.bin / "afterimage-agent", "run",
            "--state-dir", self.agent_state, "--socket", self.agent_socket, "--config", config)
        self.callback(self._stop, self.agent)

    def stop_agent(self):
        self._stop(self.agent)

    # --- Questions ---------------------------------------------------------------------------

    def ask(self, method, path, body=None, at=None):
        """Asks the appliance over its local socket."""
        connection = UnixConnection(at or self.socket)
        try:
            text = None if body is None else json.dumps(body)
            connection.request(method, path, text, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        if answer.status >= 300:
            raise BenchError(f"{method} {path}: {content.decode(errors='replace')}")
        return json.loads(content) if content else {}

    def timed(self, method, path, body=None):
        """As `ask`, over a connection that is open; gives the milliseconds as well."""
        connection = UnixConnection(self.socket)
        try:
            connection.connect()
            text = None if body is None else json.dumps(body)
            began = time.monotonic()
            connection.request(method, path, text, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            content = answer.read()
            spent_ms = (time.monotonic() - began) * 1000
        finally:
            connection.close()
        if answer.status >= 300:
            raise BenchError(f"{method} {path}: {content.decode(errors='replace')}")
        return json.loads(content) if content else {}, spent_ms

    def set_policy(self, window_s, tiers):
        """Keeps every LSN for the window, then one point of each interval of the tiers."""
        tiers = [{"interval_s": interval, "keep_for_s": keep} for interval, keep in tiers]
        policy = {"journal_window_s": window_s, "tiers": tiers}
        self.ask("POST", f"/v1/machines/{MACHINE}/policy",
                 {"policy": policy, "expected_version": None})

    def collect(self):
        """Collects what nobody needs; returns when that is done."""
        return self.ask("POST", "/v1/store/collect")

    def stored_bytes(self):
        """Bytes that the data directory takes; the tree of files mounted in it takes none."""
        return int(run("du", "-xsB1", self.data).split()[0])

    def agent_status(self):
        return self.ask("GET", "/v1/status", at=self.agent_socket)

    def reconnected(self):
        """Waits until the agent speaks with the appliance again."""
        wait_for("the agent to connect", lambda: self.agent_status()["is_connected"], seconds=120)

    def drained(self):
        """Waits until all that was captured is acknowledged."""
        def is_drained():
            status = self.agent_status()
            return status["acknowledged"] >= status["captured"]

        wait_for("the appliance to acknowledge", is_drained, every_s=0.005)

    def caught_up(self):
        """Waits until all that is durable is visible to views."""
        def is_caught_up():
            machines = self.ask("GET", "/v1/status")["machines"]
            return all(machine["lag"]["apply_ms"] == 0 for machine in machines)

        wait_for("the appliance to catch up", is_caught_up)

    # --- Devices -----------------------------------------------------------------------------

    def image(self, name, size_bytes, is_filled=True):
        """Makes a disk's file, every block of it written."""
        path = self.directory / name
        with open(path, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, size_bytes)
        if is_filled:
            meter.fio(path, ("write", "1M", 8), size=size_bytes, end_fsync=1)
        return path

    def loop(self, path):
        """A loop device over a file, with direct I/O, as the baseline."""
        device = run("losetup", "--find", "--show", "--direct-io=on", path).strip()
        self.callback(run, "losetup", "--detach", device)
        # The kernel falls back to buffered I/O without a word.
        is_direct = Path(f"/sys/block/{Path(device).name}/loop/dio").read_text().strip()
        if is_direct != "1":
            raise BenchError(f"{device} has no direct I/O: {path} is on a file system without it")
        return device

    def attach(self, path, name):
        """Puts a tap in front of a file; gives the device."""
        body = {"source": str(path), "name": name}
        return self.ask("POST", "/v1/disks", body, at=self.agent_socket)["device"]

    def protect(self, name):
        """Protects a disk, and waits for its first copy."""
        self.ask("POST", f"/v1/disks/{name}/protect", {}, at=self.agent_socket)

        def is_protected():
            disk = self.ask("GET", f"/v1/disks/{name}", at=self.agent_socket)
            return disk["phase"] == "protected"

        wait_for("the first copy", is_protected, every_s=0.1)
        self.drained()

    @contextlib.contextmanager
    def view(self, reference):
        """A block device that shows a disk as it was."""
        mount = self.ask("POST", "/v1/mounts", mount_request(reference))
        try:
            yield mount["device"]
        finally:
            self.ask("DELETE", f"/v1/mounts/{mount['id']}")


def mount_request(reference):
    return {"reference": reference, "directory": None, "device_only": True, "is_branch": False,
            "allow_incomplete": False}

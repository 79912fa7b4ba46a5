"""Points as copies of a file: XFS reflinks and btrfs snapshots, each on a loop device."""

import mmap
import os
import subprocess
import time

import meter
from meter import GIB, drop_caches, fio
from rig import run as command

FIRST_BYTES = 4096


class FileSystem:
    """A file system in a file, with the live disk as a file on it. The rig undoes it."""

    TOOLS = ["losetup"]

    def __init__(self, rig, size):
        image = rig.directory / "peer.img"
        with open(image, "wb") as file:
            file.truncate(max(5 * size, GIB))
        self.device = rig.loop(image)
        self.root = rig.directory / "peer"
        self.root.mkdir()
        self.make()
        command("mount", self.device, self.root)
        rig.callback(command, "umount", self.root)
        self.live = self.prepare()
        meter.fio(self.live, ("write", "1M", 8), size=size, end_fsync=1)

    def prepare(self):
        return self.root / "head"

    def write(self, count):
        fio(self.live, ("randwrite", "4k", 16), number_ios=count, end_fsync=1)

    def random_writes(self, seconds):
        drop_caches()
        return fio(self.live, "randwrite_qd32", seconds).iops

    def random_reads(self, number, seconds):
        drop_caches()
        return fio(self.path(number), "randread_qd32", seconds).iops

    def list(self):
        return sorted(entry.name for entry in os.scandir(self.root))

    def first_byte_ms(self, number):
        """From asking for a device to 4 KiB of it, as with ours."""
        drop_caches()
        buffer = mmap.mmap(-1, FIRST_BYTES)
        began = time.monotonic()
        device = command("losetup", "--find", "--show", "--read-only", "--direct-io=on",
                         self.path(number)).strip()
        try:
            opened = os.open(device, os.O_RDONLY | os.O_DIRECT)
            os.preadv(opened, [buffer], 0)
            os.close(opened)
            return (time.monotonic() - began) * 1000
        finally:
            subprocess.run(["losetup", "--detach", device], check=False)


class Xfs(FileSystem):
    """One reflinked copy of the live file for each point."""

    NAME = "XFS reflink"
    TOOLS = ["losetup", "mkfs.xfs", "cp"]

    def make(self):
        command("mkfs.xfs", "-q", "-m", "reflink=1", self.device)

    def path(self, number):
        return self.root / f"p{number}"

    def point(self, number):
        command("cp", "--reflink=always", self.live, self.path(number))

    def delete(self, first, count):
        for number in range(first, first + count):
            self.path(number).unlink()
        os.sync()


class Btrfs(FileSystem):
    """One read-only snapshot of the live file's subvolume for each point."""

    NAME = "btrfs snapshot"
    TOOLS = ["losetup", "mkfs.btrfs", "btrfs"]

    def make(self):
        command("mkfs.btrfs", "-q", self.device)

    def prepare(self):
        command("btrfs", "subvolume", "create", self.root / "seed")
        return self.root / "seed" / "head"

    def path(self, number):
        return self.root / f"p{number}" / "head"

    def point(self, number):
        command("btrfs", "subvolume", "snapshot", "-r", self.root / "seed",
                self.root / f"p{number}")

    def delete(self, first, count):
        for number in range(first, first + count):
            command("btrfs", "subvolume", "delete", self.root / f"p{number}")
        command("btrfs", "subvolume", "sync", self.root)

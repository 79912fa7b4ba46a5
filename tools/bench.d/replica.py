"""A disk with history whose replica is complete, for all names that only look at it."""

from meter import GIB, MIB, fio
from report import say
from rig import MACHINE

DISK = "disk"
REFERENCE = f"{MACHINE}/{DISK}"


def make(rig, changed_bytes):
    """Makes a filled disk, protects it and changes some of it; gives its image and device."""
    settings = rig.settings
    rig.start_server()
    rig.start_agent()
    size = settings.pick(4 * GIB, 128 * MIB)
    image = rig.image("disk.img", size)
    device = rig.attach(image, DISK)
    rig.protect(DISK)
    if changed_bytes:
        fio(device, "randwrite_qd32", io_size=changed_bytes)
        rig.drained()
    say(f"   a disk of {size // MIB} MiB is protected, {changed_bytes // MIB} MiB changed since")
    return image, device

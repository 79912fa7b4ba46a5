"""Runs the names that were asked for, and prints what came of them.

Invariants
* A figure is the median of at least three rounds; the two sides of a ratio take turns.
* What cannot run fails the whole run (exit status 1); what runs and is slow does not.
"""

import argparse
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.dont_write_bytecode = True

import capture
import churn
import collect
import devices_transport
import failovers
import holes
import ingest
import locality
import mount
import peers
import point
import points
import read
import space
import stored
from errors import BenchError, Interrupted
from report import Report, say
from rig import Settings

UNITS = [*ingest.UNITS, capture.UNIT, read.UNIT, point.UNIT, mount.UNIT, stored.UNIT, points.UNIT,
         peers.UNIT, collect.UNIT, holes.UNIT, failovers.UNIT, *space.UNITS, locality.UNIT,
         churn.UNIT, devices_transport.UNIT]
ROOT = Path(__file__).resolve().parent.parent.parent


def arguments():
    parser = argparse.ArgumentParser(
        prog="tools/bench",
        description="Measures Afterimage against baselines of the same disk and the same run.",
        epilog="Run it alone on the machine, as root. --no-build measures what was built before.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="a key, or the beginning of keys"
                        " such as capture or read.cold; everything otherwise")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the figures to FILE")
    parser.add_argument("--dir", metavar="DIR", type=Path, default=ROOT / "target",
                        help="a directory on the disk to measure [default: target]")
    parser.add_argument("--quick", action="store_true",
                        help="seconds instead of minutes: shows that it runs, measures nothing")
    parser.add_argument("--list", action="store_true", help="list the keys, and end")
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def is_wanted(key, names):
    return not names or any(key == name or key.startswith(name + ".") for name in names)


def choose(names):
    """The units to run, each with its wanted keys."""
    keys = [key for unit in UNITS for key in unit.keys]
    for name in names:
        if not any(is_wanted(key, [name]) for key in keys):
            say(f"bench: there is no {name}; --list shows the keys", file=sys.stderr)
            sys.exit(2)
    chosen = ((unit, {key for key in unit.keys if is_wanted(key, names)}) for unit in UNITS)
    return [(unit, wanted) for unit, wanted in chosen if wanted]


def interrupted(number, _frame):
    raise Interrupted(f"interrupted by signal {number}")


def main():
    args = arguments()
    if args.list:
        print("\n".join(sorted({key for unit in UNITS for key in unit.keys})))
        return 0
    if os.geteuid() != 0:
        sys.exit("bench: run it as root: it attaches loop devices and drops caches")
    chosen = choose(args.names)
    if args.check:
        return 0
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupted)
    report = Report(is_quick=args.quick)
    has_failed = False
    with tempfile.TemporaryDirectory(prefix="bench-", dir=args.dir.resolve()) as directory:
        for unit, wanted in chosen:
            began = time.monotonic()
            say(f"== {unit.name}")
            settings = Settings(ROOT, Path(directory), args.quick)
            try:
                unit.run(settings, wanted, report)
            except Interrupted as error:
                say(f"bench: {error}", file=sys.stderr)
                has_failed = True
                break
            except BenchError as error:
                say(f"bench: {unit.name}: {error}", file=sys.stderr)
                has_failed = True
            except Exception:
                traceback.print_exc()
                has_failed = True
            say(f"   {unit.name} took {time.monotonic() - began:.0f} s")
    report.print_table([name for name in sys.argv[1:]])
    if args.json:
        report.write_json(args.json)
    return 1 if has_failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""Keeps docs/reliability.json: what was tried at random, by commit and range of seeds.

    reliability.py next CAMPAIGN                             the first seed never used
    reliability.py add CAMPAIGN COMMIT SEED COUNT NAME=N...  adds a finished range of seeds
    reliability.py table                                     writes the sums into RELIABILITY.md
    reliability.py sum                                       prints the sums

NAME is images, steps, turns, executions or seconds; an empty N counts as 0. Ranges are added one
by one as they are finished, so a soak that was interrupted has lost at most one of each kind.
"""

import contextlib
import fcntl
import json
import os
import sys
from collections import Counter, defaultdict

DOCS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "docs")
DATA = os.path.join(DOCS, "reliability.json")
PAGE = os.path.join(DOCS, "RELIABILITY.md")
BEGIN, END = "<!-- sums -->", "<!-- end of sums -->"
# Seeds below this belong to `tools/check`, which uses the same ones each time.
FIRST_SEED = 1_000_000
KINDS = ["images", "steps", "turns", "executions", "seconds"]
TITLES = {
    "images": "crash images",
    "steps": "model steps",
    "turns": "simulation turns",
    "executions": "fuzz executions",
}


@contextlib.contextmanager
def locked():
    """Two lanes of a soak add at once. The lock is the directory's, which is never replaced."""
    directory = os.open(DOCS, os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield
    finally:
        os.close(directory)


def load():
    if not os.path.exists(DATA):
        return []
    with open(DATA) as file:
        return json.load(file)


def replace(path, text):
    with open(path + ".new", "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".new", path)


def save(entries):
    lines = ",\n".join(json.dumps(entry) for entry in entries)
    replace(DATA, f"[\n{lines}\n]\n")


def next_seed(campaign):
    used = [e["last_seed"] for e in load() if e["campaign"] == campaign]
    print(max(used, default=FIRST_SEED - 1) + 1)


def add(campaign, commit, seed, count, *figures):
    seed, count = int(seed), int(count)
    new = dict(figure.split("=") for figure in figures)
    unknown = set(new) - set(KINDS)
    if unknown:
        sys.exit(f"reliability.py: unknown figures: {', '.join(sorted(unknown))}")
    new = {kind: int(new.get(kind) or 0) for kind in KINDS}
    if not any(new[kind] for kind in TITLES):
        sys.exit(f"reliability.py: {campaign} from seed {seed} has counted nothing")
    with locked():
        entries = load()
        for entry in entries:
            is_same = entry["campaign"] == campaign and entry["commit"] == commit
            if is_same and entry["last_seed"] + 1 == seed:
                entry["last_seed"] += count
                for kind in KINDS:
                    entry[kind] += new[kind]
                break
        else:
            first = {"campaign": campaign, "commit": commit}
            entries.append(first | {"first_seed": seed, "last_seed": seed + count - 1} | new)
        save(entries)


def sums():
    by_campaign = defaultdict(Counter)
    for entry in load():
        for kind in KINDS:
            by_campaign[entry["campaign"]][kind] += entry[kind]
    return by_campaign


def table():
    by_campaign = sums()
    rows = [["campaign", *TITLES.values(), "hours"], ["---", *["---:"] * (len(TITLES) + 1)]]

    def row(name, counts):
        figures = [f"{counts[kind]:,}" if counts[kind] else "" for kind in TITLES]
        rows.append([name, *figures, f"{counts['seconds'] / 3600:.2f}"])

    for campaign, counts in sorted(by_campaign.items()):
        row(campaign, counts)
    row("**all**", sum(by_campaign.values(), Counter()))
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
    with locked():
        with open(PAGE) as file:
            page = file.read()
        before, found, rest = page.partition(BEGIN)
        _, found_end, after = rest.partition(END)
        if not found or not found_end:
            sys.exit(f"reliability.py: {PAGE} lacks the lines {BEGIN} and {END}")
        replace(PAGE, f"{before}{BEGIN}\n{text}\n{END}{after}")


def print_sum():
    by_campaign = sums()
    for campaign, counts in sorted(by_campaign.items()):
        parts = [f"{counts[kind]} {title}" for kind, title in TITLES.items() if counts[kind]]
        print(f"{campaign}: {', '.join(parts)} so far")
    total = sum(by_campaign.values(), Counter())
    for kind, title in TITLES.items():
        print(f"{total[kind]} {title}")


if __name__ == "__main__":
    commands = {"next": next_seed, "add": add, "table": table, "sum": print_sum}
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    commands[sys.argv[1]](*sys.argv[2:])

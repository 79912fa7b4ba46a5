"""Keeps docs/reliability.json: what was tried at random, by commit and range of seeds.

    reliability.py next CAMPAIGN                                  the first seed never used
    reliability.py add CAMPAIGN COMMIT SEED COUNT IMAGES SECONDS  adds a finished range
    reliability.py sum                                            prints the sums
"""

import json
import os
import sys
from collections import Counter

PATH = os.path.join(os.path.dirname(__file__), "..", "..", "docs", "reliability.json")
# Seeds below this belong to `tools/check`, which uses the same ones each time.
FIRST_SEED = 1_000_000


def load():
    if not os.path.exists(PATH):
        return []
    with open(PATH) as file:
        return json.load(file)


def save(entries):
    with open(PATH + ".new", "w") as file:
        json.dump(entries, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(PATH + ".new", PATH)


def next_seed(campaign):
    used = [e["last_seed"] for e in load() if e["campaign"] == campaign]
    print(max(used, default=FIRST_SEED - 1) + 1)


def add(campaign, commit, seed, count, images, seconds):
    seed, count, images, seconds = int(seed), int(count), int(images), int(seconds)
    entries = load()
    for entry in entries:
        is_same = entry["campaign"] == campaign and entry["commit"] == commit
        if is_same and entry["last_seed"] + 1 == seed:
            entry["last_seed"] += count
            entry["images"] += images
            entry["seconds"] += seconds
            break
    else:
        entries.append(
            {
                "campaign": campaign,
                "commit": commit,
                "first_seed": seed,
                "last_seed": seed + count - 1,
                "images": images,
                "seconds": seconds,
            }
        )
    save(entries)


def print_sum():
    images = Counter()
    for entry in load():
        images[entry["campaign"]] += entry["images"]
    for campaign, count in sorted(images.items()):
        print(f"{campaign}: {count} crash images so far")
    print(f"{sum(images.values())} crash images")


if __name__ == "__main__":
    commands = {"next": next_seed, "add": add, "sum": print_sum}
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    commands[sys.argv[1]](*sys.argv[2:])

"""Figures, and how they are shown."""

import json
import statistics
import sys


def say(*words, file=sys.stdout):
    print(*words, file=file, flush=True)


def median(values):
    return statistics.median(values)


class Figure:
    """One key. Without a baseline it is absolute, and `reach` is in its unit.

    `reach` is None where none was set: the figure is shown, and judged by nobody.
    """

    def __init__(self, key, ours, unit, reach, better, baseline=None, baseline_name="none",
                 cpu=(None, None)):
        self.key, self.ours, self.unit = key, ours, unit
        self.baseline, self.baseline_name = baseline, baseline_name
        self.reach, self.better, self.cpu = reach, better, cpu

    @property
    def ratio(self):
        return self.ours / self.baseline if self.baseline else None

    @property
    def is_reached(self):
        value = self.ours if self.baseline is None else self.ratio
        if value is None or self.reach is None:
            return False
        return value >= self.reach if self.better == "higher" else value <= self.reach

    def as_json(self):
        return {
            "key": self.key,
            "ours": rounded(self.ours),
            "baseline": rounded(self.baseline),
            "baseline_name": self.baseline_name,
            "ratio": rounded(self.ratio),
            "unit": self.unit,
            "reach": self.reach,
            "better": self.better,
        }

    def reach_shown(self):
        if self.reach is None:
            return "not set"
        return f"{'at least' if self.better == 'higher' else 'at most'} {self.reach}"

    def row(self):
        cpu = " / ".join("" if value is None else f"{value:.2f}" for value in self.cpu)
        return [
            self.key,
            f"{shown(self.ours)} {self.unit}",
            "" if self.baseline is None else f"{shown(self.baseline)} {self.unit}",
            self.baseline_name,
            "" if self.ratio is None else f"{self.ratio:.3f}",
            self.reach_shown(),
            "" if self.reach is None else "yes" if self.is_reached else "no",
            cpu if cpu != " / " else "",
        ]


def rounded(value):
    return None if value is None else float(f"{value:.5g}")


def shown(value):
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


class Report:
    """All figures of a run."""

    HEAD = ["key", "ours", "baseline", "baseline is", "ratio", "reach", "reached",
            "CPU s/GiB, ours / baseline"]

    def __init__(self, is_quick):
        self.is_quick = is_quick
        self.figures = []
        self.memory_mib = {}

    def add(self, figure):
        self.figures.append(figure)
        say("   " + " | ".join(part for part in figure.row() if part))

    def note_memory(self, who, mib):
        """Notes a peak; the highest of all ingest runs counts."""
        self.memory_mib[who] = max(mib, self.memory_mib.get(who, 0))
        say(f"   peak memory of the {who}: {mib:.0f} MiB")

    def print_table(self, arguments):
        say(f"\n`{' '.join(['tools/bench', *arguments])}`\n")
        if self.is_quick:
            say("**--quick: these numbers are no measurement.**\n")
        rows = [self.HEAD, *(figure.row() for figure in self.figures)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(self.HEAD))]
        rows.insert(1, ["-" * width for width in widths])
        for row in rows:
            cells = (cell.ljust(width) for cell, width in zip(row, widths))
            say("| " + " | ".join(cells) + " |")

    def write_json(self, path):
        figures = [figure.as_json() for figure in self.figures]
        if self.is_quick:
            figures = [{**figure, "is_measurement": False} for figure in figures]
        path.write_text(json.dumps(figures, indent=2) + "\n")

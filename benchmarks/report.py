"""The result of a benchmark: a table for people, and a record with command, commit and machine."""

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Report:
    """Result of a benchmark."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    results: dict[str, Any]  # all values of the table and more, in base units
    notes: Sequence[str] = ()
    faults: Sequence[str] = ()  # failures; the benchmark continues, and exits with status 1

    def __str__(self) -> str:
        lines = [self.columns, *self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.columns))]
        table = [
            f"{name:{widths[0]}}  "
            + "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
            for name, *cells in lines
        ]
        return "\n".join([self.title, "", *table, "", *self.notes, *self.faults])


def ratio(value: float, to: float) -> str:
    """A ratio for a table; empty if `to` was not measured."""
    return f"{value / to:.2f}" if to else ""


def record(name: str, report: Report) -> dict[str, Any]:
    """The results with the command, commit, machine and time of the measurement."""
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results")
    return {
        "benchmark": name,
        "measured": report.title,
        "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": None if changes is None else bool(changes),
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "system": platform.platform()},
        "python": platform.python_version(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "notes": report.notes,
        "faults": report.faults,
        "results": report.results,
    }


def _git(*arguments: str) -> str | None:
    """Output of a git command; None outside of a repository."""
    try:
        return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )

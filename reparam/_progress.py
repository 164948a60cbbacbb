"""Progress bar: one line on stderr."""

import sys
import time
from types import TracebackType

REDRAW = 0.1  # seconds between two updates of the bar


class Progress:
    """Shows rows, rows per second and the remaining time.

    total: number of rows in all.
    shown: show the bar; None for a bar only if stderr is a terminal.
    done: number of rows so far.
    """

    def __init__(self, total: int, shown: bool | None) -> None:
        self.total = total
        self.shown = sys.stderr.isatty() if shown is None else shown
        self.done = 0

    def __enter__(self) -> "Progress":
        self.began = self.drawn = time.monotonic()
        return self

    def advance(self, rows: int) -> None:
        """Add rows, and redraw the bar if due."""
        self.done += rows
        now = time.monotonic()
        if self.shown and (now - self.drawn >= REDRAW or self.done == self.total):
            self.drawn = now
            sys.stderr.write(f"\r{self.line(now - self.began):<78}")
            sys.stderr.flush()

    def line(self, seconds: float) -> str:
        """Write the bar as text.

        seconds: time since the start.
        """
        rate = self.done / max(seconds, 1e-9)
        minutes, left = divmod(round((self.total - self.done) / max(rate, 1e-9)), 60)
        share = self.done / self.total
        bar = "#" * round(10 * share)
        return (
            f"[{bar:<10}] {share:4.0%}  {self.done:,} of {self.total:,} rows  {rate:,.0f}/s  {minutes}:{left:02} left"
        )

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.shown and self.done:
            sys.stderr.write("\n")

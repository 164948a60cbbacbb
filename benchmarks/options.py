"""What every benchmark can be told."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    only: list[str]  # names of servers
    seconds: int  # of each measured point
    rounds: int
    rows: int | None  # of the large requests, where there are some

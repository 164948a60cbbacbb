"""Options of every benchmark."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """Options of every benchmark."""

    only: list[str]  # names of servers
    seconds: int  # of each measured point
    rounds: int
    rows: int | None  # rows of the large requests, in benchmarks with large requests

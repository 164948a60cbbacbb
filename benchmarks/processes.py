"""Servers as processes: started, measured through /proc, and stopped with all their children."""

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
TICKS = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGESIZE")


@contextmanager
def running(
    command: list[str], environment: Mapping[str, str], cwd: Path, log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command while the block runs. All descendants end with the block."""
    _adopt_orphans()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(command, env={**os.environ, **environment}, cwd=cwd, stdout=output, stderr=output)
    try:
        yield process
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        _kill_all_below()


def below(parent: int) -> list[int]:
    """A process and all its descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found = [parent]
    for pid in found:  # grows during the loop
        found += children.get(pid, [])
    return found


def cpu_seconds(pids: list[int]) -> float:
    """CPU time of the processes so far, user and system, in seconds."""
    return sum(int(fields[11]) + int(fields[12]) for pid in pids if (fields := _stat(pid))) / TICKS


def scheduled_seconds(pids: list[int]) -> float:
    """CPU time of the processes' current threads by the scheduler's clock, in seconds.

    Ticks are too coarse for programs running for microseconds at a time.
    """
    spent = 0
    for pid in pids:
        for thread in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            with suppress(FileNotFoundError, ProcessLookupError):
                spent += int(thread.read_text().split()[0])
    return spent / 1e9


def busy_seconds() -> float:
    """CPU time of all cores so far, in seconds, with time stolen by the hypervisor."""
    user, nice, system, _idle, _waiting, *others = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    return sum(map(int, (user, nice, system, *others))) / TICKS


def resident_bytes(pids: list[int]) -> int:
    """Resident memory of the processes; shared pages count for each process."""
    return sum(int(fields[21]) * PAGE for pid in pids if (fields := _stat(pid)))


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on: index i is field i + 3 of proc(5). Empty if the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _adopt_orphans() -> None:
    """Make orphans of servers children of this process: LitServe and Ray leave orphans."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def _kill_all_below() -> None:
    while orphans := below(os.getpid())[1:]:
        for pid in orphans:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
        time.sleep(0.05)

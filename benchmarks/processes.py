"""Servers as processes: started, watched through /proc, and stopped with everything they started."""

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
    """Run a command as long as the block lasts. Nothing it started outlives the block."""
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
    """A process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found = [parent]
    for pid in found:  # grows while it is walked
        found += children.get(pid, [])
    return found


def cpu_seconds(pids: list[int]) -> float:
    """CPU time these processes have used so far, user and system."""
    return sum(int(fields[11]) + int(fields[12]) for pid in pids if (fields := _stat(pid))) / TICKS


def scheduled_seconds(pids: list[int]) -> float:
    """The same of the threads they have now, by the scheduler's clock: of what runs for microseconds at a time, ticks
    tell too much or nothing."""
    spent = 0
    for pid in pids:
        for thread in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            with suppress(FileNotFoundError, ProcessLookupError):
                spent += int(thread.read_text().split()[0])
    return spent / 1e9


def busy_seconds() -> float:
    """CPU time that all cores together have spent so far, on anything, or were kept from spending by the hypervisor."""
    user, nice, system, _idle, _waiting, *others = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    return sum(map(int, (user, nice, system, *others))) / TICKS


def resident_bytes(pids: list[int]) -> int:
    """Memory these processes hold now; pages they share count for each."""
    return sum(int(fields[21]) * PAGE for pid in pids if (fields := _stat(pid)))


def _stat(pid: int) -> list[str]:
    """/proc/PID/stat from the state on, so that index i is field i + 3 of proc(5); empty if the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _adopt_orphans() -> None:
    """What a server starts and leaves behind becomes a child of this process: LitServe and Ray leave some."""
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

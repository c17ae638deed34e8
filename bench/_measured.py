"""A command run in a fresh process: how long it took, and what it and its children held, stage by stage."""

import os
import re
import subprocess
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STAGE = re.compile(r"^\s*\d+ s  (.+) \.\.\.$")
"""A line in which `memfit fit` says what it does next."""
SECONDS_BETWEEN = 0.02


@dataclass(kw_only=True)
class Stage:
    """A part of a run."""

    started: float
    cpu_started: float = 0.0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    """Of processors, the children's too: what runs beside does not add to it, as it does to `seconds`."""
    peak_nbytes: int = 0

    def end(self, cpu_seconds: float) -> None:
        """The stage has ended, when so many processor seconds had been taken in all."""
        self.seconds = time.perf_counter() - self.started
        self.cpu_seconds = cpu_seconds - self.cpu_started


@dataclass(kw_only=True)
class Ran:
    """What came of a command."""

    code: int
    wall_seconds: float
    stages: Mapping[str, Stage]
    lines: list[str] = field(repr=False)
    """What it wrote, both streams."""

    @property
    def peak_nbytes(self) -> int:
        """The most that was resident."""
        return max(stage.peak_nbytes for stage in self.stages.values())

    @property
    def cpu_seconds(self) -> float:
        """Of processors, from its first stage to its end."""
        return sum(stage.cpu_seconds for stage in self.stages.values())


def run(words: list[str], *, cwd: Path, env: Mapping[str, str] | None = None) -> Ran:
    """Run a command to its end; what it holds is looked at 50 times a second."""
    started, before = time.perf_counter(), _of_ended_children()
    stages, lines = {"start": Stage(started=started)}, []
    process = subprocess.Popen(
        words, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            if found := STAGE.match(lines[-1]):
                now = cpu_seconds(process.pid)
                next(reversed(stages.values())).end(now)
                stages[found[1]] = Stage(started=time.perf_counter(), cpu_started=now)

    reader = threading.Thread(target=read)
    reader.start()
    while process.poll() is None:
        last = next(reversed(stages.values()))
        last.peak_nbytes = max(last.peak_nbytes, resident_nbytes(process.pid))
        time.sleep(SECONDS_BETWEEN)
    reader.join()
    next(reversed(stages.values())).end(_of_ended_children() - before)
    wall_seconds = time.perf_counter() - started
    return Ran(code=process.returncode, wall_seconds=wall_seconds, stages=stages, lines=lines)


def resident_nbytes(pid: int) -> int:
    """Private bytes of a process and its children, and once the pages of files that they share."""
    anonymous, files = 0, [0]
    for one in tree(pid):
        with suppress(OSError):  # it may have ended meanwhile
            found: dict[str, Any] = dict(
                line.split(":", 1) for line in Path(f"/proc/{one}/status").read_text().splitlines() if ":" in line
            )
            if "RssAnon" in found:
                anonymous += int(found["RssAnon"].split()[0]) * 1024
                files.append(int(found["RssFile"].split()[0]) * 1024)
    return anonymous + max(files)


def cpu_seconds(pid: int) -> float:
    """Processor seconds of a process and all below it, of those that have ended too (proc(5), fields 14 to 17)."""
    ticks = 0
    for one in tree(pid):
        with suppress(OSError):
            ticks += sum(map(int, Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def _of_ended_children() -> float:
    """Processor seconds of this process's children that have ended, and of theirs."""
    times = os.times()
    return times.children_user + times.children_system


def tree(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    with suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            for child in (thread / "children").read_text().split():
                found += tree(int(child))
    return found

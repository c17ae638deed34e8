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
    """Private bytes of a process and its children, and once the pages that they share: of files those of the process
    that has most, and of what was copied by fork(2) to each its part (`Pss_Anon`, proc(5))."""
    anonymous, files = [], [0]
    processes = tree(pid)
    for one in processes:
        with suppress(OSError):  # it may have ended meanwhile
            found = _table(Path(f"/proc/{one}/status"))
            if "RssAnon" in found:
                private = _table(Path(f"/proc/{one}/smaps_rollup"))["Pss_Anon"] if len(processes) > 1 else None
                anonymous.append(found["RssAnon"] if private is None else private)
                files.append(found["RssFile"])
    return sum(anonymous) + max(files)


def _table(file: Path) -> dict[str, int]:
    """The lines `name: number kB` of a file of /proc, in bytes."""
    lines = (line.split() for line in file.read_text().splitlines())
    return {line[0].removesuffix(":"): int(line[1]) * 1024 for line in lines if line[-1:] == ["kB"]}


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

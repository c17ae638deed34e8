"""A command run in a fresh process: how long it took, and what it and its children held, stage by stage."""

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
    seconds: float = 0.0
    peak_nbytes: int = 0


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


def run(words: list[str], *, cwd: Path, env: Mapping[str, str] | None = None) -> Ran:
    """Run a command to its end; what it holds is looked at 50 times a second."""
    started = time.perf_counter()
    stages, lines = {"start": Stage(started=started)}, []
    process = subprocess.Popen(
        words, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            if found := STAGE.match(lines[-1]):
                now = time.perf_counter()
                last = next(reversed(stages.values()))
                last.seconds = now - last.started
                stages[found[1]] = Stage(started=now)

    reader = threading.Thread(target=read)
    reader.start()
    while process.poll() is None:
        last = next(reversed(stages.values()))
        last.peak_nbytes = max(last.peak_nbytes, resident_nbytes(process.pid))
        time.sleep(SECONDS_BETWEEN)
    reader.join()
    ended = time.perf_counter()
    last = next(reversed(stages.values()))
    last.seconds = ended - last.started
    return Ran(code=process.returncode, wall_seconds=ended - started, stages=stages, lines=lines)


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


def tree(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    with suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            for child in (thread / "children").read_text().split():
                found += tree(int(child))
    return found

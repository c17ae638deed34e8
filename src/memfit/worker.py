"""What runs in a process of its own: jobs in, as JSON, a line each, on stdin; their answers out, as JSON, on stdout.

It is fresh, or a copy of a fresh one: its resident size is explained by the job, and a limit cannot hurt the caller.
Calibrating, choosing integers and writing them share a process, but for calibrating within a cap: to begin one takes
longer than each takes of a small model. The first of them within a cap goes on in the process that was asked what it
holds idle.
"""

import atexit
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any, TextIO, TypeVar

from memfit.account.meter import trim
from memfit.copies import Copied, aside, end_with, may_be_copied
from memfit.errors import BrokenInput, Interrupted, MemfitError, OverBudget, UsageError, disk_full
from memfit.jobs import JOBS
from memfit.limits import runtime_nbytes_of
from memfit_command import QUIET, is_quiet

_ANSWER = "memfit-answer:"
_Given = TypeVar("_Given")
Begun = Copied | subprocess.Popen[str]
"""A process with pipes to its stdin and from its stdout."""


class Process:
    """A process that does jobs, one after the other. It begins with the first; ended, another begins with the next.

    What a job has held goes back to the system before the next begins; code that oneDNN has made stays. It may be a
    copy of this process, which shares with it what libraries hold.
    """

    def __init__(self, *, copied: bool = False) -> None:
        """copied: whether it is a copy, if this process is one whose memory may be measured and has no other threads.
        It holds what this one holds, so ask for it before anything is planned; the first begins now."""
        self._made: Begun | None = None
        self._errors: Any = None
        self._copied = copied and is_quiet() and may_be_copied()
        if self._copied:
            self._begin()

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None and self._made is not None:
            self._made.kill()
        self.end()

    def answer(self, job: dict[str, Any]) -> dict[str, Any] | None:
        """What it answers to a job; None if it has ended instead (see `last_words`)."""
        made = self._made or self._begin()
        assert made.stdin is not None and made.stdout is not None, "both are pipes"
        with suppress(BrokenPipeError):  # it has ended: its last words say how
            made.stdin.write(json.dumps(job) + "\n")
            made.stdin.flush()
        for line in made.stdout:
            if line.startswith(_ANSWER):
                found: dict[str, Any] = json.loads(line.removeprefix(_ANSWER))
                return found
        return None

    def aside(self, does: Callable[[], _Given]) -> _Given:
        """What `does` gives. Where the first job's process is a copy, another does it (`copies.aside`): what planning
        leaves, up to 80 MiB, would else stand beside the jobs."""
        return aside(does) if self._copies else does()

    def begin_anew(self) -> None:
        """Let those that begin from now on be no copies: this process plans, and they would hold what that leaves."""
        self._copied = False

    def last_words(self) -> tuple[int, str]:
        """Its exit code, once it has ended, and the end of what it said on stderr."""
        assert self._made is not None
        code = self._made.wait()
        self._errors.seek(0)
        return code, self._errors.read()[-2000:]

    def end(self) -> None:
        """Let it end, and wait for that."""
        if self._made is None:
            return
        with suppress(BrokenPipeError):
            self._made.__exit__(None, None, None)  # closes the pipes, which ends it, and waits
        self._errors.close()
        self._made = None

    def _begin(self) -> Begun:
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (`end` closes it)
        self._made = made = Copied(main, errors=self._errors) if self._copies else _anew(self._errors)
        return made

    @property
    def _copies(self) -> bool:
        return self._copied and may_be_copied()


def _anew(errors: TextIO) -> Begun:
    """A process that brings libraries in itself."""
    return subprocess.Popen(
        [sys.executable, "-c", f"from memfit.worker import main; main({os.getpid()})"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=os.environ | QUIET,
    )  # fmt: skip


def run_job(
    job: dict[str, Any], *, enforce_nbytes: int | None = None, kernels: int = 0, process: Process | None = None
) -> dict[str, Any]:
    """Run `job` in a process of its own and return its answer.

    Args:
        job: `{"do": name, ...}`, the name one of this file's `JOBS`.
        enforce_nbytes: the most memory the job may take beyond its runtime; more is refused by the system.
        kernels: shapes of 16-bit products that it runs, by its account; their code belongs to the runtime.
        process: which does it; None: a fresh one, that ends with it.

    Raises:
        MemfitError: what the job raised, by its class and message.
        OverBudget: the enforced limit was hit.
    """
    if enforce_nbytes is not None:
        job = job | {"enforce_nbytes": enforce_nbytes, "runtime_nbytes": runtime_nbytes_of(kernels)}
    trim()  # what this process had for a tokenizer or a dry run, hundreds of MiB, is not to wait beside the job
    with Process() if process is None else nullcontext(process) as doing:
        answer = doing.answer(job)
        if answer is None:
            code, said = doing.last_words()
            capped = enforce_nbytes if enforce_nbytes is not None else job.get("ram_nbytes")
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            limit = "" if capped is None else f" under a hard limit of {capped} bytes"
            kind = MemfitError if capped is None else OverBudget
            raise kind(f"the job {job['do']!r} ended with {how}{limit}.\n{said}")
    if "error" in answer:
        raise _ERRORS.get(answer["error"], MemfitError)(answer["message"])
    return answer


_ERRORS: dict[str, type[MemfitError]] = {
    kind.__name__: kind for kind in (BrokenInput, Interrupted, OverBudget, UsageError, MemfitError)
}


def main(parent: int | None = None) -> None:
    """Read a job, do it, print the answer, until there are no more, or `parent`, the process that asks, has ended."""
    if parent is not None:
        end_with(parent)
    gc.collect()
    gc.freeze()  # the libraries' own objects stay: no later collection needs to look through them
    end_without_collection()
    for line in sys.stdin:
        print(_ANSWER + json.dumps(_answer_to(json.loads(line))), flush=True)


def end_without_collection() -> None:
    """Let this process end without looking through all objects of all libraries for rings, which takes seconds and
    gives nothing back that its end does not."""
    atexit.register(gc.freeze)


def _answer_to(job: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any]
    try:
        answer = JOBS[job["do"]](job)
    except MemfitError as error:
        known = next(name for name, kind in _ERRORS.items() if isinstance(error, kind))
        answer = {"error": known, "message": str(error)}
    except (MemoryError, RuntimeError) as error:
        from memfit.technique.checkpoint import is_out_of_memory

        limit = job.get("enforce_nbytes", job.get("ram_nbytes"))
        if limit is None or not is_out_of_memory(error):
            raise
        option = "--enforce" if "enforce_nbytes" in job else "--ram"
        message = (
            f"the job {job['do']!r} needed more than was predicted, and than the enforced {limit} bytes. Give more, or "
            f"leave {option} out. It ended with: {error}"
        )
        answer = {"error": "OverBudget", "message": message}
    except OSError as error:
        fits = job["do"] in ("calibrate", "choose", "compress")
        place = error.filename or job.get("output") or job.get("target") or job.get("work", "")
        clear = disk_full(error, place, kept=fits)
        if clear is None:
            raise
        answer = {"error": "Interrupted" if fits else "MemfitError", "message": str(clear)}
    return answer

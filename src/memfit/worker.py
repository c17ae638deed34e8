"""What runs in a process of its own: one job in, as JSON on stdin; one answer out, as JSON on stdout.

A fresh process has a resident size that only the job explains, and a limit on it cannot hurt the caller.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
from typing import Any, Final

from memfit.errors import BrokenInput, Interrupted, MemfitError, OverBudget, UsageError, disk_full
from memfit.jobs import JOBS
from memfit.limits import runtime_nbytes_of

QUIET: Final = {
    # A thread that waits sleeps: where another process wants the core too, spinning at every barrier made the
    # decode of a small model 90 times slower.
    "OMP_WAIT_POLICY": "passive",
    # Blocks from 1 MiB come from the system and go back to it, so that resident follows allocated.
    "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 20),
    "MALLOC_ARENA_MAX": "2",
    # Small chunks that wait in caches lie between holes that would be one: a tenth more was resident, and chance.
    "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
_ANSWER = "memfit-answer:"
_PR_SET_PDEATHSIG: Final = 1


def run_job(job: dict[str, Any], *, enforce_nbytes: int | None = None, kernels: int = 0) -> dict[str, Any]:
    """Run `job` in a fresh process and return its answer.

    Args:
        job: `{"do": name, ...}`, the name one of this file's `JOBS`.
        enforce_nbytes: the most memory the job may take beyond its runtime; more is refused by the system.
        kernels: shapes of 16-bit products that it runs, by its account; their code belongs to the runtime.

    Raises:
        MemfitError: what the job raised, by its class and message.
        OverBudget: the enforced limit was hit.
    """
    job = job | {"parent": os.getpid()}
    if enforce_nbytes is not None:
        job = job | {"enforce_nbytes": enforce_nbytes, "runtime_nbytes": runtime_nbytes_of(kernels)}
    done = subprocess.run(
        [sys.executable, "-c", "from memfit.worker import main; main()"],
        input=json.dumps(job),
        text=True,
        capture_output=True,
        env=os.environ | QUIET,
        check=False,
    )
    capped = enforce_nbytes if enforce_nbytes is not None else job.get("ram_nbytes")
    for line in done.stdout.splitlines():
        if line.startswith(_ANSWER):
            answer: dict[str, Any] = json.loads(line.removeprefix(_ANSWER))
            if "error" not in answer:
                return answer
            raise _ERRORS.get(answer["error"], MemfitError)(answer["message"])
    how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
    limit = "" if capped is None else f" under a hard limit of {capped} bytes"
    kind = MemfitError if capped is None else OverBudget
    raise kind(f"the job {job['do']!r} ended with {how}{limit}.\n{done.stderr[-2000:]}")


_ERRORS: dict[str, type[MemfitError]] = {
    kind.__name__: kind for kind in (BrokenInput, Interrupted, OverBudget, UsageError, MemfitError)
}


def main() -> None:
    """Read the job, do it, print the answer."""
    job = json.loads(sys.stdin.read())
    _end_with(job.get("parent", os.getppid()))
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
        answer = {"error": "OverBudget", "message": f"the job needed more than the enforced {limit} bytes: {error}"}
    except OSError as error:
        clear = disk_full(error, error.filename or job.get("output") or job.get("target") or job.get("work", ""))
        if clear is None:
            raise
        fits = job["do"] in ("calibrate", "choose", "compress")
        kept = " What is done is kept beside it: run the same command again." if fits else ""
        answer = {"error": "Interrupted" if fits else "MemfitError", "message": f"{clear}{kept}"}
    print(_ANSWER + json.dumps(answer), flush=True)


def _end_with(parent: int) -> None:
    """Let the system kill this process when `parent` ends, however that ends (prctl(2), PR_SET_PDEATHSIG): the same
    command, run again, is not to meet a job that still writes."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)

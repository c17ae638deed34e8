"""What runs in a process of its own: one job in, as JSON on stdin; one answer out, as JSON on stdout.

A fresh process has a resident size that only the job explains, and a limit on it cannot hurt the caller.
"""

import json
import os
import resource
import subprocess
import sys
from dataclasses import replace
from typing import Any

from memfit.errors import BrokenInput, MemfitError, OverBudget, UsageError

_QUIET = {
    # Blocks from 1 MiB come from the system and go back to it, so that resident follows allocated.
    "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 20),
    "MALLOC_ARENA_MAX": "2",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
_ANSWER = "memfit-answer:"


def run_job(job: dict[str, Any], *, enforce_nbytes: int | None = None) -> dict[str, Any]:
    """Run `job` in a fresh process and return its answer.

    Args:
        job: `{"do": name, ...}`, the name one of this file's `JOBS`.
        enforce_nbytes: the most memory the job may take beyond its runtime; more is refused by the system.

    Raises:
        MemfitError: what the job raised, by its class and message.
        OverBudget: the enforced limit was hit.
    """
    if enforce_nbytes is not None:
        job = job | {"enforce_nbytes": enforce_nbytes}
    done = subprocess.run(
        [sys.executable, "-m", "memfit.worker"],
        input=json.dumps(job),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | _QUIET,
        check=False,
    )
    for line in done.stdout.splitlines():
        if line.startswith(_ANSWER):
            answer: dict[str, Any] = json.loads(line.removeprefix(_ANSWER))
            if "error" not in answer:
                return answer
            raise _ERRORS.get(answer["error"], MemfitError)(answer["message"])
    how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
    limit = "" if enforce_nbytes is None else f" under a hard limit of {enforce_nbytes} bytes"
    kind = MemfitError if enforce_nbytes is None else OverBudget
    raise kind(f"the job {job['do']!r} ended with {how}{limit}.\n{done.stderr[-2000:]}")


_ERRORS: dict[str, type[MemfitError]] = {
    kind.__name__: kind for kind in (BrokenInput, OverBudget, UsageError, MemfitError)
}


def main() -> None:
    """Read the job, do it, print the answer."""
    job = json.loads(sys.stdin.read())
    answer: dict[str, Any]
    try:
        answer = JOBS[job["do"]](job)
    except MemfitError as error:
        known = next(name for name, kind in _ERRORS.items() if isinstance(error, kind))
        answer = {"error": known, "message": str(error)}
    except (MemoryError, RuntimeError) as error:
        if "enforce_nbytes" not in job or not _is_out_of_memory(error):
            raise
        answer = {
            "error": "OverBudget",
            "message": f"the task needed more than the enforced {job['enforce_nbytes']} bytes: {error}",
        }
    print(_ANSWER + json.dumps(answer), flush=True)


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or "allocate" in str(error) or "memory" in str(error)


def limit_from_now(nbytes: int) -> None:
    """Let this process take at most `nbytes` of private memory more than it has (setrlimit(2), RLIMIT_DATA)."""
    with open("/proc/self/status", encoding="ascii") as status:
        data = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (data + nbytes, data + nbytes))


def _measure(job: dict[str, Any]) -> dict[str, Any]:
    """Run a task twice: once for the resident peak and the speed, once for the allocator's events."""
    import torch

    from memfit.account.dry_run import hold_model
    from memfit.account.meter import Meter, reset_resident_peak, resident_nbytes
    from memfit.account.watch import Unwatched
    from memfit.models import load_model, loader_for
    from memfit.task.infer import Infer

    torch.manual_seed(0)
    if job.get("threads"):
        torch.set_num_threads(job["threads"])
    task = Infer(**job["task"])
    source = loader_for(job["model"])
    torch.ones(64, 64).matmul(torch.ones(64, 64))  # starts the thread pool, which is no part of the model
    reset_resident_peak()
    if "enforce_nbytes" in job:
        limit_from_now(job["enforce_nbytes"])
    model = load_model(source, dtype=job.get("dtype"))
    loaded = resident_nbytes()
    task.run(model, Unwatched())
    resident = resident_nbytes()
    del model
    reset_resident_peak()
    meter = Meter()
    with meter.phase("load"):
        model = load_model(source, dtype=job.get("dtype"))
        hold_model(model, meter)
    task.run(model, meter)
    account = replace(
        meter.account(),
        resident_nbytes=resident["peak"],
        file_backed_nbytes=resident["file"],
    )
    return {"account": account.to_json(), "resident": resident, "resident_after_load": loaded}


JOBS = {"measure": _measure}

if __name__ == "__main__":
    main()

"""What runs in a process of its own: one job in, as JSON on stdin; one answer out, as JSON on stdout.

A fresh process has a resident size that only the job explains, and a limit on it cannot hurt the caller.
"""

import ctypes
import errno
import json
import os
import resource
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from memfit.errors import BrokenInput, Interrupted, MemfitError, OverBudget, UsageError

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
RUNTIME_NBYTES: Final = 48 << 20
"""What the runtime may take beside the allocator under a hard limit: buffers of threads, holes in the heap."""
KERNEL_NBYTES: Final = 1 << 20
"""And more for each shape of a 16-bit product: the code that oneDNN makes for it. 0.7 MiB were measured."""


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


def runtime_nbytes_of(kernels: int) -> int:
    """What the runtime may take beside the allocator under a limit: its buffers, and code for each of `kernels`."""
    return RUNTIME_NBYTES + kernels * KERNEL_NBYTES


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
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = job.get("output") or job.get("target") or job.get("work", "")
        fits = job["do"] in ("calibrate", "choose", "compress")
        kept = " What is done is kept beside it: run the same command again." if fits else ""
        answer = {
            "error": "Interrupted" if fits else "MemfitError",
            "message": f"{where}: the disk is full. Free some space. The output is untouched.{kept}",
        }
    print(_ANSWER + json.dumps(answer), flush=True)


def _end_with(parent: int) -> None:
    """Let the system kill this process when `parent` ends, however that ends (prctl(2), PR_SET_PDEATHSIG): the same
    command, run again, is not to meet a job that still writes."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


@contextmanager
def limited(nbytes: int | None, *, runtime_nbytes: int = RUNTIME_NBYTES) -> Iterator[None]:
    """Inside, this process may take at most `nbytes` of private memory more than it has, and the runtime's
    own growth (setrlimit(2), RLIMIT_DATA); None: as much as it likes."""
    if nbytes is None:
        yield
        return
    with open("/proc/self/status", encoding="ascii") as status:
        data = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (data + nbytes + runtime_nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


@contextmanager
def within(job: dict[str, Any]) -> Iterator[None]:
    """Inside, this process may become resident with the job's `ram_nbytes` at the most: what it may take more of
    private memory is that less what is resident now (setrlimit(2), RLIMIT_DATA). Without that, as much as it likes."""
    if "ram_nbytes" not in job:
        yield
        return
    from memfit.account.meter import resident_nbytes

    _warm(job)
    with limited(max(0, job["ram_nbytes"] - resident_nbytes()["now"]), runtime_nbytes=0):
        yield


def _warm(job: dict[str, Any]) -> None:
    """Bring in what every job of fitting brings in: the model's classes, libraries' code and buffers."""
    import torch

    from memfit.account.meter import trim
    from memfit.calibrate.stream import Streamed
    from memfit.compensate import compensate  # noqa: F401
    from memfit.source.source import open_source
    from memfit.technique.gptq import Factor, corrected, factor

    Streamed(open_source(job["model"]))
    x = torch.randn(512, 1024)
    made: Factor = factor(x.t() @ x, overwrite=True)
    corrected(x, x.clone(), made)
    for dtype in (torch.float32, torch.bfloat16):
        q = torch.ones(1, 4, 256, 64, dtype=dtype)
        torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        x.to(dtype).matmul(torch.ones(1024, 1024, dtype=dtype))
    del x, made, q
    trim()


def _watch(job: dict[str, Any]) -> Any:
    """A meter; under a cap none, as its records of every allocation would be most of what is resident."""
    from memfit.account.meter import Meter
    from memfit.account.watch import Unwatched

    return Unwatched() if "ram_nbytes" in job else Meter()


def _seen(watch: Any) -> dict[str, Any]:
    """What a job of fitting took: the account, if there was a meter, and the process's resident bytes."""
    from memfit.account.meter import Meter, resident_nbytes

    resident = resident_nbytes()
    if not isinstance(watch, Meter):
        return {"account": None, "resident": resident}
    return {"account": replace(watch.account(), resident_nbytes=resident["peak"]).to_json(), "resident": resident}


def _idle(job: dict[str, Any]) -> dict[str, Any]:
    """What a job of fitting holds before it begins, and what each shape of a product adds."""
    from memfit.account.meter import resident_nbytes

    _prepare(job)
    _warm(job)
    return resident_nbytes() | {"kernel_nbytes": _kernel_nbytes(job)["nbytes"]}


def _prepare(job: dict[str, Any]) -> None:
    """Threads as asked, their pool started and the kernels' libraries in memory: no part of any model."""
    import torch

    torch.manual_seed(0)
    if job.get("threads"):
        torch.set_num_threads(job["threads"])
    for dtype in (torch.float32, torch.bfloat16):
        torch.ones(64, 64, dtype=dtype).matmul(torch.ones(64, 64, dtype=dtype))


def _measure(job: dict[str, Any]) -> dict[str, Any]:
    """Run a task twice: once for the resident peak, once for the allocator's events."""
    return _measured(job)[0]


def _measured(job: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    from memfit.account.dry_run import hold_model
    from memfit.account.meter import Meter, reset_resident_peak, resident_nbytes
    from memfit.account.outside import with_outside
    from memfit.account.watch import Unwatched
    from memfit.models import load_model, load_to_train, loader_for
    from memfit.task.infer import Infer
    from memfit.train.task import Train

    _prepare(job)
    told = {name: value for name, value in job["task"].items() if name != "task"}
    task = Train.from_json(told) if job["task"].get("task") == "train" else Infer(**told)
    source = loader_for(job["model"])

    def load() -> Any:
        if isinstance(task, Train):
            return load_to_train(source, task.recipe)
        return load_model(source, dtype=job.get("dtype"))

    reset_resident_peak()
    with limited(job.get("enforce_nbytes"), runtime_nbytes=job.get("runtime_nbytes", RUNTIME_NBYTES)):
        model = load()
        loaded = resident_nbytes()
        task.run(model, Unwatched())
    resident = resident_nbytes()
    del model
    reset_resident_peak()
    meter = Meter()
    with meter.phase("load"):
        model = load()
        hold_model(model, meter)
    task.run(model, meter)
    account = replace(meter.account(), file_backed_nbytes=resident["file"])
    account = with_outside(account, max(0, resident["peak"] - account.peak_nbytes))
    return {"account": account.to_json(), "resident": resident, "resident_after_load": loaded}, model


def _calibrate(job: dict[str, Any]) -> dict[str, Any]:
    """Statistics into the work directory, prices into the answer; if asked, the original's own answers."""
    from memfit.account.meter import reset_resident_peak
    from memfit.compress import calibrate, priced_by
    from memfit.plan.allowed import Allowed
    from memfit.source.source import open_source

    _prepare(job)
    source = open_source(job["model"])
    watch = _watch(job)
    with within(job):
        reset_resident_peak()
        with watch.phase("calibrate"):
            text = _windows(job)
        found = calibrate(
            source,
            None if text is None else text["calibration"],
            None if job["allowed"] is None else Allowed.from_json(job["allowed"]),
            batch=job["batch"],
            watch=watch,
        )
        seen = _seen(watch)
    if found.statistics is not None:
        found.statistics.save(Path(job["work"]) / "statistics.safetensors")
    answer: dict[str, Any] = seen | {
        "prices": [[name, scheme.to_json(), price] for (name, scheme), price in found.prices.items()],
        "kv_prices": list(found.kv_prices.items()),
        "priced_by": priced_by(source, found.statistics),
    }
    del found
    return answer | (_reference(job) if job["reference"] else {})


def _reference(job: dict[str, Any]) -> dict[str, Any]:
    """Record the original's logits on the evaluation text, and time it."""
    import torch

    from memfit.evaluate.divergence import record_logits
    from memfit.evaluate.speed import measure_speed
    from memfit.models import load_model, loader_for

    _prepare(job)
    model = load_model(loader_for(job["model"]), dtype=torch.bfloat16)
    text = _windows(job)
    if text is not None:
        record_logits(model, text["evaluation"], Path(job["work"]) / "logits")
    return {"speed": measure_speed(model, **job["task"]).to_json()}


def _choose(job: dict[str, Any]) -> dict[str, Any]:
    """Integers into the work directory, a directory a block: those that a stopped run has left are kept."""
    from memfit.account.meter import reset_resident_peak
    from memfit.calibrate.statistics import Statistics
    from memfit.compensate import Thrift
    from memfit.compress import choose_integers
    from memfit.format.integers import Integers
    from memfit.plan.plan import read_plan
    from memfit.source.source import open_source

    _prepare(job)
    work = Path(job["work"])
    source, plan = open_source(job["model"]), read_plan(work / "plan.json")
    integers, watch, file = Integers(Path(job["integers"])), _watch(job), work / "statistics.safetensors"
    thrift = Thrift(**job["thrift"]) if job.get("thrift") else None
    with within(job):
        reset_resident_peak()
        with watch.phase("compensate"):
            statistics = Statistics.read(file) if file.exists() else None
            windows = _windows(job)["calibration"]
        choose_integers(source, plan, statistics, windows, integers, watch=watch, thrift=thrift, scratch=work)
        return _seen(watch) | {"damping": integers.damping}


def _gguf(job: dict[str, Any]) -> dict[str, Any]:
    """A GGUF file, its errors weighed by the statistics in the work directory, if there are any."""
    from memfit.account.meter import Meter, reset_resident_peak, resident_nbytes
    from memfit.calibrate.statistics import Statistics
    from memfit.format.gguf import write_gguf
    from memfit.source.source import open_source

    _prepare(job)
    file, meter = Path(job["work"]) / "statistics.safetensors", Meter()
    reset_resident_peak()
    with meter.phase("write"):
        found = Statistics.read(file).moments if file.exists() else {}
        importance = {name: moments.inputs for name, moments in found.items()}
        del found
        tensors = write_gguf(
            open_source(job["model"]), Path(job["target"]), mixture=job["mixture"], importance=importance,
            overwrite=job["overwrite"],
        )  # fmt: skip
    account = replace(meter.account(), resident_nbytes=resident_nbytes()["peak"])
    kinds = Counter(tensor.kind for tensor in tensors)
    return {"account": account.to_json(), "kinds": kinds, "nbytes": sum(tensor.nbytes for tensor in tensors)}


def _compress(job: dict[str, Any]) -> dict[str, Any]:
    from memfit.account.meter import reset_resident_peak
    from memfit.calibrate.statistics import Statistics
    from memfit.compress import compress
    from memfit.format.integers import Integers
    from memfit.plan.plan import read_plan
    from memfit.source.source import open_source

    _prepare(job)
    work = Path(job["work"])
    source, plan = open_source(job["model"]), read_plan(work / "plan.json")
    file = work / "statistics.safetensors"
    watch = _watch(job)
    with within(job):
        reset_resident_peak()
        statistics = None
        with watch.phase("compress"):
            if file.exists():
                statistics = Statistics.read(file)
        integers = Integers(Path(job["integers"])) if job.get("integers") else None
        output, search = Path(job["output"]), job["search"]
        files = compress(source, plan, statistics, output, watch=watch, integers=integers, search=search)
        return _seen(watch) | {"files": files}


def _prove(job: dict[str, Any]) -> dict[str, Any]:
    """Measure a fitted model, then compare it with what the original answered, and time it."""
    from collections import Counter

    from memfit.evaluate.divergence import compare_logits
    from memfit.evaluate.speed import measure_speed
    from memfit.packed.modules import packed_modules
    from memfit.task.infer import maker_of_caches

    answer, model = _measured(job)
    text = _windows(job)
    if text is not None:
        kv_bits = job["task"].get("kv_bits", 16)
        caches = maker_of_caches(model, kv_bits=kv_bits) if kv_bits < 16 else None
        quality = compare_logits(Path(job["work"]) / "logits", model, text["evaluation"], make_cache=caches)
        answer["quality"] = quality.to_json()
    answer["speed"] = measure_speed(model, **job["task"]).to_json()
    kernels = Counter(
        child.kernel
        for module in packed_modules(model).values()
        for child in module.children()
        if getattr(child, "holds_weights", False)
    )
    answer["kernels"] = dict(sorted(kernels.items()))
    return answer


def _kernel_nbytes(job: dict[str, Any]) -> dict[str, Any]:
    """Bytes that stay for each new shape of a 16-bit product: the code that oneDNN makes for it."""
    import torch

    from memfit.account.meter import resident_nbytes

    _prepare(job)
    shapes, warm = 48, 8
    left = torch.ones(shapes + warm, 512, dtype=torch.bfloat16)
    right = torch.ones(1024, 512, dtype=torch.bfloat16).t()
    before = 0
    for rows in range(1, shapes + warm + 1):
        if rows == warm + 1:
            before = resident_nbytes()["now"]
        torch.mm(left[:rows], right)
    return {"nbytes": max(0, resident_nbytes()["now"] - before) // shapes}


def _windows(job: dict[str, Any]) -> Any:
    import torch

    file = Path(job["work"]) / "windows.pt"
    return torch.load(file, weights_only=True) if file.exists() else None


JOBS = {
    "measure": _measure,
    "calibrate": _calibrate,
    "reference": _reference,
    "choose": _choose,
    "compress": _compress,
    "gguf": _gguf,
    "idle": _idle,
    "prove": _prove,
    "kernel_nbytes": _kernel_nbytes,
}
"""What a job's `do` may be."""

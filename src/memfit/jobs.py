"""The jobs that take a model's bytes: each a function from what it is told to what it found, both as JSON.

`worker.py` runs them, each in a fresh process.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Final

from memfit.limits import RUNTIME_NBYTES, limited

_ROWS_OF_A_JOB: Final = 512
"""Tokens that products of fitting have, at least."""


@contextmanager
def within(job: dict[str, Any]) -> Iterator[None]:
    """Inside, freed blocks below the job's `waiting_nbytes` wait to be used again, and this process may become resident
    with its `ram_nbytes` at the most: what it may take more of private memory is that less what is resident now
    (setrlimit(2), RLIMIT_DATA), and the `untouched_nbytes` that are reserved and never resident. Without that, as much
    as it likes."""
    from memfit.account.meter import resident_nbytes

    with _waiting(job.get("waiting_nbytes")):
        if "ram_nbytes" not in job:
            yield
            return
        _warm(job["model"])
        free = max(0, job["ram_nbytes"] - resident_nbytes()["now"])
        with limited(free, runtime_nbytes=job.get("untouched_nbytes", 0)):
            yield


@contextmanager
def _waiting(nbytes: int | None) -> Iterator[None]:
    """Inside, freed blocks of fewer bytes wait in the heap; None, or a malloc that is not told: as before."""
    from memfit.account import malloc

    if nbytes is None or not malloc.is_told():
        yield
        return
    malloc.tell(nbytes)
    try:
        yield
    finally:
        malloc.tell(malloc.LEVELS[0])


@cache
def _warm(model: str) -> None:
    """Bring in what every job of fitting a model brings in, once: its classes, libraries' code and buffers."""
    import torch

    from memfit.account.meter import trim
    from memfit.calibrate.stream import Streamed
    from memfit.compensate import compensate  # noqa: F401
    from memfit.source.source import open_source
    from memfit.technique.gptq import Factor, corrected, factor

    Streamed(open_source(model))
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
    """What a job of fitting holds before it begins, and what each shape of a product adds, which a copy finds out."""
    from memfit.account.code import code_in_a_copy
    from memfit.account.meter import resident_nbytes

    code = code_in_a_copy(lambda: _prepare(job), rows=_ROWS_OF_A_JOB)
    _prepare(job)
    _warm(job["model"])
    return resident_nbytes() | {
        "kernel_nbytes": code.resident_nbytes, "untouched_nbytes": code.counted_nbytes - code.resident_nbytes,
    }  # fmt: skip


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
    from memfit.account.meter import CudaMeter, Meter, reset_resident_peak, resident_nbytes
    from memfit.account.outside import with_outside
    from memfit.account.watch import Unwatched
    from memfit.models import load_model, load_to_train, loader_for
    from memfit.task.infer import Infer
    from memfit.train.task import Train

    _prepare(job)
    told = {name: value for name, value in job["task"].items() if name != "task"}
    task = Train.from_json(told) if job["task"].get("task") == "train" else Infer(**told)
    source = loader_for(job["model"])

    device = job.get("device", "cpu")

    def load() -> Any:
        if isinstance(task, Train):
            return load_to_train(source, task.recipe, device=device)
        return load_model(source, dtype=job.get("dtype"), device=device)

    if device == "cuda":
        on_cuda = CudaMeter()
        with on_cuda.phase("load"):
            model = load()
            hold_model(model, on_cuda)
        task.run(model, on_cuda)
        return {"account": on_cuda.account().to_json()}, model
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
    from memfit.compress import asked_of, calibrate, priced_by
    from memfit.plan.allowed import Allowed
    from memfit.technique.smoothing import SMOOTHING

    _prepare(job)
    source = _source(job)
    watch = _watch(job)
    with within(job):
        reset_resident_peak()
        with watch.phase("calibrate"):
            text = _windows(job)
        found = calibrate(
            source,
            None if text is None else text["calibration"],
            None if job["allowed"] is None else Allowed.from_json(job["allowed"]),
            watch=watch,
            **asked_of(job),
        )
        seen = _seen(watch)
    if found.statistics is not None:
        found.statistics.save(Path(job["work"]) / "statistics.safetensors")
        found.smoothing.save(Path(job["work"]) / SMOOTHING)
    answer: dict[str, Any] = seen | {
        "prices": [[name, scheme.to_json(), price] for (name, scheme), price in found.prices.items()],
        "kv_prices": list(found.kv_prices.items()),
        "priced_by": priced_by(source, found.statistics),
        "smoothed": found.smoothing.told(),
    }
    del found
    return answer | (_reference(job) if job["reference"] else {})


def _narrow(job: dict[str, Any]) -> dict[str, Any]:
    """What stays of a model that is to be narrower, and its corrected weights, into the work directory."""
    from memfit.account.meter import reset_resident_peak
    from memfit.source.source import open_source
    from memfit.technique.narrow import Narrow
    from memfit.technique.narrowing import narrow_into

    _prepare(job)
    work, watch = Path(job["work"]), _watch(job)
    source, how = open_source(job["model"]), Narrow.from_json(job["narrow"])
    with within(job):
        reset_resident_peak()
        with watch.phase("narrow"):
            windows_WT = _windows(job)["calibration"]
        narrow_into(work, source, windows_WT, how, watch=watch, batch=job["batch"], spill=job["spill"])
        return _seen(watch)


def _source(job: dict[str, Any]) -> Any:
    """The model that a job of fitting is told, as narrow as an earlier job has made it."""
    from memfit.source.source import open_source
    from memfit.technique.narrowing import narrowed_in

    return narrowed_in(Path(job["work"]), open_source(job["model"]))


def _reference(job: dict[str, Any]) -> dict[str, Any]:
    """Record the original's logits on the evaluation text, and time it."""
    import torch

    from memfit.evaluate.divergence import record_logits
    from memfit.evaluate.speed import measure_speed
    from memfit.models import load_model, loader_for

    _prepare(job)
    model = load_model(loader_for(job.get("beside") or job["model"]), dtype=torch.bfloat16)
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
    from memfit.technique.attune import Attuning
    from memfit.technique.smoothing import smoothed_in
    from memfit.technique.tune import Tuning

    _prepare(job)
    work = Path(job["work"])
    source, plan = _source(job), read_plan(work / "plan.json")
    integers, watch, file = Integers(Path(job["integers"])), _watch(job), work / "statistics.safetensors"
    thrift = Thrift(**job["thrift"]) if job.get("thrift") else None
    learn: dict[str, Any] = {"tuning": Tuning, "attuning": Attuning}
    variant = {how: learn[how](**told) if how in learn else told for how, told in job.get("variant", {}).items()}
    with within(job):
        reset_resident_peak()
        with watch.phase("compensate"):
            source = smoothed_in(work, source)
            statistics = Statistics.read(file) if file.exists() else None
            windows = _windows(job)["calibration"]
        choose_integers(
            source, plan, statistics, windows, integers, watch=watch, thrift=thrift, scratch=work, **variant
        )
        return _seen(watch) | {"damping": integers.damping, "attuned": integers.attuned}


def _gguf(job: dict[str, Any]) -> dict[str, Any]:
    """A GGUF file, its errors weighed by the statistics in the work directory, if there are any."""
    from memfit.account.meter import Meter, reset_resident_peak
    from memfit.calibrate.statistics import Statistics
    from memfit.format.gguf import write_gguf
    from memfit.source.source import open_source

    _prepare(job)
    file, meter = Path(job["work"]) / "statistics.safetensors", Meter()
    reset_resident_peak()
    with meter.phase("read"):
        found = Statistics.read(file).moments if file.exists() else {}
        importance = {name: moments.inputs for name, moments in found.items()}
        del found
        text = _windows(job)
    tensors = write_gguf(
        open_source(job["model"]), Path(job["target"]), mixture=job["mixture"], importance=importance,
        windows_WT=None if text is None else text["calibration"], watch=meter, overwrite=job["overwrite"],
    )  # fmt: skip
    kinds = Counter(tensor.kind for tensor in tensors)
    return {"account": _seen(meter)["account"], "kinds": kinds, "nbytes": sum(tensor.nbytes for tensor in tensors)}


def _onnx(job: dict[str, Any]) -> dict[str, Any]:
    """A fitted directory as ONNX, into another one."""
    from dataclasses import asdict

    from memfit.account.meter import Meter, reset_resident_peak
    from memfit.format.onnx import write_onnx
    from memfit.source.source import open_source

    _prepare(job)
    meter = Meter()
    reset_resident_peak()
    made = write_onnx(open_source(job["model"]), Path(job["target"]), watch=meter)
    return {"account": _seen(meter)["account"], "written": asdict(made)}


def _onnx_proof(job: dict[str, Any]) -> dict[str, Any]:
    """What ONNX Runtime makes of a file beside memfit's own answers in float32, and what that takes."""
    import torch

    from memfit.evaluate.onnx_proof import compare_with_file, float32_answers, measure_file
    from memfit.models import load_model, loader_for
    from memfit.packed.wide import widen

    _prepare(job)
    model = load_model(loader_for(job["model"]), dtype=torch.float32)
    widen(model)
    ids, answers = float32_answers(model, _windows(job))
    del model
    file, threads = Path(job["file"]), job["threads"] or 1
    difference = compare_with_file(file, ids, answers, threads=threads)
    del answers
    return {"difference": difference} | measure_file(file, job["task"], threads=threads)


def _compress(job: dict[str, Any]) -> dict[str, Any]:
    from memfit.account.meter import reset_resident_peak
    from memfit.calibrate.statistics import Statistics
    from memfit.compress import compress
    from memfit.format.integers import Integers
    from memfit.plan.plan import read_plan
    from memfit.technique.smoothing import smoothed_in

    _prepare(job)
    work = Path(job["work"])
    source, plan = _source(job), read_plan(work / "plan.json")
    file = work / "statistics.safetensors"
    watch = _watch(job)
    with within(job):
        reset_resident_peak()
        statistics = None
        with watch.phase("compress"):
            source = smoothed_in(work, source)
            if file.exists():
                statistics = Statistics.read(file)
        integers = Integers(Path(job["integers"])) if job.get("integers") else None
        output, search = Path(job["output"]), job["search"]
        files = compress(source, plan, statistics, output, watch=watch, integers=integers, search=search)
        return _seen(watch) | {"files": files}


def _prove(job: dict[str, Any]) -> dict[str, Any]:
    """Measure a fitted model, then compare it with what the original answered, and time it."""
    from memfit.evaluate.speed import measure_speed
    from memfit.packed.modules import packed_modules

    answer, model = _measured(job)
    answer |= _judged(job, model)
    answer["speed"] = measure_speed(model, **job["task"]).to_json()
    kernels = Counter(
        child.kernel
        for module in packed_modules(model).values()
        for child in module.children()
        if getattr(child, "holds_weights", False)
    )
    answer["kernels"] = dict(sorted(kernels.items()))
    return answer


def _judge(job: dict[str, Any]) -> dict[str, Any]:
    """Compare a fitted model with what the original answered."""
    from memfit.models import load_model, loader_for

    _prepare(job)
    return _judged(job, load_model(loader_for(job["model"])))


def _judged(job: dict[str, Any], model: Any) -> dict[str, Any]:
    """Its quality, where there is a text and the original was asked about it."""
    from memfit.evaluate.divergence import compare_logits
    from memfit.task.infer import maker_of_caches

    text = _windows(job)
    if text is None or not job["reference"]:
        return {}
    kv_bits = job["task"].get("kv_bits", 16)
    caches = maker_of_caches(model, kv_bits=kv_bits) if kv_bits < 16 else None
    quality = compare_logits(Path(job["work"]) / "logits", model, text["evaluation"], make_cache=caches)
    return {"quality": quality.to_json()}


def _kernel_nbytes(job: dict[str, Any]) -> dict[str, Any]:
    """Bytes that stay for each new shape of a 16-bit product."""
    from memfit.account.code import code_of_products

    _prepare(job)
    return {"nbytes": code_of_products().resident_nbytes}


def _teach(job: dict[str, Any]) -> dict[str, Any]:
    """Ask a teacher of every row, and leave its answers on the disk."""
    from memfit.account.meter import reset_resident_peak, resident_nbytes
    from memfit.source.load import load
    from memfit.source.source import open_source
    from memfit.train.distil import Teacher
    from memfit.train.distil_store import Rows, record

    _prepare(job)
    rows = Rows.load(Path(job["rows"]))
    reset_resident_peak()
    with limited(job.get("enforce_nbytes"), runtime_nbytes=job.get("runtime_nbytes", RUNTIME_NBYTES)):
        record(
            Teacher(load(open_source(job["teacher"]), device=job["device"])), rows, Path(job["directory"]),
            about=job["about"], at_once=job["at_once"], top=job["top"], temperature=job["temperature"],
        )  # fmt: skip
    return {"resident": resident_nbytes()}


def _windows(job: dict[str, Any]) -> Any:
    import torch

    file = Path(job["work"]) / "windows.pt"
    return torch.load(file, weights_only=True) if file.exists() else None


JOBS = {
    "measure": _measure,
    "calibrate": _calibrate,
    "reference": _reference,
    "narrow": _narrow,
    "choose": _choose,
    "compress": _compress,
    "gguf": _gguf,
    "onnx": _onnx,
    "onnx_proof": _onnx_proof,
    "idle": _idle,
    "prove": _prove,
    "judge": _judge,
    "teach": _teach,
    "kernel_nbytes": _kernel_nbytes,
}
"""What a job's `do` may be."""

"""A model measured on a task, and judged beside another: each in fresh processes, never two in memory together."""

import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from memfit.account.account import Account
from memfit.errors import UsageError
from memfit.evaluate.quality import Quality
from memfit.evaluate.speed import Speed
from memfit.models import require_device
from memfit.source.check import check, require_weights
from memfit.source.source import open_source
from memfit.steps import job_on, proof_job
from memfit.task.infer import Infer
from memfit.text import Text, text_of, write_windows
from memfit.train.task import Train
from memfit.worker import run_job


def evaluate(
    model: str | Path,
    reference: str | Path,
    text: Text | str | Path | None = None,
    *,
    task: Infer | None = None,
    threads: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Quality of `model` beside `reference` on the second half of a text, its measured account and its speed.

    The two are never in memory together.

    Args:
        model: a fitted one, or any other.
        reference: the original.
        text: UTF-8. The demo model as reference has its own.
        task: what is measured; default: one prompt of 512 tokens and 32 new ones.
        threads: of both; default: torch's own.
        progress: told what is done next.

    Returns: `account` (an `Account`), `quality` (a `Quality`), `speed` and `speed_original` (a `Speed`
    each), `kernels`.
    """
    fitted, source = open_source(model), open_source(reference)
    for one in (fitted, source):
        check(one)
        require_weights(one, "eval")
    judged = text_of(text, source)
    if judged is None:
        raise UsageError(f"{source.name} is judged on a text, and there is none. Give one (--text FILE).")
    task = replace(task or Infer(), kv_bits=fitted.kv_bits)
    with tempfile.TemporaryDirectory(prefix="memfit-") as directory:
        work = Path(directory)
        write_windows(source, judged, work, calibrates=False)
        job = job_on(source, work, threads) | {"reference": True}
        progress("asking the reference")
        original = run_job(job | {"do": "reference", "task": asdict(replace(task, kv_bits=16))})
        progress("measuring the model")
        proof = run_job(proof_job(model, asdict(task), job))
    return {
        "account": Account.from_json(proof["account"]),
        "quality": Quality.from_json(proof["quality"]),
        "speed": Speed(**proof["speed"]),
        "speed_original": Speed(**original["speed"]),
        "kernels": proof["kernels"],
    }


def measure(
    model: str | Path, task: Infer | Train | None = None, *, threads: int | None = None, device: str = "cpu"
) -> Account:
    """The task run on the real model in a fresh process: the allocator's events, and on a CPU resident bytes.

    Args:
        model: a hub id, a directory or a `.gguf` file.
        task: `Infer` or `Train`; default: one prompt of 512 tokens and 32 new ones.
        threads: of the process; default: as here.
        device: `cpu`, or `cuda`, whose caching allocator is asked.

    Raises:
        UsageError: no CUDA device is here.
        BrokenInput: the model is unsafe or broken.
    """
    source = open_source(model)
    if isinstance(task, Train):
        told = task.to_json()
    else:
        task = task or Infer()
        told = asdict(replace(task, kv_bits=source.kv_bits) if task.kv_bits == 16 else task)
    require_device(device)
    # As many as an account made here counts with: kernels take scratch for each thread.
    threads = threads or torch.get_num_threads()
    job = {"do": "measure", "model": str(model), "task": told, "threads": threads, "device": device}
    return Account.from_json(run_job(job)["account"])

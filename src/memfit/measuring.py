"""A model measured on a task, and judged beside another: each in fresh processes, never two in memory together."""

import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from memfit.account.account import Account
from memfit.evaluate.quality import Quality
from memfit.evaluate.speed import Speed
from memfit.source.check import check
from memfit.source.source import open_source
from memfit.steps import job_on, proof_job
from memfit.task.infer import Infer
from memfit.text import Text, write_windows
from memfit.worker import run_job


def evaluate(
    model: str | Path,
    reference: str | Path,
    text: Text | str | Path,
    *,
    task: Infer | None = None,
    threads: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Quality of `model` beside `reference` on the second half of a text, its measured account and its speed.

    The two are never in memory together.

    Returns: `account` (an `Account`), `quality` (a `Quality`), `speed` and `speed_original` (a `Speed`
    each), `kernels`.
    """
    fitted, source = open_source(model), open_source(reference)
    check(fitted)
    check(source)
    task = replace(task or Infer(), kv_bits=fitted.kv_bits)
    with tempfile.TemporaryDirectory(prefix="memfit-") as directory:
        work = Path(directory)
        judged = text if isinstance(text, Text) else Text.from_file(text)
        write_windows(source, judged, work)
        job = job_on(source, work, threads)
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


def measure(model: str | Path, task: Infer | None = None, *, threads: int | None = None) -> Account:
    """The task run on the real model in a fresh process: allocator's events, resident bytes."""
    source = open_source(model)
    task = task or Infer(kv_bits=source.kv_bits)
    # As many as an account made here counts with: kernels take scratch for each thread.
    threads = threads or torch.get_num_threads()
    answer = run_job({"do": "measure", "model": str(model), "task": asdict(task), "threads": threads})
    return Account.from_json(answer["account"])

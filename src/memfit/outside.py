"""Calibrate, once a machine, what a measured process holds outside the allocator (see `account.outside`)."""

import json
import os
import platform
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from memfit.account.account import Account
from memfit.account.dry_run import TRAINING, dry_run
from memfit.account.outside import Outside
from memfit.models import load_model, loader_for
from memfit.task.infer import Infer
from memfit.train.recipe import Recipe
from memfit.train.task import Train
from memfit.worker import run_job

_MODEL: Final[dict[str, Any]] = {
    "config": {
        "model_type": "llama", "vocab_size": 4096, "hidden_size": 768, "intermediate_size": 2048,
        "num_hidden_layers": 3, "num_attention_heads": 12, "num_key_value_heads": 4, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 2048,
    }
}  # fmt: skip
"""Wide and long enough for MKL to take the most it takes of packing buffers; small enough for seconds."""
_LOOP: Final[dict[str, Any]] = {
    "config": {
        "model_type": "mamba", "vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 4, "state_size": 16,
    }
}  # fmt: skip
"""A loop over time, thousands of small blocks a layer: it leaves the most holes in the heap."""
_PLAIN: Final = {"factory": "memfit.outside:plain_model"}
_CASES: Final = (
    ("transformers", _MODEL, {"batch": 1, "prompt": 512, "new_tokens": 2}),
    ("transformers", _MODEL, {"batch": 4, "prompt": 128, "new_tokens": 2}),
    ("transformers", _LOOP, {"batch": 1, "prompt": 512, "new_tokens": 2}),
    ("torch", _PLAIN, {"batch": 1, "prompt": 512}),
)
_LEARNING: Final = (
    ("transformers", _MODEL),
    ("transformers", _LOOP),
    ("torch", {"factory": "memfit.outside:plain_language_model"}),
)
_RUNS: Final = 3
_FORMAT: Final = 7


def plain_model() -> nn.Module:
    """A model that needs torch alone."""
    width, inner = 768, 2048
    blocks = [nn.Sequential(nn.LayerNorm(width), nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))]
    return nn.Sequential(nn.Embedding(4096, width), *blocks, *blocks)


class _PlainLanguageModel(nn.Module):
    """Ids [B, T] to logits [B, T, V]."""

    def __init__(self) -> None:
        super().__init__()
        self.body = plain_model()
        self.head = nn.Linear(768, 4096)

    def forward(self, ids_BT: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(ids_BT))
        return out


def plain_language_model() -> nn.Module:
    """A model that needs torch alone, and can learn."""
    return _PlainLanguageModel()


def known_outside(*, threads: int | None = None) -> Outside | None:
    """What `outside_of_machine` has measured before; None if it has not, for so many threads."""
    known = _remembered().get(_machine_key(threads))
    return None if known is None else Outside(**known)


def outside_of_machine(
    *, threads: int | None = None, again: bool = False, progress: Callable[[str], None] = lambda _: None
) -> Outside:
    """What processes on this machine hold outside the allocator; measured on the first call, then remembered.

    Takes some five minutes, in 43 fresh processes, for each number of threads and version of the libraries.

    Args:
        threads: of the measured processes; default: torch's own.
        again: measure even if a file remembers.
        progress: told which of the processes is next.
    """
    known, key = _remembered(), _machine_key(threads)
    if again or key not in known:
        cases = list(_cases())
        count = 1 + _RUNS * len(cases)
        runs_left = iter(range(1, count + 1))

        def tell() -> None:
            progress(f"measuring this machine, once: {next(runs_left)} of {count} runs")

        tell()
        kernel = int(run_job({"do": "kernel_nbytes", "threads": threads})["nbytes"])
        runtime: dict[str, list[int]] = {}
        for library, model, task, dtype in cases:
            runs = []
            for _ in range(_RUNS):
                tell()
                runs.append(_runtime_nbytes(model, task, dtype, kernel, threads))
            runs.sort()
            # The same run differs by some MiB of holes in the heap: halfway from the usual to the most.
            found = (runs[_RUNS // 2] + runs[-1]) // 2
            name = f"{library} {str(dtype).removeprefix('torch.')}"
            runtime.setdefault(name, []).append(found)
        known[key] = {
            "runtime_nbytes": {name: _one_of(found, learns=TRAINING in name) for name, found in runtime.items()},
            "kernel_nbytes": kernel,
        }
        _remember(_cache_file(), known)
    return Outside(**known[key])


def _one_of(found: list[int], *, learns: bool) -> int:
    """Of several models' runtimes the one that is told of any: the most, as a peak must not be passed.

    Of training halfway from the least to the most. What its steps leave between the blocks of the heap differs by a
    tenth of the runtime from a few large layers to a loop over time, and most models are in between.
    """
    return (min(found) + max(found)) // 2 if learns else max(found)


def _cases() -> Iterator[tuple[str, dict[str, Any], Infer | Train, torch.dtype]]:
    """What runtime a case is of, the model, what is run on it, and the dtype of its weights."""
    for library, model, sizes in _CASES:
        for dtype in (torch.float32, torch.bfloat16):
            yield library, model, Infer(**sizes), dtype
    for library, model in _LEARNING:
        for precision in ("fp32", "master"):
            task = Train(batch=4, sequence=128, recipe=Recipe(precision=precision, chunk_nbytes=None))
            yield library + TRAINING, model, task, task.dtype


def _runtime_nbytes(
    model: dict[str, Any], task: Infer | Train, dtype: torch.dtype, kernel_nbytes: int, threads: int | None
) -> int:
    """Resident peak of a small model's run, less all that the other terms explain."""
    told_dtype = str(dtype).removeprefix("torch.")
    found = run_job(
        {"do": "measure", "model": model, "task": task.to_json(), "dtype": told_dtype, "threads": threads}
    )
    measured = Account.from_json(found["account"])
    source = loader_for(model)
    told = dry_run(lambda: load_model(source, dtype=dtype), task)
    assert measured.resident_nbytes is not None
    explained = measured.peak_nbytes + told.heap_nbytes + kernel_nbytes * told.kernels
    return measured.resident_nbytes - explained


def _machine_key(threads: int | None) -> str:
    parts = (
        _FORMAT, platform.node(), platform.machine(), torch.backends.cpu.get_cpu_capability(),
        f"{threads or torch.get_num_threads()} threads", platform.python_version(),
        *(f"{package} {version(package)}" for package in ("memfit", "torch", "transformers")),
    )  # fmt: skip
    return ", ".join(str(part) for part in parts)


def _cache_file() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "memfit" / "outside.json"


def _remembered() -> dict[str, Any]:
    try:
        known = json.loads(_cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _remember(file: Path, known: dict[str, Any]) -> None:
    """Whole or not at all; a cache directory that cannot be written costs the next call its seconds."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(known, indent=1), encoding="utf-8")
        part.replace(file)
    except OSError:
        return

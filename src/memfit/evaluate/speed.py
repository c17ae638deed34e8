"""How fast a model reads and writes: the same task that is accounted and measured, with a clock."""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memfit.account.account import Kind
from memfit.task.infer import Infer


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Tokens a second, all texts of the batch together; medians over `repeats` runs after a first one."""

    prompt_tokens_per_s: float
    decode_tokens_per_s: float | None
    """None for encoders, and for tasks without new tokens."""
    batch: int
    prompt: int
    new_tokens: int
    repeats: int
    threads: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class _Clock:
    """A watch that only times the phases."""

    may_skip, prefix = False, ""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        _wait()
        start = time.perf_counter()
        yield
        _wait()
        self.seconds[name] = time.perf_counter() - start

    def holds(self, kind: Kind, module: str, tensor: Tensor) -> None:
        return None

    def on_disk(self, tensor: Tensor) -> None:
        return None


def measure_speed(
    model: nn.Module,
    *,
    batch: int = 1,
    prompt: int = 512,
    new_tokens: int = 32,
    kv_bits: int = 16,
    repeats: int = 3,
) -> Speed:
    """Time `Infer(batch, prompt, new_tokens, kv_bits)` on `model`: prefill and decode apart, medians.

    One run before does not count: kernels choose their code and memory is mapped in it.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    task = Infer(batch=batch, prompt=prompt, new_tokens=new_tokens, kv_bits=kv_bits)
    runs: list[dict[str, float]] = []
    for _ in range(repeats + 1):
        clock = _Clock()
        task.run(model, clock)
        runs.append(clock.seconds)
    counted = runs[1:]
    decodes = all("decode" in run for run in counted)
    return Speed(
        prompt_tokens_per_s=batch * prompt / statistics.median(run["prefill"] for run in counted),
        decode_tokens_per_s=(
            batch * new_tokens / statistics.median(run["decode"] for run in counted) if decodes else None
        ),
        batch=batch,
        prompt=prompt,
        new_tokens=new_tokens if decodes else 0,
        repeats=repeats,
        threads=torch.get_num_threads(),
    )


def _wait() -> None:
    """Wait for what was launched on an accelerator; its kernels return before they are done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()

"""What lies outside the allocator: what a process holds that no storage shows, from terms that have names.

A process that runs a task is resident with

    runtime    Python, torch and, where the model is one of its, transformers; the thread pool; the buffers
               that MKL keeps for each thread; objects in the heap. Measured once a machine, by library, task and
               type of weights, and no constant: the largest of several models, for a peak is what must not be passed;
               of training, where models differ more, halfway from the least to the most
    kernels    oneDNN generates code for each shape of a 16-bit product and keeps it: so many shapes, so many
               bytes each, measured once a machine
    heap       blocks under 1 MiB leave holes in the C heap, which only shrinks from its end; larger ones are
               whole pages (see `heap`)
    allocated  what the account tells

and no more; the worst moment of heap and allocated together is searched over all of the trace.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .account import Account, Entry
from .ledger import Ledger, phase_spans


@dataclass(frozen=True, kw_only=True)
class Outside:
    """What a machine's processes hold outside the allocator."""

    runtime_nbytes: Mapping[str, int]
    """By library, whether it learns, and dtype of the weights: `transformers bfloat16`, `torch training float32`."""
    kernel_nbytes: int
    """Of each 16-bit product's shape."""

    def nbytes(self, account: Account) -> int:
        """Bytes outside the allocator while the task of `account` runs."""
        key = f"{account.runtime} {main_dtype(account)}"
        runtime = self.runtime_nbytes.get(key, max(self.runtime_nbytes.values()))
        return runtime + self.kernel_nbytes * account.kernels + account.heap_nbytes


def main_dtype(account: Account) -> str:
    """The dtype of most parameter bytes."""
    nbytes: dict[str, int] = {}
    for entry in account.entries:
        if entry.kind == "parameter":
            nbytes[entry.dtype] = nbytes.get(entry.dtype, 0) + entry.nbytes
    return max(nbytes, key=nbytes.__getitem__, default="float32")


def predict_resident(account: Account, outside: Outside) -> Account:
    """`account` with the resident peak of a fresh process, and what is outside the allocator as an entry."""
    if account.device != "cpu":
        return account
    return with_outside(account, outside.nbytes(account))


def with_outside(account: Account, nbytes: int) -> Account:
    """`account` with so many bytes outside the allocator, as an entry of its own; the process holds both."""
    entry = Entry(
        kind="outside", module="", device="cpu", dtype="", nbytes=nbytes,
        phases=tuple(phase.name for phase in account.phases),
    )  # fmt: skip
    return replace(
        account,
        outside_nbytes=nbytes,
        resident_nbytes=account.peak_nbytes + nbytes,
        entries=(*account.entries, entry),
    )


def kernel_count(ledger: Ledger) -> int:
    """Shapes of 16-bit products in the trace; of grouped ones as many as chance may well bring.

    How many tokens an expert gets is up to the data, and each number is a shape. Of T tokens that each go to k of E
    experts, an expert gets m = 0..T, μ = T k / E on average. Of all distributions with that bound and mean the one that
    presumes least is p(m) ∝ r^m, one draw for each expert and call; a number is there with 1 − ∏(1 − p(m)). What runs
    again, in a backward pass or another phase, goes to the experts that it went to before: the phase with most calls
    counts.
    """
    plain = {kernel for kernel in ledger.kernels if not isinstance(kernel[0], str)}
    phase_of = {
        number: phase
        for phase, first, last in phase_spans(ledger)
        for number, sign in ledger.events[first:last]
        if sign > 0
    }
    by_matrix: dict[tuple[Any, ...], list[tuple[list[float], int]]] = {}
    for kernel in ledger.kernels - plain:
        kind, rows, inner, columns, experts = kernel
        nbytes = 2 * columns * (rows if kind == "grouped" else experts * inner)
        calls = Counter(
            phase_of.get(number, "")
            for number, storage in enumerate(ledger.storages)
            if storage.operator == "aten::_grouped_mm" and storage.kind != "temporary" and storage.nbytes == nbytes
        )
        forward = [count for phase, count in calls.items() if not phase.endswith("backward")]
        most = max(forward or calls.values(), default=0)
        chances = _chances(rows // ledger.experts_a_token, rows / experts)
        by_matrix.setdefault((kind, inner, columns), []).append((chances, most * experts))
    expected = 0.0
    for draws in by_matrix.values():
        for tokens in range(1, max(len(chances) for chances, _ in draws)):
            expected += 1 - math.prod((1 - p[tokens]) ** count for p, count in draws if tokens < len(p))
    return len(plain) + round(expected)


def _chances(most: int, mean: float) -> list[float]:
    """p(0), p(1), ..., p(most) ∝ r^m, with r such that the mean is `mean`."""

    def made(log_r: float) -> list[float]:
        shift = max(0.0, most * log_r)
        weights = [math.exp(m * log_r - shift) for m in range(most + 1)]
        total = sum(weights)
        return [weight / total for weight in weights]

    low, high = -50.0, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        too_low = sum(m * p for m, p in enumerate(made(middle))) < mean
        low, high = (middle, high) if too_low else (low, middle)
    return made((low + high) / 2)

"""What lies outside the allocator: what a process holds that no storage shows, from terms that have names.

A process that runs a task is resident with

    runtime    Python, torch and, where the model is one of its, transformers; the thread pool; the buffers
               that MKL keeps for each thread; objects in the heap. Measured once a machine, by library, task and
               type of weights, and no constant: the largest of several models, for a peak is what must not be passed
    kernels    oneDNN generates code for each shape of a 16-bit product and keeps it: so many shapes, so many
               bytes each, measured once a machine
    heap       blocks under 1 MiB leave holes in the C heap, which only shrinks from its end; larger ones are
               whole pages (see `heap`)
    allocated  what the account tells

and no more; the worst moment of heap and allocated together is searched over all of the trace.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from .account import Account, Entry
from .ledger import Ledger


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

    How many tokens an expert gets is up to the data, and each number is a shape. Of all distributions with
    the known mean μ the one that presumes least is geometric: p(m) = (1/(1+μ))·(μ/(1+μ))^m, one draw for each
    expert and call; a number is there with 1 − ∏(1 − p(m)).
    """
    plain = {kernel for kernel in ledger.kernels if kernel[0] != "grouped"}
    late = _born_in_backward(ledger)
    by_matrix: dict[tuple[int, int], list[tuple[float, int]]] = {}
    for kind, *sizes in ledger.kernels:
        if kind == "grouped":
            rows, inner, columns, experts = sizes
            made = {
                number
                for number, storage in enumerate(ledger.storages)
                if storage.operator == "aten::_grouped_mm"
                and storage.kind != "temporary"
                and storage.nbytes == rows * columns * 2
            }
            calls = len(made - late) or len(made)  # what is recomputed goes to the experts that it went to before
            by_matrix.setdefault((inner, columns), []).append((rows / experts, calls * experts))
    expected = 0.0
    for draws in by_matrix.values():
        most = math.ceil(20 * max(mean for mean, _ in draws)) + 1
        for tokens in range(1, most):
            missing = 0.0
            for mean, count in draws:
                chance = math.exp(tokens * math.log(mean / (1 + mean))) / (1 + mean)
                missing += count * math.log1p(-chance)
            expected += 1 - math.exp(missing)
    return len(plain) + round(expected)


def _born_in_backward(ledger: Ledger) -> set[int]:
    """Numbers of the storages that backward passes make."""
    marks = [*ledger.marks, (len(ledger.events), "")]
    return {
        number
        for (first, name), (last, _) in itertools.pairwise(marks)
        if name.endswith("backward")
        for number, sign in ledger.events[first:last]
        if sign > 0
    }

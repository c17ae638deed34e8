"""The code that oneDNN makes for each shape of a 16-bit product and keeps: what of it is resident, what only reserved.

Generated into mappings that are larger than the code, of which the system counts all as private memory (RLIMIT_DATA)
and makes resident what was written. On a processor with AMX, MiB a shape: 0.6 resident and 1.2 counted of few rows,
1.0 and 2.0 of many, 1.0 and 2.9 of a gradient's.
"""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Final

import torch

from memfit.copies import copy_that

from .meter import resident_nbytes

_SHAPES: Final = 48
_WARM: Final = 8
_INPUTS, _OUTPUTS = 512, 1024


@dataclass(frozen=True, kw_only=True)
class Code:
    """Bytes for each shape of a product."""

    resident_nbytes: int
    counted_nbytes: int
    """By the system, against a limit on private memory."""


def code_of_products(*, rows: int = 1, gradients: bool = False) -> Code:
    """What this process keeps for each product of so many rows and a few more; with `gradients` half of them are of
    weights' gradients, whose left side is transposed."""
    left = torch.ones(rows + _SHAPES + _WARM, _INPUTS, dtype=torch.bfloat16)
    right = torch.ones(_OUTPUTS, _INPUTS, dtype=torch.bfloat16).t()
    back = torch.ones(left.shape[0], _OUTPUTS, dtype=torch.bfloat16) if gradients else None
    before = {"now": 0, "data": 0}
    for n in range(_SHAPES + _WARM):
        if n == _WARM:
            before = resident_nbytes()
        if back is not None and n % 2:
            torch.mm(left[: rows + n].t(), back[: rows + n])
        else:
            torch.mm(left[: rows + n], right)
    after = resident_nbytes()
    resident, counted = (max(0, after[key] - before[key]) // _SHAPES for key in ("now", "data"))
    return Code(resident_nbytes=resident, counted_nbytes=max(resident, counted))


def code_in_a_copy(begin: Callable[[], None], *, rows: int) -> Code:
    """`code_of_products` of so many rows and of gradients, after `begin`, in a copy of this process, where all of it
    stays. The threads of products must not have been started (fork(2)).

    Raises:
        RuntimeError: the copy has ended without an answer; stderr tells why.
    """
    reading, writing = os.pipe()

    def measure() -> None:
        begin()
        os.write(writing, json.dumps(asdict(code_of_products(rows=rows, gradients=True))).encode())

    child = copy_that(measure)
    os.close(writing)
    with open(reading, encoding="utf-8") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if not answer:
        raise RuntimeError(f"the code of products could not be measured: exit code {os.waitstatus_to_exitcode(status)}")
    return Code(**json.loads(answer))

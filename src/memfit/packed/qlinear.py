"""oneDNN's product of integers, and what it needs a weight to be.

N outputs, K inputs, M tokens.

oneDNN puts a weight into an order of its own, in an opaque tensor that no operator but its own can read. Fake tensors
stand for it by its bytes.
"""

import functools
from typing import Any, Final, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from memfit.packed.fake import is_fake

ZERO: Final = 128
"""What is added to signed activations: q + 128 is unsigned."""


@functools.cache
def integer_kernel() -> Literal["onednn", "int_mm"]:
    """`onednn` if its kernel is there and exact where sums are the largest: tried, never assumed.

    Without VNNI it adds pairs of products in 16 bits, which may be too few.
    """
    with _disable_current_modes():
        q = torch.full((32, 64), 127, dtype=torch.int8)
        q[::2] = -128
        u = torch.full((3, 64), 255, dtype=torch.uint8)
        try:
            y = qlinear(u, prepack(q), torch.ones(32), (32, 64), torch.float32)
        except (RuntimeError, NotImplementedError, AttributeError):
            return "int_mm"
        return "onednn" if torch.equal(y, ((u.float() - ZERO) @ q.float().t())) else "int_mm"


@functools.cache
def prepacked_nbytes(shape: tuple[int, int]) -> int:
    """Bytes of a weight [N, K] in oneDNN's order: it pads, and adds sums of rows. Asked of oneDNN itself, once."""
    with _disable_current_modes():
        return int(torch.ops.mkldnn._nbytes(prepack(torch.empty(shape, dtype=torch.int8))))


def prepack(q: Tensor) -> Tensor:
    """int8 q [N, K] in oneDNN's order: an opaque tensor; on fakes its bytes."""
    if is_fake(q):
        return torch.empty(prepacked_nbytes((q.shape[0], q.shape[1])), dtype=torch.int8)
    packed: Tensor = torch.ops.onednn.qlinear_prepack(q, None)
    return packed


def qlinear(u: Tensor, packed: Tensor, scale: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """(u − 128) [M, K] times the weight, times the weight's scales: [M, N] in `dtype`."""
    if is_fake(packed):
        packed = packed[: shape[0] * shape[1]].view(shape[1], shape[0])  # what the operator takes it for
    none: Any = None
    # There are no zero points of the weight, and oneDNN reads none.
    zeros = torch.empty(0, dtype=torch.int32)
    y: Tensor = torch.ops.onednn.qlinear_pointwise(
        u, 1.0, ZERO, packed, scale, zeros, none, 1.0, 0, dtype, "none", [], ""
    )
    return y

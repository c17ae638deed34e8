"""Products with packed weights on CUDA: Triton's kernels where Triton is, and what they take on fake tensors.

Legend: N rows of the weight, K inputs, M rows of activations, G groups.
"""

import functools
import importlib
from typing import Any, Final

import torch
from torch import Tensor

from memfit.packed.fake import device_meant, is_fake

_FEW_ROWS: Final = 16
"""Up to so many rows of activations a weight of one plane is unpacked where it is used; for more, before."""
_FEWEST_ROWS: Final = 4
"""Likewise of several planes: from five rows on unpacking them over and over takes longer."""

_WORKSPACE_NBYTES: Final = 64 * 2**20
"""The largest block of a weight or of sums that is made at once: on CUDA few large kernels are faster than many."""


def workspace_nbytes(tensor: Tensor, elsewhere: int) -> int:
    """How large blocks beside `tensor` may be."""
    return _WORKSPACE_NBYTES if device_meant(tensor).type == "cuda" else elsewhere


@functools.cache
def _kernels() -> Any:
    """The module of kernels, or None where Triton is not installed: it comes with torch for CUDA."""
    try:
        return importlib.import_module("memfit.packed.triton_kernels")
    except ImportError:
        return None


def unpacks(tensor: Tensor, table: Tensor | None) -> bool:
    """Whether weights beside `tensor` are unpacked by a kernel. For fakes that stand for CUDA it is assumed.

    table: what codes stand for, if they are no integers; no kernel knows levels that are vectors [L, v].
    """
    if device_meant(tensor).type != "cuda" or (table is not None and table.dim() > 1):
        return False
    return is_fake(tensor) or _kernels() is not None


def runs_few(x: Tensor, widths: tuple[int, ...], table: Tensor | None) -> bool:
    """Whether bf16 activations [M, K] go to the kernel that reads a weight of such planes as it is packed."""
    most = _FEW_ROWS if len(widths) == 1 else _FEWEST_ROWS
    return x.dtype == torch.bfloat16 and x.shape[0] <= most and unpacks(x, table)


def product(
    x: Tensor, planes: list[Tensor], widths: tuple[int, ...], scale: Tensor, zero: Tensor | None, table: Tensor | None
) -> Tensor:
    """bf16 x [M, K] times the weight, transposed: bf16 [M, N]; see `triton_kernels.product`."""
    x = x.contiguous()
    if is_fake(x):
        return x.new_empty(x.shape[0], scale.shape[0])
    y: Tensor = _kernels().product(x, _dense(planes), widths, scale, zero, table)
    return y


def unpack(
    planes: list[Tensor], widths: tuple[int, ...], scale: Tensor, zero: Tensor | None, table: Tensor | None
) -> Tensor:
    """The weight, bf16 [N, K]; see `triton_kernels.unpack`."""
    planes = _dense(planes)
    scale, zero = scale.contiguous(), None if zero is None else zero.contiguous()
    if is_fake(scale):
        inputs = planes[0].shape[1] * 8 // widths[0]
        return torch.empty(scale.shape[0], inputs, dtype=torch.bfloat16, device=scale.device)
    dense: Tensor = _kernels().unpack(planes, widths, scale, zero, table)
    return dense


def _dense(planes: list[Tensor]) -> list[Tensor]:
    return [plane.contiguous() for plane in planes]

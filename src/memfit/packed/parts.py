"""Rows, columns and stored parts of a packed weight: how they are cut, checked and turned back into numbers."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from memfit.errors import BrokenInput


def blocks_of_rows(rows: int, most: int, multiple: int) -> Iterator[tuple[int, int]]:
    """Cut `rows` into blocks of at most `most` rows, but no less than `multiple`, and multiples of it."""
    step = max(most // multiple, 1) * multiple
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def columns(plane: Tensor, length: int, low: int, high: int) -> Tensor:
    """A plane [n, m·L, ...] with inputs low to high of each segment alone: [n, m · (high − low), ...], a plane too."""
    by_segment = plane.view(plane.shape[0], -1, length, *plane.shape[2:])
    return by_segment[:, :, low:high].flatten(1, 2)


def check_part(tensor: Tensor, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """`tensor` as [N, ...]; experts' [E, N/E, ...] is the same bytes."""
    if tensor.dtype != dtype:
        raise BrokenInput(f"{name}: {tensor.dtype} where {dtype} was expected")
    if tensor.ndim == 3:
        tensor = tensor.flatten(0, 1)
    if tuple(tensor.shape) != shape:
        raise BrokenInput(f"{name}: shape {list(tensor.shape)} where {list(shape)} was expected")
    return tensor


def takes_rows(read: Callable[..., Any]) -> bool:
    """Whether a `Read` can be asked for some rows alone."""
    try:
        return {"start", "stop"} <= set(inspect.signature(read).parameters)
    except (TypeError, ValueError):
        return False


def dequantize(q: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(q − z) · s, in `dtype`, as compressed-tensors' `_dequantize`. q [n, k], scale and zero [n, c]."""
    dense = torch.empty(q.shape, dtype=dtype, device=q.device)
    dense.copy_(q)  # every integer of at most 8 bits, and every difference of two, is exact in bf16
    by_group = dense.view(q.shape[0], scale.shape[1], q.shape[1] // scale.shape[1])
    if zero is not None:
        by_group.sub_(zero.to(dtype)[..., None])
    by_group.mul_(scale.to(dtype)[..., None])
    return dense

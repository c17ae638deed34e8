"""Blocks of rows, and checked reads: what every packed weight is loaded and multiplied by."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from memfit.errors import BrokenInput

Read = Callable[..., Tensor]
"""`read(name) -> Tensor`, or `read(name, start, stop)` for rows start to stop of it."""


def blocks_of(rows: int, most: int, multiple: int) -> Iterator[tuple[int, int]]:
    """Cut `rows` into blocks of at most `most` rows, but no less than `multiple`, and multiples of it."""
    step = max(most // multiple, 1) * multiple
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def checked(tensor: Tensor, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """`tensor` as [N, ...]; experts' [E, N/E, ...] is the same bytes.

    Raises:
        BrokenInput: it is of another type or shape.
    """
    if tensor.dtype != dtype:
        raise BrokenInput(f"{name}: {tensor.dtype} where {dtype} was expected")
    if tensor.ndim == 3:
        tensor = tensor.flatten(0, 1)
    if tuple(tensor.shape) != shape:
        raise BrokenInput(f"{name}: shape {list(tensor.shape)} where {list(shape)} was expected")
    return tensor


def takes_rows(read: Callable[..., Any]) -> bool:
    """Whether `read` can give some rows of a tensor alone."""
    try:
        return {"start", "stop"} <= set(inspect.signature(read).parameters)
    except (TypeError, ValueError):
        return False

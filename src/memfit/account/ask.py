"""Ask a kernel for its scratch: run it once, alone, on uninitialised memory, and read the allocator's events.

oneDNN chooses its scratchpads by processor, threads and shape, and tells nobody; no formula holds across
machines. A question is asked once for each shape, and costs milliseconds. Shapes too big to ask are asked
smaller where the scratch no longer grows with them (the blocks are bounded by the processor's caches).
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import _disable_current_modes

from .meter import allocations

_MOST_PRODUCTS: Final = 1 << 34
"""Multiplications a question may cost: about 30 ms on two AMX cores."""


def ask(run: Callable[[], Any]) -> int:
    """Bytes that `run` has allocated at its worst moment beyond those it returns."""
    with _disable_current_modes(), torch.no_grad():
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as session:
            out = run()
        now = peak = 0
        for _, _, nbytes in allocations(session):
            now += nbytes
            peak = max(peak, now)
        del out
    return peak - now


def ask_call(func: Any, args: tuple[Any, ...]) -> int:
    """Scratch of `func(*args)` for the shapes, strides and dtypes that `args` have."""
    return _ask_call(func, tuple(_describe(arg) for arg in args), torch.get_num_threads())


def ask_recurrent(func: Any, args: tuple[Any, ...]) -> int:
    """Scratch of a recurrent layer on x [T, B, D]: affine in T, but for T modulo the 128 that page sizes divide."""
    first, *rest = (_describe(arg) for arg in args)
    steps, least = first.shape[0], 128 + first.shape[0] % 128
    threads = torch.get_num_threads()
    if steps < 512:
        return _ask_call(func, (first, *rest), threads)
    few, more = (_ask_call(func, (_steps(first, n), *rest), threads) for n in (least, least + 128))
    return few + (steps - least) // 128 * (more - few)


def _steps(like: "_Like", steps: int) -> "_Like":
    return _Like((steps, *like.shape[1:]), like.stride, like.dtype)


def _describe(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _Like(tuple(value.shape), tuple(value.stride()), value.dtype)
    return tuple(value) if isinstance(value, list) else value


class _Like(NamedTuple):
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def empty(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype)


@lru_cache(maxsize=None)
def _ask_call(func: Any, described: tuple[Any, ...], threads: int) -> int:
    with _disable_current_modes():
        args = [arg.empty() if isinstance(arg, _Like) else arg for arg in described]
    return ask(lambda: func(*args))


def ask_product(left: Tensor, right: Tensor) -> int:
    """Scratch of `left @ right`, [.., M, K] by [.., K, N]."""
    batch = left.shape[0] if left.dim() == 3 else 0
    rows, inner, columns = left.shape[-2], left.shape[-1], right.shape[-1]
    while max(batch, 1) * rows * inner * columns > _MOST_PRODUCTS and max(inner, columns) > 4096:
        inner, columns = (inner, columns // 2) if columns >= inner else (inner // 2, columns)
    while max(batch, 1) * rows * inner * columns > _MOST_PRODUCTS and batch > 2:
        batch //= 2
    by_columns = _by_columns(left), _by_columns(right)
    return _ask_product(batch, rows, inner, columns, by_columns, left.dtype, torch.get_num_threads())


def _by_columns(tensor: Tensor) -> bool:
    """Whether the last two dimensions lie column by column."""
    return tensor.stride(-1) != 1 and tensor.stride(-2) == 1


@lru_cache(maxsize=None)
def _ask_product(
    batch: int,
    rows: int,
    inner: int,
    columns: int,
    by_columns: tuple[bool, bool],
    dtype: torch.dtype,
    threads: int,
) -> int:
    def matrix(height: int, width: int, flip: bool) -> Tensor:
        lead = (batch,) if batch else ()
        size = (width, height) if flip else (height, width)
        made = torch.empty(*lead, *size, dtype=dtype)
        return made.transpose(-1, -2) if flip else made

    with _disable_current_modes():
        left, right = matrix(rows, inner, by_columns[0]), matrix(inner, columns, by_columns[1])
    return ask(lambda: torch.matmul(left, right))


def ask_attention(args: tuple[Any, ...]) -> int:
    """Scratch of the CPU's attention on q [B, H, T, D], k, v [B, Hkv, S, D], with or without a mask."""
    query, key, value = args[:3]
    shapes = [tuple(query.shape), tuple(key.shape), tuple(value.shape)]
    causal = bool(args[4]) if len(args) > 4 else False
    while shapes[0][0] > 1 and shapes[0][0] * shapes[0][1] * shapes[0][2] * shapes[1][2] * shapes[0][3] > _MOST_PRODUCTS:
        shapes = [(1, *shape[1:]) for shape in shapes]
    return _ask_attention(tuple(shapes), causal, query.dtype, torch.get_num_threads())


@lru_cache(maxsize=None)
def _ask_attention(
    shapes: tuple[tuple[int, ...], ...], causal: bool, dtype: torch.dtype, threads: int
) -> int:
    with _disable_current_modes():
        query, key, value = (torch.empty(shape, dtype=dtype) for shape in shapes)
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return ask(lambda: attention(query, key, value, 0.0, causal))

"""Ask a kernel for its scratch: run it once, alone, on uninitialised memory, and read the allocator's events.

oneDNN chooses its scratchpads by processor, threads and shape, and tells nobody; no formula holds across
machines. A question is asked once for each shape, and costs milliseconds. Shapes too big to ask are asked
smaller where the scratch no longer grows with them (the blocks are bounded by the processor's caches).
"""

from collections.abc import Callable
from functools import cache
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import _disable_current_modes

from memfit.packed.qlinear import prepack, qlinear

from .meter import Born

_MOST_PRODUCTS: Final = 1 << 32
"""Multiplications a question may cost: 10 ms on two cores with AMX, 50 ms on two without."""
_MOST_ELEMENTS: Final = 1 << 25
"""Elements of a matrix in a question: 64 MiB in bf16."""


def ask(run: Callable[[], Any], *, learning: bool = False) -> int:
    """Bytes that `run` has allocated at its worst moment beyond those it returns; `learning`: as if a gradient were
    wanted, which recurrent layers ask for."""
    with _disable_current_modes(), torch.set_grad_enabled(learning):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as session:
            out = run()
        born = Born()
        peak = born.follow(session)
        del out
    return peak - born.nbytes


def ask_call(func: Any, args: tuple[Any, ...]) -> int:
    """Scratch of `func(*args)` for the shapes, strides and dtypes that `args` have."""
    return _ask_call(func, tuple(_describe(arg) for arg in args), torch.get_num_threads())


def ask_recurrent(func: Any, args: tuple[Any, ...]) -> int:
    """Scratch of a recurrent layer, or of its backward pass, on x [T, B, D]: affine in T, for each T modulo 128."""
    learning = torch.is_grad_enabled()
    return _by_steps(lambda *of: _ask_call(*of, learning=learning), func, args)


def ask_recurrent_workspace(func: Any, args: tuple[Any, ...]) -> int:
    """Bytes that a recurrent layer on x [T, B, D] keeps for its backward pass: affine in T as well."""
    return _by_steps(_ask_workspace, func, args)


def ask_recurrent_unwritten(func: Any, args: tuple[Any, ...]) -> int:
    """Of these, bytes in whole pages that the layer leaves as they are: oneDNN lays out more than it fills."""
    return _by_steps(_ask_unwritten, func, args)


def _by_steps(question: Callable[[Any, tuple[Any, ...], int], int], func: Any, args: tuple[Any, ...]) -> int:
    # oneDNN pads its rows to pages: 128 steps fill whole ones, whatever a step takes.
    described = tuple(_describe(arg) for arg in args)
    steps = described[0].shape[0]
    least = 128 + steps % 128
    threads = torch.get_num_threads()
    if steps < 512:
        return question(func, described, threads)
    few, more = (question(func, _with_steps(func, described, n), threads) for n in (least, least + 128))
    return few + int(steps - least) // 128 * (more - few)


def _with_steps(func: Any, described: tuple[Any, ...], steps: int) -> tuple[Any, ...]:
    """A question for another T; the workspace that a backward pass is given is as long as such a layer's."""
    before = described[0].shape[0]
    found = [
        _Like((steps, *arg.shape[1:]), arg.stride, arg.dtype)
        if isinstance(arg, _Like) and len(arg.shape) == 3 and arg.shape[0] == before
        else arg
        for arg in described
    ]
    if func is torch.ops.aten.mkldnn_rnn_layer_backward.default:
        reverse, mode, size, layers, biases, train, both, sizes, first = found[13:22]
        forward = (*found[:7], reverse, sizes, mode, size, layers, biases, both, first, train)
        kept = _ask_workspace(torch.ops.aten.mkldnn_rnn_layer.default, forward, torch.get_num_threads())
        found[-1] = _Like((kept,), (1,), torch.uint8)
    return tuple(found)


@cache
def _ask_workspace(func: Any, described: tuple[Any, ...], threads: int) -> int:
    with _disable_current_modes(), torch.enable_grad():
        out = func(*(arg.empty() if isinstance(arg, _Like) else arg for arg in described))
        return int(out[3].numel())


@cache
def _ask_unwritten(func: Any, described: tuple[Any, ...], threads: int) -> int:
    kept = _ask_workspace(func, described, threads)
    found = 0
    with _disable_current_modes(), torch.enable_grad():
        for _ in range(_TIMES):
            out = func(*(arg.empty() if isinstance(arg, _Like) else arg for arg in described))
            pages = out[3][: kept // _PAGE * _PAGE].view(-1, _PAGE)
            plain = (pages == 0).all(1) | (pages == _POISON).all(1)
            # A block from the system is of zeros. One that was used before hides what is not written to, unless it
            # was used here: the next layer most likely gets the block of this one.
            found = max(found, int(plain.sum()) * _PAGE)
            out[3].fill_(_POISON)
            del out, pages
    return found


_PAGE: Final = 4096
_POISON: Final = 0xA5
_TIMES: Final = 3


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


@cache
def _ask_call(func: Any, described: tuple[Any, ...], threads: int, *, learning: bool = False) -> int:
    with _disable_current_modes():
        args = [arg.empty() if isinstance(arg, _Like) else arg for arg in described]
    return ask(lambda: func(*args), learning=learning)


@cache
def ask_eigenvectors(shape: tuple[int, ...], dtype: torch.dtype, *, vectors: bool = True) -> int:
    """Scratch of a symmetric matrix's eigenvectors, or values alone: of zeros, as chance may give what has none."""
    with _disable_current_modes():
        matrix = torch.zeros(shape, dtype=dtype)
    return ask(lambda: torch.linalg.eigh(matrix) if vectors else torch.linalg.eigvalsh(matrix))


def ask_product(left: Tensor, right: Tensor) -> int:
    """Scratch of `left @ right`, [.., M, K] by [.., K, N]; from smaller ones where that costs too much.

    oneDNN blocks a product by its rows, by whether K is a large multiple of a page, and by what is left over
    in the last block, so the smaller product keeps those. What still grows with N is a copy of the right
    factor in oneDNN's layout, and what grows with the batch does so by the piece.
    """
    shape = _Product(
        batch=left.shape[0] if left.dim() == 3 else 0,
        rows=left.shape[-2],
        inner=left.shape[-1],
        columns=right.shape[-1],
        by_columns=(_by_columns(left), _by_columns(right)),
        dtype=left.dtype,
        threads=torch.get_num_threads(),
        precision=torch.get_float32_matmul_precision(),
    )
    if shape.is_cheap:
        return _ask_product(shape)
    if shape.batch > 4:
        few, more = (_less_product(shape._replace(batch=batch)) for batch in (2, 4))
        return few + (more - few) * (shape.batch - 2) // 2
    return _less_product(shape)


class _Product(NamedTuple):
    batch: int
    """0: no batch."""
    rows: int
    inner: int
    columns: int
    by_columns: tuple[bool, bool]
    dtype: torch.dtype
    threads: int
    precision: str
    """That fp32 factors are multiplied with."""

    @property
    def is_cheap(self) -> bool:
        batch = max(self.batch, 1)
        most = max(self.rows * self.inner, self.inner * self.columns, self.rows * self.columns)
        return batch * most <= _MOST_ELEMENTS and batch * self.rows * self.inner * self.columns <= _MOST_PRODUCTS


def _less_product(shape: _Product) -> int:
    small = shape._replace(
        rows=_remainder_kept(shape.rows, 1024),
        inner=_remainder_kept(shape.inner, 4096),
        columns=_remainder_kept(shape.columns, 1024),
    )
    scratch = _ask_product(small)
    weight = max(shape.batch, 1) * small.inner * small.columns * shape.dtype.itemsize
    if small == shape or scratch < weight:
        return scratch
    twice = small._replace(columns=2 * small.columns)
    if _ask_product(twice) - scratch == weight:
        scratch += max(shape.batch, 1) * shape.inner * shape.columns * shape.dtype.itemsize - weight
    return scratch


def _remainder_kept(size: int, period: int) -> int:
    """The least size of at least `period` with the same remainder; a smaller size is itself."""
    return size if size < 2 * period else period + size % period


def _by_columns(tensor: Tensor) -> bool:
    """Whether the last two dimensions lie column by column."""
    return tensor.stride(-1) != 1 and tensor.stride(-2) == 1


@cache
def _ask_product(shape: _Product) -> int:
    def matrix(height: int, width: int, flip: bool) -> Tensor:
        lead = (shape.batch,) if shape.batch else ()
        size = (width, height) if flip else (height, width)
        made = torch.empty(*lead, *size, dtype=shape.dtype)
        return made.transpose(-1, -2) if flip else made

    with _disable_current_modes():
        left = matrix(shape.rows, shape.inner, shape.by_columns[0])
        right = matrix(shape.inner, shape.columns, shape.by_columns[1])
    return ask(lambda: torch.matmul(left, right))


def ask_integer_product(left: Tensor, out: Tensor) -> int:
    """Scratch of unsigned activations [M, K] times a weight in oneDNN's order, [M, N]; asked of fewer outputs.

    M matters to the last row. It is small: activations are rounded some MiB at a time.
    """
    inner, columns = _remainder_kept(left.shape[1], 4096), _remainder_kept(out.shape[1], 1024)
    return _ask_integer_product(left.shape[0], inner, columns, out.dtype, torch.get_num_threads())


@cache
def _ask_integer_product(rows: int, inner: int, columns: int, dtype: torch.dtype, threads: int) -> int:
    with _disable_current_modes():
        u = torch.empty((rows, inner), dtype=torch.uint8)
        packed, scale = prepack(torch.empty((columns, inner), dtype=torch.int8)), torch.ones(columns)
    return ask(lambda: qlinear(u, packed, scale, (columns, inner), dtype))


def ask_attention(args: tuple[Any, ...]) -> int:
    """Scratch of the CPU's attention on q [B, H, T, D], k, v [B, Hkv, S, D], with or without a mask."""
    query, key, value = args[:3]
    causal = bool(args[4]) if len(args) > 4 else False
    batch, heads, tokens, width = query.shape
    groups, seen = key.shape[1], key.shape[2]
    threads = torch.get_num_threads()

    def question(batch: int, groups: int, tokens: int, seen: int) -> int:
        sizes = ((batch, groups * (heads // key.shape[1]), tokens, width), (batch, groups, seen, width))
        return _ask_attention((*sizes, (*sizes[1][:3], value.shape[3])), causal, query.dtype, threads)

    if batch * heads * tokens * seen * width <= _MOST_PRODUCTS:
        return question(batch, groups, tokens, seen)
    # Blocks are of at most 256 queries and 512 keys. What still grows is a copy of keys and values, by head.
    seen, tokens = _remainder_kept(seen, 1024), _remainder_kept(tokens, 1024)
    if batch * groups <= 2:
        return question(batch, groups, tokens, seen)
    few, more = question(1, 1, tokens, seen), question(1, 2, tokens, seen)
    return few + (int(batch * groups) - 1) * (more - few)


@cache
def _ask_attention(shapes: tuple[tuple[int, ...], ...], causal: bool, dtype: torch.dtype, threads: int) -> int:
    with _disable_current_modes():
        query, key, value = (torch.empty(shape, dtype=dtype) for shape in shapes)
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return ask(lambda: attention(query, key, value, 0.0, causal))


def ask_attention_backward(args: tuple[Any, ...]) -> int:
    """Scratch of the backward pass of the CPU's attention on q [B, H, T, D], k, v [B, Hkv, S, D].

    Each thread works on one head of one text, in blocks of at most 256 queries and 512 keys, so a few heads of one text
    tell it. The products of 16 bits within take scratch as well, and how many of them run at once is up to chance.
    """
    query, key, value = args[1:4]
    threads = torch.get_num_threads()
    share = query.shape[1] // key.shape[1]
    groups = min(key.shape[1], -(-2 * threads // share))
    batch = 1 if groups * share >= threads else min(query.shape[0], threads)
    tokens, seen = _remainder_kept(query.shape[2], 1024), _remainder_kept(key.shape[2], 1024)
    shapes = (
        (batch, groups * share, tokens, query.shape[3]), (batch, groups, seen, key.shape[3]),
        (batch, groups, seen, value.shape[3]),
    )  # fmt: skip
    return _ask_attention_backward(shapes, bool(args[7]), query.dtype, threads)


@cache
def _ask_attention_backward(shapes: tuple[tuple[int, ...], ...], causal: bool, dtype: torch.dtype, threads: int) -> int:
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    with _disable_current_modes(), torch.no_grad():
        query, key, value = (torch.zeros(shape, dtype=dtype) for shape in shapes)
        out, logsumexp = forward(query, key, value, 0.0, causal)
        gradient = torch.zeros_like(out)
    return ask(lambda: backward(gradient, query, key, value, out, logsumexp, 0.0, causal))

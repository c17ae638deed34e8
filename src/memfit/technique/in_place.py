"""A symmetric matrix permuted, factored and turned around in its own memory; beside it only tiles of it are held.

H of a wide layer is the largest tensor there is while a model is compressed, and LAPACK's factor would be a second one.
"""

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

from memfit.packed.fake import blocks_to_run, is_fake

_PANEL: Final = 256
"""Columns of a block of the factor: wide enough for products to be fast, narrow enough for LAPACK not to count."""
_TILE: Final = 512
_ROWS_NBYTES: Final = 8 << 20


def permute_both(a: Tensor, order: Tensor) -> None:
    """a[i, j] ← a[order[i], order[j]] of a symmetric matrix [K, K]: its columns, and as columns its rows."""
    for again in range(2):
        step = max(1, _ROWS_NBYTES // (a.shape[1] * a.element_size()))
        for start in blocks_to_run(range(0, a.shape[0], step)):
            rows = a[start : start + step]
            rows.copy_(rows.index_select(1, order))
        if not again:
            transpose(a)


def transpose(a: Tensor) -> None:
    """a ← aᵀ of a matrix [K, K]."""
    for one, other in _tiles(a):
        lower = one.t().clone()
        if one is not other:
            one.copy_(other.t())
        other.copy_(lower)


def turn_around(a: Tensor) -> None:
    """a[i, j] ← a[K − 1 − i, K − 1 − j] of a contiguous matrix [K, K]: its entries from the last to the first."""
    flat = a.view(-1)
    total, middle, step = flat.numel(), flat.numel() // 2, _ROWS_NBYTES // a.element_size()
    for start in blocks_to_run(range(0, middle, step)):
        stop = min(start + step, middle)
        front, back = flat[start:stop], flat[total - stop : total - start]
        kept = front.flip(0)
        front.copy_(back.flip(0))
        back.copy_(kept)


def cholesky_in_place(a: Tensor, diagonal: Tensor) -> bool:
    """Put L of A = L Lᵀ into the lower triangle of `a` [K, K], A being what `a` holds with another diagonal [K].

    What is above the diagonal stays. Where A is not positive definite the answer is False, and `a` is as it was but for
    its diagonal. Panel by panel, from the left: one product, a small factor, one triangular solution.
    """
    size = a.shape[0]
    a.diagonal().copy_(diagonal)
    for start in blocks_to_run(range(0, size, _PANEL)):
        stop = min(start + _PANEL, size)
        corner = a[start:stop, start:stop]
        above = corner.triu(1)  # of what A is put together from again, if it must be
        if start:
            a[start:, start:stop].addmm_(a[start:, :start], a[start:stop, :start].t(), alpha=-1)
        lower, failed = torch.linalg.cholesky_ex(corner)
        if not is_fake(a) and int(failed):
            corner.copy_(above)
            _mirror(a)
            return False
        corner.copy_(above.add_(lower))
        if stop < size:
            below = a[stop:, start:stop]
            below.copy_(torch.linalg.solve_triangular(lower.t(), below, upper=True, left=False))
    return True


def _mirror(a: Tensor) -> None:
    """The lower triangle from the upper one; the diagonal is of no use."""
    for lower, upper in _tiles(a):
        if lower is upper:
            above = upper.triu(1)
            lower.copy_(above + above.t())
        else:
            lower.copy_(upper.t())


def _tiles(a: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Each tile on or below the diagonal, and the one across; on it they are the same object."""
    size = a.shape[0]
    starts = [(i, j) for i in range(0, size, _TILE) for j in range(0, i + 1, _TILE)]
    for i, j in blocks_to_run(starts):
        lower = a[i : i + _TILE, j : j + _TILE]
        yield lower, lower if i == j else a[j : j + _TILE, i : i + _TILE]

"""The singular values of a weight as its inputs and outputs see it: what every rank errs by, and what errs least.

    Y = G^½ W S,    H = S Sᵀ [K, K] = E[x xᵀ] of the inputs,  G [N] what errors of each output count

Y is never decomposed itself: the eigenvalues of Y Yᵀ [N, N] or Yᵀ Y [K, K], the smaller of them, are its squared
singular values, and what they add up to after the r-th is the error of rank r (Eckart and Young 1936).

Legend of shapes: N outputs, K inputs, r rank, n the shorter of N and K, R rows of a block.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Final

import torch
from torch import Tensor

from memfit.packed.fake import blocks_to_run, is_fake

from .gptq import Factor

_LEAST: Final = 1e-6
"""Of the mean importance: what the error of any input, or output, counts at least."""
_ROWS_NBYTES: Final = 16 << 20
_RANDOMISED_FROM: Final = 2048
"""Width from which few leading vectors are found by chance: in a fifth of the time that all of them take."""
_FEW: Final = 4
"""A rank is low enough for that up to so much less than the width."""
_SPARE: Final = 16
_ITERATIONS: Final = 3

RowBlocks = Callable[[], Iterable[Tensor]]
"""The rows of a weight [N, K] from the first to the last, in blocks; each call begins anew."""


class Metric:
    """What errors of a weight's inputs count: tr(E H Eᵀ) = ‖E S‖², H = S Sᵀ [K, K].

    Args:
        importance_K: diag H; the errors of different inputs are then taken as independent.
        factor: of H, damped; goes before `importance_K`. Neither: all inputs count 1.
    """

    def __init__(self, *, importance_K: Tensor | None = None, factor: Factor | None = None) -> None:
        self.factor = factor
        self.importance = factor.importance if factor is not None else importance_K
        self._root: Tensor | None = None
        if factor is not None:
            self._root = factor.weights.sqrt()
        elif importance_K is not None:
            self._root = positive(importance_K).sqrt_()

    @property
    def dtype(self) -> torch.dtype:
        """What it is computed in at least."""
        return torch.float32 if self.factor is None else self.factor.coupling.dtype

    def check(self, inputs: int) -> None:
        """ValueError if it is of another width."""
        if self._root is not None and self._root.shape != (inputs,):
            raise ValueError(f"what inputs count is told of {self._root.numel()}, and the weight has {inputs} inputs")

    def times(self, rows: Tensor) -> Tensor:
        """rows [R, K] · S, fresh."""
        if self._root is None:
            return rows.clone()
        if self.factor is None:
            return rows * self._root.to(rows.dtype)
        return (rows.index_select(1, self.factor.order) @ self._triangle(rows)).mul_(self._root.to(rows.dtype))

    def times_turned(self, rows: Tensor) -> Tensor:
        """rows [R, K] · Sᵀ, fresh."""
        if self._root is None:
            return rows.clone()
        scaled = rows * self._root.to(rows.dtype)
        return scaled if self.factor is None else self._in_place(scaled @ self._triangle(rows).t())

    def divided(self, rows: Tensor) -> Tensor:
        """rows [R, K] · S⁻¹, fresh."""
        if self._root is None:
            return rows.clone()
        scaled = rows / self._root.to(rows.dtype)
        if self.factor is None:
            return scaled
        triangle = self._triangle(rows)
        solved: Tensor = torch.linalg.solve_triangular(triangle, scaled, upper=True, left=False, unitriangular=True)
        return self._in_place(solved)

    def _triangle(self, rows: Tensor) -> Tensor:
        assert self.factor is not None
        return self.factor.coupling.to(rows.dtype)

    def _in_place(self, rows: Tensor) -> Tensor:
        """Columns from the factor's order back to the file's."""
        assert self.factor is not None
        return torch.empty_like(rows).index_copy_(1, self.factor.order, rows)


def positive(importance: Tensor) -> Tensor:
    """A fresh copy in which nothing counts less than a millionth of the mean; ones where all are 0.

    Raises:
        ValueError: something counts less than nothing, or is not finite.
    """
    wide = torch.float64 if importance.dtype == torch.float64 else torch.float32
    found = importance.to(wide, copy=True)
    if is_fake(found):
        return found.clamp_(min=_LEAST)
    if not bool((found.isfinite() & (found >= 0)).all()):
        raise ValueError("what errors count must be finite and not negative")
    mean = float(found.mean())
    return found.clamp_(min=_LEAST * mean) if mean > 0 else found.fill_(1.0)


@torch.no_grad()
def errors_by_rank(
    weight_NK: Tensor | RowBlocks, *, shape: tuple[int, int] | None = None, importance_K: Tensor | None = None,
    factor: Factor | None = None, rows_N: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Σ_o G_o (E H Eᵀ)_oo of the best factors of every rank: float64 [n + 1], the first entry of rank 0, the last 0.

    Half of it is what a rank costs in nats, to second order, with G the loss's squared gradients at the outputs.

    Args:
        weight_NK: the weight, or, of a tall one, its blocks of rows, and `shape`.
    """
    metric = Metric(importance_K=importance_K, factor=factor)
    if isinstance(weight_NK, Tensor):
        shape = (weight_NK.shape[0], weight_NK.shape[1])
        wide = wide_of(weight_NK, metric)
        blocks: Iterable[Tensor] = blocks_of(weight_NK)
    else:
        if shape is None or shape[0] < shape[1]:
            raise ValueError(f"rows are taken as they come of tall weights alone, and this one is {shape}")
        wide, blocks = torch.promote_types(metric.dtype, torch.float32), weight_NK()
    metric.check(shape[1])
    root_N = root_of(rows_N, wide)
    if isinstance(weight_NK, Tensor) and shape[0] <= shape[1]:
        gram = left_gram(weight_NK, metric, root_N, wide)
    else:
        gram = right_gram(blocks, metric, root_N, wide)
    return tails(gram)


def tails(gram: Tensor) -> Tensor:
    """Of the eigenvalues of a Gram matrix [n, n], what is left after each number of the largest: float64 [n + 1]."""
    # `torch.linalg.eigvalsh` makes vectors too where something looks on, as in a dry run.
    found: Tensor = torch.ops.aten._linalg_eigh.default(_finite(gram), "L", False)[0]
    values = found.to(torch.float64).clamp_(min=0)
    return torch.cat([values.new_zeros(1), values.cumsum(0)]).flip(0)


def error_of(
    weight_NK: Tensor, read: Callable[[slice], Tensor], metric: Metric, rows_N: Tensor | None = None
) -> float:
    """Σ_o G_o (E H Eᵀ)_oo of E = W − Ŵ, Ŵ read some rows at a time. NaN of fakes."""
    total = torch.zeros((), dtype=torch.float64)
    wide = wide_of(weight_NK, metric)
    root_N = root_of(rows_N, wide)
    for part in row_slices(weight_NK):
        off = weight_NK[part].to(wide, copy=True).sub_(read(part))
        off = weighed(metric.times(off), None if root_N is None else root_N[part])
        total += off.square_().sum()
        del off
    return float("nan") if is_fake(total) else float(total)


def wide_of(weight: Tensor, metric: Metric) -> torch.dtype:
    """fp64 if the weight or the metric is, else fp32."""
    return torch.promote_types(torch.promote_types(weight.dtype, metric.dtype), torch.float32)


def root_of(rows_N: Tensor | None, wide: torch.dtype) -> Tensor | None:
    """G^½ [N]"""
    return None if rows_N is None else positive(rows_N).sqrt_().to(wide)


def weighed(rows: Tensor, root: Tensor | None) -> Tensor:
    """G^½ [R] times rows [R, K]."""
    return rows if root is None else rows * root.unsqueeze(1)


def row_slices(weight: Tensor) -> list[slice]:
    """Blocks of rows that take some MiB in fp32."""
    step = max(1, _ROWS_NBYTES // (4 * weight.shape[1]))
    starts = range(0, weight.shape[0], step)
    return blocks_to_run([slice(start, min(start + step, weight.shape[0])) for start in starts])


def blocks_of(weight: Tensor) -> Iterator[Tensor]:
    """The rows in these blocks."""
    for part in row_slices(weight):
        yield weight[part]


def left_gram(weight: Tensor, metric: Metric, root_N: Tensor | None, wide: torch.dtype) -> Tensor:
    """Y Yᵀ [N, N], Y = G^½ W S."""
    y_NK = torch.empty(weight.shape, dtype=wide, device=weight.device)
    for part in row_slices(weight):
        y_NK[part] = metric.times(weighed(weight[part].to(wide), None if root_N is None else root_N[part]))
    return y_NK @ y_NK.t()


def right_gram(
    blocks: Iterable[Tensor], metric: Metric, root_N: Tensor | None, wide: torch.dtype
) -> Tensor:
    """Yᵀ Y = Sᵀ (Wᵀ G W) S [K, K]"""
    gram: Tensor | None = None
    start = 0
    for block in blocks:
        rows = block.shape[0]
        y = weighed(block.to(wide), None if root_N is None else root_N[start : start + rows])
        start += rows
        if gram is None:
            gram = torch.zeros(y.shape[1], y.shape[1], dtype=wide, device=y.device)
        gram.addmm_(y.t(), y)
        del block, y
    if gram is None:
        raise ValueError("a weight without rows has no factors")
    return metric.times(metric.times(gram).t())


def _finite(gram: Tensor) -> Tensor:
    """The matrix itself; ValueError where weights were not finite."""
    low, high = gram.aminmax()
    if not is_fake(gram) and not bool((high - low).isfinite()):
        raise ValueError("the weight, or what its errors count, is not finite or too large to be squared")
    return gram


def leading(gram: Tensor, rank: int) -> Tensor:
    """The leading `rank` eigenvectors [n, r] of a Gram matrix, the largest first.

    Few of a wide one are found by subspace iteration from random vectors, with QR between the products (Halko,
    Martinsson and Tropp 2011), and turned into eigenvectors of what the matrix is in their span.
    """
    width = _finite(gram).shape[0]
    if width < _RANDOMISED_FROM or rank * _FEW > width:
        vectors: Tensor = torch.linalg.eigh(gram)[1]
        return vectors[:, width - rank :].flip(1)
    random = torch.Generator(device=gram.device).manual_seed(width)
    basis = torch.randn(width, rank + _SPARE, generator=random, dtype=gram.dtype, device=gram.device)
    for _ in blocks_to_run(range(_ITERATIONS)):
        basis = torch.linalg.qr(gram @ basis)[0]
    inside = torch.linalg.eigh(basis.t() @ (gram @ basis))[1]
    found: Tensor = basis @ inside[:, _SPARE:].flip(1)
    return found



"""A weight as a product of two narrow ones, so that what it gives for the inputs it really gets changes least.

    W [N, K] ≈ A B,  A [N, r], B [r, K]          least: Σ_o G_o (E H Eᵀ)_oo,  E = W − A B

H [K, K] = E[x xᵀ] of the inputs, G [N] what errors of each output count. With H = S Sᵀ that is ‖G^½ E S‖², and by
Eckart and Young (1936) it is least for the leading singular vectors U_r Σ_r V_rᵀ of Y = G^½ W S, where it is what is
left of Σ². So

    A B = G^-½ U_r · U_rᵀ G^½ W        (N ≤ K: U from Y Yᵀ)
    A B = W S V_r · V_rᵀ S⁻¹           (N > K: V from Yᵀ Y = Sᵀ (Wᵀ G W) S, which rows are added to as they come)

S = 1 is plain SVD, S = diag(H)^½ ASVD's scaling (Yuan et al. 2023), a triangular factor of H SVD-LLM's whitening (Wang
et al. 2024), here the one that GPTQ uses. The first form never divides by S: inputs that are always 0 do no harm.
Rounding to bf16 costs the same however the factors are scaled against each other, as bf16 has exponents to spare; half
of it is undone, as the factor that is rounded second is fitted anew to the first.

Beside integers (`base`) the factors make up for what these lose: rounding what the factors leave, and factoring what
rounding loses, in turns (LoftQ, Li et al. 2023; LQ-LoRA, Guo et al. 2023), by GPTQ where H is known.

Legend of shapes: N outputs, K inputs, r rank, n the shorter of N and K, R rows of a block.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import Tensor

from memfit.packed.fake import blocks_to_run, is_fake
from memfit.packed.forms import LowRank
from memfit.packed.scheme import Scheme

from .gptq import Factor, gptq
from .made import Made
from .quantize import Quantized, dequantize, quantize
from .spectrum import (
    Metric,
    RowBlocks,
    blocks_of,
    error_of,
    errors_by_rank,
    leading,
    left_gram,
    right_gram,
    root_of,
    row_slices,
    weighed,
    wide_of,
)

ROUNDS: Final = 4
"""Turns that integers and the factors beside them take; the best is kept."""


@torch.no_grad()
def factorize(
    weight_NK: Tensor, form: LowRank, *, importance_K: Tensor | None = None, factor: Factor | None = None,
    rows_N: Tensor | None = None, right: Tensor | None = None, rounds: int = ROUNDS,
) -> Made:  # fmt: skip
    """The factors of a weight [N, K], and the integers that they go beside, if the form has them.

    Args:
        importance_K, factor: what errors of inputs count; see `Metric`.
        rows_N: G, what errors of outputs count; None: all the same.
        right: B [r, K], as `right_factors` found it, where these are some rows of a weight: theirs is then A alone, and
            the integers are those of rounding alone.
        rounds: turns of integers and factors. However few, the error is not above that of the integers alone.

    Raises:
        ValueError: a shape that has no such form, weights or importances that are not finite.
    """
    metric = Metric(importance_K=importance_K, factor=factor)
    shape = _checked(weight_NK, form, metric, some=right is not None)
    if right is not None:
        return _some_rows(weight_NK, form, metric, right)
    if form.base is None:
        left, right = rounded(weight_NK, form.rank, metric, rows_N)
        return Made(form=form, shape=shape, parts={"weight_left": left, "weight_right": right})
    base, left, right = _beside(weight_NK, _scheme(form), form.rank, metric, rows_N, rounds)
    return Made(form=form, shape=shape, parts={"weight_left": left, "weight_right": right}, base=base)


@torch.no_grad()
def factors(
    weight_NK: Tensor, rank: int, metric: Metric | None = None, rows_N: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A [N, r] and B [r, K], not rounded: in fp64 if the weight or the metric is, else in fp32."""
    metric = metric or Metric()
    wide = wide_of(weight_NK, metric)
    root_N = root_of(rows_N, wide)
    if weight_NK.shape[0] <= weight_NK.shape[1]:
        u_Nr = leading(left_gram(weight_NK, metric, root_N, wide), rank)
        right = u_Nr.t() @ weighed(weight_NK.to(wide), root_N)
        return (u_Nr if root_N is None else u_Nr / root_N.unsqueeze(1)), right
    v_Kr = leading(right_gram(blocks_of(weight_NK), metric, root_N, wide), rank)
    right = metric.divided(v_Kr.t())
    left = torch.cat([metric.times(block.to(wide)) @ v_Kr for block in blocks_of(weight_NK)])
    return left, right


@torch.no_grad()
def rounded(
    weight_NK: Tensor, rank: int, metric: Metric | None = None, rows_N: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A [N, r] and B [r, K] in bf16: one is rounded, the other fitted to it anew, and rounded."""
    metric = metric or Metric()
    if weight_NK.shape[0] > weight_NK.shape[1]:
        made = right_of(lambda: blocks_of(weight_NK), tuple(weight_NK.shape), rank, metric, rows_N)
        return balanced(torch.cat([made.left(block) for block in blocks_of(weight_NK)]), made.right)
    wide = wide_of(weight_NK, metric)
    root_N = root_of(rows_N, wide)
    u_Nr = leading(left_gram(weight_NK, metric, root_N, wide), rank)
    left = (u_Nr if root_N is None else u_Nr / root_N.unsqueeze(1)).to(torch.bfloat16).contiguous()
    del u_Nr
    return balanced(left, fitted_right(left, weight_NK, root_N))


def balanced(left_Nr: Tensor, right_rK: Tensor) -> tuple[Tensor, Tensor]:
    """The same product, each column of A about as large as its row of B: by powers of two, which bf16 holds exactly.

    It is for who learns them further: steps that suit one then suit the other.
    """
    norms = [torch.linalg.vector_norm(t.float(), dim=dim) for t, dim in ((left_Nr, 0), (right_rK, 1))]
    exponent = (norms[1] / norms[0]).sqrt_().log2_().round_().nan_to_num_(0.0, 0.0, 0.0).clamp_(-60, 60)
    by = exponent.exp2_().to(torch.bfloat16)
    return left_Nr * by, right_rK / by.unsqueeze(1)


def fitted_right(left_Nr: Tensor, weight_NK: Tensor, root_N: Tensor | None) -> Tensor:
    """B [r, K] in bf16 that is best beside a given A [N, r], whatever inputs count: (Aᵀ G A)⁻¹ Aᵀ G W."""
    wide = torch.float64 if weight_NK.dtype == torch.float64 else torch.float32
    root_N = None if root_N is None else root_N.to(wide)
    a_Nr = weighed(left_Nr.to(wide), root_N)
    gram = a_Nr.t() @ a_Nr
    sums = torch.zeros(a_Nr.shape[1], weight_NK.shape[1], dtype=wide, device=weight_NK.device)
    for part in row_slices(weight_NK):
        block = weighed(weight_NK[part].to(wide), None if root_N is None else root_N[part])
        sums.addmm_(a_Nr[part].t(), block)
        del block
    return _solve(gram, sums).to(torch.bfloat16).contiguous()


@dataclass(frozen=True)
class Right:
    """The right factor of a weight, and what makes the left one of any rows of it."""

    right: Tensor
    """B bf16 [r, K]"""
    across: Tensor
    """H Bᵀ (B H Bᵀ)⁻¹ [K, r]"""

    def left(self, block: Tensor) -> Tensor:
        """A bf16 [R, r] of some rows [R, K], best beside B for them."""
        return (block.to(self.across.dtype) @ self.across).to(torch.bfloat16)


@torch.no_grad()
def right_of(
    blocks: RowBlocks, shape: tuple[int, ...], rank: int, metric: Metric | None = None, rows_N: Tensor | None = None
) -> Right:
    """What the factors of a tall weight [N, K] are made with, from one pass over its rows: no more of them is held than
    a block, and beside it a few matrices [K, K].

    Raises:
        ValueError: rows that are not finite.
    """
    metric = metric or Metric()
    metric.check(shape[1])
    wide = torch.promote_types(metric.dtype, torch.float32)
    gram = right_gram(blocks(), metric, None if rows_N is None else root_of(rows_N, wide), wide)
    return right_from(leading(gram, rank), metric)


def right_from(v_Kr: Tensor, metric: Metric) -> Right:
    """B = Vᵀ S⁻¹, rounded, and what fits A to it."""
    right = metric.divided(v_Kr.t()).to(torch.bfloat16).contiguous()
    return fitted_left(right, metric, v_Kr.dtype)


def fitted_left(right_rK: Tensor, metric: Metric, wide: torch.dtype = torch.float32) -> Right:
    """What makes the best A beside a given B [r, K]."""
    root_rK = metric.times(right_rK.to(wide))
    gram = root_rK @ root_rK.t()
    across = metric.times_turned(root_rK)
    del root_rK
    return Right(right_rK, _solve(gram, across).t())


@torch.no_grad()
def streamed(
    blocks: RowBlocks, shape: tuple[int, int], form: LowRank, *, importance_K: Tensor | None = None,
    factor: Factor | None = None, rows_N: Tensor | None = None,
) -> tuple[Tensor, Iterator[tuple[Tensor, Quantized | None]]]:  # fmt: skip
    """As `factorize` of a weight that comes in blocks of rows, in two passes: B first; then A of each block, in bf16,
    and the integers that it goes beside.

    The integers are those of rounding alone, in one turn, and not a codebook's.

    Raises:
        ValueError: as `factorize`.
    """
    metric = Metric(importance_K=importance_K, factor=factor)
    metric.check(shape[1])
    if (reason := form.why_not(shape)) is not None:
        raise ValueError(f"{form.name} cannot store {shape}: {reason}")
    made = right_of(lambda: _lost_blocks(blocks(), form, metric), shape, form.rank, metric, rows_N)

    def lefts() -> Iterator[tuple[Tensor, Quantized | None]]:
        for block in blocks():
            integers = None if form.base is None else _integers(block, _scheme(form), metric)
            yield made.left(block if integers is None else _lost(block, integers)), integers

    return made.right, lefts()


@torch.no_grad()
def right_factors(
    rows: Iterable[Tensor], forms: Sequence[LowRank], *, importance_K: Tensor | None = None,
    factor: Factor | None = None, rows_N: Tensor | None = None,
) -> dict[LowRank, Tensor]:  # fmt: skip
    """B [r, K] by form, all of one base, from one pass over a weight's blocks of rows; with it `factorize` makes A of
    each block."""
    metric = Metric(importance_K=importance_K, factor=factor)
    wide = torch.promote_types(metric.dtype, torch.float32)
    root_N = None if rows_N is None else root_of(rows_N, wide)
    gram = right_gram(_lost_blocks(rows, forms[0], metric), metric, root_N, wide)
    # The largest first: of every rank the leading ones.
    v_Kr = leading(gram, max(form.rank for form in forms))
    return {form: right_from(v_Kr[:, : form.rank], metric).right for form in forms}


def _lost_blocks(blocks: Iterable[Tensor], form: LowRank, metric: Metric) -> Iterator[Tensor]:
    """What the factors are of: the weight, or what its integers lose."""
    for block in blocks:
        yield block if form.base is None else _lost(block, _integers(block, _scheme(form), metric))
        del block


def _some_rows(weight: Tensor, form: LowRank, metric: Metric, right: Tensor) -> Made:
    base = None if form.base is None else _integers(weight, _scheme(form), metric)
    rest = weight if base is None else _lost(weight, base)
    left = fitted_left(right, metric, wide_of(weight, metric)).left(rest)
    shape = (weight.shape[0], weight.shape[1])
    return Made(form=form, shape=shape, parts={"weight_left": left, "weight_right": right}, base=base)


def _scheme(form: LowRank) -> Scheme:
    if not isinstance(form.base, Scheme):
        raise ValueError(f"{form.name} differs from a weight that others share: `share.share` makes both")
    return form.base


def rank_for(shape: tuple[int, int], nbytes: int, base: Scheme | None = None) -> int:
    """The largest rank with which a weight [N, K] takes at most `nbytes`; 0 if there is none."""
    left = nbytes - (0 if base is None else base.nbytes(shape))
    return max(0, min(min(shape), left // (2 * (shape[0] + shape[1]))))


def _beside(
    weight_NK: Tensor, scheme: Scheme, rank: int, metric: Metric, rows_N: Tensor | None, rounds: int
) -> tuple[Quantized, Tensor, Tensor]:
    """Integers and factors in turns; those of the turn with the smallest error."""
    best: tuple[Quantized, Tensor, Tensor] | None = None
    least = float("inf")
    rest = weight_NK
    for _ in blocks_to_run(range(max(1, rounds))):
        base = _integers(rest, scheme, metric)
        del rest
        lost = _lost(weight_NK, base)
        left, right = rounded(lost, rank, metric, rows_N)
        error = error_of(lost, partial(_product, left, right), metric, rows_N)
        wide = lost.dtype
        del lost
        if best is None or error < least:
            best, least = (base, left, right), error
        rest = torch.empty_like(weight_NK, dtype=wide)
        for part in row_slices(rest):
            torch.addmm(weight_NK[part].to(wide), left[part].to(wide), right.to(wide), alpha=-1, out=rest[part])
        del base, left, right
    assert best is not None
    return best


def _product(left: Tensor, right: Tensor, part: slice) -> Tensor:
    return left[part].float() @ right.float()


def _integers(weight: Tensor, scheme: Scheme, metric: Metric) -> Quantized:
    if metric.factor is not None:
        return gptq(weight, metric.factor, scheme).quantized
    importance = None if metric.importance is None else metric.importance.to(torch.float32)
    return quantize(weight, scheme, importance=importance)


def _lost(weight: Tensor, base: Quantized) -> Tensor:
    """w − ŵ in fp32, in fp64 if the weight is."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return weight.to(wide, copy=True).sub_(dequantize(base))


def _checked(weight: Tensor, form: LowRank, metric: Metric, *, some: bool) -> tuple[int, int]:
    """The shape; `some`: of rows of a weight, which may be fewer than its rank."""
    if weight.dim() != 2:
        raise ValueError(f"factors are of a weight [N, K], got shape {tuple(weight.shape)}")
    shape = (weight.shape[0], weight.shape[1])
    if (reason := form.why_not((max(shape[0], form.rank), shape[1]) if some else shape)) is not None:
        raise ValueError(f"{form.name} cannot store {shape}: {reason}")
    metric.check(shape[1])
    return shape


def _solve(gram: Tensor, right: Tensor) -> Tensor:
    """X with gram X = right, of a Gram matrix that may be singular: some of its mean is then added."""
    mean, damping = gram.diagonal().mean(), 0.0
    for _ in range(6):
        lower, failed = torch.linalg.cholesky_ex(gram)
        if is_fake(gram) or not int(failed):
            solved: Tensor = torch.cholesky_solve(right, lower)
            return solved
        damping = max(1e-6, 10 * damping)
        gram = gram + damping * mean * torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    raise ValueError("factors cannot be fitted: what their inputs count is not finite, or all 0")


__all__ = [
    "Right", "balanced", "errors_by_rank", "factorize", "factors", "fitted_left", "fitted_right", "rank_for",
    "right_factors", "right_from", "right_of", "rounded", "streamed",
]  # fmt: skip

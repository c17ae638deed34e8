"""GPTQ: a weight's values chosen column by column, each making up for the errors of those before it.

    H [K, K] = E[x xᵀ] of the inputs          least: tr((W − Ŵ) H (W − Ŵ)ᵀ)

Legend of shapes: N outputs (rows), K inputs (columns), G groups of a row, R rows of a block, B columns of a block.

With H = R Rᵀ, R upper triangular, the error of a row is Σ_j (Σ_{i≤j} d_i R_ij)², d = w − ŵ. Taken in order, column j
makes its term least where ŵ_j is nearest to

    t_j = w_j + Σ_{i<j} d_i M_ij,          M = R / diag(R)

This is Babai's nearest plane (1986), and it is GPTQ (Frantar et al. 2023), as Chen et al. 2025 ("The geometry of LLM
quantization") show: the same choices, without H's inverse and with one triangular product in place of updates of all
columns that follow. Columns go in the order of diag(H), the largest first, while groups stay as they lie in the file.
Scales are those of `quantize`'s search, chosen before, for the least Σ_j R_jj² d_j².

Where layers before have been rounded, x̂ comes in place of x. W x is then best given by W x̂ + W (x − x̂) as far as that
is linear in x̂: W′ = W + W E[(x − x̂) x̂ᵀ] H⁻¹ (`corrected`), which is rounded in W's place, with H = E[x̂ x̂ᵀ]. So
errors do not add up from layer to layer (GPTAQ, Li et al. 2025; QEP, Arai and Ichikawa 2025).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from memfit.packed.fake import blocks_to_run, is_fake
from memfit.packed.levels import scale_values
from memfit.packed.scheme import Scheme

from .float_values import Grid
from .in_place import cholesky_in_place, permute_both, turn_around
from .quantize import Quantized, quantize
from .vectors import Vectors

DAMPING: Final = 0.01
"""Of mean(diag H), unless H needs more."""
_COLUMNS: Final = 128
"""Columns whose errors are spread one at a time; those of earlier blocks come by one product."""
_STRIP: Final = 16
"""Columns of those whose errors go to each other as they come: few, so that they stay in the second-level cache."""
_ROWS: Final = 2048
"""Rows that are worked on at once: enough that a column's vectors take longer than their calls."""
_MOST_BY_TOKENS: Final = 0.2
_RAISED_BY: Final = 10.0
_MOST_DAMPING: Final = 1.0


def damping_for(inputs: int, tokens: int, *, ridge: float = 1.0) -> float:
    """Of mean(diag H), where H [K, K] is a mean over so many tokens: the fewer there are for each input, the less its
    small eigenvalues tell of another text, as a ridge regression's best ridge grows with parameters over samples.

    `ridge` is the damping where there are as many tokens as inputs.

    On 32 x 512 tokens MiniLM errs on other text, beside a ridge of 0.3, by 4 to 7 % less at 4 to 2 bits (by
    `tuned` at 2 bits 11 %). Gemma 3 270M errs by 2 % less at 4 bits and as much at 2, all of it by codebooks by 2 %
    less at 3 and 2; its layers by codebooks by 3 to 4 % more at 3 and 2, and by 19 % more at 8 bits. The demo model
    errs by 1 to 4 % more, and with less than 0.01 by 3 % more at 2 bits.
    """
    return min(max(ridge * inputs / max(tokens, 1), DAMPING), _MOST_BY_TOKENS)


@dataclass(frozen=True, kw_only=True)
class Compensated:
    """What GPTQ made of one weight."""

    quantized: Quantized
    damping: float
    """Of mean(diag H), added to the diagonal: more than asked for if H was not positive definite with that."""
    error: Tensor
    """(w − ŵ) H (w − ŵ)ᵀ of each row [N], H damped."""


@dataclass(frozen=True, kw_only=True)
class Gptq:
    """The technique."""

    scheme: Scheme
    damping: float = DAMPING

    def __post_init__(self) -> None:
        if not 0 < self.damping <= _MOST_DAMPING:
            raise ValueError(f"damping must be above 0 and at most {_MOST_DAMPING:g}, got {self.damping}")

    def why_not(self, shape: tuple[int, ...]) -> str | None:
        """Why a weight of this shape cannot be quantised so; None if it can."""
        return self.scheme.why_not(shape)

    def apply(self, weight: Tensor, hessian: Tensor) -> Compensated:
        """Quantise `weight` [N, K] for inputs with E[x xᵀ] = `hessian` [K, K]; see `gptq`."""
        return gptq(weight, hessian, self.scheme, damping=self.damping)


@dataclass(frozen=True)
class Factor:
    """H made ready for any number of weights that read the same inputs."""

    order: Tensor
    """[K]: columns in the order that they are taken in, if nothing else was asked for from the largest diag(H) on."""
    coupling: Tensor
    """M [K, K] in that order: upper triangular, ones on the diagonal."""
    weights: Tensor
    """diag(R)² [K] in that order: what a column's own squared error counts."""
    importance: Tensor
    """diag(H) [K], in the file's order."""
    dead: Tensor
    """[K]: inputs that are always 0; their weights are stored as 0."""
    damping: float

    def own_weights(self) -> Tensor:
        """`weights` [K] in the file's order, fp32, of dead inputs 0: what scales are searched with.

        Where those that follow make up for an error, this is what is left of it, while diag(H) counts what they take
        over too: beside a search with that, what GPTQ errs by falls by 4 to 29 % (Gemma 3 270M, block 8, all widths).
        """
        own = torch.empty_like(self.weights).index_copy_(0, self.order, self.weights)
        return own.masked_fill_(self.dead, 0.0).to(torch.float32)


def factor(
    hessian: Tensor, *, damping: float = DAMPING, overwrite: bool = False, order: Tensor | None = None
) -> Factor:
    """R of H + damping · mean(diag H) · I = R Rᵀ, in the order that columns are taken in.

    Beside one matrix [K, K] it takes some blocks of it.

    Args:
        hessian: E[x xᵀ] [K, K], symmetric.
        damping: raised tenfold at a time, up to 1, where H is not positive definite with it.
        overwrite: whether R may be made in H's own memory; else H is not changed.
        order: [K], the order that columns are taken in; None: from the largest diag(H) to the smallest.

    Raises:
        ValueError: H is not square, not finite, has a negative diagonal, or no damping makes it positive definite.
    """
    if hessian.dim() != 2 or hessian.shape[0] != hessian.shape[1]:
        raise ValueError(f"a Hessian is [K, K], got shape {tuple(hessian.shape)}")
    wide = _wide(hessian.dtype)
    diagonal = hessian.diagonal().to(wide, copy=True)
    real = not is_fake(hessian)
    low, high = hessian.aminmax()  # of NaN both are NaN; and no copy, as `isfinite` makes
    if real and not (bool((high - low).isfinite()) and bool(diagonal.amin() >= 0)):
        raise ValueError("the Hessian has entries that are not finite, or a negative diagonal")
    dead = diagonal == 0
    mean = diagonal.mean()
    if real and not bool(mean > 0):
        raise ValueError(
            "the Hessian is 0: no input was ever anything else. Calibrate on other text, or take less from the layers "
            "before."
        )
    order = largest_first(diagonal) if order is None else order
    # H = R Rᵀ with R upper: the lower factor of H with rows and columns turned around, turned back.
    made = hessian if overwrite and hessian.dtype == wide else hessian.to(wide, copy=True)
    permute_both(made, order.flip(0))
    turned = made.diagonal().clone()
    while not cholesky_in_place(made, turned + damping * mean):
        if damping * _RAISED_BY > _MOST_DAMPING:
            raise ValueError(f"the Hessian is not positive definite, with {damping:g} of its mean diagonal added too")
        damping *= _RAISED_BY
    made.tril_()
    turn_around(made)
    own = made.diagonal().clone()
    made.div_(own)
    return Factor(order, made, own.square_(), diagonal, dead, damping)


def largest_first(diagonal: Tensor, together: int = 1) -> Tensor:
    """The columns [K] from the largest diag(H) to the smallest; so many that lie beside each other stay together."""
    return in_runs(diagonal.view(-1, together).sum(1).argsort(descending=True, stable=True), together)


def in_runs(first: Tensor, together: int) -> Tensor:
    """The columns [K] of runs of so many, in the order of the runs."""
    return first.mul(together).unsqueeze(1).add(torch.arange(together, device=first.device)).view(-1)


@torch.no_grad()
def corrected(weight: Tensor, moved: Tensor, made: Factor, *, rows: int = _ROWS) -> Tensor:
    """W′ [N, K] = W + D H⁻¹ in fp32 (fp64 if H is): the weight that gives for x̂ what W [N, K] gave for x.

    It minimises E‖W x − W′ x̂‖² + λ ‖W′ − W‖², λ the damping that `made` was made with.

    Args:
        moved: D = W E[(x − x̂) x̂ᵀ] [N, K]; is overwritten.
        made: of H = E[x̂ x̂ᵀ].
        rows: worked on at once.
    """
    out = moved if moved.dtype == made.coupling.dtype else torch.empty(moved.shape, dtype=made.coupling.dtype)
    for start in blocks_to_run(range(0, moved.shape[0], rows)):
        part = slice(start, start + rows)
        turned = moved[part].to(out.dtype).index_select(1, made.order)
        # H = M diag(r) Mᵀ in that order: D H⁻¹ = D M⁻ᵀ diag(1/r) M⁻¹.
        turned = _solved(made.coupling.t(), turned, upper=False).div_(made.weights)
        turned = _solved(made.coupling, turned, upper=True)
        out[part].index_copy_(1, made.order, turned).add_(weight[part])
        del turned
    return out


def _solved(triangle: Tensor, right: Tensor, *, upper: bool) -> Tensor:
    """X with X · triangle = right [R, K], the triangle's diagonal taken as 1."""
    solved: Tensor = torch.linalg.solve_triangular(triangle, right, upper=upper, left=False, unitriangular=True)
    return solved


@torch.no_grad()
def agreement(first: Tensor, second: Tensor, made: Factor) -> float:
    """How much of D two halves of the text agree on, from 0 to 1: a correction of that much errs least on other text.

    With D = signal + noise, the noise of the halves is independent: Σ D₁ H⁻¹ D₂ᵀ is the signal's part of
    Σ D H⁻¹ Dᵀ, D = (D₁ + D₂) / 2. Few tokens for the layer's width leave little of it.

    Args:
        first, second: D₁ and D₂ [S, K], or sums of their rows with random signs, which give the same on average.
    """
    across, weights = made.coupling.t(), made.weights.sqrt()

    def measured(half: Tensor) -> Tensor:
        """Z with Z Zᵀ = D H⁻¹ Dᵀ."""
        ordered = half.to(across.dtype).index_select(1, made.order)
        solved = _solved(across, ordered, upper=False)
        return solved.div_(weights)

    one, two = measured(first), measured(second)
    signal, whole = (one * two).sum(), (one + two).square_().sum().div_(4)
    if is_fake(whole):
        return 1.0
    return min(1.0, max(0.0, float(signal / whole))) if float(whole) > 0 else 0.0


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.no_grad()
def gptq(
    weight: Tensor, hessian: "Tensor | Factor", scheme: Scheme, *, damping: float = DAMPING, block: int = _COLUMNS,
    rows: int | None = None, table: Tensor | None = None,
) -> Compensated:  # fmt: skip
    """The integers of weight [N, K] for inputs with E[x xᵀ] = `hessian`: scales as searched, values by GPTQ.

    Args:
        weight: in any float type; computed in fp32, in fp64 if H is.
        hessian: H [K, K], or what `factor` made of it, for all weights that read the same inputs.
        damping: see `factor`; of no use with a factor.
        block: columns whose errors are spread one at a time.
        rows: worked on at once; None: `_ROWS`. No row depends on another.
        table: a codebook's levels, where these are not all of its rows.

    Raises:
        ValueError: as `quantize` and `factor` do; a Hessian of another width; of vectors a factor in whose order their
            columns do not come one after another (`largest_first`).
    """
    if isinstance(hessian, Factor):
        made = hessian
    else:
        made = factor(hessian, damping=damping, order=largest_first(hessian.diagonal(), scheme.vector))
    if made.order.shape[0] != weight.shape[-1]:
        raise ValueError(f"the Hessian is of {made.order.shape[0]} inputs, the weight has {weight.shape[-1]}")
    found = quantize(weight, scheme, importance=made.own_weights(), table=table)
    errors = torch.empty(weight.shape[0], dtype=made.coupling.dtype, device=weight.device)
    group_of = torch.arange(weight.shape[1], device=weight.device).div_(
        weight.shape[1] // found.scale.shape[1], rounding_mode="floor"
    )
    step = rows or _ROWS
    for start in blocks_to_run(range(0, weight.shape[0], step)):
        part = slice(start, min(start + step, weight.shape[0]))
        choose = _chooser(found, made)
        errors[part] = _compensate(weight, found, made, group_of[made.order], part, block, choose)
    return Compensated(quantized=found, damping=made.damping, error=errors)


@torch.no_grad()
def integer_errors(weight_NK: Tensor, made: Factor, schemes: Sequence[Scheme]) -> Tensor:
    """What `gptq` errs by in each of several schemes: (w − ŵ) H (w − ŵ)ᵀ of each row [S, N], H damped.

    All go through the columns together, as rows of one weight: what a column takes is mostly its calls.

    Args:
        schemes: of integers, either all symmetric or none.
    """
    count, size = weight_NK.shape
    found = [quantize(weight_NK, scheme, importance=made.own_weights()) for scheme in schemes]
    finest = math.lcm(*(one.scale.shape[1] for one in found))

    def spread(parts: list[Tensor]) -> Tensor:
        return torch.cat([part.repeat_interleave(finest // part.shape[1], dim=1) for part in parts])

    zeros = [one.zero for one in found if one.zero is not None]
    rows = Quantized(
        scheme=schemes[0], q=torch.empty(len(schemes) * count, size, dtype=torch.int8, device=weight_NK.device),
        scale=spread([one.scale for one in found]), zero=spread(zeros) if zeros else None,
    )  # fmt: skip
    del found, zeros
    halves = [2 ** (scheme.bits - 1) for scheme in schemes]
    half_R = torch.tensor(halves, dtype=made.coupling.dtype, device=weight_NK.device).repeat_interleave(count)
    group_of = torch.arange(size, device=weight_NK.device).div_(size // finest, rounding_mode="floor")
    stacked = weight_NK.repeat(len(schemes), 1)
    errors = torch.empty(stacked.shape[0], dtype=made.coupling.dtype, device=weight_NK.device)
    for start in blocks_to_run(range(0, stacked.shape[0], _ROWS)):
        part = slice(start, min(start + _ROWS, stacked.shape[0]))
        choose = _integers(half_R[part], half_R[part] - 1)
        errors[part] = _compensate(stacked, rows, made, group_of[made.order], part, _COLUMNS, choose)
    return errors.view(len(schemes), count)


def _compensate(
    weight: Tensor, found: Quantized, made: Factor, group_K: Tensor, rows: slice, block: int, choose: "_Choose"
) -> Tensor:
    """Choose q of some rows anew, in place; their errors [R].

    Errors of earlier blocks of columns come by one product, those of earlier strips of the block by another; column by
    column only a strip's are spread, in vectors over all rows that stay in the cache.
    """
    wide, order = made.coupling.dtype, made.order
    w_KR = weight[rows].to(wide).index_select(1, order).t().contiguous()
    w_KR.masked_fill_(made.dead[order].unsqueeze(1), 0.0)
    scale_GR = scale_values(found.scale[rows]).to(wide).t().contiguous()
    zero_GR = None if found.zero is None else found.zero[rows].to(wide).t().contiguous()
    columns, width = w_KR.shape
    q_KR = torch.empty(columns, width, dtype=torch.int8, device=weight.device)
    error = torch.zeros(width, dtype=wide, device=weight.device)
    level_BR, read_BR = (torch.empty(min(block, columns), width, dtype=wide) for _ in range(2))
    vector = found.scheme.vector
    stored_vR = torch.empty(vector, width, dtype=torch.bfloat16)
    for first in blocks_to_run(range(0, columns, block)):
        last = min(first + block, columns)
        near = made.coupling[first:last, first:last]
        # What is done of w holds d = w − ŵ.
        t_BR = torch.addmm(w_KR[first:last], made.coupling[:first, first:last].t(), w_KR[:first])
        groups = group_K[first:last]
        s_BR = scale_GR.index_select(0, groups)
        z_BR = None if zero_GR is None else zero_GR.index_select(0, groups)
        for strip in blocks_to_run(range(0, last - first, _STRIP)):
            end = min(strip + _STRIP, last - first)
            t_BR[strip:end].addmm_(near[:strip, strip:end].t(), w_KR[first : first + strip])
            for j in blocks_to_run(range(strip, end, vector)):
                part = slice(j, j + vector)
                read, d_vR = read_BR[part], w_KR[first + j : first + j + vector]
                zero = None if z_BR is None else z_BR[part]
                choose(t_BR[part], d_vR, s_BR[part], zero, level_BR[part], read, first + j)
                read.copy_(stored_vR.copy_(read))
                d_vR.sub_(read)
                for i in range(vector):
                    if (after := j + i + 1) < end:
                        t_BR[after:end].addr_(near[after - 1, after:end], d_vR[i])
        q_KR[first:last].copy_(level_BR[: last - first])
        t_BR.sub_(read_BR[: last - first]).square_()
        error.addmv_(t_BR.t(), made.weights[first:last])
        del t_BR, s_BR, z_BR
    del w_KR, level_BR, read_BR
    q_NK = torch.empty_like(q_KR)
    q_NK.index_copy_(0, order, q_KR)
    found.q[rows].copy_(q_NK.t())
    return error


def _chooser(found: Quantized, made: Factor) -> "_Choose":
    """What finds the stored values nearest to t, of one column or of those of a vector, with the first's place in the
    order: for weights w, scales s and zero points z (None: 0), all [v, R]; q goes into `level`, and what is rounded to
    ŵ into `read`."""
    if found.scheme.vector != 1:
        assert found.table is not None, "a codebook has one"
        vectors = Vectors(found.scheme, found.table, made.coupling, made.weights, made.order)
        return lambda t, w, s, z, level, read, first: vectors.choose(t, w, s, level, read, first)
    if found.scheme.values != "int":
        grid = Grid(found.scheme, found.table, dtype=made.coupling.dtype)
        return lambda t, w, s, z, level, read, first: grid.round(t[0], s[0], level[0], read[0])
    half = 2 ** (found.scheme.bits - 1)
    return _integers(half, half - 1)


def _integers(half: "Tensor | int", most: "Tensor | int") -> "_Choose":
    """Of integers from −half to `most`; tensors [R]: each row's own."""
    least = -half

    def integer(t: Tensor, _w: Tensor, s: Tensor, z: Tensor | None, level: Tensor, read: Tensor, _: int) -> None:
        torch.div(t, s, out=level)
        if z is None:
            level.round_().clamp_(least, most)  # type: ignore[arg-type, unused-ignore]
            torch.mul(level, s, out=read)
        else:
            level.add_(z).round_().clamp_(least, most)  # type: ignore[arg-type, unused-ignore]
            torch.sub(level, z, out=read).mul_(s)

    return integer


_Choose = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor, int], None]


__all__ = [
    "DAMPING", "Compensated", "Factor", "Gptq", "agreement", "corrected", "factor", "gptq", "in_runs", "integer_errors",
    "largest_first",
]  # fmt: skip

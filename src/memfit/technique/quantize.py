"""Groupwise integers of 2 to 8 bits, their scales searched for the smallest weighted error.

Values that are no integers have files of their own, `float_values` and `codebook`; `quantize` is the door to all.

    w [N, K] -> q int8 [N, K], scale bf16 [N, G], zero int8 [N, G]        ŵ = bf16((q − z) · s)

Legend of shapes: N outputs (rows), K inputs, G groups of a row, g inputs of a group, R rows of a block.

All work is done on blocks of rows laid out as [G, g, R]: the sums over a group and the spreading of its scale
are then plain vector operations over R, whatever the group's size.

One group is described by a positive step s and by the lowest of its 2^b consecutive levels, L: w ≈ s·d with
d in [L, L + 2^b − 1]. All kinds of integers are cases of it:

    asymmetric           q = d − L − 2^(b−1),  z = −L − 2^(b−1),  scale = s     L from −(2^b − 1) to 0
    symmetric            q = d,                                   scale = s     L = −2^(b−1)
    symmetric, flipped   q = −d,                                  scale = −s    L = 1 − 2^(b−1)
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from memfit.packed.fake import blocks_to_run, is_fake
from memfit.packed.levels import expand
from memfit.packed.scheme import Scheme

from .codebook import learn
from .float_values import find_levels
from .nearest import SMALLEST, require_held, round_to_nearest, stored
from .vectors import find_vectors, learn_vectors

WORKSPACE_NBYTES: Final = 8 * 2**20
"""Most bytes of temporaries at one moment, whatever the weight's size (but never less than one row takes).

Small, for speed too: two cores then keep their halves of all buffers in the second-level cache, and each
elementwise pass takes 0.1 ns a weight and core instead of 0.15 to 0.5.
"""

_FLOATS_A_WEIGHT: Final = 6.25
"""fp32 values of workspace for each weight of a block: u, a·u and two buffers, a bf16 copy, and what is kept
for each group (some twenty values, of 32 weights at least). Measured: 5.7 to 6.2."""

# Where the largest magnitude of a group is put, in steps: symmetric RTN puts it at (2^b − 1)/2; what is put
# beyond the outermost level is clipped. Measured with these grids on normal, Laplace and t(4) weights, error
# against RTN's and against a dense search's: 2 bits g64 0.47 and 1.00, 3 bits g128 0.58 and 1.00, 4 bits g128
# 0.75 and 1.00, 6 bits g128 0.90 and 1.01, 8 bits a row 0.97 and 1.01; with importances that differ a
# thousandfold 0.38, 0.49, 0.61, 0.77, 0.90, and up to 1.02, at 6 and 8 bits 1.04.
_SYMMETRIC_GRID: Final[dict[int, tuple[float, ...]]] = {
    2: (0.9, 1.0, 1.15, 1.3, 1.5, 1.75, 2.0, 2.3, 2.7, 3.2),
    3: (2.6, 2.9, 3.2, 3.5, 3.8, 4.1, 4.5, 5.0, 5.6, 6.4),
    4: (6.6, 7.0, 7.4, 7.8, 8.2, 8.7, 9.3, 10.0, 11.0, 12.5),
    5: (14.6, 15.2, 15.8, 16.4, 17.0, 17.8, 19.0, 21.0),
    6: (29.5, 30.5, 31.5, 32.5, 33.5, 36.0, 40.0),
    7: (59.0, 60.5, 62.0, 63.5, 65.0, 68.0, 74.0),
    8: (119.0, 122.0, 124.5, 127.5, 131.0, 138.0),
}
# Asymmetric: by what the range from the smallest to the largest weight (0 included) is shrunk.
_ASYMMETRIC_GRID: Final[dict[int, tuple[float, ...]]] = {
    2: (1.2, 1.0, 0.88, 0.77, 0.68, 0.6, 0.52, 0.44),
    3: (1.05, 0.97, 0.89, 0.82, 0.75, 0.68, 0.6, 0.5),
    4: (1.03, 0.97, 0.92, 0.87, 0.81, 0.74, 0.65),
    5: (1.05, 1.0, 0.95, 0.9, 0.84, 0.77, 0.7),
    6: (1.08, 1.03, 0.98, 0.93, 0.88, 0.82),
    7: (1.04, 1.0, 0.96, 0.92),
    8: (1.02, 0.99, 0.96, 0.92),
}
# Steps in standard deviations: of the uniform quantiser best for a normal distribution (J. Max, 1960).
# They start the search where the largest weights are unimportant outliers.
_STEP_OF_DEVIATION: Final[dict[int, float]] = {
    2: 0.996, 3: 0.586, 4: 0.335, 5: 0.188, 6: 0.104, 7: 0.0569, 8: 0.0308,
}  # fmt: skip
_AROUND: Final = (0.7, 1.0, 1.4)
"""Multiples of that step that are tried."""
_LEAST_DEVIATION: Final = 2.0**-12
"""Of the largest magnitude, about: keeps steps from vanishing where all that is important is 0."""
_SHIFTED_BITS: Final = 6
"""Up to this width the asymmetric search also tries levels moved by one step down and up."""
_ALTERNATIONS: Final = 2
_COARSE: Final = 2**5 - 1
"""Spans of levels up to which candidates are told apart by their gains in fp32."""
_NEIGHBOURS: Final[dict[int, tuple[int, ...]]] = {
    2: (0,), 3: (0,), 4: (0, -1, 1), 5: (0, -1, 1), 6: (0, -1, 1), 7: (0, -1, 1, -2, 2), 8: (0, -1, 1, -2, 2),
}  # fmt: skip
"""bf16 numbers below and above the best step that are tried as the stored scale: bf16 steps are 0.4 to 0.8 %,
which at 8 bits moves the outermost level by half a step or more."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Quantized:
    """The values of one weight, as stored: ŵ = bf16((q − zero) · scale), or as `packed.levels` says."""

    scheme: Scheme
    q: Tensor
    """int8 [N, K] in [−2^(b−1), 2^(b−1) − 1]."""
    scale: Tensor
    """bf16 [N, G]; negative in some groups if symmetric. MXFP4: E8M0's exponents, uint8."""
    zero: Tensor | None
    """int8 [N, G], in q's range; None if symmetric."""
    table: Tensor | None = None
    """bf16 [2^b]: a codebook's levels, of vectors [2^(b·v), v]; None for any other values."""


@dataclass(frozen=True, kw_only=True)
class Quantize:
    """The technique: weights as integers of one scheme."""

    scheme: Scheme
    search: bool = True
    """False: plain rounding to nearest with the scale that the largest magnitude asks for."""

    def why_not(self, shape: tuple[int, ...]) -> str | None:
        """Why a weight of this shape cannot be quantised so; None if it can."""
        return self.scheme.why_not(shape)

    def apply(self, weight: Tensor, *, importance: Tensor | None = None) -> Quantized:
        return quantize(weight, self.scheme, importance=importance, search=self.search)


@torch.no_grad()
def quantize(
    weight: Tensor, scheme: Scheme, *, importance: Tensor | None = None, search: bool = True,
    table: Tensor | None = None,
) -> Quantized:  # fmt: skip
    """The integers that minimise Σ_k importance_k (w_k − ŵ_k)² in each group of each row of weight [N, K].

    Tried are the steps of a grid; the best is refined by alternating rounding with s = Σ a·w·d / Σ a·d². The
    finalists, rounding to nearest among them, are judged by ŵ as it will be read back, so that the error is
    never above that of `search=False`. The same call gives the same bytes; with another number of threads
    sums may round otherwise, and near ties fall to another scale.

    importance [K]: mean squares of the inputs; None: all equal. A group whose importances are all 0 is
    treated as equally important.

    table: a codebook's levels, if this is part of a weight that they were learned from (`learned`).

    Raises:
        ValueError: a shape that the scheme cannot store, weights that are not finite or beyond 2^120,
            importances that are negative or not finite.
    """
    if weight.dim() != 2:
        raise ValueError(f"quantize takes a weight [N, K], got shape {tuple(weight.shape)}")
    if (reason := scheme.why_not(tuple(weight.shape))) is not None:
        raise ValueError(f"{scheme.name} cannot store {tuple(weight.shape)}: {reason}")
    rows, inputs = weight.shape
    groups = scheme.groups(inputs)
    a = _importance_by_group(importance, inputs=inputs, groups=groups)
    if scheme.values != "int":
        a = torch.ones(groups, inputs // groups, device=weight.device) if a is None else a.squeeze(-1)
        with _threads_that_pay():
            if table is None:
                table = learned(scheme, [weight], importance)
            if scheme.vector != 1:
                assert table is not None, "a codebook has one"
                q, scale = find_vectors(weight, scheme, a, table=table, search=search)
            else:
                q, scale = find_levels(weight, scheme, a, table=table, search=search)
        return Quantized(scheme=scheme, q=q, scale=scale, zero=None, table=table)
    if not search:
        with _threads_that_pay():
            q, scale, zero = round_to_nearest(weight, scheme)
        return Quantized(scheme=scheme, q=q, scale=scale, zero=zero)
    q = torch.empty(rows, inputs, dtype=torch.int8, device=weight.device)
    scale = torch.empty(rows, groups, dtype=torch.bfloat16, device=weight.device)
    zero = None if scheme.symmetric else torch.empty(rows, groups, dtype=torch.int8, device=weight.device)
    with _threads_that_pay():
        for block in blocks_to_run(_blocks(rows, inputs)):
            _quantize_block(weight, q, scale, zero, block, scheme=scheme, a=a)
    return Quantized(scheme=scheme, q=q, scale=scale, zero=zero)


def learned(scheme: Scheme, rows: Iterable[Tensor], importance: Tensor | None) -> Tensor | None:
    """The levels of a weight that comes in blocks of rows, if the scheme is a codebook; else None."""
    if scheme.values != "codebook":
        return None
    return learn(rows, scheme, importance) if scheme.vector == 1 else learn_vectors(rows, scheme, importance)


@torch.no_grad()
def dequantize(quantized: Quantized) -> Tensor:
    """ŵ [N, K] in bf16, bit for bit as compressed-tensors dequantises."""
    rows, inputs = quantized.q.shape
    weight = torch.empty(rows, inputs, dtype=torch.bfloat16, device=quantized.q.device)
    for block in blocks_to_run(_blocks(rows, inputs)):
        weight[block] = _dequantize_rows(quantized, block)
    return weight


@torch.no_grad()
def quantize_error(weight: Tensor, quantized: Quantized, *, importance: Tensor | None = None) -> Tensor:
    """Σ_k importance_k (w − ŵ)² of each row, float32 [N]; ŵ rounded to bf16, as it is read back."""
    rows, inputs = weight.shape
    errors = torch.empty(rows, dtype=torch.float32, device=weight.device)
    for block in blocks_to_run(_blocks(rows, inputs)):
        difference = weight[block].to(torch.float32, copy=True)
        difference.sub_(_dequantize_rows(quantized, block)).square_()
        if importance is not None:
            difference.mul_(importance)
        errors[block] = difference.sum(dim=1)
    return errors


def _dequantize_rows(quantized: Quantized, block: slice) -> Tensor:
    """ŵ of some rows, bf16. q − z has at most 8 bits and a sign, which bf16 holds exactly."""
    if quantized.scheme.values != "int":
        return expand(quantized.q[block], quantized.scheme, quantized.scale[block], quantized.table)
    scale = quantized.scale[block].unsqueeze(-1)
    levels = quantized.q[block].to(torch.bfloat16)
    by_group = levels.view(levels.shape[0], scale.shape[1], -1)
    if quantized.zero is not None:
        by_group.sub_(quantized.zero[block].unsqueeze(-1))
    by_group.mul_(scale)
    return levels


def _blocks(rows: int, inputs: int) -> Iterator[slice]:
    """Slices of as many rows as the workspace holds."""
    step = max(1, int(WORKSPACE_NBYTES / (4 * _FLOATS_A_WEIGHT)) // inputs)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


@contextmanager
def _threads_that_pay() -> Iterator[None]:
    """One thread where torch has but two.

    A pass over a block takes 50 µs, and the threads meet after each. A second one saves half at best; where
    another process wants a core they spin for each other: measured, 5 to 50 times the time of one thread.
    """
    threads = torch.get_num_threads()
    if threads == 2:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _importance_by_group(importance: Tensor | None, *, inputs: int, groups: int) -> Tensor | None:
    """Importances [G, g, 1], largest of each group 1; groups of zeros become ones."""
    if importance is None:
        return None
    if tuple(importance.shape) != (inputs,):
        raise ValueError(f"importance has shape {tuple(importance.shape)}; the weight has {inputs} inputs")
    a = importance.to(torch.float32).view(groups, -1, 1)
    if not is_fake(a) and not bool((a.isfinite() & (a >= 0)).all()):
        raise ValueError("importance must be finite and not negative")
    largest = a.amax(dim=1, keepdim=True)
    return torch.where(largest > 0, a / largest, 1.0)


class _Best:
    """The best candidate so far of each group: a measure [G, 1, R], its step and its lowest level."""

    def __init__(self, measure: Tensor, step: Tensor, lowest: Tensor) -> None:
        self.measure, self.step, self.lowest = measure, step, lowest

    def offer(self, measure: Tensor, step: Tensor, lowest: Tensor | int) -> None:
        """Take the candidate over where its measure is smaller; a tie keeps the earlier one."""
        better = measure < self.measure
        self.measure = torch.where(better, measure, self.measure)
        self.step = torch.where(better, step, self.step)
        self.lowest = torch.where(better, lowest, self.lowest)


class _Block:
    """One block of rows, each group scaled by a power of two to magnitudes below 2 (which is exact)."""

    def __init__(self, rows: Tensor, *, groups: int, a: Tensor | None, symmetric: bool) -> None:
        count, inputs = rows.shape
        self.u = torch.empty(inputs, count, dtype=torch.float32, device=rows.device)
        self.u.copy_(rows.t())
        self.u = self.u.view(groups, -1, count)
        low, high = self.u.amin(dim=1, keepdim=True), self.u.amax(dim=1, keepdim=True)
        peak = torch.maximum(-low, high)
        require_held(peak)
        alive = peak > SMALLEST
        exponent = (peak.view(torch.int32) & 0x7F800000).view(torch.float32)
        self.power = torch.where(alive, exponent, 1.0)
        # Symmetric integers have one level more on the negative side: where the largest weight is positive
        # the group is turned around, which also makes w and −w come out alike.
        self.sign = torch.where(high > -low, -1.0, 1.0) if symmetric else torch.ones_like(low)
        shrink = alive * self.sign / self.power
        self.u.mul_(shrink)
        self.low, self.high = (low * shrink).clamp_(max=0), (high * shrink).clamp_(min=0)
        self.peak = torch.where(alive, peak / self.power, 1.0)
        self.range = torch.where(alive, self.high - self.low, 1.0)
        self.a = a
        self.au = self.u if a is None else self.u * a
        self.d, self.t = torch.empty_like(self.u), torch.empty_like(self.u)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Weighted mean and mean square of each group."""
        total = self.u.shape[1] if self.a is None else self.a.sum(dim=1, keepdim=True)
        mean = self.au.sum(dim=1, keepdim=True) / total
        square = torch.mul(self.au, self.u, out=self.t).sum(dim=1, keepdim=True) / total
        return mean, square

    def levels(self, step: Tensor, lowest: Tensor | int, span: int) -> Tensor:
        """Rounded and clipped u / step, in the block's buffer `d`."""
        torch.div(self.u, step, out=self.d)
        self.d.round_()
        if isinstance(lowest, int):
            return self.d.clamp_(lowest, lowest + span)
        return self.d.clamp_(lowest, lowest + span)

    def fit(self, step: Tensor, lowest: Tensor | int, span: int) -> tuple[Tensor, Tensor]:
        """(−gain, best step) of the levels that `step` rounds to.

        With levels d fixed, Σ a (u − s d)² is least at s = P / Q, P = Σ a u d, Q = Σ a d², where it is
        Σ a u² − P² / Q: so the gain P² / Q ranks the candidates.
        """
        if span > _COARSE:
            return self._fit_finely(step, lowest, span)
        d = self.levels(step, lowest, span)
        p = torch.mul(d, self.au, out=self.t).sum(dim=1, keepdim=True)
        d.square_()
        if self.a is not None:
            d.mul_(self.a)
        q = d.sum(dim=1, keepdim=True).clamp_(min=1e-30)
        best = p / q
        # Rounding keeps signs, so P >= 0; P = 0 where all levels are 0: then the step stays.
        return p.mul_(best).neg_(), torch.where(best > 0, best, step)

    def _fit_finely(self, step: Tensor, lowest: Tensor | int, span: int) -> tuple[Tensor, Tensor]:
        """(error, best step), the error summed over residuals r = u − s d.

        With P = Σ a r d the best step is s + P / Q, and the error there Σ a r² − P² / Q. Gains differ from one
        candidate to the next by less than fp32 holds of them, from 6 bits on.
        """
        d = self.levels(step, lowest, span)
        r = torch.addcmul(self.u, d, step, value=-1.0, out=self.t)
        ad = d if self.a is None else d * self.a
        p = (r * ad).sum(dim=1, keepdim=True)
        q = d.mul_(ad).sum(dim=1, keepdim=True).clamp_(min=1e-30)
        r.square_()
        if self.a is not None:
            r.mul_(self.a)
        change = p / q
        best = step + change
        error = r.sum(dim=1, keepdim=True).sub_(p.mul_(change))
        return error, torch.where(best > 0, best, step)

    def error(self, step: Tensor, lowest: Tensor, span: int) -> Tensor:
        """Σ a (u − bf16(s d))² for a step that is a bf16 number: the error of what is stored."""
        d = self.levels(step, lowest, span)
        d.mul_(step)
        rounded = d.to(torch.bfloat16)
        torch.sub(self.u, rounded, out=d)
        d.square_()
        if self.a is not None:
            d.mul_(self.a)
        return d.sum(dim=1, keepdim=True)


def _quantize_block(
    weight: Tensor,
    q: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    rows: slice,
    *,
    scheme: Scheme,
    a: Tensor | None,
) -> None:
    """Fill some rows of q, scale and zero."""
    span, half = 2**scheme.bits - 1, 2 ** (scheme.bits - 1)
    block = _Block(weight[rows], groups=scale.shape[1], a=a, symmetric=scheme.symmetric)
    if scheme.symmetric:
        step = stored(block.peak / (span / 2))
        lowest = torch.where(block.sign > 0, -float(half), 1.0 - half)
    else:
        step = stored(block.range / span)
        lowest = (block.low / step).round_().clamp_(-span, 0)
    plain = _Best(block.error(step, lowest, span), step, lowest)
    candidates = _search(block, scheme=scheme)
    if scheme.symmetric:
        turned = 1 - 2 * half - lowest
        plain.offer(block.error(step, turned, span), step, turned)
    for step, lowest in candidates:
        plain.offer(block.error(step, lowest, span), step, lowest)
    step, lowest = plain.step, plain.lowest
    d = block.levels(step, lowest, span)
    step = step * block.power
    if scheme.symmetric:
        turn = torch.where(lowest == -half, 1.0, -1.0)
        d.mul_(turn)
        step.mul_(turn).mul_(block.sign)
    else:
        offset = -lowest - half
        d.add_(offset)
        assert zero is not None
        zero[rows].copy_(offset[:, 0].t())
    q[rows].copy_(d.view(-1, d.shape[2]).t())
    scale[rows].copy_(step[:, 0].t())


def _search(block: _Block, *, scheme: Scheme) -> Iterator[tuple[Tensor, Tensor]]:
    """Steps (bf16 numbers) and lowest levels worth judging exactly."""
    span = 2**scheme.bits - 1
    best: _Best | None = None
    for step, lowest in _grid(block, scheme=scheme):
        measure, fitted = block.fit(step, lowest, span)
        if best is None:
            best = _Best(measure, fitted, torch.zeros_like(step) + lowest)
        else:
            best.offer(measure, fitted, lowest)
    assert best is not None, "every width has a grid"
    for _ in blocks_to_run(range(_ALTERNATIONS)):
        best.offer(*block.fit(best.step, best.lowest, span), best.lowest)
    nearest = best.step.to(torch.bfloat16).view(torch.int16)
    for ulps in blocks_to_run(_NEIGHBOURS[scheme.bits]):
        yield (nearest + ulps).view(torch.bfloat16).to(torch.float32), best.lowest


def _grid(block: _Block, *, scheme: Scheme) -> Iterator[tuple[Tensor, Tensor | int]]:
    """Steps and lowest levels to start from."""
    span, half = 2**scheme.bits - 1, 2 ** (scheme.bits - 1)
    mean, square = block.moments()
    if scheme.symmetric:
        deviation = square.sqrt_().clamp_(min=_LEAST_DEVIATION)
        for places in blocks_to_run(_SYMMETRIC_GRID[scheme.bits]):
            yield block.peak / places, -half
            yield block.peak / places, 1 - half
        for factor in blocks_to_run(_AROUND):
            yield deviation * (factor * _STEP_OF_DEVIATION[scheme.bits]), -half
        return
    middle = (block.low + block.high) / 2
    for shrink in blocks_to_run(_ASYMMETRIC_GRID[scheme.bits]):
        step = block.range * (shrink / span)
        lowest = (middle / step - span / 2).round_()
        for shift in (-1, 0, 1) if scheme.bits <= _SHIFTED_BITS else (0,):
            yield step, (lowest + shift).clamp_(-span, 0)
    deviation = square.sub_(mean.square()).clamp_(min=0).sqrt_().clamp_(min=_LEAST_DEVIATION)
    for factor in blocks_to_run(_AROUND):
        step = deviation * (factor * _STEP_OF_DEVIATION[scheme.bits])
        yield step, (mean / step - span / 2).round_().clamp_(-span, 0)

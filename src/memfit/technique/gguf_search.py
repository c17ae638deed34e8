"""The integers and scales of GGML's blocks that make the weighted squared error small, and keep outputs' magnitudes.

The weights with the least squared error are too small: errors lie along the weights, Σ h w ŵ < Σ h w², so every layer's
output shrinks, and shrinks coherently. Two things are against it. Large weights count a little more, by the fourth
root of σ² + w² (llama.cpp takes the square root). And at the end half of what is missing of Σ h w ŵ is put back into
d and dmin. Measured on the demo model, KL divergence over that of llama.cpp's blocks with the same importances, and Σ h
(w − ŵ)² over theirs:

                             Q2_K              Q3_K_M
    neither                  1.10, 0.957       1.03, 0.967
    fourth root              1.00, 0.966       0.96, 0.973
    half of the magnitude    1.00, 0.965       0.99, 0.970
    both                     0.93, 0.977       0.94, 0.977
    both, all of it          0.90, 0.998       0.93, 0.983

Checked on text of another kind (Wikipedia; KL over that with both): Q2_K 1.09 with neither, 0.99 without the root, 1.07
without the magnitude; Q4_K_M 0.97 without the root, where the magnitude hardly matters. With the integers of
`gguf_gptq` in place of the nearest, Q2_K 1.17, 1.11 and 1.04. On MiniLM Q4_K_M is 1.03 without the root, and the
magnitude changes little (Q4_K_M and Q2_K 1.00; with GPTQ's integers none is the best, by 0.03 and 0.05).

For fixed integers the scales are a least squares problem, for fixed scales the best integers are the nearest
ones. Every sub-block is searched from several starts, then the scales of a block are quantised, and then, in
turns, its integers, the integers of its scales, and d and dmin are chosen anew, each for the others. Errors are
sums over residuals of the quantised scales, so the best that was seen is the best that can be read back.

Legend of shapes: G blocks of a row, S sub-blocks of a block, n weights of a sub-block, R rows.

    x [G, S, n, R]    h [G, S, n, 1]    of a sub-block [G, S, 1, R]    of a block [G, 1, 1, R]

With rows innermost, sums over a sub-block and the spreading of its scale are plain vector operations.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from memfit.packed.fake import blocks_to_run
from memfit.technique.gguf_layout import Fields, Kind

LARGEST: Final = 65504.0
"""Of fp16. No d is larger where no weight is."""
SMALLEST: Final = 2.0**-24
"""Of fp16. Where d would be smaller, this and smaller integers say it better."""
NOTHING: Final = 2.0**-40
"""What is smaller is 0 in every kind; and its reciprocals and squares would leave float32."""
_TINY: Final = 1e-37


def _evenly(first: float, last: float, count: int) -> tuple[float, ...]:
    return tuple(first + (last - first) * n / (count - 1) for n in range(count))


# Where a symmetric start puts the largest magnitude, as a part of the outermost level: what lies beyond is clipped.
# Kinds without sub-blocks (4, 5 and 8 bits) have no later turns that look around, so their starts lie closer.
_PEAKS: Final[dict[int, tuple[float, ...]]] = {
    3: (0.66, 0.73, 0.8, 0.87, 0.94, 1.01, 1.08, 1.16, 1.26, 1.4, 1.6),
    4: (*_evenly(0.8, 1.22, 22), 1.3, 1.4, 1.55),
    5: (*_evenly(0.9, 1.15, 22), 1.25),
    6: (0.94, 0.96, 0.98, 1.0, 1.02, 1.05, 1.12),
    8: _evenly(0.96, 1.05, 24),
}
# By what an affine start shrinks the range from the smallest to the largest weight.
_RANGES: Final[dict[int, tuple[float, ...]]] = {
    2: (1.3, 1.15, 1.05, 0.97, 0.9, 0.83, 0.76, 0.7, 0.63, 0.56, 0.48, 0.4),
    4: (1.05, 1.01, 0.98, 0.95, 0.92, 0.88, 0.82, 0.74, 0.62),
    5: (1.04, 1.01, 0.99, 0.97, 0.95, 0.91, 0.85, 0.75),
}
_FLAT_RANGES: Final = (*_evenly(1.08, 0.7, 24), 0.62)
_BOTH_SIGNS: Final = 4
"""Bits up to which symmetric starts are also tried with the extra level on the other side."""
_STARTS_REFINED: Final = 2
"""Turns of integers and scales after the best start. They also forget the errors that the starts were ranked by, in
which float32 leaves nothing of a fit that is almost exact."""
_TURNS: Final = 3
_PUT_BACK: Final = 0.5
_MOST: Final = 1.3
"""By which d is ever enlarged: more is missing only where hardly anything was kept."""
_FAR: Final[dict[int, int]] = {2: 2, 3: 1, 4: 3, 5: 3, 6: 12}
"""How far from the nearest k, and m, others are tried in the first turn, by bits. The error has many minima in both:
against ±1 this takes off 0.3 % at 2 bits, 1.2 % at 4, 3 % at 5 and 5 % at 6."""
_PLACES: Final = 24
"""Steps d tried for the scales of a block, before its weights are looked at again."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Sums:
    """What least squares needs to know of a sub-block's residuals r = x − D q + M."""

    error: Tensor
    """Σ h r²"""
    rq: Tensor
    """Σ h r q"""
    qq: Tensor
    """Σ h q²"""
    r: Tensor | None = None
    """Σ h r; None where there is no M to be solved for."""
    q: Tensor | None = None
    """Σ h q"""


class _Tile:
    """Some blocks of some rows, and the buffers to work on them."""

    def __init__(self, x: Tensor, h: Tensor, kind: Kind) -> None:
        self.x, self.h, self.kind = x, h, kind
        self.total = h.sum(dim=2, keepdim=True)
        self.q, self.r, self.a, self.b = (torch.empty_like(x) for _ in range(4))

    def dot(self, left: Tensor, right: Tensor) -> Tensor:
        """Σ left · right over each sub-block."""
        return torch.mul(left, right, out=self.b).sum(dim=2, keepdim=True)

    def assign(self, scale: Tensor, minimum: Tensor | None) -> None:
        """Set `q` to the nearest integers and `r` to the residuals."""
        inverse = scale.reciprocal().nan_to_num_(0.0, 0.0, 0.0)  # nothing is a multiple of 0
        source = self.x
        if minimum is not None:
            source = torch.add(self.x, minimum, out=self.r)
        torch.mul(source, inverse, out=self.q).round_().clamp_(self.kind.low, self.kind.high)
        torch.addcmul(source, self.q, scale, value=-1.0, out=self.r)

    def error(self, scale: Tensor, minimum: Tensor | None) -> Tensor:
        """Σ h r² with the nearest integers."""
        self.assign(scale, minimum)
        torch.mul(self.r, self.h, out=self.a)
        return self.dot(self.a, self.r)

    def sums(self, scale: Tensor, minimum: Tensor | None) -> _Sums:
        """Of the nearest integers."""
        error = self.error(scale, minimum)
        rq = self.dot(self.a, self.q)
        r = None if minimum is None else self.a.sum(dim=2, keepdim=True)
        torch.mul(self.q, self.h, out=self.a)
        q = None if minimum is None else self.a.sum(dim=2, keepdim=True)
        return _Sums(error=error, rq=rq, qq=self.dot(self.a, self.q), r=r, q=q)

    def fit(self, scale: Tensor, minimum: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """(error, D, M) of the nearest integers, with the best real D and M for them."""
        found = self.sums(scale, minimum)
        if minimum is None or found.r is None or found.q is None:
            change = found.rq / found.qq.clamp_min(_TINY)
            return found.error - change * found.rq, scale + change, None
        determinant = found.qq * self.total - found.q.square()
        solvable = determinant > 1e-5 * found.qq * self.total
        d = torch.where(solvable, (found.rq * self.total - found.q * found.r) / determinant.clamp_min(_TINY), 0.0)
        m = (found.q * d - found.r) / self.total
        if not self.kind.flat:  # a flat kind's M may have any sign
            below = minimum + m < 0
            m = torch.where(below, -minimum, m)
            d = torch.where(below, (found.rq + m * found.q) / found.qq.clamp_min(_TINY), d)
        # Σ h (r − d q + m)², multiplied out
        error = found.error + d * (d * found.qq - 2 * found.rq - 2 * m * found.q)
        error += m * (2 * found.r + m * self.total)
        return error, scale + d, minimum + m


class _Best:
    """The best scale and minimum of each sub-block so far, by error."""

    def __init__(self) -> None:
        self.error: Tensor | None = None
        self.scale = self.minimum = torch.empty(0)

    def offer(self, error: Tensor, scale: Tensor, minimum: Tensor | None) -> None:
        """Take over where the error is smaller."""
        second = scale if minimum is None else minimum
        if self.error is None:
            self.error, self.scale, self.minimum = error, scale, second
            return
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.scale = torch.where(better, scale, self.scale)
        self.minimum = torch.where(better, second, self.minimum)


class _Kept:
    """The best numbers of each block so far."""

    def __init__(self) -> None:
        self.error: Tensor | None = None
        self.d = self.k = self.dmin = self.m = torch.empty(0)

    def offer(self, error: Tensor, d: Tensor, k: Tensor, dmin: Tensor | None = None, m: Tensor | None = None) -> None:
        """Take over where the error is smaller."""
        dmin, m = torch.zeros_like(d) if dmin is None else dmin, torch.zeros_like(k) if m is None else m
        if self.error is None:
            self.error, self.d, self.k, self.dmin, self.m = error, d, k, dmin, m
            return
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.d, self.dmin = torch.where(better, d, self.d), torch.where(better, dmin, self.dmin)
        self.k, self.m = torch.where(better, k, self.k), torch.where(better, m, self.m)


def search(x: Tensor, h: Tensor, kind: Kind) -> Fields:
    """The numbers of the blocks x [G, S, n, R], weighed by h [G, S, n, 1]; blocks of one row lie together."""
    square = x.square()
    spread = square.mean(dim=(1, 2), keepdim=True).clamp_min_(_TINY)
    tile = _Tile(x, square.div_(spread).add_(1).pow_(0.25).mul_(h), kind)
    if kind.affine:
        kept = _refine_affine(tile, *_affine_start(tile))
    else:
        kept = _refine_symmetric(tile, *_symmetric_start(tile))
    return _fields(tile, _enlarged(tile, kept, h))


def _symmetric_start(tile: _Tile) -> tuple[Tensor, Tensor]:
    """(D, Σ h q²): the best real scale of each sub-block; negative where q has its extra level on the other side."""
    kind = tile.kind
    low, high = tile.x.amin(dim=2, keepdim=True), tile.x.amax(dim=2, keepdim=True)
    peak = torch.where(high > -low, -high, -low) / -kind.low  # D where the largest magnitude is at the lowest level
    deviation = (tile.dot(tile.x * tile.h, tile.x) / tile.total).sqrt_() * _STEP_OF_DEVIATION[kind.bits]
    starts = [peak / place for place in _PEAKS[kind.bits]]
    starts += [deviation.copysign(peak) * around for around in _AROUND]
    if kind.bits <= _BOTH_SIGNS:
        starts += [-start for start in starts]
    best = _Best()
    for start in blocks_to_run(starts):
        best.offer(*tile.fit(start, None))
    scale = best.scale
    for _ in blocks_to_run(range(_STARTS_REFINED)):
        _, scale, _ = tile.fit(scale, None)
    return scale, tile.sums(scale, None).qq


# Steps in standard deviations: of the uniform quantiser best for a normal distribution (J. Max, 1960). They start
# the search where the largest weights are unimportant.
_STEP_OF_DEVIATION: Final[dict[int, float]] = {2: 0.996, 3: 0.586, 4: 0.335, 5: 0.188, 6: 0.104, 8: 0.0308}
_AROUND: Final = (0.7, 1.0, 1.4)


def _affine_start(tile: _Tile) -> tuple[Tensor, Tensor, Tensor]:
    """(D, M, Σ h q²): the best real scale and minimum of each sub-block."""
    kind = tile.kind
    low, high = tile.x.amin(dim=2, keepdim=True), tile.x.amax(dim=2, keepdim=True)
    if not kind.flat:
        low = low.clamp_max(0)
    middle, spread = (low + high) / 2, (high - low) / kind.high
    weighted = tile.x * tile.h
    mean = weighted.sum(dim=2, keepdim=True) / tile.total
    deviation = (tile.dot(weighted, tile.x) / tile.total - mean.square()).clamp_min_(0).sqrt_()
    starts = [(spread * part, middle) for part in (_FLAT_RANGES if kind.flat else _RANGES[kind.bits])]
    starts += [(deviation * (_STEP_OF_DEVIATION[kind.bits] * around), mean) for around in _AROUND]
    best = _Best()
    for scale, centre in blocks_to_run(starts):
        minimum = scale * (kind.high / 2) - centre
        best.offer(*tile.fit(scale, minimum if kind.flat else minimum.clamp_min_(0)))
        if centre is middle:  # with the lowest weight kept in its place, as GGML does
            best.offer(*tile.fit(scale, -low))
    scale, minimum = best.scale, best.minimum
    for _ in blocks_to_run(range(_STARTS_REFINED)):
        _, scale, solved = tile.fit(scale, minimum)
        assert solved is not None
        minimum = solved
    return scale, minimum, tile.sums(scale, minimum).qq


def _half(value: Tensor) -> Tensor:
    """The nearest fp16 number, as float32."""
    return value.clamp(-LARGEST, LARGEST).to(torch.float16).to(torch.float32)


def _step(value: Tensor) -> Tensor:
    """The nearest fp16 number, but none that a value other than 0 vanishes in."""
    return _half(torch.where((value != 0) & (value.abs() < SMALLEST), SMALLEST * value.sign(), value))


def _over(value: Tensor) -> Tensor:
    """Σ over the sub-blocks of a block."""
    return value.sum(dim=1, keepdim=True)


def _place(value: Tensor, weight: Tensor, scales: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(d, k): d in fp16 and integers k such that Σ weight (value − d k)² of each block is small."""
    if scales == (1, 1):
        return _step(value), torch.ones_like(value)
    at = value.abs().argmax(dim=1, keepdim=True)
    peak = value.gather(1, at)
    outermost = scales[0] if scales[0] < 0 else scales[1]
    kept = _Kept()
    for part in blocks_to_run([1.008 - 0.42 * n / _PLACES for n in range(_PLACES)]):
        d = peak / (outermost * part)
        k = _integers(value, d, scales)
        weighted = weight * k
        fitted = _over(weighted * value) / _over(weighted * k).clamp_min(_TINY)
        fitted = _step(torch.where(fitted == 0, d, fitted))  # fp16 is coarse where weights are small
        k = _integers(value, fitted, scales)
        kept.offer(_over(weight * (value - fitted * k).square()), fitted, k)
    return kept.d, kept.k


def _integers(value: Tensor, d: Tensor, scales: tuple[int, int]) -> Tensor:
    return torch.where(d == 0, 0.0, value / d).round_().clamp_(*scales)


def _around(kind: Kind, turn: int) -> tuple[int, ...]:
    """What is added to k, and to m, to try its neighbours: far ones once, then near ones."""
    if kind.flat:
        return (0,)
    far = 1 if turn else _FAR[kind.bits]
    return tuple(sorted(range(-far, far + 1), key=abs))


def _refine_symmetric(tile: _Tile, scale: Tensor, weight: Tensor) -> _Kept:
    kind = tile.kind
    d, k = _place(scale, weight, kind.scales)
    kept = _Kept()
    for turn in blocks_to_run(range(_TURNS)):
        best = _Best()
        for move in _around(kind, turn):
            tried = (k + move).clamp_(*kind.scales)
            best.offer(tile.error(d * tried, None), tried, None)
        k = best.scale
        assert best.error is not None
        kept.offer(_over(best.error), d, k)
        if turn < _TURNS - 1:
            found = tile.sums(d * k, None)
            d = _step(d + _over(k * found.rq) / _over(k.square() * found.qq).clamp_min(_TINY))
    tile.assign(kept.d * kept.k, None)
    return kept


def _refine_affine(tile: _Tile, scale: Tensor, minimum: Tensor, weight: Tensor) -> _Kept:
    kind = tile.kind
    d, k = _place(scale, weight, kind.scales)
    dmin, m = _place(minimum, tile.total, kind.scales)
    kept = _Kept()
    for turn in blocks_to_run(range(_TURNS)):
        best = _Best()
        for move in _around(kind, turn):
            for shift in _around(kind, turn):
                tried, other = (k + move).clamp_(*kind.scales), (m + shift).clamp_(*kind.scales)
                best.offer(tile.error(d * tried, dmin * other), tried, other)
            if turn == 0 and not kind.flat:  # zeros among weights of one sign stay zeros
                best.offer(tile.error(d * tried, torch.zeros_like(d)), tried, torch.zeros_like(m))
        k, m = best.scale, best.minimum
        assert best.error is not None
        kept.offer(_over(best.error), d, k, dmin, m)
        if turn < _TURNS - 1:
            d, dmin = _solve(tile, d, k, dmin, m)
    tile.assign(kept.d * kept.k, kept.dmin * kept.m)
    return kept


def _solve(tile: _Tile, d: Tensor, k: Tensor, dmin: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """d and dmin of each block, best for the integers that they give now."""
    found = tile.sums(d * k, dmin * m)
    assert found.r is not None and found.q is not None
    uu, uv = _over(k.square() * found.qq), _over(k * m * found.q)
    vv = _over(m.square() * tile.total)
    pu, pv = _over(k * found.rq), _over(m * found.r)
    determinant = uu * vv - uv.square()
    solvable = determinant > 1e-5 * uu * vv
    change = torch.where(solvable, (pu * vv - uv * pv) / determinant.clamp_min(_TINY), pu / uu.clamp_min(_TINY))
    other = torch.where(solvable, (uv * change - pv) / vv.clamp_min(_TINY), 0.0)
    return _step(d + change), _step(dmin + other)


def _enlarged(tile: _Tile, kept: _Kept, h: Tensor) -> _Kept:
    """With d and dmin larger by half of what Σ h w ŵ lacks of Σ h w²; the tile has the integers and residuals."""
    torch.mul(tile.x, h, out=tile.a)
    whole, missing = _over(tile.dot(tile.a, tile.x)), _over(tile.dot(tile.a, tile.r))
    held = whole - missing
    factor = torch.where(held > 0, 1 + _PUT_BACK * missing / held.clamp_min(_TINY), 1.0).clamp_(1.0, _MOST)
    kept.d, kept.dmin = _half(kept.d * factor), _half(kept.dmin * factor)
    return kept


def _fields(tile: _Tile, kept: _Kept) -> Fields:
    """The numbers in the order of the file: all blocks of a row, then the next row."""
    kind = tile.kind

    def rows_first(value: Tensor) -> Tensor:
        return value.permute(3, 0, 1, 2).reshape(value.shape[0] * value.shape[3], -1)

    return Fields(
        kind=kind,
        q=rows_first(tile.q).to(torch.int32),
        k=rows_first(kept.k).to(torch.int32),
        m=rows_first(kept.m).to(torch.int32),
        d=rows_first(kept.d).flatten().to(torch.float16),
        dmin=rows_first(kept.dmin).flatten().to(torch.float16),
    )

"""Weights as levels times a scale: NF4, FP8 (E4M3), MXFP4 and the levels of a codebook; scales searched.

    w [N, K] -> q int8 [N, K], scale bf16 [N, G] (MXFP4: E8M0's byte, 2^(e − 127))       ŵ = bf16(level[u] · s)

u = q + 2^(b−1) is the level's code (`packed.levels`). Scales are chosen for the least Σ_k a_k (w_k − ŵ_k)², as those of
integers are (`quantize`): from a grid of scales that put the largest weight at the outermost level, or beyond it, the
best by its own best scale Σ a·w·l / Σ a·l², then alternating.

Legend of shapes: N outputs (rows), K inputs, G groups of a row, g inputs of a group, R rows of a block, L levels.
"""

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

from memfit.packed.fake import blocks_to_run
from memfit.packed.levels import exponents, level_table
from memfit.packed.scheme import Scheme

from .nearest import SMALLEST, require_held, stored

WORKSPACE_NBYTES: Final = 8 * 2**20
"""Most bytes of temporaries at one moment, but never less than one row takes and the tables (0.3 MiB)."""
_FLOATS_A_WEIGHT: Final = 8
"""fp32 values of workspace for each weight of a block."""
_ALTERNATIONS: Final = 2

# Scales to start from, in units of the one that puts the largest weight at the outermost level. With them the error is
# within 2 % of a dense search's (tests/technique/test_float_values.py); on the demo model's layers it is 0.8 of the
# format's own scale's for NF4, 0.9 for MXFP4 and FP8, in KL divergence (bench/formats.py).
_OF_PEAK: Final[dict[str, tuple[float, ...]]] = {
    "nf4": (1.0, 0.96, 0.92, 0.87, 0.82, 0.76, 0.7, 0.63, 0.55),
    # E4M3's levels are as far apart in every octave: what matters is where in one the weights lie.
    "fp8": tuple(2 ** (step / 8) for step in range(8)),
    "codebook": (1.0, 0.88, 0.76, 0.64),
}
_OCTAVES: Final = (-3, -2, -1, 0, 1)
"""Exponents tried for MXFP4, from the specification's: floor(log2(largest weight)) − 2."""
_LEAST_DEVIATION: Final = 2.0**-12
_OF_DEVIATION: Final = (2.0, 2.6, 3.4)
"""Outermost level in standard deviations: starts the search where the largest weights are unimportant outliers."""
_OF_OWN_DEVIATION: Final = (0.75, 0.87, 1.0, 1.15)
"""A codebook's scale in standard deviations: its levels were learned of weights with a deviation of 1."""


class Grid:
    """The levels of a scheme, and the nearest of them.

    Args:
        scheme: whose values are no integers.
        table: bf16 [2^b], of a codebook.
        dtype: that levels are told apart in.
    """

    def __init__(self, scheme: Scheme, table: Tensor | None = None, *, dtype: torch.dtype = torch.float32) -> None:
        self.scheme = scheme
        self.table = level_table(scheme) if table is None else table
        kept = codes_by_level(scheme) if table is None else table.to(torch.float32).argsort(stable=True)
        self.levels = self.table.index_select(0, kept).to(dtype)
        """[L], ascending."""
        self.codes = (kept - (1 << (scheme.bits - 1))).to(torch.int8)
        """q of each level [L]."""
        self.middles = (self.levels[1:] + self.levels[:-1]) / 2
        self.top = self.levels.abs().amax()

    def nearest(self, x: Tensor) -> Tensor:
        """The index of the level nearest to each of x, int32; of two as near, the lower."""
        return torch.bucketize(x, self.middles, out_int32=True)

    def round(self, t: Tensor, scale: Tensor, q: Tensor, read: Tensor) -> None:
        """Write q of the level that t / scale is nearest to, and level · scale, which is ŵ when rounded; all [R]."""
        index = self.nearest(torch.div(t, scale, out=read))
        q.copy_(self.codes.index_select(0, index))
        torch.index_select(self.levels, 0, index, out=read).mul_(scale)

    def by_pattern(self) -> Tensor:
        """The level nearest to every bf16 number [65536], by its bits: what is told apart in a search by one look."""
        patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
        return self.levels.index_select(0, self.nearest(patterns.to(self.levels.dtype)))


def codes_by_level(scheme: Scheme) -> Tensor:
    """Codes of a format in ascending order of their levels [L]: one zero, and no NaN."""
    if scheme.values == "nf4":
        return torch.arange(16)
    if scheme.values == "mxfp4":
        return torch.tensor((*range(15, 8, -1), *range(8)))
    return torch.tensor((*range(0xFE, 0x80, -1), *range(0x7F)))


@torch.no_grad()
def find_levels(
    weight: Tensor, scheme: Scheme, a: Tensor, *, table: Tensor | None = None, search: bool = True
) -> tuple[Tensor, Tensor]:
    """(q int8 [N, K], scale [N, G]) of the least Σ_k a_k (w_k − ŵ_k)² in each group of each row of weight [N, K].

    Args:
        a: importances [G, g], none negative, in each group one that is not 0.
        table: a codebook's levels.
        search: False: the scale that puts the largest weight at the outermost level (MXFP4: the specification's).

    Raises:
        ValueError: weights that are not finite, or beyond 2^120.
    """
    rows, inputs = weight.shape
    grid = Grid(scheme, table)
    near = grid.by_pattern() if search else None
    q = torch.empty(rows, inputs, dtype=torch.int8, device=weight.device)
    shape = (rows, scheme.groups(inputs))
    scale = torch.empty(shape, dtype=torch.uint8 if scheme.values == "mxfp4" else torch.bfloat16, device=weight.device)
    for part in blocks_to_run(blocks_of(rows, inputs)):
        _fill(weight[part], q[part], scale[part], grid, near, a)
    return q, scale


def blocks_of(rows: int, inputs: int) -> Iterator[slice]:
    """Slices of as many rows as the workspace holds."""
    step = max(1, WORKSPACE_NBYTES // (4 * _FLOATS_A_WEIGHT * inputs))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def normal_groups(rows: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """u [R, G, g] in float32, each group's magnitudes below 2; the power of two each was divided by [R, G, 1]; and
    whether it is more than zeros, elsewhere u is 0.

    Raises:
        ValueError: weights that are not finite, or beyond 2^120.
    """
    u = rows.to(torch.float32, copy=True).view(rows.shape[0], groups, -1)
    low, high = u.aminmax(dim=2, keepdim=True)
    peak = torch.maximum(-low, high)
    require_held(peak)
    alive = peak > SMALLEST
    power = torch.where(alive, (peak.view(torch.int32) & 0x7F800000).view(torch.float32), 1.0)
    u.mul_(alive / power)
    return u, power, alive


def _fill(rows: Tensor, q: Tensor, scale: Tensor, grid: Grid, near: Tensor | None, a: Tensor) -> None:
    """q and scale of some rows."""
    block = _Block(rows, scale.shape[1], a, grid)
    best = block.plain()
    if near is not None:
        found = block.search(near)
        best = torch.where(block.error(found) < block.error(best), found, best)
    index = grid.nearest(block.scaled(best)).view(-1)
    q.copy_(grid.codes.index_select(0, index).view(q.shape))
    made = best.mul_(block.power)
    if grid.scheme.values == "codebook":
        made = torch.where(block.alive, made, SMALLEST)  # no level need be 0
    scale.copy_((exponents(made) if block.octaves else made).squeeze(2))


class _Block:
    """One block of rows, and what a scale [R, G, 1] of its groups gives."""

    def __init__(self, rows: Tensor, groups: int, a: Tensor, grid: Grid) -> None:
        self.u, self.power, self.alive = normal_groups(rows, groups)
        self.a, self.grid = a, grid
        self.octaves = grid.scheme.values == "mxfp4"
        self.t, self.level = torch.empty_like(self.u), torch.empty_like(self.u)

    def plain(self) -> Tensor:
        """The scale that puts the largest weight at the outermost level.

        MXFP4: 2^(floor(log2(largest)) − 2); a codebook: the one that its levels were learned with."""
        if self.octaves:
            return torch.full_like(self.power, 0.25)
        if self.grid.scheme.values == "codebook":
            return stored(torch.where(self.alive, self._deviation(), 1.0))
        return stored(self._peak() / self.grid.top)

    def _peak(self) -> Tensor:
        low, high = self.u.aminmax(dim=2, keepdim=True)
        return torch.where(self.alive, torch.maximum(-low, high), 1.0)

    def scaled(self, scale: Tensor) -> Tensor:
        return torch.div(self.u, scale, out=self.t)

    def search(self, near: Tensor) -> Tensor:
        """The best scale found, as it is stored; `near`: see `Grid.by_pattern`."""
        best = error = torch.full_like(self.power, torch.inf)
        for start in blocks_to_run(self._starts()):
            best, error = self._better(best, error, start, near)
        if self.octaves:
            return best
        for _ in blocks_to_run(range(_ALTERNATIONS)):
            best, error = self._better(best, error, best, near)
        return stored(best)

    def _starts(self) -> list[Tensor]:
        kind, top = self.grid.scheme.values, self.grid.top
        if self.octaves:
            return [torch.full_like(self.power, 2.0 ** (step - 2)) for step in _OCTAVES]
        peak = self._peak()
        starts = [peak * (share / top) for share in _OF_PEAK[kind]]
        if kind == "codebook":
            deviation = self._deviation()
            starts += [deviation * share for share in _OF_OWN_DEVIATION]
        elif kind == "nf4":
            deviation = self._deviation()
            starts += [deviation * (share / top) for share in _OF_DEVIATION]
        return starts

    def _deviation(self) -> Tensor:
        square = torch.square(self.u, out=self.t).mul_(self.a).sum(dim=2, keepdim=True)
        return square.div_(self.a.sum(dim=1)[:, None]).sqrt_().clamp_(min=_LEAST_DEVIATION)

    def _better(self, best: Tensor, error: Tensor, scale: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
        """The better of two scales, and its error; of the new one its levels are taken, and the best scale for them.

        With residuals r = u − s l, P = Σ a r l and Q = Σ a l² it is s + P / Q, and the error Σ a r² − P² / Q.
        """
        pattern = self.scaled(scale).to(torch.bfloat16).view(torch.int16).to(torch.int32).bitwise_and_(0xFFFF)
        level = torch.index_select(near, 0, pattern.view(-1), out=self.level.view(-1)).view(self.u.shape)
        del pattern
        r = torch.addcmul(self.u, level, scale, value=-1.0, out=self.t)
        if self.octaves:
            fitted, left = scale, r.square_().mul_(self.a).sum(dim=2, keepdim=True)
        else:
            al = level * self.a
            p = torch.mul(r, al).sum(dim=2, keepdim=True)
            change = p / al.mul_(level).sum(dim=2, keepdim=True).clamp_(min=1e-30)
            del al
            left = r.square_().mul_(self.a).sum(dim=2, keepdim=True).sub_(change * p)
            fitted = torch.where(scale + change > 0, scale + change, scale)
        smaller = left < error
        return torch.where(smaller, fitted, best), torch.where(smaller, left, error)

    def error(self, scale: Tensor) -> Tensor:
        """Σ a (u − bf16(s l))² [R, G, 1]: of what is stored."""
        index = self.grid.nearest(self.scaled(scale)).view(-1)
        level = torch.index_select(self.grid.levels, 0, index, out=self.level.view(-1)).view(self.u.shape)
        del index
        read = level.mul_(scale).to(torch.bfloat16)
        return torch.sub(self.u, read, out=self.t).square_().mul_(self.a).sum(dim=2, keepdim=True)

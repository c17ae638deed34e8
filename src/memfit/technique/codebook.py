"""Codebooks: the 2^b levels that one tensor's weights share, by weighted k-means.

    w [N, K] -> levels bf16 [2^b], least Σ a_k (w_k − s·level[u_k])²        s: one scale a group, a its importance

Groups are divided by their root mean square, which makes rows of different size alike. What is left, u = w / s, counts
a·s². All of it is gathered into one bin for each bf16 number, a pass over blocks of rows: k-means on the bins
(Lloyd 1982, from the best start on coarser ones) then costs the same for any tensor, and its means are exact. Scales
are searched for afterwards, with the levels fixed (`float_values`).

Legend of shapes: N outputs (rows), K inputs, G groups of a row, g inputs of a group, V bins, L levels.
"""

from collections.abc import Iterable
from typing import Final

import torch
from torch import Tensor

from memfit.packed.fake import blocks_to_run, is_fake
from memfit.packed.scheme import Scheme

from .float_values import blocks_of, normal_groups

_BINS: Final = 1 << 16
_ROUNDS: Final = 100
"""Most rounds of Lloyd's."""
_FEW: Final = 16
"""Up to so many levels the best start is looked for: Lloyd's stays in the first dip, which of many levels is as good.
"""
_CELLS: Final = 512


@torch.no_grad()
def learn(rows: Iterable[Tensor], scheme: Scheme, importance: Tensor | None) -> Tensor:
    """The levels [2^b], bf16, ascending, of a weight that comes in blocks of rows [n, K].

    Args:
        importance: [K], none negative; None, or all 0: all equal.

    Raises:
        ValueError: weights that are not finite, or beyond 2^120.
    """
    mass, moment = torch.zeros(_BINS, dtype=torch.float64), torch.zeros(_BINS, dtype=torch.float64)
    for block in rows:
        groups = scheme.groups(block.shape[1])
        a = relative(importance, block.shape[1]).view(groups, -1)
        for part in blocks_to_run(blocks_of(*block.shape)):
            _gather(block[part], a, mass, moment)
    values = _bin_values()
    return lloyd(mass, moment, _start(values, mass, moment, scheme.bits), values).to(torch.bfloat16)


def relative(importance: Tensor | None, inputs: int) -> Tensor:
    """[K], the largest 1."""
    if importance is None:
        return torch.ones(inputs)
    largest = importance.amax()
    return torch.where(largest > 0, importance.to(torch.float32) / largest, 1.0)


def _gather(rows: Tensor, a: Tensor, mass: Tensor, moment: Tensor) -> None:
    """Add Σ c and Σ c·u of some rows to their bins; c = a·s²."""
    u, power, alive = normal_groups(rows, a.shape[0])
    total = a.sum(dim=1)[:, None]
    square = u.square().mul_(a).sum(dim=2, keepdim=True).div_(total.clamp(min=1e-30))
    # Where what is important is 0, so that it would be divided by 0, all counts alike.
    scale = torch.where(square > 0, square, u.square().mean(dim=2, keepdim=True)).sqrt_()
    scale = torch.where(alive, scale, 1.0)
    u.div_(scale)
    # In float64: the square of a tiny scale is no float32.
    weight = (scale * power).to(torch.float64).square_() * a
    bins = bin_of(u).view(-1)
    mass.index_add_(0, bins, weight.view(-1))
    moment.index_add_(0, bins, weight.mul_(u).view(-1))


def bin_of(u: Tensor) -> Tensor:
    """The bin of each number, int32: bf16 numbers in ascending order."""
    bits = u.to(torch.bfloat16).view(torch.int16).to(torch.int32)
    return torch.where(bits >= 0, bits + 0x8000, 0x7FFF - (bits & 0x7FFF))


def _bin_values() -> Tensor:
    """The bf16 number of each bin, float64 [V], ascending; those that are not finite as the largest that is."""
    index = torch.arange(_BINS, dtype=torch.int32)
    bits = torch.where(index >= 0x8000, index - 0x8000, 0x7FFF - index - 0x8000)
    values = bits.to(torch.int16).view(torch.bfloat16).to(torch.float64)
    most = torch.finfo(torch.bfloat16).max
    return values.nan_to_num_(nan=0.0).clamp_(-most, most)


def _start(values: Tensor, mass: Tensor, moment: Tensor, bits: int) -> Tensor:
    """Levels to begin with, as dense as is best where there are many: as the cube root of the weights' density.

    (Panter and Dite 1951; the density of a bin is its mass by its width.) Of few levels, the best among those that keep
    cells of equally many such levels whole.
    """
    width = (values[2:] - values[:-2]).div_(2).clamp_(min=0)
    run = (mass[1:-1].pow(1 / 3) * width.pow(2 / 3)).cumsum(0)
    run = torch.cat([run[:1], run, run[-1:]])
    count = 1 << bits
    if count > _FEW:
        marks = (torch.arange(count, dtype=torch.float64) + 0.5) * (run[-1] / count)
        return values.index_select(0, torch.searchsorted(run, marks).clamp_(max=_BINS - 1))
    cell = (run * (_CELLS / run[-1].clamp(min=1e-300))).to(torch.int32).clamp_(max=_CELLS - 1)
    masses, moments = (
        torch.zeros(_CELLS, dtype=torch.float64).index_add_(0, cell, sums) for sums in (mass, moment)
    )
    return best_levels(masses, moments, count)


def best_levels(mass: Tensor, moment: Tensor, count: int) -> Tensor:
    """The levels [count] of the best k-means among those that keep cells [C] whole, ascending, float64.

    By dynamic programming over the cells (Wu 1991): a run of cells i to j − 1 that share a level gains
    (Σ moment)² / Σ mass, and what is best for the first j cells with k levels ends in one such run.
    """
    masses, moments = (torch.cat([torch.zeros(1, dtype=torch.float64), sums.cumsum(0)]) for sums in (mass, moment))
    inside, sums = masses - masses[:, None], moments - moments[:, None]
    gain = sums.square().div_(inside.clamp(min=1e-300)).masked_fill_(inside <= 0, 0.0)
    gain.masked_fill_(torch.ones_like(gain, dtype=torch.bool).tril_(-1), -torch.inf)
    best, begins = gain[0], [torch.zeros(len(masses), dtype=torch.int64)]
    for _ in range(count - 1):
        best, begin = (gain + best[:, None]).max(dim=0)
        begins.append(begin)
    ends = [torch.tensor([len(mass)])]
    for begin in reversed(begins):
        ends.append(begin.index_select(0, ends[-1]))
    cuts = torch.cat(ends[::-1])
    inside, sums = masses.index_select(0, cuts).diff(), moments.index_select(0, cuts).diff()
    # A run of nothing takes the level before it, or the first: it stands for nothing, and the order stays.
    means = torch.where(inside > 0, sums / inside.clamp(min=1e-300), torch.inf)
    return torch.where(inside > 0, means, -torch.inf).cummax(0).values.clamp(min=means.amin())


def lloyd(mass: Tensor, moment: Tensor, start: Tensor, values: Tensor, *, rounds: int = _ROUNDS) -> Tensor:
    """Levels [L] that are each the mean of what is nearest to it, float64, ascending.

    Args:
        mass, moment: Σ c and Σ c·u of each bin [V].
        start: levels to begin with [L], ascending. A level that nothing is nearest to stays where it is.
        values: of the bins [V], ascending.
    """
    masses, moments = (torch.cat([torch.zeros(1, dtype=sums.dtype), sums.cumsum(0)]) for sums in (mass, moment))
    levels, ends = start, torch.tensor([0, len(values)])
    for _ in blocks_to_run(range(rounds)):
        # A bin that is as near to two goes to the lower.
        cuts = torch.searchsorted(values, (levels[1:] + levels[:-1]) / 2, right=True)
        cuts = torch.cat([ends[:1], cuts, ends[1:]])
        inside, sums = masses.index_select(0, cuts).diff(), moments.index_select(0, cuts).diff()
        moved = torch.where(inside > 0, sums / inside.clamp(min=1e-300), levels)
        if not is_fake(moved) and torch.equal(moved, levels):
            break
        levels = moved
    return levels

"""Codebooks of vectors: each level stands for some weights that lie beside each other.

    w [N, K] -> levels bf16 [L, v], L = 2^(b·v), least Σ a_k (w_k − s·level[u]_k)²        s: one scale a group

At the same bits a weight they err less than levels of single weights: 256 vectors of 4 weights lie where there are
weights, while 4 levels for each of them make a grid whose corners are next to empty (Gersho and Gray 1992; for language
models GPTVQ, van Baalen et al. 2024). By GPTQ, at 2 bits in groups of 128, 0.70 to 0.83 of what 4 levels a weight err
by (Gemma 3 270M, block 8).

Groups are divided by their root mean square, and Lloyd's means (1982) of a sample of what is left are the levels. Where
a product knows how errors of one input make up for those of another, the nearest level is so in its metric (`nearest`).

Legend of shapes: N outputs (rows), K inputs, G groups of a row, v weights of a vector, L levels, R rows of a block.
"""

from collections.abc import Iterable, Iterator
from typing import Final

import torch
from torch import Tensor

from memfit.packed.blocks import blocks_of
from memfit.packed.fake import blocks_to_run, is_fake
from memfit.packed.levels import digits
from memfit.packed.scheme import Scheme

from .codebook import relative
from .float_values import normal_groups
from .nearest import SMALLEST, stored

WORKSPACE_NBYTES: Final = 16 << 20
"""fp32 bytes of the rows that are worked on at once, but never less than `_FEWEST` of them; six times that is taken."""
_FEWEST: Final = 64
_SAMPLE: Final = 1 << 15
"""Most vectors that levels are means of."""
_FEW: Final = 1 << 13
"""So many of them are enough for the first rounds."""
_ROUNDS: Final = (8, 5)
"""Of Lloyd's, on few and on all of the sample. By GPTQ, twice as many rounds err by 1 % less."""
_SINGLE_ROUNDS: Final = 20
_STARTS: Final[dict[int, tuple[float, ...]]] = {2: ()}
_OF_MANY: Final = (0.87, 1.15)
"""Scales to start from beside the group's root mean square, in parts of it. The more levels, the more it matters where
the outermost lie: with these, 4 bits in groups of 32 err by 16 % less, 2 bits would by 2 %, for twice the time."""
_CHUNK: Final = 4096


@torch.no_grad()
def learn_vectors(rows: Iterable[Tensor], scheme: Scheme, importance: Tensor | None) -> Tensor:
    """The levels [L, v], bf16, of a weight that comes in blocks of rows [n, K].

    Args:
        importance: [K], none negative; None: all equal.

    Raises:
        ValueError: weights that are not finite, or beyond 2^120.
    """
    chance, share = torch.Generator().manual_seed(0), 1.0
    found: list[tuple[Tensor, Tensor]] = []
    for block in rows:
        for part in blocks_to_run(_blocks(*block.shape)):
            x_nv, weight_nv = _normal(block[part], scheme, importance)
            found.append(_drawn(x_nv, weight_nv, round(x_nv.shape[0] * share), chance))
            del x_nv, weight_nv
            if sum(x.shape[0] for x, _ in found) > _SAMPLE:
                x_nv, weight_nv = (torch.cat(parts) for parts in zip(*found, strict=True))
                share *= _SAMPLE / x_nv.shape[0]
                found = [_drawn(x_nv, weight_nv, _SAMPLE, chance)]
                del x_nv, weight_nv
    x_nv, weight_nv = (torch.cat(parts) for parts in zip(*found, strict=True))
    del found
    count = x_nv.shape[0]
    places = torch.randperm(count, generator=chance)
    x_nv, weight_nv = x_nv.index_select(0, places), weight_nv.index_select(0, places)
    levels_Lv = _grid(x_nv[:_FEW], weight_nv[:_FEW], 1 << scheme.bits)
    for rounds, most in zip(_ROUNDS, (_FEW, count), strict=True):
        for _ in blocks_to_run(range(rounds)):
            levels_Lv = lloyd(x_nv[:most], weight_nv[:most], levels_Lv)
    return levels_Lv.to(torch.bfloat16)


def _normal(rows: Tensor, scheme: Scheme, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """All vectors of some rows, in parts of their group's root mean square, and what their errors count [n, v]."""
    u, power, _ = normal_groups(rows, scheme.groups(rows.shape[1]))
    scale = _deviation(u)
    weight = (scale * power).square_() * relative(importance, rows.shape[1]).view(u.shape[1:])
    return u.div_(scale).view(-1, scheme.vector), weight.reshape(-1, scheme.vector)


def _deviation(u: Tensor) -> Tensor:
    """√(mean u²) of each group [R, G, 1]; of zeros 1."""
    found = u.square().mean(dim=2, keepdim=True).sqrt_()
    return torch.where(found > 0, found, 1.0)


def _drawn(x_nv: Tensor, weight_nv: Tensor, count: int, chance: torch.Generator) -> tuple[Tensor, Tensor]:
    """So many of them, at least one, in an order of chance."""
    if count >= x_nv.shape[0]:
        return x_nv, weight_nv
    picked = torch.randperm(x_nv.shape[0], generator=chance)[: max(count, 1)]
    return x_nv.index_select(0, picked), weight_nv.index_select(0, picked)


def _grid(x_nv: Tensor, weight_nv: Tensor, count: int) -> Tensor:
    """Levels to begin with [count^v, v]: every vector of levels of single weights, which Lloyd's can but improve on."""
    x_n1, weight_n1 = x_nv.reshape(-1, 1), weight_nv.reshape(-1, 1)
    marks = torch.arange(count).mul_(2).add_(1).mul_(x_n1.shape[0]).div_(2 * count, rounding_mode="floor")
    levels = x_n1.sort(dim=0).values.index_select(0, marks)
    for _ in blocks_to_run(range(_SINGLE_ROUNDS)):
        levels = lloyd(x_n1, weight_n1, levels)
    return torch.cartesian_prod(*[levels.view(-1)] * x_nv.shape[1])


def lloyd(x_nv: Tensor, weight_nv: Tensor, levels_Lv: Tensor) -> Tensor:
    """Each level as the weighted mean of the vectors that are nearest to it; where there are none, as it was."""
    moment, mass = torch.zeros_like(levels_Lv), torch.zeros_like(levels_Lv)
    across_vL, half_vL = levels_Lv.t(), levels_Lv.t().square().div_(-2)
    scores = room(min(_CHUNK, x_nv.shape[0]), levels_Lv)
    for start in blocks_to_run(range(0, x_nv.shape[0], _CHUNK)):
        weight = weight_nv[start : start + _CHUNK]
        pull = weight * x_nv[start : start + _CHUNK]
        some = torch.mm(pull, across_vL, out=scores[: pull.shape[0]]).addmm_(weight, half_vL)
        place = some.max(dim=1).indices
        moment.index_add_(0, place, pull)
        mass.index_add_(0, place, weight)
        del weight, pull, some, place
    return torch.where(mass > 0, moment / mass.clamp(min=torch.finfo(mass.dtype).tiny), levels_Lv)


def nearest(y_vR: Tensor, levels_Lv: Tensor, scores: Tensor) -> Tensor:
    """The place of the level with the least ‖y − level‖² for each of y's columns, [R]; `scores`: what `room` made."""
    half_L = levels_Lv.square().sum(dim=1).div_(-2)
    return torch.addmm(half_L, y_vR.t(), levels_Lv.t(), out=scores).max(dim=1).indices


def room(rows: int, levels_Lv: Tensor) -> Tensor:
    """For a score of each level [R, L], to be used again: as fresh memory it would take longer than what is done in it.
    """
    return torch.empty(rows, levels_Lv.shape[0], dtype=levels_Lv.dtype, device=levels_Lv.device)


@torch.no_grad()
def find_vectors(
    weight: Tensor, scheme: Scheme, a: Tensor, *, table: Tensor, search: bool = True
) -> tuple[Tensor, Tensor]:
    """(q int8 [N, K], scale bf16 [N, G]) of vectors that are each the nearest, weighted by a.

    Args:
        a: importances [G, g], none negative, in each group one that is not 0.
        table: the levels [L, v].
        search: whether the best scale for what is nearest with some start is taken where that errs less than with the
            group's root mean square.

    Raises:
        ValueError: weights that are not finite, or beyond 2^120.
    """
    q = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(weight.shape[0], a.shape[0], dtype=torch.bfloat16, device=weight.device)
    for part in blocks_to_run(_blocks(*weight.shape)):
        u, power, alive = normal_groups(weight[part], a.shape[0])
        shape = (u.shape[0], -1)
        plain_GR = stored(_deviation(u)).view(shape).t().contiguous()
        u_KR = u.view(shape).t().contiguous()
        del u
        place, error_GR, best_GR, least_GR = _assigned(u_KR, plain_GR, a, table)
        stored_GR = plain_GR
        if search:
            for share in blocks_to_run(_STARTS.get(scheme.bits, _OF_MANY)):
                _, _, fitted_GR, left_GR = _assigned(u_KR, plain_GR * share, a, table)
                best_GR = torch.where(left_GR < least_GR, fitted_GR, best_GR)
                least_GR = torch.minimum(left_GR, least_GR)
                del fitted_GR, left_GR
            best_GR = stored(best_GR)
            other, less_GR, _, _ = _assigned(u_KR, best_GR, a, table)
            better = less_GR < error_GR
            stored_GR = torch.where(better, best_GR, plain_GR)
            many = place.shape[0] // better.shape[0]
            place = torch.where(better.repeat_interleave(many, dim=0), other, place)
            del other, less_GR, better
        u_RK = digits(place.t().contiguous(), scheme.bits, scheme.vector)
        q[part] = u_RK.sub_(1 << (scheme.bits - 1)).view(torch.int8)
        made = stored_GR.t().mul(power.view(shape))
        scale[part] = torch.where(alive.view(shape), made, SMALLEST)  # no level need be 0
        del u_KR, u_RK, place, plain_GR, best_GR, error_GR, least_GR, stored_GR, power, alive, made
    return q, scale


def _assigned(u_KR: Tensor, scale_GR: Tensor, a: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The places of what is nearest, int16 [K/v, R], and its error; the best scales for it, and its error with them,
    all [G, R]."""
    levels, vector, size = table.to(torch.float32), table.shape[1], a.shape[1]
    places = torch.empty(u_KR.shape[0] // vector, u_KR.shape[1], dtype=torch.int16, device=u_KR.device)
    across, square, error = (torch.zeros_like(scale_GR) for _ in range(3))
    scores = room(u_KR.shape[1], levels)
    for at in blocks_to_run(range(places.shape[0])):
        group, within = divmod(at * vector, size)
        weight = a[group, within : within + vector].unsqueeze(1)
        root, u, s = weight.sqrt(), u_KR[at * vector : (at + 1) * vector], scale_GR[group]
        place = nearest((u * root).div_(s), levels * root.t(), scores)
        level = levels.index_select(0, place).t()
        places[at].copy_(place)
        across[group].add_((weight * u * level).sum(dim=0))
        square[group].add_((weight * level.square()).sum(dim=0))
        error[group].add_((level * s).sub_(u).square_().mul_(weight).sum(dim=0))
        del weight, root, u, s, place, level
    best = across / square
    best = torch.where((square > 0) & (best > 0), best, scale_GR)
    return places, error, best, error - (scale_GR - best).square_().mul_(square)


def _blocks(rows: int, inputs: int) -> Iterator[slice]:
    return (slice(*some) for some in blocks_of(rows, max(_FEWEST, WORKSPACE_NBYTES // (4 * inputs)), 1))


class Vectors:
    """The levels of one weight as GPTQ chooses among them.

    Args:
        coupling: M [K, K], unit upper triangular, and `weights` diag(R)² [K], as in `gptq.Factor`.
        order: [K], the columns' places in the file; those of a vector must come one after another.

    Raises:
        ValueError: they do not.
    """

    def __init__(self, scheme: Scheme, table: Tensor, coupling: Tensor, weights: Tensor, order: Tensor) -> None:
        self.scheme, self.vector, self.coupling = scheme, scheme.vector, coupling
        self.levels, self.roots = table.to(coupling.dtype), weights.sqrt()
        self._scores: Tensor | None = None
        runs = order.view(-1, self.vector)
        due = runs[:, :1].div(self.vector, rounding_mode="floor").mul(self.vector)
        whole = (runs == due + torch.arange(self.vector, device=order.device)).all()
        if not is_fake(whole) and not bool(whole):
            raise ValueError(f"{scheme.name}: the columns of a vector must come one after another in H's order")

    def choose(self, t: Tensor, w: Tensor, s: Tensor, level: Tensor, read: Tensor, first: int) -> None:
        """Write q and what is rounded to ŵ of the vectors that begin with column `first` in H's order; all [v, R].

        Args:
            t: w, and what the errors of columns before the vector come to.
        """
        part = slice(first, first + self.vector)
        near = self.coupling[part, part]
        metric = near * self.roots[part]
        # ‖(t − ŵ) M diag(r)‖, where what w's own columns give each other stands in t's place: t + w (M − 1).
        y = torch.addmm(t, near.triu(1).t(), w).mul_(self.roots[part].unsqueeze(1)).div_(s)
        if self._scores is None:
            self._scores = room(t.shape[1], self.levels)
        place = nearest(y, self.levels @ metric, self._scores)
        torch.mul(self.levels.index_select(0, place).t(), s, out=read)
        half = 1 << (self.scheme.bits - 1)
        level.copy_(digits(place.unsqueeze(1), self.scheme.bits, self.vector).t()).sub_(half)


__all__ = ["Vectors", "find_vectors", "learn_vectors", "lloyd", "nearest", "room"]

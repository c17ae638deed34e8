"""Which weights stay: the largest of each row, or those that matter most for the inputs there are; the rest is 0.

    score [N, K]     magnitude |w|         Wanda |w| · √E[x²]  (Sun et al. 2024), compared within a row
    blocks           the sum of squared scores of a block, compared within a band of 16 rows

N outputs, K inputs, R rows of a block. Every row keeps as many, so that sizes are matters of shape: see `Sparse`. What
stays is stored as it was, in bf16; of equal scores those stay that come first.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from memfit.packed.blocks import blocks_of
from memfit.packed.fake import blocks_to_run, is_fake
from memfit.packed.forms import BLOCK, Own, Sparse
from memfit.packed.sparse import pack

from .made import Made

WORKSPACE_NBYTES: Final = 8 << 20
"""Most bytes of temporaries at one moment, whatever the weight's size, but never less than a row (a band) takes."""
_NBYTES: Final = 20
"""Bytes of temporaries for each weight of a block of rows: scores, the largest of them, places in 64 bits."""


@dataclass(frozen=True, kw_only=True)
class Prune:
    """The technique: magnitude pruning, and with importances Wanda."""

    form: Sparse

    def why_not(self, shape: tuple[int, ...]) -> str | None:
        """Why a weight of this shape cannot be pruned so; None if it can."""
        return self.form.why_not(shape)

    def apply(self, weight: Tensor, *, importance: Tensor | None = None) -> Made:
        return prune(weight, self.form, importance=importance)


@torch.no_grad()
def prune(weight: Tensor, form: Sparse, *, importance: Tensor | None = None) -> Made:
    """What stays of weight [N, K], chosen by |w| or, with importances, by |w| · √importance (Wanda).

    Args:
        weight: in any float type; what stays is rounded to bf16. With a sparsity of 0 all of it stays.
        form: how many stay, and in which pattern.
        importance: [K], mean squares of the inputs; None, or all 0: all equal.

    Raises:
        ValueError: a shape that the form cannot store, weights that are not finite, importances that are negative or
            not finite.
    """
    shape = checked_shape(weight, form)
    root = root_of(importance, shape[1])
    parts = empty_parts(form, shape, weight.device)
    for start, stop in blocks_to_run(row_blocks(shape, form)):
        rows = weight[start:stop]
        put_rows(parts, pack(rows, choose(scores(rows, form, root), form), form), start, shape[0])
    return Made(form=form, shape=shape, parts=parts)


def pruned_rows(
    rows: Iterable[tuple[int, Tensor]], form: Sparse, *, importance: Tensor | None = None
) -> Iterator[tuple[int, Made]]:
    """(first row, what stays of some rows) of a weight that comes in blocks of rows, from its first to its last.

    The same as `prune` of all of it. Blocks may end anywhere: rows that are not yet a whole band wait for the next.
    """
    rest: Tensor | None = None
    for start, block in rows:
        if rest is not None:
            start, block = start - rest.shape[0], torch.cat([rest, block])
        whole = block.shape[0] - (block.shape[0] % BLOCK[0] if form.pattern == "blocks" else 0)
        rest = block[whole:].clone() if whole < block.shape[0] else None
        if whole:
            yield start, prune(block[:whole], form, importance=importance)
        del block
    if rest is not None:
        raise ValueError(f"{form.name}: the last {rest.shape[0]} rows are no whole band of {BLOCK[0]}")


def checked_shape(weight: Tensor, form: Sparse) -> tuple[int, int]:
    """[N, K] of a weight that the form can store; else a ValueError."""
    if weight.dim() != 2:
        raise ValueError(f"pruning takes a weight [N, K], got shape {tuple(weight.shape)}")
    if (reason := form.why_not(tuple(weight.shape))) is not None:
        raise ValueError(f"{form.name} cannot store {tuple(weight.shape)}: {reason}")
    return weight.shape[0], weight.shape[1]


def empty_parts(form: Own, shape: tuple[int, int], device: torch.device) -> dict[str, Tensor]:
    """Room for the parts of a weight."""
    return {part: torch.empty(size, dtype=dtype, device=device) for part, (dtype, size) in form.parts(shape).items()}


def put_rows(parts: Mapping[str, Tensor], made: Mapping[str, Tensor], start: int, rows: int) -> None:
    """Copy the parts of the rows from `start` on to their place among those of all `rows` [N, ...]."""
    for part, values in made.items():
        first = start * parts[part].shape[0] // rows
        parts[part][first : first + values.shape[0]].copy_(values)


def row_blocks(shape: tuple[int, int], form: Sparse) -> list[tuple[int, int]]:
    """Blocks of rows whose temporaries the workspace holds."""
    multiple = BLOCK[0] if form.pattern == "blocks" else 1
    return list(blocks_of(shape[0], WORKSPACE_NBYTES // (_NBYTES * shape[1]), multiple))


def root_of(importance: Tensor | None, inputs: int) -> Tensor | None:
    """√importance [K], the largest 1; None where all are equal.

    Raises:
        ValueError: another number of them, or one is negative or not finite.
    """
    if importance is None:
        return None
    if tuple(importance.shape) != (inputs,):
        raise ValueError(f"importance has shape {tuple(importance.shape)}; the weight has {inputs} inputs")
    wide = importance.to(torch.float64 if importance.dtype == torch.float64 else torch.float32)
    if not is_fake(wide) and not bool((wide.isfinite() & (wide >= 0)).all()):
        raise ValueError("importance must be finite and not negative")
    largest = wide.amax()
    return torch.where(largest > 0, wide / largest, 1.0).sqrt_()


def scores(rows: Tensor, form: Sparse, root: Tensor | None) -> Tensor:
    """How much each weight of rows [R, K] matters, [R, K]; of blocks each block, [R/16, K/16]."""
    score = rows.to(torch.float64 if rows.dtype == torch.float64 else torch.float32, copy=True).abs_()
    if not is_fake(score) and not bool(score.amax() < torch.inf):  # false for NaN too
        raise ValueError("the weight has entries that are not finite")
    if root is not None:
        score.mul_(root)
    if form.pattern != "blocks":
        return score
    height, width = BLOCK
    by_band = score.view(score.shape[0] // height, height, -1, width)
    # Of squares of fp32 the largest would overflow, and the smallest be 0, if a band's largest were not 1.
    largest = by_band.amax(dim=(1, 2, 3), keepdim=True)
    by_band.div_(torch.where(largest > 0, largest, 1.0))
    return by_band.square_().sum(dim=(1, 3))


def choose(score: Tensor, form: Sparse) -> Tensor:
    """What stays: a bool mask of the shape of `score` [n, K], as many in each row as the form keeps. Of equal ones the
    first."""
    if form.pattern == "2:4":
        return _two_of_four(score)
    count = form.kept(score.shape[1] * (BLOCK[1] if form.pattern == "blocks" else 1))
    return largest_of_rows(score, torch.full((), count, device=score.device), count)


def largest_of_rows(score: Tensor, wanted: Tensor, most: int) -> Tensor:
    """A mask of the `wanted` largest of each row of scores [n, K], the first of equal ones; no row wants more than
    `most`."""
    if most == 0:
        return torch.zeros(score.shape, dtype=torch.bool, device=score.device)
    if wanted.dim() == 0:
        least = score.topk(most, dim=1, sorted=False).values.amin(1, keepdim=True)
    else:
        ordered = score.topk(most, dim=1).values
        least = ordered.gather(1, (wanted - 1).clamp_(min=0).unsqueeze(1))
        wanted = wanted.unsqueeze(1)
    mask = score > least
    left = wanted - mask.sum(1, keepdim=True)
    equal = score == least
    return mask.logical_or_(equal.logical_and_(equal.cumsum(1, dtype=torch.int32) <= left))


def _two_of_four(score: Tensor) -> Tensor:
    """The two largest of each four of a row [n, K], the first of equal ones."""
    by_place = score.view(score.shape[0], -1, 4)
    larger = torch.zeros(by_place.shape, dtype=torch.int8, device=score.device)
    for one in range(4):
        for other in range(one + 1, 4):
            behind = by_place[:, :, other] > by_place[:, :, one]
            larger[:, :, one].add_(behind)
            larger[:, :, other].add_(behind.logical_not_())
    return (larger < 2).view(score.shape)

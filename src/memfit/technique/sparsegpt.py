"""SparseGPT: what is pruned is chosen column by column, and what is kept makes up for it.

    H [K, K] = E[x xᵀ] of the inputs          least: tr((W − Ŵ) H (W − Ŵ)ᵀ)

N outputs, K inputs, R rows of a block. As in `gptq`, H = R Rᵀ, and in its order column j sees the errors d of those
before it: with t_j = w_j + Σ_{i<j} d_i M_ij the error of a row is Σ_j r_j (t_j − ŵ_j)², r_j = R_jj². A weight that
stays is t_j, and costs nothing but its rounding to bf16; one that goes costs r_j t_j², which is what Frantar and
Alistarh (2023) choose by (their w² / [H⁻¹]_jj). They spread the sparsity evenly over blocks of 128 columns; here all
columns that a row has left compete for what it may still keep, anew for every few columns, as t changes. And the order
is the other way round than GPTQ's: columns of small inputs first, whose errors those of large ones make up for.

Errors, of Gemma 3 270M at 50 %, in % of what the layer gives (q, o, gate and down of block 11, 192 rows each):

    Wanda                                           1.53   4.24   1.44   0.40
    spread evenly over blocks of 128, as they lie   0.77   2.02   0.76   0.16
    all columns compete, largest inputs first       0.64   0.84   0.70   0.15
    all columns compete, smallest inputs first      0.63   0.76   0.61   0.12
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from memfit.packed.blocks import blocks_of
from memfit.packed.fake import blocks_to_run, is_fake
from memfit.packed.forms import BLOCK, Sparse
from memfit.packed.sparse import pack

from .gptq import DAMPING, Factor, factor, in_runs
from .made import Made
from .prune import checked_shape, empty_parts, largest_of_rows, put_rows

_COLUMNS: Final = 128
"""Columns whose errors go to all that follow by one product."""
_STRIP: Final = 32
"""Columns that are chosen at once."""
_FEW: Final = 256
"""Up to so many columns that are left are compared exactly; of more, so many tell where the limit is, about."""
_HALVINGS: Final = 16
"""Of the interval that holds that limit."""
WORKSPACE_NBYTES: Final = 64 << 20
"""Most bytes of temporaries at one moment, but never less than a row (a band) takes."""
_NBYTES: Final = 20
"""Bytes of temporaries for each weight of a block of rows: w and t in fp32, scores of all, what is chosen in bf16."""


@dataclass(frozen=True, kw_only=True)
class SparseGpt:
    """The technique."""

    form: Sparse
    damping: float = DAMPING

    def why_not(self, shape: tuple[int, ...]) -> str | None:
        """Why a weight of this shape cannot be pruned so; None if it can."""
        return self.form.why_not(shape)

    def apply(self, weight: Tensor, hessian: Tensor) -> Made:
        """Prune `weight` [N, K] for inputs with E[x xᵀ] = `hessian` [K, K]; see `sparsegpt`."""
        return sparsegpt(weight, hessian, self.form, damping=self.damping)


def order_for(importance: Tensor, form: Sparse, together: int = 1) -> Tensor:
    """The order of columns [K] that `factor` is best given for a form: from the smallest E[x²] to the largest, of 2:4
    from the largest on.

    Fours and blocks stay together: what is chosen together is compared when none of it has been decided. Fours can put
    nothing off until later, and the other way round errs a tenth to a third more (Gemma 3 270M, 7 layers of 7).
    `together`: that others which share H need beside each other.
    """
    side_by_side = max(together, {"any": 1, "2:4": 4, "blocks": BLOCK[1]}[form.pattern])
    sums = importance.view(-1, side_by_side).sum(1)
    return in_runs(sums.argsort(stable=True, descending=form.pattern == "2:4"), side_by_side)


@torch.no_grad()
def sparsegpt(
    weight: Tensor, hessian: "Tensor | Factor", form: Sparse, *, damping: float = DAMPING, rows: int | None = None
) -> Made:
    """What stays of weight [N, K] for inputs with E[x xᵀ] = `hessian`, made up for what goes.

    Args:
        weight: in any float type; computed in fp32, in fp64 if H is; what stays is stored in bf16.
        hessian: H [K, K], or what `factor` made of it, for all weights that read the same inputs: in any order, but
            `order_for` gives the best.
        form: how many stay in each row, and in which pattern.
        damping: see `factor`; of no use with a factor.
        rows: worked on at once, of blocks whole bands of them; None: as many as `WORKSPACE_NBYTES` hold. No row (band)
            depends on another.

    Raises:
        ValueError: as `prune` and `factor` do; a Hessian of another width.
    """
    shape = checked_shape(weight, form)
    if isinstance(hessian, Factor):
        made = hessian
    else:
        made = factor(hessian, damping=damping, order=order_for(hessian.diagonal(), form))
    if made.order.shape[0] != shape[1]:
        raise ValueError(f"the Hessian is of {made.order.shape[0]} inputs, the weight has {shape[1]}")
    parts = empty_parts(form, shape, weight.device)
    multiple = BLOCK[0] if form.pattern == "blocks" else 1
    for start, stop in blocks_to_run(blocks_of(shape[0], rows or WORKSPACE_NBYTES // (_NBYTES * shape[1]), multiple)):
        values, mask = _compensated(weight[start:stop], made, form)
        put_rows(parts, pack(values, mask, form), start, shape[0])
        del values, mask
    return Made(form=form, shape=shape, parts=parts)


def _compensated(rows: Tensor, made: Factor, form: Sparse) -> tuple[Tensor, Tensor]:
    """ŵ of some rows, bf16 [R, K], and the mask of what stays, as `pack` takes it."""
    wide, order, size = made.coupling.dtype, made.order, rows.shape[1]
    if not is_fake(rows) and not bool(rows.abs().amax() < torch.inf):
        raise ValueError("the weight has entries that are not finite")
    w_KR = rows.to(wide).index_select(1, order).t().contiguous()
    t_KR = w_KR.clone()
    read_KR = torch.empty(size, rows.shape[0], dtype=torch.bfloat16, device=rows.device)
    kept_KR = torch.empty(size, rows.shape[0], dtype=torch.bool, device=rows.device)
    chooser = _CHOOSERS[form.pattern](made, form, rows.shape[0])
    for first, last in blocks_to_run(_column_blocks(size)):
        chooser.look(t_KR, first)
        for strip in blocks_to_run(range(first, last, _STRIP)):
            end = min(strip + _STRIP, last)
            kept_KR[strip:end].copy_(chooser.keep(t_KR, strip, end))
            for j in blocks_to_run(range(strip, end)):
                read_KR[j].copy_(t_KR[j]).mul_(kept_KR[j])
                w_KR[j].sub_(read_KR[j])  # what is done of w holds d = w − ŵ
                if j + 1 < end:
                    t_KR[j + 1 : end].addr_(made.coupling[j, j + 1 : end], w_KR[j])
            if end < last:
                t_KR[end:last].addmm_(made.coupling[strip:end, end:last].t(), w_KR[strip:end])
        if last < size:
            t_KR[last:].addmm_(made.coupling[first:last, last:].t(), w_KR[first:last])
    del w_KR, t_KR
    values = torch.empty_like(read_KR).index_copy_(0, order, read_KR).t().contiguous()
    del read_KR
    if form.pattern == "blocks":
        whole = torch.empty_like(kept_KR).index_copy_(0, order, kept_KR)
        return values, whole[:: BLOCK[1], :: BLOCK[0]].t().contiguous()
    return values, torch.empty_like(kept_KR).index_copy_(0, order, kept_KR).t().contiguous()


def _column_blocks(size: int) -> list[tuple[int, int]]:
    """Blocks of columns; the last ones are of a strip each, as what is left is compared exactly before each."""
    far = max(0, size - _FEW) // _COLUMNS * _COLUMNS
    return [*blocks_of(far, _COLUMNS, 1), *((far + a, far + b) for a, b in blocks_of(size - far, _STRIP, 1))]


class _Chooser(Protocol):
    """Decides what stays, in the order of columns; keeps account of what each row may still keep."""

    def look(self, t_KR: Tensor, first: int) -> None:
        """A block begins at column `first`: t is what it is now for all columns from there on."""
        ...

    def keep(self, t_KR: Tensor, first: int, last: int) -> Tensor:
        """Which weights of the columns first to last stay, bool [last − first, R]."""
        ...


class _Any:
    """The largest √r |t| of all that are left of a row."""

    def __init__(self, made: Factor, form: Sparse, rows: int) -> None:
        self.size = made.order.shape[0]
        self.most = form.kept(self.size)
        self.root = made.weights.sqrt().unsqueeze(1)
        self.left = torch.full((rows,), self.most, dtype=torch.int64, device=made.order.device)
        self.limit: Tensor | None = None

    def look(self, t_KR: Tensor, first: int) -> None:
        """Find the limit that about as many are above as may be kept, from some of the columns."""
        ahead = self.size - first
        self.limit = None
        if ahead <= _FEW or first + _COLUMNS > max(0, self.size - _FEW) // _COLUMNS * _COLUMNS:
            return
        step = ahead // _FEW
        score = t_KR[first::step].abs().mul_(self.root[first::step])
        wanted = self.left * score.shape[0] / ahead
        high = score.amax(0)
        low = torch.zeros_like(high)
        for _ in blocks_to_run(range(_HALVINGS)):
            middle = (low + high).mul_(0.5)
            more = (score > middle).sum(0) > wanted
            low = torch.where(more, middle, low)
            high = torch.where(more, high, middle)
        self.limit = high

    def keep(self, t_KR: Tensor, first: int, last: int) -> Tensor:
        score = t_KR[first : last if self.limit is not None else self.size].abs()
        score.mul_(self.root[first : first + score.shape[0]])
        if self.limit is None:
            most = min(self.most, self.size - first)
            chosen = largest_of_rows(score.t().contiguous(), self.left, most)[:, : last - first].t()
        else:
            chosen = score > self.limit
            found = chosen.sum(0)
            # No more than may be, and no fewer than leave what later columns can keep.
            due = torch.minimum(torch.maximum(found, self.left - (self.size - last)), self.left)
            if not is_fake(found) and not torch.equal(found, due):
                chosen = largest_of_rows(score.t().contiguous(), due, last - first).t()
        self.left.sub_(chosen.sum(0))
        return chosen


class _TwoOfFour:
    """Of each four the two largest √r |t|: of those that have not been decided, as many as are left to it."""

    def __init__(self, made: Factor, form: Sparse, rows: int) -> None:
        size = made.order.shape[0]
        self.order, self.root = made.order, made.weights.sqrt()
        self.place = torch.empty_like(made.order)
        self.place[made.order] = torch.arange(size, device=made.order.device)
        self.left = torch.full((size // 4, rows), 2, dtype=torch.int8, device=made.order.device)

    def look(self, t_KR: Tensor, first: int) -> None:
        """Nothing: four columns are compared when they are decided."""

    def keep(self, t_KR: Tensor, first: int, last: int) -> Tensor:
        columns = self.order[first:last]
        group = torch.div(columns, 4, rounding_mode="floor")
        own = columns % 4
        score = t_KR[first:last].abs().mul_(self.root[first:last].unsqueeze(1))
        before = torch.zeros(score.shape, dtype=torch.int8, device=score.device)
        for member in range(4):
            place = self.place[group * 4 + member]
            other = t_KR.index_select(0, place).abs_().mul_(self.root[place].unsqueeze(1))
            open_ = place.ge(first).unsqueeze(1)
            earlier = own.gt(member).unsqueeze(1)
            before.add_(((other > score) | ((other == score) & earlier)).logical_and_(open_))
        chosen = before < self.left.index_select(0, group)
        self.left.index_add_(0, group, chosen.to(torch.int8), alpha=-1)
        return chosen


class _Blocks:
    """The blocks with the largest Σ r t² of all that are left of a band; decided when their first column comes."""

    def __init__(self, made: Factor, form: Sparse, rows: int) -> None:
        size, width = made.order.shape[0], BLOCK[1]
        # What fakes cannot tell does not change what is held at the first choice, which is the most.
        order = list(range(size)) if is_fake(made.order) else made.order.tolist()
        place: list[int] = [0] * size
        for position, column in enumerate(order):
            place[column] = position
        self.places = [place[block * width : (block + 1) * width] for block in range(size // width)]
        self.block_of = [column // width for column in order]
        self.weights, self.most = made.weights.unsqueeze(1), form.kept(size)
        bands = rows // BLOCK[0]
        self.left = torch.full((bands,), self.most, dtype=torch.int64, device=made.order.device)
        self.kept = torch.zeros(len(self.places), bands, dtype=torch.bool, device=made.order.device)

    def look(self, t_KR: Tensor, first: int) -> None:
        """Nothing: see `keep`."""

    def keep(self, t_KR: Tensor, first: int, last: int) -> Tensor:
        begins = [min(places) for places in self.places]
        opened = [block for block, at in enumerate(begins) if at >= first]
        now = [place for place, block in enumerate(opened) if begins[block] < last]
        if now:
            device = t_KR.device
            at = torch.tensor([place for block in opened for place in self.places[block]], device=device)
            cost = t_KR.index_select(0, at).square_().mul_(self.weights.index_select(0, at))
            by_block = cost.view(len(opened), BLOCK[1], -1, BLOCK[0]).sum(dim=(1, 3))
            del cost
            chosen = largest_of_rows(by_block.t().contiguous(), self.left, min(self.most, len(opened))).t()
            decided = chosen[torch.tensor(now, device=device)]
            self.kept[torch.tensor([opened[place] for place in now], device=device)] = decided
            self.left.sub_(decided.sum(0))
        here = self.kept[torch.tensor(self.block_of[first:last], device=t_KR.device)]
        return here.repeat_interleave(BLOCK[0], dim=1)


_CHOOSERS: Final[dict[str, Callable[[Factor, Sparse, int], _Chooser]]] = {
    "any": _Any, "2:4": _TwoOfFour, "blocks": _Blocks,
}  # fmt: skip

__all__ = ["SparseGpt", "order_for", "sparsegpt"]

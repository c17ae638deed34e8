"""Prune and regrow while training (RigL; Evci et al. 2020): the sparsity stays, its places move.

Every few steps the smallest weights of each row go, and as many grow where the gradient is largest, from 0:

    share(n) = share / 2 · (1 + cos(π n / end))          of what a row keeps

Call `step` after the optimizer's step and before its gradients are gone:

    pruning = Regrow(model, Sparse(sparsity=0.9), end=750)
    for n, batch in enumerate(batches, 1):
        ...
        optimizer.step()
        pruning.step(n)
        optimizer.zero_grad()
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from memfit.packed.forms import BLOCK, Sparse

from .masks import Masks, size_of
from .prune import choose, largest_of_rows


class Regrow(Masks):
    """Masks of one sparsity whose places move. They begin where the weights are largest; `model` is masked at once.

    Args:
        form: what each row keeps, from the first step on. Of 2:4 a place moves within its four.
        end: the step from which on nothing moves.
        every: steps between two moves.
        share: of what a row keeps, moved first; never less than one.
    """

    def __init__(
        self, model: nn.Module, form: Sparse, *, end: int, every: int = 100, share: float = 0.3,
        names: Iterable[str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(model, form, names)
        if end < 1 or every < 1 or not 0.0 < share <= 1.0:
            raise ValueError(f"end and every must be 1 or more, and share above 0 to 1, got {end}, {every}, {share}")
        self.end, self.every, self.first = end, every, share
        for name, weight in self.weights.items():
            self.masks[name].copy_(choose(size_of(weight, form), form))
        self.apply()

    def share(self, n: int) -> float:
        """Of what a row keeps, moved after step n."""
        if n >= self.end or n % self.every:
            return 0.0
        return self.first / 2 * (1 + math.cos(math.pi * n / self.end))

    @torch.no_grad()
    def step(self, n: int) -> None:
        """Move the masks if step n is one at which they move, and set to 0 what is masked.

        Raises:
            ValueError: they move, and a weight has no gradient.
        """
        share = self.share(n)
        if share:
            for name, weight in self.weights.items():
                if weight.grad is None:
                    raise ValueError(f"{name} has no gradient after step {n}: call `step` before `zero_grad`")
                size, pull = size_of(weight, self.form), size_of(weight.grad, self.form)
                move = _move_in_fours if self.form.pattern == "2:4" else _move
                grown = move(self.masks[name], size, pull, share)
                weight.detach().masked_fill_(_spread(grown, self.form), 0.0)
        self.apply()


def _move(mask: Tensor, size: Tensor, pull: Tensor, share: float) -> Tensor:
    """Move masks [n, k] in place, as many in each row; what has grown."""
    kept = int(mask[0].sum())
    moved = min(max(round(share * kept), 1), kept, mask.shape[1] - kept)
    if not moved:
        return torch.zeros_like(mask)
    # Only what was not there before the move can grow, or nothing might move at all.
    grown = largest_of_rows(pull.masked_fill(mask, -1.0), torch.tensor(moved, device=mask.device), moved)
    left = torch.tensor(kept - moved, device=mask.device)
    mask.copy_(largest_of_rows(size.masked_fill(~mask, -1.0), left, kept - moved)).logical_or_(grown)
    return grown


def _move_in_fours(mask: Tensor, size: Tensor, pull: Tensor, share: float) -> Tensor:
    """As `_move`: in the fours whose smaller weight is least it goes, and the other place that pulls most grows."""
    fours = (mask.shape[0], mask.shape[1] // 4)
    moved = min(max(round(2 * share * fours[1]), 1), fours[1])
    by_four = mask.view(*fours, 4)
    least = size.masked_fill(~mask, torch.inf).view(*fours, 4).min(2)
    most = pull.masked_fill(mask, -1.0).view(*fours, 4).argmax(2, keepdim=True)
    moves = largest_of_rows(-least.values, torch.tensor(moved, device=mask.device), moved).unsqueeze(2)
    grown = torch.zeros_like(by_four).scatter_(2, most, moves)
    gone = torch.zeros_like(by_four).scatter_(2, least.indices.unsqueeze(2), moves)
    by_four.logical_and_(~gone).logical_or_(grown)
    return grown.view(mask.shape)


def _spread(mask: Tensor, form: Sparse) -> Tensor:
    """A mask of weights from one of units."""
    if form.pattern != "blocks":
        return mask
    return mask.repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1)

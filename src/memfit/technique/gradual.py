"""Gradual magnitude pruning: while a model is trained more and more of its smallest weights go (Zhu and Gupta 2017).

    s(n) = s_end + (s_begin − s_end) (1 − (n − begin) / (end − begin))³          n the step

What is gone stays gone. Use it in any loop, after the optimizer's step:

    pruning = Gradual(model, Sparse(sparsity=0.8), begin=100, end=900)
    for n, batch in enumerate(batches, 1):
        ...
        optimizer.step()
        pruning.step(n)
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from memfit.packed.forms import Sparse

from .masks import Masks, size_of
from .prune import choose, largest_of_rows


class Gradual(Masks):
    """Masks that close with the steps. After each, every row keeps as many: `kept(n, K)`.

    Args:
        form: what each row keeps from step `end` on. Of 2:4 more and more fours have lost two.
        begin: the last step with a sparsity of `first`.
        every: steps between two choices; the mask is kept at each step.
    """

    def __init__(
        self, model: nn.Module, form: Sparse, *, begin: int, end: int, every: int = 1, first: float = 0.0,
        names: Iterable[str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(model, form, names)
        if not 0 <= begin <= end or every < 1:
            raise ValueError(f"wanted: 0 <= begin <= end and every >= 1, got {begin}, {end} and {every}")
        if not 0.0 <= first <= form.sparsity:
            raise ValueError(f"first must be 0 to {form.sparsity:g}, where it ends, got {first}")
        self.begin, self.end, self.every, self.first = begin, end, every, first

    def sparsity(self, n: int) -> float:
        """Share of the weights that are gone after step n, about: each row rounds it."""
        last = self.form.sparsity
        if n >= self.end:
            return last
        n = max(n - max(n - self.begin, 0) % self.every, self.begin)
        return last + (self.first - last) * (1 - (n - self.begin) / (self.end - self.begin)) ** 3

    def kept(self, n: int, inputs: int) -> int:
        """Units of a row with so many inputs that stay after step n: weights, of 2:4 whole fours, of blocks blocks."""
        if self.form.pattern == "2:4":
            fours = inputs // 4
            return fours - round(2 * self.sparsity(n) * fours)
        return Sparse(pattern=self.form.pattern, sparsity=self.sparsity(n)).kept(inputs)

    @torch.no_grad()
    def step(self, n: int) -> None:
        """Choose what stays after step n, counted as the schedule counts them, and set the rest to 0."""
        for name, weight in self.weights.items():
            size = size_of(weight, self.form).masked_fill_(~self.masks[name], -1.0)  # what is gone is not taken back
            kept = self.kept(n, weight.shape[1])
            if self.form.pattern == "2:4":
                self.masks[name].copy_(_fours(size, self.masks[name], kept))
            elif int(self.masks[name][0].sum()) > kept:
                self.masks[name].copy_(largest_of_rows(size, torch.tensor(kept, device=weight.device), kept))
        self.apply()


def _fours(size: Tensor, mask: Tensor, whole: int) -> Tensor:
    """A mask of sizes [N, K] that leaves `whole` fours of each row whole, and of the others the two largest."""
    two = choose(size, Sparse(pattern="2:4"))
    by_four = size.clamp(min=0).square_().masked_fill_(two, 0.0).view(size.shape[0], -1, 4).sum(2)
    # Fours that have lost two already lose nothing more, and must not become whole.
    lost = mask.view(size.shape[0], -1, 4).all(2).logical_not_()
    if not whole:
        return two
    stays = largest_of_rows(by_four.masked_fill_(lost, -1.0), torch.tensor(whole, device=size.device), whole)
    return two.logical_or_(stays.logical_and_(lost.logical_not_()).repeat_interleave(4, dim=1))

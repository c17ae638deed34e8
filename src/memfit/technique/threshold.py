"""One threshold of magnitude for a whole model, and the L1 penalty that brings weights below it.

A layer's sparsity is the share of its weights below the threshold; within it every row keeps as many, as `Sparse` asks.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from memfit.packed.forms import Sparse

from .masks import weights_of


def l1(model: nn.Module, names: Iterable[str] | None = None) -> Tensor:
    """Σ |w| over the weights of linear layers (None: all but the head), for a loss: loss + rate · l1(model)."""
    return torch.stack([weight.abs().sum() for weight in weights_of(model, None, names).values()]).sum()


@torch.no_grad()
def shrink(model: nn.Module, amount: float, names: Iterable[str] | None = None) -> None:
    """Bring each weight nearer to 0 by `amount`, and those that are nearer to 0 itself: after an optimizer's step of
    rate r, with amount = r · rate, the exact step for a loss + rate · Σ |w| (ISTA; Daubechies et al. 2004).

    Raises:
        ValueError: the amount is negative.
    """
    if not amount >= 0:
        raise ValueError(f"amount must be 0 or more, got {amount}")
    for weight in weights_of(model, None, names).values():
        weight.copy_(nn.functional.softshrink(weight, amount))


@torch.no_grad()
def threshold_of(weights: Mapping[str, Tensor], sparsity: float) -> float:
    """|w| below which lies a share of all weights, to a ten-thousandth of their largest magnitude.

    Raises:
        ValueError: the share is not 0 to 1.
    """
    if not 0.0 <= sparsity <= 1.0:
        raise ValueError(f"sparsity must be 0 to 1, got {sparsity}")
    low, high = 0.0, max(float(weight.abs().amax()) for weight in weights.values())
    wanted = sparsity * sum(weight.numel() for weight in weights.values())
    for _ in range(14):
        middle = (low + high) / 2
        below = sum(int((weight.abs() < middle).sum()) for weight in weights.values())
        low, high = (middle, high) if below < wanted else (low, middle)
    return high if sparsity else 0.0


@torch.no_grad()
def forms_below(weights: Mapping[str, Tensor], threshold: float, *, most: float = 0.95) -> dict[str, Sparse]:
    """What to keep of each weight [N, K]: as large a share as is not below the threshold, but no sparsity above `most`,
    so that no layer is lost whole. Give each to `prune`."""
    return {
        name: Sparse(sparsity=min(most, float((weight.abs() < threshold).float().mean())))
        for name, weight in weights.items()
    }

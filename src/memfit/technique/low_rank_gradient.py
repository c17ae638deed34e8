"""Adam's moments of a projected gradient: GaLore (Zhao et al., 2024) and APOLLO (Zhu et al., 2025).

The shorter side of the matrix is projected to rank r, and the moments are of that size. GaLore takes the leading
singular vectors of the gradient, anew every so many steps, and projects Adam's update back. APOLLO takes a random
projection, and only learns from it by how much each channel of the whole gradient is to be scaled: it never needs
singular vectors, and its step stays in the full space.

Legend: the matrix [M, N] with M ≤ N (else it is turned), r rank.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .rule import Tiles


@dataclass(frozen=True, kw_only=True)
class LowRankAdam:
    """The rule and its settings."""

    kind: str = "apollo"
    rank: int = 128
    every: int = 200
    """Steps between projections."""
    scale: float = 0.25
    """GaLore's α, by which its updates are multiplied. APOLLO has none."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if self.kind not in ("galore", "apollo"):
            raise ValueError(f"kind must be galore or apollo, got {self.kind!r}")
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")

    def applies(self, shape: torch.Size) -> bool:
        return len(shape) == 2 and min(shape) > self.rank

    def shapes(self, shape: torch.Size) -> Mapping[str, tuple[int, ...]]:
        short, long = min(shape), max(shape)
        moments = {"first": (self.rank, long), "second": (self.rank, long)}
        return moments if self.kind == "apollo" else moments | {"basis": (short, self.rank)}

    def update(
        self, weight: Tensor, gradient: Tensor, state: Tiles, *, lr: float, weight_decay: float, step: int, seed: int
    ) -> None:
        turned = gradient.shape[0] > gradient.shape[1]
        g_MN = gradient.t() if turned else gradient
        if self.kind == "galore":
            basis_Mr = state["basis"]
            if step % self.every == 1 or self.every == 1:
                basis_Mr.copy_(_leading(g_MN, self.rank))
        else:
            basis_Mr = self._random(g_MN, step)
        low_rN = basis_Mr.t() @ g_MN
        beta1, beta2 = self.betas
        state["first"].lerp_(low_rN, 1.0 - beta1)
        state["second"].mul_(beta2).addcmul_(low_rN, low_rN, value=1.0 - beta2)
        update_rN = state["first"] / (1.0 - beta1**step)
        update_rN.div_(state["second"].sqrt().div_(math.sqrt(1.0 - beta2**step)).add_(self.eps))
        if weight_decay:
            weight.mul_(1.0 - lr * weight_decay)
        if self.kind == "galore":
            moved = basis_Mr @ update_rN
            weight.add_(moved.t() if turned else moved, alpha=-lr * self.scale)
            return
        # How much each column was scaled by Adam in the projection is how much it is scaled in full.
        by = torch.linalg.vector_norm(update_rN, dim=0).div_(
            torch.linalg.vector_norm(low_rN, dim=0).add_(self.eps)
        )
        g_MN.mul_(by)
        weight.add_(gradient, alpha=-lr)

    def _random(self, g_MN: Tensor, step: int) -> Tensor:
        """N(0, 1/r), the same for `every` steps."""
        generator = torch.Generator(device=g_MN.device).manual_seed(1 + (step - 1) // self.every)
        size = (g_MN.shape[0], self.rank)
        made = torch.randn(size, generator=generator, dtype=g_MN.dtype, device=g_MN.device)
        made.div_(math.sqrt(self.rank))
        return made


def _leading(g_MN: Tensor, rank: int) -> Tensor:
    """The leading left singular vectors [M, r], from the Gram matrix: M ≤ N, so this is the smaller problem."""
    _, vectors = torch.linalg.eigh(g_MN @ g_MN.t())
    leading: Tensor = vectors[:, -rank:].flip(1)
    return leading

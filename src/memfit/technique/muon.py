"""Muon (Jordan et al., 2024), as torch.optim.Muon: a hidden matrix moves by its momentum, made orthogonal.

    B ← μ B + (1 − μ) g,    U = NewtonSchulz(g + μ (B − g)),    w ← w − η λ w − η √max(1, rows / columns) U
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from .rule import Tiles

_COEFFICIENTS: Final = (3.4445, -4.7750, 2.0315)
"""Of the quintic whose five turns bring every singular value near to 1."""


@dataclass(frozen=True, kw_only=True)
class Muon:
    """The rule and its settings."""

    momentum: float = 0.95
    turns: int = 5

    def applies(self, shape: torch.Size) -> bool:
        return len(shape) == 2

    def shapes(self, shape: torch.Size) -> Mapping[str, tuple[int, ...]]:
        return {"momentum": tuple(shape)}

    def update(
        self, weight: Tensor, gradient: Tensor, state: Tiles, *, lr: float, weight_decay: float, step: int, seed: int
    ) -> None:
        state["momentum"].lerp_(gradient, 1.0 - self.momentum)
        direction = orthogonal(gradient.lerp_(state["momentum"], self.momentum), turns=self.turns)
        if weight_decay:
            weight.mul_(1.0 - lr * weight_decay)
        ratio = max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5
        weight.add_(direction.to(weight.dtype), alpha=-lr * ratio)


def orthogonal(matrix: Tensor, *, turns: int) -> Tensor:
    """Newton-Schulz, in bf16 as its authors run it: singular values of about 1, the same singular vectors."""
    a, b, c = _COEFFICIENTS
    x = matrix.bfloat16()
    tall = x.shape[0] > x.shape[1]
    x = x.t() if tall else x
    x = x.div(torch.linalg.vector_norm(x).clamp_(min=1e-7))
    for _ in range(turns):
        gram = x @ x.t()
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.t() if tall else x

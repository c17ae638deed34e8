"""Adafactor (Shazeer & Stern, 2018), as torch.optim.Adafactor: a matrix's second moment by its rows and columns.

    ρ = min(η, 1/√t),  α = max(ε₂, RMS(w)) ρ,  β = 1 − t^−0.8
    R ← β R + (1 − β) mean over columns of g²,  C the same over rows,   V = R Cᵀ / mean(R)
    U = g / √V,   w ← w − η λ w − α U / max(1, RMS(U) / d)

Vectors keep their whole second moment. The gradient is the only copy of the matrix's size.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .rule import Tiles


@dataclass(frozen=True, kw_only=True)
class Adafactor:
    """The rule and its settings."""

    clip: float = 1.0
    """d: the largest root mean square of an update."""
    decay: float = -0.8
    eps2: float = 1e-3

    def applies(self, shape: torch.Size) -> bool:
        return len(shape) > 0

    def shapes(self, shape: torch.Size) -> Mapping[str, tuple[int, ...]]:
        if len(shape) < 2:
            return {"second": tuple(shape)}
        return {"rows": (*shape[:-1], 1), "columns": (*shape[:-2], 1, shape[-1])}

    def update(
        self, weight: Tensor, gradient: Tensor, state: Tiles, *, lr: float, weight_decay: float, step: int, seed: int
    ) -> None:
        keep = 1.0 - step**self.decay  # β
        size = _root_mean_square(weight).clamp_(min=self.eps2).mul_(min(lr, step**-0.5))
        if weight_decay:
            weight.mul_(1.0 - lr * weight_decay)
        tiny = torch.finfo(gradient.dtype).eps
        if "second" in state:
            state["second"].mul_(keep).addcmul_(gradient, gradient, value=1.0 - keep)
            gradient.mul_(state["second"].clamp(min=tiny * tiny).rsqrt_())
        else:
            rows, columns = state["rows"], state["columns"]
            # Norms along one dimension read the matrix and write a vector: no square of the whole is made.
            by_row = torch.linalg.vector_norm(gradient, dim=-1, keepdim=True).square_().div_(gradient.shape[-1])
            rows.lerp_(by_row, 1.0 - keep)
            by_column = torch.linalg.vector_norm(gradient, dim=-2, keepdim=True).square_().div_(gradient.shape[-2])
            columns.lerp_(by_column, 1.0 - keep)
            mean = rows.mean(dim=-2, keepdim=True).clamp_(min=tiny)
            # 1/√(R C / mean R), by a row's and a column's factor; clamped together as the product would be.
            gradient.mul_(rows.div(mean).clamp_(min=tiny).rsqrt_()).mul_(columns.clamp(min=tiny * tiny).rsqrt_())
        clip = _root_mean_square(gradient).div_(self.clip).clamp_(min=1.0)
        weight.sub_(gradient.mul_(size.div_(clip)))


def _root_mean_square(tensor: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor)
    return norm.div_(tensor.numel() ** 0.5)

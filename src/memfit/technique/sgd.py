"""Stochastic gradient descent with momentum (Polyak, 1964), as torch.optim.SGD: b ← μ b + g, w ← w − η b.

Weight decay is decoupled here, w ← w − η λ w, as in all of memfit's rules.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from memfit.packed.rounding import round_stochastically

from .rule import Layout, Tiles
from .state_bits import Code


@dataclass(frozen=True, kw_only=True)
class SGD:
    """The rule and its settings; without momentum it has no state."""

    momentum: float = 0.9
    nesterov: bool = False
    state_bits: int = 32

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be at least 0 and below 1, got {self.momentum}")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        if self.state_bits not in (32, 16, 8, 4):
            raise ValueError(f"state_bits must be 32, 16, 8 or 4, got {self.state_bits}")

    def layout(self) -> Mapping[str, Layout]:
        if not self.momentum:
            return {}
        if self.state_bits == 32:
            return {"momentum": Layout(dtype=torch.float32)}
        if self.state_bits == 16:
            return {"momentum": Layout(dtype=torch.bfloat16)}
        return self._code.layout("momentum")

    @property
    def _code(self) -> Code:
        return Code(bits=self.state_bits, signed=True)

    def update(
        self, weight: Tensor, gradient: Tensor, state: Tiles, *, lr: float, weight_decay: float, step: int, seed: int
    ) -> None:
        if weight_decay:
            weight.mul_(1.0 - lr * weight_decay)
        if not self.momentum:
            weight.add_(gradient, alpha=-lr)
            return
        few = self.state_bits in (8, 4)
        if few:
            momentum = self._code.decode(state["momentum_codes"], state["momentum_scales"], weight.numel())
        else:
            momentum = state["momentum"] if self.state_bits == 32 else state["momentum"].float()
        momentum.mul_(self.momentum).add_(gradient)
        weight.add_(gradient.add_(momentum, alpha=self.momentum) if self.nesterov else momentum, alpha=-lr)
        if few:
            self._code.encode(momentum, state["momentum_codes"], state["momentum_scales"])
        elif self.state_bits == 16:
            round_stochastically(momentum, state["momentum"], seed=seed + 1)

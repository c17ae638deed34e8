"""AdamW (Loshchilov & Hutter, 2019), its two moments in 32, 16, 8 or 4 bits.

    m ← β₁ m + (1 − β₁) g        v ← β₂ v + (1 − β₂) g²
    w ← w − η λ w − η · m / (1 − β₁^t) / (√(v / (1 − β₂^t)) + ε)

The update uses the moments as they are before they are written in fewer bits. In bf16 they are rounded by chance:
with β₂ = 0.999 a step changes v by less than bf16's half step, and rounding to the nearest would never let it fall.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from memfit.packed.rounding import round_stochastically

from .rule import Layout, Tiles
from .state_bits import Code


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """The rule and its settings."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    state_bits: int = 32

    def __post_init__(self) -> None:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be at least 0 and below 1, got {self.betas}")
        if self.state_bits not in (32, 16, 8, 4):
            raise ValueError(f"state_bits must be 32, 16, 8 or 4, got {self.state_bits}")

    def layout(self) -> Mapping[str, Layout]:
        if self.state_bits in (32, 16):
            dtype = torch.float32 if self.state_bits == 32 else torch.bfloat16
            return {"first": Layout(dtype=dtype), "second": Layout(dtype=dtype)}
        first, second = self._codes
        return first.layout("first") | second.layout("second")

    @property
    def _codes(self) -> tuple[Code, Code]:
        return Code(bits=self.state_bits, signed=True), Code(bits=self.state_bits, signed=False)

    def update(
        self, weight: Tensor, gradient: Tensor, state: Tiles, *, lr: float, weight_decay: float, step: int, seed: int
    ) -> None:
        first, second = self._read(state, weight.numel())
        beta1, beta2 = self.betas
        first.lerp_(gradient, 1.0 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
        torch.sqrt(second, out=gradient)
        gradient.div_(math.sqrt(1.0 - beta2**step)).add_(self.eps)
        if weight_decay:
            weight.mul_(1.0 - lr * weight_decay)
        weight.addcdiv_(first, gradient, value=-lr / (1.0 - beta1**step))
        self._write(state, first, second, seed)

    def _read(self, state: Tiles, count: int) -> tuple[Tensor, Tensor]:
        if self.state_bits == 32:
            return state["first"], state["second"]
        if self.state_bits == 16:
            return state["first"].float(), state["second"].float()
        first, second = self._codes
        return (
            first.decode(state["first_codes"], state["first_scales"], count),
            second.decode(state["second_codes"], state["second_scales"], count),
        )

    def _write(self, state: Tiles, first: Tensor, second: Tensor, seed: int) -> None:
        if self.state_bits == 32:
            return
        if self.state_bits == 16:
            round_stochastically(first, state["first"], seed=seed + 1)
            round_stochastically(second, state["second"], seed=seed + 2)
            return
        codes = self._codes
        codes[0].encode(first, state["first_codes"], state["first_scales"])
        codes[1].encode(second, state["second_codes"], state["second_scales"])

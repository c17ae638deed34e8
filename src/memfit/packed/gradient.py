"""The gradient that passes through a product with a packed weight: dx = g · Ŵ, the weight unpacked anew.

Nothing is kept for the backward pass but the packed weight itself, which is there anyway. The weight is frozen: it
gets no gradient.

Legend: M rows of activations, N outputs, K inputs.
"""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Factor(Protocol):
    """A weight that can be multiplied with, forward and backward."""

    def product(self, x: Tensor, start: int, stop: int) -> Tensor:
        """x [M, K] → [M, stop − start]."""
        ...

    def product_back(self, g: Tensor, start: int, stop: int) -> Tensor:
        """g [M, stop − start] → [M, K]."""
        ...


def product(weight: Factor, x_MK: Tensor, start: int, stop: int) -> Tensor:
    """x times rows start to stop of a frozen weight, transposed; with a gradient where x wants one."""
    if torch.is_grad_enabled() and x_MK.requires_grad:
        return _Product.apply(x_MK, weight, start, stop)  # type: ignore[no-any-return, no-untyped-call]
    return weight.product(x_MK, start, stop)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Factor, start: int, stop: int) -> Tensor:
        ctx.call = (weight, start, stop)
        return weight.product(x, start, stop)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        weight, start, stop = ctx.call
        return weight.product_back(g, start, stop), None, None, None

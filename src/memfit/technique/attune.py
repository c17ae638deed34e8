"""Attuning: the scales of a whole model's integers and its vectors learn together what the model answered.

    ŵ_k = (level_k − z) · s,   s = bf16(s₀ · (1 + β))            v = bf16(v₀ + ρ ν),   ρ = √mean v₀²

Legend of shapes: N outputs (rows) of a weight, K inputs, G groups of a row; P positions, D width, R rows of the head.

Integers are chosen block by block, each to give what the block gave. What then is left is an error of the whole, which
no block sees: here one number for each group of weights, and the norms' weights and biases, learn by gradient descent
through all blocks at once (as in the second phase of EfficientQAT, Chen et al. 2024). Integers stay as they are, so
nothing of what is stored changes its size.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from memfit.calibrate.collect import heads_of
from memfit.calibrate.stream import Streamed
from memfit.packed.fake import blocks_to_run

from .quantize import Quantized, dequantize

_ROWS_NBYTES: Final = 8 << 20
"""fp32 bytes of a weight's rows that are worked on at once."""


@dataclass(frozen=True, kw_only=True)
class Attuning:
    """The technique's settings."""

    steps: int = 128
    """Of the whole model, each on one window of the text."""
    rate: float = 0.003
    """Of β and ν, at its highest: Adam's, rising for the first eighth of the steps, then falling to 0 linearly."""
    positions: int = 192
    """Of a window, drawn anew for each step: where answers are compared. A large vocabulary costs as much as blocks."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.positions < 1:
            raise ValueError(f"steps and positions must be at least 1, got {self.steps} and {self.positions}")
        if not 0 < self.rate <= 1:
            raise ValueError(f"rate must be above 0 and at most 1, got {self.rate:g}")

    def rate_at(self, step: int) -> float:
        """Of step 0, 1, ..."""
        return self.rate * min(1.0, (step + 1) / max(1, self.steps // 8)) * (1 - step / self.steps)


class Grown:
    """One weight's integers, and by how much each of their scales has grown.

    Args:
        rows: reads (first row, integers of some rows), from the first to the last.
        scale: s₀ [N, G], bf16.
        inputs: K.
    """

    def __init__(self, rows: Callable[[], Iterator[tuple[int, Quantized]]], scale: Tensor, inputs: int) -> None:
        self.rows, self.first, self.shape = rows, scale, (scale.shape[0], inputs)
        self.parameter = torch.zeros(scale.shape, dtype=torch.float32, requires_grad=True)
        """β [N, G]."""

    def weight(self) -> Tensor:
        """ŵ [N, K], bf16, with a gradient to β."""
        made: Tensor = _Grown.apply(self.parameter, self)  # type: ignore[no-untyped-call]
        return made

    def learned(self) -> Tensor:
        """s [N, G], bf16."""
        return (self.parameter.detach() + 1).mul_(self.first).to(torch.bfloat16)


class _Grown(torch.autograd.Function):
    """Integers are read again for each use; of the backward pass the weight itself is enough."""

    @staticmethod
    def forward(ctx: Any, growth: Tensor, grown: Grown) -> Tensor:
        scale, out = grown.learned(), torch.empty(grown.shape, dtype=torch.bfloat16)
        for start, some in grown.rows():
            part = slice(start, start + some.q.shape[0])
            out[part] = dequantize(replace(some, scale=scale[part]))
            del some
        ctx.save_for_backward(growth, out)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        growth, weight = ctx.saved_tensors
        found = torch.empty_like(growth)
        step = max(1, _ROWS_NBYTES // (4 * weight.shape[1]))
        for start in blocks_to_run(range(0, weight.shape[0], step)):
            rows = slice(start, start + step)
            of_each = gradient[rows].to(torch.float32).mul_(weight[rows])
            found[rows] = of_each.view(of_each.shape[0], growth.shape[1], -1).sum(-1)
            del of_each
        return found.div_(growth + 1), None


class Moved:
    """A vector of the model, and how far it has moved: in parts of its own size, so that one rate serves all."""

    def __init__(self, first: Tensor) -> None:
        self.first, self.size = first.to(torch.float32), first.to(torch.float32).square().mean().sqrt()
        self.dtype = first.dtype
        self.parameter = torch.zeros(first.shape, dtype=torch.float32, requires_grad=True)
        """ν [D]."""

    def value(self) -> Tensor:
        """v [D], with a gradient to ν."""
        return (self.first + self.size * self.parameter).to(self.dtype)

    def learned(self) -> Tensor:
        """v [D], bf16."""
        return self.value().detach().to(torch.bfloat16)


def divergence(streamed: Streamed, ours_PD: Tensor, theirs_PD: Tensor) -> Tensor:
    """KL(theirs ‖ ours) of what the head answers to two hidden states, nats a position, with a gradient to ours.

    The head passes by twice, some rows at a time, so that there are never all logits: first for the totals.

    Args:
        ours_PD, theirs_PD: in the type that the head's rows are read in.
    """
    made: Tensor = _Divergence.apply(ours_PD, theirs_PD, streamed)  # type: ignore[no-untyped-call]
    return made


class _Divergence(torch.autograd.Function):
    """The gradient is made beside the divergence, while the head's rows are there."""

    @staticmethod
    def forward(ctx: Any, ours_PD: Tensor, theirs_PD: Tensor, streamed: Streamed) -> Tensor:
        learns, count = ctx.needs_input_grad[0], ours_PD.shape[0]
        total_P, wanted_P = (torch.full((count,), -torch.inf) for _ in range(2))
        for head in heads_of(streamed):
            for states_PD, sums_P in ((ours_PD, total_P), (theirs_PD, wanted_P)):
                for at, logits in head.logits(states_PD):
                    part = slice(at, at + logits.shape[0])
                    sums_P[part] = torch.logaddexp(sums_P[part], logits.logsumexp(1))
                    del logits
        apart_P, slope_PD = torch.zeros(count), torch.zeros(ours_PD.shape) if learns else None
        for head in heads_of(streamed):
            for at, ours in head.logits(ours_PD):
                part = slice(at, at + ours.shape[0])
                bend = head.bend(ours) if learns else None
                ours.sub_(total_P[part].unsqueeze(1))
                theirs = head.logits_at(theirs_PD[part]).sub_(wanted_P[part].unsqueeze(1))
                share = theirs.exp()
                apart_P[part] += theirs.sub_(ours).mul_(share).sum(1)
                del theirs
                if slope_PD is not None:
                    chance = ours.exp_().sub_(share)
                    if bend is not None:
                        chance.mul_(bend)  # from the capped logit back to what the head gave
                    slope_PD[part] += (chance.to(head.rows_RD.dtype) @ head.rows_RD).to(torch.float32)
                    del chance
                del ours, share, bend
        ctx.slope, ctx.dtype = None if slope_PD is None else slope_PD.div_(count), ours_PD.dtype
        return apart_P.mean()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.slope.mul_(gradient).to(ctx.dtype), None, None


__all__ = ["Attuning", "Grown", "Moved", "divergence"]

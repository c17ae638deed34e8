"""Block tuning: integers and steps of a block's weights learn together what the block is to give.

    level_k = clamp(q_k + round(o_k), −2^(b−1), 2^(b−1) − 1)       z = clamp(z₀ + round(ζ))       s = bf16(s₀ · (1 + β))
    ŵ_k = (level_k − z) · s                                        least: Σ ‖block(x̂; Ŵ) − y‖² / ‖y‖²

Legend of shapes: N outputs (rows), K inputs, G groups of a row.

Of NF4 and codebooks q_k + round(o_k) is the place in the sorted levels, and what a step of o_k is worth is half of what
lies between the levels on both sides. A codebook's levels learn too; where they are vectors none is next to another, so
which weights have which stays, and the levels and scales alone learn.

The rounding is passed straight through by gradients, as in SignRound (Cheng et al. 2023); unlike there, integers begin
where GPTQ has left them, which is far lower than the nearest ones: o_k begins as the part of a step by which the weight
that was rounded lies off the integer, at most a half, so that one near the middle between two is the first to change.
Steps are Adam's, whose size does not hang on the gradients'. Errors are relative to the output, token by token: what
follows a block is a norm, and without that the few tokens with outputs of a thousand times the others' would be all
that counts.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from memfit.packed.fake import blocks_to_run, is_fake
from memfit.packed.levels import level_table, places
from memfit.packed.scheme import Scheme

from .quantize import Quantized

_HALF: Final = 0.45
"""Offsets begin within it: the integers are GPTQ's at first, and none changes by a few noisy steps."""
_LOUDER: Final = 1e6
"""Gradients are multiplied by it: they are far above Adam's epsilon then, which has no other effect."""
_ROWS_NBYTES: Final = 8 << 20
"""fp32 bytes of a weight's rows that are worked on at once."""


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The technique's settings."""

    steps: int = 100
    """Of each block."""
    rate: float = 0.003
    """Of offsets at the first step, in levels; it falls to 0 linearly."""
    scale_rate: float = 0.001
    """Of β at the first step."""
    windows: int = 4
    """Windows of the text that a step is made for."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.windows < 1:
            raise ValueError(f"steps and windows must be at least 1, got {self.steps} and {self.windows}")
        if not 0 < self.rate <= 1 or not 0 <= self.scale_rate <= 1:
            raise ValueError(f"rates must be above 0 and at most 1, got {self.rate:g} and {self.scale_rate:g}")


def is_tunable(scheme: Scheme) -> bool:
    """Whether the next code is the next value, or levels can learn."""
    return scheme.values in ("int", "nf4", "codebook")


class Learner:
    """One weight's integers while they learn.

    Args:
        found: where they begin.
        weight: what they were chosen for [N, K].

    Raises:
        ValueError: values whose codes are not in the order of what they stand for.
    """

    def __init__(self, found: Quantized, weight: Tensor) -> None:
        if not is_tunable(found.scheme):
            raise ValueError(f"{found.scheme.name}: its codes are not in the order of their values, so none has a next")
        self.found = found
        self.levels = None if found.table is None else found.table.to(torch.float32)
        self.offset = torch.zeros(found.q.shape, dtype=torch.float32) if found.scheme.vector == 1 else None
        for rows in () if self.offset is None else _blocks(found.q):
            value, slope, _ = _values(found, self.offset, None, self.levels, rows)
            assert slope is not None and self.offset is not None, "single weights have them"
            by_group = (value.shape[0], found.scale.shape[1], -1)
            scale = found.scale[rows].to(torch.float32).unsqueeze(-1)
            off = weight[rows].to(torch.float32).view(by_group).div(scale).view(value.shape)
            off.sub_(value).div_(slope).nan_to_num_(0.0, 0.0, 0.0)
            self.offset[rows] = off.clamp_(-_HALF, _HALF)
            del value, slope, scale, off
        self.growth = torch.zeros(found.scale.shape, dtype=torch.float32)
        self.shift = None if found.zero is None else torch.zeros(found.zero.shape, dtype=torch.float32)
        for parameter in self.parameters:
            parameter.requires_grad_()

    @property
    def parameters(self) -> list[Tensor]:
        """What learns: offsets [N, K] of single weights, growth of scales [N, G], shifts of zero points [N, G], a
        codebook's levels."""
        return [part for part in (self.offset, self.growth, self.shift, self.levels) if part is not None]

    def weight(self) -> Tensor:
        """ŵ [N, K], bf16, with gradients to what learns."""
        learned = (self.offset, self.growth, self.shift, self.levels)
        made: Tensor = _Weight.apply(*learned, self.found)  # type: ignore[no-untyped-call]
        return made

    @torch.no_grad()
    def result(self) -> Quantized:
        """The integers as they stand."""
        found, q = self.found, torch.empty_like(self.found.q)
        for rows in _blocks(q):
            q[rows] = found.q[rows] if self.offset is None else _codes(found, self.offset, rows)[0]
        scale = _scale(found, self.growth).to(torch.bfloat16)
        zero = None if self.shift is None else _zero(found, self.shift)[0].to(torch.int8)
        table = found.table if self.levels is None else self.levels.to(torch.bfloat16)
        return Quantized(scheme=found.scheme, q=q, scale=scale, zero=zero, table=table)


class _Weight(torch.autograd.Function):
    """ŵ of a learner; the backward pass makes levels anew, some rows at a time, so that none are kept."""

    @staticmethod
    def forward(
        ctx: Any, offset: Tensor | None, growth: Tensor, shift: Tensor | None, levels: Tensor | None, found: Quantized
    ) -> Tensor:
        ctx.save_for_backward(offset, growth, shift, levels)
        ctx.found = found
        scale = _scale(found, growth)
        zero = None if shift is None else _zero(found, shift)[0]
        out = torch.empty(found.q.shape, dtype=torch.bfloat16)
        for rows in _blocks(found.q):
            value = _values(found, offset, zero, levels, rows)[0]
            by_group = value.view(value.shape[0], scale.shape[1], -1)
            out[rows] = by_group.mul_(scale[rows].unsqueeze(-1)).view(value.shape)
            del value, by_group
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None, None]:
        offset, growth, shift, levels = ctx.saved_tensors
        found: Quantized = ctx.found
        scale = _scale(found, growth)
        zero, free = (None, None) if shift is None else _zero(found, shift)
        to_offset, to_growth = None if offset is None else torch.empty_like(offset), torch.empty_like(growth)
        to_shift = None if shift is None else torch.empty_like(shift)
        to_levels = None if levels is None else torch.zeros_like(levels)
        for rows in _blocks(found.q):
            value, slope, place = _values(found, offset, zero, levels, rows)
            g = gradient[rows].to(torch.float32)
            by_group = (g.shape[0], scale.shape[1], -1)
            g_groups = g.view(by_group)
            to_growth[rows] = value.view(by_group).mul_(g_groups).sum(-1).mul_(found.scale[rows])
            g_groups.mul_(scale[rows].unsqueeze(-1))
            if to_shift is not None and free is not None:
                to_shift[rows] = g_groups.sum(-1).neg_().mul_(free[rows])
            if to_levels is not None and place is not None:
                to_levels.index_add_(0, place, g.view(-1, *to_levels.shape[1:]))
            if to_offset is not None and slope is not None:
                to_offset[rows] = g.mul_(slope)
            del value, slope, place, g, g_groups
        return to_offset, to_growth, to_shift, to_levels, None


def tune(
    learners: Mapping[str, Learner], loss: Callable[[int], Tensor], turns: list[int], *, tuning: Tuning
) -> tuple[float, float]:
    """Let the learners make `loss` small; the mean over all turns before and after.

    Args:
        loss: of a turn, a number with gradients to the learners.
        turns: what there is; each step takes one, in the order given, again and again.

    What is worse afterwards is for the caller to leave: the learners then stand where they stood.
    """
    before = _mean(loss, turns)
    groups = [
        {"params": [p for one in learners.values() for p in one.parameters if p is one.offset], "lr": tuning.rate},
        {
            "params": [p for one in learners.values() for p in one.parameters if p is not one.offset],
            "lr": tuning.scale_rate,
        },
    ]
    optimizer = torch.optim.Adam(groups, fused=True)
    first = [tuning.rate, tuning.scale_rate]
    for step in blocks_to_run(range(tuning.steps)):
        for group, rate in zip(optimizer.param_groups, first, strict=True):
            group["lr"] = rate * (1 - step / tuning.steps)
        with torch.enable_grad():
            loss(turns[step % len(turns)]).mul(_LOUDER).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    del optimizer
    return before, _mean(loss, turns)


@torch.no_grad()
def _mean(loss: Callable[[int], Tensor], turns: list[int]) -> float:
    values = [loss(turn) for turn in blocks_to_run(turns)]
    return 0.0 if is_fake(values[0]) else float(torch.stack(values).mean())


def relative_error(out: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of ‖out − target‖² / ‖target‖², of tensors [..., D]."""
    wanted = target.to(torch.float32)
    square = wanted.square().sum(-1).clamp_min_(torch.finfo(torch.float32).tiny)
    return out.to(torch.float32).sub(wanted).square().sum(-1).div(square).mean()


def _blocks(weight: Tensor) -> list[slice]:
    step = max(1, _ROWS_NBYTES // (4 * weight.shape[1]))
    return blocks_to_run(slice(start, start + step) for start in range(0, weight.shape[0], step))


def _codes(found: Quantized, offset: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """q of some rows, fp32, and where it is not held back by the outermost."""
    half = 2 ** (found.scheme.bits - 1)
    code = offset[rows].round().add_(found.q[rows])
    inside = (code >= -half) & (code <= half - 1)
    return code.clamp_(-half, half - 1), inside


def _values(
    found: Quantized, offset: Tensor | None, zero: Tensor | None, levels: Tensor | None, rows: slice
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What some rows are before they are scaled, fp32; how much that changes with the offset; the places of levels."""
    if offset is None:
        assert levels is not None, "vectors are a codebook's"
        u = found.q[rows].contiguous().view(torch.uint8) + (1 << (found.scheme.bits - 1))
        place = places(u, levels).view(-1).to(torch.int64)  # rows are taken by it four times as fast as by int32
        return levels.to(torch.bfloat16).to(torch.float32).index_select(0, place).view(u.shape), None, place
    code, inside = _codes(found, offset, rows)
    if found.scheme.values == "int":
        zero = found.zero if zero is None else zero
        if zero is not None:
            by_group = code.view(code.shape[0], zero.shape[1], -1)
            by_group.sub_(zero[rows].unsqueeze(-1))
        return code, inside, None
    table = level_table(found.scheme) if levels is None else levels.to(torch.bfloat16)
    table = table.to(torch.float32)
    slopes = torch.empty_like(table)
    slopes[1:-1] = (table[2:] - table[:-2]) / 2
    slopes[0], slopes[-1] = table[1] - table[0], table[-1] - table[-2]
    place = code.add_(2 ** (found.scheme.bits - 1)).to(torch.int32).view(-1)
    value, slope = (of.index_select(0, place).view(code.shape) for of in (table, slopes))
    return value, slope.mul_(inside), place


def _scale(found: Quantized, growth: Tensor) -> Tensor:
    """s in fp32: a bf16 number."""
    return (growth + 1).mul_(found.scale).to(torch.bfloat16).to(torch.float32)


def _zero(found: Quantized, shift: Tensor) -> tuple[Tensor, Tensor]:
    """z in fp32, and where it is not held back by the outermost."""
    assert found.zero is not None, "a shift is of a zero point"
    half = 2 ** (found.scheme.bits - 1)
    zero = shift.round().add_(found.zero)
    return zero.clamp(-half, half - 1), (zero >= -half) & (zero <= half - 1)


__all__ = ["Learner", "Tuning", "is_tunable", "relative_error", "tune"]

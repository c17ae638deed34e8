"""How weights are kept while they are trained: what a tile is read as in fp32, and how a moved one is written back.

A bf16 weight keeps 8 bits of mantissa: an update below 1/512 of it is rounded away. Three ways to let it arrive:

    master       the fp32 value is kept whole: its upper half, rounded, is the weight; a 16-bit remainder is the rest
    stochastic   rounded up or down by chance, so that the mean is right: w + u with u uniform in a step, cut off
    kahan        what rounding took is kept in bf16 and given back at the next update
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from memfit.packed.rounding import round_stochastically

from .rule import Layout, Tiles


class Weights(Protocol):
    """One way to keep weights."""

    def layout(self) -> Mapping[str, Layout]:
        """What is kept beside the weights, by name; all begin as zeros."""
        ...

    def read(self, weight: Tensor, extra: Tiles, *, step: int) -> Tensor:
        """A flat tile in fp32; a tensor that `write` may be given."""
        ...

    def write(self, weight: Tensor, extra: Tiles, value: Tensor, *, seed: int) -> None:
        """Write the moved tile back; `value` is used up."""
        ...


@dataclass(frozen=True, kw_only=True)
class Plain:
    """As they are: fp32 (and fp64), or 16 bits rounded to the nearest."""

    def layout(self) -> Mapping[str, Layout]:
        return {}

    def read(self, weight: Tensor, extra: Tiles, *, step: int) -> Tensor:
        return weight if weight.dtype in (torch.float32, torch.float64) else weight.float()

    def write(self, weight: Tensor, extra: Tiles, value: Tensor, *, seed: int) -> None:
        if value is not weight:
            weight.copy_(value)


@dataclass(frozen=True, kw_only=True)
class Master:
    """bf16 weights of an exact fp32 master: master = bits(weight) · 2^16 + remainder, as 32-bit integers.

    The weight is the master rounded to the nearest, ties away from zero, so the remainder is −2^15 to 2^15 − 1.
    """

    def layout(self) -> Mapping[str, Layout]:
        return {"remainder": Layout(dtype=torch.int16)}

    def read(self, weight: Tensor, extra: Tiles, *, step: int) -> Tensor:
        bits = weight.view(torch.int16).to(torch.int32).bitwise_left_shift_(16)
        return bits.add_(extra["remainder"].to(torch.int32)).view(torch.float32)

    def write(self, weight: Tensor, extra: Tiles, value: Tensor, *, seed: int) -> None:
        bits = value.view(torch.int32)
        # The sign is the highest bit: adding half a step to the bits rounds the magnitude.
        upper = bits.add(1 << 15).bitwise_right_shift_(16)
        weight.view(torch.int16).copy_(upper)
        extra["remainder"].copy_(bits.sub_(upper.bitwise_left_shift_(16)))


@dataclass(frozen=True, kw_only=True)
class Stochastic:
    """bf16 weights, rounded up with the probability that the fp32 value lies above."""

    def layout(self) -> Mapping[str, Layout]:
        return {}

    def read(self, weight: Tensor, extra: Tiles, *, step: int) -> Tensor:
        return weight.float()

    def write(self, weight: Tensor, extra: Tiles, value: Tensor, *, seed: int) -> None:
        round_stochastically(value, weight, seed=seed)


@dataclass(frozen=True, kw_only=True)
class Kahan:
    """bf16 weights and a bf16 remainder: what a rounding took is part of the next value."""

    def layout(self) -> Mapping[str, Layout]:
        return {"remainder": Layout(dtype=torch.bfloat16)}

    def read(self, weight: Tensor, extra: Tiles, *, step: int) -> Tensor:
        return weight.float().add_(extra["remainder"].float())

    def write(self, weight: Tensor, extra: Tiles, value: Tensor, *, seed: int) -> None:
        weight.copy_(value)
        extra["remainder"].copy_(value.sub_(weight.float()))


@dataclass(frozen=True, kw_only=True)
class Fp16Master:
    """fp16 weights beside an fp32 master, which begins as they are."""

    def layout(self) -> Mapping[str, Layout]:
        return {"master": Layout(dtype=torch.float32)}

    def read(self, weight: Tensor, extra: Tiles, *, step: int) -> Tensor:
        if step == 1:
            extra["master"].copy_(weight)
        return extra["master"]

    def write(self, weight: Tensor, extra: Tiles, value: Tensor, *, seed: int) -> None:
        weight.copy_(value)
        if value is not extra["master"]:
            extra["master"].copy_(value)


_KINDS: Final[dict[str, Weights]] = {
    "fp32": Plain(),
    "autocast": Plain(),
    "bf16": Plain(),
    "master": Master(),
    "stochastic": Stochastic(),
    "kahan": Kahan(),
    "fp16": Fp16Master(),
}


def weights_of(precision: str, dtype: torch.dtype) -> Weights:
    """How weights of `dtype` are kept in a precision: those that were not cast to it are plain."""
    wanted = torch.float16 if precision == "fp16" else torch.bfloat16
    return _KINDS[precision] if dtype == wanted else Plain()

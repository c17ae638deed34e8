"""Rounding to 16 bits by chance, so that what is too small to be seen arrives in the mean."""

from typing import Final

import torch
from torch import Tensor

_PERIOD: Final = 1 << 16


def round_stochastically(value: Tensor, out: Tensor, *, seed: int) -> None:
    """Write fp32 values into bf16, rounded up or down at random so that the mean is the value; both are flat.

    16 random bits are added below bf16's last, and what is below is cut off. The bits come from a block drawn for
    this seed; it repeats after 65,536 values, which no sum over a weight's history sees, as each seed draws anew.
    """
    generator = torch.Generator(device=value.device)
    generator.manual_seed(seed)
    size = min(_PERIOD, value.numel())
    noise = torch.randint(0, 1 << 16, (size,), dtype=torch.int32, generator=generator, device=value.device)
    bits = value.view(torch.int32)
    whole = value.numel() // size * size
    bits[:whole].view(-1, size).add_(noise)
    if whole < value.numel():
        bits[whole:].add_(noise[: value.numel() - whole])
    bits.bitwise_and_(-(1 << 16))
    out.copy_(value)

"""Optimizer states of 8 and 4 bits: blocks share a scale, and codes lie closer to zero than to the block's largest.

    x ≈ s · sign(c) · (|c| / c_max)^p,    s = max|x| of the block

The power makes steps smaller where values are: moments are spread over decades, and most are far below the
largest. It is the closed form of what a table of levels does (dynamic maps: Dettmers et al., 2022; 4 bits: Li et
al., 2023), at the price of one or two square roots. A second moment that is not 0 never becomes 0, as it is what an
update is divided by.

    moment 1   8 bits: signed, p = 4, c_max = 127, blocks of 256      4 bits: signed, p = 2, c_max = 7, blocks of 128
    moment 2   8 bits: p = 4, c = 1 .. 255, blocks of 256             4 bits: p = 2, c = 1 .. 16, blocks of 128
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from .rule import Layout

_TINY: Final = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, kw_only=True)
class Code:
    """How one kind of state is written in few bits."""

    bits: int
    signed: bool

    def __post_init__(self) -> None:
        if self.bits not in (8, 4):
            raise ValueError(f"bits must be 8 or 4, got {self.bits}")

    @property
    def block(self) -> int:
        """Values that share a scale."""
        return 256 if self.bits == 8 else 128

    def layout(self, name: str) -> dict[str, Layout]:
        """The two tensors that hold a state."""
        dtype = torch.int8 if self.signed and self.bits == 8 else torch.uint8
        return {
            f"{name}_codes": Layout(dtype=dtype, per=8 // self.bits),
            f"{name}_scales": Layout(dtype=torch.float32, per=self.block),
        }

    def decode(self, codes: Tensor, scales: Tensor, count: int) -> Tensor:
        """fp32 [count] of so many codes, flat."""
        blocks = scales.numel()
        value = torch.empty(blocks, self.block, dtype=torch.float32, device=codes.device)
        flat = value.view(-1)
        if self.bits == 8:
            flat[:count].copy_(codes)
            flat[count:].zero_()
            if self.signed:
                value.mul_(value.abs())
                return value.mul_(value.abs()).mul_(scales.unsqueeze(1).div(127.0**4)).view(-1)[:count]
            return value.square_().square_().mul_(scales.unsqueeze(1).div(255.0**4)).view(-1)[:count]
        # Two codes a byte: the first half of a block in the low bits, the second in the high ones. Only whole
        # blocks and the tensor's last, which is then shorter, have codes.
        self._unpack(codes, value)
        if self.signed:
            value.sub_(8.0)
            return value.mul_(value.abs()).mul_(scales.unsqueeze(1).div(49.0)).view(-1)[:count]
        return value.add_(1.0).square_().mul_(scales.unsqueeze(1).div(256.0)).view(-1)[:count]

    def encode(self, value: Tensor, codes: Tensor, scales: Tensor) -> None:
        """Write fp32 [count], which is used up, as codes and scales. Values that are no number spoil their block."""
        count = value.numel()
        padded = value
        if count % self.block:
            padded = torch.zeros(scales.numel() * self.block, dtype=torch.float32, device=value.device)
            padded[:count].copy_(value)
        blocks = padded.view(-1, self.block)
        size = blocks.abs()
        torch.amax(size, -1, out=scales)
        size.div_(scales.unsqueeze(1).clamp(min=_TINY)).sqrt_()
        if self.bits == 8:
            if self.signed:
                torch.copysign(size.sqrt_().mul_(127.0).round_(), blocks, out=size)
            else:
                size.sqrt_().mul_(255.0).round_().clamp_(min=1.0)
            codes.copy_(size.view(-1)[:count])
            return
        if self.signed:
            torch.copysign(size.mul_(7.0).round_(), blocks, out=size)
            size.add_(8.0)
        else:
            size.mul_(16.0).round_().sub_(1.0).clamp_(min=0.0)
        self._pack(size, codes)

    def _unpack(self, codes: Tensor, value: Tensor) -> None:
        half = self.block // 2
        whole = codes.numel() // half
        packed = codes[: whole * half].view(whole, half)
        value[:whole, :half].copy_(packed.bitwise_and(15))
        value[:whole, half:].copy_(packed.bitwise_right_shift(4))
        if whole < value.shape[0]:
            # The tensor's last block: its codes lie two and two, in order.
            rest = codes[whole * half :]
            pairs = value[whole:].view(-1)[: 2 * rest.numel()].view(-1, 2)
            pairs[:, 0].copy_(rest.bitwise_and(15))
            pairs[:, 1].copy_(rest.bitwise_right_shift(4))
            value[whole:].view(-1)[2 * rest.numel() :].fill_(8.0)

    def _pack(self, value: Tensor, codes: Tensor) -> None:
        half = self.block // 2
        whole = codes.numel() // half
        numbers = value.to(torch.uint8)
        target = codes[: whole * half].view(whole, half)
        torch.bitwise_or(numbers[:whole, :half], numbers[:whole, half:].bitwise_left_shift(4), out=target)
        if whole < value.shape[0]:
            rest = codes[whole * half :]
            pairs = numbers[whole:].view(-1)[: 2 * rest.numel()].view(-1, 2)
            rest.copy_(pairs[:, 0].bitwise_or(pairs[:, 1].bitwise_left_shift(4)))

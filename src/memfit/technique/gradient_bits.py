"""Gradients that add up in 8 bits, with error feedback: what rounding leaves is carried on, in 4 bits more.

Blocks of 256 values share a scale s = max|v| / 127. Of a value v the code q = round(v / s) is what is read; the
rest, v − q·s, within half a step, is kept as r = round(14 · (v − q·s) / s) and added to what comes next: the next
micro-batch's gradient, or, when the gradient has been used, the next step's. So no part of a gradient is lost, it is
only late. 1.52 bytes a weight.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from memfit.packed.fake import blocks_to_run

BLOCK: Final = 256
_TILE: Final = 1 << 18
_STEPS: Final = 14.0
"""Steps of the remainder within one step of the code: remainders are −7 to 7."""


@dataclass(eq=False)
class QuantizedGradient:
    """A gradient of n values, flat."""

    codes: Tensor
    """int8 [n rounded up to blocks]."""
    scales: Tensor
    """fp32 [blocks, 1]."""
    remainders: Tensor
    """uint8 [half of the codes]: two remainders a byte, each + 8."""
    numel: int

    @classmethod
    def zeros(cls, numel: int, device: torch.device | str = "cpu") -> "QuantizedGradient":
        blocks = -(-numel // BLOCK)
        return cls(
            codes=torch.zeros(blocks * BLOCK, dtype=torch.int8, device=device),
            scales=torch.zeros(blocks, 1, dtype=torch.float32, device=device),
            remainders=torch.full((blocks * BLOCK // 2,), 0x88, dtype=torch.uint8, device=device),
            numel=numel,
        )

    def add(self, gradient: Tensor) -> None:
        """Add a gradient of any shape and float dtype with as many values."""
        flat = gradient.reshape(-1)
        ends = list(range(0, self.numel, _TILE))
        for start in blocks_to_run(ends):
            stop = min(start + _TILE, self.numel)
            self._add(start, flat[start:stop])

    def _add(self, start: int, part: Tensor) -> None:
        count = part.numel()
        first, last = start // BLOCK, -(-(start + count) // BLOCK)
        scales = self.scales[first:last]
        codes = self.codes[first * BLOCK : last * BLOCK].view(-1, BLOCK)
        packed = self.remainders[first * BLOCK // 2 : last * BLOCK // 2].view(-1, BLOCK // 2)
        value = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
        half = BLOCK // 2
        value[:, :half].copy_(packed.bitwise_and(15))
        value[:, half:].copy_(packed.bitwise_right_shift(4))
        value.sub_(8.0).div_(_STEPS)
        own = codes.to(torch.float32)
        value.add_(own).mul_(scales)
        own.view(-1)[:count].copy_(part)
        own.view(-1)[count:].zero_()
        value.add_(own)
        torch.amax(torch.abs(value, out=own), -1, keepdim=True, out=scales)
        scales.div_(127.0)
        # A block of zeros has scale 0: dividing by the least number instead gives codes of 0.
        value.div_(scales.clamp(min=torch.finfo(torch.float32).tiny))
        torch.round(value, out=own)
        codes.copy_(own)
        value.sub_(own).mul_(_STEPS).round_().add_(8.0)
        rest = value.to(torch.uint8)
        torch.bitwise_or(rest[:, :half], rest[:, half:].bitwise_left_shift(4), out=packed)

    def tile(self, start: int, stop: int) -> Tensor:
        """Values [start, stop) as they are read, fp32; `start` is a multiple of 256."""
        first, last = start // BLOCK, -(-stop // BLOCK)
        value = self.codes[first * BLOCK : last * BLOCK].view(-1, BLOCK).to(torch.float32)
        return value.mul_(self.scales[first:last]).view(-1)[: stop - start]

    def clear(self) -> None:
        """The gradient has been used: begin at what it left over."""
        self.codes.zero_()

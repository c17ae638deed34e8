"""A weight [N, K] of heads, of which fewer dimensions are computed than there are.

N outputs, K inputs, h heads of d dimensions, of which k are kept.
"""

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from memfit.packed.blocks import Read
from memfit.packed.forms import Narrow
from memfit.packed.parts import Parts
from memfit.packed.store import PackedWeight


class NarrowWeight(Parts):
    """The product with a narrow weight, its outputs filled up with zeros to the heads' width, or its inputs cut to it.

    Buffer: `narrow` [h·k, K] or [N, h·k]; integers are a store below, `base`.
    """

    kernel: Final = "narrow"
    narrow: Tensor

    def __init__(self, shape: tuple[int, int], scheme: Narrow, *, device: str | torch.device = "meta") -> None:
        super().__init__(shape, scheme, device=device)
        self.scheme = scheme
        self.width = (shape[0] if scheme.side == "out" else shape[1]) // scheme.heads
        inside = scheme.narrow(shape)
        self.base = None if scheme.base is None else PackedWeight(inside, scheme.base, device=device)

    def load_from(self, read: Read, prefix: str, *, device: str | torch.device = "cpu") -> None:
        """Fill from `prefix.weight_narrow`, or the integers from their own names."""
        super().load_from(read, prefix, device=device)
        if self.base is not None:
            self.base.load_from(read, prefix, device=device)

    def fill(self, parts: dict[str, Tensor]) -> None:
        """Fill from the parts; integers are filled as such."""
        Parts.load_from(self, lambda name: parts[name.removeprefix(".")], "")

    def matmul(self, x: Tensor) -> Tensor:
        """x [..., K] → [..., N], in the dtype of x."""
        if self.scheme.side == "in":
            x = x.view(*x.shape[:-1], self.scheme.heads, self.width)[..., : self.scheme.kept].flatten(-2)
        y = F.linear(x, self.narrow.to(x.dtype)) if self.base is None else self.base.matmul(x)
        return self._filled_up(y) if self.scheme.side == "out" else y

    def dense_rows(self, start: int, stop: int, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Rows start to stop, dense [stop − start, K]."""
        if self.scheme.side == "in":
            return self._filled_up(self._inside(torch.arange(start, stop), dtype))
        return self._spread(torch.arange(start, stop), dtype)

    def rows(self, index: Tensor, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """The rows in `index` [...], dense: [..., K]."""
        return self._filled_up(self._inside(index, dtype)) if self.scheme.side == "in" else self._spread(index, dtype)

    def _inside(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of the narrow weight."""
        return self.narrow[index].to(dtype) if self.base is None else self.base.rows(index, dtype=dtype)

    def _spread(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of heads that are outputs: those that are not computed are 0."""
        head, place = torch.div(index, self.width, rounding_mode="floor"), index % self.width
        kept = place < self.scheme.kept
        found = self._inside(head * self.scheme.kept + place.clamp(max=self.scheme.kept - 1), dtype)
        return found.mul_(kept.unsqueeze(-1))

    def _filled_up(self, y: Tensor) -> Tensor:
        """[..., h·k] → [..., h·d]"""
        heads = y.view(*y.shape[:-1], self.scheme.heads, self.scheme.kept)
        return F.pad(heads, (0, self.width - self.scheme.kept)).flatten(-2)

"""A weight [N, K] as two factors [N, r] and [r, K], alone or beside integers; the product is never formed.

N outputs, K inputs, r rank.
"""

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from memfit.packed.blocks import Read
from memfit.packed.forms import LowRank
from memfit.packed.parts import Parts
from memfit.packed.store import PackedWeight


class LowRankWeight(Parts):
    """x · (A B)ᵀ as (x Bᵀ) Aᵀ, plus the product with the integers that the factors make up for, if there are any.

    Buffers: `left` A [N, r] and `right` B [r, K]; the integers are a store below, `base`.
    """

    kernel: Final = "factors"
    left: Tensor
    right: Tensor

    def __init__(self, shape: tuple[int, int], scheme: LowRank, *, device: str | torch.device = "meta") -> None:
        super().__init__(shape, scheme, device=device)
        self.scheme = scheme
        self.base = None if scheme.base is None else PackedWeight(shape, scheme.base, device=device)

    def load_from(self, read: Read, prefix: str, *, device: str | torch.device = "cpu") -> None:
        """Fill from `prefix.weight_left` and `.weight_right`, and the base from its own names."""
        super().load_from(read, prefix, device=device)
        if self.base is not None:
            self.base.load_from(read, prefix, device=device)

    def matmul(self, x: Tensor) -> Tensor:
        """x [..., K] → [..., N], in the dtype of x."""
        y = F.linear(F.linear(x, self.right.to(x.dtype)), self.left.to(x.dtype))
        if self.base is None:
            return y
        return y.add_(self.base.matmul(x)) if not y.requires_grad else y + self.base.matmul(x)

    def dense_rows(self, start: int, stop: int, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Rows start to stop of what the product stands for, dense [stop − start, K], in fp32 until the end."""
        dense = self.left[start:stop].float() @ self.right.float()
        if self.base is not None:
            dense.add_(self.base.dense_rows(start, stop, dtype=torch.float32))
        return dense.to(dtype)

    def rows(self, index: Tensor, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """The rows in `index` [...], dense: [..., K]."""
        dense = self.left[index].to(dtype) @ self.right.to(dtype)
        return dense if self.base is None else dense.add_(self.base.rows(index, dtype=dtype))

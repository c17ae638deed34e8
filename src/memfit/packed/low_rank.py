"""A weight [N, K] as two factors [N, r] and [r, K], alone or beside a weight of its own or another's; the product is
never formed.

N outputs, K inputs, r rank.
"""

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from memfit.packed.blocks import Read
from memfit.packed.forms import LowRank, Shared, Whole
from memfit.packed.kernel import Kernel
from memfit.packed.parts import Parts
from memfit.packed.sparse import SparseWeight
from memfit.packed.store import PackedWeight


class WholeWeight(Parts):
    """A weight in bf16 that several modules have a part in. Buffer: `whole` [N, K]."""

    kernel: Final = "whole"
    whole: Tensor

    def __init__(self, shape: tuple[int, int], scheme: Whole, *, device: str | torch.device = "meta") -> None:
        super().__init__(shape, scheme, device=device)
        self.scheme = scheme

    def matmul(self, x: Tensor) -> Tensor:
        """x [..., K] → [..., N], in the dtype of x."""
        return F.linear(x, self.whole.to(x.dtype))

    def dense_rows(self, start: int, stop: int, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Rows start to stop, [stop − start, K]."""
        return self.whole[start:stop].to(dtype)

    def rows(self, index: Tensor, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """The rows in `index` [...]: [..., K]."""
        return self.whole[index].to(dtype)


class LowRankWeight(Parts):
    """x · (A B)ᵀ as (x Bᵀ) Aᵀ, plus the product with what the factors make up for, if there is anything.

    Buffers: `left` A [N, r] and `right` B [r, K]; the rest is a store below, `base`.
    """

    kernel: Final = "factors"
    left: Tensor
    right: Tensor

    def __init__(self, shape: tuple[int, int], scheme: LowRank, *, device: str | torch.device = "meta") -> None:
        super().__init__(shape, scheme, device=device)
        self.scheme = scheme
        self.base: PackedWeight | WholeWeight | None = None
        if scheme.base is not None:
            whole = isinstance(scheme.base, Whole)
            self.base = (WholeWeight if whole else PackedWeight)(shape, scheme.base, device=device)  # type: ignore[arg-type]

    def load_from(self, read: Read, prefix: str, *, device: str | torch.device = "cpu") -> None:
        """Fill from `prefix.weight_left` and `.weight_right`, and the base from its own names."""
        super().load_from(read, prefix, device=device)
        if self.base is not None:
            self.base.load_from(read, prefix, device=device)

    def fill(self, parts: dict[str, Tensor]) -> None:
        """Fill the factors from their parts, and a base that is whole; integers are filled as such."""
        Parts.load_from(self, lambda name: parts[name.removeprefix(".")], "")
        if isinstance(self.base, WholeWeight):
            self.base.fill(parts)

    def matmul(self, x: Tensor) -> Tensor:
        """x [..., K] → [..., N], in the dtype of x."""
        y = _product(x, self.left, self.right)
        return y if self.base is None else _added(y, self.base.matmul(x))

    def dense_rows(self, start: int, stop: int, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Rows start to stop of what the product stands for, dense [stop − start, K], in fp32 until the end."""
        dense = self.left[start:stop].float() @ self.right.float()
        if self.base is not None:
            dense.add_(self.base.dense_rows(start, stop))
        return dense.to(dtype)

    def rows(self, index: Tensor, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """The rows in `index` [...], dense: [..., K]."""
        dense = self.left[index].to(dtype) @ self.right.to(dtype)
        return dense if self.base is None else dense.add_(self.base.rows(index, dtype=dtype))


Owner = PackedWeight | SparseWeight | LowRankWeight | WholeWeight
"""A store that others may have a part in."""


class SharedWeight(Parts):
    """A weight that has a factor, or all, of another module's store: that is a module below, `owner`, and loaded there.

    Buffers: `left` [N, r], where the right factor is common; `right` [r, K], where the left one is; both where the
    weight is, or none.
    """

    left: Tensor
    right: Tensor

    def __init__(
        self, shape: tuple[int, int], scheme: Shared, owner: Owner, *, device: str | torch.device = "meta"
    ) -> None:
        super().__init__(shape, scheme, device=device)
        self.scheme = scheme
        inside = isinstance(owner, LowRankWeight) and scheme.common == "weight" and owner.base is not None
        self.owner: Owner = owner.base if inside else owner  # type: ignore[assignment]

    @property
    def kernel(self) -> Kernel:
        """What its own product runs on; of rank 0 there is none but the owner's."""
        return "factors" if self.scheme.rank else self.owner.kernel

    @property
    def nbytes(self) -> int:
        """Bytes of its own buffers."""
        return sum(buffer.nbytes for buffer in self.buffers(recurse=False))

    def matmul(self, x: Tensor) -> Tensor:
        """x [..., K] → [..., N], in the dtype of x."""
        if self.scheme.common != "weight":
            return _product(x, *self._factors)
        y = self.owner.matmul(x)
        return _added(y, _product(x, *self._factors)) if self.scheme.rank else y

    def dense_rows(self, start: int, stop: int, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Rows start to stop of what the product stands for, dense [stop − start, K], in fp32 until the end."""
        if not self.scheme.rank:
            return self.owner.dense_rows(start, stop, dtype=dtype)
        left, right = self._factors
        dense = left[start:stop].float() @ right.float()
        if self.scheme.common == "weight":
            dense.add_(self.owner.dense_rows(start, stop))
        return dense.to(dtype)

    def rows(self, index: Tensor, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """The rows in `index` [...], dense: [..., K]."""
        if not self.scheme.rank:
            return self.owner.rows(index, dtype=dtype)
        left, right = self._factors
        dense = left[index].to(dtype) @ right.to(dtype)
        return dense.add_(self.owner.rows(index, dtype=dtype)) if self.scheme.common == "weight" else dense

    @property
    def _factors(self) -> tuple[Tensor, Tensor]:
        """A and B, wherever they are."""
        if self.scheme.common == "weight":
            return self.left, self.right
        assert isinstance(self.owner, LowRankWeight), "only factors can be shared one by one"
        return (self.left, self.owner.right) if self.scheme.common == "right" else (self.owner.left, self.right)


def _product(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return F.linear(F.linear(x, right.to(x.dtype)), left.to(x.dtype))


def _added(y: Tensor, other: Tensor) -> Tensor:
    """y + other, in y where no gradient wants it."""
    return y + other if y.requires_grad or other.requires_grad else y.add_(other)

"""Packed weights computed with in float32: what other programs' answers are compared with.

The kernels that packed modules run on take bf16 alone. Here each weight is unpacked a few rows at a time.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memfit.errors import UsageError
from memfit.packed.modules import PackedEmbedding, PackedLinear, packed_modules
from memfit.packed.store import WORKSPACE_NBYTES


class WideLinear(nn.Module):
    """x · ŵᵀ + bias in float32, of a packed linear layer."""

    def __init__(self, packed: PackedLinear) -> None:
        super().__init__()
        self.store, self.bias = packed.store, packed.bias

    @property
    def weight(self) -> Tensor:
        """Models ask for its type."""
        return torch.empty(self.store.shape, device="meta")

    def forward(self, input: Tensor) -> Tensor:
        rows, inputs = self.store.shape
        out = input.new_empty(*input.shape[:-1], rows)
        step = max(1, WORKSPACE_NBYTES // (4 * inputs))
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            out[..., start:stop] = F.linear(input, self.store.dense_rows(start, stop, dtype=torch.float32))
        return out if self.bias is None else out.add_(self.bias)


class WideEmbedding(nn.Module):
    """Rows in float32, of a packed embedding."""

    def __init__(self, packed: PackedEmbedding) -> None:
        super().__init__()
        self.store, self.embed_scale = packed.store, packed.embed_scale
        self.num_embeddings, self.embedding_dim = packed.num_embeddings, packed.embedding_dim
        self.padding_idx = packed.padding_idx

    @property
    def weight(self) -> Tensor:
        """Models ask for its type."""
        return torch.empty(self.store.shape, device="meta")

    def forward(self, input: Tensor) -> Tensor:
        rows = self.store.rows(input, dtype=torch.float32)
        return rows if self.embed_scale is None else rows.mul_(self.embed_scale)


def widen(model: nn.Module) -> None:
    """Swap the packed modules of a model that was loaded in float32, in place, for those above.

    Raises:
        UsageError: it has fused experts.
    """
    for name, module in packed_modules(model).items():
        if not isinstance(module, PackedLinear | PackedEmbedding):
            raise UsageError(f"{name}: fused experts are not computed in float32.")
        parent, _, last = name.rpartition(".")
        wide = WideLinear(module) if isinstance(module, PackedLinear) else WideEmbedding(module)
        setattr(model.get_submodule(parent), last, wide.eval())

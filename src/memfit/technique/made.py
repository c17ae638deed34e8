"""What a technique makes of a weight that is stored as no scheme: its parts, and what they stand for.

N outputs, K inputs, r rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from memfit.packed.forms import LowRank, Sparse
from memfit.packed.sparse import SparseWeight

from .quantize import Quantized, dequantize


@dataclass(frozen=True, kw_only=True, eq=False)
class Made:
    """The parts of one weight [N, K], as they are stored."""

    form: Sparse | LowRank
    shape: tuple[int, int]
    parts: Mapping[str, Tensor]
    """By name, as in `form.parts`."""
    base: Quantized | None = None
    """The integers that factors go beside."""


def dense(made: Made) -> Tensor:
    """ŵ [N, K] in bf16; sums of products in fp32 before."""
    parts = made.parts
    if isinstance(made.form, LowRank):
        product = parts["weight_left"].float() @ parts["weight_right"].float()
        return (product if made.base is None else product.add_(dequantize(made.base))).to(torch.bfloat16)
    store = SparseWeight(made.shape, made.form, device="cpu")
    store.fill(dict(parts))
    return store.dense_rows(0, made.shape[0])

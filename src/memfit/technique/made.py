"""What a technique makes of a weight that is stored as no scheme: its parts, and what they stand for.

N outputs, K inputs, r rank.
"""

from collections.abc import Mapping, Sequence
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


def joined(parts: Sequence[Quantized]) -> Quantized:
    """The integers of some rows, one below the other."""
    first = parts[0]
    zeros = [part.zero for part in parts if part.zero is not None]
    return Quantized(
        scheme=first.scheme, q=torch.cat([part.q for part in parts]), scale=torch.cat([part.scale for part in parts]),
        zero=torch.cat(zeros) if zeros else None, table=first.table,
    )  # fmt: skip


def dense(made: Made) -> Tensor:
    """ŵ [N, K] in bf16; sums of products in fp32 before."""
    parts = made.parts
    if isinstance(made.form, LowRank):
        product = parts["weight_left"].float() @ parts["weight_right"].float()
        return (product if made.base is None else product.add_(dequantize(made.base))).to(torch.bfloat16)
    store = SparseWeight(made.shape, made.form, device="cpu")
    store.fill(dict(parts))
    return store.dense_rows(0, made.shape[0])

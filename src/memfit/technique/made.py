"""What a technique makes of a weight that is stored as no scheme: its parts, and what they stand for.

N outputs, K inputs, r rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memfit.packed.forms import LowRank, Narrow, Own, Shared, Whole
from memfit.packed.narrow import NarrowWeight
from memfit.packed.sparse import SparseWeight

from .quantize import Quantized, dequantize


@dataclass(frozen=True, kw_only=True, eq=False)
class Made:
    """The parts of one weight [N, K], as they are stored."""

    form: Own
    shape: tuple[int, int]
    parts: Mapping[str, Tensor]
    """By name, as in `form.parts`; of factors beside a whole weight, that as well."""
    base: Quantized | None = None
    """The integers that factors go beside, or that a narrow weight has."""


def joined(parts: Sequence[Quantized]) -> Quantized:
    """The integers of some rows, one below the other."""
    first = parts[0]
    zeros = [part.zero for part in parts if part.zero is not None]
    return Quantized(
        scheme=first.scheme, q=torch.cat([part.q for part in parts]), scale=torch.cat([part.scale for part in parts]),
        zero=torch.cat(zeros) if zeros else None, table=first.table,
    )  # fmt: skip


def dense(made: Made, owner: "Made | Quantized | None" = None) -> Tensor:
    """ŵ [N, K] in bf16; sums of products in fp32 before. `owner`: what has the rest of what is shared.

    Raises:
        ValueError: something is shared, and no owner given.
    """
    return read(made, owner).to(torch.bfloat16)


def read(made: Made, owner: "Made | Quantized | None" = None) -> Tensor:
    """As `dense`, but sums are not rounded: they stay in fp32."""
    form, parts = made.form, made.parts
    if isinstance(form, LowRank):
        product = parts["weight_left"].float() @ parts["weight_right"].float()
        rest = parts.get("weight_whole") if made.base is None else dequantize(made.base)
        return product if rest is None else product.add_(rest)
    if isinstance(form, Whole):
        return parts["weight_whole"]
    if isinstance(form, Shared):
        if owner is None:
            raise ValueError(f"a weight that is {form.name} is told with what that has, and it was not given")
        if form.common == "weight":
            rest = _common(owner)
            if not form.rank:
                return rest
            return torch.addmm(rest.float(), parts["weight_left"].float(), parts["weight_right"].float())
        theirs = owner.parts if isinstance(owner, Made) else {}
        both = {**parts, f"weight_{form.common}": theirs[f"weight_{form.common}"]}
        return both["weight_left"].float() @ both["weight_right"].float()
    if isinstance(form, Narrow):
        inside = parts["weight_narrow"] if made.base is None else dequantize(made.base)
        narrow = NarrowWeight(made.shape, Narrow(heads=form.heads, kept=form.kept, side=form.side), device="cpu")
        narrow.fill({"weight_narrow": inside})
        return narrow.dense_rows(0, made.shape[0])
    store = SparseWeight(made.shape, form, device="cpu")
    store.fill(dict(parts))
    return store.dense_rows(0, made.shape[0])


def _common(owner: "Made | Quantized") -> Tensor:
    """All of the owner's weight, or, of factors beside something, that."""
    if isinstance(owner, Quantized):
        return dequantize(owner)
    if owner.base is not None:
        return dequantize(owner.base)
    if "weight_whole" in owner.parts:
        return owner.parts["weight_whole"]
    return read(owner)

"""The door to every technique that stores a weight otherwise: from a weight and a form to what is stored.

N outputs, K inputs.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from memfit.packed.forms import Form, LowRank, Narrow, Shared, Sparse, Whole
from memfit.packed.scheme import Scheme

from .gptq import Factor, gptq, largest_first
from .low_rank import factorize, right_factors
from .made import Made, dense
from .prune import prune
from .quantize import Quantized, dequantize, learned, quantize
from .sparsegpt import order_for, sparsegpt


def make(
    weight_NK: Tensor, form: Form, *, importance_K: Tensor | None = None, search: bool = True,
    shared: Tensor | None = None,
) -> Quantized | Made:  # fmt: skip
    """A weight, or some rows of one, as `form` stores them.

    Args:
        importance_K: E[x²] of the inputs; None: all alike.
        search: False: by the weight alone, and to the nearest of the usual scale.
        shared: what `shared_by_rows` found, where these are not all of its rows.
    """
    if isinstance(form, Sparse):
        return prune(weight_NK, form, importance=importance_K if search else None)
    if isinstance(form, LowRank):
        return factorize(weight_NK, form, importance_K=importance_K if search else None, right=shared)
    if isinstance(form, Whole):
        return _whole(weight_NK)
    if isinstance(form, Shared | Narrow):
        raise ValueError(f"{form.name}: what is shared is made of all that share it, narrower heads of both sides")
    return quantize(weight_NK, form, importance=importance_K, search=search, table=shared)


def shared_by_rows(
    form: Form, rows: Iterable[Tensor], importance_K: Tensor | None, rows_N: Tensor | None = None
) -> Tensor | None:
    """What all rows of a weight have in common, if it comes in blocks of rows: a codebook's levels, the right
    factor [r, K]; None of other forms, which make each row by itself.

    rows_N: what errors of each row count, for factors; None: all alike.
    """
    if isinstance(form, LowRank):
        return right_factors(rows, [form], importance_K=importance_K, rows_N=rows_N)[form]
    return learned(form, rows, importance_K) if isinstance(form, Scheme) else None


def make_for(
    weight_NK: Tensor, form: Form, factor: Factor, *, rows: int | None = None, rows_N: Tensor | None = None
) -> Quantized | Made:
    """A weight as `form` stores it, for inputs whose second moments were factored: errors are made up for.

    rows: that are rounded at once. rows_N: what errors of each output count, for factors; None: all alike.
    """
    if isinstance(form, Sparse):
        return sparsegpt(weight_NK, factor, form, rows=rows)
    if isinstance(form, LowRank):
        return factorize(weight_NK, form, factor=factor, rows_N=rows_N)
    if isinstance(form, Shared):  # the rest of the weight, which its owner has, is taken off already
        rest = factorize(weight_NK, LowRank(rank=form.rank), factor=factor, rows_N=rows_N).parts if form.rank else {}
        return Made(form=form, shape=(weight_NK.shape[0], weight_NK.shape[1]), parts=rest)
    if isinstance(form, Whole):
        return _whole(weight_NK)
    if isinstance(form, Narrow):
        raise ValueError(f"{form.name}: heads become narrower on both sides at once")
    return gptq(weight_NK, factor, form, rows=rows).quantized


def _whole(weight: Tensor) -> Made:
    shape = (weight.shape[0], weight.shape[1])
    return Made(form=Whole(), shape=shape, parts={"weight_whole": weight.to(torch.bfloat16)})


def weight_of(made: Quantized | Made) -> Tensor:
    """ŵ [N, K] in bf16 of what was made."""
    return dequantize(made) if isinstance(made, Quantized) else dense(made)


def order_of(forms: Sequence[Form], hessian: Tensor) -> Tensor:
    """The order [K] that `factor` is best given for the first form, and in which the columns of each one's vectors come
    one after another."""
    together = max([form.vector for form in forms if isinstance(form, Scheme)], default=1)
    first, diagonal = forms[0], hessian.diagonal()
    return order_for(diagonal, first, together) if isinstance(first, Sparse) else largest_first(diagonal, together)


def tensors_of(made: Quantized | Made) -> tuple[Tensor | None, ...]:
    """All tensors of what was made, in an order that `of_tensors` knows."""
    if isinstance(made, Quantized):
        return made.q, made.scale, made.zero, made.table
    names = made.form.parts(made.shape)
    return (*(made.parts[name] for name in names), *(() if made.base is None else tensors_of(made.base)))


def of_tensors(form: Form, shape: tuple[int, int], tensors: Sequence[Tensor | None]) -> Quantized | Made:
    """What `tensors_of` took apart."""
    if isinstance(form, Scheme):
        q, scale, zero, table = tensors
        assert q is not None and scale is not None
        return Quantized(scheme=form, q=q, scale=scale, zero=zero, table=table)
    names = tuple(form.parts(shape))
    parts = {name: tensor for name, tensor in zip(names, tensors, strict=False) if tensor is not None}
    base = None
    if isinstance(form, LowRank | Narrow) and isinstance(form.base, Scheme):
        made = of_tensors(form.base, shape, tensors[len(names) :])
        assert isinstance(made, Quantized)
        base = made
    return Made(form=form, shape=shape, parts=parts, base=base)

"""Several weights that have something in common, stored once: a basis of what comes in or goes out, or a weight from
which they differ by little.

    right     W_i ≈ A_i B        members read alike: q, k and v of a block, gate and up, one layer of several blocks
    left      W_i ≈ A B_i        members write to one place, as all that goes back to the residual stream
    weight    W_i ≈ W + A_i B_i  one layer of several blocks; of rank 0 one weight for all of them

Least is Σ_i Σ_o G_io (E_i H_i E_iᵀ)_oo, as in `low_rank`. A common A is the leading eigenvectors of Σ_i Y_i Y_iᵀ,
Y_i = G_i^½ W_i S_i: the best there is, if all G_i are alike; else their mean counts. A common B is that of all rows one
below the other, the best if all H_i are one matrix; where they differ it is found by the mean of their diagonals, and
each A_i fitted by its own H_i. A common W is the members' mean, weighed entry by entry with G_i and diag H_i, in turns
with the differences from it.

The first member owns what is common (`packed.forms.Shared`).

Legend of shapes: N outputs, K inputs, r rank, n the shorter of N and K, R rows of a block.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from memfit.packed.fake import blocks_to_run
from memfit.packed.forms import Common, LowRank, Shared, Whole
from memfit.packed.scheme import Scheme

from .gptq import Factor, gptq
from .low_rank import fitted_left, fitted_right, right_from, rounded, streamed
from .made import Made, read
from .quantize import Quantized, dequantize, quantize
from .spectrum import (
    Metric,
    error_of,
    errors_by_rank,
    leading,
    left_gram,
    positive,
    right_gram,
    root_of,
    row_slices,
    tails,
    weighed,
    wide_of,
)

ROUNDS: Final = 4
"""Turns that a common weight and the differences from it take; the best is kept."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Member:
    """One of the weights, and what its errors count."""

    weight: Tensor
    """[N, K]"""
    metric: Metric
    """Of its inputs; members that read the same have the same object."""
    rows: Tensor | None = None
    """G [N]; None: all outputs count the same."""

    @classmethod
    def of(
        cls, weight: Tensor, *, importance_K: Tensor | None = None, factor: Factor | None = None,
        rows_N: Tensor | None = None,
    ) -> "Member":  # fmt: skip
        """With the arguments of `factorize`."""
        return cls(weight=weight, metric=Metric(importance_K=importance_K, factor=factor), rows=rows_N)


Members = Mapping[str, Member]
"""By module name; the first is the owner."""


@torch.no_grad()
def share(members: Members, common: Common, rank: int, *, base: Scheme | None = None) -> dict[str, Made | Quantized]:
    """What is stored of each member, with `rank`; the owner's is in the form that `forms` tells.

    Args:
        base: integers of a common weight; None: it stays in bf16.

    Raises:
        ValueError: fewer than two members, shapes that can have nothing of that kind in common, weights not finite.
    """
    _check(members, common)
    form_of = forms(list(members), common, rank, base=base)
    if common == "weight":
        return _shared_weight(members, form_of, rank, base)
    return _shared_right(members, form_of, rank) if common == "right" else _shared_left(members, form_of, rank)


def forms(
    names: Iterable[str], common: Common, rank: int, *, base: Scheme | None = None
) -> dict[str, LowRank | Shared | Whole | Scheme]:
    """The forms of members by name; the first is the owner."""
    owner, *others = names
    found: dict[str, LowRank | Shared | Whole | Scheme] = {}
    if common == "weight":
        alone = Whole() if base is None else base
        found[owner] = LowRank(rank=rank, base=alone) if rank else alone
    elif base is not None:
        raise ValueError(f"integers go with a common weight, not with a common {common} factor")
    else:
        found[owner] = LowRank(rank=rank)
    return found | {name: Shared(owner=owner, common=common, rank=rank) for name in others}


def nbytes_of(
    shapes: Mapping[str, tuple[int, int]], common: Common, rank: int, *, base: Scheme | None = None
) -> int:
    """Bytes that members of these shapes [N, K] take together."""
    return sum(form.nbytes(shapes[name]) for name, form in forms(shapes, common, rank, base=base).items())


@torch.no_grad()
def shared_errors(members: Members, common: Common) -> Tensor:
    """Σ_i Σ_o G_io (E_i H_i E_iᵀ)_oo of every rank: float64 [n + 1]; half of it is nats, as in `errors_by_rank`.

    Of a common right factor of members that read different inputs it is what their mean would make of it, and of a
    common weight what its first turn errs by, which the next make less. Without integers.
    """
    _check(members, common)
    if common == "right":
        return tails(_stacked_gram(members, one := _one_metric(members), _wide(members, one)))
    if common == "left":
        return tails(_joined_gram(members, _wide(members)))
    mean = _mean(members, {})
    errors = []
    for member in members.values():
        off = member.weight.to(mean.dtype, copy=True).sub_(mean)
        errors.append(_errors(off, member))
    return torch.stack(errors).sum(dim=0)


def tied(
    table: Callable[[], Iterable[Tensor]], head: Callable[[], Iterable[Tensor]], shape: tuple[int, int], owner: str,
    rank: int, *, importance_K: Tensor | None = None, factor: Factor | None = None, rows_N: Tensor | None = None,
) -> tuple[Shared, Tensor | None, Iterator[Tensor]]:  # fmt: skip
    """A head [N, K] that had a weight of its own as its table and a difference of a rank: B, then A of each block.

    Both come in equal blocks of rows, twice. What the table is stored in does not matter: give its blocks as they will
    be read, and the difference makes up for that too.

    Returns: the head's form, B [r, K] (None of rank 0), and blocks [R, r] of A.
    """
    form = Shared(owner=owner, common="weight", rank=rank)
    if not rank:
        return form, None, iter(())

    def off() -> Iterator[Tensor]:
        for own, theirs in zip(head(), table(), strict=True):
            yield own.to(torch.float32, copy=True).sub_(theirs)

    right, lefts = streamed(
        off, shape, LowRank(rank=rank), importance_K=importance_K, factor=factor, rows_N=rows_N
    )  # fmt: skip
    return form, right, (left for left, _ in lefts)


def shared_error(members: Members, made: Mapping[str, Made | Quantized]) -> float:
    """Σ_i Σ_o G_io (E_i H_i E_iᵀ)_oo of what is stored."""
    owner = made[next(iter(members))]
    total = 0.0
    for name, member in members.items():
        found = made[name]
        stored = dequantize(found) if isinstance(found, Quantized) else read(found, owner)
        total += error_of(member.weight, stored.__getitem__, member.metric, member.rows)
        del stored
    return total


def _shared_right(members: Members, form_of: Mapping[str, Any], rank: int) -> dict[str, Made | Quantized]:
    one = _one_metric(members)
    wide = _wide(members, one)
    found = right_from(leading(_stacked_gram(members, one, wide), rank), one)
    made: dict[str, Made | Quantized] = {}
    for name, member in members.items():
        fit = found if member.metric is one else fitted_left(found.right, member.metric, wide)
        weight = member.weight
        left = torch.cat([fit.left(weight[part]) for part in row_slices(weight)])
        parts = {"weight_left": left} | ({} if made else {"weight_right": found.right})
        made[name] = Made(form=form_of[name], shape=_shape(member), parts=parts)
    return made


def _shared_left(members: Members, form_of: Mapping[str, Any], rank: int) -> dict[str, Made | Quantized]:
    wide = _wide(members)
    vectors = leading(_joined_gram(members, wide), rank)
    common = _common_root(members, wide)
    left = vectors if common is None else vectors / common.unsqueeze(1)
    left = left.to(torch.bfloat16).contiguous()
    made: dict[str, Made | Quantized] = {}
    for name, member in members.items():
        right = fitted_right(left, member.weight, root_of(member.rows, wide))
        parts = {"weight_right": right} if made else {"weight_left": left, "weight_right": right}
        made[name] = Made(form=form_of[name], shape=_shape(member), parts=parts)
    return made


def _shared_weight(
    members: Members, form_of: Mapping[str, Any], rank: int, base: Scheme | None
) -> dict[str, Made | Quantized]:
    best: dict[str, Made | Quantized] = {}
    least = float("inf")
    products: dict[str, Tensor] = {}
    for _ in blocks_to_run(range(ROUNDS if rank else 1)):
        mean = _mean(members, products)
        products.clear()
        whole, common = _stored(mean, members, base)
        del mean
        made: dict[str, Made | Quantized] = {}
        for name, member in members.items():
            parts = {} if made or base is not None else {"weight_whole": common}
            if rank:
                off = member.weight.to(torch.float32, copy=True).sub_(common)
                left, right = rounded(off, rank, member.metric, member.rows)
                del off
                parts |= {"weight_left": left, "weight_right": right}
                products[name] = left.float() @ right.float()
            if not made and not rank and whole is not None:
                made[name] = whole
            else:
                made[name] = Made(form=form_of[name], shape=_shape(member), parts=parts, base=None if made else whole)
        error = shared_error(members, made)
        if not best or error < least:
            best, least = made, error
    return best


def _stored(mean: Tensor, members: Members, base: Scheme | None) -> tuple[Quantized | None, Tensor]:
    """The common weight as it is stored, and as it is read, bf16 [N, K]."""
    if base is None:
        whole = mean.to(torch.bfloat16)
        return None, whole
    one = _one_metric(members)
    if one.factor is not None:
        found = gptq(mean, one.factor, base).quantized
    else:
        importance = None if one.importance is None else one.importance.to(torch.float32)
        found = quantize(mean, base, importance=importance)
    return found, dequantize(found)


def _mean(members: Members, products: Mapping[str, Tensor]) -> Tensor:
    """The common weight [N, K] that is best for what the products leave, errors of inputs taken as independent."""
    first = next(iter(members.values()))
    wide = _wide(members)
    total = torch.zeros(first.weight.shape, dtype=wide, device=first.weight.device)
    # Equal weights stay what they are, to the bit, where they are added up as differences from the first.
    share = torch.zeros_like(total)
    for name, member in members.items():
        rows = torch.ones(1, 1) if member.rows is None else positive(member.rows).unsqueeze(1)
        importance = member.metric.importance
        columns = torch.ones(1, 1) if importance is None else positive(importance).unsqueeze(0)
        for part in row_slices(member.weight):
            counts = (rows if rows.shape[0] == 1 else rows[part]).to(wide) * columns.to(wide)
            off = member.weight[part].to(wide) - first.weight[part].to(wide)
            if name in products:
                off -= products[name][part]
            total[part] += off * counts
            share[part] += counts
            del off, counts
    return total.div_(share).add_(first.weight)


def _one_metric(members: Members) -> Metric:
    """That of all members, if it is one; else one of the mean of what their inputs count."""
    metrics = {id(member.metric): member.metric for member in members.values()}
    first = next(iter(metrics.values()))
    if len(metrics) == 1:
        return first
    importances = [metric.importance for metric in metrics.values()]
    told = [importance for importance in importances if importance is not None]
    if len(told) < len(importances):
        return Metric()
    return Metric(importance_K=torch.stack([one.to(torch.float64) for one in told]).mean(dim=0).to(told[0].dtype))


def _stacked_gram(members: Members, metric: Metric, wide: torch.dtype) -> Tensor:
    """Σ_i Y_iᵀ Y_i [K, K], all inputs counted by one metric."""

    def blocks() -> Iterator[Tensor]:
        for member in members.values():
            root = root_of(member.rows, wide)
            for part in row_slices(member.weight):
                yield weighed(member.weight[part].to(wide), None if root is None else root[part])

    return right_gram(blocks(), metric, None, wide)


def _joined_gram(members: Members, wide: torch.dtype) -> Tensor:
    """Σ_i Y_i Y_iᵀ [N, N], all outputs counted by the mean of what they count."""
    common = _common_root(members, wide)
    grams = (left_gram(member.weight, member.metric, common, wide) for member in members.values())
    total = next(grams)
    for gram in grams:
        total += gram
    return total


def _common_root(members: Members, wide: torch.dtype) -> Tensor | None:
    told = [positive(member.rows).to(wide) for member in members.values() if member.rows is not None]
    return None if len(told) < len(members) else torch.stack(told).mean(dim=0).sqrt_()


def _errors(weight: Tensor, member: Member) -> Tensor:
    metric = member.metric
    if metric.factor is not None:
        return errors_by_rank(weight, factor=metric.factor, rows_N=member.rows)
    return errors_by_rank(weight, importance_K=metric.importance, rows_N=member.rows)


def _wide(members: Members, *metrics: Metric) -> torch.dtype:
    found = torch.float32
    for member in members.values():
        for metric in (member.metric, *metrics):
            found = torch.promote_types(found, wide_of(member.weight, metric))
    return found


def _shape(member: Member) -> tuple[int, int]:
    return member.weight.shape[0], member.weight.shape[1]


def _check(members: Members, common: Common) -> None:
    if len(members) < 2:
        raise ValueError(f"sharing takes two weights or more, got {', '.join(members) or 'none'}")
    first, *others = members
    for name, member in members.items():
        if member.weight.dim() != 2:
            raise ValueError(f"{name} is {list(member.weight.shape)}: weights [N, K] alone are shared")
        member.metric.check(member.weight.shape[1])
    sides = {"right": (1,), "left": (0,), "weight": (0, 1)}[common]
    for name in others:
        own, theirs = members[name].weight.shape, members[first].weight.shape
        if any(own[side] != theirs[side] for side in sides):
            raise ValueError(f"{name} is {list(own)} and {first} {list(theirs)}: they can have no {common} in common")

"""Which weights of a model may have something in common or become narrower as one: bytes and price of each choice.

Each is a choice for all of its modules at once, beside what each of them may become alone. Prices are nats a token to
second order, as in `price`: ½ Σ_o G_o (E H Eᵀ)_oo, of every rank from one decomposition.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, get_args

import torch
from torch import Tensor, nn

from memfit.packed.forms import Common, Form, Narrow
from memfit.packed.scheme import Scheme
from memfit.technique.gptq import Factor
from memfit.technique.heads import narrow_errors, why_not_narrow
from memfit.technique.share import Member, forms, nbytes_of, shared_errors
from memfit.technique.spectrum import Metric, errors_by_rank

from .groups import Group

_NUMBER: Final = re.compile(r"(?<=\.)\d+(?=\.)")

ReadWeight = Callable[[str], Tensor]
"""From a module's name to its weight [N, K]."""
MetricOf = Callable[[str], Metric]
"""What errors of a module's inputs count; of modules that read the same, the same object."""
RowsOf = Callable[[str], Tensor | None]
"""G [N] of a module's outputs; None: all count the same."""


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """Modules that may have something in common."""

    members: tuple[str, ...]
    """The first owns what is common."""
    shapes: tuple[tuple[int, int], ...]
    common: Common
    keeps: bool = False
    """Whether the owner stays what it is, in a form of its own: a table that a head is tied to."""

    def forms(self, rank: int, *, base: Scheme | None = None) -> dict[str, Form]:
        """The forms of all members; of the others alone where the owner stays what it is."""
        found: dict[str, Form] = dict(forms(self.members, self.common, rank, base=base))
        if self.keeps:
            del found[self.members[0]]
        return found

    def nbytes(self, rank: int, *, base: Scheme | None = None) -> int:
        """Bytes of these forms."""
        shapes = dict(zip(self.members, self.shapes, strict=True))
        if self.keeps:
            return sum(form.nbytes(shapes[name]) for name, form in self.forms(rank).items())
        return nbytes_of(shapes, self.common, rank, base=base)

    @property
    def ranks(self) -> range:
        """Ranks that each member has, from the smallest."""
        return range(0 if self.common == "weight" else 1, min(min(shape) for shape in self.shapes) + 1)

    def rank_for(self, nbytes: int, *, base: Scheme | None = None) -> int | None:
        """The largest rank that takes at most `nbytes`; None if none does."""
        least, most = self.ranks.start, self.ranks.stop - 1
        first = self.nbytes(least, base=base)
        each = self.nbytes(least + 1, base=base) - first if most > least else 1
        # From rank 0 on, of a common weight, as of others from 1 on, each rank takes the same.
        return None if first > nbytes else min(most, least + (nbytes - first) // each)

    def prices(self, read: ReadWeight, metric_of: MetricOf, rows_of: RowsOf) -> Tensor:
        """Nats a token of every rank, float64 [n + 1]; see `technique.share.shared_errors`. Without integers."""
        if self.keeps:
            owner, head = self.members
            off = read(head).to(torch.float32, copy=True).sub_(read(owner))
            return 0.5 * _errors(off, metric_of(head), rows_of(head))
        members = {
            name: Member(weight=read(name), metric=metric_of(name), rows=rows_of(name)) for name in self.members
        }
        return 0.5 * shared_errors(members, self.common)


@dataclass(frozen=True, kw_only=True)
class Narrowing:
    """Values and the output of an attention, which may have fewer dimensions a head."""

    value: str
    output: str
    shapes: tuple[tuple[int, int], tuple[int, int]]
    width: int
    """Dimensions of a head."""

    def forms(self, kept: int, *, base: Scheme | None = None) -> dict[str, Form]:
        """The forms of both; `base`: their integers."""
        return {name: self.form(name, kept, base=base) for name in (self.value, self.output)}

    def form(self, member: str, kept: int, *, base: Scheme | None = None) -> Narrow:
        """The form of one of them."""
        (rows, _), (_, inputs) = self.shapes
        if member == self.value:
            return Narrow(heads=rows // self.width, kept=kept, side="out", base=base)
        return Narrow(heads=inputs // self.width, kept=kept, side="in", base=base)

    def nbytes(self, kept: int, *, base: Scheme | None = None) -> int:
        """Bytes of both."""
        made = self.forms(kept, base=base)
        return made[self.value].nbytes(self.shapes[0]) + made[self.output].nbytes(self.shapes[1])

    def prices(self, read: ReadWeight, factor_of: Callable[[str], Factor | None], rows_of: RowsOf) -> Tensor:
        """Nats a token for every number of dimensions kept, float64 [d + 1]."""
        value, output = read(self.value), read(self.output)
        given, rows = factor_of(self.output), rows_of(self.output)
        return 0.5 * narrow_errors(value, output, width=self.width, factor_Q=given, rows_M=rows)


def sharings(groups: Sequence[Group], *, run: int = 2) -> tuple[Sharing, ...]:
    """All that may be shared: a basis of what comes into layers that read alike (groups of several); a basis of what
    comes in or goes out, or the weight, of one layer of each `run` blocks that follow each other; a head tied to a
    table of its shape.

    Raises:
        ValueError: fewer than two blocks a run.
    """
    if run < 2:
        raise ValueError(f"at least 2 blocks share, got a run of {run}")
    found: list[Sharing] = []
    usable = [group for group in groups if group.blocked is None]
    layers: dict[tuple[str, tuple[int, int]], dict[int, str]] = {}
    for group in usable:
        shapes = [(shape[0], shape[1]) for shape in group.shapes]
        if group.kind != "linear" or any(len(shape) != 2 for shape in group.shapes):
            continue
        if len(group.members) > 1 and len(group.members) == len(shapes):
            found.append(Sharing(members=group.members, shapes=tuple(shapes), common="right"))
        for member, shape in zip(group.members, shapes, strict=False):
            number = _NUMBER.search(member)
            if number is not None:
                layers.setdefault((_NUMBER.sub("*", member, count=1), shape), {})[int(number[0])] = member
    for (_, shape), by_number in layers.items():
        for numbers in _runs(sorted(by_number), run):
            members = tuple(by_number[number] for number in numbers)
            for common in get_args(Common):
                found.append(Sharing(members=members, shapes=(shape,) * run, common=common))
    return (*found, *_ties(usable))


def narrowings(model: nn.Module) -> tuple[Narrowing, ...]:
    """Attentions whose values and output may become narrower; of the others `why_not_narrow` tells the reason."""
    found = []
    for name, module in model.named_modules():
        if isinstance(getattr(module, "v_proj", None), nn.Module) and why_not_narrow(module) is None:
            value, output = module.get_submodule("v_proj"), module.get_submodule("o_proj")
            assert isinstance(value, nn.Linear) and isinstance(output, nn.Linear), "this was asked"
            width = module.head_dim
            assert isinstance(width, int), "and this"
            shapes = [(one.out_features, one.in_features) for one in (value, output)]
            found.append(
                Narrowing(
                    value=f"{name}.v_proj", output=f"{name}.o_proj", shapes=(shapes[0], shapes[1]), width=width
                )
            )
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class NarrowHeads:
    """An attention that may have narrower heads, and the forms that its two groups may then have."""

    narrowing: Narrowing
    values: Group
    """Of the values, and of what shares its choice with them."""
    output: Group
    forms: Mapping[str, tuple[Narrow, ...]]
    """By name of the group. Both keep the same dimensions, or neither is narrower."""

    def prices(self, found: Mapping[tuple[str, Form], float], errors: Tensor) -> dict[tuple[str, Form], float]:
        """Nats a token: of fewer dimensions, `errors` [d + 1] by their number, at the output; integers as they are
        priced for the whole weights."""
        made: dict[tuple[str, Form], float] = {}
        for group, lost in ((self.values, False), (self.output, True)):
            for form in self.forms[group.name]:
                price = 0.0 if form.base is None else found[group.name, form.base]
                made[group.name, form] = price + (float(errors[form.kept]) if lost else 0.0)
        return made


def narrow_heads(
    narrowings: Sequence[Narrowing], groups: Sequence[Group], schemes: Mapping[str, Sequence[Form]],
    shares: Sequence[float],
) -> tuple[NarrowHeads, ...]:  # fmt: skip
    """The attentions of which both groups can be stored so, each with integers that it may have anyway, or in bf16.

    shares: of a head's dimensions that are kept.
    """
    group_of = {member: group for group in groups for member in group.members}
    found = []
    for one in narrowings:
        values, output = group_of.get(one.value), group_of.get(one.output)
        if values is None or output is None or values is output or len(output.members) > 1:
            continue
        forms = {
            group.name: tuple(
                form
                for kept in sorted({int(share * one.width) for share in shares} - {0}, reverse=True)
                for base in (None, *(s for s in schemes[group.name] if isinstance(s, Scheme) and s.activations == 16))
                if group.why_not(form := one.form(member, kept, base=base)) is None
            )
            for group, member in ((values, one.value), (output, one.output))
        }
        if all(forms.values()):
            found.append(NarrowHeads(narrowing=one, values=values, output=output, forms=forms))
    return tuple(found)


def _runs(numbers: list[int], run: int) -> list[list[int]]:
    """Pieces of `run` numbers that follow each other, none in two of them."""
    found: list[list[int]] = []
    piece: list[int] = []
    for number in numbers:
        piece = [*piece, number] if piece and number == piece[-1] + 1 else [number]
        if len(piece) == run:
            found.append(piece)
            piece = []
    return found


def _ties(groups: Sequence[Group]) -> list[Sharing]:
    """Heads that have a weight of their own, of a table's shape."""
    tables = [group for group in groups if group.kind == "embedding" and len(group.members) == 1]
    heads = [group for group in groups if group.kind == "linear" and len(group.members) == 1]
    return [
        Sharing(
            members=(table.members[0], head.members[0]), common="weight", keeps=True,
            shapes=((table.shapes[0][0], table.shapes[0][1]), (head.shapes[0][0], head.shapes[0][1])),
        )
        for table in tables for head in heads
        if head.shapes == table.shapes and _NUMBER.search(head.members[0]) is None
    ]  # fmt: skip


def _errors(weight: Tensor, metric: Metric, rows: Tensor | None) -> Tensor:
    if metric.factor is not None:
        return errors_by_rank(weight, factor=metric.factor, rows_N=rows)
    return errors_by_rank(weight, importance_K=metric.importance, rows_N=rows)


def metrics_of(
    statistics: Mapping[str, tuple[Tensor, Tensor]], groups: Sequence[Group]
) -> tuple[MetricOf, RowsOf]:
    """What errors count by the diagonals of H and G: one metric for each group's members, which read the same."""
    made: dict[str, Metric] = {}
    for group in groups:
        if group.kind == "linear" and group.members[0] in statistics:
            one = Metric(importance_K=statistics[group.members[0]][0])
            made |= dict.fromkeys(group.members, one)
    return made.__getitem__, lambda name: statistics[name][1]

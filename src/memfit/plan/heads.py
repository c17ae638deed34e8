"""Attentions whose values and output may become narrower as one: a choice of two groups at once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from memfit.packed.forms import Form, Narrow
from memfit.packed.scheme import Scheme
from memfit.technique.gptq import Factor
from memfit.technique.heads import narrow_errors, why_not_narrow

from .groups import Group

ReadWeight = Callable[[str], Tensor]
"""From a module's name to its weight [N, K]."""
RowsOf = Callable[[str], Tensor | None]
"""G [N] of a module's outputs; None: all count the same."""


@dataclass(frozen=True, kw_only=True)
class Narrowing:
    """Values and the output of an attention, which may have fewer dimensions a head."""

    value: str
    output: str
    shapes: tuple[tuple[int, int], tuple[int, int]]
    width: int
    """Dimensions of a head."""

    def form(self, member: str, kept: int, *, base: Scheme | None = None) -> Narrow:
        """The form of one of them."""
        (rows, _), (_, inputs) = self.shapes
        if member == self.value:
            return Narrow(heads=rows // self.width, kept=kept, side="out", base=base)
        return Narrow(heads=inputs // self.width, kept=kept, side="in", base=base)

    def prices(self, read: ReadWeight, factor_of: Callable[[str], Factor | None], rows_of: RowsOf) -> Tensor:
        """Nats a token for every number of dimensions kept, float64 [d + 1]."""
        value, output = read(self.value), read(self.output)
        given, rows = factor_of(self.output), rows_of(self.output)
        return 0.5 * narrow_errors(value, output, width=self.width, factor_Q=given, rows_M=rows)


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

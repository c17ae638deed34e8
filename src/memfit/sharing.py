"""What modules have in common, made where no block walk has made it: from their weights alone, or the inputs' sizes."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from memfit.format.integers import Integers
from memfit.packed.forms import Form, LowRank, Narrow, Shared, basis_of, is_value, like_of, output_of, value_of
from memfit.source.source import Source
from memfit.technique.heads import narrow_heads
from memfit.technique.low_rank import factorize
from memfit.technique.made import Made
from memfit.technique.making import make, weight_of
from memfit.technique.quantize import Quantized
from memfit.technique.share import Member, share
from memfit.technique.spectrum import Metric


class Sharing:
    """The parts of what is shared, module by module.

    Args:
        schemes: by module name.
        integers: what was chosen for some modules before; an owner of those is not made anew.
        importance: by module, E[x²] of its inputs [K]; None: all alike.
    """

    def __init__(
        self, source: Source, schemes: Mapping[str, Form], integers: Integers | None,
        importance: Callable[[str], Tensor | None],
    ) -> None:  # fmt: skip
        self._source, self._schemes, self._integers, self._importance = source, schemes, integers, importance
        self._kept: dict[str, Made | Quantized] = {}
        self._owners = frozenset(owner for form in schemes.values() if (owner := basis_of(form)) is not None)

    def concerns(self, module: str) -> bool:
        """Whether a module shares something, has the right factor that others share, or is one of two that are made
        narrower together."""
        return module in self._owners or isinstance(self._schemes.get(module), Shared | Narrow)

    def made(self, module: str) -> Made:
        """What is stored of a module that shares something, or is a basis's owner."""
        form = self._schemes[module]
        if isinstance(form, Narrow):
            if module not in self._kept:
                self._kept |= self._narrow(module if is_value(module) else value_of(module))
            narrow = self._kept.pop(module)
            assert isinstance(narrow, Made)
            return narrow
        if (owner := like_of(form)) is not None:
            assert isinstance(form, Shared)
            return self._difference(module, owner, form)
        owner = basis_of(form) or module
        if module not in self._kept:
            self._kept |= self._basis(owner)
        made = self._kept.pop(module)
        assert isinstance(made, Made)
        return made

    def _basis(self, owner: str) -> dict[str, Made | Quantized]:
        form = self._schemes[owner]
        assert isinstance(form, LowRank), "a basis is a right factor"
        names = [owner, *(name for name, other in self._schemes.items() if basis_of(other) == owner)]
        metric = Metric(importance_K=self._importance(owner))
        members = {name: Member(weight=self._weight(name), metric=metric) for name in names}
        return share(members, "right", form.rank)

    def _narrow(self, value: str) -> dict[str, Made | Quantized]:
        output = output_of(value)
        forms = self._schemes[value], self._schemes[output]
        assert isinstance(forms[0], Narrow) and isinstance(forms[1], Narrow), "both are, or none"
        weight = self._weight(value)
        made = narrow_heads(
            weight, self._weight(output), width=weight.shape[0] // forms[0].heads, kept=forms[0].kept,
            base=forms[1].base, value_base=forms[0].base,
        )  # fmt: skip
        return {value: made[0], output: made[1]}

    def _difference(self, module: str, owner: str, form: Shared) -> Made:
        weight = self._weight(module)
        shape = (weight.shape[0], weight.shape[1])
        if not form.rank:
            return Made(form=form, shape=shape, parts={})
        off = weight.float().sub_(self._as_it_becomes(owner, shape))
        parts = factorize(off, LowRank(rank=form.rank), importance_K=self._importance(module)).parts
        return Made(form=form, shape=shape, parts=parts)

    def _as_it_becomes(self, owner: str, shape: tuple[int, int]) -> Tensor:
        """An owner's weight as it will be read."""
        if self._integers is not None and owner in self._integers:
            return self._integers.weight(owner, self._schemes, shape)
        return weight_of(make(self._weight(owner), self._schemes[owner], importance_K=self._importance(owner)))

    def _weight(self, module: str) -> Tensor:
        return self._source.read_parameter(f"{module}.weight", dtype=torch.bfloat16)

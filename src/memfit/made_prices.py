"""What making a layer will err by, with H whole: the prices of linear layers in blocks, where a text is what they are
made for.

`compensate` makes up for errors as they come, which the diagonals of `plan.price` know nothing of: they take the inputs
of a layer as independent. Here some rows of each layer are really made, by the very functions and with H's factor, as
are the spectra of its factors:

    KL ≈ ½ Σ_o G_o (E H Eᵀ)_oo,    E = W − Ŵ,    G_o = E[(∂ℓ/∂y_o)²]

Legend of shapes: W windows, N outputs, K inputs, R sampled rows, S schemes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from memfit.account.structure import inside_blocks
from memfit.account.watch import Anew, Watch
from memfit.calibrate.inputs import hear_inputs
from memfit.packed.fake import is_fake, repeated
from memfit.packed.forms import BLOCK, Form, LowRank, Shared, Sparse
from memfit.packed.scheme import Scheme
from memfit.plan.groups import Group
from memfit.plan.heads import NarrowHeads
from memfit.plan.price import Prices, systematic
from memfit.source.source import Source
from memfit.technique.gptq import Factor, damping_for, factor, gptq, integer_errors
from memfit.technique.made import dense
from memfit.technique.making import order_of
from memfit.technique.quantize import dequantize, learned
from memfit.technique.share import Member, shared_errors
from memfit.technique.smooth import activation_noise
from memfit.technique.sparsegpt import sparsegpt
from memfit.technique.spectrum import Metric, errors_by_rank

ROWS: Final = 96
"""Rows of a layer that are made in each form."""
_WEIGHTS: Final = 2**23
"""Most weights that are made at once, of all integers together."""
_FEWEST: Final = 16
RIDGE: Final = 0.3
"""Of `damping_for`: less than integers are chosen with. Damping counts errors of inputs that the text never had, which
the model does not lose: by the same ridge the demo model was to lose 0.0026 at half of its bytes, and lost 0.0021; by
this one 0.0022."""

ByForm = dict[Form, float]
"""Nats a token."""


def made_prices(
    source: Source,
    windows_WT: Tensor,
    groups: Sequence[Group],
    candidates: Mapping[str, Sequence[Form]],
    gradients: Callable[[str], Tensor],
    *,
    watch: Watch,
    narrow: Sequence[NarrowHeads] = (),
    batch: int = 4,
    scratch: Path | None = None,
    damping: float | None = None,
    rows: int = ROWS,
) -> Prices:
    """Nats a token of each candidate of each group of linear layers in the model's blocks, by (group name, form).

    Groups of which some layer is in no block, or was never called, are left out: `plan.price` has theirs.

    Args:
        candidates: group name to forms.
        gradients: of a module G [N].
        narrow: attentions whose heads may become narrower: what both of their groups may then be is priced, too.
        scratch: where what blocks give each other waits in files; None: in memory.
        damping: see `gptq.factor`; None: as `gptq.damping_for` has it, by a smaller ridge.
        rows: of each layer that are made.

    Raises:
        ValueError: a layer whose inputs are not finite, or all 0.
    """
    group_of = {
        member: group
        for group in groups
        if group.kind == "linear" and candidates.get(group.name)
        for member in group.members
    }
    found: dict[str, dict[Form, float]] = {}
    seen: dict[str, int] = {}

    by_output = {one.narrowing.output: one for one in narrow}
    lost: dict[str, Tensor] = {}

    def heard(layers: Mapping[str, nn.Linear], stage: Sequence[str], hessian: Tensor, anew: Anew) -> None:
        ridge = damping_for(hessian.shape[0], windows_WT.numel(), ridge=RIDGE) if damping is None else damping
        for name in stage:
            if (one := by_output.get(name)) is not None and one.narrowing.value in layers:
                lost[name] = one.narrowing.prices(
                    lambda name: layers[name].weight.detach(),
                    lambda _: factor(hessian, damping=ridge),
                    gradients,
                )
        for group in dict.fromkeys(group_of[name] for name in stage if name in group_of):
            members = [name for name in stage if group_of.get(name) is group]
            weights = {name: layers[name].weight.detach() for name in members}
            layer = _Layers(
                source=source, weights=weights, gradients={name: gradients(name) for name in members},
                hessian=hessian, damping=ridge, rows=rows, whole=len(members) == len(group.members),
            )  # fmt: skip
            totals = found.setdefault(group.name, {})
            for form, price in layer.prices(candidates[group.name], anew).items():
                totals[form] = totals.get(form, 0.0) + price
            seen[group.name] = seen.get(group.name, 0) + len(members)

    kinds: dict[str, Any] = {name: tuple(map(_kind, candidates[group.name])) for name, group in group_of.items()}
    kinds = {name: None for one in narrow for name in (one.narrowing.value, one.narrowing.output)} | kinds
    hear_inputs(source, windows_WT, kinds, heard, watch=watch, phase="price", batch=batch, scratch=scratch)
    if is_fake(windows_WT):  # of equal blocks two were heard
        blocks = inside_blocks(source.build(dtype=torch.bfloat16))
        inside = [group for group in group_of.values() if all(name.startswith(blocks) for name in group.members)]
        priced = {(group.name, form): 0.0 for group in inside for form in candidates[group.name]}
        return priced | {(name, form): 0.0 for one in narrow for name, forms in one.forms.items() for form in forms}
    priced = {
        (group.name, form): found[group.name][form]
        for group in groups
        if seen.get(group.name) == len(group.members)
        for form in candidates[group.name]
        if form in found[group.name]
    }
    for name, errors in lost.items():
        one = by_output[name]
        bases = {(g.name, form.base) for g in (one.values, one.output) for form in one.forms[g.name] if form.base}
        if bases <= priced.keys():
            priced |= one.prices(priced, errors)
    return priced


def _kind(form: Form) -> Any:
    """What decides the course of pricing a form: of one that is shared not its owner's name."""
    return replace(form, owner="it") if isinstance(form, Shared) else form


@dataclass(frozen=True, kw_only=True, eq=False)
class _Layers:
    """Layers of one group that read the same input."""

    source: Source
    weights: dict[str, Tensor]
    """[N, K] each, by name."""
    gradients: dict[str, Tensor]
    hessian: Tensor
    """[K, K]"""
    damping: float
    rows: int
    whole: bool
    """Whether they are all of the group."""

    def prices(self, forms: Sequence[Form], anew: Anew) -> ByForm:
        """Nats a token, of all of them together; the phase begins anew for each kind."""
        anew()
        found: ByForm = {}
        schemes = [form for form in forms if isinstance(form, Scheme) and form.values != "codebook"]
        codebooks = [form for form in forms if isinstance(form, Scheme) and form.values == "codebook"]
        for vector in sorted({scheme.vector for scheme in codebooks}):
            alike = [scheme for scheme in codebooks if scheme.vector == vector]
            made = factor(self.hessian, damping=self.damping, order=order_of(alike, self.hessian))
            found |= {scheme: self._of_codebook(scheme, made) for scheme in alike}
            del made
            anew()
        usual = factor(self.hessian, damping=self.damping)
        if schemes:
            found |= self._sample(len(schemes)).of_schemes(schemes, usual)
        for base in dict.fromkeys(form.base for form in forms if isinstance(form, LowRank)):
            assert base is None or isinstance(base, Scheme), "a whole weight is not factored for a plan"
            anew()
            errors = self._spectra(usual, base)
            found |= {f: _number(errors[f.rank]) for f in forms if isinstance(f, LowRank) and f.base == base}
        for owner in dict.fromkeys(form.owner for form in forms if isinstance(form, Shared)):
            if not self.whole:
                continue
            anew()
            errors = self._shared(usual, owner)
            found |= {f: _number(errors[f.rank]) for f in forms if isinstance(f, Shared) and f.owner == owner}
        del usual
        by_pattern: dict[str, list[Sparse]] = {}
        for form in forms:
            if isinstance(form, Sparse):
                by_pattern.setdefault(form.pattern, []).append(form)
        for pattern, sparse in by_pattern.items():
            sample = self._sample(1, together=BLOCK[0] if pattern == "blocks" else 1)
            made = factor(self.hessian, damping=self.damping, order=order_of(sparse[:1], self.hessian))
            for form in sparse:
                anew()
                found[form] = sample.of_sparse(form, made)
            del made, sample
        return found

    def _of_codebook(self, scheme: Scheme, made: Factor) -> float:
        """A sample of each weight, with the levels that all of it will have."""
        price = 0.0
        for name, weight in self.weights.items():
            table = learned(scheme, [weight], made.own_weights())
            price += self._sample(1, of=name).of_scheme(scheme, made, table)
        return price

    def _sample(self, times: int, together: int = 1, of: str | None = None) -> "_Rows":
        """Rows to be made `times` times over; `together`: that come in bands of so many; `of`: one weight alone."""
        inputs = self.hessian.shape[0]
        most = _WEIGHTS // (times * inputs * len(self.weights))
        parts, counts = [], []
        for name, weight in self.weights.items() if of is None else [(of, self.weights[of])]:
            wanted = max(_FEWEST, min(self.rows, most))
            rows_N = self.gradients[name].to(torch.float32)
            bands = weight.shape[0] // together
            picked, stands_for = systematic(rows_N.view(bands, together).sum(1), min(bands, -(-wanted // together)))
            if together > 1:
                within = torch.arange(together)
                picked = (picked.unsqueeze(1) * together + within).view(-1)
                stands_for = stands_for.repeat_interleave(together)
            parts.append(weight.index_select(0, picked))
            counts.append(rows_N[picked] * stands_for)
        return _Rows(torch.cat(parts), torch.cat(counts))

    def _spectra(self, made: Factor, base: Scheme | None) -> Tensor:
        """½ Σ_o G_o (E H Eᵀ)_oo of every rank, those of all the layers added up as far as each has them."""
        most = min(min(weight.shape) for weight in self.weights.values())
        total = torch.zeros(most + 1, dtype=torch.float64)
        for name, weight in self.weights.items():
            rest = weight if base is None else _lost(name, weight, made, base)
            total += errors_by_rank(rest, factor=made, rows_N=self.gradients[name])[: most + 1]
            del rest
        return total.mul_(0.5)

    def _shared(self, made: Factor, owner: str) -> Tensor:
        """The same of what is shared: a basis of their own, or the weight of a layer of another block."""
        if owner in self.weights:
            metric = Metric(factor=made)
            members = {
                name: Member(weight=weight, metric=metric, rows=self.gradients[name])
                for name, weight in self.weights.items()
            }
            return shared_errors(members, "right").mul_(0.5)
        ((name, weight),) = self.weights.items()
        off = self.source.read_parameter(f"{owner}.weight", dtype=torch.bfloat16).float()
        off.sub_(weight)
        return errors_by_rank(off, factor=made, rows_N=self.gradients[name]).mul_(0.5)


@dataclass(frozen=True)
class _Rows:
    """Sampled rows, and what the error of each counts."""

    weight_RK: Tensor
    counts_R: Tensor

    def of_schemes(self, schemes: Sequence[Scheme], made: Factor) -> ByForm:
        found: ByForm = {}
        integers = [scheme for scheme in schemes if scheme.values == "int"]
        for symmetric in (True, False):
            alike = [scheme for scheme in integers if scheme.symmetric == symmetric]
            if alike:
                # Activations are another's business: what is made is the same.
                errors_SR = integer_errors(self.weight_RK, made, alike)
                found |= {scheme: self._price(errors) for scheme, errors in zip(alike, errors_SR, strict=True)}
        for scheme in schemes:
            if scheme not in found:
                found[scheme] = self.of_scheme(scheme, made)
            if scheme.activations == 8:
                size = self.weight_RK.to(torch.float32, copy=True).square_().sum(dim=1)
                found[scheme] += self._price(size) * _number(activation_noise(made.importance))
        return found

    def of_scheme(self, scheme: Scheme, made: Factor, table: Tensor | None = None) -> float:
        return self._price(gptq(self.weight_RK, made, scheme, table=table).error)

    def of_sparse(self, form: Sparse, made: Factor) -> float:
        off = self.weight_RK.to(torch.float32, copy=True).sub_(dense(sparsegpt(self.weight_RK, made, form)))
        return self._price(Metric(factor=made).times(off).square_().sum(dim=1))

    def _price(self, errors_R: Tensor) -> float:
        return 0.5 * _number((errors_R * self.counts_R).sum())


def _lost(name: str, weight: Tensor, made: Factor, base: Scheme) -> Tensor:
    """What rounding a weight loses; a dry run tells it from an equal one."""

    def call() -> tuple[Tensor]:
        return (weight.float().sub_(dequantize(gptq(weight, made, base).quantized)),)

    given = lambda: (weight, made.order, made.coupling, made.weights, made.importance, made.dead)  # noqa: E731
    (lost,) = repeated(("lost", base), None, name, given, call)
    assert isinstance(lost, Tensor)
    return lost


def _number(tensor: Tensor) -> float:
    """The value; 0 of a fake one, so that pricing can be followed without weights."""
    return 0.0 if is_fake(tensor) else float(tensor)

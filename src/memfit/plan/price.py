"""The price of storing a group in a scheme: the KL divergence expected of it, nats a token.

N outputs, K inputs of a weight; V vocabulary, D width of an embedding; n sampled rows.

To second order, a change δw of the weights moves the model's distribution by KL ≈ ½ δwᵀ F δw with F the
Fisher information. With F diagonal and the gradients of a layer's outputs independent of its inputs,

    KL ≈ ½ Σ_o Σ_k G_o H_k (w − ŵ)²_ok        H_k = E[x_k²],  G_o = E[(∂ℓ/∂y_o)²]

where ℓ is the summed loss of a sequence whose labels are drawn from the model itself (the true Fisher
information, not the empirical one), and E the mean over positions. An embedding is a linear layer whose input
is one-hot: H [V] are the frequencies of its entries, G [D] belongs to its columns. Activations of 8 bits are off by
a noise of mean square e in each input, which adds ½ Σ_o Σ_k G_o e w²_ok.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from memfit.packed.fake import is_fake
from memfit.packed.forms import Form, LowRank, Shared
from memfit.packed.scheme import Scheme
from memfit.plan.groups import Group
from memfit.technique.low_rank import right_factors
from memfit.technique.made import Made
from memfit.technique.making import make, weight_of
from memfit.technique.quantize import Quantized
from memfit.technique.smooth import activation_noise
from memfit.technique.spectrum import blocks_of, errors_by_rank

SAMPLE_WEIGHTS: Final = 2**21
"""Most weights of one tensor that are quantised to price a scheme, however many rows were asked for."""

RIGHT_ROWS: Final = 2**14
"""Most rows of a tall tensor that its right factors are found from to price them."""

KL_OF_RELATIVE_ERROR: Final = 5.0
"""Nats for each unit of Σ(w − ŵ)²/Σw² over a whole model, where there is no text to ask.

q4_K_M of Llama-3-8B, 4.9 bits, has a relative error of about 0.005 and a published divergence of 0.028.
"""
ENDS: Final = 2.0
"""The first and last eighth of the layers cost this much more: llama.cpp's mixes give them more bits."""
HEAD: Final = 2.0
"""The head costs more: llama.cpp keeps `output` two bits above the blocks."""
LOOKUP: Final = 0.5
"""An embedding that is only looked up costs less: of its error a token meets one row."""
ACTIVE_EXPERTS: Final = 4
"""Experts that count toward a model's size: published models run 2 to 8 of them for a token."""

Statistics = Mapping[str, tuple[Tensor, Tensor]]
"""Module name (experts: that of the parameter) to (H, G): float32 [K] and [N]; embeddings [V] and [D].
Experts may have one for all, or [E, K] and [E, N]."""
Prices = dict[tuple[str, Form], float]


@dataclass(frozen=True)
class Weighting:
    """What errors of a weight [N, K] count: Σ_terms Σ_o Σ_k rows_o · columns_k (w − ŵ)²_ok."""

    terms: tuple[tuple[Tensor, Tensor], ...]
    """(rows [N], columns [K]); columns [N, K]-expandable [E, K] for experts, E dividing N."""
    table: bool = False
    """Whether it is of a table, each of whose rows is looked up by itself."""

    def importance(self) -> Tensor:
        """What one row's search should minimise, [K]: the columns' weights as the mean row sees them."""
        return sum_of([rows.mean() * (c if c.dim() == 1 else c.mean(dim=0)) for rows, c in self.terms])

    def rows(self) -> Tensor:
        """What errors of each row count for the mean column, [N]."""
        return sum_of([rows * columns.mean() for rows, columns in self.terms])

    def rows_in_common(self) -> Tensor | None:
        """The same where what all rows have in common is made for it, None where it is made for all alike.

        A layer's inputs are taken as independent here, and what is made for some of its outputs then loses more, not
        less: of the demo model's layers, factors of 80 % of the bytes 0.42 in place of 0.28 nats.
        """
        return self.rows() if self.table else None


def sum_of(tensors: Sequence[Tensor]) -> Tensor:
    """Their sum, in order."""
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total += tensor
    return total


def prices(
    groups: Sequence[Group],
    candidates: Mapping[str, Sequence[Form]],
    read_weight: Callable[[str], Tensor],
    statistics: Statistics | None = None,
    *,
    rows: int = 1024,
) -> Prices:
    """The price of each candidate scheme of each group, by (group name, scheme).

    At most `rows` rows of each tensor are quantised, taken at even steps of their accumulated weight G, so
    that the estimate is unbiased and the heaviest rows are in it. Without statistics: the relative error,
    Σ(w − ŵ)²/Σw², times the tensor's share of the model (see `shares`) times `KL_OF_RELATIVE_ERROR`.

    Args:
        candidates: group name to schemes.
        read_weight: parameter name, as in `Group.parameters`, to the tensor; each is read once.
    """
    found: Prices = {}
    share = shares(groups)
    for group in groups:
        schemes = candidates.get(group.name, ())
        if not schemes:
            continue
        totals = dict.fromkeys(schemes, 0.0)
        for parameter, shape in zip(group.parameters, group.shapes, strict=True):
            weighting = weighting_of(group, parameter, statistics)
            part = share[group.name] * math.prod(shape) / group.weights
            weight = read_weight(parameter).detach()
            rights = _right_factors(weight, weighting, [form for form in schemes if isinstance(form, LowRank)])
            sample = _sample(weight, weighting, rows=rows)
            del weight
            for scheme in schemes:
                if not isinstance(scheme, Shared):
                    right = rights[scheme] if isinstance(scheme, LowRank) else None
                    totals[scheme] += sample.price(scheme, share=part, right=right)
            del sample, rights
        _add_shared(totals, group, read_weight, statistics, share[group.name])
        found |= {(group.name, scheme): price for scheme, price in totals.items()}
    return found


def prices_without_weights(groups: Sequence[Group], candidates: Mapping[str, Sequence[Form]]) -> Prices:
    """As `prices` without statistics, with normal weights for those that are not there.

    The relative error of a scheme on normal weights falls by about 4 with each bit; it is found by quantising
    a few of them, so that searched scales and group sizes tell.
    """
    share = shares(groups)
    errors: dict[tuple[Form, int], float] = {}
    found: Prices = {}
    for group in groups:
        for scheme in candidates.get(group.name, ()):
            price = 0.0
            for shape in group.shapes:
                # Beyond 1024 inputs only a scale for the whole row still depends on their number, and slowly.
                group_ = scheme.group if isinstance(scheme, Scheme) else None
                key = (scheme, min(shape[-1], 1024) if group_ is None else group_)
                if key not in errors:
                    errors[key] = _relative_error_of_normal(*key)
                part = share[group.name] * math.prod(shape) / group.weights
                price += KL_OF_RELATIVE_ERROR * part * (errors[key] + _relative_noise(scheme, shape[-1]))
            found[group.name, scheme] = price
    return found


def shares(groups: Sequence[Group]) -> dict[str, float]:
    """Each group's share of what rounding the whole model would cost, where only shapes are known; sums to 1.

    Shares go by weights, with `ENDS`, `HEAD`, `LOOKUP` and `ACTIVE_EXPERTS` applied. Numbers in the
    names count the layers.
    """
    last = max((n for group in groups if (n := _layer(group)) is not None), default=0)
    sizes = {}
    for group in groups:
        size = float(group.weights)
        if group.kind == "experts":
            experts = group.shapes[0][0]
            size *= min(experts, ACTIVE_EXPERTS) / experts
        layer = _layer(group)
        if layer is not None:
            size *= ENDS if layer < (last + 1) / 8 or layer >= (last + 1) * 7 / 8 else 1.0
        elif group.kind == "linear" or len(group.members) > 1:
            size *= HEAD
        else:
            size *= LOOKUP
        sizes[group.name] = size
    total = math.fsum(sizes.values())
    return {name: size / total for name, size in sizes.items()}


def _layer(group: Group) -> int | None:
    """The first number in the group's name, which counts the layers."""
    return next((int(part) for part in group.members[0].split(".") if part.isdigit()), None)


@dataclass(frozen=True)
class _Sample:
    """Rows of one tensor, and how their errors add up to a price."""

    weight: Tensor
    """[n, K]"""
    terms: tuple[tuple[Tensor, Tensor], ...]
    """(weights of the rows [n], of the inputs [K] or [n, K]); none without statistics."""
    importance: Tensor | None
    norm: float
    """Σ w² of the rows."""

    def price(self, scheme: Form, *, share: float, right: Tensor | None = None) -> float:
        """right: of factors, what all rows of the tensor have in common."""
        squares = _squares(self.weight, make(self.weight, scheme, importance_K=self.importance, shared=right))
        if not self.terms:
            error = _number(squares.sum()) / max(self.norm, 1e-30) + _relative_noise(scheme, self.weight.shape[-1])
            return KL_OF_RELATIVE_ERROR * share * error
        price = 0.5 * math.fsum(
            _number(((squares * columns).sum(dim=1) * rows).sum()) for rows, columns in self.terms
        )
        if scheme.activations == 16:
            return price
        del squares
        size = self.weight.to(torch.float32, copy=True).square_().sum(dim=1)
        noise = [_number((size * rows).sum() * activation_noise(columns)) for rows, columns in self.terms]
        return price + 0.5 * math.fsum(noise)


@dataclass(frozen=True)
class _Spectrum:
    """What is lost of one tensor at every rank."""

    errors: Tensor
    """[min(N, K) + 1], weighed with the statistics, if there are any."""
    weighed: bool

    def price(self, form: Shared, *, share: float) -> float:
        error = _number(self.errors[form.rank])
        if self.weighed:
            return 0.5 * error
        return KL_OF_RELATIVE_ERROR * share * error / max(_number(self.errors[0]), 1e-30)


def _spectrum(weight: Tensor, weighting: Weighting | None) -> _Spectrum:
    """Of a weight [N, K]."""
    if weighting is None:
        return _Spectrum(errors_by_rank(weight), weighed=False)
    errors = [errors_by_rank(weight, importance_K=columns, rows_N=rows) for rows, columns in weighting.terms]
    return _Spectrum(sum_of(errors), weighed=True)


def _right_factors(
    weight: Tensor, weighting: Weighting | None, forms: Sequence[LowRank]
) -> dict[LowRank, Tensor]:
    """By form, the right factor [r, K] of a weight [N, K], as `compress` makes it, but of at most `RIGHT_ROWS` rows."""
    importance, rows = (None, None) if weighting is None else (weighting.importance(), weighting.rows_in_common())
    if forms and weight.shape[0] > RIGHT_ROWS:
        picked, stands_for = systematic(torch.ones(weight.shape[0]) if rows is None else rows, RIGHT_ROWS)
        weight = weight.index_select(0, picked)
        rows = stands_for if rows is None else rows[picked] * stands_for
    found: dict[LowRank, Tensor] = {}
    for base in dict.fromkeys(form.base for form in forms):
        alike = [form for form in forms if form.base == base]
        found.update(right_factors(blocks_of(weight), alike, importance_K=importance, rows_N=rows))
    return found


def _add_shared(
    totals: dict[Form, float], group: Group, read_weight: Callable[[str], Tensor], statistics: Statistics | None,
    share: float,
) -> None:  # fmt: skip
    """Add the prices of what is shared, each of which is of all the group's tensors."""
    forms = [form for form in totals if isinstance(form, Shared)]
    for owner in dict.fromkeys(form.owner for form in forms):
        weights = [read_weight(parameter).detach() for parameter in group.parameters]
        terms = [weighting_of(group, parameter, statistics) for parameter in group.parameters]
        if owner != group.members[0]:
            off = weights[0].float().sub_(read_weight(f"{owner}.weight").detach())
            spectrum = _spectrum(off, terms[0])
        else:
            spectrum = _spectrum(torch.cat(weights), _stacked([w for w in terms if w is not None]))
        for form in forms:
            if form.owner == owner:
                totals[form] += spectrum.price(form, share=share)
        del weights


def _stacked(weightings: Sequence[Weighting]) -> Weighting | None:
    """Of tensors that read one input, one below the other: one H, and G of each output; None of none."""
    if not weightings:
        return None
    rows = torch.cat([weighting.terms[0][0] for weighting in weightings])
    return Weighting(((rows, weightings[0].terms[0][1]),))


def _relative_noise(scheme: Form, inputs: int) -> float:
    """What rounding activations adds to the relative error of a product, where nothing is known of them."""
    return 0.0 if scheme.activations == 16 else _number(activation_noise(torch.ones(inputs)))


def _squares(weight: Tensor, made: Quantized | Made) -> Tensor:
    """(w − ŵ)² in float32, [n, K]."""
    return weight.to(torch.float32, copy=True).sub_(weight_of(made)).square_()


def _sample(weight: Tensor, weighting: Weighting | None, *, rows: int) -> _Sample:
    """At most `rows` rows of a weight [..., N, K]."""
    flat = weight.reshape(-1, weight.shape[-1])
    count, inputs = flat.shape
    wanted = max(1, min(rows, count, SAMPLE_WEIGHTS // inputs))
    if weighting is None:
        picked = torch.div(torch.arange(wanted) * count, wanted, rounding_mode="floor")
        chosen = flat.index_select(0, picked)
        return _Sample(chosen, (), None, _number(chosen.to(torch.float32, copy=True).square_().sum()))
    p = sum_of([rows_ / rows_.sum().clamp_(min=1e-30) for rows_, _ in weighting.terms])
    picked, stands_for = systematic(p, wanted)
    terms = []
    for rows_, columns in weighting.terms:
        if columns.dim() == 2:
            columns = columns[torch.div(picked, count // columns.shape[0], rounding_mode="floor")]
        terms.append((rows_[picked] * stands_for, columns))
    return _Sample(flat.index_select(0, picked), tuple(terms), weighting.importance(), 0.0)


def systematic(weights_N: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
    """`wanted` rows in proportion to their weight, and how many rows each stands for: a sum over them is unbiased. One
    that is heavy is picked more than once."""
    p = weights_N.to(torch.float64)
    p = p + p.sum().clamp_(min=1e-30) * (1e-3 / p.shape[0])
    marks = (torch.arange(wanted, dtype=torch.float64) + 0.5) * (p.sum() / wanted)
    picked = torch.searchsorted(p.cumsum(0), marks).clamp_(max=p.shape[0] - 1)
    return picked, (p.sum() / wanted / p[picked]).to(torch.float32)


def weighting_of(group: Group, parameter: str, statistics: Statistics | None) -> Weighting | None:
    """What errors of one of the group's tensors count; None without statistics.

    What is priced is what is made: `prices` makes all with the same.

    Raises:
        KeyError: statistics are given, but none for this tensor.
    """
    if statistics is None:
        return None
    shape = group.shapes[group.parameters.index(parameter)]
    if group.kind == "experts":
        h, g = _of(statistics, parameter, group)
        rows = g.to(torch.float32).expand(shape[0], shape[1]).reshape(-1)
        return Weighting(((rows, h.to(torch.float32)),))
    owner = parameter.rpartition(".")[0]
    tied = group.kind == "embedding" and len(group.parameters) == 1
    terms = []
    for member in group.members if tied else (owner,):
        h, g = (t.to(torch.float32) for t in _of(statistics, member, group))
        if tuple(h.shape) == (shape[1],) and tuple(g.shape) == (shape[0],):
            terms.append((g, h))
        elif tuple(h.shape) == (shape[0],) and tuple(g.shape) == (shape[1],) and group.kind == "embedding":
            terms.append((h, g))
        else:
            found = f"H {list(h.shape)}, G {list(g.shape)}"
            raise ValueError(f"{member}: statistics {found} do not fit the weight {list(shape)}")
    return Weighting(tuple(terms), table=group.kind == "embedding")


def _of(statistics: Statistics, name: str, group: Group) -> tuple[Tensor, Tensor]:
    if name not in statistics:
        raise KeyError(f"no statistics of {name}, of the group {group.name}")
    return statistics[name]


def _relative_error_of_normal(scheme: Form, inputs: int) -> float:
    """Σ(w − ŵ)²/Σw² of normal weights."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(max(8, 2**15 // inputs), inputs, generator=generator)
    error = _squares(weight, make(weight, scheme)).sum() / weight.square().sum()
    return _number(error)


def _number(tensor: Tensor) -> float:
    """The value; 0 of a fake one, so that pricing can be followed without weights."""
    return 0.0 if is_fake(tensor) else float(tensor)

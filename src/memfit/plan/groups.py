"""Which tensors of a model can be quantised, which of them must share a choice, and why the others stay."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal

from torch import nn

from memfit.packed.experts import WEIGHTS as EXPERTS_WEIGHTS
from memfit.packed.forms import Form, Narrow, Shared, is_value, of_member
from memfit.packed.modules import is_experts, why_not_packed
from memfit.packed.scheme import BITS, BITS_OF, GROUPS, MX_GROUP, VECTORS, Scheme, Values, vector_for

FUSED: Final = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
    ("wi_0", "wi_1"),
    ("w1", "w3"),
)
"""Linear layers of one parent that runtimes multiply as one matrix: vLLM refuses to give them two schemes."""

ROUTERS: Final = ("gate", "router", "shared_expert_gate")
"""Layers beside `experts` that choose among them: tiny, and a changed choice costs more than any rounding."""

SMALLEST_EMBEDDING: Final = 64 * 1024
"""Weights from which on an embedding is worth packing."""

GROUPS_OF_BITS: Final[dict[int, tuple[int | None, ...]]] = {
    8: (None,),
    7: (None,),
    6: (128,),
    5: (128,),
    4: (128, 64),
    3: (128, 64),
    2: (64, 32),
}
"""Group sizes worth asking about, by bits: the fewer bits, the more scales pay."""

GROUPS_OF_VALUES: Final[dict[str, tuple[int | None, ...]]] = {
    "nf4": (64,), "fp8": (None,), "mxfp4": (MX_GROUP,), "codebook": (None,),
}  # fmt: skip
"""The same of values that are no integers, whatever their bits."""

Kind = Literal["linear", "embedding", "experts"]
_EXPERT: Final = re.compile(r"(?<=experts\.)\d+(?=\.)")


@dataclass(frozen=True, kw_only=True)
class Group:
    """Tensors that share one choice."""

    name: str
    kind: Kind
    members: tuple[str, ...]
    """Names of the modules, in the order of the model."""
    parameters: tuple[str, ...]
    """Names of the weights, tied ones once."""
    shapes: tuple[tuple[int, ...], ...]
    """Of `parameters`: [N, K], experts [E, N, K]."""
    blocked: str | None = None
    """Why no scheme at all can store the group; None if one can."""

    @property
    def weights(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    def nbytes(self, scheme: Form | None) -> int:
        """Stored bytes in `scheme`; None: 2 bytes a weight."""
        if scheme is None:
            return 2 * self.weights
        forms = zip(self.forms(scheme), self.shapes, strict=True)
        return sum(2 * math.prod(shape) if form is None else form.nbytes(shape) for form, shape in forms)

    def forms(self, scheme: Form) -> tuple[Form | None, ...]:
        """The form of each of `parameters` where all share a choice: of a common basis the first owns it, of narrower
        values the others have the integers, or stay as they are (None)."""
        if not isinstance(scheme, Shared | Narrow):
            return (scheme,) * len(self.parameters)
        return tuple(of_member(scheme, member, n, ()) for n, member in enumerate(self.members))

    def why_not(self, scheme: Form) -> str | None:
        """Why the group cannot be stored in `scheme`; None if it can."""
        if self.blocked is not None:
            return self.blocked
        if isinstance(scheme, Shared | Narrow) and len(self.members) != len(self.parameters):
            return f"{' and '.join(self.members)} are one tensor already"
        if isinstance(scheme, Narrow) and scheme.side == "out" and not any(map(is_value, self.members)):
            return f"{' and '.join(self.members)} are no values of an attention"
        forms = zip(self.forms(scheme), self.shapes, strict=True)
        reasons = (None if form is None else form.why_not(shape) for form, shape in forms)
        return next((reason for reason in reasons if reason is not None), None)


def find_groups(model: nn.Module) -> tuple[Group, ...]:
    """Every linear layer, every embedding of some size and all fused experts of `model`, on any device.

    Groups that nothing can store are there too, with the reason in `blocked`.
    """
    modules = {
        name: module for name, module in model.named_modules() if _is_wanted(model, name, module) is None
    }
    keys = _fused_keys(modules)
    # Tied weights go where the first of them went: embedding and head are one group.
    first: dict[int, str] = {}
    for name, module in modules.items():
        if isinstance(module, nn.Linear | nn.Embedding):
            keys[name] = keys[first.setdefault(id(module.weight), name)]
    gathered: dict[str, list[str]] = {}
    for name in modules:
        gathered.setdefault(keys[name], []).append(name)
    return tuple(_group(modules, tuple(members)) for members in gathered.values())


def candidates(
    group: Group,
    *,
    bits: tuple[int, ...] = BITS,
    groups: Mapping[int, tuple[int | None, ...]] | None = None,
    symmetric: bool = True,
    values: tuple[Values, ...] = ("int",),
    activations: int = 16,
    vector: int = VECTORS[-1],
) -> tuple[Scheme, ...]:
    """The schemes worth trying for `group`, most bits first of each kind of values; none if it is blocked.

    `bits` are those of integers and codebooks; the other values have their own. `groups`: sizes by bits, default:
    `GROUPS_OF_BITS`, of values that are no integers `GROUPS_OF_VALUES`. `vector`: most weights of a codebook's level.
    Where the inputs are no multiple of any of a width's group sizes, the largest group that fits stands in. With
    `activations` of 8, a linear layer of integers of 8 bits is multiplied in integers. Tables, heads tied to them and
    fused experts are not.
    """
    found: list[Scheme] = []
    integers = Scheme(bits=8, group=None, activations=8)
    multiplied = activations == 8 and group.kind == "linear" and group.why_not(integers) is None
    for kind in values:
        for b in (BITS_OF[kind],) if kind in BITS_OF else bits:
            if multiplied and (kind, b) == ("int", 8):
                found.append(integers)
                continue
            usual = GROUPS_OF_VALUES.get(kind) or GROUPS_OF_BITS.get(b, (128,))
            sizes = usual if groups is None else groups.get(b, usual)
            beside = vector_for(kind, b, vector)
            made = partial(Scheme, bits=b, symmetric=symmetric or kind != "int", values=kind, vector=beside)
            fitting = [scheme for size in sizes if group.why_not(scheme := made(group=size)) is None]
            if not fitting and kind != "mxfp4":
                fitting = [scheme for size in GROUPS if group.why_not(scheme := made(group=size)) is None][:1]
            found += fitting
    return tuple(found)


def left_out(model: nn.Module) -> dict[str, str]:
    """Each parameter of `model` that stays as it is, and why."""
    packed, blocked = set(), {}
    for group in find_groups(model):
        for member in group.members:
            weights = (f"{member}.{w}" for w in (EXPERTS_WEIGHTS if group.kind == "experts" else ("weight",)))
            for weight in weights:
                if group.blocked is None:
                    packed.add(weight)
                else:
                    blocked[weight] = group.blocked
    reasons = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in packed:
            continue
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if name in blocked:
            reasons[name] = blocked[name]
        elif parameter.ndim < 2:
            reasons[name] = "a vector: too small to matter"
        elif leaf == "weight" and (reason := _is_wanted(model, owner, module)):
            reasons[name] = reason
        else:
            reasons[name] = f"{type(module).__name__} {list(parameter.shape)} has no packed form"
    return reasons


def _is_wanted(model: nn.Module, name: str, module: nn.Module) -> str | None:
    """Why `module` is no candidate at all; None if it is one."""
    if is_experts(module):
        return None
    if isinstance(module, nn.Embedding):
        count = module.weight.numel()
        tied = any(
            isinstance(other, nn.Linear) and other.weight is module.weight for other in model.modules()
        )
        if count < SMALLEST_EMBEDDING and not tied:
            return f"an embedding of {count} weights, under {SMALLEST_EMBEDDING}: too small to matter"
        return None
    if isinstance(module, nn.Linear):
        parent, _, leaf = name.rpartition(".")
        if leaf in ROUTERS and hasattr(model.get_submodule(parent), "experts"):
            return "it chooses among experts: a changed choice costs more than its bytes"
        return None
    return f"{type(module).__name__} has no packed form"


def _fused_keys(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Module name to the name of its group; experts that are single modules share one within a layer."""
    keys = {}
    inputs: dict[str, int] = {}
    for name, module in modules.items():
        parent, _, leaf = _EXPERT.sub("*", name).rpartition(".")
        key = f"{parent}.{leaf}"
        for leaves in FUSED:
            if isinstance(module, nn.Linear) and leaf in leaves:
                fused = f"{parent}.{'+'.join(leaves)}"
                # Different inputs (a cross attention with another width) cannot be one matrix.
                if inputs.setdefault(fused, module.in_features) == module.in_features:
                    key = fused
        keys[name] = key
    return keys


def _group(modules: Mapping[str, nn.Module], members: tuple[str, ...]) -> Group:
    """The group of `members`; its name is the first's, and the last parts of the others'."""
    first = modules[members[0]]
    parent = members[0].rpartition(".")[0]
    others = [name.removeprefix(f"{parent}.") if parent else name for name in members[1:]]
    name = "+".join([members[0], *others]) if len(others) < 4 else f"{members[0]}+{len(others)}"
    parameters: dict[int, tuple[str, tuple[int, ...]]] = {}
    for member in members:
        for weight in EXPERTS_WEIGHTS if is_experts(modules[member]) else ("weight",):
            parameter = modules[member].get_parameter(weight)
            parameters.setdefault(id(parameter), (f"{member}.{weight}", tuple(parameter.shape)))
    kind: Kind = "experts" if is_experts(first) else "linear"
    if any(isinstance(modules[member], nn.Embedding) for member in members):
        kind = "embedding"
    # One scale a row asks least of a shape.
    least = Scheme(bits=8, group=None)
    reasons = (why_not_packed(modules[member], member, least) for member in members)
    return Group(
        name=name,
        kind=kind,
        members=members,
        parameters=tuple(name for name, _ in parameters.values()),
        shapes=tuple(shape for _, shape in parameters.values()),
        blocked=next((reason for reason in reasons if reason is not None), None),
    )

"""Every way to store a weight: integers and levels (`Scheme`), what pruning left (`Sparse`), factors (`LowRank`), what
it has of another's (`Shared`), all of it, for others to have a part in (`Whole`), fewer dimensions a head (`Narrow`).

N outputs, K inputs of a weight, r rank. What is no `Scheme` is in no standard format: memfit alone reads it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Final, Literal, get_args

import torch

from memfit.packed.scheme import Scheme

Pattern = Literal["any", "2:4", "blocks"]
"""Which weights of a row may stay: any of them, two of each four, or whole blocks of `BLOCK`."""
BLOCK: Final = (16, 16)
"""Outputs and inputs of a block that is kept or pruned whole."""

Common = Literal["right", "left", "weight"]
"""What two modules have in common."""
Side = Literal["out", "in"]
"""Whether heads are a weight's outputs or its inputs."""

Part = tuple[torch.dtype, tuple[int, ...]]
"""Type and shape of a stored tensor."""


@dataclass(frozen=True, kw_only=True, order=True)
class Sparse:
    """What pruning leaves of a weight: as many values in each row (of blocks: in each band), and where they are.

    Equal rows make every size a matter of shapes, so that it is known before a weight is read.
    """

    activations: ClassVar[int] = 16

    pattern: Pattern = "any"
    sparsity: float = 0.5
    """Share of the weights that are gone."""

    def __post_init__(self) -> None:
        if self.pattern not in get_args(Pattern):
            raise ValueError(f"pattern must be one of {', '.join(get_args(Pattern))}, got {self.pattern!r}")
        if not isinstance(self.sparsity, int | float) or not 0.0 <= self.sparsity < 1.0:
            raise ValueError(f"sparsity must be 0 or more and less than 1, got {self.sparsity!r}")
        if self.pattern == "2:4" and self.sparsity != 0.5:
            raise ValueError(f"of 2:4 exactly half is gone, got a sparsity of {self.sparsity}: give 0.5, or none")

    @property
    def name(self) -> str:
        """As in plans and tables: `sparse 50%`, `sparse 2:4`, `sparse 50% blocks`."""
        share = f"{100 * self.sparsity:g}%"
        if self.pattern == "2:4":
            return "sparse 2:4"
        return f"sparse {share}" + (" blocks" if self.pattern == "blocks" else "")

    @property
    def bits(self) -> int:
        """Of one value that is kept."""
        return 16

    @property
    def places(self) -> float:
        """What saying where the values lie takes, at the most, as a share of the weight's bytes in 16 bits: a bit for
        each weight, or an index for each block."""
        return 1 / (BLOCK[0] * BLOCK[1]) if self.pattern == "blocks" else 1 / 16

    def kept(self, in_features: int) -> int:
        """Values (of blocks: blocks) that stay in a row with `in_features` inputs."""
        count = in_features // BLOCK[1] if self.pattern == "blocks" else in_features
        return count - round(self.sparsity * count)

    def why_not(self, shape: tuple[int, ...]) -> str | None:
        """Why a weight of this shape [N, K] cannot be stored so; None if it can."""
        if len(shape) != 2:
            return "fused experts have no sparse form"
        rows, inputs = shape
        if self.pattern == "blocks" and (rows % BLOCK[0] or inputs % BLOCK[1]):
            return f"{rows} x {inputs} is not made of blocks of {BLOCK[0]} x {BLOCK[1]}"
        if inputs % 8:
            return f"{inputs} inputs are not a multiple of 8, so rows of the mask would not end on a byte"
        if not self.kept(inputs):
            return f"of {inputs} inputs a sparsity of {self.sparsity:g} keeps none"
        return None

    def parts(self, shape: tuple[int, ...]) -> dict[str, Part]:
        """What is stored of a weight [N, K], in file order; `weight_kept` bf16 [N, k], each row's values, comes first.

        any     in their order; `weight_mask` uint8 [N, K/8], the first input in the lowest bit
        2:4     the first of each four, then the second of each; `weight_mask` uint8 [N, K/8]: of byte j the lower half
                for four inputs from 4j on, the upper half for those from 4j + K/2 on
        blocks  block by block; `weight_index` int16 [N/16, k/16], which blocks of a band of 16 rows, rising
        """
        rows, inputs = shape
        kept = self.kept(inputs)
        if self.pattern == "blocks":
            return {
                "weight_kept": (torch.bfloat16, (rows, kept * BLOCK[1])),
                "weight_index": (torch.int16, (rows // BLOCK[0], kept)),
            }
        return {"weight_kept": (torch.bfloat16, (rows, kept)), "weight_mask": (torch.uint8, (rows, inputs // 8))}

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of all parts of a weight [N, K]."""
        return _nbytes(self.parts(shape))

    def to_json(self) -> dict[str, Any]:
        return {"form": "sparse", "pattern": self.pattern, "sparsity": self.sparsity}


@dataclass(frozen=True, kw_only=True, order=True)
class Whole:
    """A weight in bf16, as it is: other modules may have a part in it."""

    activations: ClassVar[int] = 16

    @property
    def name(self) -> str:
        """As in plans and tables."""
        return "bf16, shared"

    @property
    def bits(self) -> int:
        return 16

    def why_not(self, shape: tuple[int, ...]) -> str | None:
        """Why a weight of this shape [N, K] cannot be stored so; None if it can."""
        return None if len(shape) == 2 else "fused experts cannot be shared"

    def parts(self, shape: tuple[int, ...]) -> dict[str, Part]:
        """What is stored of a weight [N, K]: `weight_whole` bf16 [N, K]."""
        return {"weight_whole": (torch.bfloat16, (shape[0], shape[1]))}

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of all parts of a weight [N, K]."""
        return _nbytes(self.parts(shape))

    def to_json(self) -> dict[str, Any]:
        return {"form": "whole"}


@dataclass(frozen=True, kw_only=True, order=True)
class LowRank:
    """A weight as a product of two narrow ones: ŵ = A B, A bf16 [N, r], B bf16 [r, K]; with `base`, what rounding to it
    lost is made up for so: ŵ = Q(w) + A B."""

    activations: ClassVar[int] = 16

    rank: int
    base: Scheme | Whole | None = None
    """`Whole`: a weight that other modules have a part in, and what this one differs from it by."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if isinstance(self.base, Scheme) and (self.base.activations != 16 or self.base.values != "int"):
            raise ValueError(f"factors go beside integers whose activations stay as they are, not {self.base.name}")

    @property
    def name(self) -> str:
        """As in plans and tables: `rank 64`, `int3 g128 + rank 16`."""
        return f"rank {self.rank}" if self.base is None else f"{self.base.name} + rank {self.rank}"

    @property
    def bits(self) -> int:
        return 16 if self.base is None else self.base.bits

    def why_not(self, shape: tuple[int, ...]) -> str | None:
        """Why a weight of this shape [N, K] cannot be stored so; None if it can."""
        if (reason := _why_no_factors(shape, self.rank)) is not None:
            return reason
        return None if self.base is None else self.base.why_not(shape)

    def parts(self, shape: tuple[int, ...]) -> dict[str, Part]:
        """What is stored of the factors: `weight_left` bf16 [N, r], `weight_right` bf16 [r, K]; a base has its own."""
        return _factors(shape, self.rank)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of all parts of a weight [N, K]."""
        return _nbytes(self.parts(shape)) + (0 if self.base is None else self.base.nbytes(shape))

    def to_json(self) -> dict[str, Any]:
        return {"form": "low-rank", "rank": self.rank, "base": None if self.base is None else self.base.to_json()}


@dataclass(frozen=True, kw_only=True, order=True)
class Shared:
    """A weight that has something of another module's, its owner's, where alone that is stored.

        right     ŵ = A B′       the owner's right factor: a basis of what comes in
        left      ŵ = A′ B       the owner's left factor: a basis of what goes out
        weight    ŵ = ŵ′ + A B   all that the owner has, or, where it is `LowRank`, its base; of rank 0 nothing else
    """

    activations: ClassVar[int] = 16

    owner: str
    """Name of the module; it shares nothing itself."""
    common: Common
    rank: int

    def __post_init__(self) -> None:
        if self.common not in get_args(Common):
            raise ValueError(f"common must be one of {', '.join(get_args(Common))}, got {self.common!r}")
        if self.rank < (0 if self.common == "weight" else 1):
            least = "0" if self.common == "weight" else "1"
            raise ValueError(f"rank must be at least {least} where the {self.common} is common, got {self.rank}")
        if not self.owner:
            raise ValueError("owner must be the name of a module")

    @property
    def name(self) -> str:
        """As in plans and tables: `rank 64, right of model.layers.0.mlp.up_proj`."""
        if self.common == "weight":
            return f"as {self.owner}" + (f" + rank {self.rank}" if self.rank else "")
        return f"rank {self.rank}, {self.common} of {self.owner}"

    @property
    def bits(self) -> int:
        return 16

    def why_not(self, shape: tuple[int, ...]) -> str | None:
        """Why a weight of this shape [N, K] cannot be stored so, whatever its owner is; None if it can."""
        return _why_no_factors(shape, self.rank)

    def why_not_with(self, shape: tuple[int, ...], owner: "Form | None", owner_shape: tuple[int, ...]) -> str | None:
        """Why it cannot have this of its owner, stored in the form `owner` (None: in none); None if it can."""
        if owner is None:
            return f"{self.owner} is stored in no form, so that nothing of it can be shared"
        if isinstance(owner, Shared):
            return f"{self.owner} has a part of {owner.owner} itself"
        if self.common == "weight":
            if owner.activations != 16:
                return f"{self.owner} is {owner.name}, which is multiplied in integers"
            return None if shape == owner_shape else f"{self.owner} is {list(owner_shape)}, not {list(shape)}"
        if not isinstance(owner, LowRank) or owner.rank != self.rank:
            return f"{self.owner} is {owner.name}, and has no factors of rank {self.rank}"
        side = 1 if self.common == "right" else 0
        if shape[side] != owner_shape[side]:
            return f"{self.owner} is {list(owner_shape)}, and its {self.common} factor does not fit {list(shape)}"
        return None

    def parts(self, shape: tuple[int, ...]) -> dict[str, Part]:
        """What is stored beside what the owner has, as of `LowRank`; nothing of a common weight and rank 0."""
        theirs = f"weight_{self.common}"
        found = _factors(shape, self.rank) if self.rank else {}
        return {part: size for part, size in found.items() if part != theirs}

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of all parts of a weight [N, K], without what the owner has."""
        return _nbytes(self.parts(shape))

    def to_json(self) -> dict[str, Any]:
        return {"form": "shared", "owner": self.owner, "common": self.common, "rank": self.rank}


@dataclass(frozen=True, kw_only=True, order=True)
class Narrow:
    """A weight whose outputs, or inputs, are those of heads, of which only the first dimensions are computed: the rest
    are 0, or not read. What attention does between values and its output it does to each dimension alike, so that both
    can be made of fewer, in a basis of their own."""

    activations: ClassVar[int] = 16

    heads: int
    kept: int
    """Dimensions of each head."""
    side: Side
    base: Scheme | None = None
    """How the narrow weight is stored; None: in bf16."""

    def __post_init__(self) -> None:
        if self.heads < 1 or self.kept < 1:
            raise ValueError(f"heads and kept must be at least 1, got {self.heads} and {self.kept}")
        if self.side not in get_args(Side):
            raise ValueError(f"side must be one of {', '.join(get_args(Side))}, got {self.side!r}")
        if self.base is not None and self.base.activations != 16:
            raise ValueError(f"a narrow weight's activations stay as they are, unlike those of {self.base.name}")

    @property
    def name(self) -> str:
        """As in plans and tables: `4 heads of 48`, `4 heads of 48, int4 g128`."""
        return f"{self.heads} heads of {self.kept}" + ("" if self.base is None else f", {self.base.name}")

    @property
    def bits(self) -> int:
        return 16 if self.base is None else self.base.bits

    def narrow(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Shape of the narrow weight that stands for one of [N, K]."""
        kept = self.heads * self.kept
        return (kept, shape[1]) if self.side == "out" else (shape[0], kept)

    def columns(self, size: int) -> torch.Tensor:
        """Which of so many outputs, or inputs, are computed, or read."""
        first = torch.arange(self.heads).mul_(size // self.heads)
        return first.unsqueeze(1).add(torch.arange(self.kept)).view(-1)

    def why_not(self, shape: tuple[int, ...]) -> str | None:
        """Why a weight of this shape [N, K] cannot be stored so; None if it can."""
        if len(shape) != 2:
            return "fused experts have no heads"
        size = shape[0] if self.side == "out" else shape[1]
        if size % self.heads or self.kept > size // self.heads:
            return f"{size} are not {self.heads} heads of {self.kept} or more"
        return None if self.base is None else self.base.why_not(self.narrow(shape))

    def parts(self, shape: tuple[int, ...]) -> dict[str, Part]:
        """What is stored of a weight [N, K]: `weight_narrow` bf16, as `narrow` tells; a base has its own."""
        return {} if self.base is not None else {"weight_narrow": (torch.bfloat16, self.narrow(shape))}

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of all parts of a weight [N, K]."""
        return _nbytes(self.parts(shape)) if self.base is None else self.base.nbytes(self.narrow(shape))

    def to_json(self) -> dict[str, Any]:
        base = None if self.base is None else self.base.to_json()
        return {"form": "narrow", "heads": self.heads, "kept": self.kept, "side": self.side, "base": base}


Own = Sparse | LowRank | Shared | Whole | Narrow
"""The forms that are no scheme."""
Form = Scheme | Sparse | LowRank | Shared | Whole | Narrow
"""How a weight is stored."""
FORM_PARTS: Final = (
    "weight_kept", "weight_mask", "weight_index", "weight_left", "weight_right", "weight_whole",
    "weight_narrow",
)  # fmt: skip
"""Last names of what is stored of forms that are no schemes."""


def basis_of(form: Form | None) -> str | None:
    """The module whose right factor a weight of this form has, if it has one's."""
    return form.owner if isinstance(form, Shared) and form.common == "right" else None


def like_of(form: Form | None) -> str | None:
    """The module whose weight one of this form has, but for a difference, if it has one's."""
    return form.owner if isinstance(form, Shared) and form.common == "weight" else None


def of_member(form: Form | None, member: str, position: int, owners: Sequence[str]) -> Form | None:
    """The form of one of several modules that share a choice: where that is `Shared` with their first, it is the owner
    of the basis; with the first of other modules, each is like the one of these at its own place. Of queries, keys and
    values that are `Narrow` the values are, and the others have its integers.

    owners: the members of the group of the form's owner.
    """
    if isinstance(form, Narrow) and form.side == "out":
        return form if is_value(member) else form.base
    if not isinstance(form, Shared):
        return form
    if member == form.owner:
        return LowRank(rank=form.rank)
    return form if form.owner not in owners or form.common != "weight" else replace(form, owner=owners[position])


def is_value(module: str) -> bool:
    """Whether a module makes the values of an attention whose heads may become narrower."""
    return module.rpartition(".")[2] == "v_proj"


def output_of(value: str) -> str:
    """The module that reads what attention makes of these values."""
    return f"{value.rpartition('.')[0]}.o_proj"


def value_of(output: str) -> str:
    """The module that makes the values of what comes to this output."""
    return f"{output.rpartition('.')[0]}.v_proj"


def techniques_of(form: Form) -> frozenset[str]:
    """What is done to a weight that is stored so: `quantize`, `prune`, `low-rank`, `share`."""
    if isinstance(form, Shared | Whole):
        return frozenset({"share"})
    if isinstance(form, Sparse):
        return frozenset({"prune"})
    if isinstance(form, LowRank | Narrow):
        return frozenset({"low-rank"} if form.base is None else {"low-rank", "quantize"})
    return frozenset({"quantize"})


def form_of(data: Mapping[str, Any]) -> Form:
    """The form of `to_json`'s object.

    Raises:
        ValueError: it is none; says which field is off.
    """
    kind = data.get("form")
    known = {"sparse": Sparse, "low-rank": LowRank, "shared": Shared, "whole": Whole, "narrow": Narrow}
    if kind is None:
        return Scheme(**data)
    if kind not in known:
        raise ValueError(f"form is {kind!r}; known: {', '.join(known)}")
    given = {key: value for key, value in data.items() if key != "form"}
    if (names := {field.name for field in fields(known[kind])}) != given.keys():
        has = f"the fields {', '.join(sorted(names))}" if names else "no fields"
        raise ValueError(f"{kind} has {has}, got {', '.join(sorted(given)) or 'none'}")
    if kind == "whole":
        return Whole()
    if kind == "sparse":
        sparsity = given["sparsity"]
        if not isinstance(sparsity, int | float) or isinstance(sparsity, bool):
            raise ValueError(f"sparsity is {sparsity!r}, not a number")
        return Sparse(pattern=given["pattern"], sparsity=float(sparsity))
    for name in ("rank", "heads", "kept"):
        if name in given and type(given[name]) is not int:
            raise ValueError(f"{name} is {given[name]!r}, not a whole number")
    if kind == "narrow":
        base = None if given["base"] is None else form_of(given["base"])
        if not isinstance(base, Scheme | None):
            raise ValueError(f"a narrow weight cannot be {base.name}")
        return Narrow(heads=given["heads"], kept=given["kept"], side=given["side"], base=base)
    if kind == "shared":
        if not isinstance(given["owner"], str):
            raise ValueError(f"owner is {given['owner']!r}, not a module's name")
        return Shared(owner=given["owner"], common=given["common"], rank=given["rank"])
    beside = None if given["base"] is None else form_of(given["base"])
    if not isinstance(beside, Scheme | Whole | None):
        raise ValueError(f"factors cannot go beside {beside.name}")
    return LowRank(rank=given["rank"], base=beside)


def _factors(shape: tuple[int, ...], rank: int) -> dict[str, Part]:
    rows, inputs = shape
    return {"weight_left": (torch.bfloat16, (rows, rank)), "weight_right": (torch.bfloat16, (rank, inputs))}


def _why_no_factors(shape: tuple[int, ...], rank: int) -> str | None:
    if len(shape) != 2:
        return "fused experts have no factors"
    most = min(shape)
    return f"a weight of {shape[0]} x {shape[1]} has no rank {rank}, at most {most}" if rank > most else None


def _nbytes(parts: Mapping[str, Part]) -> int:
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in parts.values())

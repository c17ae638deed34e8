"""Every way to store a weight: integers and levels (`Scheme`), what pruning left (`Sparse`), factors (`LowRank`).

N outputs, K inputs of a weight, r rank. What is no `Scheme` is in no standard format: memfit alone reads it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final, Literal, get_args

import torch

from memfit.packed.scheme import Scheme

Pattern = Literal["any", "2:4", "blocks"]
"""Which weights of a row may stay: any of them, two of each four, or whole blocks of `BLOCK`."""
BLOCK: Final = (16, 16)
"""Outputs and inputs of a block that is kept or pruned whole."""

Part = tuple[torch.dtype, tuple[int, ...]]
"""Type and shape of a stored tensor."""


@dataclass(frozen=True, kw_only=True, order=True)
class Sparse:
    """What pruning leaves of a weight: as many values in each row (of blocks: in each band of rows), and where they are.

    Equal rows make every size a matter of shapes, so that it is known before a weight is read.
    """

    pattern: Pattern = "any"
    sparsity: float = 0.5
    """Share of the weights that are gone."""

    def __post_init__(self) -> None:
        if self.pattern not in get_args(Pattern):
            raise ValueError(f"pattern must be one of {', '.join(get_args(Pattern))}, got {self.pattern!r}")
        if not 0.0 <= self.sparsity < 1.0:
            raise ValueError(f"sparsity must be 0 or more and less than 1, got {self.sparsity}")
        if self.pattern == "2:4" and self.sparsity != 0.5:
            raise ValueError(f"of 2:4 exactly half is gone, got a sparsity of {self.sparsity}: leave it out, or give 0.5")

    @property
    def name(self) -> str:
        """As in plans and tables: `sparse 50%`, `sparse 2:4`, `sparse 50% blocks`."""
        share = f"{100 * self.sparsity:g}%"
        return "sparse 2:4" if self.pattern == "2:4" else f"sparse {share}" + (" blocks" if self.pattern == "blocks" else "")

    @property
    def bits(self) -> int:
        """Of one value that is kept."""
        return 16

    @property
    def activations(self) -> int:
        return 16

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
        return None

    def parts(self, shape: tuple[int, ...]) -> dict[str, Part]:
        """What is stored of a weight [N, K], in file order; `weight_kept` bf16 [N, k], the values of each row, comes first.

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
class LowRank:
    """A weight as a product of two narrow ones: ŵ = A B, A bf16 [N, r], B bf16 [r, K]; with `base`, what rounding to it
    lost is made up for so: ŵ = Q(w) + A B."""

    rank: int
    base: Scheme | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if self.base is not None and (self.base.activations != 16 or self.base.values != "int"):
            raise ValueError(f"factors go beside integers whose activations stay as they are, not {self.base.name}")

    @property
    def name(self) -> str:
        """As in plans and tables: `rank 64`, `int3 g128 + rank 16`."""
        return f"rank {self.rank}" if self.base is None else f"{self.base.name} + rank {self.rank}"

    @property
    def bits(self) -> int:
        return 16 if self.base is None else self.base.bits

    @property
    def activations(self) -> int:
        return 16

    def why_not(self, shape: tuple[int, ...]) -> str | None:
        """Why a weight of this shape [N, K] cannot be stored so; None if it can."""
        if len(shape) != 2:
            return "fused experts have no factors"
        if self.rank > min(shape):
            return f"a weight of {shape[0]} x {shape[1]} has no rank {self.rank}"
        return None if self.base is None else self.base.why_not(shape)

    def parts(self, shape: tuple[int, ...]) -> dict[str, Part]:
        """What is stored of the factors: `weight_left` bf16 [N, r] and `weight_right` bf16 [r, K]; the base has its own."""
        rows, inputs = shape
        return {
            "weight_left": (torch.bfloat16, (rows, self.rank)), "weight_right": (torch.bfloat16, (self.rank, inputs)),
        }  # fmt: skip

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of all parts of a weight [N, K]."""
        return _nbytes(self.parts(shape)) + (0 if self.base is None else self.base.nbytes(shape))

    def to_json(self) -> dict[str, Any]:
        return {"form": "low-rank", "rank": self.rank, "base": None if self.base is None else self.base.to_json()}


Form = Scheme | Sparse | LowRank
"""How a weight is stored."""
FORM_PARTS: Final = ("weight_kept", "weight_mask", "weight_index", "weight_left", "weight_right")
"""Last names of what is stored of forms that are no schemes."""


def form_of(data: Mapping[str, Any]) -> Form:
    """The form of `to_json`'s object.

    Raises:
        ValueError: it is none; says which field is off.
    """
    kind = data.get("form")
    known = {"sparse": Sparse, "low-rank": LowRank}
    if kind is None:
        return Scheme(**data)
    if kind not in known:
        raise ValueError(f"form is {kind!r}; known: {', '.join(known)}")
    made = known[kind]
    given = {key: value for key, value in data.items() if key != "form"}
    if (names := {field.name for field in fields(made)}) != given.keys():
        raise ValueError(f"{kind} has the fields {', '.join(sorted(names))}, got {', '.join(sorted(given)) or 'none'}")
    if kind == "sparse":
        sparsity = given["sparsity"]
        if not isinstance(sparsity, int | float) or isinstance(sparsity, bool):
            raise ValueError(f"sparsity is {sparsity!r}, not a number")
        return Sparse(pattern=given["pattern"], sparsity=float(sparsity))
    if type(given["rank"]) is not int:
        raise ValueError(f"rank is {given['rank']!r}, not a whole number")
    return LowRank(rank=given["rank"], base=None if given["base"] is None else Scheme(**given["base"]))


def _nbytes(parts: Mapping[str, Part]) -> int:
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in parts.values())

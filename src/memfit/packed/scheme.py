"""How one weight is stored: the bits, the group that shares a scale, and whether there are zero points."""

import math
from dataclasses import dataclass
from typing import Any, Final

BITS: Final = (8, 6, 5, 4, 3, 2)
GROUPS: Final = (128, 64, 32)
INTEGER_INPUTS: Final = 65_793
"""255 · 128 times so many is below 2³¹."""


@dataclass(frozen=True, kw_only=True, order=True)
class Scheme:
    """Integers of `bits` bits, one bf16 scale for each `group` of inputs of each output row.

    A weight [N, K] is stored as q in [−2^(b−1), 2^(b−1) − 1] with ŵ = (q − z) · s; z = 0 if symmetric.
    Scales may be negative: the one level more on the negative side then serves positive weights.
    """

    bits: int
    group: int | None = 128
    """Inputs that share a scale; None: one scale for each output row."""
    symmetric: bool = True
    activations: int = 16
    """8: what the weight is multiplied with is rounded too, to 8 bits with one scale for each token, as it comes."""

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be 2 to 8, got {self.bits}")
        if self.group is not None and (self.group < 32 or self.group % 32):
            raise ValueError(f"group must be a multiple of 32, or None for one scale a row; got {self.group}")

        if self.activations not in (16, 8):
            raise ValueError(f"activations must be 16 or 8, got {self.activations}")
        if self.activations == 8 and (self.bits, self.group, self.symmetric) != (8, None, True):
            raise ValueError(
                f"activations of 8 bits go with symmetric weights of 8 bits and one scale a row, not with {self.name}"
            )

    @property
    def name(self) -> str:
        """As in plans and tables: `int4 g128`, `int8 row`, `int3 g64 asym`, `int8 row a8`."""
        group = "row" if self.group is None else f"g{self.group}"
        return f"int{self.bits} {group}" + ("" if self.symmetric else " asym") + (
            "" if self.activations == 16 else f" a{self.activations}"
        )

    def groups(self, in_features: int) -> int:
        """Scales for each row of a weight with `in_features` inputs."""
        return 1 if self.group is None else in_features // self.group

    def why_not(self, shape: tuple[int, ...]) -> str | None:
        """Why a weight of this shape [..., N, K] cannot be stored so; None if it can."""
        in_features = shape[-1]
        if in_features % 32:
            return f"{in_features} inputs are not a multiple of 32, so rows would not end on a packed word"
        if self.group is not None and in_features % self.group:
            return f"{in_features} inputs are not a multiple of the group {self.group}"
        if self.activations == 8 and len(shape) != 2:
            return "fused experts have no product of integers"
        if self.activations == 8 and in_features > INTEGER_INPUTS:
            return f"sums of {in_features} products of 8 bits may not fit into 32 bits; {INTEGER_INPUTS} do"
        return None

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of packed values, scales (bf16) and zero points of a weight [..., N, K]."""
        rows, in_features = math.prod(shape[:-1]), shape[-1]
        groups = self.groups(in_features)
        zeros = 0 if self.symmetric else math.ceil(rows * self.bits / 32) * 4 * groups
        return rows * in_features * self.bits // 8 + rows * groups * 2 + zeros

    def to_json(self) -> dict[str, Any]:
        """What `Scheme(**data)` takes; fields that earlier versions did not know are there where they say something."""
        data: dict[str, Any] = {"bits": self.bits, "group": self.group, "symmetric": self.symmetric}
        return data if self.activations == 16 else data | {"activations": self.activations}

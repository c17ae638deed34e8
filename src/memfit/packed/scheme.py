"""How one weight is stored: its bits, what they stand for, the group that shares a scale, and the zero points."""

import math
from dataclasses import dataclass
from typing import Any, Final, Literal

BITS: Final = (8, 6, 5, 4, 3, 2)
GROUPS: Final = (128, 64, 32)
INTEGER_INPUTS: Final = 65_793
"""255 · 128 times so many is below 2³¹."""
Values = Literal["int", "nf4", "fp8", "mxfp4", "codebook"]
"""What a code of `bits` bits stands for: an integer, one of the fixed levels of a format, one that was learned."""
BITS_OF: Final[dict[str, int]] = {"nf4": 4, "fp8": 8, "mxfp4": 4}
"""Bits of the formats that have but one width."""
OWN_VALUES: Final = ("nf4", "codebook")
"""What no format of compressed-tensors holds, and memfit alone reads."""
VECTORS: Final = (1, 2, 4)
CODE_BITS: Final = 8
"""Most bits of a code, whatever the weights that it stands for."""
MX_GROUP: Final = 32
"""Inputs that share a scale in the formats of the OCP Microscaling specification."""


def vector_for(values: str, bits: int, most: int) -> int:
    """The weights of a level: at most so many, as far as their code has no more than `CODE_BITS`; 1 of other values."""
    return max(v for v in VECTORS if v == 1 or (values == "codebook" and v <= most and bits * v <= CODE_BITS))


@dataclass(frozen=True, kw_only=True, order=True)
class Scheme:
    """Integers of `bits` bits, one bf16 scale for each `group` of inputs of each output row.

    A weight [N, K] is stored as q in [−2^(b−1), 2^(b−1) − 1] with ŵ = (q − z) · s; z = 0 if symmetric.
    Scales may be negative: the one level more on the negative side then serves positive weights.

    Other `values` are levels: ŵ = level[u] · s, u = q + 2^(b−1) (see `packed/levels.py`). MXFP4 has a power of two for
    a scale, in a byte; a codebook its 2^b levels, in bf16, beside the scales. With `vector` v its levels are vectors of
    v weights that lie beside each other, 2^(b·v) of them, and the u of these weights are one code, the first lowest.
    """

    bits: int
    group: int | None = 128
    """Inputs that share a scale; None: one scale for each output row."""
    symmetric: bool = True
    activations: int = 16
    """8: what the weight is multiplied with is rounded too, to 8 bits with one scale for each token, as it comes."""
    values: Values = "int"
    vector: int = 1
    """Weights that a level of a codebook stands for, of `VECTORS`."""

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be 2 to 8, got {self.bits}")
        if self.group is not None and (self.group < 32 or self.group % 32):
            raise ValueError(f"group must be a multiple of 32, or None for one scale a row; got {self.group}")
        if self.activations not in (16, 8):
            raise ValueError(f"activations must be 16 or 8, got {self.activations}")
        if self.activations == 8 and (self.bits, self.group, self.symmetric, self.values) != (8, None, True, "int"):
            raise ValueError(
                f"activations of 8 bits go with symmetric weights of 8 bits and one scale a row, not with {self.name}"
            )
        if self.vector != 1:
            self._require_vectors()
        if self.values == "int":
            return
        due = BITS_OF.get(self.values, self.bits)
        if self.bits != due:
            raise ValueError(f"{self.values} has {due} bits, got {self.bits}: leave the bits out, or give {due}")
        if not self.symmetric:
            raise ValueError(f"{self.values} has no zero points; only integers can be asymmetric")
        if self.values == "mxfp4" and self.group != MX_GROUP:
            group = "a whole row" if self.group is None else self.group
            raise ValueError(f"mxfp4 has groups of {MX_GROUP}, got {group}: give {MX_GROUP}, or take nf4")

    def _require_vectors(self) -> None:
        if self.values != "codebook":
            raise ValueError(f"only a codebook's levels can be vectors, not those of {self.values}")
        if self.vector not in VECTORS:
            raise ValueError(f"vectors have {', '.join(map(str, VECTORS))} weights, got {self.vector}")
        if self.bits * self.vector > CODE_BITS:
            raise ValueError(
                f"{self.vector} weights of {self.bits} bits are a code of {self.bits * self.vector} bits, and "
                f"{CODE_BITS} is the most"
            )

    @property
    def name(self) -> str:
        """As in plans and tables: `int4 g128`, `int3 g64 asym`, `int8 row a8`, `nf4 g64`, `codebook2x4 g128`."""
        group = "row" if self.group is None else f"g{self.group}"
        kind = self.values if self.values in BITS_OF else f"{self.values}{self.bits}"
        kind += "" if self.vector == 1 else f"x{self.vector}"
        zeros, inputs = "" if self.symmetric else " asym", "" if self.activations == 16 else f" a{self.activations}"
        return f"{kind} {group}{zeros}{inputs}"

    @property
    def codebook(self) -> tuple[int, ...]:
        """The shape of a codebook's levels: [2^b], of vectors [2^(b·v), v]."""
        return (1 << self.bits,) if self.vector == 1 else (1 << self.bits * self.vector, self.vector)

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
        """Bytes of packed values, scales, zero points and a codebook of a weight [..., N, K]."""
        rows, in_features = math.prod(shape[:-1]), shape[-1]
        groups = self.groups(in_features)
        zeros = 0 if self.symmetric else math.ceil(rows * self.bits / 32) * 4 * groups
        scales = rows * groups * (1 if self.values == "mxfp4" else 2)
        levels = 2 * math.prod(self.codebook) if self.values == "codebook" else 0
        return rows * in_features * self.bits // 8 + scales + zeros + levels

    def to_json(self) -> dict[str, Any]:
        """What `Scheme(**data)` takes; fields that earlier versions did not know are there where they say something."""
        data: dict[str, Any] = {"bits": self.bits, "group": self.group, "symmetric": self.symmetric}
        if self.activations != 16:
            data["activations"] = self.activations
        if self.vector != 1:
            data["vector"] = self.vector
        return data if self.values == "int" else data | {"values": self.values}

"""What the search may choose from."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, get_args

from torch import nn

from memfit.errors import UsageError
from memfit.packed.cache import KV_BITS
from memfit.packed.forms import Form, Sparse
from memfit.packed.scheme import BITS, BITS_OF, VECTORS, Scheme, Values

from .groups import Group, candidates
from .heads import NarrowHeads, narrow_heads, narrowings
from .other_forms import (
    HEADS,
    RANKS,
    RESIDUAL_RANKS,
    SPARSE,
    basis_candidates,
    like_candidates,
    rank_candidates,
    residual_candidates,
    sparse_candidates,
)

TECHNIQUES: Final = ("quantize", "prune", "low-rank", "share")
"""What may be done to a group of weights."""
EMBEDDINGS: Final = "embeddings"
"""In `Allowed.keep`: every table."""


def require_techniques(names: Iterable[str]) -> None:
    """Nothing, if all of them are techniques.

    Raises:
        UsageError: one is none; says which there are.
    """
    if unknown := [name for name in names if name not in TECHNIQUES]:
        more = " Narrowing goes by --blocks, --heads, --channels, --experts." if "narrow" in unknown else ""
        raise UsageError(f"{unknown[0]!r} is no technique for weights; known: {', '.join(TECHNIQUES)}.{more}")


def _require_tuple(name: str, given: Any, example: str) -> None:
    if not isinstance(given, tuple):
        raise UsageError(f"{name} of Allowed is a tuple, as {example}; got {given!r}.")


def _require_known(name: str, given: Any, known: tuple[int, ...]) -> None:
    _require_tuple(name, given, f"({known[0]},)")
    if unknown := [number for number in given if number not in known]:
        raise UsageError(f"{name} of Allowed: {unknown[0]!r} is none of {', '.join(map(str, known))}.")


@dataclass(frozen=True, kw_only=True)
class Allowed:
    """What the search may choose from."""

    techniques: tuple[str, ...] = ("quantize",)
    """Of `TECHNIQUES`."""
    bits: tuple[int, ...] = BITS
    groups: Mapping[int, tuple[int | None, ...]] | None = None
    """Group sizes by bits, None a whole row: `{4: (128, 64), 8: (None,)}`; default: `GROUPS_OF_BITS` and
    `GROUPS_OF_VALUES` of `memfit.plan.groups`."""
    symmetric: bool = True
    values: tuple[Values, ...] = ("int",)
    """What codes may stand for. `bits` are those of integers and codebooks."""
    vector: int = VECTORS[-1]
    """Most weights that a level of a codebook stands for, as far as their code has 8 bits."""
    kv_bits: tuple[int, ...] = (16, 8, 4)
    """Widths of the KV cache; 16 may be chosen in any case. Where nothing is searched, the first is taken."""
    activations: int = 16
    """8: linear layers of 8 bits have activations of 8 bits, too, and are multiplied in integers."""
    smooth: bool = True
    """Where activations are of 8 bits and there is a text: even out their channels before, in the norms' weights."""
    sparse: tuple[Sparse, ...] = SPARSE
    """What pruning may leave."""
    ranks: tuple[int | float, ...] = RANKS
    """Of factors: whole numbers, or shares of the bytes in 16 bits."""
    residual_ranks: tuple[int, ...] = RESIDUAL_RANKS
    """Of factors beside integers, where both are allowed."""
    heads: tuple[float, ...] = HEADS
    """Shares of a head's dimensions that values and output of an attention may keep, where factors are allowed."""
    keep: tuple[str, ...] = ()
    """Groups that stay in 16 bits: a part of their names is enough; `embeddings` means all tables and what is tied."""

    def __post_init__(self) -> None:
        _require_tuple("techniques", self.techniques, '("quantize",)')
        _require_tuple("keep", self.keep, '("embeddings",)')
        _require_tuple("values", self.values, '("nf4",)')
        _require_known("bits", self.bits, (*BITS, 16))
        _require_known("kv_bits", self.kv_bits, KV_BITS)
        self._require_groups()
        if unknown := [kind for kind in self.values if kind not in get_args(Values)]:
            raise UsageError(f"{unknown[0]!r} is no kind of values; known: {', '.join(get_args(Values))}.")
        require_techniques(self.techniques)
        if bad := [share for share in self.heads if not 0 < share < 1]:
            raise UsageError(f"heads keep a share of their dimensions between 0 and 1; got {bad[0]}.")
        if not self.techniques:
            raise UsageError(f"nothing is allowed. Allow some of {', '.join(TECHNIQUES)}.")
        if bad := [rank for rank in self.ranks if not (rank >= 1 if isinstance(rank, int) else 0 < rank < 1)]:
            raise UsageError(f"a rank is a whole number from 1, or a share of the bytes between 0 and 1; got {bad[0]}.")
        if self.vector not in VECTORS:
            known = ", ".join(map(str, VECTORS))
            raise UsageError(
                f"a level of a codebook stands for {known} weights, got {self.vector}. 4 suits 2 bits, 2 suits 3 and 4."
            )
        if self.activations not in (16, 8):
            raise UsageError(f"activations have 16 or 8 bits, got {self.activations}.")
        sizes = (None,) if self.groups is None else self.groups.get(8, (None,))
        if self.activations == 8 and None not in sizes:
            raise UsageError(
                f"activations of 8 bits go with weights of one scale a row, and what is allowed is groups of "
                f"{sizes[0]}. Leave --group out, or --activations 8."
            )
        if self.activations == 8 and (8 not in self.bits or not self.symmetric):
            what = "symmetric weights of 8 bits"
            given = f"{', '.join(map(str, self.bits)) or 'no'} bits" + ("" if self.symmetric else ", asymmetric")
            raise UsageError(
                f"activations of 8 bits go with {what}, and what is allowed is {given}. Allow 8 bits (--bits 8), "
                "or leave --activations 8 out."
            )

    def _require_groups(self) -> None:
        if self.groups is None:
            return
        if not isinstance(self.groups, Mapping):
            raise UsageError(f"groups are told by bits, as {{4: (128,), 8: (None,)}}; got {self.groups!r}.")
        for bits, sizes in self.groups.items():
            _require_tuple(f"groups[{bits}]", sizes, "(128, 64)")
            if bad := [size for size in sizes if size is not None and (size < 32 or size % 32)]:
                raise UsageError(
                    f"groups[{bits}]: a group has a multiple of 32 inputs, or is None, a whole row; got {bad[0]}."
                )

    @property
    def asks_for_less(self) -> bool:
        """Whether anything is allowed but 16 bits."""
        fewer = any(bits < 16 for bits in self.bits) or any(kind in BITS_OF for kind in self.values)
        return fewer or self.techniques != ("quantize",)

    def schemes(self, group: Group) -> tuple[Form, ...]:
        """Schemes and other forms for one group; none if it is kept."""
        if any(self.keeps(part, group) for part in self.keep):
            return ()
        integers = self._integers(group) if "quantize" in self.techniques else ()
        pruned = sparse_candidates(group, self.sparse) if "prune" in self.techniques else ()
        factors = rank_candidates(group, self.ranks) if "low-rank" in self.techniques else ()
        beside = residual_candidates(group, integers, self.residual_ranks) if "low-rank" in self.techniques else ()
        shared = basis_candidates(group, self.ranks) if "share" in self.techniques else ()
        return (*integers, *pruned, *factors, *beside, *shared)

    def schemes_of(self, groups: Sequence[Group]) -> dict[str, tuple[Form, ...]]:
        """By name of the group, what it may be stored in, what it may share with another group among it."""
        found = {group.name: self.schemes(group) for group in groups}
        if "share" in self.techniques and self.activations == 16:
            free = [group for group in groups if not any(self.keeps(part, group) for part in self.keep)]
            for name, forms in like_candidates(free, self.ranks).items():
                found[name] += forms
        return found

    def narrowed(self, model: nn.Module, groups: Sequence[Group]) -> tuple[NarrowHeads, ...]:
        """The attentions that may have narrower heads, and what both of their groups may then become."""
        if "low-rank" not in self.techniques or self.activations != 16:
            return ()
        free = [group for group in groups if not any(self.keeps(part, group) for part in self.keep)]
        return narrow_heads(narrowings(model), free, self.schemes_of(groups), self.heads)

    def _integers(self, group: Group) -> tuple[Scheme, ...]:
        bits = tuple(b for b in self.bits if b < 16)
        return candidates(
            group, bits=bits, groups=self.groups, symmetric=self.symmetric, values=self.values,
            activations=self.activations, vector=self.vector,
        )  # fmt: skip

    def smoothed(self, groups: Iterable[Group]) -> frozenset[str]:
        """The layers whose inputs are to be evened out, where there is a text: those that may get them in 8 bits."""
        wanted = [group for group in groups if any(scheme.activations == 8 for scheme in self._integers(group))]
        return frozenset(member for group in wanted for member in group.members) if self.smooth else frozenset()

    def is_kept(self, group: Group) -> bool:
        """Whether a group stays in 16 bits."""
        return any(self.keeps(part, group) for part in self.keep)

    @staticmethod
    def keeps(part: str, group: Group) -> bool:
        """Whether one of `keep` means a group."""
        if part == EMBEDDINGS:
            return group.kind == "embedding"
        return any(part in name for name in (group.name, *group.members))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Allowed":
        """The settings that `dataclasses.asdict` gave, after JSON made lists and text of them."""
        groups = data["groups"]
        return cls(
            bits=tuple(data["bits"]),
            techniques=tuple(data["techniques"]),
            sparse=tuple(Sparse(**form) for form in data["sparse"]),
            ranks=tuple(data["ranks"]),
            residual_ranks=tuple(data["residual_ranks"]),
            groups=None if groups is None else {int(bits): tuple(sizes) for bits, sizes in groups.items()},
            symmetric=data["symmetric"],
            values=tuple(data["values"]),
            vector=data["vector"],
            kv_bits=tuple(data["kv_bits"]),
            activations=data["activations"],
            smooth=data["smooth"],
            heads=tuple(data["heads"]),
            keep=tuple(data["keep"]),
        )

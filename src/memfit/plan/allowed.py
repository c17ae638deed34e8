"""What the search may choose from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from memfit.packed.scheme import BITS, Scheme, Values

from .groups import Group, candidates

EMBEDDINGS: Final = "embeddings"
"""In `Allowed.keep`: every table."""


@dataclass(frozen=True, kw_only=True)
class Allowed:
    """What the search may choose from."""

    bits: tuple[int, ...] = BITS
    groups: Mapping[int, tuple[int | None, ...]] | None = None
    """Group sizes by bits; default: `memfit.plan.groups.GROUPS_OF_BITS` and `GROUPS_OF_VALUES`."""
    symmetric: bool = True
    values: tuple[Values, ...] = ("int",)
    """What codes may stand for. `bits` are those of integers and codebooks."""
    kv_bits: tuple[int, ...] = (16, 8, 4)
    keep: tuple[str, ...] = ()
    """Groups that stay in 16 bits: a part of their names is enough; `embeddings` means all tables and what is tied."""

    def schemes(self, group: Group) -> tuple[Scheme, ...]:
        """Schemes for one group; none if it is kept."""
        if any(self.keeps(part, group) for part in self.keep):
            return ()
        bits = tuple(b for b in self.bits if b < 16)
        return candidates(group, bits=bits, groups=self.groups, symmetric=self.symmetric, values=self.values)

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
            groups=None if groups is None else {int(bits): tuple(sizes) for bits, sizes in groups.items()},
            symmetric=data["symmetric"],
            values=tuple(data["values"]),
            kv_bits=tuple(data["kv_bits"]),
            keep=tuple(data["keep"]),
        )

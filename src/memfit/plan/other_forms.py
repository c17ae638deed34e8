"""What else a group may become than integers: what pruning leaves, and factors."""

import math
from collections.abc import Iterable
from typing import Final

from memfit.packed.forms import LowRank, Sparse
from memfit.packed.scheme import Scheme

from .groups import Group

SPARSE: Final = (
    Sparse(sparsity=0.2), Sparse(sparsity=0.3), Sparse(sparsity=0.5), Sparse(sparsity=0.7), Sparse(pattern="2:4"),
)  # fmt: skip
"""What pruning may leave."""
RANKS: Final = (0.8, 0.65, 0.5, 0.35)
"""Ranks of factors worth asking about, as shares of the bytes in 16 bits."""
RESIDUAL_RANKS: Final = (8, 32)
"""Ranks of factors beside integers."""
RESIDUAL_BITS: Final = 4
"""Up to this width what rounding loses is worth factors."""


def sparse_candidates(group: Group, allowed: Iterable[Sparse]) -> tuple[Sparse, ...]:
    """What the group may be pruned to; none if it is blocked."""
    return tuple(form for form in allowed if group.why_not(form) is None)


def rank_candidates(group: Group, ranks: Iterable[int | float]) -> tuple[LowRank, ...]:
    """Factors that the group may become, the largest first; none if it is blocked.

    ranks: whole numbers, or shares of the bytes that the group has in 16 bits. One rank is for all of its tensors.
    """
    wanted = sorted({_rank(group, rank) for rank in ranks}, reverse=True)
    forms = (LowRank(rank=rank) for rank in wanted if rank > 0)
    return tuple(form for form in forms if group.why_not(form) is None)


def residual_candidates(group: Group, schemes: Iterable[Scheme], ranks: Iterable[int]) -> tuple[LowRank, ...]:
    """Factors beside each of the schemes whose rounding is worth them."""
    bases = [s for s in schemes if s.values == "int" and s.activations == 16 and s.bits <= RESIDUAL_BITS]
    forms = (LowRank(rank=rank, base=base) for base in bases for rank in ranks)
    return tuple(form for form in forms if group.why_not(form) is None)


def _rank(group: Group, rank: int | float) -> int:
    if isinstance(rank, int):
        return rank
    if any(len(shape) != 2 for shape in group.shapes):
        return 0
    return math.floor(rank * group.weights / sum(rows + inputs for rows, inputs in group.shapes))
